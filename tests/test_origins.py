from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import byte_tensors, write_checkpoint
from hub import CANARY, Hub, hasty, loopback

from layercut.api import run_recipe
from layercut.errors import LayercutError
from layercut.origins import carried, stated_by
from layercut.report import ReportSource, read_report
from layercut.stated import CARD, Licence, Stated

CARDS = {"a": b"---\nlicense: mit\n---\n", "b": b"---\nlicense: apache-2.0\n---\n"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with loopback() as running:
        running.connect(monkeypatch, tmp_path / "client", CANARY)
        hasty(monkeypatch)
        for name, text in CARDS.items():
            running.add(f"org/{name}", {CARD: text, "config.json": b"{}"})
        running.add("org/none", {"config.json": b"{}"})
        yield running


def source(reference: str, revision: str | None = None) -> ReportSource:
    return ReportSource(reference=reference, revision=revision, digest="", depth=1, parameters=1)


def test_cards_of_the_hub_at_the_commit_that_was_used(hub: Hub) -> None:
    repository = hub.repos["org/a"]
    commit = repository.resolve("main").id
    repository.commit({CARD: b"---\nlicense: other\nlicense_name: New\n---\n"}, "another licence")
    none = hub.repos["org/none"].resolve("main").id
    found = stated_by({"a": source("org/a@main", commit), "n": source("org/none", none)}, {})
    assert found == {"a": Stated(Licence(("mit",))), "n": Stated()}


def test_cards_of_folders(tmp_path: Path) -> None:
    (tmp_path / CARD).write_bytes(CARDS["b"])
    assert stated_by({"x": source(str(tmp_path)), "y": source(str(tmp_path / "none"))}, {}) == {
        "x": Stated(Licence(("apache-2.0",))),
        "y": Stated(),
    }


@pytest.mark.parametrize("data", [b"\xff\xfe", b"x" * 3_000_000])
def test_what_is_no_card_states_nothing(tmp_path: Path, data: bytes) -> None:
    (tmp_path / CARD).write_bytes(data)
    assert stated_by({"x": source(str(tmp_path))}, {}) == {"x": Stated()}


def test_a_card_at_hand_is_taken(hub: Hub) -> None:
    assert stated_by({"a": source("org/a", "0" * 40)}, {"a": CARDS["b"].decode()})["a"].licence.ids == ("apache-2.0",)
    assert hub.log == []


def test_what_cannot_be_asked_for_is_not_taken_for_nothing(hub: Hub) -> None:
    hub.fail("status", "org/a", status=500, times=-1)
    with pytest.raises(LayercutError, match="org/a"):
        stated_by({"a": source("org/a", "0" * 40)}, {})
    hub.calm()
    with pytest.raises(LayercutError, match="no revision"):
        stated_by({"a": source("org/a", "0" * 40)}, {})


def test_the_card_that_goes_along(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 6, "vocab_size": 8}
    folder = write_checkpoint(tmp_path / "m", byte_tensors(6), config)
    (folder / CARD).write_bytes(CARDS["a"])
    (tmp_path / "r.yaml").write_text(f"model: {folder}\nsteps: [{{prune: {{at: 2}}}}]\noutput: {tmp_path}/out\n", encoding="utf-8")
    report = run_recipe(tmp_path / "r.yaml", progress=False)
    assert carried(tmp_path / "out", report) == CARDS["a"].decode()
    assert report.files[CARD].sha256 == hashlib.sha256(CARDS["a"]).hexdigest()
    (tmp_path / "out" / CARD).write_bytes(CARDS["b"])
    assert carried(tmp_path / "out", read_report(tmp_path / "out")) is None
