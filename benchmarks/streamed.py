"""A random model larger than the memory that is allowed: planned and cut, with what that took in memory, reads and time.

python benchmarks/streamed.py            3 billion parameters, 64 x 256 tokens, 2 GB; writes streamed.md
python benchmarks/streamed.py --small    a tenth of it, printed only
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import synthetic

HERE = Path(__file__).resolve().parent
PAGE = HERE / "streamed.md"

RECIPE = """\
model: {model}
metrics: [angular, {{name: angular, token: all}}, cosine]
calibration: {{source: builtin, samples: {samples}, max_length: {length}}}
steps:
  - prune: {{layers: {layers}}}
"""


class Case(NamedTuple):
    """A model and what is done to it."""

    model: synthetic.Model
    memory: int
    """Bytes."""
    samples: int = 64
    length: int = 256
    layers: int = 6
    """Layers that go."""


def large() -> Case:
    """3.0 billion parameters in 13 files."""
    return Case(synthetic.llama(layers=28, hidden=3072, inner=8192, vocab=32000, key_value=1024, shards=13), 2 * 10**9)


def small() -> Case:
    """0.3 billion parameters in 5 files."""
    return Case(synthetic.llama(layers=20, hidden=1024, inner=4096, vocab=32000, key_value=256, shards=5), 10**9)


def make(folder: Path, model: synthetic.Model) -> Path:
    """Write the checkpoint, file by file, with seeded normal weights; and a tokenizer of bytes."""
    import safetensors.torch
    import torch

    if (folder / "config.json").is_file():  # it is written last
        return folder
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    homes: dict[str, str] = {}
    for number, names in enumerate(synthetic.spread(model), 1):
        file = f"model-{number:05d}-of-{model.shards:05d}.safetensors"
        tensors = {name: _random(model.shapes[name][1], generator) for name in names}
        safetensors.torch.save_file(tensors, folder / file, {"format": "pt"})
        homes.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": model.nbytes}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n", encoding="utf-8")
    return folder


def _random(shape: tuple[int, ...], generator: Any) -> Any:
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).bfloat16()


def _tokenizer() -> Any:
    import tokenizers
    import transformers

    signs = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE({"<unk>": 0, **{sign: 1 + at for at, sign in enumerate(signs)}}, [], unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def child(recipe: Path, plan: Path, memory: int) -> None:
    """Plan in this process, and print what it took as JSON."""
    import layercut
    from layercut import schedules, streaming

    made: list[streaming.Streamed] = []

    class Watched(streaming.Streamed):
        """A streamed schedule that is looked at afterwards."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    schedules.Streamed = Watched  # type: ignore[misc]
    before = _io()
    result = layercut.plan_recipe(recipe, memory=memory, progress=sys.stderr.isatty())
    after = _io()
    plan.write_text(result.to_json(), encoding="utf-8")
    assert result.measurement is not None
    found = {
        "peak": _peak(), "rchar": after["rchar"] - before["rchar"], "read": made[0].read, "spilled": made[0].spilled,
        "details": result.measurement.details, "tokens": result.measurement.tokens, "chosen": [choice.chosen for choice in result.choices],
    }  # fmt: skip
    print(json.dumps(found))


def run(plan: Path, out: Path) -> None:
    """Execute a plan in this process, and print what it took as JSON."""
    import layercut
    from layercut.plan import Plan

    layercut.run_recipe(Plan.from_json(plan.read_text(encoding="utf-8"), plan), out=out, progress=False)
    print(json.dumps({"peak": _peak()}))


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def _peak() -> int:
    """Largest resident memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def started(*arguments: object) -> tuple[dict[str, Any], float, float]:
    """What a fresh process of this script prints last, with its wall and CPU seconds."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    began, used = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, env=environment, check=True)
    wall, now = time.perf_counter() - began, os.times()
    return (
        json.loads(done.stdout.splitlines()[-1]),
        wall,
        now.children_user + now.children_system - used.children_user - used.children_system,
    )


