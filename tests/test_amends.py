"""Layers whose arithmetic depends on their place compute the same at another one: rows, and transformers itself as the judge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from conftest import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from layercut.amends import AMENDS, Change, Seat, changes, hindrance, row_of, told
from layercut.api import plan_recipe, run_recipe
from layercut.architecture import Member, find_stack
from layercut.checkpoint import open_checkpoint
from layercut.errors import OutputError, RefusedError
from layercut.exceptions import EXCEPTIONS
from layercut.plan import Band, Grown, Plan, TensorMade
from layercut.recipe import Recipe
from layercut.stack import LayerRef
from layercut.verify import verify

DEPTH = 6
IDS = torch.tensor([[5, 9, 23, 44, 51, 12, 37, 33]])
ORDERS = ([3, 4, 5], [5, 1, 4, 3, 3, 0], [0, 1, 2, 3, 4, 5, 2, 3, 4, 5])
ON = {"scale_attn_by_inverse_layer_idx": True}
TINY = {"n_embd": 32, "n_head": 4, "n_layer": DEPTH, **ON}
GPT2 = {**TINY, "vocab_size": 160, "n_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = ("gpt2", "gpt2 with cross-attention", "imagegpt", "decision_transformer", "diffllama", "esmc", "beam")
pytestmark = pytest.mark.usefixtures("quietly")


def built(kind: str, seed: int = 0, depth: int = DEPTH, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny random model of a kind, of which every weight matters."""
    torch.manual_seed(seed)
    if kind.startswith("gpt2"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, "n_layer": depth}, add_cross_attention="cross" in kind))
    elif kind == "imagegpt":
        model = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**GPT2))
    elif kind == "decision_transformer":
        config = transformers.DecisionTransformerConfig(state_dim=4, act_dim=3, hidden_size=32, use_cache=False, **TINY)
        model = transformers.DecisionTransformerModel(config)
    else:
        task = "masked" if kind == "esmc" else "causal"
        made = zoo.tiny_config(kind, task).to_dict()
        kinds = {"layer_types": None, "mlp_layer_types": None}
        model = zoo.class_of(kind, task)(type(zoo.tiny_config(kind, task))(**{**made, **kinds, "num_hidden_layers": depth}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).eval()


def loaded(folder: Path, model: Any) -> Any:
    return type(model).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def said(model: Any) -> torch.Tensor:
    """What a model says of fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {"input_ids": IDS}
    if isinstance(model, transformers.DecisionTransformerModel):
        sizes = {"states": 4, "actions": 3, "returns_to_go": 1}
        given = {name: torch.randn(1, 5, size, generator=generator) for name, size in sizes.items()}
        given |= {"timesteps": torch.arange(5)[None], "attention_mask": torch.ones(1, 5)}
    elif getattr(model.config, "add_cross_attention", False):
        given["encoder_hidden_states"] = torch.randn(1, 7, 32, generator=generator)
    if model.config.model_type in ("gpt2", "imagegpt", "diffllama", "beam"):
        given["use_cache"] = False
    with torch.no_grad():
        out = model(**given)
    found: torch.Tensor = out.action_preds if hasattr(out, "action_preds") else out.logits
    return found


@contextmanager
def listing(model: Any, order: Sequence[int], other: Any = None, own: Sequence[bool] = ()) -> Iterator[None]:
    """The model with other layers in its list, each as it is."""
    depth = model.config.num_hidden_layers
    name = next(name for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList) and len(part) == depth)
    parent, attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    whole = getattr(parent, attribute)
    theirs = whole if other is None else other.get_submodule(name)
    mine = own or [True] * len(order)
    kinds = {key: getattr(model.config, key, None) for key in ("layer_types", "mlp_layer_types")}
    setattr(parent, attribute, torch.nn.ModuleList((whole if one else theirs)[at] for at, one in zip(order, mine, strict=True)))
    for key, value in kinds.items():
        if value is not None:
            setattr(model.config, key, [value[at] for at in order])
    model.config.num_hidden_layers = len(order)
    try:
        yield
    finally:
        setattr(parent, attribute, whole)
        for key, value in kinds.items():
            if value is not None:
                setattr(model.config, key, value)
        model.config.num_hidden_layers = depth


def recipe(order: Sequence[tuple[Path, int]], out: Path, **more: Any) -> Recipe:
    slices = [{"model": str(folder), "layer_range": [index, index + 1]} for folder, index in order]
    return Recipe.model_validate({"slices": slices, "output": str(out), **more})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_any_order_computes_what_its_layers_did(kind: str, tmp_path: Path) -> None:
    model = built(kind)
    model.save_pretrained(tmp_path / "m")
    model = loaded(tmp_path / "m", model)
    for number, order in enumerate(ORDERS):
        with listing(model, order):
            wanted = said(model)
        out = tmp_path / str(number)
        run_recipe(recipe([(tmp_path / "m", index) for index in order], out), progress=False)
        off = float((said(loaded(out, model)) - wanted).abs().max())
        assert off < (2e-5 if kind == "beam" else 2e-6), order  # beam: the eps of its norms
        assert verify(out, load=False).ok
    with listing(model, ORDERS[0]):
        wanted = said(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    with listing(model, ORDERS[0]):
        assert float((said(model) - wanted).abs().max()) > 1e-3  # the judge sees small changes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt2", "diffllama", "esmc", "beam"])
def test_layers_of_two_models_of_different_depth(kind: str, tmp_path: Path) -> None:
    models = [built(kind, seed, depth) for seed, depth in ((0, DEPTH), (1, 4))]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    first, second = (loaded(tmp_path / str(number), model) for number, model in enumerate(models))
    order, own = [0, 1, 2, 3, 4, 5], [True, False, False, False, True, True]
    if kind == "beam":  # kinds of layers are taken from the config of the first
        order, own = [0, 1, 2, 3, 4, 5], [True, False, False, True, True, True]
    with listing(first, order, second, own):
        wanted = said(first)
    folders = [(tmp_path / ("0" if mine else "1"), index) for index, mine in zip(order, own, strict=True)]
    run_recipe(recipe(folders, tmp_path / "out"), progress=False)
    assert float((said(loaded(tmp_path / "out", first)) - wanted).abs().max()) < 2e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt2", "diffllama", "esmc", "beam"])
def test_copies_that_add_nothing_change_nothing(kind: str, tmp_path: Path) -> None:
    model = built(kind)
    model.save_pretrained(tmp_path / "m")
    asked = {"model": str(tmp_path / "m"), "steps": [{"expand": {"every": 2}}], "output": str(tmp_path / "out")}
    run_recipe(Recipe.model_validate(asked), progress=False)
    more = loaded(tmp_path / "out", model)
    assert more.config.num_hidden_layers == 9
    assert float((said(more) - said(loaded(tmp_path / "m", model))).abs().max()) < 2e-5


@pytest.mark.filterwarnings("ignore")
def test_it_generates_with_a_cache_as_without(tmp_path: Path) -> None:
    for kind in ("gpt2", "diffllama", "beam"):
        model = built(kind)
        model.save_pretrained(tmp_path / kind)
        run_recipe(recipe([(tmp_path / kind, index) for index in (1, 3, 4, 5)], tmp_path / f"{kind}-cut"), progress=False)
        cut = loaded(tmp_path / f"{kind}-cut", model)
        how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(cut.generate(IDS, use_cache=True, **how), cut.generate(IDS, use_cache=False, **how))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt2", "diffllama", "esmc", "beam"])
def test_bfloat16_rounds_a_little_and_the_plan_says_so(kind: str, tmp_path: Path) -> None:
    model = built(kind, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "m")
    model = loaded(tmp_path / "m", model)
    with listing(model, [2, 3, 4, 5]):
        wanted = said(model)
    asked = recipe([(tmp_path / "m", index) for index in (2, 3, 4, 5)], tmp_path / "out")
    plan = plan_recipe(asked)
    run_recipe(plan, progress=False)
    off = float((said(loaded(tmp_path / "out", model)) - wanted).abs().max())
    assert 0 < off < 0.03 * float(wanted.std())
    norms = "post_attention_layernorm, post_feedforward_layernorm"
    names = {"gpt2": "c_attn", "diffllama": "o_proj, lambda_q1", "esmc": "o_proj, down_proj", "beam": norms}
    (note,) = (note for note in plan.notes if "make up for it" in note)
    assert f": weights of 4 layers make up for it ({names[kind]}); in BF16 this rounds" in note
    assert ("exact up to the eps of norms" in note) == (kind == "beam")


@given(st.lists(st.integers(0, 60), min_size=1, max_size=80))
def test_the_stream_of_beam_keeps_its_direction(indices: list[int]) -> None:
    """The additions in numbers: every layer adds 1 to its own coordinate, and the stream is the old one but for one factor."""
    row = next(row for row in AMENDS if row.model_types == ("beam",))
    made = row.changes([Seat(index, 61) for index in indices])
    before, after = [1.0], [1.0]
    for at, (index, change) in enumerate(zip(indices, made, strict=True)):
        for place, one in zip((2, 3), change.values(), strict=True):
            for stream, number, adds in ((before, index, 1.0), (after, at, one.by)):
                count = 2 * number + place
                stream[:] = [value * math.sqrt((count - 1) / count) for value in stream] + [adds / math.sqrt(count)]
    factors = [new / old for new, old in zip(after, before, strict=True)]
    assert all(math.isclose(factor, factors[0], rel_tol=1e-9) for factor in factors)
    assert factors[0] >= 1 / math.sqrt(2 * len(indices) + 1) - 1e-9


@pytest.mark.parametrize("row", AMENDS, ids=lambda row: row.model_types[0])
def test_layers_that_are_where_they_were_are_left_alone(row: Any) -> None:
    assert all(change.idle for made in row.changes([Seat(index, 6) for index in range(6)]) for change in made.values())
    if row.model_types != ("esmc",):
        made = row.changes([Seat(0, 6), Seat(1, 6), Seat(4, 6), Seat(5, 6)])
        assert [all(change.idle for change in one.values()) for one in made] == [True, True, False, False]


def test_no_type_is_both_amended_and_refused() -> None:
    amended = {kind for row in AMENDS for kind in row.model_types}
    assert len(amended) == sum(len(row.model_types) for row in AMENDS)
    assert not amended & {kind for row in EXCEPTIONS for kind in row.model_types}


def test_the_numbers_of_each_row() -> None:
    inverse, differential, depth, beam = (row.changes for row in AMENDS)
    query = inverse([Seat(0, 4), Seat(3, 4)])[1]
    assert query["attn.c_attn.weight"] == Change(0.5, 3) and query["crossattention.q_attn.bias"] == Change(0.5)
    up, down = differential([Seat(2, 4), Seat(0, 4)])
    delta = 0.6 * (1 - math.exp(-0.6))
    assert up["self_attn.lambda_q1"].by == pytest.approx(delta) and up["self_attn.lambda_q2"].idle
    assert up["self_attn.o_proj.weight"].by == pytest.approx((0.2 + 0.6 * math.exp(-0.6)) / 0.8)
    assert down["self_attn.lambda_q1"].idle and down["self_attn.lambda_q2"].by == pytest.approx(0.6 * (1 - math.exp(-0.3)))
    assert [one["mlp.down_proj.bias"].by for one in depth([Seat(0, 8), Seat(0, 2)])] == [0.5, 1.0]
    (first,) = beam([Seat(1, 4)])
    assert [change.by for change in first.values()] == pytest.approx([math.sqrt(1 / 3)] * 2)


def member(folder: Path, kind: str, names: Sequence[str], dtype: str = "F32", depth: int = 2, **config: Any) -> Member:
    size = {"F32": 4, "BF16": 2, "U8": 1}[dtype]
    tensors = {f"model.layers.{layer}.{name}": (dtype, (6,), bytes(6 * size)) for layer in range(depth) for name in names}
    checkpoint = open_checkpoint(write_checkpoint(folder, tensors, {"model_type": kind, "num_hidden_layers": depth, **config}))
    return Member(checkpoint, find_stack(checkpoint))


ESMC = ("self_attn.o_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight")


def refs(*indices: int) -> list[LayerRef]:
    return [LayerRef(model="m", index=index) for index in indices]


def test_only_what_changes_is_listed(tmp_path: Path) -> None:
    gpt2 = member(tmp_path / "a", "gpt2", ["attn.c_attn.weight"], **ON)
    assert row_of(gpt2) == AMENDS[0]
    assert row_of(member(tmp_path / "b", "gpt2", ["attn.c_attn.weight"])) is None
    assert row_of(member(tmp_path / "c", "llama", ["attn.c_attn.weight"], **ON)) is None
    assert changes({"m": gpt2}, refs(0, 1)) == {} and hindrance({"m": gpt2}, refs(0, 1)) is None
    assert sorted(changes({"m": gpt2}, refs(0, 0))) == [1]


@pytest.mark.parametrize(
    ("names", "dtype", "config", "lacking"),
    [
        (ESMC, "F32", {}, None),
        (ESMC, "BF16", {}, None),
        (ESMC[1:], "F32", {}, "layer 0 has no self_attn.o_proj.weight in floating point that could make up for it"),
        (ESMC, "U8", {}, "layer 0 has no self_attn.o_proj.weight in floating point that could make up for it"),
        (ESMC, "F32", {"quantization_config": {"quant_method": "fp8"}}, "quantised weights cannot make up for it"),
    ],
)
def test_weights_that_cannot_make_up_are_refused_with_the_reason(
    names: Sequence[str], dtype: str, config: dict[str, Any], lacking: str | None, tmp_path: Path
) -> None:
    source = member(tmp_path / "m", "esmc", names, dtype, **config)
    asked = {"model": str(tmp_path / "m"), "steps": [{"prune": {"at": 0}}], "output": str(tmp_path / "out")}
    reason = "the residual is divided by sqrt(number of layers / 36)"
    if lacking is None:
        assert hindrance({"m": source}, refs(1)) is None
        assert len(made(plan_recipe(Recipe.model_validate(asked)))) == 2
        return
    assert hindrance({"m": source}, refs(1)) == f"{reason}, and {lacking}"
    with pytest.raises(RefusedError) as caught:
        plan_recipe(Recipe.model_validate(asked))
    assert caught.value.message == f"model type esmc: {reason}, and {lacking}, so this stack would load but compute something else"
    plan = plan_recipe(Recipe.model_validate({**asked, "allow": "inexact"}))
    assert made(plan) == [] and plan.notes == (f"inexact: {caught.value.message}",)


def test_norms_of_a_quantised_model_make_up(tmp_path: Path) -> None:
    norms = ["post_attention_layernorm.weight", "post_feedforward_layernorm.weight"]
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    source = member(tmp_path / "m", "beam", [*norms, "self_attn.o_proj.weight"], **quantised)
    assert hindrance({"m": source}, refs(1)) is None
    plan = plan_recipe(Recipe.model_validate({"model": str(tmp_path / "m"), "steps": [{"prune": {"at": 0}}], "output": "x"}))
    assert [tensor.name for tensor in made(plan)] == [f"model.layers.0.{name}" for name in norms]


def made(plan: Plan) -> list[TensorMade]:
    return [tensor for file in plan.actions.files for tensor in file.tensors if isinstance(tensor, TensorMade)]


DIFF = ("self_attn.o_proj.weight", *(f"self_attn.lambda_{name}" for name in ("q1", "k1", "q2", "k2")))


def test_what_the_plan_holds(tmp_path: Path) -> None:
    source = member(tmp_path / "m", "diffllama", DIFF, depth=3)
    plan = plan_recipe(Recipe.model_validate({"model": str(tmp_path / "m"), "steps": [{"prune": {"at": 0}}], "output": "x"}))
    assert [tensor.name.removeprefix("model.layers.") for tensor in made(plan)] == [
        f"{layer}.self_attn.{name}" for layer in (0, 1) for name in ("o_proj.weight", "lambda_q1")
    ]
    query = made(plan)[1]
    named = source.checkpoint.tensors
    assert [part.begin for part in query.parts] == [named[f"model.layers.1.self_attn.lambda_{name}"].begin for name in ("q1", "k1")]
    assert query.amend == Grown(by=0.6 - 0.6 * math.exp(-0.3)) and query.factors == ()
    assert Plan.from_json(plan.to_json()) == plan


def test_a_third_of_the_columns_and_a_row_that_has_none(tmp_path: Path) -> None:
    member(tmp_path / "m", "gpt2", ["attn.c_attn.weight", "attn.c_attn.bias"], **ON)
    asked = {"model": str(tmp_path / "m"), "steps": [{"prune": {"at": 0}}], "output": "x"}
    assert [tensor.amend for tensor in made(plan_recipe(Recipe.model_validate(asked)))] == [Band(by=0.5, row=6, stop=2)] * 2
    tensors = {f"model.layers.{layer}.attn.c_attn.weight": ("F32", (2, 4), bytes(32)) for layer in range(2)}
    write_checkpoint(tmp_path / "odd", tensors, {"model_type": "gpt2", "num_hidden_layers": 2, **ON})
    with pytest.raises(RefusedError) as caught:
        plan_recipe(Recipe.model_validate({**asked, "model": str(tmp_path / "odd")}))
    message = "a row of 4 elements has no 3 equal parts, of which one makes up for the new index of its layer"
    assert str(caught.value) == f"model.layers.1.attn.c_attn.weight: {message}"


def test_averages_are_multiplied_and_what_is_no_factor_is_refused(tmp_path: Path) -> None:
    merge = {"steps": [{"prune": {"at": 0}}, {"merge": {"at": [0, 1]}}], "output": "x"}
    member(tmp_path / "esmc", "esmc", ESMC, depth=4)
    plan = plan_recipe(Recipe.model_validate({"model": str(tmp_path / "esmc"), **merge}))
    assert [share.index for share in plan.actions.layers[0].shares] == [1, 2]
    assert [(len(tensor.parts), tensor.factors) for tensor in made(plan)][:2] == [(2, (math.sqrt(0.5),))] * 2
    member(tmp_path / "diff", "diffllama", DIFF, depth=4)
    with pytest.raises(RefusedError) as caught:
        plan_recipe(Recipe.model_validate({"model": str(tmp_path / "diff"), **merge}))
    message = "this tensor makes up for the new index of its layer, and cannot be averaged or scaled too"
    assert str(caught.value) == f"model.layers.1.self_attn.lambda_q1: {message}"


@pytest.mark.parametrize("scaled", ["lambda_q1", "lambda_k1", "o_proj", "lambda_q2"])
def test_a_layer_that_is_scaled_and_moved(scaled: str, tmp_path: Path) -> None:
    member(tmp_path / "m", "diffllama", DIFF, depth=3)
    scale = {"scale": [{"filter": scaled, "value": 0.5}]}
    asked = {"slices": [{"model": str(tmp_path / "m"), "layer_range": [1, 3], "parameters": scale}], "output": "x"}
    if scaled in ("lambda_q1", "lambda_k1"):
        with pytest.raises(RefusedError, match=r"cannot be averaged or scaled too$"):
            plan_recipe(Recipe.model_validate(asked))
        return
    found = {
        tensor.name.removeprefix("model.layers.0.self_attn."): tensor.factors for tensor in made(plan_recipe(Recipe.model_validate(asked)))
    }
    both = (0.5,) * (scaled == "o_proj") + ((0.2 + 0.6 * math.exp(-0.3)) / 0.8,)
    assert found["o_proj.weight"] == pytest.approx(both) and found["lambda_q1"] == ()
    assert found.get("lambda_q2") == ((0.5,) if scaled == "lambda_q2" else None)


def test_a_layer_that_adds_nothing_may_be_moved(tmp_path: Path) -> None:
    member(tmp_path / "m", "diffllama", DIFF, depth=3)
    steps = [{"prune": {"at": 0}}, {"zero": {"at": 0, "tensors": "*o_proj*"}}]
    found = {
        tensor.name: tensor
        for tensor in made(plan_recipe(Recipe.model_validate({"model": str(tmp_path / "m"), "steps": steps, "output": "x"})))
    }
    assert found["model.layers.0.self_attn.o_proj.weight"].parts == ()
    assert found["model.layers.0.self_attn.lambda_q1"].amend is not None


def test_a_vector_of_zeros_cannot_make_up(tmp_path: Path) -> None:
    member(tmp_path / "m", "diffllama", DIFF, depth=3)
    asked = {"model": str(tmp_path / "m"), "steps": [{"prune": {"at": 0}}], "output": str(tmp_path / "out")}
    with pytest.raises(OutputError) as caught:
        run_recipe(Recipe.model_validate(asked), progress=False)
    message = "cannot make up for the new place of its layer: the tensor that it is multiplied with is zero"
    assert str(caught.value) == f"tensor 'model.layers.0.self_attn.lambda_q1': {message}"
    assert not (tmp_path / "out").exists()


def test_what_is_told(tmp_path: Path) -> None:
    members = {"m": member(tmp_path / "m", "esmc", ESMC)}
    start = "the residual is divided by sqrt(number of layers / 36): weights of"
    end = "make up for it (o_proj, down_proj)"
    assert told(members, refs(1), ["F32", "F64"]) == [f"{start} 1 layer {end}"]
    assert told(members, refs(1, 0, 1), ["BF16", "F32", "F16", "BF16"]) == [f"{start} 3 layers {end}; in BF16 and F16 this rounds"]
    assert told(members, refs(1, 0), ["BF16"]) == []
