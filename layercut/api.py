"""What the commands do, as functions: from a recipe to a plan, a written model, its report and its evaluation."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import ValidationError

from layercut import fetching
from layercut.analysis import Analysis, Folder, make_analysis
from layercut.architecture import Member, find_stack
from layercut.caches import measurement_cache
from layercut.calibration import BuiltinCalibration, Calibration, changed
from layercut.errors import CalibrationError, LayercutError, OutputError, RecipeError, UploadError, printable
from layercut.executor import execute, published
from layercut.header import quoted
from layercut.metrics import Angular, Cosine, Euclidean, Metric, RelativeMagnitude, parse_metric
from layercut.plan import MAX_PLAN, Measurement, Plan
from layercut.planner import build_plan
from layercut.push import Outcome, Push, check_licence
from layercut.ranks import ALONE, Ranks
from layercut.recipe import Evaluate, Recipe, load_recipe
from layercut.report import REPORT, Report, make_sources, read_report, write_report
from layercut.settling import Question
from layercut.sharing import sharing_filesystem
from layercut.smallfile import read_small
from layercut.source import resolve
from layercut.staging import Place, check_vacant
from layercut.start import Resolve, givers, open_members
from layercut.trials import Losses
from layercut.upload import Upload

if TYPE_CHECKING:
    from layercut.engine import Running

Read = TypeVar("Read", Recipe, Plan, Recipe | Plan)
# Tells a plan from a recipe that is written as JSON, in whatever order its keys stand.
PLAN = re.compile(rb'(?<!\\)"format"\s*:\s*"layercut-plan/')

RECIPES = (".yaml", ".yml", ".json")
"""Suffixes of the files that hold recipes; everything else names a model."""
SURVEY = (
    Angular.model_construct(),
    Angular.model_construct(token="all"),
    Cosine.model_construct(),
    RelativeMagnitude.model_construct(),
    Euclidean.model_construct(),
)
"""What is measured of a model when nothing else is asked for: one pass gives all of them."""


def plan_recipe(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    memory: int | None = None,
    ranks: Ranks = ALONE,
    progress: bool = True,
) -> Plan:
    """Plan a recipe, or one in a file or a dict, with `KEY=VALUE` overrides. Measures only when the recipe leaves something open.

    `out` takes the place of the recipe's output: files are laid out for the filesystem that it lies on. `memory` is what the process
    may take while it measures, in bytes; None for what is free. Models that do not fit are streamed layer by layer, which gives the
    same numbers. `ranks` are the processes that share the samples, each of which makes the same plan. Raises LayercutError with one
    clear line.
    """
    recipe = load_recipe(recipe, overrides) if not isinstance(recipe, Recipe) else _as_it_is(recipe, overrides)
    named = out or (recipe.output and recipe.output.path)
    sharing = partial(sharing_filesystem, output_of(recipe, out)) if named else None
    measured = partial(_measured, progress=progress, memory=memory, ranks=ranks)
    run = partial(_run, progress=progress, memory=memory, ranks=ranks)
    try:
        return build_plan(recipe, resolve=partial(resolve, progress=progress), measure=measured, sharing=sharing, run=run)
    except CalibrationError as error:
        if "--memory" in (error.hint or ""):  # nothing that the recipe says
            raise
        where = ": ".join([recipe.where("calibration"), *([error.where] if error.where else [])])
        raise CalibrationError(error.message, where=where, hint=error.hint) from None


def _measured(
    members: Mapping[str, Member],
    metrics: Sequence[Metric],
    calibration: Calibration,
    *,
    progress: bool,
    memory: int | None,
    ranks: Ranks,
    question: Question | None = None,
) -> Measurement:
    from layercut.engine import measure  # a road into torch

    return measure(_running(members, progress, memory, ranks), metrics, calibration, question)


def _run(members: Mapping[str, Member], calibration: Calibration, *, progress: bool, memory: int | None, ranks: Ranks) -> Losses:
    from layercut.losses import Meter  # the other road into torch

    return Meter(_running(members, progress, memory, ranks), calibration)


def _running(members: Mapping[str, Member], progress: bool, memory: int | None, ranks: Ranks) -> Running:
    """The models, fetched as a whole where they are on the Hub."""
    from layercut.engine import Running

    return Running(
        {alias: fetching.fetch_whole(member.checkpoint, progress=progress) for alias, member in members.items()},
        {alias: member.stack.depth for alias, member in members.items()},
        {alias: member.stack.prefix for alias, member in members.items()},
        progress=progress and ranks.main,
        memory=memory,
        ranks=ranks,
        cache=measurement_cache(),
    )


def analyze(
    target: Recipe | Mapping[str, Any] | str | Path,
    *,
    metrics: Sequence[Metric | str] = (),
    text: Mapping[str, Any] = MappingProxyType({}),
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    overwrite: bool = False,
    memory: int | None = None,
    ranks: Ranks = ALONE,
    progress: bool = True,
) -> Analysis:
    """Measure the distances of a model, or of the models that layers are taken from in a recipe, in one pass.

    `metrics`, or names such as `angular:all`, are measured instead of the recipe's; of a model all that need no fit are by default.
    `text` holds keys of `calibration` that replace the recipe's: `samples`, `max_length`, `path`, `column`. `overrides` are `KEY=VALUE`
    for a recipe in a file or a dict. With `out` the tables, pictures and the page are written to that folder. `memory` and `ranks` are as
    in `plan_recipe`; the main rank writes. Raises LayercutError with one clear line.
    """
    subject = _subject(target, overrides, partial(resolve, progress=progress))
    asked = [parse_metric(metric) if isinstance(metric, str) else metric for metric in metrics]
    wanted = tuple({metric.label: metric for metric in asked or subject.metrics}.values())
    calibration = changed(subject.calibration, text)
    folder = None if out is None or not ranks.main else Folder(_folder_of(out), overwrite)
    if folder is not None:
        folder.check(subject.members)
    analysis = make_analysis(
        subject.members, _measured(subject.members, wanted, calibration, progress=progress, memory=memory, ranks=ranks)
    )
    if folder is not None:
        folder.write(analysis, subject.members)
    return analysis


class _Subject(NamedTuple):
    """What is analysed."""

    members: Mapping[str, Member]
    metrics: Sequence[Metric]
    calibration: Calibration


def _subject(target: Recipe | Mapping[str, Any] | str | Path, overrides: Sequence[str], resolve: Resolve) -> _Subject:
    """A recipe, its file, or a model."""
    target = load_recipe(target, overrides) if isinstance(target, Mapping) else target
    path = Path(os.path.expanduser(target)) if isinstance(target, str | Path) else None  # noqa: PTH111
    if path is not None and path.suffix.lower() in RECIPES:
        found = load(path, overrides)
        if isinstance(found, Plan):
            raise LayercutError("a plan, not a recipe or a model", where=target, hint="name the recipe that it was made from")
        target = found
    if isinstance(target, Recipe):
        return _Subject(givers(target, open_members(target, resolve)), target.all_metrics, target.calibration)
    if overrides:
        raise LayercutError("--set changes recipes, and this is a model", where=target)
    checkpoint = resolve(str(target))
    name = printable(checkpoint.reference)  # of a folder whose name is no text, too
    return _Subject({name: Member(checkpoint, find_stack(checkpoint))}, SURVEY, BuiltinCalibration())


def run_recipe(
    recipe: Recipe | Plan | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    durable: bool = True,
    overrides: Sequence[str] = (),
    memory: int | None = None,
    ranks: Ranks = ALONE,
    progress: bool = True,
) -> Report:
    """Plan, write, check, evaluate and publish, as the recipe says. A plan (or its file) is executed as it stands; a recipe may be a dict.

    `out` takes the place of the recipe's output. Raises LayercutError with one clear line; the output folder is complete or
    does not exist. What a stopped run with the same plan wrote is gone on from, or with `restart` thrown away. `durable` is
    as in `executor.execute`. Whether the result may be published is found out first, and of a finished output only the upload is gone on
    with. `memory` and `ranks` are as in `plan_recipe`; the main rank writes, and every rank is given the report.
    """
    started = time.time()
    recipe = load(recipe, overrides) if not isinstance(recipe, Recipe | Plan) else _as_it_is(recipe, overrides)
    if not ranks.main:
        return _followed(recipe, output_of(recipe, out), memory, ranks)
    folder = output_of(recipe, out)
    upload = _asked(recipe).upload
    push = None if upload is None else Push(upload, progress=progress)
    if push is not None:
        push.check_rights()  # before the long work
    # Other ranks would wait for this one to measure.
    report = None if push is None or restart or ranks.seat.world > 1 else _unpublished(recipe, folder, overwrite)
    if report is None:
        writing = {"overwrite": overwrite, "restart": restart, "durable": durable}
        report = _written(recipe, folder, push, writing, memory=memory, ranks=ranks, progress=progress, started=started)
    if push is not None:
        report = _publish(push, folder, progress)[1]
    return report


def _written(
    recipe: Recipe | Plan,
    folder: Path,
    push: Push | None,
    writing: Mapping[str, bool],
    *,
    memory: int | None,
    ranks: Ranks,
    progress: bool,
    started: float,
) -> Report:
    """Plan, write and evaluate. What would keep the result from being published is found out before it is written."""
    place = Place(folder, Path(os.path.realpath(folder)))
    if writing["restart"] or not published(place):
        check_vacant(place, writing["overwrite"])  # before the long work, and again before writing
    made = recipe if isinstance(recipe, Plan) else plan_recipe(recipe, out=folder, memory=memory, ranks=ranks, progress=progress)
    wanted = _asked(made).evaluate
    if push is not None:
        check_licence(make_sources(made), push.upload)
    made = fetching.fetch(made, whole=_evaluated(made), progress=progress)
    if wanted is not None:
        _check_evaluation(wanted, Path(made.sources[made.donor].folder))
    report = execute(made, folder, **writing, progress=progress, started=started)
    if wanted is not None:
        report = report.with_evaluation(evaluate(wanted, Path(made.sources[made.donor].folder), folder, memory=memory, progress=progress))
        write_report(folder, report)
    ranks.hand_out("report", report.to_json())
    return report


def _check_evaluation(wanted: Evaluate, source: Path) -> None:
    """Find out before the writing what would keep the result from being judged: no tokenizer, no text."""
    from layercut.documents import passages
    from layercut.loading import load_tokenizer

    load_tokenizer(source)
    if wanted.perplexity is not None:
        next(passages(wanted.perplexity, held_out=True), None)


def _followed(recipe: Recipe | Plan, folder: Path, memory: int | None, ranks: Ranks) -> Report:
    """The part of a rank that does not write: it measures its share, and is given the report."""
    if isinstance(recipe, Recipe):
        plan_recipe(recipe, out=folder, memory=memory, ranks=ranks, progress=False)
    return Report.model_validate_json(ranks.hand_out("report"))


def _unpublished(recipe: Recipe | Plan, folder: Path, overwrite: bool) -> Report | None:
    """The report of a finished output of the same recipe or plan, of which only the upload is left to do; None when there is none.

    One that was published is written anew when it may be overwritten: its sources may be others by now.
    """
    if not os.path.isfile(folder / REPORT):  # noqa: PTH113 - Path.is_file raises where it may not look
        return None
    try:
        report = read_report(folder)
    except LayercutError:
        return None
    same = report.plan == recipe.digest if isinstance(recipe, Plan) else _work(report.recipe) == _work(recipe.described())
    evaluated = _asked(recipe).evaluate is None or report.evaluation is not None
    done = overwrite and report.published is not None
    return report if same and evaluated and not done else None


def _work(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe says what is written: not where it goes."""
    found = {key: value for key, value in recipe.items() if key != "upload"}
    if isinstance(found.get("output"), Mapping):
        found["output"] = {key: value for key, value in found["output"].items() if key != "path"}
    return {key: value for key, value in found.items() if value not in (None, {})}


