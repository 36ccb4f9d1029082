"""Runs layercut and mergekit on the same recipes and compares every tensor bit for bit. Makes an environment of its own.

    python benchmarks/mergekit_parity.py [--only WORD] [--report FILE] [--build DIR]

Exit status 0 when every difference is explained by a rule of parity_rules.py, 1 when one is not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the files beside this one, and layercut as it stands in this checkout

from parity_cases import CASES, COMMON, LAYERS, MODELS, Case  # noqa: E402
from parity_rules import Difference, Outcome, Pair, Source, differences, explain, read_tensors, rules_text  # noqa: E402

PINS = HERE / "parity-constraints.txt"
PACKAGES = ("mergekit", "torch", "transformers", "tqdm", "click", "pydantic", "pyyaml")
VERSIONS = ("mergekit", "torch", "transformers", "safetensors")
# One thread, no network, and as far as a seed can do it one order of sets: mergekit picks the giver of the config out of one.
SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false"}


class Run(NamedTuple):
    """One run of a tool."""

    failure: str | None
    seconds: float
    """Processor time of the process, start to end."""


class Row(NamedTuple):
    """What came of a case."""

    case: Case
    mergekit: Run
    layercut: Run
    tensors: int
    equal: int
    rules: Mapping[str, int]
    unexplained: Sequence[Difference]
    loads: Sequence[str]

    @property
    def verdict(self) -> str:
        if self.unexplained:
            first = self.unexplained[0]
            more = f" and {len(self.unexplained) - 1} more" if len(self.unexplained) > 1 else ""
            return f"NOT EXPLAINED: {first.what} ({first.how}){more}"
        if self.mergekit.failure and self.layercut.failure:
            return "both refuse"
        return f"explained: {', '.join(self.rules)}" if self.rules else "equal"


def make_environment(build: Path) -> Path:
    """An environment with mergekit and all that layercut imports, pinned; made once. Gives its Python."""
    python, marker = build / "venv" / "bin" / "python", build / "installed"
    if not marker.exists() or marker.read_text() != PINS.read_text():
        print(f"making {build / 'venv'} (some minutes)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(build / "venv")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--constraint", str(PINS), *PACKAGES], check=True)
        marker.write_text(PINS.read_text())
    return python


def make_models(folder: Path) -> None:
    """The models of parity_cases, saved by transformers."""
    import torch
    import transformers

    for name, model in MODELS.items():
        if (folder / name / "config.json").exists():
            continue
        torch.manual_seed(model.seed)
        config = getattr(transformers, model.config)(**{**COMMON, **model.more})
        made = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # fresh norms are all ones, and fresh biases all zeros: a mix-up would not show
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        made.to(getattr(torch, model.dtype)).save_pretrained(folder / name, max_shard_size=model.shard)


def run(command: Sequence[str], folder: Path, log: Path) -> Run:
    """Run a tool; what it prints goes to `log`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | SURROUNDINGS | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    log.write_text(done.stdout + done.stderr)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(None if done.returncode == 0 else _last_error(done.stdout + done.stderr), seconds)


