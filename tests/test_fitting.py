"""fitting.py: maps by hand, on planted structure, on text with pads, in any batch size; kept, shared by ranks, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import byte_tokenizer, tiny_config
from test_losses import layers, meter, one_at_a_time, removed
from test_ranks import Group, group  # noqa: F401 - a fixture

from layercut import memory
from layercut.calibration import BuiltinCalibration, TextCalibration
from layercut.crossings import Crossing
from layercut.errors import LayercutError
from layercut.fits import map_of, path_of
from layercut.fitting import Fitter, Sums
from layercut.losses import Meter
from layercut.players import Player
from layercut.scalings import literal
from layercut.stack import Fold, LayerRef, Scaling, Share, Stack
from layercut.trials import Misses

pytestmark = pytest.mark.usefixtures("quietly")
Tiny = Callable[..., Path]
TEXT = BuiltinCalibration(samples=5, max_length=24, batch_size=2)


def said(work: Callable[[], Any]) -> str:
    with pytest.raises(LayercutError) as caught:
        work()
    return str(caught.value)


def with_folds(stack: Stack, at: int, *folds: Fold) -> Stack:
    return (*stack[:at], stack[at].model_copy(update={"folds": (*stack[at].folds, *folds)}), *stack[at + 1 :])


# The map, by hand


def sums(added: list[list[float]], missing: list[list[float]]) -> Sums:
    m, d = torch.tensor(added, dtype=torch.float64), torch.tensor(missing, dtype=torch.float64)
    return Sums(m.T @ m, m.T @ d, d.square().sum(), torch.tensor(float(len(m))))


def test_a_map_by_hand() -> None:
    """M'M = diag(4, 1), M'D = [[2, 0], [0, 3]]; the mean of the diagonal is 2.5, so a ridge of 0.4 adds 1."""
    found = sums([[2, 0], [0, 1]], [[1, 0], [0, 3]])
    assert found.map(0).tolist() == [[1.5, 0], [0, 4]]
    assert found.map(0.4).tolist() == [[1.4, 0], [0, 2.5]]
    assert found.explained(found.map(0)) == 1
    assert found.explained(torch.eye(2, dtype=torch.float64)) == 0
    assert found.explained(found.map(0.4)) == pytest.approx(1 - (0.2**2 + 1.5**2) / 10)


def test_without_ridge_it_is_the_map_of_the_paper() -> None:
    """ReplaceMe: (M'M)^-1 M'(x_e - Y), where x_e - Y = M + D."""
    m, d = (torch.randn(40, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1))
    found = Sums(m.T @ m, m.T @ d, d.square().sum(), torch.tensor(40.0)).map(0)
    assert torch.allclose(found, torch.linalg.solve(m.T @ m, m.T @ (m + d)))
    assert torch.allclose(found, torch.linalg.lstsq(m, m + d).solution)


def test_a_ridge_leads_to_the_plain_cut_and_not_to_nothing() -> None:
    found = sums([[2, 0], [0, 1]], [[1, 0], [0, 3]])
    assert torch.allclose(found.map(1e12), torch.eye(2, dtype=torch.float64))
    few = sums([[1, 0]], [[1, 1]])  # of the second direction the text says nothing
    assert few.map(0.5)[1].tolist() == [0, 1]


def test_nothing_is_missing_where_the_removed_layers_did_nothing() -> None:
    found = sums([[2, 0], [0, 1]], [[0, 0], [0, 0]])
    assert found.map(0.1).tolist() == [[1, 0], [0, 1]] and found.explained(found.map(0.1)) == 0


# On models


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose layer 3 adds A (up to 1e-3) times what the MLP of layer 2 adds: same gate and up, no attention, and little is added."""
    folder = tmp_path_factory.mktemp("planted")
    torch.manual_seed(9)  # of few random models the text that is held out likes the whole better than the cut
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama", 6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        one, two = model.model.layers[2], model.model.layers[3]
        for layer in (one, two):
            layer.self_attn.o_proj.weight.zero_()
        two.load_state_dict(one.state_dict())
        small = one.mlp.down_proj.weight.clone()
        one.mlp.down_proj.weight.copy_(small * 1e-4)
        two.mlp.down_proj.weight.copy_(torch.randn(32, 32) @ small)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_planted_map_is_found_and_gives_the_loss_of_the_whole(planted: Path) -> None:
    found = meter(BuiltinCalibration(samples=12, max_length=48), planted)
    fold = found.fit(layers(0, 1, 2), layers(0, 1, 2, 3), 1e-9)
    assert (fold.size, fold.module, fold.columns, fold.tokens, fold.ridge) == (32, "mlp.down_proj", False, 12 * 48, 1e-9)
    assert 0.9999 < fold.explained <= 1
    whole, cut, healed = found.losses([removed(6), removed(6, 3), with_folds(removed(6, 3), 2, fold)])
    assert abs(healed.mean - whole.mean) < abs(cut.mean - whole.mean) / 200


def states(folder: Path, ids: list[int], depth: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs of the layers and the output of the last one, and what the MLP of each adds; of one sample, by plain hooks."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stack = model.get_submodule("transformer.h" if hasattr(model, "transformer") else "model.layers")
    assert len(stack) == depth
    inputs, added = [], []
    for layer in stack:
        layer.register_forward_pre_hook(lambda m, a, k: inputs.append((a[0] if a else k["hidden_states"])[0].clone()), with_kwargs=True)
        layer.mlp.register_forward_hook(lambda m, a, o: added.append(o[0].clone()))
    stack[-1].register_forward_hook(lambda m, a, o: inputs.append((o[0] if isinstance(o, tuple) else o).reshape(inputs[0].shape).clone()))
    with torch.inference_mode():
        model(torch.tensor([ids]), use_cache=False)
    return inputs, added


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sums_are_those_of_plain_hooks_over_all_tokens_but_no_pad(tiny: Tiny, kind: str, tmp_path: Path) -> None:
    """Samples of different lengths, one by one without pads, against batches of any size."""
    folder, texts = tiny(kind), ["four", "and seven years ago our", "fathers brought"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    m, d = [], []
    for text in texts:
        ids = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
        inputs, added = states(folder, ids, 6)
        aim = inputs[5].double()
        lengths = aim.square().sum(1, keepdim=True).sqrt()
        m.append(added[2].double() / lengths)
        d.append((aim - inputs[3].double()) / lengths)
    one, two = torch.cat(m), torch.cat(d)
    wanted = Sums(one.T @ one, one.T @ two, two.square().sum(), torch.tensor(0.0))
    for size in (1, 3):
        calibration = TextCalibration(source="text", path=str(tmp_path / "t.jsonl"), max_length=64, batch_size=size)
        fold = meter(calibration, folder).fit(layers(0, 1, 2), layers(0, 1, 2, 3, 4), 0.01)
        assert fold.tokens == sum(map(len, texts)) and fold.columns == (kind == "gpt2")
        found = map_of(fold.sha256, 32).double()
        assert torch.allclose(found, wanted.map(0.01), atol=2e-4)
        assert fold.explained == pytest.approx(wanted.explained(wanted.map(0.01)), abs=1e-4)


def test_later_maps_see_the_folds_and_cuts_before_them(tiny: Tiny) -> None:
    """The state that is mapped is that of the cut stack; the one that it leads to is that of the whole."""
    found = meter(TEXT, tiny("llama"))
    first = found.fit(layers(0, 1), layers(0, 1, 2), 0.01)
    healed = with_folds(layers(0, 1, 3), 1, first)
    alone, after, plain = (found.fit(given, layers(0, 1, 2, 3, 4), 0.01) for given in (layers(0, 1, 2, 3), healed, layers(0, 1, 3)))
    assert len({alone.sha256, after.sha256, plain.sha256}) == 3
    twice = with_folds(layers(0, 1), 1, first)
    again = found.fit(twice, layers(0, 1, 2), 0.01)
    assert again.explained < first.explained / 2, "what one map made up for, the next one need not"


def test_layers_with_arithmetic_are_fitted_as_they_are_written(tiny: Tiny) -> None:
    found = meter(TEXT, tiny("llama"))
    plain = found.fit(layers(0, 1), layers(0, 1, 2), 0.01)
    halved = LayerRef(model="m", index=1, scalings=((Scaling(tensors="*.mlp.down_proj.weight", by=0.5),),))
    mixed = LayerRef(model="m", index=1, shares=(Share(model="m", index=1, weight=0.5), Share(model="m", index=2, weight=0.5)))
    others = [found.fit((*layers(0), layer), layers(0, 1, 2), 0.01) for layer in (halved, mixed)]
    assert len({plain.sha256, *(fold.sha256 for fold in others)}) == 3
    silent = LayerRef(model="m", index=1, scalings=((Scaling(tensors="*.mlp.down_proj.weight", by=0),),))
    message = said(lambda: found.fit((*layers(0), silent), layers(0, 1, 2), 0.01))
    assert message.startswith("no map can be folded into layer 1 of model 'm': mlp.down_proj adds nothing to the stream; ")
    nothing = LayerRef(model="m", index=1, identity=True, scalings=((Scaling(tensors=literal("x"), by=0),),))
    message = said(lambda: found.fit((*layers(0), nothing), layers(0, 1, 2), 0.01))
    assert message.startswith("no map can be folded into layer 1 of model 'm': it adds nothing; ")


def test_two_models_share_a_seam_only_when_their_states_are_as_long(tiny: Tiny) -> None:
    found = meter(TEXT, tiny("llama"), tiny("llama", seed=1))
    fold = found.fit(layers(0, 1), (*layers(0, 1), *layers(2, 3, model="m1")), 0.01)
    assert fold.module == "mlp.down_proj" and 0 < fold.explained < 1


# What was fitted before


def test_a_fit_is_kept_with_the_measurements(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = meter(TEXT, tiny("llama"), cache=tmp_path).fit(layers(0, 1), layers(0, 1, 2), 0.01)
    with monkeypatch.context() as patched:
        patched.setattr(Meter, "_loaded", lambda *_: pytest.fail("it was fitted before"))
        again = meter(TEXT, tiny("llama"), cache=tmp_path)
        again.check_foldable(layers(1))
        assert again.fit(layers(0, 1), layers(0, 1, 2), 0.01) == fold
    path_of(fold.sha256).write_bytes(b"")
    assert meter(TEXT, tiny("llama"), cache=tmp_path).fit(layers(0, 1), layers(0, 1, 2), 0.01) == fold, "a damaged map is fitted anew"
    other = meter(TEXT, tiny("llama"), cache=tmp_path).fit(layers(0, 1), layers(0, 1, 2), 0.02)
    assert (other.ridge, other.sha256 == fold.sha256) == (0.02, False)


@pytest.mark.parametrize("entry", [None, 5, {"x": 1}, {"sha256": "0" * 64}])
def test_an_entry_that_is_none_counts_as_not_there(tiny: Tiny, tmp_path: Path, entry: Any) -> None:
    fold = meter(TEXT, tiny("llama"), cache=tmp_path).fit(layers(0, 1), layers(0, 1, 2), 0.01)
    (path,) = (tmp_path / "measurements").glob("*.json")
    data = json.loads(path.read_text())
    data["details"] = {"folds": entry if entry is None else dict.fromkeys(data["details"]["folds"], entry)}
    path.write_text(json.dumps(data))
    assert meter(TEXT, tiny("llama"), cache=tmp_path).fit(layers(0, 1), layers(0, 1, 2), 0.01) == fold


def test_ranks_share_the_samples_and_the_map(
    tiny: Tiny,
    group: Callable[..., Group],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = meter(TEXT, tiny("llama")).fit(layers(0, 1), layers(0, 1, 2), 0.01)
    one_at_a_time(monkeypatch)
    made = group(4, patience=60.0)  # more ranks than batches
    made.alive(0, 1, 2, 3)
    for _ in range(2):  # measured, and known
        found = made.all(lambda rank: meter(TEXT, tiny("llama"), ranks=rank, cache=tmp_path).fit(layers(0, 1), layers(0, 1, 2), 0.01))
        assert all(fold == found[0] for fold in found)
        assert (found[0].tokens, found[0].explained) == (alone.tokens, pytest.approx(alone.explained, rel=1e-6))
        assert torch.allclose(map_of(found[0].sha256, 32), map_of(alone.sha256, 32), atol=1e-5)


# What is refused


REFUSED = {
    "gemma3_text": "what mlp.down_proj gives does not come out as it is (a norm, a factor, a gate or experts follow)",
    "olmo2": "what mlp.down_proj gives does not come out as it is (a norm, a factor, a gate or experts follow)",
    "mixtral": "what self_attn.o_proj gives does not come out as it is (a norm, a factor, a gate or experts follow)",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_no_map_can_be_folded_into(odd: Callable[[str], Path], tiny: Tiny, kind: str) -> None:
    found = meter(TEXT, tiny(kind) if kind == "gemma3_text" else odd(kind))
    hint = "leave out heal, or remove layers with prune in place of replace"
    assert said(lambda: found.check_foldable(layers(0, 1))) == (
        f"no map can be folded into this model: layer 0 of model 'm': {REFUSED[kind]}; {hint}"
    )
    assert said(lambda: found.fit(layers(0, 1), layers(0, 1, 2), 0.01)) == (
        f"no map can be folded into layer 1 of model 'm': {REFUSED[kind]}; {hint}"
    )


def test_one_layer_that_a_map_fits_is_enough(odd: Callable[[str], Path]) -> None:
    """DeepSeek begins with a dense layer."""
    meter(TEXT, odd("deepseek_v3")).check_foldable(layers(2, 1, 0))


def test_a_layer_that_its_file_holds_otherwise(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Player, "weights", lambda self, index: {"mlp.up_proj.weight": ("x", torch.zeros(1))})
    message = said(lambda: meter(TEXT, tiny("llama")).fit(layers(0, 1), layers(0, 1, 2), 0.01))
    assert message.startswith("no map can be folded into layer 1 of model 'm': its file has no mlp.down_proj.weight; ")


def test_states_that_are_not_finite_are_no_sums(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Fitter._sum
    monkeypatch.setattr(Fitter, "_sum", lambda *args: add(*args)._replace(cross=torch.full((32, 32), torch.nan)))
    message = said(lambda: meter(TEXT, tiny("llama")).fit(layers(0, 1), layers(0, 1, 2), 0.01))
    assert message == "the states at layer 1 of model 'm' are not finite; measure in another dtype"


def test_a_text_that_determines_no_map(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Fitter._sum
    flat = torch.zeros(32, 32, dtype=torch.float64)
    flat[0, 0] = 1e-300
    monkeypatch.setattr(Fitter, "_sum", lambda *args: add(*args)._replace(gram=flat))
    message = said(lambda: meter(TEXT, tiny("llama")).fit(layers(0, 1), layers(0, 1, 2), 1e-30))
    assert message == "the text does not determine a map for layer 1 of model 'm'; raise ridge, or take more samples"


def test_out_of_memory_is_one_line(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Crossing, "states", full)
    assert said(lambda: meter(TEXT, tiny("llama")).fit(layers(0, 1), layers(0, 1, 2), 0.01)) == (
        "out of memory on cpu; lower batch_size or max_length"
    )


# Models that do not fit into memory


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_map_that_is_fitted_layer_by_layer_is_the_one_that_is_fitted_in_memory(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def found(one: Meter) -> tuple[Fold, Fold, Misses]:
        one.check_foldable(layers(0, 1))
        first = one.fit(layers(0, 1), layers(0, 1, 2), 0.01)
        given = (*with_folds(layers(0, 1), 1, first), *layers(3))
        second = one.fit(given, layers(0, 1, 2, 3, 4), 0.01)
        return first, second, one.misses(given, layers(0, 1, 2, 3, 4), second)

    whole = found(meter(TEXT, tiny(kind)))
    monkeypatch.setattr(memory, "free_memory", lambda: {"memory": 1000})
    streaming = meter(TEXT, tiny(kind))
    streamed = found(streaming)
    assert streaming._relay is not None
    for one, other in zip(streamed[:2], whole[:2], strict=True):
        assert torch.allclose(map_of(one.sha256, one.size), map_of(other.sha256, other.size), atol=1e-5)
        assert one.model_copy(update={"sha256": other.sha256, "explained": other.explained}) == other
    for left, right in zip(streamed[2], whole[2], strict=True):
        assert left.counts == right.counts and left.sums == pytest.approx(right.sums, rel=1e-4)


def test_what_no_map_can_be_folded_into_is_found_layer_by_layer(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: {"memory": 1000})
    found = meter(TEXT, tiny("gemma3_text"))
    assert REFUSED["gemma3_text"] in said(lambda: found.check_foldable(layers(0, 1)))


def test_a_folded_stack_that_is_streamed_loses_what_it_loses_in_memory(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = meter(TEXT, tiny("llama"))
    stack = with_folds(removed(6, 2), 1, whole.fit(layers(0, 1), layers(0, 1, 2), 0.01))
    (expected,) = whole.losses([stack])
    monkeypatch.setattr(memory, "free_memory", lambda: {"memory": 1000})
    (streamed,) = meter(TEXT, tiny("llama")).losses([stack])
    assert streamed.sums == pytest.approx(expected.sums, rel=1e-6)