def push_model(folder: str | Path, upload: Upload | str, *, progress: bool = True) -> Outcome:
    """Publish an output on the Hub, with a card: a repository (`user/name`), or an `Upload` with more settings.

    Rights are checked first, then the folder, down to every byte of its sources. Contents are stored before one commit makes all files
    visible at once; a second call sends only what is not there, and makes no commit when nothing is to change. layercut.json then says
    where it was published. Raises LayercutError with one clear line.
    """
    try:
        push = Push(Upload(repo=upload) if isinstance(upload, str) else upload, progress=progress)
    except ValidationError as error:
        raise UploadError(str(error.errors()[0]["msg"]).removeprefix("Value error, "), where=str(upload)) from None
    push.check_rights()
    return _publish(push, _folder_of(folder), progress)[0]


def _publish(push: Push, folder: Path, progress: bool) -> tuple[Outcome, Report]:
    """Publish the folder, and note in its report where."""
    outcome = push.publish(folder)
    report = read_report(folder)
    if report.published != outcome.published:
        report = report.with_published(outcome.published)
        write_report(folder, report)
    return outcome, report


def _asked(recipe: Recipe | Plan) -> Recipe:
    """What a plan was asked for. Raises LayercutError when its recipe is none: a plan may come from a file that anyone wrote."""
    if isinstance(recipe, Recipe):
        return recipe
    try:
        return Recipe.model_validate(recipe.recipe)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(("recipe", *map(str, first["loc"])))
        hint = "make the plan again with: layercut plan RECIPE -o FILE"
        raise LayercutError(f"plan holds a recipe that this version cannot read: {place}: {first['msg']}", hint=hint) from None


