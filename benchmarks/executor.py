"""Measures the executor: a cut of synthetic checkpoints by layercut and by mergekit, and cp of the bytes of the result, in turn.

    python benchmarks/executor.py [--sizes 0.5,4.5] [--rounds 5] [--mergekit PATH] [--build DIR] [--report FILE]

Wall and processor time are of the whole process, start included. Sources and outputs lie in the folder of --build and are removed.
As root it also measures what a cut takes on filesystems that share blocks, each mounted from a sparse file for the time.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the files beside this one, and layercut as it stands in this checkout

from synthetic import Model, llama, write  # noqa: E402
from volumes import NoVolumeError, used, volume  # noqa: E402

LAYERS = 32
CUT = (20, 26)
MODELS = {
    "0.5": llama(LAYERS, hidden=768, inner=2048, vocab=16000, key_value=768, shards=1),
    "4.5": llama(LAYERS, hidden=2304, inner=6144, vocab=48000, key_value=2304, shards=5),
    "15": llama(LAYERS, hidden=4096, inner=14336, vocab=32000, key_value=1024, shards=4),
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

SHARED = llama(LAYERS, hidden=1536, inner=4096, vocab=32000, key_value=1536, shards=4)
"""2 GB; rows of 1536 numbers make layers that are no whole number of blocks."""

STEPS = {
    "cut 32 -> 26 layers": f"steps: [{{prune: {{at: '{CUT[0]}-{CUT[1] - 1}'}}}}]",
    "double layers 8 to 23": "steps: [{duplicate: {at: '8-23'}}]",
}

# Compiled modules, as pip leaves them: those of this checkout go to the folder of --build, whatever the environment says.
SURROUNDINGS = {"PYTHONDONTWRITEBYTECODE": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Run(NamedTuple):
    """One run of a process."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of user and system time."""
    rss: float
    """Largest resident memory, in MB; of a small program it is that of the Python that starts it."""


class Row(NamedTuple):
    """Medians of a tool on a checkpoint."""

    size: str
    tool: str
    median: Run
    walls: tuple[float, float]
    """The quickest and the slowest run, in seconds."""
    written: int
    """Bytes of the output's weights."""


