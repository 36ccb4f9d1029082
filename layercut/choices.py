"""The choices of a plan: what the recipe leaves open, decided by distance or by loss, with the evidence kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import Any, NamedTuple

from layercut.architecture import Member
from layercut.calibration import Auto, Calibration
from layercut.checkpoint import Tensor
from layercut.ends import find_ends
from layercut.errors import CalibrationError, CheckpointError, LayercutError, RecipeError, RefusedError
from layercut.header import FLOATS, ITEM_BITS
from layercut.healing import Healed, heal
from layercut.layout import layer_tensors
from layercut.metrics import Metric
from layercut.operations import Wish
from layercut.plan import Candidate, Choice, Measurement, Trial
from layercut.recipe import DTYPES, Recipe
from layercut.seams import Prices
from layercut.searches import ALL, QUICK, QUICK_SHARE, Best, Search, find
from layercut.selectors import count_of
from layercut.settling import Contest, Question, Way
from layercut.stack import Block, LayerRef, Stack, blocks_of, joints, runs
from layercut.strategies import OneBlock, Strategy, Task
from layercut.trials import Attempt, Found, Loss, Losses, Part

Measure = Callable[..., Measurement]
"""Measures, given members, metrics, calibration and, for `samples: auto`, `question`: what is chosen on a measurement."""
Run = Callable[[Mapping[str, Member], Calibration], Losses]
"""Makes members ready to be run on calibration text."""
# Names, inside a layer, of the modules that write to the residual stream: attention and feed-forward outputs of all families.
OUTPUTS = re.compile(
    r"(^|\.)(o_proj|out_proj|c_proj|wo|down_proj|fc2|fc_out|w2|dense_4h_to_h|(self_)?attention\.dense|self_attn\.dense|attn\.dense)(\.\w+)?$"
)

Build = Callable[[Sequence[Block]], Stack]
LOSS = "loss"
"""What stands for the metric where the loss decided."""
# Budgets that bound a weight, and its unit.
UNITS = {"params": "parameters", "size": "bytes"}


class Evidence:
    """Measures once, when first asked, and keeps what was decided with it."""

    def __init__(
        self,
        recipe: Recipe,
        members: Mapping[str, Member],
        measure: Measure,
        question: Question | None = None,
        run: Run | None = None,
        writable: Callable[[Stack], bool] = lambda stack: True,
        barred: str | None = None,
    ) -> None:
        """`run` is None where stacks cannot be run, and `barred` says why none is to be, if there is a reason."""
        self.recipe, self.members, self._question, self._run, self.writable = recipe, members, question, run, writable
        self.barred = "nothing is given that stacks could be run with" if run is None else barred
        self.compared = False
        """Whether a choice was made by loss that nobody asked for."""
        self._losses: Losses | None = None
        self.contests: list[Contest] = []
        self.choices: list[Choice] = []
        self.notes: list[str] = []
        self.measurement: Measurement | None = None
        self._measure = measure
        self._layers: dict[str, Mapping[int, tuple[Tensor, ...]]] = {}
        self._weights: dict[tuple[str, int], Weight] = {}
        self._ends: dict[tuple[str, str], Weight] = {}

    @property
    def depths(self) -> dict[str, int]:
        """Number of layers of every model."""
        return {alias: member.stack.depth for alias, member in self.members.items()}

    def prices(self, metric: Metric | None) -> Prices:
        """Seam prices under a metric; under the first of the recipe when none is given."""
        if self.measurement is None:
            if self._losses is not None:  # the engine loads what it measures
                self._losses.release()
            calibration = self.recipe.calibration
            asked = {"question": self._question} if isinstance(calibration.samples, Auto) else {}
            self.measurement = self._measure(self.members, self.recipe.all_metrics, calibration, **asked)
            self.notes += self.measurement.details.get("settling", [])
        return Prices(self.measurement, (metric or self.recipe.all_metrics[0]).label, self.depths)

    @property
    def losses(self) -> Losses:
        """What stacks lose; the models are made ready when this is first asked for."""
        if self._losses is None:
            if self._run is None:
                raise LayercutError(str(self.barred), hint="choose by distance")
            self._losses = self._run(self.members, self.recipe.calibration)
        return self._losses

    def note_trials(self, where: str, chosen: str, stack: Stack, build: Build, own: Found, part: Part) -> None:
        """Keep a decision that was made by loss. `stack` is what the step saw, and `own` what was chosen and what was tried."""
        (loss,) = self.losses.losses([build(own.blocks)], part, own.share)
        self._note_loss(where, chosen, loss, stack, own.attempts, own.share)

    def _note_loss(self, where: str, chosen: str, loss: Loss, stack: Stack, attempts: Sequence[Attempt], share: float = 1.0) -> None:
        """Keep a decision by loss, with all that was tried and the stack as the step saw it."""
        before = {part: self.losses.losses([stack], part, share)[0] for part in {attempt.part: None for attempt in attempts}}
        as_it_is = [Attempt("as it is", (), base, part) for part, base in before.items()]
        trials = []
        for attempt in (*as_it_is, *attempts):
            base = before[attempt.part]
            gap = attempt.loss.over(base)
            trials.append(
                Trial(
                    name=attempt.name,
                    chosen=named(attempt.blocks),
                    loss=attempt.loss.mean,
                    increase=gap.mean / base.mean,
                    stderr=gap.stderr / base.mean,
                    text=attempt.part,
                )
            )
        about = self.losses.about()
        if share < 1 and isinstance(about.get("held_out"), dict):
            about["held_out"] |= {"samples": len(loss.counts), "tokens": sum(loss.counts) + len(loss.counts)}
        self.choices.append(Choice(where=where, metric=LOSS, chosen=chosen, cost=loss.mean, trials=tuple(trials), run_on=about))

    def go_by_distance(self, why: str) -> None:
        """Forget what was decided, to decide again without what nobody asked for."""
        self.barred, self.compared = why, False
        self.contests, self.choices, self.notes = [], [], list(self.measurement.details.get("settling", ())) if self.measurement else []

    def note_healing(self, where: str, chosen: str, stack: Stack, healed: Healed) -> None:
        """Keep what was tried to make up for a cut of `stack`."""
        (loss,) = self.losses.losses([healed.stack], "held out")
        self._note_loss(where, chosen, loss, stack, healed.attempts)
        self.choices[-1] = self.choices[-1].model_copy(update={"maps": tuple(one.mending for one in healed.maps)})
        self.notes += [f"{where}: the map for {named([one.block])} is not taken: {one.why}" for one in healed.maps if not one.taken]

    def note(
        self,
        where: str,
        metric: Metric | None,
        stack: Stack,
        candidates: tuple[Candidate, ...],
        chosen: str | None = None,
        rivals: tuple[Way, ...] | None = None,
    ) -> None:
        """Keep a decision with its evidence; `rivals` are the other ways in which it could fall, where they can be listed."""
        prices = self.prices(metric)
        text = chosen or "slices " + " + ".join(str(run) for run in runs(stack))
        self.contests.append(Contest(where, prices.metric, self.way(text, stack), rivals))
        self.choices.append(Choice(where=where, metric=prices.metric, chosen=text, cost=prices.cost(stack).value, candidates=candidates))

    def way(self, name: str, stack: Stack) -> Way:
        """A way in which a choice can fall, by the stack that it leads to."""
        return Way(name, tuple((joint.source, joint.target) for joint in joints(stack, self.depths)))

    def layers(self, alias: str) -> Mapping[int, tuple[Tensor, ...]]:
        """The tensors of every layer of a model."""
        if alias not in self._layers:
            self._layers[alias] = layer_tensors(*self.members[alias])
        return self._layers[alias]

    def weight(self, stack: Stack) -> Weight:
        """What a stack weighs as it would be written, with what stands before and behind it. What is tied counts once."""
        first, last = stack[0].model, stack[-1].model
        wanted = [(layer.model, layer.index) for layer in stack]
        if wanted == [(first, index) for index in range(self.depths[first])]:  # it keeps its multi-token-prediction layers
            wanted += [(first, index) for index in self.layers(first) if index >= len(stack)]
        if (first, last) not in self._ends:
            ends = find_ends(self.members, first, first, last)
            self._ends[first, last] = self._weigh(part.tensor for part in (*ends.before, *ends.behind))
        for model, index in wanted:
            if (model, index) not in self._weights:
                self._weights[model, index] = self._weigh(self.layers(model)[index])
        found = [self._ends[first, last], *(self._weights[place] for place in wanted)]
        return Weight(sum(weight.params for weight in found), sum(weight.size for weight in found))

    def _weigh(self, tensors: Iterable[Tensor]) -> Weight:
        write = self.recipe.out_dtype or self.recipe.dtype
        params = size = 0
        for tensor in tensors:
            count = prod(tensor.shape)
            params += count
            size += tensor.nbytes if write is None or tensor.dtype not in FLOATS else count * ITEM_BITS[DTYPES[write]] // 8
        return Weight(params, size)


def named(blocks: Sequence[Block]) -> str:
    """Blocks in words."""
    return " + ".join(f"[{block.start}, {block.stop})" for block in blocks)


class Weight(NamedTuple):
    """Parameters and bytes."""

    params: int
    size: int


class Means:
    """What the strategy of a step may ask (`searches.Means`)."""

    def __init__(self, evidence: Evidence, metric: Metric | None, within: Callable[[Stack], bool]) -> None:
        """`within` tells whether a stack will do."""
        self._evidence, self._metric, self.fits = evidence, metric, within

    @property
    def prices(self) -> Prices:
        """What seams cost under the metric of the step."""
        return self._evidence.prices(self._metric)

    @property
    def losses(self) -> Losses:
        """What stacks lose."""
        return self._evidence.losses


class StepSite:
    """A step of the recipe, as its operation sees it (`operations.Site`)."""

    def __init__(self, evidence: Evidence, path: tuple[str | int, ...]) -> None:
        self.evidence, self.path = evidence, path

    def error(self, message: str, *path: str | int, hint: str | None = None) -> LayercutError:
        return RecipeError(message, where=self.evidence.recipe.where(*self.path, *path), hint=hint)

    def tensors(self, layer: LayerRef) -> tuple[str, ...]:
        return tuple(t.name for t in self.evidence.layers(layer.model)[layer.index])

    def outputs(self, layer: LayerRef) -> tuple[str, ...]:
        return tuple(name for name in self.tensors(layer) if OUTPUTS.search(name.removesuffix(".weight").removesuffix(".bias")))

    def heal(self, stack: Stack, blocks: Sequence[Block], ridge: float) -> Stack:
        found = heal(stack, blocks, ridge, self.evidence.losses)
        maps = f"a map for {named(found.taken)}" if len(found.taken) == 1 else f"maps for {named(found.taken)}"
        words = f"{maps} folded in" if found.taken else "no map helps: the cut alone"
        self.evidence.note_healing(f"{self._name}.heal", words, stack, found)
        return found.stack

    def choose(self, wish: Wish) -> tuple[Block, ...]:
        if wish.strategy is not None:
            return self._choose(wish, ALL[wish.strategy] if wish.candidates is None else Best(wish.candidates))
        reason = self.evidence.barred
        if isinstance(self.evidence.recipe.calibration.samples, Auto):
            reason = "samples: auto weighs distances"
        elif "max_distance" in wish.budget:
            reason = "max_distance bounds a distance"
        if reason is None:
            try:
                chosen = self._choose(wish, Best(QUICK, QUICK_SHARE))
                self.evidence.compared = True
                return chosen
            except (CalibrationError, CheckpointError, RefusedError) as error:
                if self.evidence.measurement is None or "max_loss_increase" in wish.budget:  # nothing else can be done
                    raise
                self.evidence.barred = reason = error.message
        chosen = self._choose(wish._replace(strategy="block"), ALL["block"])
        if chosen:
            self.evidence.notes.append(f"{self._name}: chosen by distance alone (strategy block): {reason}")
        return chosen

    def _choose(self, wish: Wish, strategy: Strategy) -> tuple[Block, ...]:
        ((key, value),) = wish.budget.items()
        task = Task(wish.stack, 0, wish.build, wish.verb == "repeat", wish.protect)
        if key in UNITS and self._amount(key, wish.stack) <= value:
            self.evidence.notes.append(f"{self._name}: the model has {self._amount(key, wish.stack):,} {UNITS[key]}: nothing is removed")
            return ()
        counts = self._counts(key, value, task, wish)  # a number that cannot be is told before anything is measured
        if wish.heals:
            self.evidence.losses.check_foldable(wish.stack)
        means = self._means(wish)
        if key == "max_loss_increase":
            return self._choose_by_increase(value, counts, task, wish, strategy)
        nearest: tuple[Block, ...] = ()
        for count in counts:
            if key in UNITS and isinstance(strategy, Search) and not self._reachable(key, value, replace(task, count=count)):
                continue
            found = find(strategy, replace(task, count=count), means)
            if found is None and key == "layers":
                raise self._too_many(count, task, wish)
            nearest = nearest if found is None else found.blocks
            if found is not None and self._within(key, value, wish.build(found.blocks), means):
                if isinstance(strategy, Search):
                    part: Part = "held out" if isinstance(strategy, Best) else "calibration"
                    self.evidence.note_trials(self._name, f"{wish.verb} layers {named(found.blocks)}", wish.stack, wish.build, found, part)
                else:
                    self._keep(wish, found.blocks, means.prices)
                return found.blocks
        raise self._out_of_reach(key, value, wish, nearest, means)

    def _means(self, wish: Wish) -> Means:
        ((key, value),) = wish.budget.items()
        last = self.path[1:2] == (len(self.evidence.recipe.steps) - 1,)  # where steps follow, they may mend a stack

        def within(stack: Stack) -> bool:
            return (key not in UNITS or self._amount(key, stack) <= value) and (not last or self.evidence.writable(stack))

        return Means(self.evidence, wish.metric, within)

    def _choose_by_increase(self, value: str, counts: Sequence[int], task: Task, wish: Wish, strategy: Strategy) -> tuple[Block, ...]:
        """The most layers within a loss. Every number is tried, as more layers may lose less."""
        every = {count: find(strategy, replace(task, count=count), self._means(wish)) for count in counts}
        found = {count: one for count, one in every.items() if one is not None}
        base, *losses = self.evidence.losses.losses([wish.stack, *(wish.build(one.blocks) for one in found.values())], "held out")
        attempts = [
            Attempt(f"{count} layer{'s' * (count > 1)}", one.blocks, loss, "held out")
            for (count, one), loss in zip(found.items(), losses, strict=True)
        ]
        limit = base.mean * (1 + float(Fraction(value.rstrip("%"))) / 100)
        within = [attempt for attempt in attempts if attempt.loss.mean <= limit]
        if not within:
            least = min(attempts, key=lambda attempt: attempt.loss.mean, default=None)
            hint = None if least is None else f"the least is {least.loss.mean / base.mean - 1:.2%}, of {least.name}"
            message = f"no layer of {len(wish.stack)}{_protected(wish)} can be removed within a loss increase of {value}"
            raise self.error(message, "max_loss_increase", hint=hint)
        chosen = within[-1].blocks
        words = f"{wish.verb} layers {named(chosen)}"
        self.evidence.note_trials(self._name, words, wish.stack, wish.build, Found(chosen, tuple(attempts)), "held out")
        return chosen

    def _reachable(self, key: str, value: Any, task: Task) -> bool:
        """Whether so many layers could be enough: the heaviest."""
        free = [position for position in range(len(task.stack)) if position not in task.protect]
        weights = {position: self._amount(key, task.stack[position : position + 1]) for position in free}
        heaviest = sorted(free, key=lambda position: -weights[position])[: task.count]
        return bool(self._amount(key, task.build(blocks_of(heaviest))) <= value)

    @property
    def _name(self) -> str:
        return ".".join(map(str, self.path))

    def _amount(self, key: str, stack: Stack) -> int:
        weight = self.evidence.weight(stack)
        return weight.params if key == "params" else weight.size

    def _counts(self, key: str, value: Any, task: Task, wish: Wish) -> Sequence[int]:
        """Numbers of layers to try: the one that is asked for, the least that is small enough, or the most that is near enough."""
        if key in UNITS:
            return range(1, task.longest + 1)
        if key == "max_distance":
            return range(task.longest, 0, -1)
        if key == "max_loss_increase":
            return range(1, task.longest + 1)
        count = count_of(value, len(task.stack), self)
        if count > task.longest:
            raise self._too_many(count, task, wish)
        return (count,)

    def _within(self, key: str, value: Any, stack: Stack, means: Means) -> bool:
        """Whether a stack keeps the budget."""
        if key in UNITS:
            return bool(self._amount(key, stack) <= value)
        return key == "layers" or bool(means.prices.cost(stack).value <= value)

    def _too_many(self, count: int, task: Task, wish: Wish) -> LayercutError:
        hint = f"at most {task.longest}" if count > task.longest else "strategy blocks takes layers that are not consecutive"
        return self.error(f"cannot {wish.verb} {count} of {len(wish.stack)} layers{_protected(wish)}", "layers", hint=hint)

    def _out_of_reach(self, key: str, value: Any, wish: Wish, nearest: tuple[Block, ...], means: Means) -> LayercutError:
        """What is said of a budget; `nearest` is the choice that came closest to it."""
        depth, count = len(wish.stack), sum(block.stop - block.start for block in nearest)
        if key in UNITS:
            least = f"{self._amount(key, wish.build(nearest)):,} are left when {count} of {depth} layers are removed"
            return self.error(f"cannot come down to {value:,} {UNITS[key]}: {least}{_protected(wish)}", key)
        hint = f"the least is {means.prices.cost(wish.build(nearest)).value:.6g}" if count else None
        return self.error(f"no layer of {depth}{_protected(wish)} can be removed within a distance of {value:g}", key, hint=hint)

    def _keep(self, wish: Wish, blocks: tuple[Block, ...], prices: Prices) -> None:
        count = sum(block.stop - block.start for block in blocks)
        task = Task(wish.stack, count, wish.build, wish.verb == "repeat", wish.protect)
        candidates: list[Candidate] = []
        rivals: list[Way] | None = [] if wish.strategy in ("block", "deepest") and "layers" in wish.budget else None
        if wish.strategy == "block":
            for start in OneBlock.starts(task):
                cost = prices.cost(wish.build([Block(start, start + count)]))
                candidates.append(Candidate(start=start, stop=start + count, cost=cost.value, stderr=cost.stderr))
                if rivals is not None and Block(start, start + count) not in blocks:
                    stack = wish.build([Block(start, start + count)])
                    rivals.append(self.evidence.way(f"{wish.verb} layers [{start}, {start + count})", stack))
        if wish.strategy == "deepest":
            why = "cutting the deepest layers needs healing (training after the cut); distance did not decide"
            self.evidence.notes.append(f"{self._name}: {why}")
        self.evidence.note(
            self._name,
            wish.metric,
            wish.build(blocks),
            tuple(candidates),
            f"{wish.verb} layers {named(blocks)}",
            None if rivals is None else tuple(rivals),
        )


def _protected(wish: Wish) -> str:
    return f", {len(wish.protect)} of them protected" if wish.protect else ""
