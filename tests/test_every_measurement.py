"""Every model type of transformers is measured, with the states that plain hooks see, or is refused with the reason.

By default the types that people use most and a tenth of the others are run, as for the cuts; see test_every_architecture.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import measuring
import oracle
import pytest
import sweep
import torch
import transformers
import zoo
from conftest import byte_tokenizer, script
from measuring import REFUSED, RESIDENT, WRONG

from layercut.cli import main
from layercut.exceptions import PADDED
from layercut.loading import layers_of
from layercut.plan import Plan
from layercut.runner import Boundaries, by_token
from layercut.tokens import Sample

PAGE = script("outcomes").PAGES["measured"]
REFUSED_CAUSAL = (
    "blt", "cpmant", "dory", "gemma4_assistant", "gemma4_unified_assistant", "hrm_text", "mllama", "musicgen", "musicgen_melody",
    "prophetnet", "reformer", "xlm",
)  # fmt: skip
"""The language models that are not measured: their layers are looped or in parts, they hear, or read the states of another model, they
put something before the text, or pad it themselves."""


pytestmark = pytest.mark.usefixtures("quietly")


@pytest.mark.parametrize("name", sweep.chosen())
@pytest.mark.filterwarnings("ignore")
def test_states_are_those_of_plain_hooks_or_refused(name: str, tmp_path: Path) -> None:
    task, _, kind = name.partition(":")
    examined = measuring.examine(kind, task, tmp_path)
    assert not [outcome for outcome in examined.outcomes if outcome.verdict == WRONG]
    assert all(outcome.why and "\n" not in outcome.why for outcome in examined.outcomes if outcome.verdict in (REFUSED, RESIDENT))
    assert bool(examined.outcomes) != bool(examined.reason)
    if PAGE.version == transformers.__version__ and zoo.lacking(kind) is None:  # it is made with all packages that towers need
        assert sweep.row(examined) == PAGE.listed()[name], f"make the page again: {sys.executable} docs/outcomes.py measured {name}"


def test_all_other_causal_types_are_measured() -> None:
    if PAGE.version != transformers.__version__:
        pytest.skip("the page is of another version of transformers")
    causal = {name.partition(":")[2]: PAGE.kind_of(told) for name, told in PAGE.listed().items() if name.startswith("causal:")}
    assert len(causal) > 180
    assert tuple(sorted(name for name, kind in causal.items() if kind == "refused")) == REFUSED_CAUSAL


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ("measured", "measured"),
        ("measured in memory only: tied", "in memory only"),
        ("decoder: measured in memory only: x; encoder: measured", "in memory only"),
        ("decoder: refused: x; encoder: measured", "refused"),
        ("refused: x", "refused"),
        ("not run: x", "not run"),
    ],
)
def test_what_an_outcome_counts_as(told: str, kind: str) -> None:
    assert PAGE.kind_of(told) == kind


def test_a_wrong_state_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is no rubber stamp: a boundary that another layer made is seen."""
    kept = Boundaries.states
    monkeypatch.setattr(Boundaries, "states", lambda self: [*(found := kept(self))[:2], found[3], *found[3:]])
    examined = measuring.examine("llama", "causal", tmp_path)
    assert [outcome.verdict for outcome in examined.outcomes] == [WRONG]
    assert examined.outcomes[0].why.startswith("hooks: boundary 2 of a sample of ")


def test_a_hook_that_stays_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Boundaries, "__exit__", lambda *given: None)
    examined = measuring.examine("llama", "causal", tmp_path)
    assert [(outcome.verdict, outcome.why) for outcome in examined.outcomes] == [(WRONG, "hooks stay attached")]


