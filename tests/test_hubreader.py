from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from conftest import failure
from hub import CANARY, Hub, User, hasty

from layercut.errors import CheckpointError
from layercut.hubfaults import TRIES, NoRangesError, UnreachableError
from layercut.hubreader import HubReader
from layercut.mirror import Listed, Mirror, Span

DATA = b"".join(hashlib.sha256(bytes([number])).digest() for number in range(256)) * 40
SMALL = b"some text\n"
AGAIN = "what arrived is kept: run the same command again"


class Reading:
    """A repository on the loopback Hub, and its reader."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.repo = hub.add("org/name", {"weights.safetensors": DATA, "notes.txt": SMALL, "more.safetensors": DATA[::-1]})
        self.reader = HubReader("org/name", "org/name", progress=False)
        self.mirror = Mirror("org/name", self.repo.branches["main"])
        self.files = self.reader.listing(self.mirror.commit)
        hub.log.clear()

    def read(self, begin: int, end: int) -> list[int]:
        moved: list[int] = []
        self.reader.read(self.mirror, "weights.safetensors", self.files["weights.safetensors"], Span(begin, end), moved.append)
        return moved

    def present(self) -> list[Span]:
        return self.mirror.present("weights.safetensors", self.files["weights.safetensors"])

    def bytes_at(self, begin: int, end: int) -> bytes:
        return (self.mirror.folder / "weights.safetensors").read_bytes()[begin:end]

    def download(self, *names: str) -> None:
        self.reader.download(self.mirror, {name: self.files[name] for name in names})

    def refusal(self, begin: int = 1000, end: int = 50_000) -> str:
        return failure(CheckpointError, lambda: self.read(begin, end))


@pytest.fixture
def reading(hub: Hub) -> Reading:
    return Reading(hub)


def test_listing(reading: Reading) -> None:
    blobs = reading.repo.resolve("main").files
    assert reading.files == {name: Listed(len(blob.data), blob.etag) for name, blob in sorted(blobs.items())}
    assert [name for name, file in reading.files.items() if file.large] == ["more.safetensors", "weights.safetensors"]


def test_find(reading: Reading) -> None:
    head = reading.repo.branches["main"]
    reading.repo.tag("v1")
    for revision in ("main", "v1", head):
        assert reading.reader.find(revision) == (head, "org/name")
    reading.hub.rename("org/name", "org/new")
    assert reading.reader.find("main") == (head, "org/new")


def test_read_fetches_the_span_and_no_more(reading: Reading) -> None:
    moved = reading.read(1000, 51_000)
    assert sum(moved) == 50_000 == reading.hub.sent()
    assert reading.bytes_at(1000, 51_000) == DATA[1000:51_000]
    assert reading.present() == [Span(1000, 51_000)]
    assert [request.range for request in reading.hub.log if request.cdn] == ["bytes=1000-50999"]


def test_the_token_stays_with_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.connect(monkeypatch, tmp_path / "client", CANARY)
    reading = Reading(hub)
    reading.read(0, 100)
    reading.download("weights.safetensors", "notes.txt")
    assert {request.token for request in hub.log if not request.cdn and "/resolve/" in request.path} == {CANARY}
    assert hub.leaks() == []


@pytest.mark.parametrize("kind", ["cut", "short"])
def test_read_goes_on_where_it_was_cut(reading: Reading, kind: str) -> None:
    reading.hub.fail(kind, "GET /org/name/[0-9a-f]{64} weights", at=20_000)
    reading.read(1000, 51_000)
    assert reading.bytes_at(1000, 51_000) == DATA[1000:51_000]
    assert reading.hub.sent() == 50_000, "nothing was fetched twice"
    assert reading.hub.log[-1].range == f"bytes={21_000 if kind == 'cut' else 31_000}-50999"


def test_read_is_patient_as_long_as_it_gets_on(reading: Reading) -> None:
    reading.hub.fail("cut", "GET /org/name/[0-9a-f]{64} ", at=1000, times=45)
    reading.read(1000, 51_000)
    assert reading.bytes_at(1000, 51_000) == DATA[1000:51_000]
    assert reading.hub.sent() == 50_000


def test_read_gives_up_and_keeps_what_arrived(reading: Reading) -> None:
    hits = 3
    reading.hub.fail("cut", "GET /org/name/[0-9a-f]{64} ", at=1000, times=hits)
    reading.hub.fail("status", "GET /org/name/[0-9a-f]{64} ", status=500, times=-1)
    assert reading.refusal() == "org/name: the Hub answers 500; try again later"
    assert len(reading.hub.log) == 2 * hits + 2 * (TRIES - 1)
    assert reading.present() == [Span(1000, 1000 + 1000 * hits)]
    reading.hub.calm()
    reading.hub.log.clear()
    for span in reading.mirror.missing("weights.safetensors", reading.files["weights.safetensors"], [Span(1000, 50_000)]):
        reading.read(*span)
    assert reading.bytes_at(1000, 50_000) == DATA[1000:50_000]
    assert reading.hub.sent() == 49_000 - 1000 * hits


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(reading: Reading, status: int) -> None:
    reading.hub.fail("status", "GET .*weights", status=status, times=TRIES - 1)
    reading.read(0, 1000)
    assert reading.bytes_at(0, 1000) == DATA[:1000]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 412])
def test_what_will_not_pass_is_not(reading: Reading, status: int) -> None:
    reading.hub.fail("status", "GET .*weights", status=status, times=-1)
    assert str(status) in reading.refusal()
    assert len(reading.hub.log) == 1, "asked once"


def test_silence(reading: Reading) -> None:
    reading.hub.fail("silent", "weights", times=TRIES - 1)
    reading.read(0, 1000)
    reading.hub.fail("silent", "weights", times=-1)
    assert reading.refusal() == "org/name: the Hub cannot be reached; check the network, or give a folder"


def test_slow_is_not_broken(reading: Reading) -> None:
    reading.hub.fail("slow", "GET /org/name/[0-9a-f]{64} ", at=0.02)
    reading.read(0, 50_000)
    assert reading.bytes_at(0, 50_000) == DATA[:50_000]


def test_a_server_that_stops_in_the_middle(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower than anybody waits: given up, and asked again."""
    monkeypatch.setattr("layercut.hubreader.PATIENCE", 1)
    reading.hub.fail("slow", "GET /org/name/[0-9a-f]{64} ", at=3)
    reading.read(0, 50_000)
    assert reading.bytes_at(0, 50_000) == DATA[:50_000]


