"""Models of every kind are measured: encoders, encoder-decoders, text behind a vision tower, recurrent and hybrid stacks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo

from layercut.architecture import find_stack
from layercut.checkpoint import open_checkpoint
from layercut.errors import CheckpointError
from layercut.loading import given, layers_of, load_backbone
from layercut.runner import Runner
from layercut.tokens import Sample

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 23, 44, 51, 12, 37], [7, 8, 9, 10, 0, 0, 0]])
MASK = (IDS != 0).long()
ENCODER = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
TEXT = {**ENCODER, "num_key_value_heads": 1, "pad_token_id": 0}
BART = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
KINDS = ["bert", "distilbert", "modernbert", "bart", "t5", "llava", "mamba", "jamba", "recurrent_gemma", "bart decoder", "openai-gpt"]


def made(kind: str) -> Any:
    """A tiny model of a kind, with the head of its task."""
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER))
    if kind == "distilbert":
        sizes = {"vocab_size": 60, "dim": 16, "hidden_dim": 24, "n_layers": 3, "n_heads": 2, "max_position_embeddings": 32}
        return transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes))
    if kind == "modernbert":
        marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
        return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**ENCODER, **marks))
    if kind == "bart":
        return transformers.BartForConditionalGeneration(transformers.BartConfig(**BART))
    if kind == "bart decoder":
        return transformers.BartForCausalLM(transformers.BartConfig(**{**BART, "encoder_layers": 3}))
    if kind == "openai-gpt":
        sizes = {"vocab_size": 60, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
        return transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes))
    if kind == "t5":
        sizes = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    if kind == "llava":
        vision = {**VISION, "model_type": "clip_vision_model"}
        parts = {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": vision, "image_token_index": 59}
        return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**parts))
    if kind == "mamba":
        sizes = {"vocab_size": 60, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 3}
        return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    if kind == "jamba":
        periods = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2, "mamba_dt_rank": 4}
        return transformers.JambaForCausalLM(transformers.JambaConfig(**TEXT, **periods, mamba_d_state=4, num_experts_per_tok=1))
    return transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**TEXT, lru_width=16, attention_window_size=4))


def saved(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    made(kind).save_pretrained(folder)
    return folder


def hooked(model: Any, layers: Any) -> list[torch.Tensor]:
    """Boundary states of the tokens that are no pads, by plain hooks of torch."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda module, args, kwargs, out: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    handles.append(
        layers[-1].register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple | list) else out))
    )
    with torch.no_grad():
        more = {"decoder_input_ids": IDS, "decoder_attention_mask": MASK} if model.config.is_encoder_decoder else {}
        model(input_ids=IDS, attention_mask=MASK, **more)
    for handle in handles:
        handle.remove()
    return [state[MASK.bool()] for state in seen]


def states(backbone: Any, depth: int, prefix: str) -> list[torch.Tensor]:
    runner = Runner("m", backbone, depth, prefix)
    samples = [Sample(number, IDS[number][MASK[number].bool()].tolist(), None) for number in range(2)]
    return runner.states(samples, IDS, MASK, MASK.bool())


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_plain_hooks(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / kind, kind)
    stack = find_stack(open_checkpoint(str(folder)))
    found = states(load_backbone(folder, CPU), stack.depth, stack.prefix)
    whole = type(made(kind)).from_pretrained(folder).eval()
    wanted = hooked(whole, layers_of(whole, stack.depth, stack.prefix))
    assert len(found) == stack.depth + 1
    for mine, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-5)
    assert all((left - right).abs().max() > 1e-4 for left, right in itertools.pairwise(found))


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_encoder_and_decoder_are_told_apart(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / kind, kind)
    backbone: Any = load_backbone(folder, CPU)
    name = "block" if kind == "t5" else "layers"
    for side, depth in (("encoder", 2), ("decoder", 3)):
        layers = getattr(getattr(backbone, side), name)
        assert layers_of(backbone, depth, f"model.{side}.{name}.") is layers
        for mine, plain in zip(states(backbone, depth, f"{side}.{name}."), hooked(backbone, layers), strict=True):
            torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-5)


def test_a_bare_model_may_lack_what_the_task_does_not_need(tmp_path: Path) -> None:
    folder = saved(tmp_path / "bert", "bert")
    backbone: Any = load_backbone(folder, CPU)
    assert type(backbone).__name__ == "BertModel" and backbone.pooler is None


@pytest.mark.parametrize("named", ["torch", "os.system", "LlamaConfig", "", 5])
def test_no_class_but_a_model_of_transformers_is_taken_from_a_config(named: object, tmp_path: Path) -> None:
    folder = saved(tmp_path / "bert", "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [named]}))
    with pytest.raises(CheckpointError, match=r"weights are missing: pooler\.dense\.bias"):
        load_backbone(folder, CPU)


def test_a_model_that_wants_more_than_text_says_so(tmp_path: Path) -> None:
    sizes = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16, **BART, "pad_token_id": 0}
    sizes.pop("max_position_embeddings")
    transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model 'm' does not run on a text alone: "):
        states(load_backbone(tmp_path, CPU), 3, "model.decoder.layers.")


def test_a_model_is_given_only_what_it_takes() -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any) -> None: ...

    class Both(torch.nn.Module):
        def forward(self, input_ids: Any, decoder_input_ids: Any, **more: Any) -> None: ...

    assert list(given(Plain(), IDS, MASK)) == ["input_ids", "attention_mask"]
    assert list(given(Both(), IDS, MASK)) == ["input_ids", "use_cache", "decoder_input_ids"]


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        ("dory", "causal", "the layers of model 'm' do not run once each, in order; it cannot be measured"),
        ("hrm_text", "causal", "the layers of model 'm' do not run once each, in order; it cannot be measured"),
        ("blt", "causal", "boundary 0 of model 'm' is no tensor of (samples, tokens, hidden); this architecture cannot be measured"),
        ("albert", "masked", "AlbertModel has no list of 6 layers"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_layers_in_loops_are_cut_but_not_measured(kind: str, task: str, message: str, tmp_path: Path) -> None:
    zoo.tiny_model(kind, task).save_pretrained(tmp_path)
    stack = find_stack(open_checkpoint(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        runner = Runner("m", load_backbone(tmp_path, CPU, "float32"), stack.depth, stack.prefix)
        runner.states([], IDS[:1], MASK[:1], MASK[:1].bool())
    assert message in str(caught.value)
