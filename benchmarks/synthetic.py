"""Synthetic checkpoints of true shapes: filled with a light pattern that says which tensor it is, or sparse. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
CHUNK = 1 << 20

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape by tensor name, in the order of the layers."""


class Model(NamedTuple):
    """What a checkpoint holds."""

    shapes: Shapes
    config: dict[str, Any]
    shards: int

    @property
    def nbytes(self) -> int:
        return sum(nbytes(*one) for one in self.shapes.values())


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM_BYTES[dtype]


def llama(layers: int, hidden: int, inner: int, vocab: int, key_value: int, shards: int) -> Model:
    """A Llama in bfloat16; `key_value` is the width of the key and value projections."""
    shapes: Shapes = {"model.embed_tokens.weight": ("BF16", (vocab, hidden))}
    sides = {
        "input_layernorm": (hidden,), "mlp.down_proj": (hidden, inner), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "post_attention_layernorm": (hidden,), "self_attn.k_proj": (key_value, hidden), "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden), "self_attn.v_proj": (key_value, hidden),
    }  # fmt: skip
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": ("BF16", side) for name, side in sides.items()}
    shapes |= {"model.norm.weight": ("BF16", (hidden,)), "lm_head.weight": ("BF16", (vocab, hidden))}
    head = 128 if hidden % 128 == 0 and key_value % 128 == 0 else 64
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": hidden // head, "num_key_value_heads": key_value // head,
        "vocab_size": vocab, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "max_position_embeddings": 2048,
    }  # fmt: skip
    return Model(shapes, config, shards)


def llama_405b() -> Model:
    """meta-llama/Llama-3.1-405B: 126 layers in 191 files."""
    return llama(layers=126, hidden=16384, inner=53248, vocab=128256, key_value=1024, shards=191)


def deepseek_v3() -> Model:
    """deepseek-ai/DeepSeek-V3: 61 layers, three of them dense, and a multi-token-prediction layer, in 163 files."""
    shapes: Shapes = {"model.embed_tokens.weight": ("BF16", (129280, 7168))}
    for layer in range(62):
        shapes |= dict(_deepseek_layer(f"model.layers.{layer}", dense=layer < 3))
    extra = "model.layers.61"
    shapes |= {f"{extra}.{name}.weight": ("BF16", (7168,)) for name in ("enorm", "hnorm", "shared_head.norm")}
    shapes |= {f"{extra}.eh_proj.weight": ("BF16", (7168, 14336))}
    shapes |= {f"{extra}.{name}.weight": ("BF16", (129280, 7168)) for name in ("embed_tokens", "shared_head.head")}
    shapes |= {"model.norm.weight": ("BF16", (7168,)), "lm_head.weight": ("BF16", (129280, 7168))}
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1, "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_routed_experts": 256, "n_shared_experts": 1,
        "vocab_size": 129280, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    }  # fmt: skip
    return Model(shapes, config, 163)


def _deepseek_layer(layer: str, dense: bool) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    widths = (("input_layernorm", 7168), ("post_attention_layernorm", 7168), ("self_attn.q_a_layernorm", 1536))
    for name, width in (*widths, ("self_attn.kv_a_layernorm", 512)):
        yield f"{layer}.{name}.weight", ("BF16", (width,))
    attention = {"q_a": (1536, 7168), "q_b": (24576, 1536), "kv_a": (576, 7168), "kv_b": (32768, 512), "o": (7168, 16384)}
    linear = {f"self_attn.{name}_proj{'_with_mqa' * (name == 'kv_a')}": sides for name, sides in attention.items()}
    if not dense:
        yield f"{layer}.mlp.gate.weight", ("BF16", (256, 7168))
        yield f"{layer}.mlp.gate.e_score_correction_bias", ("F32", (256,))
    inner = 18432 if dense else 2048
    for expert in ("mlp",) if dense else ("mlp.shared_experts", *(f"mlp.experts.{number}" for number in range(256))):
        linear |= {f"{expert}.gate_proj": (inner, 7168), f"{expert}.up_proj": (inner, 7168), f"{expert}.down_proj": (7168, inner)}
    for name, (rows, columns) in linear.items():
        yield f"{layer}.{name}.weight", ("F8_E4M3", (rows, columns))
        yield f"{layer}.{name}.weight_scale_inv", ("F32", (-(-rows // 128), -(-columns // 128)))


def write(folder: Path, model: Model, *, sparse: bool = False) -> Path:
    """Write a checkpoint: tensors fill files of equal size in the order of the model, and lie in each as safetensors puts them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n", encoding="utf-8")
    homes: dict[str, str] = {}
    for number, names in enumerate(spread(model), 1):
        file = f"model-{number:05d}-of-{model.shards:05d}.safetensors"
        homes.update(dict.fromkeys(names, file))
        _write_file(folder / file, {name: model.shapes[name] for name in names}, sparse)
    index = {"metadata": {"total_size": model.nbytes}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def spread(model: Model) -> list[list[str]]:
    """The names of the tensors of each file."""
    groups: list[list[str]] = [[]]
    total, position = model.nbytes, 0
    for name, one in model.shapes.items():
        if position * model.shards >= total * len(groups) and len(groups) < model.shards:
            groups.append([])
        groups[-1].append(name)
        position += nbytes(*one)
    return groups


def _write_file(path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]], sparse: bool) -> None:
    names = sorted(shapes, key=lambda name: (-ITEM_BYTES[shapes[name][0]], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        size = nbytes(*shapes[name])
        header[name] = {"dtype": shapes[name][0], "shape": list(shapes[name][1]), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            file.truncate(8 + len(text) + position)
            return
        for name in names:
            for chunk in pattern(name, nbytes(*shapes[name])):
                file.write(chunk)


def pattern(name: str, size: int) -> Iterator[bytes]:
    """Bytes that differ from tensor to tensor and from one MiB to the next."""
    for start in range(0, size, CHUNK):
        length = min(CHUNK, size - start)
        digest = hashlib.sha256(f"{name}:{start}".encode()).digest()
        yield (digest * (length // 32 + 1))[:length]
