"""What the commands do, as functions: from a recipe to a plan, a written model, its report and its evaluation."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layercut.architecture import Member
from layercut.calibration import Calibration
from layercut.errors import LayercutError, OutputError
from layercut.executor import execute
from layercut.metrics import Metric
from layercut.plan import FORMAT, Measurement, Plan
from layercut.planner import build_plan
from layercut.recipe import Evaluate, Recipe, load_recipe
from layercut.report import Report, write_report
from layercut.source import resolve
from layercut.staging import Place, check_vacant


def plan_recipe(recipe: Recipe | str | Path, *, overrides: Sequence[str] = (), progress: bool = True) -> Plan:
    """Plan a recipe, or the recipe in a file with `KEY=VALUE` overrides. Measures only when the recipe leaves something to distance.

    Raises LayercutError with one clear line.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)

    def measured(members: Mapping[str, Member], metrics: Sequence[Metric], calibration: Calibration) -> Measurement:
        from layercut.engine import measure  # the only road into torch

        checkpoints = {alias: member.checkpoint for alias, member in members.items()}
        depths = {alias: member.stack.depth for alias, member in members.items()}
        prefixes = {alias: member.stack.prefix for alias, member in members.items()}
        return measure(checkpoints, metrics, calibration, depths=depths, prefixes=prefixes, progress=progress)

    return build_plan(recipe, resolve=resolve, measure=measured)


def run_recipe(
    recipe: Recipe | Plan | str | Path,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> Report:
    """Plan, write, check and evaluate, as the recipe says. A plan (or the file of one) is executed as it stands.

    `out` takes the place of the recipe's output. Raises LayercutError with one clear line; the output folder is complete or
    does not exist.
    """
    started = time.time()
    if not isinstance(recipe, Recipe | Plan):
        recipe = load(recipe, overrides)
    folder = output_of(recipe, out)
    check_vacant(Place(folder, Path(os.path.realpath(folder))), overwrite)  # before the long work, and again before writing
    made = recipe if isinstance(recipe, Plan) else plan_recipe(recipe, progress=progress)
    report = execute(made, folder, overwrite=overwrite, progress=progress, started=started)
    wanted = Recipe.model_validate(made.recipe).evaluate
    if wanted is not None:
        report = report.with_evaluation(evaluate(wanted, Path(made.sources[made.donor].folder), folder, progress=progress))
        write_report(folder, report)
    return report


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | Plan:
    """Read a recipe or a plan, whichever the file holds."""
    try:
        text = Path(path).read_bytes()
    except OSError:
        text = b""  # load_recipe says what is wrong
    if text.lstrip().startswith(b"{") and _is_plan(text):
        if overrides:
            raise LayercutError("--set changes recipes, not plans", where=path, hint="plan the recipe again with the override")
        return Plan.from_json(text, path)
    return load_recipe(path, overrides)


def _is_plan(text: bytes) -> bool:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return b'"layercut-plan/' in text[:200]
    return isinstance(data, dict) and str(data.get("format", "")).startswith(FORMAT.partition("/")[0] + "/")


def output_of(recipe: Recipe | Plan, out: str | Path | None) -> Path:
    """The output folder: `out`, or the one that the recipe names."""
    named = recipe.output if isinstance(recipe, Plan) else recipe.output and recipe.output.path
    chosen = out if out is not None else named
    if not chosen:
        raise OutputError("no output folder", hint="set 'output' in the recipe or give --out DIR")
    return Path(chosen).expanduser()


def evaluate(wanted: Evaluate, source: Path, result: Path, *, progress: bool = True) -> dict[str, Any]:
    """Measure the source and the result in the same way, one after the other."""
    from layercut.perplexity import LanguageModel

    found: dict[str, Any] = {}
    for name, folder in (("before", source), ("after", result)):
        model = LanguageModel(folder)
        if wanted.perplexity is not None:
            value = model.perplexity(wanted.perplexity, progress=progress)
            found.setdefault("perplexity", {})[name] = value.model_dump(mode="json")
        if wanted.generate is not None:
            text = model.generate(wanted.generate, wanted.tokens)
            found.setdefault("generate", {"prompt": wanted.generate})[name] = text
    return found
