from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from conftest import KINDS, tiny_config
from test_end_to_end import rearranged, reloaded

from layercut.errors import CheckpointError, LayercutError, RefusedError
from layercut.inmemory import cut, layers_in, member_of

COMMON = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS = {"intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64}
MORE: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, **HEADS, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON, **HEADS),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **COMMON, **HEADS, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 3,
    ),
    "jamba": lambda: transformers.JambaConfig(
        **COMMON, **HEADS, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
        num_experts_per_tok=1, use_mamba_kernels=False, mamba_d_state=4,
    ),
    "mamba": lambda: transformers.MambaConfig(**COMMON, state_size=4),
    "opt": lambda: transformers.OPTConfig(
        **COMMON, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64
    ),
}  # fmt: skip


def make(kind: str, seed: int = 0, **config: Any) -> Any:
    """A tiny model in memory whose layers matter."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(MORE[kind]() if kind in MORE else tiny_config(kind, 6, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def ids(length: int = 17) -> Any:
    return torch.arange(3, 3 + length)[None]


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(ids(), use_cache=False).logits


def generated(model: Any, **arguments: Any) -> list[int]:
    found: list[int] = model.generate(ids(), max_new_tokens=6, do_sample=False, **arguments)[0].tolist()
    return found


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_a_cut_model_runs_generates_and_saves(kind: str, tmp_path: Path) -> None:
    """In memory and read back: the same logits bit for bit, and the same tokens with a cache and without."""
    model = make(kind)
    cut(model, 2, 4)
    assert len(layers_in(model, member_of(model))) == 4
    assert generated(model) == generated(model, use_cache=False)
    model.save_pretrained(tmp_path)
    again = reloaded(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert generated(again) == generated(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 6), (1, 5)])
def test_a_cut_is_the_model_without_those_layers(kind: str, start: int, stop: int, tiny: Callable[..., Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny(kind), dtype=torch.float32).eval()
    cut(model, start, stop)
    assert torch.equal(logits(model), logits(rearranged(tiny(kind), [*range(start), *range(stop, 6)])))


def built(kind: str, task: str = "causal") -> Any:
    """A tiny model of any type."""
    return zoo.tiny_model(kind, task)


@pytest.mark.parametrize(
    ("kind", "task", "start", "stop"),
    [
        ("rwkv", "causal", 0, 1),
        ("zaya", "causal", 0, 2),
        ("t5", "seq2seq", 0, 1),
        ("gpt_neox_japanese", "causal", 4, 6),
        ("gemma4_text", "causal", 1, 2),
    ],
)
def test_weights_that_a_layer_keeps_for_others_do_not_move_in_memory(kind: str, task: str, start: int, stop: int) -> None:
    model = built(kind, task)
    before = json.loads(model.config.to_json_string())
    with pytest.raises(
        RefusedError, match=r"weights that one layer, or one tensor, keeps for others would have to move; cut its checkpoint"
    ):
        cut(model, start, stop)
    assert json.loads(model.config.to_json_string()) == before


@pytest.mark.parametrize(("kind", "task", "start", "stop"), [("rwkv", "causal", 1, 3), ("zaya", "causal", 2, 4), ("t5", "seq2seq", 3, 5)])
def test_the_layers_between_are_cut_in_memory(kind: str, task: str, start: int, stop: int) -> None:
    model = built(kind, task)
    cut(model, start, stop)
    assert len(layers_in(model, member_of(model))) == 4
    with torch.no_grad():
        given = {"input_ids": ids(), **({"decoder_input_ids": ids(5)} if task == "seq2seq" else {})}
        assert model(**given).logits.isfinite().all()


def test_a_config_that_counts_otherwise_on_disk_is_cut_there() -> None:
    with pytest.raises(RefusedError, match="the config of this model counts attention and MLP apart on disk only; cut its checkpoint"):
        cut(built("dory"), 1, 2)


def test_per_layer_lists_follow() -> None:
    model = make("qwen3")
    kinds = list(model.config.layer_types)
    cut(model, 1, 3)
    assert model.config.layer_types == [kinds[index] for index in (0, 3, 4, 5)]
    assert model.config.num_hidden_layers == 4
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]


def test_a_model_can_be_cut_again() -> None:
    twice, once = make("llama"), make("llama")
    cut(twice, 1, 2)
    cut(twice, 3, 5)
    for start, stop in ((4, 6), (1, 2)):
        cut(once, start, stop)
    assert torch.equal(logits(twice), logits(once)) and generated(twice) == generated(once)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = make("llama")
    before, other = logits(model), copy.deepcopy(model)
    cut(other, 0, 3)
    assert torch.equal(logits(model), before) and model.config.num_hidden_layers == 6
    assert other.config.num_hidden_layers == 3


def test_a_cut_model_can_be_trained() -> None:
    model = make("llama").train()
    cut(model, 2, 4)
    model(ids(), labels=ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (2, 2), (3, 2), (-1, 2), (4, 7)])
def test_what_is_no_block_is_refused(start: int, stop: int) -> None:
    model = make("llama")
    with pytest.raises(LayercutError, match=rf"^\[{start}, {stop}\) is no block of a model of 6 layers; at least one layer must stay$"):
        cut(model, start, stop)
    assert len(model.model.layers) == 6


def test_what_would_compute_something_else_is_refused_before_anything_changes() -> None:
    model = make("gpt2", scale_attn_by_inverse_layer_idx=True)
    before = logits(model)
    reason = "scale_attn_by_inverse_layer_idx divides attention by the layer index, and weights would have to make up for it"
    with pytest.raises(RefusedError, match=f"^{reason}; cut its checkpoint with a recipe$"):
        cut(model, 1, 2)
    assert torch.equal(logits(model), before) and model.config.n_layer == 6
    cut(model, 4, 6)
    assert generated(model) == generated(model, use_cache=False)


def test_the_map_of_devices_follows() -> None:
    model = make("llama")
    names = ["model.embed_tokens", *(f"model.layers.{index}" for index in range(5)), "model.layers.5.mlp", "model.layers.5.self_attn"]
    model.hf_device_map = {name: place for place, name in enumerate(names)} | {"lm_head": "disk"}
    cut(model, 1, 4)
    assert model.hf_device_map == {
        "model.embed_tokens": 0, "model.layers.0": 1, "model.layers.1": 5, "model.layers.2.mlp": 6, "model.layers.2.self_attn": 7,
        "lm_head": "disk",
    }  # fmt: skip


def test_layers_may_lie_on_the_disk(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """What accelerate attached to the layers that stay keeps working."""
    around = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places = {**around, **{f"model.layers.{index}": "disk" if index in (2, 4) else "cpu" for index in range(6)}}
    load = transformers.AutoModelForCausalLM.from_pretrained
    spread = load(tiny("qwen3"), device_map=places, offload_folder=str(tmp_path / "disk")).eval()
    plain = load(tiny("qwen3")).eval()
    for model in (spread, plain):
        cut(model, 1, 3)
    assert torch.equal(logits(spread), logits(plain)) and generated(spread) == generated(plain)
    spread.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded(tmp_path / "out")), logits(plain))


def test_a_model_without_layers() -> None:
    model = transformers.AutoModel.from_config(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    with pytest.raises(CheckpointError):
        member_of(model)