@pytest.mark.parametrize("kind", [kind for kind in PADDED if kind != "diffusion_gemma"])
@pytest.mark.filterwarnings("ignore")
def test_types_in_which_pads_count_are_no_others(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their row their states would be those of other texts."""
    monkeypatch.setattr(measuring.engine, "PADDED", {})
    assert {outcome.verdict for outcome in measuring.examine(kind, "masked", tmp_path).outcomes} == {WRONG}


# Forms of a state


def test_a_state_by_token() -> None:
    plain = torch.arange(24.0).reshape(2, 3, 4)
    assert by_token(plain, 2, 3) is not None and torch.equal(by_token(plain, 2, 3), plain)  # type: ignore[arg-type]
    assert torch.equal(by_token(plain.transpose(0, 1), 2, 3), plain)  # type: ignore[arg-type]
    streams = torch.stack([plain, plain + 100])  # (streams, samples, tokens, hidden)
    side_by_side = torch.cat([plain, plain + 100], 2)
    assert torch.equal(by_token(streams, 2, 3), side_by_side)  # type: ignore[arg-type]
    assert torch.equal(by_token(streams.movedim(0, 2), 2, 3), side_by_side)  # type: ignore[arg-type]
    for shape in [(2, 4, 4), (6, 4), (2, 3), (5, 6, 2, 3), (1, 2, 3, 4, 5)]:
        assert by_token(torch.zeros(shape), 2, 3) is None


def test_parts_of_layers_are_no_layers() -> None:
    model = transformers.XLMModel(transformers.XLMConfig(vocab_size=60, emb_dim=16, n_layers=3, n_heads=2))
    with pytest.raises(measuring.LayercutError, match=r"^XLMModel keeps the parts of its layers in several lists \(attentions, "):
        layers_of(model, 3, "transformer.attentions.")


# Plans of one stack


def planned(name: str, stack: str | None, folder: Path, layers: int = 2) -> tuple[sweep.Source, Plan]:
    """A plan in which the block is left to measuring, made by the command."""
    task, _, kind = name.partition(":")
    source = sweep.saved(kind, task, folder / "source")
    byte_tokenizer().save_pretrained(source.folder)
    for number, text in enumerate(measuring.TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    recipe: dict[str, Any] = {"model": str(source.folder), "steps": [{"prune": {"layers": layers, "strategy": "block"}}]}
    recipe |= {"calibration": {"source": "text", "path": str(folder / "*.txt"), "max_length": 32}, "output": str(folder / "out")}
    recipe |= {"stack": stack} if stack else {}
    (folder / "r.json").write_text(json.dumps(recipe), encoding="utf-8")
    status = main(["plan", str(folder / "r.json"), "-o", str(folder / "p.json"), "-q"])
    assert status == 0
    return source, Plan.from_json((folder / "p.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("seq2seq:t5", "encoder"),
        ("seq2seq:t5", "decoder"),
        ("seq2seq:bart", "encoder"),
        ("seq2seq:bart", None),
        ("image:llava", None),
        ("image:qwen2_5_vl", "text"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_block_that_is_chosen_is_the_nearest_of_that_stack(name: str, stack: str | None, tmp_path: Path) -> None:
    source, plan = planned(name, stack, tmp_path)
    found = oracle.stacks(source.model, 6)
    lists = found.get(stack or "", found.get("decoder", found.get("")))
    assert lists is not None
    ids = [byte_tokenizer()(text)["input_ids"] for text in measuring.TEXTS]
    states = [measuring.true_states(source.model, lists, Sample(at, one)).hooked for at, one in enumerate(ids)]
    expected = {start: sum(_angle(one[start][-1], one[start + 2][-1]) for one in states if one) / len(states) for start in range(5)}
    (choice,) = plan.choices
    assert choice.cost == pytest.approx(min(expected.values()), abs=1e-5)
    nearest = min(expected, key=expected.__getitem__)
    assert [layer.index for layer in plan.actions.layers] == [at for at in range(6) if at not in (nearest, nearest + 1)]


def _angle(one: torch.Tensor, other: torch.Tensor) -> float:
    cosine = torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0)
    return math.acos(max(-1.0, min(1.0, float(cosine)))) / math.pi


@pytest.mark.filterwarnings("ignore")
def test_a_tower_that_a_text_does_not_reach_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        planned("image:llava", "vision", tmp_path, 1)
    model = f"this stack of model '{tmp_path}/source'"
    error = f"error: no layer of {model} is called when the model is given a text alone; it cannot be measured\n"
    assert capsys.readouterr().err == error