def measured(command: Sequence[str], log: Path) -> Run:
    """Run a command and wait until it is done. Raises SystemExit with the end of its output when it fails."""
    environment = os.environ | SURROUNDINGS | {"PYTHONPATH": str(HERE.parent), "PYTHONPYCACHEPREFIX": str(log.parent.parent / "compiled")}
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
        "layercut --no-fsync": (sys.executable, "-m", "layercut", "run", recipe, "--no-fsync", "--out", out, "--quiet"),
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
        chance = random.Random(0)
        for number in range(rounds + 1):
            for tool, command in chance.sample([*commands.items()], len(commands)):  # memory that another just freed is quicker to fill
                shutil.rmtree(folder / "out", ignore_errors=True)
                os.sync()
                run = measured(command, folder / "log")
                print(f"{size} GB, round {number}, {tool}: {run.wall:.2f} s, {run.cpu:.2f} s CPU, {run.rss:.0f} MB", file=sys.stderr)
                if number:
                    runs[tool].append(run)
        for tool, found in runs.items():
            walls = [run.wall for run in found]
            median = Run(*(statistics.median(values) for values in zip(*found, strict=True)))
            yield Row(size, tool, median, (min(walls), max(walls)), written)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(rows: Sequence[Row]) -> str:
    """Medians, and the ratios that count: times of layercut over those of the tool, on the same checkpoint."""
    lines = ["| checkpoint | tool | wall s | from - to | CPU s | peak RSS MB | wall of layercut / its | of layercut --no-fsync / its |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
    walls = {(row.size, row.tool): row.median.wall for row in rows}
    for row in rows:
        run = row.median
        ratios = [f"{walls[row.size, tool] / run.wall:.2f}" for tool in ("layercut", "layercut --no-fsync")]
        what = f"{row.size} GB, {row.written / 1e9:.2f} GB written"
        memory = "" if row.tool.startswith("cp") else f"{run.rss:.0f}"
        spread = f"{row.walls[0]:.2f} - {row.walls[1]:.2f}"
        times = " | ".join((f"{run.wall:.2f}", spread, f"{run.cpu:.2f}", memory, *ratios))
        lines.append(f"| {what} | {row.tool} | {times} |")
    return "\n".join(lines)


def share(folder: Path) -> Iterator[str]:
    """A table of what a cut takes where blocks are shared; a sentence where there is no such place."""
    yield "| filesystem | recipe | written GB | room taken MB | shared | wall s | wall of cp without sharing s |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for kind in ("xfs", "btrfs"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            with volume(kind, folder, 8 << 30) as point:
                source = write(point / "source", SHARED)
                for name, steps in STEPS.items():
                    (folder / "recipe.yaml").write_text(f"model: {source}\n{steps}\n", encoding="utf-8")
                    yield f"| {kind} | {name} | {shared_row(folder, point)} |"
        except NoVolumeError as error:
            yield f"| {kind} | not measured: {error} | | | | | |"
        finally:
            shutil.rmtree(folder)


def shared_row(folder: Path, point: Path) -> str:
    """One cut on a mounted filesystem, and a copy of its bytes."""
    out, plain = point / "out", point / "plain"
    before = used(point)
    run = measured((sys.executable, "-m", "layercut", "run", str(folder / "recipe.yaml"), "--out", str(out), "--quiet"), folder / "log")
    taken = used(point) - before
    copy = measured(("sh", "-c", 'cp -r --reflink=never "$1" "$2" && sync "$2"/*', "sh", str(out), str(plain)), folder / "log")
    written = sum(path.stat().st_size for path in out.iterdir())
    for made in (out, plain):
        shutil.rmtree(made)
    return f"{written / 1e9:.2f} | {taken / 1e6:.1f} | {1 - taken / written:.1%} | {run.wall:.2f} | {copy.wall:.2f}"


def machine(folder: Path) -> str:
    """One line on what ran it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    kind = subprocess.run(["stat", "--file-system", "--format=%T", str(folder)], capture_output=True, text=True, check=False).stdout.strip()
    python = platform.python_version()
    return f"{os.cpu_count()} CPUs, {memory:.0f} GB of memory, {kind or 'unknown filesystem'}, Linux {platform.release()}, Python {python}"


def document(rows: Sequence[Row], shared: str, where: str, rounds: int) -> str:
    kept = f"{LAYERS} -> {LAYERS - (CUT[1] - CUT[0])} layers"
    return f"""\
# The executor against cp and mergekit

A cut of {kept} of synthetic Llama checkpoints in bfloat16. Medians of {rounds} runs of whole processes, start included, in turn, with
warm caches, in another order each time; before each the last output was removed and everything written. `cp` copies the weights of
layercut's result. layercut has its output on the disk before it gives it its name, as `cp, then sync` has; plain `cp`, mergekit and
`layercut --no-fsync` leave it in memory. How long these take hangs on how fast the machine finds free memory: where there is plenty, they
beat every disk, and where there is not, they take several times as long. Direct writes need none.

{date.today().isoformat()}; {where}. The last columns are what to compare: below 1, layercut takes less.

{table(rows)}

## Where blocks are shared

The same on filesystems whose files can share blocks, with a checkpoint of {SHARED.nbytes / 1e9:.2f} GB: room is the difference of the free
space before and after, everything written.

{shared}
"""


def find_mergekit(given: str | None, build: Path) -> Path:
    """mergekit-yaml as it was given, or of the environment of the parity benchmark, which is made when it is not there."""
    if given is not None:
        return Path(given).absolute()
    from mergekit_parity import make_environment

    build.mkdir(parents=True, exist_ok=True)
    return make_environment(build).parent / "mergekit-yaml"


def main() -> int:
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
    shared = "\n".join(share(build / "volumes"))
    print(f"{table(rows)}\n\n{shared}")
    if given.report is not None:
        Path(given.report).write_text(document(rows, shared, machine(build), given.rounds), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
