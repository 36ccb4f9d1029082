"""Tiny models of the families that measuring is tested on, and the cells in which all ways of measuring must give the same numbers.

As a script it is what a launcher starts: `families.py FOLDER OUT WAY... [--accelerator]` measures every cell, and the main rank writes.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from conftest import byte_tokenizer, tiny_config

from layercut import memory
from layercut.architecture import find_stack
from layercut.calibration import TextCalibration
from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.engine import Running, measure
from layercut.loading import quiet
from layercut.metrics import CKA, Angular, Cosine, Euclidean, Linear, Metric, Procrustes, RelativeMagnitude
from layercut.plan import Measurement
from layercut.ranks import ALONE, Ranks, joined

COMMON = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
RECURRENT = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 4}


def configs() -> dict[str, Any]:
    """Tiny configs of the families."""
    mixtral = transformers.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
    deepseek = transformers.DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=16, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, n_shared_experts=1,
    )  # fmt: skip
    return {
        **{kind: tiny_config(kind, 4) for kind in ("llama", "qwen3", "gpt2", "gemma3_text")},
        "gpt_neox": transformers.GPTNeoXConfig(**{key: value for key, value in COMMON.items() if key != "num_key_value_heads"}),
        "mixtral": mixtral,
        "deepseek_v3": deepseek,
        "mamba": transformers.MambaConfig(**RECURRENT, pad_token_id=0),
        "bloom": transformers.BloomConfig(vocab_size=128, hidden_size=32, n_head=4, n_layer=4),
        "recurrent_gemma": transformers.RecurrentGemmaConfig(
            **{**COMMON, "num_key_value_heads": 1}, lru_width=32, attention_window_size=16, head_dim=8
        ),
    }


KINDS = ("llama", "qwen3", "gpt2", "gemma3_text", "gpt_neox", "mixtral", "deepseek_v3", "mamba", "bloom", "recurrent_gemma")


def save(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Checkpoint:
    torch.manual_seed(0)
    with quiet(), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(folder)
    return open_checkpoint(folder)


FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "mixtral", "mamba")
"""Those of the cells."""
METRICS: tuple[Metric, ...] = (
    Angular(), Angular(token="all"), Cosine(), RelativeMagnitude(), Euclidean(), Linear(), Procrustes(), CKA(),
)  # fmt: skip
DTYPES = ("float32", "bfloat16")
WAYS: Mapping[str, int] = {"resident": 10**12, "streamed": 1000}
"""The schedules, each with the free memory in bytes that makes layercut pick it."""
TEXTS = {
    "padded": [" ".join(["abc", "of", "words", "d", "which", "go on"][: 1 + number % 6]) + f" {number}" for number in range(11)],
    "unpadded": [f"{number:02d} words of one length" for number in range(11)],
}
"""Eleven texts, in batches of two: uneven shares of two processes, and a batch that is not full."""


class Cell(NamedTuple):
    """A model, a kind of batches, and the dtype of weights and arithmetic."""

    kind: str
    text: str
    dtype: str

    @property
    def name(self) -> str:
        return "-".join(self)


CELLS = tuple(Cell(*parts) for parts in itertools.product(FAMILIES, TEXTS, DTYPES))


def prepare(folder: Path) -> None:
    """Write the models and texts of all cells."""
    for kind, dtype in itertools.product(FAMILIES, DTYPES):
        save(folder / kind / dtype, configs()[kind], getattr(torch, dtype))
    for name, texts in TEXTS.items():
        (folder / name).mkdir()
        for number, text in enumerate(texts):  # a file is a sample
            (folder / name / f"{number:02d}.txt").write_text(text, encoding="utf-8")


def measured(folder: Path, cell: Cell, way: str, ranks: Ranks = ALONE) -> Measurement:
    """One cell, measured by `measure` as the commands call it."""
    checkpoint = open_checkpoint(folder / cell.kind / cell.dtype)
    stack = find_stack(checkpoint)
    calibration = TextCalibration(path=str(folder / cell.text / "*.txt"), max_length=64, batch_size=2)
    options: dict[str, Any] = {"depths": {"m": stack.depth}, "prefixes": {"m": stack.prefix}, "dtype": cell.dtype, "device": "cpu"}
    with mock.patch.object(memory, "free_memory", lambda: {"memory": WAYS[way]}):
        return measure(Running({"m": checkpoint}, ranks=ranks, progress=False, **options), METRICS, calibration)


def all_measured(folder: Path, ways: Sequence[str], ranks: Ranks = ALONE) -> Iterator[tuple[str, Measurement]]:
    """Every cell in these ways, by `cell/way`."""
    for cell, way in itertools.product(CELLS, ways):
        yield f"{cell.name}/{way}", measured(folder, cell, way, ranks)


def main(folder: Path, out: Path, options: Sequence[str]) -> None:
    """What one of several processes does. With `--accelerator` accelerate makes a process group first, which works afterwards too."""
    made = None
    if "--accelerator" in options:
        import accelerate

        made = accelerate.Accelerator(cpu=True)
        assert made.num_processes == 2
    with joined() as ranks:
        assert ranks.seat.world == 2
        found = dict(all_measured(folder, [option for option in options if option in WAYS], ranks))
    if made is not None:
        assert made.gather(torch.tensor([made.process_index])).tolist() == [0, 1]
        made.end_training()
    name = out if ranks.main else out.with_suffix(".other")
    with name.open("w", encoding="utf-8") as file:
        file.writelines(f"{cell}\t{one.model_dump_json()}\n" for cell, one in found.items())


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
