from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut import mirror as module
from layercut.caches import cache_folder, hub_cache
from layercut.companions import reject_escape
from layercut.errors import CheckpointError
from layercut.mirror import Listed, Mirror, Span, checked_listing, joined, keep_commit, known_commit, total, without

COMMIT = "c0ffee" + "0" * 34
SHA256, SHA1 = "a" * 64, "b" * 40
FILE = Listed(1000, SHA256)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "layercut"))
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)  # its settings would count
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return Mirror("org/name", COMMIT)


def put(mirror: Mirror, begin: int, data: bytes, name: str = "w") -> None:
    with mirror.writing(name, FILE) as opened:
        opened.seek(begin)
        opened.write(data)
        mirror.keep(name, FILE, opened, Span(begin, begin + len(data)))


def shared(mirror: Mirror, data: bytes, name: str = "w") -> Path:
    """A whole file in the Hub cache."""
    blob = mirror.snapshot.parent.parent / "blobs" / SHA256
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    path = mirror.snapshot / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(blob, path.parent))
    return path


# spans


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: Span(min(pair), max(pair))), max_size=8)


def bytes_of(found: list[Span]) -> set[int]:
    return {at for span in found for at in range(*span)}


@given(spans)
def test_joined_holds_the_same_bytes_in_order(given: list[Span]) -> None:
    found = joined(given)
    assert bytes_of(found) == bytes_of(given)
    assert all(one.begin < one.end for one in found)
    assert all(one.end < other.begin for one, other in pairwise(found))
    assert total(found) == len(bytes_of(given))


@given(spans, st.integers(0, 20))
def test_joined_over_gaps(given: list[Span], gap: int) -> None:
    found = joined(given, gap)
    assert bytes_of(found) >= bytes_of(given)
    assert all(one.end + gap < other.begin for one, other in pairwise(found))
    assert {edge for span in found for edge in span} <= {edge for span in given for edge in span}


@given(spans, spans)
def test_without_is_the_difference(given: list[Span], there: list[Span]) -> None:
    found = without(given, there)
    assert bytes_of(found) == bytes_of(given) - bytes_of(there)
    assert found == sorted(found) and all(one.begin < one.end for one in found)


# files


def test_parts_of_a_file(mirror: Mirror) -> None:
    assert mirror.present("w", FILE) == []
    put(mirror, 100, b"x" * 50)
    put(mirror, 0, b"y" * 10)
    put(mirror, 150, b"z" * 50)
    assert mirror.present("w", FILE) == [Span(0, 10), Span(100, 200)]
    assert mirror.missing("w", FILE, [Span(5, 120), Span(300, 310)]) == [Span(10, 100), Span(300, 310)]
    path = mirror.folder / "w"
    assert path.read_bytes() == b"y" * 10 + bytes(90) + b"x" * 50 + b"z" * 50 + bytes(800)
    assert path.stat().st_blocks * 512 <= 8192, "the rest is holes"


def test_what_is_not_noted_is_not_there(mirror: Mirror) -> None:
    """A process that was killed between the bytes and the note."""
    with mirror.writing("w", FILE) as opened:
        opened.write(b"x" * 100)
    assert mirror.present("w", FILE) == []


@pytest.mark.parametrize(
    "note",
    [
        "",
        "{",
        "[]",
        '{"spans": 1, "digest": "' + SHA256 + '"}',
        '{"spans": [[0]], "digest": "' + SHA256 + '"}',
        '{"spans": [[0, 1001]], "digest": "' + SHA256 + '"}',
        '{"spans": [[9, 3]], "digest": "' + SHA256 + '"}',
        '{"spans": [[0, 10]]}',
    ],
)
def test_notes_that_cannot_be_believed(mirror: Mirror, note: str) -> None:
    put(mirror, 0, b"x" * 10)
    path = mirror.folder.parent.parent / "parts" / COMMIT / "w.json"
    assert json.loads(path.read_text())["spans"] == [[0, 10]]
    path.write_text(note)
    assert mirror.present("w", FILE) == []
    put(mirror, 20, b"x" * 10)
    assert mirror.present("w", FILE) == [Span(20, 30)], "and they are begun anew"
    assert (mirror.folder / "w").read_bytes()[:20] == bytes(20)


def test_a_file_that_is_another_has_none_of_the_bytes(mirror: Mirror) -> None:
    put(mirror, 0, b"x" * 10)
    assert mirror.present("w", Listed(1000, "f" * 64)) == []
    assert mirror.present("w", Listed(1001, SHA256)) == []
    (mirror.folder / "w").unlink()
    assert mirror.present("w", FILE) == []


def test_whole_files_are_links_into_the_hub_cache(mirror: Mirror) -> None:
    put(mirror, 0, b"y" * 10)
    shared(mirror, b"x" * 1000)
    assert mirror.is_whole("w", 1000)
    assert mirror.present("w", FILE) == [Span(0, 1000)]
    assert (mirror.folder / "w").is_symlink() and (mirror.folder / "w").read_bytes() == b"x" * 1000
    assert not (mirror.folder.parent.parent / "parts" / COMMIT / "w.json").exists()
    reject_escape(mirror.folder / "w", mirror.folder)


def test_a_file_of_another_size_is_not_whole(mirror: Mirror) -> None:
    shared(mirror, b"x" * 999)
    assert not mirror.is_whole("w", 1000)
    assert mirror.present("w", FILE) == []


