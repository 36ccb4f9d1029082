"""Operations on the stack: one class each. They say what is done; which layers, when an `auto` decides, is asked of the site."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from layercut.healing import RIDGE, without
from layercut.metrics import Metric, MetricSpec
from layercut.scalings import factor, literal, matches
from layercut.searches import ALL, Candidate, Search, StrategyName
from layercut.selectors import PERCENTAGE, Count, Percentage, Place, Selectors, check_height, positions
from layercut.sizes import Number, ParameterCount, Size
from layercut.stack import Block, LayerRef, Record, Scaling, Share, Stack, blocks_of

Verb = Literal["remove", "repeat", "replace"]
Build = Callable[[Sequence[Block]], Stack]


def _check_increase(value: object) -> object:
    """One message instead of one for each kind of value."""
    if not isinstance(value, str) or not re.fullmatch(PERCENTAGE, value):
        raise ValueError("expected a percentage such as 5%")
    return value


Ridge = Annotated[Number, Field(gt=0)]
Increase = Annotated[Percentage, BeforeValidator(_check_increase)]


class Wish(NamedTuple):
    """A choice that an operation leaves to the planner."""

    verb: Verb
    stack: Stack
    build: Build
    """The stack that comes of a choice of disjoint blocks of positions, in order."""
    budget: Mapping[str, Any]
    """One entry: the key of the budget (`layers`, `params`, `size`, `max_distance`, `max_loss_increase`) and its value."""
    strategy: StrategyName | None
    """None for what is done by itself: `best` of few candidates where losses can be had, else `block`."""
    metric: Metric | None
    protect: frozenset[int]
    candidates: tuple[Candidate, ...] | None = None
    """Strategies that `best` compares; None for those that it compares by itself."""
    heals: bool = False
    """Whether a map is to make up for each block, folded into the layer before it."""


class Site(Place, Protocol):
    """Where an operation stands in a recipe, and how it asks for a decision or a fact."""

    def choose(self, wish: Wish) -> tuple[Block, ...]:
        """Blocks within the budget, as the strategy chooses them."""

    def tensors(self, layer: LayerRef) -> tuple[str, ...]:
        """Names, in the source, of the tensors of a layer."""

    def outputs(self, layer: LayerRef) -> tuple[str, ...]:
        """Those of them that write to the residual stream; none when they are not known."""

    def heal(self, stack: Stack, blocks: Sequence[Block], ridge: float) -> Stack:
        """The stack without the blocks, with a map for each folded into the layer before it where that lowers the loss."""


class Operation(Record):
    """A change of the stack. `apply` sees the stack as the earlier steps left it, and returns the new one."""

    examples: ClassVar[tuple[str, ...]]
    """Lines of YAML, for the documentation."""

    @property
    def runs(self) -> bool:
        """Whether stacks have to be run to choose layers."""
        return False

    def apply(self, stack: Stack, site: Site) -> Stack:
        raise AssertionError("every operation says what it does")


class Chosen(Operation):
    """An operation on layers that are named (`at`), or chosen within a budget."""

    layers: Count | None = None
    """How many layers: a count, or a percentage of the stack rounded down. Which ones the strategy says."""
    at: Selectors | None = None
    """Which layers: indices, inclusive ranges "a-b", or {every, from, to}; negative ones count from the end."""
    strategy: StrategyName | None = None
    """How layers are chosen: docs/strategies.md says what each costs, and when to take which. If not set, `best` of `block`, `blocks` and
    `rank`, or `block` where no loss can be had; the plan says so then."""
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)] | None = None
    """Strategies that `best` compares; with `strategy: best` all but `evolve` if not set."""
    metric: MetricSpec | None = None
    """Metric that choices by distance go by here; the first metric of the recipe if not set."""
    protect: Selectors | None = None
    """Layers that are never chosen, written as for `at`."""

    budgets: ClassVar[tuple[str, ...]] = ("layers",)

    @model_validator(mode="after")
    def _one_way(self) -> Chosen:
        given = [key for key in (*self.budgets, "at") if getattr(self, key) is not None]
        if len(given) != 1:
            words = "'layers'" if len(self.budgets) == 1 else f"one of {', '.join(self.budgets)}"
            raise ValueError(f"takes either {words} (how many) or 'at' (which)")
        choosing = [key for key in ("strategy", "candidates", "metric", "protect") if key in self.model_fields_set]
        if self.at is not None and choosing:
            message = "with 'at' nothing is chosen: strategy, metric and protect go with a budget"
            raise PydanticCustomError("chosen", message, {"at": choosing[0]})
        if self.candidates is not None and self.strategy not in (None, "best"):
            raise PydanticCustomError("candidates", "'candidates' goes with strategy best", {"at": "candidates"})
        return self

    @property
    def runs(self) -> bool:
        """Whether stacks have to be run to choose layers."""
        return self.at is None and self._named is not None and isinstance(ALL[self._named], Search)

    @property
    def _named(self) -> StrategyName | None:
        """The strategy that is asked for; whoever names candidates wants them compared."""
        return "best" if self.candidates is not None else self.strategy

    def blocks(self, verb: Verb, stack: Stack, site: Site, build: Build, heals: bool = False) -> tuple[Block, ...]:
        """The blocks of positions that are meant. With `heals` none that is chosen has the first layer."""
        if self.at is not None:
            return blocks_of(positions(self.at, len(stack), site))
        budget = {key: value for key in self.budgets if (value := getattr(self, key)) is not None}
        safe = frozenset() if self.protect is None else frozenset(positions(self.protect, len(stack), site, "protect"))
        return site.choose(Wish(verb, stack, build, budget, self._named, self.metric, safe.union(range(heals)), self.candidates, heals))

    def cut(self, verb: Verb, stack: Stack, site: Site, ridge: float | None) -> Stack:
        """The stack without the layers that are meant; healed when a ridge is given, for which a layer has to stand before each block."""
        blocks = self.blocks(verb, stack, site, partial(without, stack), ridge is not None)
        left = without(stack, blocks)
        if not left:
            raise site.error(f"removes all {len(stack)} layers", "at")
        if ridge is not None and blocks and blocks[0].start == 0:
            raise site.error("no layer stands before layer 0 that a map could be folded into", "at", hint="prune it without a map")
        return left if ridge is None or not blocks else site.heal(stack, blocks, ridge)


class Prune(Chosen):
    """Remove layers: chosen by measurement within a budget, or named (`at`)."""

    params: ParameterCount | None = None
    """Remove as few layers as bring the model to at most so many parameters, for example `6B`."""
    size: Size | None = None
    """Remove as few layers as bring the weights to at most so many bytes, for example `12GB`."""
    max_distance: Annotated[Number, Field(gt=0)] | None = None
    """Remove as many layers as keep the total seam distance at or below this."""
    max_loss_increase: Increase | None = None
    """Remove as many layers as keep the loss on held-out text within so much more than before the step, for example `5%`."""
    heal: Literal["fold"] | None = None
    """Fold a fitted linear map for each block into the layer before it, where that lowers the loss on held-out text."""
    ridge: Ridge | None = None
    """How strongly the map is held to the plain cut, in units of the mean square of what the layer adds; 0.01 if not set."""

    budgets: ClassVar[tuple[str, ...]] = ("layers", "params", "size", "max_distance", "max_loss_increase")
    examples: ClassVar[tuple[str, ...]] = (
        "- prune: {layers: 6}                        # by distance, in three ways; the one that loses least on held-out text",
        "- prune: {layers: 6, strategy: block}       # the block of six that costs least; nothing is run to compare",
        "- prune: {layers: 25%, strategy: blocks, protect: [0, -1]}  # any blocks, never the first or the last layer",
        "- prune: {size: 12GB}                       # as few layers as bring the weights to 12 GB",
        "- prune: {max_distance: 0.2}                # as many as keep the seam that cheap",
        "- prune: {layers: 6, strategy: best}        # what more strategies choose, by loss too, is compared; it takes longer",
        "- prune: {max_loss_increase: 5%, strategy: greedy}  # as many as keep the loss within 5 %",
        "- prune: {layers: 6, heal: fold}            # a fitted linear map makes up for what is missing",
        '- prune: {at: [3, 7, "20-24"]}              # these layers; a dash is inclusive',
        "- prune: {at: {every: 2, from: 8, to: 24}}  # 8, 10, ... 24",
    )

    @property
    def runs(self) -> bool:
        """Whether stacks have to be run to choose layers."""
        return super().runs or self.max_loss_increase is not None or self.heal is not None

    @model_validator(mode="after")
    def _ridge(self) -> Prune:
        if self.ridge is not None and self.heal is None:
            raise PydanticCustomError("ridge", "'ridge' goes with heal: fold", {"at": "ridge"})
        return self

    def apply(self, stack: Stack, site: Site) -> Stack:
        return self.cut("remove", stack, site, None if self.heal is None else self.ridge or RIDGE)


class Keep(Operation):
    """Keep only the layers that are named, in the order of the stack."""

    at: Selectors
    """Layers to keep, written as for `prune`."""

    examples: ClassVar[tuple[str, ...]] = ('- keep: {at: ["0-11", "18-29"]}',)

    def apply(self, stack: Stack, site: Site) -> Stack:
        return tuple(stack[position] for position in sorted(positions(self.at, len(stack), site)))


class Duplicate(Chosen):
    """Repeat layers: each block of consecutive layers is followed by copies of itself."""

    times: int = Field(default=1, ge=1, le=1000, strict=True)
    """Number of copies."""

    examples: ClassVar[tuple[str, ...]] = (
        '- duplicate: {at: "10-20"}              # 10 to 20 run twice, one block after the other',
        "- duplicate: {at: [4, 8, 12], times: 2} # three layers, each run three times in a row",
        "- duplicate: {layers: 8}                # eight layers, chosen as for prune",
    )

    def apply(self, stack: Stack, site: Site) -> Stack:
        def repeated(blocks: Sequence[Block]) -> Stack:
            result: list[LayerRef] = []
            done = 0
            for block in blocks:
                result += [*stack[done : block.stop], *stack[block.start : block.stop] * self.times]
                done = block.stop
            return (*result, *stack[done:])

        return repeated(self.blocks("repeat", stack, site, repeated))


class Replace(Chosen):
    """Put a fitted linear map in the place of each block of consecutive layers: `prune` with `heal: fold`."""

    by: Literal["linear"] = Field(alias="with")
    """What stands in for a block: a linear map."""
    ridge: Ridge = RIDGE
    """How strongly the map is held to the plain cut, in units of the mean square of what the layer adds."""

    examples: ClassVar[tuple[str, ...]] = ("- replace: {layers: 4, with: linear}        # a fitted map for four layers",)

    @property
    def runs(self) -> bool:
        """Whether stacks have to be run: to fit and judge a map they have."""
        return True

    def apply(self, stack: Stack, site: Site) -> Stack:
        return self.cut("replace", stack, site, self.ridge)


class Expand(Operation):
    """Insert, after layers, copies of them that add nothing (LLaMA-Pro, arXiv 2401.02415).

    Their outputs to the residual stream are zeroed, so that the model computes the same until it is trained.
    """

    every: Annotated[int, Field(ge=1, strict=True)] | None = None
    """After every so many layers."""
    at: Selectors | None = None
    """After these layers, written as for `prune`."""

    examples: ClassVar[tuple[str, ...]] = ("- expand: {every: 4}                    # 40 layers from 32",)

    @model_validator(mode="after")
    def _one_way(self) -> Expand:
        if (self.every is None) == (self.at is None):
            raise ValueError("takes either 'every' or 'at'")
        return self

    def apply(self, stack: Stack, site: Site) -> Stack:
        if self.every is not None and self.every > len(stack):
            raise site.error(f"every {self.every} layers, but the stack has {len(stack)} here", "every")
        chosen = range((self.every or 1) - 1, len(stack), self.every or 1) if self.at is None else positions(self.at, len(stack), site)
        result: list[LayerRef] = []
        for position, layer in enumerate(stack):
            result.append(layer)
            if position in chosen:
                outputs = site.outputs(layer)
                if not outputs:
                    key = "at" if self.every is None else "every"
                    raise site.error(f"layer {position}: none of its tensors is known to write to the residual stream", key)
                zeros = tuple((Scaling(tensors=literal(name), by=0),) for name in outputs)
                result.append(layer.model_copy(update={"scalings": (*layer.scalings, *zeros), "identity": True}))
        return tuple(result)


class Merge(Operation):
    """Average layers into one, which stands where the first of them stood."""

    at: Selectors
    """Layers to average, written as for `prune`."""
    weights: tuple[Number, ...] | None = None
    """Weight of each layer, in the order written; they are divided by their sum. Equal if not set."""

    examples: ClassVar[tuple[str, ...]] = ("- merge: {at: [12, 13], weights: [0.5, 0.5]}",)

    def apply(self, stack: Stack, site: Site) -> Stack:
        chosen = positions(self.at, len(stack), site)
        weights = (1.0,) * len(chosen) if self.weights is None else self.weights
        if len(chosen) < 2:
            raise site.error("an average needs at least two layers", "at")
        if len(weights) != len(chosen):
            raise site.error(f"{len(weights)} weights for {len(chosen)} layers", "weights")
        if not abs(sum(weights)) > 1e-9:
            raise site.error("weights must not add up to zero", "weights")
        for position in chosen:
            if not stack[position].plain:
                raise site.error(f"layer {position} is not as its model has it: average before other arithmetic", "at")
        order = sorted(chosen)
        first = stack[order[0]]
        shares = tuple(
            Share(model=stack[p].model, index=stack[p].index, weight=w / sum(weights)) for p, w in zip(chosen, weights, strict=True)
        )  # fmt: skip
        row = all((stack[p].model, stack[p].index) == (first.model, first.index + n) for n, p in enumerate(order))
        merged = LayerRef(model=first.model, index=first.index, span=len(chosen) if row else 1, shares=shares)
        return tuple(merged if p == order[0] else layer for p, layer in enumerate(stack) if p == order[0] or p not in chosen)


class Scale(Operation):
    """Multiply tensors of layers by a factor."""

    at: Selectors | None = None
    """Layers, written as for `prune`; all if not set."""
    tensors: str = Field(min_length=1)
    """Pattern for the names that the tensors have in the source, such as `*.mlp.down_proj.weight`."""
    by: Number
    """Factor."""

    examples: ClassVar[tuple[str, ...]] = ('- scale: {at: "10-20", tensors: "*.mlp.down_proj.weight", by: 0.7}',)

    def apply(self, stack: Stack, site: Site) -> Stack:
        chosen = range(len(stack)) if self.at is None else positions(self.at, len(stack), site)
        return scaled(stack, chosen, Scaling(tensors=self.tensors, by=self.by), site)


class Zero(Operation):
    """Set tensors of layers to zero."""

    at: Selectors
    """Layers, written as for `prune`."""
    tensors: str = Field(min_length=1)
    """Pattern for the names that the tensors have in the source, such as `*.self_attn.o_proj.weight`."""

    examples: ClassVar[tuple[str, ...]] = ('- zero: {at: 12, tensors: "*.self_attn.o_proj.weight"}',)

    def apply(self, stack: Stack, site: Site) -> Stack:
        return scaled(stack, positions(self.at, len(stack), site), Scaling(tensors=self.tensors, by=0), site)


def scaled(stack: Stack, chosen: Sequence[int], scaling: Scaling, site: Site) -> Stack:
    """The stack with a factor on tensors of some layers. Raises when the pattern matches nothing."""
    result = list(stack)
    whole = [name for position in chosen for name in site.tensors(stack[position])]
    if not any(matches(scaling.tensors, name) for name in whole):
        near = [name for name in whole if matches(f"*{scaling.tensors.strip('*')}*", name)]
        ends = sorted({name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2] for name in whole})
        hint = f"a pattern is for whole names, such as {near[0]}" if near else f"there are {', '.join(ends[:12])}" if ends else None
        raise site.error(f"no tensor of these layers is named '{scaling.tensors}'", "tensors", hint=hint)
    for position in chosen:
        layer = stack[position].model_copy(update={"scalings": (*stack[position].scalings, (scaling,))})
        outputs = site.outputs(layer) if scaling.by == 0 else ()
        silent = bool(outputs) and all(factor(layer, name) == 0 for name in outputs)
        result[position] = layer.model_copy(update={"identity": layer.identity or silent})
    return tuple(result)


class Reorder(Operation):
    """Put the layers into another order; every one stands once."""

    to: Selectors
    """All layers in their new order, written as for `prune`."""

    examples: ClassVar[tuple[str, ...]] = ('- reorder: {to: [0, 2, 1, "3-29"]}',)

    def apply(self, stack: Stack, site: Site) -> Stack:
        order = positions(self.to, len(stack), site, "to")
        missing = [position for position in range(len(stack)) if position not in order]
        if missing:
            raise site.error(
                f"leaves out layer {missing[0]}{f' and {len(missing) - 1} more' * (len(missing) > 1)}", "to", hint="to drop layers use keep"
            )
        return tuple(stack[position] for position in order)


OPERATIONS: Mapping[str, type[Operation]] = {
    "prune": Prune,
    "keep": Keep,
    "duplicate": Duplicate,
    "expand": Expand,
    "merge": Merge,
    "replace": Replace,
    "scale": Scale,
    "zero": Zero,
    "reorder": Reorder,
}


def apply_all(stack: Stack, steps: Sequence[tuple[Operation, Site]]) -> Stack:
    """Apply operations in order."""
    for operation, site in steps:
        stack = operation.apply(stack, site)
        check_height(len(stack), site)
    return stack