def outstanding(plan: Plan) -> list[str]:
    """What a run of the plan would fetch from the Hub first, in words, a line for each model."""
    return fetching.outstanding(plan, whole=_evaluated(plan))


def _evaluated(plan: Plan) -> tuple[str, ...]:
    """Aliases of the sources that are loaded as a whole."""
    return () if _asked(plan).evaluate is None else (plan.donor,)


def _as_it_is(recipe: Read, overrides: Sequence[str]) -> Read:
    """A recipe or plan that was read before. Raises RecipeError where something is to be overridden all the same."""
    if overrides:
        raise RecipeError("overrides go with a recipe that is read from a file or a dict", hint="give them to load_recipe")
    return recipe


def load(path: Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()) -> Recipe | Plan:
    """Read a recipe or a plan, whichever the file holds; a dict is a recipe."""
    if isinstance(path, Mapping):
        return load_recipe(path, overrides)
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
    return _folder_of(chosen)


def _folder_of(chosen: str | Path) -> Path:
    if "\0" in str(chosen):
        raise OutputError("a name with a NUL is no folder", where=quoted(str(chosen)))
    return Path(os.path.expanduser(chosen))  # noqa: PTH111 - Path.expanduser raises where there is no such user


def evaluate(wanted: Evaluate, source: Path, result: Path, *, memory: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Measure the source and the result in the same way, one after the other. `memory` is as in `plan_recipe`."""
    found: dict[str, Any] = {}
    for name, folder in (("before", source), ("after", result)):
        for what, value in _judged(wanted, folder, memory, progress).items():
            found.setdefault(what, {"prompt": wanted.generate} if what == "generate" else {})[name] = value
    return found


def _judged(wanted: Evaluate, folder: Path, memory: int | None, progress: bool) -> dict[str, Any]:
    """What is asked of one model, which is gone from memory afterwards: the next one needs the room."""
    from layercut.perplexity import LanguageModel

    model, found = LanguageModel(folder, memory=memory), dict[str, Any]()
    if wanted.perplexity is not None:
        found["perplexity"] = model.perplexity(wanted.perplexity, progress=progress).model_dump(mode="json")
    if wanted.generate is not None:
        found["generate"] = model.generate(wanted.generate, wanted.tokens)
    return found
