"""The skeleton: stand-ins that note how layers are called, layers that are loaded one at a time, and models that cannot be followed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from layercut.checkpoint import open_checkpoint
from layercut.errors import CheckpointError, RefusedError
from layercut.loading import load_backbone, load_causal_lm
from layercut.skeleton import Skeleton
from layercut.standins import FORMS, Call, Mark, Script, StandIn, Unreadable
from layercut.weights import Weights

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def skeleton(folder: Path, **options: Any) -> Skeleton:
    checkpoint = open_checkpoint(folder)
    prefix = "transformer.h." if "transformer.h.0.ln_1.weight" in checkpoint.tensors else "model.layers."
    depth = checkpoint.config.get("num_hidden_layers") or checkpoint.config["n_layer"]
    return Skeleton(checkpoint, Weights(checkpoint), depth, prefix, CPU, torch.float32, **options)


def all_meta(model: nn.Module) -> bool:
    return all(part.is_meta for parts in (model.parameters(), model.buffers()) for part in parts)


# Loading


def test_nothing_is_loaded_at_first(tiny: Tiny) -> None:
    made = skeleton(tiny())
    assert all_meta(made.model) and all(all_meta(layer) for layer in made.layers)
    assert sum(made._weights.read.values()) == 0


def test_the_rest_is_loaded_for_a_while(tiny: Tiny) -> None:
    made = skeleton(tiny())
    whole: Any = load_backbone(tiny(), CPU)
    for _ in range(2):  # buffers that no checkpoint holds are computed each time
        with made.rest():
            model: Any = made.model
            assert torch.equal(model.embed_tokens.weight, whole.embed_tokens.weight)
            assert torch.equal(model.rotary_emb.inv_freq, whole.rotary_emb.inv_freq)
            assert all(all_meta(layer) for layer in made.layers)
        assert all_meta(made.model)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
def test_layers_are_those_of_the_whole_model(tiny: Tiny, kind: str) -> None:
    made = skeleton(tiny(kind))
    whole: Any = load_backbone(tiny(kind), CPU)
    for index, layer in enumerate(whole.h if kind == "gpt2" else whole.layers):
        expected = dict([*layer.named_parameters(), *layer.named_buffers()])
        for _ in range(2):
            with made.layer(index) as loaded:
                found = dict([*loaded.named_parameters(), *loaded.named_buffers()])
                assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
                assert not loaded.training
                assert all(all_meta(other) for other in made.layers if other is not loaded)
        assert all_meta(made.layers[index])


def test_experts_are_put_together(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in open_checkpoint(tmp_path).tensors
    made = skeleton(tmp_path)
    whole: Any = load_backbone(tmp_path, CPU)
    assert made.layer_peak == 4 * made.layer_size
    with made.layer(1) as layer:
        for name, parameter in whole.layers[1].named_parameters():
            assert torch.equal(layer.get_parameter(name), parameter)


@pytest.mark.parametrize(
    ("kind", "prefix", "scattered"),
    [("deepseek_v4", "model.layers.", False), ("inkling2_loop_text", "model.llm.layers.", True)],
)
def test_names_that_only_the_class_of_the_file_understands(kind: str, prefix: str, scattered: bool, tmp_path: Path) -> None:
    """The bare class of the one reads its own names wrong; files of the other keep weights of the layers outside of them."""
    whole = zoo.tiny_model(kind, "causal").eval()
    whole.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    weights, stack = Weights(checkpoint), whole.base_model.layers
    made = Skeleton(checkpoint, weights, len(stack), prefix, CPU, torch.float32)
    with made.rest():
        expected = {**dict(whole.base_model.named_parameters()), **dict(whole.base_model.named_buffers())}
        found = {**dict(made.model.named_parameters()), **dict(made.model.named_buffers())}
        assert len(found) > 2 and not any(name.startswith("layers.") for name in found)
        assert all(torch.equal(found[name], expected[name].detach()) for name in found)
    assert all_meta(made.model)
    head = whole.get_output_embeddings().weight
    rest = sum(checkpoint.tensors[name].nbytes for name in made._rest)
    assert 0 < sum(weights.read.values()) <= 2 * (rest - head.numel() * 4), "the head is not read"
    for index, own in enumerate(stack):
        with made.layer(index) as layer:
            parameters = dict(layer.named_parameters())
            assert parameters.keys() == dict(own.named_parameters()).keys()
            assert all(torch.equal(parameters[name], part.detach()) for name, part in own.named_parameters())
        assert all_meta(layer)
    assert made._scattered == scattered


def test_sizes(tiny: Tiny) -> None:
    made = skeleton(tiny())
    whole: Any = load_backbone(tiny(), CPU)
    layer = sum(part.numel() for part in whole.layers[0].parameters()) * 4
    assert (made.layer_size, made.layer_peak, made.hidden) == (layer, 2 * layer, 32)
    rest = sum(part.numel() for name, part in whole.named_parameters() if not name.startswith("layers."))
    assert made.rest_size == 4 * (rest + 2 * whole.rotary_emb.inv_freq.numel())
    widths = 32 + 16 + 16 + 32 + 64 + 64 + 32  # q, k, v, o, gate, up, down
    assert made.activations(10) == 10 * widths * 4 * 3 // 2


def test_layers_for_other_tokens_than_the_next_are_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    """Tensors of a layer behind the last one are in no layer, and not in the rest."""
    folder = tmp_path / "m"
    folder.mkdir()
    for path in tiny().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    checkpoint = open_checkpoint(folder)
    made = Skeleton(checkpoint, Weights(checkpoint), 6, "model.layers.", CPU, torch.float32)
    names = set(made._rest).union(*made._names)
    assert names == set(checkpoint.tensors)
    config = (folder / "config.json").read_text().replace('"num_hidden_layers": 6', '"num_hidden_layers": 5')
    (folder / "config.json").write_text(config)
    checkpoint = open_checkpoint(folder)
    made = Skeleton(checkpoint, Weights(checkpoint), 5, "model.layers.", CPU, torch.float32)
    left = set(checkpoint.tensors) - set(made._rest).union(*made._names)
    assert left == {name for name in checkpoint.tensors if name.startswith("model.layers.5.")} and left


# Recording


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_replayed_layers_give_what_the_model_gives(tiny: Tiny, kind: str) -> None:
    made = skeleton(tiny(kind))
    with made.rest():
        state, calls = made.record(IDS, MASK)
    assert len(calls) == 6
    with torch.inference_mode():
        for index, call in enumerate(calls):
            with made.layer(index) as layer:
                state = made.output(call, layer, state)
        with made.rest():
            found = made.finish(IDS, MASK, state).last_hidden_state
        whole: Any = load_backbone(tiny(kind), CPU)
        expected = whole(input_ids=IDS, attention_mask=MASK).last_hidden_state
    assert torch.equal(found[MASK.bool()], expected[MASK.bool()])


def test_logits_of_a_model_with_a_head(tiny: Tiny) -> None:
    made = skeleton(tiny(), kind=AutoModelForCausalLM)
    with torch.inference_mode():
        with made.rest():
            state, calls = made.record(IDS, MASK)
        for index, call in enumerate(calls):
            with made.layer(index) as layer:
                state = made.output(call, layer, state)
        with made.rest():
            found = made.finish(IDS, MASK, state).logits
        expected = load_causal_lm(tiny(), CPU)(input_ids=IDS, attention_mask=MASK).logits
    assert torch.equal(found[MASK.bool()], expected[MASK.bool()])


def test_masks_differ_by_the_kind_of_layer(tiny: Tiny) -> None:
    made = skeleton(tiny("gemma3_text"))
    ids = torch.arange(5, 17)[None]
    with made.rest():
        calls = made.record(ids, torch.ones_like(ids)).calls
    kinds = ["full" if index % 3 == 2 else "sliding" for index in range(6)]
    masks = [call.kwargs["attention_mask"] for call in calls]
    seen = {kind: [mask for mask, own in zip(masks, kinds, strict=True) if own == kind] for kind in ("full", "sliding")}
    assert all(mask is seen["sliding"][0] for mask in seen["sliding"]) and all(mask is seen["full"][0] for mask in seen["full"])
    assert seen["sliding"][0] is not seen["full"][0]


# Scripts


def layers(count: int) -> list[nn.Module]:
    return [nn.Identity() for _ in range(count)]


def played(run: Callable[[list[StandIn]], Any], count: int = 3, form: int = 0) -> Script:
    stack = layers(count)
    script = Script(stack, FORMS[form])
    run([StandIn(layer, script) for layer in stack])
    script.check_all_ran()
    return script


def test_a_plain_loop() -> None:
    start = torch.ones(1, 2, 3)

    def run(stack: list[StandIn]) -> None:
        state = start
        for number, layer in enumerate(stack):
            state = layer(state, None, scale=number)

    script = played(run)
    assert script.state is start
    assert script.calls == [Call((None,), {"scale": number}, False) for number in range(3)]


def test_a_state_that_is_passed_by_name() -> None:
    def run(stack: list[StandIn]) -> None:
        state = torch.ones(1, 2, 3)
        for layer in stack:
            (state,) = layer(hidden_states=state, mask=None)

    assert played(run, form=1).calls == [Call((), {"mask": None}, True)] * 3


def test_calls_pass_the_state_as_it_was_passed() -> None:
    def layer(hidden_states: Tensor, scale: float) -> Tensor:
        return hidden_states * scale

    module: Any = layer
    assert Call((), {"scale": 2.0}, True).on(module, torch.ones(1)).item() == 2
    assert Call((3.0,), {}, False).on(module, torch.ones(1)).item() == 3


def twice(stack: list[StandIn]) -> None:
    state = torch.ones(1, 2, 3)
    for layer in (*stack, stack[0]):
        state = layer(state)


def backwards(stack: list[StandIn]) -> None:
    state = torch.ones(1, 2, 3)
    for layer in reversed(stack):
        state = layer(state)


def scaled(stack: list[StandIn]) -> None:
    state = torch.ones(1, 2, 3)
    for layer in stack:
        state = layer(state) * 1.0


def early(stack: list[StandIn]) -> None:
    stack[0](torch.ones(1, 2, 3))


def remembered(stack: list[StandIn]) -> None:
    """The last layer is given the output of the first one, too: not known before that has run."""
    first = stack[0](torch.ones(1, 2, 3))
    stack[2](stack[1](first), first)


def nested(stack: list[StandIn]) -> None:
    first = stack[0](torch.ones(1, 2, 3))
    stack[2](stack[1](first), extra={"deep": [first]})


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (twice, "its layers do not run once each, in order"),
        (backwards, "its layers do not run once each, in order"),
        (scaled, "something is done to the state between layers 0 and 1"),
        (early, "1 of its 3 layers run"),
        (remembered, "layer 2 is given more of what layers before it made than the state"),
        (nested, "layer 2 is given more of what layers before it made than the state"),
    ],
)
def test_models_that_cannot_be_followed(run: Callable[[list[StandIn]], None], reason: str) -> None:
    with pytest.raises(Unreadable, match=f"^{reason}$"):
        played(run)


def test_what_layers_return_beside_the_state_must_not_go_into_others() -> None:
    def run(stack: list[StandIn]) -> None:
        state, router = stack[0](torch.ones(1, 2, 3))
        assert isinstance(router, Mark)
        stack[1](state, router=router)

    with pytest.raises(Unreadable, match=r"^layer 1 is given more of what"):
        played(run, count=2, form=2)


def test_the_input_of_the_first_layer_may_go_into_all() -> None:
    def run(stack: list[StandIn]) -> None:
        start = state = torch.ones(1, 2, 3)
        for layer in stack:
            state = layer(state, embeddings=start)

    script = played(run)
    assert all(call.kwargs["embeddings"] is script.state for call in script.calls)


def test_a_layer_answers_for_its_stand_in() -> None:
    layer = nn.Linear(2, 2)
    layer.attention_type = "sliding_attention"  # type: ignore[assignment]
    stand_in = StandIn(layer, Script([layer], FORMS[0]))
    assert stand_in.attention_type == "sliding_attention" and stand_in.in_features == 2
    assert list(stand_in.parameters()) == []
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = stand_in.no_such_thing


# Errors


def test_a_model_that_transformers_does_not_know(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for path in tiny().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    text = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "lama"')
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"transformers cannot load this model: "):
        skeleton(folder)


def test_a_layer_that_returns_something_else(tiny: Tiny) -> None:
    made = skeleton(tiny())
    with pytest.raises(RefusedError, match=r"a layer of this model \(Flatten\) returns no state of the shape that it was given; it cannot"):
        made.output(Call((), {}, False), nn.Flatten(), torch.ones(1, 2, 3))
