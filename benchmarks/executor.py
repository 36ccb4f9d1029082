"""Measures the executor: a cut of synthetic checkpoints by layercut and by mergekit, and cp of the bytes of the result, in turn.

    python benchmarks/executor.py [--sizes 0.5,4.5] [--rounds 5] [--mergekit PATH] [--build DIR] [--report FILE]

Wall and processor time are of the whole process, start included. Sources and outputs lie in the folder of --build and are removed.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the files beside this one, and layercut as it stands in this checkout

from synthetic import Model, llama, write  # noqa: E402

LAYERS = 32
CUT = (20, 26)
MODELS = {
    "0.5": llama(LAYERS, hidden=768, inner=2048, vocab=16000, key_value=768, shards=1),
    "4.5": llama(LAYERS, hidden=2304, inner=6144, vocab=48000, key_value=2304, shards=2),
    "15": llama(LAYERS, hidden=4096, inner=14336, vocab=32000, key_value=1024, shards=3),
}
"""By the size in GB."""

RECIPE = f"""\
slices:
- sources: [{{model: SOURCE, layer_range: [0, {CUT[0]}]}}]
- sources: [{{model: SOURCE, layer_range: [{CUT[1]}, {LAYERS}]}}]
merge_method: passthrough
dtype: bfloat16
"""
"""A mergekit file: both read it."""

SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Run(NamedTuple):
    """One run of a process."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of user and system time."""
    rss: float
    """Largest resident memory, in MB."""


class Row(NamedTuple):
    """Medians of a tool on a checkpoint."""

    size: str
    tool: str
    median: Run
    written: int
    """Bytes of the output's weights."""


def measured(command: Sequence[str], log: Path) -> Run:
    """Run a command and wait until it is done. Raises SystemExit with the end of its output when it fails."""
    environment = os.environ | SURROUNDINGS | {"PYTHONPATH": str(HERE.parent)}
    with log.open("wb") as out:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-2000:]}")
    return Run(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6)


def tools(folder: Path, mergekit: Path) -> dict[str, tuple[str, ...]]:
    """Command by name; each writes the folder `out`, but cp, which copies what layercut wrote."""
    recipe, out, cut = str(folder / "recipe.yaml"), str(folder / "out"), str(folder / "cut")
    copy = 'mkdir "$2" && cp "$1"/*.safetensors "$2"'
    return {
        "cp": ("sh", "-c", copy, "sh", cut, out),
        "cp, then sync": ("sh", "-c", f'{copy} && sync "$2"/*', "sh", cut, out),
        "layercut": (sys.executable, "-m", "layercut", "run", recipe, "--out", out, "--quiet"),
        "mergekit": (str(mergekit), recipe, out, "--quiet"),
    }


def compare(size: str, model: Model, folder: Path, mergekit: Path, rounds: int) -> Iterator[Row]:
    """Run the tools in turn, `rounds` times each after one that does not count."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        source = write(folder / "source", model)
        (folder / "recipe.yaml").write_text(RECIPE.replace("SOURCE", str(source)), encoding="utf-8")
        commands = tools(folder, mergekit)
        measured([*commands["layercut"][:-3], "--out", str(folder / "cut"), "--quiet"], folder / "log")
        written = sum(path.stat().st_size for path in (folder / "cut").glob("*.safetensors"))
        runs: dict[str, list[Run]] = {tool: [] for tool in commands}
        for number in range(rounds + 1):
            for tool, command in commands.items():
                shutil.rmtree(folder / "out", ignore_errors=True)
                os.sync()
                run = measured(command, folder / "log")
                print(f"{size} GB, round {number}, {tool}: {run.wall:.2f} s, {run.cpu:.2f} s CPU, {run.rss:.0f} MB", file=sys.stderr)
                if number:
                    runs[tool].append(run)
        for tool, found in runs.items():
            yield Row(size, tool, Run(*(statistics.median(values) for values in zip(*found, strict=True))), written)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(rows: Sequence[Row]) -> str:
    """Medians, and the ratios that count: times of layercut over those of the tool, on the same checkpoint."""
    lines = ["| checkpoint | tool | wall s | CPU s | peak RSS MB | wall of layercut / its | CPU of layercut / its |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    ours = {row.size: row.median for row in rows if row.tool == "layercut"}
    for row in rows:
        run, base = row.median, ours[row.size]
        what = f"{row.size} GB, {row.written / 1e9:.2f} GB written"
        times = f"{run.wall:.2f} | {run.cpu:.2f} | {run.rss:.0f} | {base.wall / run.wall:.2f} | {base.cpu / run.cpu:.2f}"
        lines.append(f"| {what} | {row.tool} | {times} |")
    return "\n".join(lines)


def machine(folder: Path) -> str:
    """One line on what ran it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    kind = subprocess.run(["stat", "--file-system", "--format=%T", str(folder)], capture_output=True, text=True, check=False).stdout.strip()
    python = platform.python_version()
    return f"{os.cpu_count()} CPUs, {memory:.0f} GB of memory, {kind or 'unknown filesystem'}, Linux {platform.release()}, Python {python}"


def document(rows: Sequence[Row], where: str, rounds: int) -> str:
    kept = f"{LAYERS} -> {LAYERS - (CUT[1] - CUT[0])} layers"
    return f"""\
# The executor against cp and mergekit

A cut of {kept} of synthetic Llama checkpoints in bfloat16. Medians of {rounds} runs of whole processes, start included, in turn, with
warm caches; before each the last output was removed and everything written. `cp` copies the weights of layercut's result; layercut has
its own output on the disk before it gives it its name, as `cp, then sync` has, and plain `cp` and mergekit have not.

{date.today().isoformat()}; {where}. The last two columns are what to compare: below 1, layercut takes less.

{table(rows)}
"""


def find_mergekit(given: str | None, build: Path) -> Path:
    """mergekit-yaml as it was given, or of the environment of the parity benchmark, which is made when it is not there."""
    if given is not None:
        return Path(given).absolute()
    from mergekit_parity import make_environment

    build.mkdir(parents=True, exist_ok=True)
    return make_environment(build).parent / "mergekit-yaml"


def main(arguments: Mapping[str, str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default="0.5,4.5", help=f"of {', '.join(MODELS)}: GB of the source; needs three times that on the disk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mergekit", metavar="PATH", help="the program mergekit-yaml; without it an environment is made")
    parser.add_argument("--build", metavar="DIR", default=str(HERE.parent / "build"), help="for environment, sources and outputs")
    parser.add_argument("--report", metavar="FILE", help="write the page, too")
    given = parser.parse_args()
    build = Path(given.build).resolve()
    mergekit = find_mergekit(given.mergekit, build / "parity")
    build.mkdir(parents=True, exist_ok=True)
    rows = [row for size in given.sizes.split(",") for row in compare(size, MODELS[size], build / "executor", mergekit, given.rounds)]
    print(table(rows))
    if given.report is not None:
        Path(given.report).write_text(document(rows, machine(build), given.rounds), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
