"""Players: which models have a loss, and what is said of those that have none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from conftest import byte_tokenizer, failure

from layercut.architecture import find_stack
from layercut.checkpoint import open_checkpoint
from layercut.errors import CheckpointError, LayercutError, RefusedError
from layercut.players import BY_DISTANCE, Player, module_of
from layercut.stack import LayerRef, Scaling, Share

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, task: str) -> Path:
        if (kind, task) not in made:
            folder = made[kind, task] = tmp_path_factory.mktemp("odd") / kind
            zoo.tiny_model(kind, task).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
        return made[kind, task]

    return make


def player(folder: Path, wanted: str | None = None, dtype: str | None = None) -> Player:
    checkpoint = open_checkpoint(folder)
    stack = find_stack(checkpoint, wanted) if wanted else find_stack(checkpoint)
    return Player.load("m", checkpoint, stack.depth, stack.prefix, CPU, dtype)


def said(work: Callable[[], Any]) -> str:
    return failure(LayercutError, work)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_causal_models_pass(tiny: Tiny, kind: str) -> None:
    made = player(tiny(kind))
    made.check(IDS)
    assert made.logit_size == 128 * 4


@pytest.mark.parametrize("kind", ["mixtral", "mamba", "jamba", "qwen3_next", "deepseek_v3"])
def test_experts_and_hybrids_pass(odd: Callable[..., Path], kind: str) -> None:
    player(odd(kind, "causal")).check(IDS)


def test_a_model_of_text_and_images_passes_with_its_language_stack(odd: Callable[..., Path]) -> None:
    player(odd("llava", "image")).check(IDS)


@pytest.mark.parametrize(("kind", "task"), [("t5", "seq2seq"), ("bart", "seq2seq")])
def test_an_encoder_decoder_has_no_loss(odd: Callable[..., Path], kind: str, task: str) -> None:
    message = said(lambda: player(odd(kind, task)))
    assert message.endswith(f"model 'm' is an encoder-decoder: the loss of predicting a text is not defined for it; {BY_DISTANCE}")


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_masked_model_has_no_loss(odd: Callable[..., Path], kind: str) -> None:
    message = said(lambda: player(odd(kind, "masked")))
    assert message.endswith(f"model 'm' is a masked language model: the loss of predicting a text is not defined for it; {BY_DISTANCE}")


def test_a_masked_model_that_does_not_say_so_is_seen_to_look_ahead(odd: Callable[..., Path], tmp_path: Path) -> None:
    for path in odd("bert", "masked").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertLMHeadModel"]}))
    message = said(lambda: player(tmp_path).check(IDS))
    assert "model 'm' sees the tokens that it is to predict (it is no causal language model): it has no loss" in message


def test_a_model_without_a_head_for_tokens_has_no_loss(odd: Callable[..., Path], tmp_path: Path) -> None:
    transformers.ViTModel(
        transformers.ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
    ).save_pretrained(tmp_path)
    message = said(lambda: player(tmp_path))
    assert "model 'm' is a vit without a head for next tokens: the loss of predicting a text is not defined for it" in message


def test_layers_that_the_text_does_not_run_through_have_no_loss(odd: Callable[..., Path]) -> None:
    message = said(lambda: player(odd("llava", "image"), "vision").check(IDS))
    assert "model 'm' cannot be followed layer by layer, which a loss needs: 0 of its 2 layers run" in message


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n_text"])
def test_models_whose_layers_share_more_than_the_state_are_refused(odd: Callable[..., Path], kind: str) -> None:
    with pytest.raises(RefusedError, match=r"beside the state|cannot be followed layer by layer"):
        player(odd(kind, "causal")).check(IDS)


def test_a_model_that_transformers_does_not_know(tiny: Tiny, tmp_path: Path) -> None:
    for path in tiny("llama").iterdir():
        text = path.read_bytes()
        (tmp_path / path.name).write_bytes(text.replace(b'"model_type": "llama"', b'"model_type": "lama"'))
    with pytest.raises(CheckpointError, match=r"transformers cannot load this model: "):
        player(tmp_path)


def test_a_model_whose_layers_are_not_all_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that the model does by itself, in no layer and in no end."""
    made = player(tiny("llama"))
    whole = type(made.staged).whole

    def more(self: Any, *arguments: Any) -> Any:
        output = whole(self, *arguments)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(type(made.staged), "whole", more)
    message = said(lambda: made.check(IDS))
    assert "the layers of model 'm', one after the other, do not give what the model gives" in message


def test_half_precision_passes(tiny: Tiny) -> None:
    player(tiny("llama"), dtype="bfloat16").check(IDS)


# Layers with arithmetic


def test_a_plain_layer_is_the_one_of_the_model(tiny: Tiny) -> None:
    made = player(tiny("llama"))
    assert module_of(LayerRef(model="m", index=3), {"m": made}) is made.staged.layers[3]


def test_averages_and_factors(tiny: Tiny) -> None:
    made = player(tiny("llama"))
    halves = (Share(model="m", index=1, weight=0.25), Share(model="m", index=2, weight=0.75))
    by = (Scaling(tensors="*.layers.1.mlp.up_proj.weight", by=2), Scaling(tensors="*", by=3))
    layer = module_of(LayerRef(model="m", index=1, span=2, shares=halves, scalings=(by, by[:1])), {"m": made})
    one, two = made.staged.layers[1].state_dict(), made.staged.layers[2].state_dict()
    before = {name: tensor.clone() for name, tensor in one.items()}
    for name, tensor in layer.state_dict().items():
        expected = (0.25 * one[name] + 0.75 * two[name]) * (4 if name == "mlp.up_proj.weight" else 3)
        torch.testing.assert_close(tensor, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.staged.layers[1].state_dict().items())


def test_weights_are_rounded_as_in_the_file(tiny: Tiny) -> None:
    made = player(tiny("llama", dtype="bfloat16"))
    halves = (Share(model="m", index=1, weight=0.3), Share(model="m", index=2, weight=0.7))
    layer = module_of(LayerRef(model="m", index=1, span=2, shares=halves), {"m": made})
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in layer.state_dict().values())
