"""The planner: from a recipe to a complete plan. Decides everything; measures only through the function it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from layercut.architecture import Member, find_stack
from layercut.calibration import Calibration
from layercut.checkpoint import Checkpoint
from layercut.errors import LayercutError, RecipeError
from layercut.layout import lay_out
from layercut.metrics import Metric
from layercut.operations import apply_all
from layercut.plan import Actions, Candidate, Choice, Companion, LayerRef, LeftOut, Measurement, Plan, Seam, Source
from layercut.recipe import Recipe, Slice
from layercut.seams import Cost, Prices, Window, choose_boundaries, least_length
from layercut.stack import Stack, joints, runs
from layercut.surgery import operate
from layercut.version import __version__

Measure = Callable[[Mapping[str, Member], Sequence[Metric], Calibration], Measurement]
Resolve = Callable[[str], Checkpoint]


def build_plan(recipe: Recipe, *, resolve: Resolve, measure: Measure) -> Plan:
    """Resolve every choice that the recipe leaves open, and lay out the result down to byte ranges. Writes nothing.

    `resolve` opens the models that the recipe names; `measure` is called at most once, and only when something is `auto`.
    Raises LayercutError: RecipeError with its place when the recipe cannot be done, RefusedError when the result would load
    but compute something else.
    """
    members = _open(recipe, resolve)
    evidence = _Evidence(recipe, members, measure)
    stack = _start(recipe, members, evidence)
    sites = [_Site(evidence, ("steps", number, step.name)) for number, step in enumerate(recipe.steps)]  # type: ignore[attr-defined]
    stack = apply_all(stack, [(step.operation, site) for step, site in zip(recipe.steps, sites, strict=True)])  # type: ignore[attr-defined]
    used = {alias: member for alias, member in members.items() if any(layer.model == alias for layer in stack)}
    donor = next(iter(used))
    surgery = operate(members[donor].checkpoint.config_text, donor, used, stack)
    layout = lay_out(used, stack, recipe.output.max_shard_size if recipe.output else 5 * 10**9)
    companions = tuple(Companion(name=name, model=donor, size=size) for name, size in members[donor].checkpoint.companions)
    return Plan(
        version=__version__,
        recipe=recipe.described(),
        output=recipe.output.path if recipe.output else None,
        sources={alias: _source(member) for alias, member in used.items()},
        donor=donor,
        seams=_seams(stack, evidence),
        choices=tuple(evidence.choices),
        edits=surgery.edits,
        left_out=(*layout.left_out, *(LeftOut(model=donor, what=what, reason=why) for what, why in members[donor].checkpoint.left_out)),
        measurement=evidence.measurement,
        actions=Actions(layers=stack, config=surgery.text, files=layout.files, index=layout.index_text, companions=companions),
    )


def _open(recipe: Recipe, resolve: Resolve) -> dict[str, Member]:
    """Open every model of the slices, in their order. A model goes by its alias, or else by its reference."""
    members: dict[str, Member] = {}
    for alias, path in _named(recipe):
        if alias not in members:
            try:
                checkpoint = resolve(recipe.models.get(alias, alias))
                members[alias] = Member(checkpoint, find_stack(checkpoint))
            except LayercutError as error:
                where = recipe.where(*path) + (f": {error.where}" if error.where else "")
                raise type(error)(error.message, where=where, hint=error.hint) from None
    if len(members) > 1:
        raise RecipeError("slices from more than one model cannot be stacked yet", where=recipe.where("slices"))
    return members


def _named(recipe: Recipe) -> list[tuple[str, tuple[str | int, ...]]]:
    """Names of models, and where in the recipe they stand."""
    if recipe.slices is None:
        assert recipe.model is not None
        return [(recipe.model, ("model",))]
    return [(_model_of(recipe, number, part), ("slices", number, *part.path, "model")) for number, part in enumerate(recipe.slices)]


def _model_of(recipe: Recipe, number: int, part: Slice) -> str:
    name = part.source.model or recipe.model
    if name is None:
        raise RecipeError("which model? neither the slice nor the recipe names one", where=recipe.where("slices", number))
    return name


def _start(recipe: Recipe, members: Mapping[str, Member], evidence: _Evidence) -> Stack:
    """The stack that the steps begin with."""
    if recipe.slices is None:
        if recipe.depth is not None:
            hint = "to remove layers of a model use steps: [{prune: {layers: N}}]"
            raise RecipeError("'depth' goes with 'slices'", where=recipe.where("depth", key=True), hint=hint)
        alias, member = next(iter(members.items()))
        return _layers([(alias, 0, member.stack.depth)])
    windows = [_window(recipe, number, part, members) for number, part in enumerate(recipe.slices)]
    depth = _reachable(recipe, windows, members)
    if all(window.start is not None and window.stop is not None for window in windows):
        return _layers([(window.model, window.start or 0, window.stop or 0) for window in windows])
    bounds = choose_boundaries(windows, depth, evidence.prices(None))
    stack = _layers([(window.model, start, stop) for window, (start, stop) in zip(windows, bounds, strict=True)])
    evidence.note("slices", None, stack, ())
    return stack


def _layers(slices: Sequence[tuple[str, int, int]]) -> Stack:
    return tuple(LayerRef(model=model, index=index) for model, start, stop in slices for index in range(start, stop))


def _window(recipe: Recipe, number: int, part: Slice, members: Mapping[str, Member]) -> Window:
    model, (start, stop) = _model_of(recipe, number, part), part.source.layer_range
    full = members[model].stack.depth
    for place, bound in enumerate((start, stop)):
        if isinstance(bound, int) and bound > full - 1 + place:
            where = recipe.where("slices", number, *part.path, "layer_range")
            message = f"layer_range [{start}, {stop}] leaves the model, which has {full} layers"
            raise RecipeError(message, where=where, hint=f"the largest range is [0, {full}]")
    ends = [None if bound == "auto" else full if bound == "end" else bound for bound in (start, stop)]
    return Window(model, *ends)


def _reachable(recipe: Recipe, windows: Sequence[Window], members: Mapping[str, Member]) -> int:
    """The depth that the slices must have in all. Raises RecipeError when they cannot have it."""
    least = least_length(windows)
    lengths = [window.lengths(members[window.model].stack.depth, least) for window in windows]
    low, high = max(1, sum(span.start for span in lengths)), sum(span.stop - 1 for span in lengths)
    if recipe.depth is None:
        if low != high:
            raise RecipeError(
                "'auto' boundaries need a target 'depth'",
                where=recipe.where("slices"),
                hint=f"these slices can hold {low} to {high} layers",
            )
        return low
    if not low <= recipe.depth <= high:
        reach = f"exactly {low}" if low == high else f"{low} to {high}"
        raise RecipeError(f"depth {recipe.depth} cannot be reached: the slices hold {reach} layers", where=recipe.where("depth"))
    return recipe.depth


class _Evidence:
    """Measures once, when first asked, and keeps what was decided with it."""

    def __init__(self, recipe: Recipe, members: Mapping[str, Member], measure: Measure) -> None:
        self.recipe, self.members = recipe, members
        self.choices: list[Choice] = []
        self.measurement: Measurement | None = None
        self._measure = measure

    def prices(self, metric: Metric | None) -> Prices:
        """Seam prices under a metric; under the first of the recipe when none is given."""
        if self.measurement is None:
            self.measurement = self._measure(self.members, self.recipe.all_metrics, self.recipe.calibration)
        return Prices(
            self.measurement, (metric or self.recipe.all_metrics[0]).label, {alias: m.stack.depth for alias, m in self.members.items()}
        )

    def note(self, where: str, metric: Metric | None, stack: Stack, candidates: tuple[Candidate, ...], chosen: str | None = None) -> None:
        """Keep a decision with its evidence."""
        prices = self.prices(metric)
        text = chosen or "slices " + " + ".join(str(run) for run in runs(stack))
        self.choices.append(Choice(where=where, metric=prices.metric, chosen=text, cost=prices.cost(stack).value, candidates=candidates))


class _Site:
    """A step of the recipe, as its operation sees it (`operations.Site`)."""

    def __init__(self, evidence: _Evidence, path: tuple[str | int, ...]) -> None:
        self.evidence, self.path = evidence, path

    def error(self, message: str, *path: str | int, hint: str | None = None) -> LayercutError:
        return RecipeError(message, where=self.evidence.recipe.where(*self.path, *path), hint=hint)

    def block(self, length: int, count: int, build: Callable[[int], Stack], metric: Metric | None, verb: str) -> int:
        prices = self.evidence.prices(metric)
        costs: list[Cost] = [prices.cost(build(start)) for start in range(count)]
        best = min(range(count), key=lambda start: (costs[start].ticks, start))
        candidates = tuple(Candidate(start=s, stop=s + length, cost=cost.value, stderr=cost.stderr) for s, cost in enumerate(costs))
        self.evidence.note(".".join(map(str, self.path)), metric, build(best), candidates, f"{verb} layers [{best}, {best + length})")
        return best


def _source(member: Member) -> Source:
    checkpoint = member.checkpoint
    return Source(
        reference=checkpoint.reference, folder=str(checkpoint.folder), revision=checkpoint.revision, depth=member.stack.depth,
        parameters=checkpoint.parameters, digest=checkpoint.digest, files={file.name: file.size for file in checkpoint.files.values()},
    )  # fmt: skip


def _seams(stack: Stack, evidence: _Evidence) -> tuple[Seam, ...]:
    """The seams of the final stack, with every distance that was measured."""
    measured = [evidence.prices(metric) for metric in evidence.recipe.all_metrics] if evidence.measurement is not None else []
    depths = {alias: member.stack.depth for alias, member in evidence.members.items()}
    return tuple(
        Seam(
            at=joint.at, from_model=joint.source.model, from_boundary=joint.source.number, to_model=joint.target.model, to_boundary=joint.target.number,
            distances={prices.metric: prices.distance(joint.source, joint.target) for prices in measured},
        )
        for joint in joints(stack, depths)
    )  # fmt: skip
