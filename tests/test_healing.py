"""healing.py: which maps are taken; and healed cuts from the command line to a folder, run twice, from a plan, and verified."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import byte_tokenizer
from safetensors.torch import load_file
from test_fitting import planted, said, states  # noqa: F401 - a fixture

from layercut import memory, writer
from layercut.api import plan_recipe, run_recipe
from layercut.card import make_card
from layercut.cli import main
from layercut.disclosure import disclosed
from layercut.errors import CheckpointError, OutputError
from layercut.executor import execute
from layercut.fits import map_of, path_of
from layercut.folding import folded
from layercut.healing import RIDGE, Healed, heal, without
from layercut.plan import Distance, Mending, Plan, TensorMade
from layercut.report import read_report
from layercut.stack import Block, Fold, LayerRef, Stack
from layercut.trials import Loss, Misses

pytestmark = pytest.mark.usefixtures("quietly")
Make = Callable[..., Path]
TEXT = "{source: builtin, samples: 12, max_length: 48}"


# Which maps are taken


class Losses:
    """Losses by which blocks have a map, and how far the states behind those maps are off; notes what is to be fitted."""

    def __init__(self, table: Mapping[str, float | Loss], misses: Sequence[Misses] = ()) -> None:
        self._table, self._misses = table, misses
        self.fits: list[tuple[list[int], list[int], float]] = []

    def losses(self, stacks: Sequence[Stack], part: str = "calibration", share: float = 1.0) -> list[Loss]:
        assert part == "held out"
        found = [self._table["".join(one.sha256[0] for layer in stack for one in layer.folds)] for stack in stacks]
        return [one if isinstance(one, Loss) else Loss((one,), (1,)) for one in found]

    def fit(self, given: Stack, wanted: Stack, ridge: float) -> Fold:
        self.fits.append(([layer.index for layer in given], [layer.index for layer in wanted], ridge))
        return fold("abc"[len(self.fits) - 1])

    def misses(self, given: Stack, wanted: Stack, fold: Fold) -> Misses:
        assert ([layer.index for layer in given], [layer.index for layer in wanted]) == self.fits[-1][:2]
        assert fold.sha256[0] == "abc"[len(self.fits) - 1], "the map that was fitted last"
        return self._misses[len(self.fits) - 1] if self._misses else NEARER


NEARER = Misses(Loss((3.0, 5.0), (10, 10)), Loss((2.0, 4.0), (10, 10)))
FURTHER = Misses(Loss((3.0, 5.0), (10, 10)), Loss((3.0, 6.0), (10, 10)))
PERHAPS = Misses(Loss((3.0, 5.0), (10, 10)), Loss((1.0, 6.9), (10, 10)))


def fold(letter: str) -> Fold:
    return Fold(sha256=letter * 64, size=4, module="mlp.down_proj", tokens=9, ridge=RIDGE, explained=0.25)


def whole(depth: int) -> Stack:
    return tuple(LayerRef(model="m", index=index) for index in range(depth))


def healed(table: Mapping[str, float | Loss], *blocks: Block, misses: Sequence[Misses] = ()) -> tuple[Healed, list[tuple[int, str]]]:
    found = heal(whole(8), blocks, 0.5, Losses(table, misses))  # type: ignore[arg-type]
    return found, [(layer.index, "".join(one.sha256[0] for one in layer.folds)) for layer in found.stack]


def tried(found: Healed) -> list[tuple[str, float]]:
    return [(attempt.name, attempt.loss.mean) for attempt in found.attempts]


CUT_ALONE = [(0, ""), (1, ""), (2, ""), (5, ""), (6, ""), (7, "")]


def test_a_map_that_helps_is_folded_into_the_layer_before() -> None:
    found, stack = healed({"": 3.0, "a": 2.5}, Block(3, 5))
    assert stack == [(0, ""), (1, ""), (2, "a"), (5, ""), (6, ""), (7, "")]
    assert tried(found) == [("the cut", 3.0), ("map for [3, 5)", 2.5)]
    assert found.taken == (Block(3, 5),)
    (one,) = found.maps
    cut, after = Distance(mean=0.4, stderr=0.1), Distance(mean=0.3, stderr=0.1)
    assert one.mending == Mending(block="[3, 5)", cut=cut, healed=after, stderr=0.0, taken=True)


@pytest.mark.parametrize("loss", [3.0, 3.5])
def test_a_map_that_does_not_lower_the_loss_is_not(loss: float) -> None:
    found, stack = healed({"": 3.0, "a": loss}, Block(3, 5))
    assert stack == CUT_ALONE and found.taken == ()
    assert tried(found) == [("the cut", 3.0), ("map for [3, 5), not taken", loss)]
    assert found.maps[0].why == (
        f"held-out text loses {loss:.4f} ± 0.0000 nats a token with it and 3.0000 ± 0.0000 without it, "
        f"a difference of {loss - 3:+.4f} ± 0.0000"
    )


def test_a_map_that_lowers_the_loss_by_no_more_than_chance_is_not() -> None:
    """By 2 nats a token in one sample, and by -1 in the other: 0.5 ± 1.5 less."""
    cut, less, enough = Loss((30.0, 30.0), (10, 10)), Loss((10.0, 40.0), (10, 10)), Loss((10.0, 20.1), (10, 10))
    found, stack = healed({"": cut, "a": less}, Block(3, 5))
    assert stack == CUT_ALONE and found.maps[0].why.endswith("a difference of -0.5000 ± 1.5000")
    assert healed({"": cut, "a": enough}, Block(3, 5))[0].taken == (Block(3, 5),)


@pytest.mark.parametrize(
    ("misses", "said_of"),
    [
        (FURTHER, "0.4500 ± 0.1500 with it and 0.4000 ± 0.1000 without it on held-out text, a difference of +0.0500 ± 0.0500"),
        (PERHAPS, "0.3950 ± 0.2950 with it and 0.4000 ± 0.1000 without it on held-out text, a difference of -0.0050 ± 0.1950"),
    ],
)
def test_a_map_that_does_not_lead_nearer_is_not_and_no_stack_is_run_for_it(misses: Misses, said_of: str) -> None:
    found, stack = healed({"": 3.0}, Block(3, 5), misses=[misses])  # what it would lose is not asked
    assert stack == CUT_ALONE and found.taken == () and tried(found) == [("the cut", 3.0)]
    assert found.maps[0].why == f"the state is off by {said_of}"
    assert not found.maps[0].mending.taken


def test_every_block_is_judged_by_itself_with_what_was_taken_before_it() -> None:
    table = {"": 3.0, "a": 2.0, "ab": 2.1, "ac": 1.5}
    found, stack = healed(table, Block(1, 2), Block(3, 5), Block(7, 8))
    assert stack == [(0, "a"), (2, ""), (5, ""), (6, "c")]
    assert [loss for _, loss in tried(found)] == [3.0, 2.0, 2.1, 1.5]
    assert found.taken == (Block(1, 2), Block(7, 8))
    found, stack = healed({"": 3.0, "a": 2.0, "ac": 1.5}, Block(1, 2), Block(3, 5), Block(7, 8), misses=[NEARER, FURTHER, NEARER])
    assert stack == [(0, "a"), (2, ""), (5, ""), (6, "c")]
    assert [one.taken for one in found.maps] == [True, False, True]


def test_maps_lead_from_the_cut_stack_to_the_whole_one() -> None:
    losses = Losses({"": 1, "a": 0.9, "ab": 0.8})
    heal(whole(8), (Block(2, 3), Block(4, 7)), 0.5, losses)  # type: ignore[arg-type]
    assert losses.fits == [([0, 1], [0, 1, 2], 0.5), ([0, 1, 3], [0, 1, 2, 3, 4, 5, 6], 0.5)]


def test_a_second_step_folds_on_top_of_the_first() -> None:
    stack = (*whole(2)[:1], whole(2)[1].model_copy(update={"folds": (fold("f"),)}), *whole(5)[3:])
    found = heal(stack, (Block(2, 3),), 0.5, Losses({"f": 2, "fa": 1}))  # type: ignore[arg-type]
    assert [one.sha256[0] for one in found.stack[1].folds] == ["f", "a"]


def test_blocks_are_removed() -> None:
    assert [layer.index for layer in without(whole(6), (Block(0, 1), Block(3, 5)))] == [1, 2, 5]


# From the command line to a folder


def recipe(folder: Path, model: Path, step: str, name: str = "out", more: str = "") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(f"model: {model}\ncalibration: {TEXT}\nsteps: [{{{step}}}]\noutput: {folder / name}\n{more}")
    return path


def digests(folder: Path) -> dict[str, str]:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    return {name: digest for name, digest in found.items() if name != "layercut.json"}


CUT = "prune: {at: 3, heal: fold, ridge: 1e-9}"


@pytest.fixture(scope="module")
def result(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("healed")
    with pytest.MonkeyPatch.context() as patched:  # this comes before the fixture of every test
        patched.setenv("LAYERCUT_CACHE", str(tmp_path_factory.getbasetemp() / "layercut-cache"))
        run_recipe(recipe(folder, planted, CUT), progress=False)
    return folder / "out"


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(3, 99)[None]).logits
    return found


def test_a_healed_cut_recovers_the_logits_of_its_source(result: Path, planted: Path, tmp_path: Path) -> None:  # noqa: F811
    run_recipe(recipe(tmp_path, planted, "prune: {at: 3}"), progress=False)
    before, after, plain = logits(planted), logits(result), logits(tmp_path / "out")
    assert (after - before).abs().max() < (plain - before).abs().max() / 50
    assert json.loads((result / "config.json").read_text())["num_hidden_layers"] == 5


def test_only_the_weight_that_is_folded_is_another_one(result: Path, planted: Path) -> None:  # noqa: F811
    source, found, (one,) = load_file(planted / "model.safetensors"), load_file(result / "model.safetensors"), maps(result)
    order = [0, 1, 2, 4, 5]
    for name, tensor in found.items():
        parts = name.split(".")
        origin = ".".join([*parts[:2], str(order[int(parts[2])]), *parts[3:]]) if parts[1] == "layers" else name
        wanted = source[origin]
        if name == "model.layers.2.mlp.down_proj.weight":
            assert not torch.equal(tensor, wanted)
            wanted = folded(wanted, map_of(one.sha256, one.size), False, torch.float32)
        assert torch.equal(tensor, wanted), name


def maps(folder: Path) -> list[Fold]:
    return [one for layer in read_report(folder).layers for one in layer.folds]


def test_the_report_says_what_was_fitted_and_what_it_gave(result: Path) -> None:
    report = read_report(result)
    (choice,) = report.choices
    assert (choice.where, choice.metric, choice.chosen) == ("steps.0.prune.heal", "loss", "a map for [3, 4) folded in")
    assert [trial.name for trial in choice.trials] == ["as it is", "the cut", "map for [3, 4)"]
    assert [trial.text for trial in choice.trials] == ["held out"] * 3
    assert choice.cost == choice.trials[2].loss < choice.trials[1].loss
    assert abs(choice.trials[2].increase) < choice.trials[1].increase / 20
    (mended,) = choice.maps
    assert mended.block == "[3, 4)" and mended.taken and mended.healed.mean < mended.cut.mean / 1000
    assert mended.healed.stderr < mended.cut.stderr
    (one,) = maps(result)
    assert (one.tokens, one.ridge, one.size, one.module) == (12 * 48, 1e-9, 32, "mlp.down_proj")
    assert str(path_of(one.sha256).parent) not in (result / "layercut.json").read_text(), "a report names no folder"
    card = make_card(disclosed(report), {}, "user/name")
    assert "A linear map for layers that were left out, fitted on 576 tokens, is part of its weights; nothing was trained." in card.text


def test_verify_computes_the_folded_weight_again(result: Path, tmp_path: Path) -> None:
    found = {check.name: (check.ok, check.detail) for check in verified(result)}
    assert all(ok for ok, _ in found.values())
    assert found["contents"][1] == "48 tensors are byte for byte those of the sources, 1 of them computed again"
    broken = shutil.copytree(result, tmp_path / "broken")
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[place(broken, "model.layers.2.mlp.down_proj.weight") + 8] ^= 1
    (broken / "model.safetensors").write_bytes(data)
    assert contents(broken) == (False, "'model.layers.2.mlp.down_proj.weight' is not what its sources give: they differ from byte 8 on")


def test_verify_without_the_map_compares_all_else(result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "empty"))
    lost = "'model.layers.2.mlp.down_proj.weight', the map for which is not in layercut's cache"
    assert contents(result) == (True, f"47 tensors are byte for byte those of the sources; not compared: {lost}")


def verified(folder: Path) -> Any:
    from layercut.verify import verify

    return verify(folder).checks


def contents(folder: Path) -> tuple[bool, str]:
    return next((check.ok, check.detail) for check in verified(folder) if check.name == "contents")


def place(folder: Path, name: str) -> int:
    from layercut.header import read_header

    return next(entry.begin for entry in read_header(folder / "model.safetensors").tensors if entry.name == name)


def test_equal_recipes_give_equal_bytes_measured_anew_and_from_the_plan(
    result: Path,
    planted: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    again = recipe(tmp_path, planted, CUT)
    run_recipe(again, progress=False)
    assert digests(tmp_path / "out") == digests(result)
    plan = plan_recipe(again, progress=False)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.from_json(plan.to_json()) == plan
    assert main(["run", str(tmp_path / "plan.json"), "--out", str(tmp_path / "planned"), "-q"]) == 0
    assert digests(tmp_path / "planned") == digests(result)
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LAYERCUT_NO_CACHE", "1")
    run_recipe(again, out=tmp_path / "anew", progress=False)
    assert digests(tmp_path / "anew") == digests(result)


def test_a_model_that_does_not_fit_into_memory_is_healed_too(
    result: Path,
    planted: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LAYERCUT_NO_CACHE", "1")
    monkeypatch.setattr(memory, "free_memory", lambda: {"memory": 1000})
    report = run_recipe(recipe(tmp_path, planted, CUT), progress=False)
    (choice,), (before,) = report.choices, read_report(result).choices
    assert (choice.chosen, [one.taken for one in choice.maps]) == ("a map for [3, 4) folded in", [True])
    assert choice.maps[0].cut.mean == pytest.approx(before.maps[0].cut.mean, rel=1e-4)
    assert [trial.loss for trial in choice.trials] == pytest.approx([trial.loss for trial in before.trials], rel=1e-5)
    assert torch.allclose(logits(tmp_path / "out"), logits(result), atol=1e-3)


def test_the_place_of_a_map_is_not_part_of_what_is_done(result: Path, planted: Path, tmp_path: Path) -> None:  # noqa: F811
    plan = plan_recipe(recipe(tmp_path, planted, CUT), progress=False)
    ((digest, path),) = plan.maps.items()
    moved = shutil.copy(path, tmp_path / "elsewhere.safetensors")
    other = plan.model_copy(update={"maps": {digest: str(moved)}})
    assert other.digest == plan.digest == read_report(result).plan
    execute(other, tmp_path / "out", progress=False)
    assert digests(tmp_path / "out") == digests(result)


@pytest.mark.parametrize(
    ("change", "said_of"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0"), "was changed since the map was fitted"),
    ],
)
def test_a_plan_whose_map_is_gone_or_another(
    change: Callable[[Path], Any],
    said_of: str,
    planted: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    plan = plan_recipe(recipe(tmp_path, planted, CUT), progress=False)
    ((digest, path),) = plan.maps.items()
    moved = Path(shutil.copy(path, tmp_path / "map"))
    change(moved)
    broken = plan.model_copy(update={"maps": {digest: str(moved)}})
    with pytest.raises(CheckpointError) as caught:
        execute(broken, tmp_path / "out", progress=False)
    assert str(caught.value) == f"{moved}: the map that was fitted for this plan {said_of}; plan again"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"size": 31}, "plan folds a map of size 31 into tensor 'model.layers.2.mlp.down_proj.weight' of shape [32, 64]"),
        ({"columns": True}, "plan folds a map of size 32 into tensor 'model.layers.2.mlp.down_proj.weight' of shape [32, 64]"),
        ({"sha256": "0" * 64}, f"plan does not say where the map {'0' * 64} is"),
    ],
)
def test_a_plan_of_anyone_folds_only_what_fits(
    update: dict[str, Any],
    message: str,
    planted: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    plan = plan_recipe(recipe(tmp_path, planted, CUT), progress=False)
    data = json.loads(plan.to_json())
    (made,) = [tensor for tensor in data["actions"]["files"][0]["tensors"] if tensor.get("maps")]
    made["maps"][0].update(update)
    with pytest.raises(OutputError) as caught:
        execute(Plan.from_json(json.dumps(data)), tmp_path / "out", progress=False)
    assert caught.value.message == message
    made["maps"][0].update({"size": 32, "columns": False})
    made["parts"] = []
    with pytest.raises(OutputError, match=r"plan folds a map into tensor 'model\.layers\.2\.mlp\.down_proj\.weight', which has no parts"):
        execute(Plan.from_json(json.dumps(data)), tmp_path / "out", progress=False)


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(
    result: Path,
    planted: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Progress is recorded every 8 kB, and the folded tensor is written whole: it fails once behind it, before that is recorded."""
    plan = plan_recipe(recipe(tmp_path, planted, CUT), progress=False)
    monkeypatch.setattr(writer, "MARK", 8192)
    monkeypatch.setattr(writer, "PAUSE", 0.0)
    real, failing = writer.write_made, ["once"]

    def fails(made: TensorMade, folders: Any, opened: Any, target: int, offset: int, advance: Any) -> None:
        real(made, folders, opened, target, offset, advance)
        if failing:
            failing.pop()
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(writer, "write_made", fails)
    with pytest.raises(OutputError, match="Input/output error"):
        execute(plan, tmp_path / "out", durable=False, progress=False)
    assert not (tmp_path / "out").exists()
    execute(plan, tmp_path / "out", durable=False, progress=False)
    assert digests(tmp_path / "out") == digests(result)


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("gpt2", "float32"), ("llama", "bfloat16"), ("qwen3", "float32")])
def test_the_state_at_the_seam_is_the_one_that_was_predicted(
    kind: str,
    dtype: str,
    tiny: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind the folded layer stands Y + M T: M is what its MLP added in the source, bias and all, and Y the rest of the stream."""
    take_all(monkeypatch)
    source = tiny(kind, dtype=dtype)
    run_recipe(recipe(tmp_path, source, "prune: {at: '3-4', heal: fold}", more="allow: inexact\n"), progress=False)
    (one,) = maps(tmp_path / "out")
    ids = byte_tokenizer()("Hardworking Americans caught in the middle can really use that", add_special_tokens=False)["input_ids"]
    inputs, added = states(source, ids, 6)
    after, _ = states(tmp_path / "out", ids, 4)
    wanted = inputs[3] - added[2] + added[2] @ map_of(one.sha256, one.size)
    rounding = 2e-5 if dtype == "float32" else 2e-2
    assert (after[3] - wanted).abs().max() < rounding * wanted.abs().max()
    assert (after[3] - inputs[5]).norm() < (inputs[3] - inputs[5]).norm(), "nearer to what the layer behind the seam expects"
    if kind == "gpt2":
        names = {tensor.name for tensor in made(tmp_path / "out.yaml") if tensor.maps}
        assert names == {"transformer.h.2.mlp.c_proj.weight", "transformer.h.2.mlp.c_proj.bias"}


def made(path: Path) -> list[TensorMade]:
    plan = plan_recipe(path, progress=False)
    return [tensor for file in plan.actions.files for tensor in file.tensors if isinstance(tensor, TensorMade)]


def take_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models may lose less without their layers: here every map is taken."""
    from layercut.losses import Meter

    real = Meter.losses

    def generous(self: Any, stacks: Sequence[Stack], part: Any = "calibration", share: float = 1.0) -> list[Loss]:
        found = real(self, stacks, part, share)
        return [
            loss._replace(sums=tuple(one - 1000 * sum(len(layer.folds) for layer in stack) for one in loss.sums))
            for stack, loss in zip(stacks, found, strict=True)
        ]

    monkeypatch.setattr(Meter, "losses", generous)


def test_what_the_plan_shows_when_no_map_helps(tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random GPT-2 loses less without its last layers: a map that brings them back is not taken."""
    path = recipe(tmp_path, tiny("gpt2"), "prune: {at: '4-5', heal: fold}")
    assert main(["plan", str(path), "-q", "-o", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    assert "steps.0.prune.heal: no map helps: the cut alone, loss " in shown
    assert "map for [4, 6), not taken" in shown
    assert re.search(r"^  state behind \[4, 6\)  off by 0\.\d{4} ± 0\.\d{4}  with its map 0\.\d{4} ± 0\.\d{4}$", shown, re.MULTILINE)
    assert "note: steps.0.prune.heal: the map for [4, 6) is not taken: held-out text loses " in shown
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    assert plan.maps == {} and all(layer.plain for layer in plan.actions.layers)
    _, cut, tried = plan.choices[0].trials
    assert plan.choices[0].cost == cut.loss <= tried.loss
    (one,) = plan.choices[0].maps
    assert 0 < one.healed.mean < one.cut.mean - one.stderr and not one.taken
    older = json.loads(plan.to_json())
    del older["choices"][0]["maps"]
    assert Plan.from_json(json.dumps(older)).choices[0].maps == (), "a plan of before is read"


def test_replace_is_the_same_fold(result: Path, planted: Path, tmp_path: Path) -> None:  # noqa: F811
    path = recipe(tmp_path, planted, "replace: {layers: 1, with: linear, ridge: 1e-9, protect: [0, 1, 2, 4, 5]}")
    report = run_recipe(path, progress=False)
    assert [(choice.where, choice.chosen) for choice in report.choices] == [
        ("steps.0.replace", "replace layers [3, 4)"),
        ("steps.0.replace.heal", "a map for [3, 4) folded in"),
    ]
    assert digests(tmp_path / "out") == digests(result)


def test_several_blocks_and_steps_on_one_layer(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_all(monkeypatch)
    steps = "prune: {at: [1, 3], heal: fold}}, {prune: {at: 1, heal: fold}}, {scale: {at: 0, tensors: '*.down_proj.weight', by: 2}"
    report = run_recipe(recipe(tmp_path, tiny("llama"), steps), progress=False)
    assert [(layer.index, len(layer.folds)) for layer in report.layers] == [(0, 2), (4, 0), (5, 0)]
    assert [choice.chosen for choice in report.choices] == ["maps for [1, 2) + [3, 4) folded in", "a map for [1, 2) folded in"]
    assert all(check.ok for check in verified(tmp_path / "out"))
    source, found = (load_file(folder / "model.safetensors") for folder in (tiny("llama"), tmp_path / "out"))
    wanted = source["model.layers.0.mlp.down_proj.weight"] * 2
    for one in report.layers[0].folds:
        wanted = folded(wanted, map_of(one.sha256, one.size), False, torch.float32)
    assert torch.equal(found["model.layers.0.mlp.down_proj.weight"], wanted)


def test_a_folded_layer_is_averaged_no_more(planted: Path, tmp_path: Path) -> None:  # noqa: F811
    path = recipe(tmp_path, planted, f"{CUT}}}, {{merge: {{at: [2, 3]}}")
    assert said(lambda: plan_recipe(path, progress=False)).endswith("layer 2 is not as its model has it: average before other arithmetic")


def test_an_output_in_another_dtype_is_cast_after_the_fold(result: Path, planted: Path, tmp_path: Path) -> None:  # noqa: F811
    run_recipe(recipe(tmp_path, planted, CUT, more="out_dtype: bfloat16\n"), progress=False)
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), load_file(result / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name].to(torch.bfloat16)) for name in wanted)


def test_what_cannot_be_healed_is_told_before_anything_is_measured(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from layercut import engine

    monkeypatch.setattr(engine, "_run", lambda *_: pytest.fail("nothing is to be measured"))
    for step in ("prune: {layers: 2, heal: fold}", "replace: {layers: 2, with: linear}"):
        assert main(["plan", str(recipe(tmp_path, tiny("gemma3_text"), step)), "-q"]) == 1
        assert "no map can be folded into this model: layer 0 of model " in capsys.readouterr().err


def test_a_number_of_samples_is_needed(tiny: Make, tmp_path: Path) -> None:
    path = recipe(tmp_path, tiny("llama"), "prune: {at: 3, heal: fold}")
    path.write_text(path.read_text().replace("samples: 12", "samples: auto"))
    assert "samples: auto cannot tell whether a choice by loss is settled (steps.0.prune)" in said(
        lambda: plan_recipe(path, progress=False)
    )
