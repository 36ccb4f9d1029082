"""hubmodel.py: which bytes of a weight file are its header, what is here, and one line for what is missing. The rest: test_source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import failure
from hub import Hub

from layercut.caches import hub_cache
from layercut.errors import CheckpointError
from layercut.header import MAX_HEADER, encode_header
from layercut.hubmodel import FIRST, UNASKED, HubModel, header_span, open_folder, there_in
from layercut.mirror import Listed, Mirror, Span, keep_commit

COMMIT = "c0ffee" + "0" * 34
DIGEST = "a" * 64
HEADER = encode_header([("a", "F32", (2,))], {"format": "pt"})
WEIGHTS = HEADER + bytes(8)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "layercut"))
    monkeypatch.setattr("layercut.mirror.hub_cache", lambda: tmp_path / "hub")
    return Mirror("org/name", COMMIT)


def offline(reference: str = "org/name", revision: str = COMMIT) -> HubModel:
    """As in every test that has no Hub."""
    return HubModel(reference, "org/name", revision, progress=False)


def put(mirror: Mirror, name: str, size: int, data: bytes) -> Listed:
    """The first bytes of a file, as they are after they were fetched."""
    file = Listed(size, DIGEST)
    with mirror.writing(name, file) as opened:
        opened.write(data)
        mirror.keep(name, file, opened, Span(0, len(data)))
    return file


def refused(call: Callable[[], object]) -> str:
    return failure(CheckpointError, call)


# Headers


@pytest.mark.parametrize(("size", "end"), [(10**9, FIRST), (FIRST, FIRST), (FIRST - 1, FIRST - 1), (7, 7), (0, 0)])
def test_of_a_file_that_is_not_here_the_first_bytes_are_asked_for(mirror: Mirror, size: int, end: int) -> None:
    assert header_span(mirror, "w", Listed(size, DIGEST)) == Span(0, end)


@pytest.mark.parametrize(
    ("size", "length", "end"),
    [
        (10**9, 16, 24),
        (10**9, FIRST, FIRST + 8),
        (10**9, MAX_HEADER, MAX_HEADER + 8),
        (10**9, MAX_HEADER + 1, FIRST),  # read, and refused, as what it is
        (10**9, 2**64 - 1, FIRST),
        (1000, 5000, 1000),
        (1008, 1000, 1008),
    ],
)
def test_the_length_at_the_begin_of_a_file_says_where_its_header_ends(mirror: Mirror, size: int, length: int, end: int) -> None:
    file = put(mirror, "w", size, length.to_bytes(8, "little"))
    assert header_span(mirror, "w", file) == Span(0, end)


def test_a_length_of_which_a_part_is_here_says_nothing(mirror: Mirror) -> None:
    file = put(mirror, "w", 10**6, (16).to_bytes(8, "little")[:7])
    assert header_span(mirror, "w", file) == Span(0, FIRST)


# What is here


def test_what_decides_where_the_weights_are(tmp_path: Path) -> None:
    assert there_in(tmp_path / "gone") == []
    assert there_in(tmp_path / ("n" * 300)) == [], "a name that is too long is that of nothing"
    for name in ("model.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json"):
        (tmp_path / name).touch()
    assert there_in(tmp_path) == ["config.json", "model.safetensors", "pytorch_model.bin"]


def test_a_folder_is_opened_as_what_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    found = open_folder(tmp_path, "org/name", COMMIT)
    assert (found.reference, found.revision, list(found.tensors)) == ("org/name", COMMIT, ["a"])


def test_a_snapshot_that_somebody_else_left_is_opened(mirror: Mirror) -> None:
    """No listing says what else the repository holds."""
    mirror.snapshot.mkdir(parents=True)
    (mirror.snapshot / "config.json").write_text("{}", encoding="utf-8")
    message = "no such folder, and not in the local Hub cache, and HF_HUB_OFFLINE forbids to ask the Hub"
    hint = "unset it to download the model, or leave out --offline, or give a folder"
    assert refused(lambda: offline().open(whole=False)) == f"org/name: {message}; {hint}"
    (mirror.snapshot / "model.safetensors").write_bytes(WEIGHTS)
    found = offline().open(whole=False)
    assert (found.folder, found.left_out) == (mirror.snapshot, (("files of the repository", UNASKED),))


def test_a_snapshot_that_lacks_a_shard_is_not_taken_for_whole(mirror: Mirror) -> None:
    mirror.snapshot.mkdir(parents=True)
    (mirror.snapshot / "config.json").write_text("{}", encoding="utf-8")
    weight_map = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (mirror.snapshot / "model.safetensors.index.json").write_text(json.dumps(weight_map), encoding="utf-8")
    (mirror.snapshot / "model-1.safetensors").write_bytes(WEIGHTS)
    assert "not in the local Hub cache" in refused(lambda: offline().open(whole=False))
    (mirror.snapshot / "model-2.safetensors").write_bytes(WEIGHTS)
    (mirror.snapshot / "config.json").rename(mirror.snapshot / "other.json")
    assert "not in the local Hub cache" in refused(lambda: offline().open(whole=False))


# What is missing


def test_offline_the_commit_is_the_one_that_was_seen_last(mirror: Mirror) -> None:
    assert offline()._commit() == COMMIT, "a commit is known as it stands"
    assert refused(lambda: offline(revision="main")._commit()).startswith("org/name: no such folder, and not in the local Hub cache")
    keep_commit("org/name", "main", COMMIT)
    assert offline(revision="main")._commit() == COMMIT


def test_all_that_is_missing_is_named_in_order(mirror: Mirror) -> None:
    here = put(mirror, "c", 20, bytes(4))
    files = {"b": Listed(9, DIGEST), "c": here, "a": Listed(1, DIGEST)}
    hint = "HF_HUB_OFFLINE forbids to ask the Hub: unset it, or leave out --offline"
    assert refused(lambda: offline().fetch(mirror, files)) == f"org/name: not in the local cache: a, b, c; {hint}"
    spans = lambda end: offline().fetch_spans(mirror, "c", here, [Span(0, end)], lambda count: None)  # noqa: E731
    assert spans(4) is None, "these are here"
    offline().fetch(mirror, {})
    assert refused(lambda: spans(5)) == f"org/name: not in the local cache: c; {hint}"


def test_what_is_no_name_of_a_model_is_not_asked_for(mirror: Mirror) -> None:
    model = HubModel("a/b/c", "a/b/c", "main", progress=False)
    assert refused(lambda: model.open(whole=False)) == "a/b/c: no such folder, and not a Hub id; a Hub id looks like org/name"


# Before a Hub


def test_spans_of_a_server_that_knows_no_ranges_are_the_whole_file(hub: Hub) -> None:
    repo = hub.add("org/name", {"config.json": b"{}", "model.safetensors": WEIGHTS, "other.safetensors": WEIGHTS})
    model = HubModel("org/name", "org/name", "main", progress=False)
    mirror = Mirror("org/name", repo.branches["main"])
    listing = model._listing(mirror)
    assert listing is not None and listing == mirror.listing()
    counts: list[int] = []
    model.fetch_spans(mirror, "model.safetensors", listing["model.safetensors"], [Span(0, 8)], counts.append)
    assert counts == [8] and hub.fetched() == {"model.safetensors": 8}
    hub.ranges = False
    model.fetch_spans(mirror, "other.safetensors", listing["other.safetensors"], [Span(4, 8)], counts.append)
    assert counts == [8], "a whole file is no part of what was to come"
    assert (hub_cache() / "models--org--name" / "snapshots" / mirror.commit / "other.safetensors").read_bytes() == WEIGHTS


def test_the_commit_of_a_branch_is_asked_for_and_kept(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.add("org/name", {"config.json": b"{}"}).branches["main"]
    assert HubModel("org/name", "org/name", "main", progress=False)._commit() == commit
    assert capsys.readouterr().err == "", "it is called what it was asked for"
    hub.offline(monkeypatch)
    assert HubModel("org/name", "org/name", "main", progress=False)._commit() == commit


def test_without_an_answer_the_commit_in_the_cache_is_taken_and_said(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    commit = hub.add("org/name", {"config.json": b"{}"}).branches["main"]
    hub.fail("status", "/api/models/org/name", status=503, times=-1)
    unknown = HubModel("org/name", "org/name", "main", progress=False)
    assert refused(unknown._commit).startswith("org/name: no such folder, and not in the local Hub cache, and the Hub ")
    keep_commit("org/name", "main", commit)
    model = HubModel("org/name", "org/name", "main", progress=False)
    assert model._commit() == commit and not model.asks
    assert capsys.readouterr().err.endswith(f"; the commit in the local cache is taken, {commit}\n")
