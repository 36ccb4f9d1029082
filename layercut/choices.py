"""The choices of a plan: what the recipe leaves open, decided by distance, with the evidence kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

from layercut.architecture import Member
from layercut.calibration import Calibration
from layercut.errors import LayercutError, RecipeError
from layercut.layout import layer_tensors
from layercut.metrics import Metric
from layercut.operations import Wish
from layercut.plan import Candidate, Choice, Measurement
from layercut.recipe import Recipe
from layercut.seams import Prices
from layercut.selectors import count_of
from layercut.stack import Block, LayerRef, Stack, runs
from layercut.strategies import STRATEGIES, OneBlock, Task

Measure = Callable[[Mapping[str, Member], Sequence[Metric], Calibration], Measurement]
# Names, inside a layer, of the modules that write to the residual stream: attention and feed-forward outputs of all families.
OUTPUTS = re.compile(
    r"(^|\.)(o_proj|out_proj|c_proj|wo|down_proj|fc2|fc_out|w2|dense_4h_to_h|(self_)?attention\.dense|self_attn\.dense|attn\.dense)(\.\w+)?$"
)


class Evidence:
    """Measures once, when first asked, and keeps what was decided with it."""

    def __init__(self, recipe: Recipe, members: Mapping[str, Member], measure: Measure) -> None:
        self.recipe, self.members = recipe, members
        self.choices: list[Choice] = []
        self.notes: list[str] = []
        self.measurement: Measurement | None = None
        self._measure = measure
        self._weights: dict[str, Weights] = {}

    @property
    def depths(self) -> dict[str, int]:
        """Number of layers of every model."""
        return {alias: member.stack.depth for alias, member in self.members.items()}

    def prices(self, metric: Metric | None) -> Prices:
        """Seam prices under a metric; under the first of the recipe when none is given."""
        if self.measurement is None:
            self.measurement = self._measure(self.members, self.recipe.all_metrics, self.recipe.calibration)
        return Prices(self.measurement, (metric or self.recipe.all_metrics[0]).label, self.depths)

    def note(self, where: str, metric: Metric | None, stack: Stack, candidates: tuple[Candidate, ...], chosen: str | None = None) -> None:
        """Keep a decision with its evidence."""
        prices = self.prices(metric)
        text = chosen or "slices " + " + ".join(str(run) for run in runs(stack))
        self.choices.append(Choice(where=where, metric=prices.metric, chosen=text, cost=prices.cost(stack).value, candidates=candidates))

    def weights(self, alias: str) -> Weights:
        """Sizes of a model's layers, and of the rest of it."""
        if alias not in self._weights:
            self._weights[alias] = weigh(self.members[alias])
        return self._weights[alias]


class Weight(NamedTuple):
    """Parameters and bytes."""

    parameters: int
    bytes: int


class Weights(NamedTuple):
    """What the layers of a model weigh, and all that stands outside them."""

    layers: Mapping[int, Weight]
    outside: Weight


def weigh(member: Member) -> Weights:
    """Weigh a model by its tensors; what is tied is in the file, and counts, once."""
    layers = {
        index: Weight(sum(prod(t.shape) for t in tensors), sum(t.nbytes for t in tensors))
        for index, tensors in layer_tensors(*member).items()
    }  # fmt: skip
    tensors = member.checkpoint.tensors.values()
    whole = Weight(sum(prod(t.shape) for t in tensors), sum(t.nbytes for t in tensors))
    inside = [sum(weight[place] for weight in layers.values()) for place in (0, 1)]
    return Weights(layers, Weight(whole.parameters - inside[0], whole.bytes - inside[1]))


