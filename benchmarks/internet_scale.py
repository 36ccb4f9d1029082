"""Measures planning, and where blocks can be shared executing, on sparse checkpoints with the headers of the largest open models.

    python benchmarks/internet_scale.py [--build DIR] [--report FILE]

The plan of a cut of a quarter of the layers is made on any filesystem that has sparse files. As root, with mkfs.xfs and loop
devices, the cut is also executed and verified on an XFS in a sparse file. Everything is removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the files beside this one, and layercut as it stands in this checkout

from executor import Run, machine, measured  # noqa: E402
from synthetic import Model, deepseek_v3, llama_405b, write  # noqa: E402
from volumes import NoVolumeError, used, volume  # noqa: E402

ROUNDS = 3
TARGET = {"cpu": 5.0, "rss": 400.0}
"""Of a plan: seconds of CPU, and MB."""


class Case(NamedTuple):
    """A model, and the layers that are cut out of it."""

    name: str
    model: Model
    cut: str


CASES = (
    Case("Llama-3.1-405B", llama_405b(), "60-91"),
    Case("DeepSeek-V3", deepseek_v3(), "40-54"),
)


def layercut(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", "layercut", *map(str, arguments))


def recipe_for(case: Case, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"model: {folder / 'source'}\nsteps: [{{prune: {{at: '{case.cut}'}}}}]\noutput: {folder / 'out'}\n", encoding="utf-8")
    return path


def plan_row(case: Case, folder: Path) -> tuple[str, Run]:
    """Medians of planning."""
    write(folder / "source", case.model, sparse=True)
    recipe = recipe_for(case, folder)
    runs = [measured(layercut("plan", recipe, "--quiet"), folder / "log") for _ in range(ROUNDS)]
    median = Run(*(statistics.median(values) for values in zip(*runs, strict=True)))
    what = f"{len(case.model.shapes):,} tensors, {case.model.nbytes / 1e9:.0f} GB, {case.model.shards} files"
    return f"| {case.name} | {what} | {case.cut} | {median.wall:.1f} | {median.cpu:.1f} | {median.rss:.0f} |", median


def executed_row(case: Case, folder: Path) -> str:
    """Execute the cut on an XFS, and verify it without loading."""
    size = 2 * case.model.nbytes + (64 << 30)
    with volume("xfs", folder, size) as point:
        write(point / "source", case.model, sparse=True)
        recipe = recipe_for(case, point)
        before = used(point)
        run = measured(layercut("run", recipe, "--quiet"), folder / "log")
        taken = used(point) - before
        measured(layercut("verify", point / "out", "--no-load", "--no-contents"), folder / "log")
        written = sum(path.stat().st_size for path in (point / "out").glob("*.safetensors"))
        report = json.loads((point / "out" / "layercut.json").read_text(encoding="utf-8"))
        files = sum(name.endswith(".safetensors") for name in report["files"])
    times = f"{run.wall:.0f} | {run.cpu:.1f} | {run.rss:.0f}"
    return f"| {case.name} | {written / 1e9:.0f} | {files} | {taken / 1e6:.0f} | {1 - taken / written:.2%} | {times} | passed |"


def execution(folder: Path) -> Iterator[str]:
    """The table of executed cuts, or why there is none."""
    yield "| model | written GB | files | room taken MB | not copied | wall s | CPU s | peak RSS MB | verify of the structure |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---|"
    for case in CASES:
        try:
            yield executed_row(case, fresh(folder))
        except NoVolumeError as error:
            yield f"| {case.name} | not executed: {error} | | | | | | | |"
        finally:
            shutil.rmtree(folder)


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def document(plans: Sequence[str], executed: Sequence[str], where: str) -> str:
    return f"""\
# The largest open models

Sparse checkpoints whose headers are those of the real ones (names, dtypes, shapes, number of files); a quarter of the layers is cut.

{date.today().isoformat()}; {where}.

## layercut plan

Medians of {ROUNDS} runs of the whole process. Targets: {TARGET["cpu"]:.0f} s of CPU, {TARGET["rss"]:.0f} MB.

{chr(10).join(plans)}

## layercut run, where blocks are shared

On an XFS in a sparse file. What is not in step with its source, here the small tensors between the large ones, is copied.

{chr(10).join(executed)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--build", metavar="DIR", default=str(HERE.parent / "build"), help="for sparse sources and volumes")
    parser.add_argument("--report", metavar="FILE", help="write the page, too")
    given = parser.parse_args()
    build = Path(given.build).resolve()
    folder = build / "internet-scale"
    plans = ["| model | what it holds | layers cut | wall s | CPU s | peak RSS MB |", "|---|---|---|---:|---:|---:|"]
    missed = []
    for case in CASES:
        try:
            row, run = plan_row(case, fresh(folder))
        finally:
            shutil.rmtree(folder)
        plans.append(row)
        missed += [case.name] if run.cpu > TARGET["cpu"] or run.rss > TARGET["rss"] else []
    print("\n".join(plans))
    executed = list(execution(folder))
    print("\n" + "\n".join(executed))
    if given.report is not None:
        Path(given.report).write_text(document(plans, executed, machine(build)), encoding="utf-8")
    if missed:
        print(f"over the target: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