def measured(case: Case, folder: Path) -> list[str]:
    """Make, plan and cut; the lines of the table."""
    model = make(folder / "model", case.model)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, samples=case.samples, length=case.length, layers=case.layers), encoding="utf-8")
    plan, wall, cpu = started("--child", recipe, folder / "plan.json", case.memory)
    cut, cut_wall, cut_cpu = started("--run", folder / "plan.json", folder / "out")
    weights = sum((folder / "model" / name).stat().st_size for name in {Path(name).name for name in plan["read"]})
    head = synthetic.nbytes(*case.model.shapes["lm_head.weight"])
    rows = {
        "weights on disk": f"{case.model.nbytes / 1e9:.2f} GB in {case.model.shards} files",
        "memory allowed": f"{case.memory / 1e9:.1f} GB",
        "tokens": f"{plan['tokens']} ({case.samples} x {case.length})",
        "schedule": plan["details"]["schedule"],
        "dtype of the arithmetic": next(iter(plan["details"]["dtype"].values())),
        "chosen": "; ".join(plan["chosen"]),
        "planning: peak RSS": f"{plan['peak'] / 1e6:.0f} MB",
        "planning: wall, CPU": f"{wall:.0f} s, {cpu:.0f} s",
        "planning: weights read": f"{sum(plan['read'].values()) / 1e9:.3f} GB of {weights / 1e9:.3f} GB of files; all but the LM head "
        f"({head / 1e9:.3f} GB), each once",
        "planning: all bytes read (rchar)": f"{plan['rchar'] / 1e9:.3f} GB, code and states on disk included",
        "planning: states on disk": f"{plan['spilled'] / 1e9:.3f} GB",
        "cutting: peak RSS": f"{cut['peak'] / 1e6:.0f} MB",
        "cutting: wall, CPU": f"{cut_wall:.0f} s, {cut_cpu:.0f} s",
    }
    check(case, plan, cut)
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def check(case: Case, plan: Mapping[str, Any], cut: Mapping[str, Any]) -> None:
    """Raise SystemExit when a promise is not kept."""
    expected: dict[str, int] = {}
    for number, names in enumerate(synthetic.spread(case.model), 1):
        file = f"model-{number:05d}-of-{case.model.shards:05d}.safetensors"
        expected[file] = sum(synthetic.nbytes(*case.model.shapes[name]) for name in names if name != "lm_head.weight")
    found = {Path(name).name: count for name, count in plan["read"].items()}
    if found != expected:
        raise SystemExit(f"read {found}, expected {expected}")
    if max(plan["peak"], cut["peak"]) > case.memory:
        raise SystemExit(f"peak RSS {plan['peak']} and {cut['peak']}, allowed {case.memory}")


def document(rows: list[str]) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    where = (
        f"{os.cpu_count()} CPUs, {memory:.0f} GB of memory, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    )
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return "\n".join(
        [
            "# A model larger than the memory that is allowed",
            "",
            "A Llama of random weights in bfloat16 is planned (`layercut plan --memory 2GB`; three metrics, two of them over all tokens)",
            "and cut, each in a fresh process. Weights are widened to float32 layer by layer: the numbers are those of a run in memory.",
            "",
            f"{time.strftime('%Y-%m-%d')}; {where}, threads of torch: {threads}. Other work ran beside it: times are upper bounds.",
            "",
            *rows,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--folder", type=Path, help="Where to work; a temporary folder that is removed when not given. A model that is there is used."
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(Path(given.child[0]), Path(given.child[1]), int(given.child[2]))
        return 0
    if given.run:
        run(Path(given.run[0]), Path(given.run[1]))
        return 0
    folder = given.folder or Path(tempfile.mkdtemp(prefix="layercut-streamed-"))
    try:
        text = document(measured(small() if given.small else large(), folder))
    finally:
        if given.folder is None:
            shutil.rmtree(folder)
    if not given.small:
        PAGE.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