class StepSite:
    """A step of the recipe, as its operation sees it (`operations.Site`)."""

    def __init__(self, evidence: Evidence, path: tuple[str | int, ...]) -> None:
        self.evidence, self.path = evidence, path

    def error(self, message: str, *path: str | int, hint: str | None = None) -> LayercutError:
        return RecipeError(message, where=self.evidence.recipe.where(*self.path, *path), hint=hint)

    def tensors(self, layer: LayerRef) -> tuple[str, ...]:
        checkpoint, stack = self.evidence.members[layer.model]
        return tuple(t.name for t in layer_tensors(checkpoint, stack)[layer.index])

    def outputs(self, layer: LayerRef) -> tuple[str, ...]:
        found = tuple(name for name in self.tensors(layer) if OUTPUTS.search(name.removesuffix(".weight").removesuffix(".bias")))
        if not found:
            raise self.error(f"layer {layer.index}: no tensor is known to write to the residual stream")
        return found

    def choose(self, wish: Wish) -> tuple[Block, ...]:
        (key, value), strategy = next(iter(wish.budget.items())), STRATEGIES[wish.strategy]
        best: tuple[Block, ...] | None = None
        task = Task(wish.stack, 0, wish.build, wish.verb == "repeat", wish.protect)
        counts = list(self._counts(key, value, task, wish))  # a number that cannot be is told before anything is measured
        prices = self.evidence.prices(wish.metric)
        for count in counts:
            blocks = strategy.choose(replace(task, count=count), prices)
            if blocks is None:
                if key == "layers":
                    raise self._too_many(count, task, wish)
                continue
            if self._within(key, value, wish.build(blocks), prices):
                best = blocks
                break
        if best is None:
            raise self.error(f"{key} {value} cannot be reached: {len(wish.stack)} layers are not enough", key)
        self._keep(wish, best, prices)
        return best

    def _counts(self, key: str, value: object, task: Task, wish: Wish) -> Iterator[int]:
        """Numbers of layers to try: the one that is asked for, the least that is small enough, or the most that is near enough."""
        if key == "layers":
            assert isinstance(value, int | str)
            count = count_of(value, len(task.stack), self)
            if count > task.longest:
                raise self._too_many(count, task, wish)
            yield count
        elif key == "max_distance":
            yield from range(task.longest, 0, -1)
        else:
            yield from range(1, task.longest + 1)

    def _within(self, key: str, value: object, stack: Stack, prices: Prices) -> bool:
        """Whether a stack keeps the budget."""
        if key == "layers":
            return True
        assert isinstance(value, int | float)
        if key == "max_distance":
            return prices.cost(stack).value <= value
        place = 0 if key == "params" else 1
        donors = dict.fromkeys((stack[0].model, stack[-1].model))
        outside = max(self.evidence.weights(alias).outside[place] for alias in donors)
        return outside + sum(self.evidence.weights(layer.model).layers[layer.index][place] for layer in stack) <= value

    def _too_many(self, count: int, task: Task, wish: Wish) -> LayercutError:
        verb = {"remove": "remove", "repeat": "repeat", "replace": "replace"}[wish.verb]
        protected = f", {len(task.protect)} of them protected" if task.protect else ""
        hint = f"at most {task.longest}" if count > task.longest else "strategy blocks takes layers that are not consecutive"
        return self.error(f"cannot {verb} {count} of {len(task.stack)} layers{protected}", "layers", hint=hint)

    def _keep(self, wish: Wish, blocks: tuple[Block, ...], prices: Prices) -> None:
        where = ".".join(map(str, self.path))
        count = sum(block.stop - block.start for block in blocks)
        task = Task(wish.stack, count, wish.build, wish.verb == "repeat", wish.protect)
        candidates: list[Candidate] = []
        if wish.strategy == "block":
            for start in OneBlock.starts(task):
                cost = prices.cost(wish.build([Block(start, start + count)]))
                candidates.append(Candidate(start=start, stop=start + count, cost=cost.value, stderr=cost.stderr))
        if wish.strategy == "deepest":
            self.evidence.notes.append(
                f"{where}: cutting the deepest layers needs healing (training after the cut); distance did not decide"
            )
        named = " + ".join(f"[{block.start}, {block.stop})" for block in blocks)
        self.evidence.note(where, wish.metric, wish.build(blocks), tuple(candidates), f"{wish.verb} layers {named}")