def _last_error(text: str) -> str:
    """The line of an error, with its continuation when it ends in a colon."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    starts = [at for at, line in enumerate(lines) if re.match(r"(\w+\.)*\w*(Error|Exception)\b|error:", line)]
    return " ".join(lines[starts[-1] :]) if starts else (lines[-1] if lines else "no message")


def sources_of(case: Case, models: Path) -> dict[str, Source]:
    """The models that a recipe names, in the order of their first mention."""
    places = {name: found.start() for name in MODELS if (found := re.search(rf"\b{name}\b(?!-)", case.text))}
    return {
        name: Source(read_tensors(models / name), json.loads((models / name / "config.json").read_text()))
        for name in sorted(places, key=lambda name: places[name])
    }


def outcome(folder: Path, failure: str | None) -> Outcome:
    """What stands in an output folder."""
    config = folder / "config.json"
    data = json.loads(config.read_text()) if config.exists() else {}
    return Outcome(failure, read_tensors(folder), data, None if failure else fault_of(folder))


def fault_of(folder: Path) -> str | None:
    """Why transformers does not load a folder whole, or None when it does and gives finite logits."""
    import torch
    import transformers

    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    except Exception as error:
        return f"does not load: {str(error).splitlines()[0]}"
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            return f"{len(info[what])} {what.replace('_', ' ')}, {min(map(str, info[what]))} first"
    with torch.no_grad():
        logits = model(torch.arange(3, 11).unsqueeze(0)).logits
    return None if bool(logits.isfinite().all()) else "logits are not finite"


def judge(case: Case, build: Path) -> Row:
    """Run both tools on a case and compare."""
    work, models = build / "out" / f"{CASES.index(case):02}", build / "models"
    work.mkdir(parents=True)
    (work / "recipe.yaml").write_text(case.text)
    recipe, bin = str(work / "recipe.yaml"), Path(sys.executable).parent
    theirs = run([str(bin / "mergekit-yaml"), recipe, str(work / "mergekit"), "--no-write-model-card"], models, work / "mergekit.log")
    layercut = [sys.executable, "-m", "layercut", "run", recipe, "--out", str(work / "layercut"), "--quiet"]
    ours = run(layercut, models, work / "layercut.log")
    pair = Pair(case, outcome(work / "mergekit", theirs.failure), outcome(work / "layercut", ours.failure), sources_of(case, models))
    found = differences(pair)
    rules, unexplained = explain(pair, found)
    names = {*pair.mergekit.tensors, *pair.layercut.tensors}
    bad = {difference.what for difference in found}
    loads = [name for name, o in (("mergekit", pair.mergekit), ("layercut", pair.layercut)) if o.failure is None and o.fault is None]
    return Row(case, theirs, ours, len(names), len(names - bad), rules, unexplained, loads)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| recipe | family | mergekit | tensors equal | result | output loads | s | ratio |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        failure = row.mergekit.failure
        short = "ok" if failure is None else "fails: " + (failure if len(failure) <= 110 else failure[:107] + "...")
        loads = "both" if len(row.loads) == 2 else ", ".join(row.loads) or "-"
        seconds = f"{row.mergekit.seconds:.1f} / {row.layercut.seconds:.1f}"
        cells = (row.case.name, row.case.family, short, f"{row.equal} of {row.tensors}", row.verdict, loads, seconds)
        text = " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells)
        lines.append(f"| {text} | {row.mergekit.seconds / row.layercut.seconds:.1f} |")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """The rows in a few lines."""
    equal = sum(row.verdict == "equal" for row in rows)
    both = sum(row.verdict == "both refuse" for row in rows)
    rest = sum(bool(row.unexplained) for row in rows)
    failed = sum(row.mergekit.failure is not None and row.layercut.failure is None for row in rows)
    ours = sum("layercut" in row.loads for row in rows)
    theirs = sum("mergekit" in row.loads for row in rows)
    ratios = sorted(row.mergekit.seconds / row.layercut.seconds for row in rows)
    return "\n".join([
        f"{len(rows)} recipes: {equal} equal to the bit, {len(rows) - equal - both - rest} with differences that the rules explain, "
        f"{both} refused by both, {rest} with differences that nothing explains.",
        f"mergekit fails on {failed} that layercut writes. Outputs that load whole and give finite logits: {ours} of layercut, {theirs} of "
        "mergekit.",
        f"Processor time, mergekit / layercut: {ratios[0]:.1f} to {ratios[-1]:.1f}, median {ratios[len(ratios) // 2]:.1f}. On models this "
        "small it is the time to start.",
    ])  # fmt: skip


def document(rows: Sequence[Row]) -> str:
    """The page that is kept beside this script."""
    from layercut.version import __version__

    versions = ", ".join(f"{name} {metadata.version(name).partition('+')[0]}" for name in VERSIONS)
    python = ".".join(map(str, sys.version_info[:2]))
    parts = [
        "<!-- Written by benchmarks/mergekit_parity.py. -->\n\n# layercut and mergekit on the same recipes",
        f"{date.today().isoformat()}: layercut {__version__}, {versions}, Python {python}. Models of {LAYERS} random layers; the recipes "
        "and the models are in [parity_cases.py](parity_cases.py), the rules in [parity_rules.py](parity_rules.py).",
        summary(rows),
        "## Rules\n\nWhat may differ, and why. Each is checked on the values, tensor by tensor.\n\n" + "\n".join(rules_text()),
        "## Recipes\n\n`s` is processor time of the whole process, mergekit / layercut. Of a run that failed, the tensors that were "
        "written are compared.\n\n" + table(rows),
    ]
    return "\n\n".join(parts) + "\n"


def compare(arguments: Any, build: Path) -> int:
    """Judge the cases, and print what came of them."""
    import shutil

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    make_models(build / "models")
    shutil.rmtree(build / "out", ignore_errors=True)
    rows: list[Row] = []
    for case in CASES:
        if arguments.only is None or arguments.only in f"{case.family} {case.name}":
            started = time.monotonic()
            rows.append(judge(case, build))
            line = f"{case.family:12} {case.name:45} {rows[-1].verdict} ({time.monotonic() - started:.0f} s)"
            print(line, file=sys.stderr, flush=True)
    if not rows:
        print(f"no recipe is named {arguments.only!r}", file=sys.stderr)
        return 2
    print(f"{table(rows)}\n\n{summary(rows)}")
    if arguments.report is not None:
        Path(arguments.report).write_text(document(rows), encoding="utf-8")
    return 1 if any(row.unexplained for row in rows) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="WORD", help="recipes whose family and name hold this")
    parser.add_argument("--report", metavar="FILE", help="write the page, too")
    parser.add_argument("--build", metavar="DIR", default=str(HERE.parent / "build" / "parity"), help="environment, models and outputs")
    arguments = parser.parse_args()
    build = Path(arguments.build).resolve()
    build.mkdir(parents=True, exist_ok=True)
    python = make_environment(build)
    if Path(sys.prefix).resolve() == (build / "venv").resolve():
        return compare(arguments, build)
    return subprocess.run([str(python), *sys.argv], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