def test_waits(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = hasty(monkeypatch)
    reading.hub.fail("status", "GET .*weights", status=503, times=3)
    reading.hub.fail("status", "GET .*weights", status=429, headers={"Retry-After": "9"})
    reading.read(0, 1000)
    assert waited == [0.5, 1.0, 2.0, 9.0]
    waited.clear()
    reading.hub.fail("status", "GET .*weights", status=429, headers={"Retry-After": "3600"}, times=-1)
    assert "run again in 3600 seconds" in reading.refusal()
    assert waited == []


def test_server_without_ranges(reading: Reading) -> None:
    reading.hub.ranges = False
    reading.read(0, 1000)
    assert reading.bytes_at(0, 1000) == DATA[:1000]
    with pytest.raises(NoRangesError):
        reading.read(1000, 2000)
    assert reading.present() == [Span(0, 1000)]


def test_another_file_than_was_listed(reading: Reading) -> None:
    """The commit stands for other contents: a mirror that lies, or a repository that was rewritten."""
    listed = reading.files["weights.safetensors"]
    for file, said in [
        (listed._replace(digest="0" * 64), "is another file than the Hub lists"),
        (listed._replace(size=listed.size + 1), "has another size than the Hub lists"),
    ]:
        with pytest.raises(CheckpointError, match=f"org/name: the download fails again and again: weights.safetensors {said}; {AGAIN}"):
            reading.reader.read(reading.mirror, "weights.safetensors", file, Span(10, 20))
        assert reading.mirror.present("weights.safetensors", file) == []


# whole files


def test_download(reading: Reading) -> None:
    reading.download("weights.safetensors", "notes.txt")
    assert (reading.mirror.snapshot / "weights.safetensors").read_bytes() == DATA
    assert (reading.mirror.snapshot / "notes.txt").read_bytes() == SMALL
    assert reading.hub.fetched() == {"notes.txt": len(SMALL), "weights.safetensors": len(DATA)}
    reading.hub.log.clear()
    reading.download("weights.safetensors", "notes.txt")
    assert reading.hub.log == []


@pytest.mark.parametrize("name", ["weights.safetensors", "notes.txt"])
def test_a_damaged_file_is_fetched_again(reading: Reading, name: str) -> None:
    cdn = "/org/name/[0-9a-f]{64} " if name.startswith("weights") else ".*resolve"
    reading.hub.fail("garble", f"GET {cdn}", at=5, times=2)
    reading.download(name)
    assert (reading.mirror.snapshot / name).read_bytes() == reading.repo.files()[name]
    assert reading.hub.sent(name) == 3 * len(reading.repo.files()[name])


def test_a_file_that_is_always_damaged_does_not_stay(reading: Reading) -> None:
    reading.hub.fail("garble", "GET /org/name/[0-9a-f]{64} ", at=5, times=-1)
    with pytest.raises(CheckpointError) as caught:
        reading.download("weights.safetensors")
    assert str(caught.value) == f"org/name: the download fails again and again: weights.safetensors arrived damaged; {AGAIN}"
    blobs = [path for path in (reading.mirror.snapshot.parent.parent / "blobs").iterdir() if not path.name.endswith(".lock")]
    assert blobs == [] and not (reading.mirror.snapshot / "weights.safetensors").exists()


def test_a_damaged_file_in_the_cache_is_replaced(reading: Reading) -> None:
    """Cut short by another program, or by a full disk."""
    reading.download("weights.safetensors")
    path = (reading.mirror.snapshot / "weights.safetensors").resolve()
    path.write_bytes(DATA[:100])
    reading.download("weights.safetensors")
    assert (reading.mirror.snapshot / "weights.safetensors").read_bytes() == DATA


def test_files_that_arrived_are_not_fetched_again(reading: Reading) -> None:
    reading.hub.fail("status", "HEAD .*more", status=500, times=-1)
    with pytest.raises(UnreachableError, match="the Hub answers 500"):
        reading.download("weights.safetensors", "more.safetensors", "notes.txt")
    reading.hub.calm()
    reading.download("weights.safetensors", "more.safetensors", "notes.txt")
    assert reading.hub.fetched() == {"more.safetensors": len(DATA), "notes.txt": len(SMALL), "weights.safetensors": len(DATA)}


def test_forbidden(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    reading.hub.offline(monkeypatch)
    expected = "org/name: HF_HUB_OFFLINE forbids to ask the Hub; unset it, or leave out --offline"
    for call in (lambda: reading.read(0, 10), lambda: reading.download("notes.txt"), lambda: reading.reader.find("main")):
        with pytest.raises(UnreachableError) as caught:
            call()
        assert str(caught.value) == expected
    assert reading.hub.log == []


def test_nothing_is_said_on_the_way(reading: Reading, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """The client would log addresses with their signatures."""
    reading.hub.storm(1, match="weights|notes|more")
    reading.download("weights.safetensors", "notes.txt", "more.safetensors")
    assert capfd.readouterr().err == "" and caplog.text == ""


# who may


def test_private_gated_and_unknown(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.users["hf_other"] = User("other")
    hub.add("me/private", {"notes.txt": SMALL}, private=True)
    hub.add("org/gated", {"notes.txt": SMALL}, gated=True)
    for token, said in [
        (None, "a private one; check the name"),
        ("hf_other", "a private one that your token does not see"),
        ("hf_wrong", "the Hub does not accept the token (401); log in with: hf auth login, or unset HF_TOKEN"),
    ]:
        hub.connect(monkeypatch, tmp_path / "client", token)
        with pytest.raises(CheckpointError) as caught:
            HubReader("me/private", "me/private").find("main")
        assert said in str(caught.value)
    hub.connect(monkeypatch, tmp_path / "client", CANARY)
    assert HubReader("me/private", "me/private").find("main")[1] == "me/private"
    mirror = Mirror("org/gated", hub.repos["org/gated"].branches["main"])
    with pytest.raises(CheckpointError, match="a gated model, and your token was not granted access"):
        HubReader("org/gated", "org/gated").download(mirror, {"notes.txt": Listed(len(SMALL), "0" * 40)})
    with pytest.raises(CheckpointError, match="a gated model, and your token was not granted access"):
        HubReader("org/gated", "org/gated").read(mirror, "notes.txt", Listed(len(SMALL), "0" * 40), Span(0, 5))
