"""The choices of a plan: what the recipe leaves open, decided by distance, with the evidence kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from layercut.architecture import Member
from layercut.calibration import Auto
from layercut.checkpoint import Tensor
from layercut.ends import find_ends
from layercut.errors import LayercutError, RecipeError
from layercut.header import ITEM_BITS
from layercut.layout import FLOATS, layer_tensors
from layercut.metrics import Metric
from layercut.operations import Wish
from layercut.plan import Candidate, Choice, Measurement
from layercut.recipe import DTYPES, Recipe
from layercut.seams import Prices
from layercut.selectors import count_of
from layercut.settling import Contest, Question, Way
from layercut.stack import Block, LayerRef, Stack, joints, runs
from layercut.strategies import STRATEGIES, OneBlock, Task

Measure = Callable[..., Measurement]
"""Measures, given members, metrics, calibration and, for `samples: auto`, `question`: what is chosen on a measurement."""
# Names, inside a layer, of the modules that write to the residual stream: attention and feed-forward outputs of all families.
OUTPUTS = re.compile(
    r"(^|\.)(o_proj|out_proj|c_proj|wo|down_proj|fc2|fc_out|w2|dense_4h_to_h|(self_)?attention\.dense|self_attn\.dense|attn\.dense)(\.\w+)?$"
)

# Budgets that bound a weight, and its unit.
UNITS = {"params": "parameters", "size": "bytes"}


class Evidence:
    """Measures once, when first asked, and keeps what was decided with it."""

    def __init__(self, recipe: Recipe, members: Mapping[str, Member], measure: Measure, question: Question | None = None) -> None:
        self.recipe, self.members, self._question = recipe, members, question
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
            calibration = self.recipe.calibration
            asked = {"question": self._question} if isinstance(calibration.samples, Auto) else {}
            self.measurement = self._measure(self.members, self.recipe.all_metrics, calibration, **asked)
            self.notes += self.measurement.details.get("settling", [])
        return Prices(self.measurement, (metric or self.recipe.all_metrics[0]).label, self.depths)

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
        wanted = [(layer.model, layer.index) for layer in stack if layer.fitted is None]
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


class Weight(NamedTuple):
    """Parameters and bytes."""

    params: int
    size: int


class StepSite:
    """A step of the recipe, as its operation sees it (`operations.Site`)."""

    def __init__(self, evidence: Evidence, path: tuple[str | int, ...]) -> None:
        self.evidence, self.path = evidence, path

    def error(self, message: str, *path: str | int, hint: str | None = None) -> LayercutError:
        return RecipeError(message, where=self.evidence.recipe.where(*self.path, *path), hint=hint)

    def tensors(self, layer: LayerRef) -> tuple[str, ...]:
        return () if layer.fitted is not None else tuple(t.name for t in self.evidence.layers(layer.model)[layer.index])

    def outputs(self, layer: LayerRef) -> tuple[str, ...]:
        return tuple(name for name in self.tensors(layer) if OUTPUTS.search(name.removesuffix(".weight").removesuffix(".bias")))

    def choose(self, wish: Wish) -> tuple[Block, ...]:
        ((key, value),) = wish.budget.items()
        task = Task(wish.stack, 0, wish.build, wish.verb == "repeat", wish.protect)
        if key in UNITS and self._amount(key, wish.stack) <= value:
            self.evidence.notes.append(f"{self._name}: the model has {self._amount(key, wish.stack):,} {UNITS[key]}: nothing is removed")
            return ()
        counts = self._counts(key, value, task, wish)  # a number that cannot be is told before anything is measured
        prices = self.evidence.prices(wish.metric)
        nearest: tuple[Block, ...] = ()
        for count in counts:
            blocks = STRATEGIES[wish.strategy].choose(replace(task, count=count), prices)
            if blocks is None and key == "layers":
                raise self._too_many(count, task, wish)
            nearest = nearest if blocks is None else blocks
            if blocks is not None and self._within(key, value, wish.build(blocks), prices):
                self._keep(wish, blocks, prices)
                return blocks
        raise self._out_of_reach(key, value, wish, nearest, prices)

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
        count = count_of(value, len(task.stack), self)
        if count > task.longest:
            raise self._too_many(count, task, wish)
        return (count,)

    def _within(self, key: str, value: Any, stack: Stack, prices: Prices) -> bool:
        """Whether a stack keeps the budget."""
        if key in UNITS:
            return bool(self._amount(key, stack) <= value)
        return key == "layers" or bool(prices.cost(stack).value <= value)

    def _too_many(self, count: int, task: Task, wish: Wish) -> LayercutError:
        hint = f"at most {task.longest}" if count > task.longest else "strategy blocks takes layers that are not consecutive"
        return self.error(f"cannot {wish.verb} {count} of {len(wish.stack)} layers{_protected(wish)}", "layers", hint=hint)

    def _out_of_reach(self, key: str, value: Any, wish: Wish, nearest: tuple[Block, ...], prices: Prices) -> LayercutError:
        """What is said of a budget; `nearest` is the choice that came closest to it."""
        depth, count = len(wish.stack), sum(block.stop - block.start for block in nearest)
        if key in UNITS:
            least = f"{self._amount(key, wish.build(nearest)):,} are left when {count} of {depth} layers are removed"
            return self.error(f"cannot come down to {value:,} {UNITS[key]}: {least}{_protected(wish)}", key)
        hint = f"the least is {prices.cost(wish.build(nearest)).value:.6g}" if count else None
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
        named = " + ".join(f"[{block.start}, {block.stop})" for block in blocks)
        self.evidence.note(
            self._name,
            wish.metric,
            wish.build(blocks),
            tuple(candidates),
            f"{wish.verb} layers {named}",
            None if rivals is None else tuple(rivals),
        )


def _protected(wish: Wish) -> str:
    return f", {len(wish.protect)} of them protected" if wish.protect else ""
