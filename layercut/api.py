"""What the commands do, as functions: from a recipe to a plan, a written model, its report and its evaluation."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from layercut.architecture import Member
from layercut.calibration import Calibration
from layercut.errors import LayercutError, OutputError, RecipeError
from layercut.executor import execute, published
from layercut.header import quoted
from layercut.metrics import Metric
from layercut.plan import MAX_PLAN, Measurement, Plan
from layercut.planner import build_plan
from layercut.recipe import Evaluate, Recipe, load_recipe
from layercut.report import Report, write_report
from layercut.sharing import sharing_filesystem
from layercut.smallfile import read_small
from layercut.source import resolve
from layercut.staging import Place, check_vacant

# Tells a plan from a recipe that is written as JSON, in whatever order its keys stand.
PLAN = re.compile(rb'(?<!\\)"format"\s*:\s*"layercut-plan/')


def plan_recipe(
    recipe: Recipe | str | Path, *, out: str | Path | None = None, overrides: Sequence[str] = (), progress: bool = True
) -> Plan:
    """Plan a recipe, or the recipe in a file with `KEY=VALUE` overrides. Measures only when the recipe leaves something to distance.

    `out` takes the place of the recipe's output: files are laid out for the filesystem that it lies on. Raises LayercutError with
    one clear line.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)

    def measured(members: Mapping[str, Member], metrics: Sequence[Metric], calibration: Calibration) -> Measurement:
        from layercut.engine import measure  # the only road into torch

        checkpoints = {alias: member.checkpoint for alias, member in members.items()}
        depths = {alias: member.stack.depth for alias, member in members.items()}
        prefixes = {alias: member.stack.prefix for alias, member in members.items()}
        return measure(checkpoints, metrics, calibration, depths=depths, prefixes=prefixes, progress=progress)

    named = out or (recipe.output and recipe.output.path)
    sharing = partial(sharing_filesystem, output_of(recipe, out)) if named else None
    return build_plan(recipe, resolve=resolve, measure=measured, sharing=sharing)


def run_recipe(
    recipe: Recipe | Plan | str | Path,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> Report:
    """Plan, write, check and evaluate, as the recipe says. A plan (or the file of one) is executed as it stands.

    `out` takes the place of the recipe's output. Raises LayercutError with one clear line; the output folder is complete or
    does not exist. What a stopped run with the same plan wrote is gone on from, or with `restart` thrown away.
    """
    started = time.time()
    if not isinstance(recipe, Recipe | Plan):
        recipe = load(recipe, overrides)
    folder = output_of(recipe, out)
    place = Place(folder, Path(os.path.realpath(folder)))
    if restart or not published(place):
        check_vacant(place, overwrite)  # before the long work, and again before writing
    made = recipe if isinstance(recipe, Plan) else plan_recipe(recipe, out=folder, progress=progress)
    wanted = _wanted(made)
    report = execute(made, folder, overwrite=overwrite, restart=restart, progress=progress, started=started)
    if wanted is not None:
        report = report.with_evaluation(evaluate(wanted, Path(made.sources[made.donor].folder), folder, progress=progress))
        write_report(folder, report)
    return report


def _wanted(plan: Plan) -> Evaluate | None:
    """The evaluation that a plan asks for. Raises LayercutError when its recipe is none: a plan may come from a file that anyone wrote."""
    try:
        return Recipe.model_validate(plan.recipe).evaluate
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(("recipe", *map(str, first["loc"])))
        hint = "make the plan again with: layercut plan RECIPE -o FILE"
        raise LayercutError(f"plan holds a recipe that this version cannot read: {place}: {first['msg']}", hint=hint) from None


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | Plan:
    """Read a recipe or a plan, whichever the file holds."""
    try:
        text = read_small(Path(path), MAX_PLAN, RecipeError)
    except OSError:
        text = b""  # load_recipe says what is wrong
    if text.lstrip().startswith(b"{") and PLAN.search(text):
        if overrides:
            raise LayercutError("--set changes recipes, not plans", where=path, hint="plan the recipe again with the override")
        return Plan.from_json(text, path)
    return load_recipe(path, overrides)


def output_of(recipe: Recipe | Plan, out: str | Path | None) -> Path:
    """The output folder: `out`, or the one that the recipe names."""
    named = recipe.output if isinstance(recipe, Plan) else recipe.output and recipe.output.path
    chosen = out if out is not None else named
    if not chosen:
        raise OutputError("no output folder", hint="set 'output' in the recipe or give --out DIR")
    if "\0" in str(chosen):
        raise OutputError("a name with a NUL is no folder", where=quoted(str(chosen)))
    return Path(os.path.expanduser(chosen))  # noqa: PTH111 - Path.expanduser raises where there is no such user


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