def test_a_hub_cache_that_was_emptied(mirror: Mirror) -> None:
    shared(mirror, b"x" * 1000, "sub/w")
    assert mirror.is_whole("sub/w", 1000)
    (mirror.snapshot.parent.parent / "blobs" / SHA256).unlink()
    assert not mirror.is_whole("sub/w", 1000)
    put(mirror, 0, b"y" * 10, "sub/w")
    assert mirror.present("sub/w", FILE) == [Span(0, 10)]


def test_links_elsewhere_are_escapes(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    mirror.folder.mkdir(parents=True)
    (mirror.folder / "w").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="link out of the folder"):
        reject_escape(mirror.folder / "w", mirror.folder)
    other = Mirror("other/name", COMMIT)
    path = shared(other, b"x")
    (mirror.folder / "v").symlink_to(path)
    with pytest.raises(CheckpointError, match="link out of the folder"):
        reject_escape(mirror.folder / "v", mirror.folder)


def test_only_the_own_cache_may_link_into_the_hub_cache(mirror: Mirror, tmp_path: Path) -> None:
    path = shared(mirror, b"x")
    stranger = tmp_path / "elsewhere" / "hub" / "models--org--name" / "snapshots" / COMMIT
    stranger.mkdir(parents=True)
    (stranger / "w").symlink_to(path)
    with pytest.raises(CheckpointError, match="link out of the folder"):
        reject_escape(stranger / "w", stranger)


def test_at(mirror: Mirror, tmp_path: Path) -> None:
    mirror.folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(mirror.folder)
    for folder in (mirror.folder, tmp_path / "link", mirror.folder / "." / "x" / ".."):
        found = Mirror.at(folder)
        assert found is not None and (found.repo, found.commit, found.folder) == ("org/name", COMMIT, mirror.folder)
    assert Mirror.at(mirror.folder.parent) is None
    assert Mirror.at(mirror.folder.parent / "main") is None
    assert Mirror.at(hub_cache() / "models--org--name" / "snapshots" / COMMIT) is None
    assert Mirror.at(tmp_path) is None
    found = Mirror.at(cache_folder() / "hub" / "models--gpt2" / "snapshots" / COMMIT)
    assert found is not None and found.repo == "gpt2"


HOLDS = """
import sys
from layercut.mirror import Mirror
with Mirror(*sys.argv[1:]).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_one_process_writes_at_a_time(mirror: Mirror) -> None:
    command = [sys.executable, "-c", HOLDS, mirror.repo, mirror.commit]
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[1])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        descriptor = os.open(mirror.folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with mirror.locked(), pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


# listings and references


def test_listing(mirror: Mirror) -> None:
    assert mirror.listing() is None
    files = {"b": Listed(1, SHA1), "a/c é": Listed(2**40, SHA256)}
    mirror.keep_listing(files)
    assert mirror.listing() == files
    assert [file.large for file in files.values()] == [False, True]


def test_listing_of_the_hub_cache(mirror: Mirror) -> None:
    path = mirror.snapshot.parent.parent / "trees" / f"{COMMIT}.json"
    path.parent.mkdir(parents=True)
    note = {"small": {"size": 5, "blob_id": SHA1}, "large": {"size": 9, "blob_id": SHA1, "lfs_sha256": SHA256, "lfs_size": 9}}
    path.write_text(json.dumps({"format_version": 1, "files": note}))
    assert mirror.listing() == {"large": Listed(9, SHA256), "small": Listed(5, SHA1)}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": []}', '{"files": {"a": {"size": -1, "blob_id": ""}}}', '{"files": {"a": 1}}'])
def test_listings_that_are_none(mirror: Mirror, text: str) -> None:
    mirror.keep_listing({})
    (mirror.folder.parent.parent / "trees" / f"{COMMIT}.json").write_text(text)
    assert mirror.listing() is None


def test_names_that_lead_elsewhere_are_not_listed() -> None:
    names = ["a", "../b", "/c", "d/../e", "f\\g", "C:h", "", "i\n"]
    assert list(checked_listing((name, 1, SHA1) for name in names)) == ["a"]


@pytest.mark.parametrize(("size", "digest"), [(-1, SHA1), (True, SHA1), ("1", SHA1), (2**63, SHA1), (1, "x"), (1, None), (1, "A" * 40)])
def test_nonsense_is_not_listed(size: object, digest: object) -> None:
    with pytest.raises(CheckpointError, match=r"^the Hub lists 'a' with the size"):
        checked_listing([("a", size, digest)])


def test_commit_of_a_branch(mirror: Mirror) -> None:
    assert known_commit("org/name", "feature/x") is None
    path = hub_cache() / "models--org--name" / "refs" / "feature" / "x"
    path.parent.mkdir(parents=True)
    path.write_text("d" * 40)
    os.utime(path, (1000, 1000))
    assert known_commit("org/name", "feature/x") == "d" * 40
    keep_commit("org/name", "feature/x", COMMIT)
    assert known_commit("org/name", "feature/x") == COMMIT
    os.utime(path, (2**32, 2**32))
    assert known_commit("org/name", "feature/x") == "d" * 40, "what was seen last counts"
    path.write_text("../../etc")
    assert known_commit("org/name", "feature/x") == COMMIT
