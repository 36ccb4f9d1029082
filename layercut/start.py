"""The start of a plan: the models that a recipe names, opened, and the slices that make its first stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from layercut.architecture import Member, find_stack
from layercut.boundaries import Window, least_length
from layercut.checkpoint import Checkpoint
from layercut.errors import LayercutError, RecipeError, did_you_mean
from layercut.recipe import Recipe, Slice
from layercut.scalings import Groups, Parameters, slice_scalings
from layercut.selectors import check_height, positions
from layercut.stack import LayerRef, Stack

Resolve = Callable[[str], Checkpoint]


class Named(NamedTuple):
    """A model by the name that the recipe uses, and where it stands."""

    alias: str
    path: tuple[str | int, ...]


def open_members(recipe: Recipe, resolve: Resolve) -> dict[str, Member]:
    """Open every model of the recipe, the slices' first. A model goes by its alias, or else by its reference.

    An error names the place in the recipe where the model stands.
    """
    members: dict[str, Member] = {}
    for alias in dict.fromkeys(named.alias for named in _named(recipe)):
        with placed(recipe, alias):
            checkpoint = resolve(recipe.models.get(alias, alias))
            members[alias] = Member(checkpoint, find_stack(checkpoint, recipe.stack_of(alias), recipe.architecture))
    return members


@contextmanager
def placed(recipe: Recipe, alias: str) -> Iterator[None]:
    """Errors that come of a model name the place in the recipe where the model stands first."""
    try:
        yield
    except LayercutError as error:
        path = next(named.path for named in _named(recipe) if named.alias == alias)
        where = recipe.where(*path) + (f": {error.where}" if error.where else "")
        near = None if alias in recipe.models else did_you_mean(alias, recipe.models)
        raise type(error)(error.message, where=where, hint=near or error.hint) from None


def _named(recipe: Recipe) -> list[Named]:
    if recipe.slices is None:
        assert recipe.model is not None
        found = [Named(recipe.model, ("model",))]
    else:
        found = [
            Named(model_of(recipe, number, part), ("slices", number, *part.path, "model")) for number, part in enumerate(recipe.slices)
        ]
    if recipe.base_model is not None:
        found.append(Named(recipe.base_model, ("base_model",)))
    if recipe.tokenizer_source not in (None, "base", "union"):
        assert recipe.tokenizer_source is not None
        found.append(Named(recipe.tokenizer_source, ("tokenizer_source",)))
    return found


def givers(recipe: Recipe, members: Mapping[str, Member]) -> dict[str, Member]:
    """Models that layers are taken from, in the order of the slices."""
    if recipe.slices is None:
        return dict([next(iter(members.items()))])
    named = dict.fromkeys(model_of(recipe, number, part) for number, part in enumerate(recipe.slices))
    return {alias: members[alias] for alias in named}


def model_of(recipe: Recipe, number: int, part: Slice) -> str:
    name = part.source.model or recipe.model
    if name is None:
        raise RecipeError("which model? neither the slice nor the recipe names one", where=recipe.where("slices", number))
    return name


class _Spot(NamedTuple):
    """A place in a recipe, for errors of selectors."""

    recipe: Recipe
    path: tuple[str | int, ...]

    def error(self, message: str, *path: str | int, hint: str | None = None) -> LayercutError:
        return RecipeError(message, where=self.recipe.where(*self.path, *path), hint=hint)


def find_windows(recipe: Recipe, members: Mapping[str, Member]) -> list[Window]:
    """The slices with the boundaries that are known and the constraints on those that are not. RecipeError when one leaves its model."""
    assert recipe.slices is not None
    windows: list[Window] = []
    for number, part in enumerate(recipe.slices):
        windows.append(_window(recipe, number, part, members))
        if part.overlap is not None and (number == 0 or windows[number - 1].model != windows[number].model):
            raise RecipeError("'overlap' needs a slice of the same model before it", where=recipe.where("slices", number, "overlap"))
    return windows


def _window(recipe: Recipe, number: int, part: Slice, members: Mapping[str, Member]) -> Window:
    model, (start, stop) = model_of(recipe, number, part), part.source.layer_range
    full = members[model].stack.depth
    where = recipe.where("slices", number, *part.path, "layer_range")
    for place, bound in enumerate((start, stop)):
        if isinstance(bound, int) and bound > full - 1 + place:
            message = f"layer_range [{start}, {stop}] leaves the model, which has {full} layers"
            raise RecipeError(message, where=where, hint=f"the largest range is [0, {full}]")
    ends = [None if bound == "auto" else full if bound == "end" else bound for bound in (start, stop)]
    holds = () if part.protect is None else tuple(positions(part.protect, full, _Spot(recipe, ("slices", number)), "protect"))
    window = Window(model, ends[0], ends[1], part.least, part.most, holds, part.overlap)
    if None not in ends and (part.least, part.most, part.overlap, part.protect) != (None,) * 4:
        raise RecipeError("min, max, overlap and protect go with an 'auto' boundary", where=where)
    if not window.lengths(full, 0) or not window.starts(full) or not window.stops(full):
        raise RecipeError("no range satisfies the constraints of this slice", where=where)
    return window


def reachable_depth(recipe: Recipe, windows: Sequence[Window], members: Mapping[str, Member]) -> int:
    """The depth that the slices must have in all. Raises RecipeError when they cannot have it."""
    least = least_length(windows)
    lengths = [window.lengths(members[window.model].stack.depth, least) for window in windows]
    low, high = max(1, sum(span.start for span in lengths)), sum(span.stop - 1 for span in lengths)
    if recipe.depth is None:
        if low != high:
            where = recipe.where("slices")
            raise RecipeError("'auto' boundaries need a target 'depth'", where=where, hint=f"these slices can hold {low} to {high} layers")
        return low
    if not low <= recipe.depth <= high:
        reach = f"exactly {low}" if low == high else f"{low} to {high}"
        raise RecipeError(f"depth {recipe.depth} cannot be reached: the slices hold {reach} layers", where=recipe.where("depth"))
    return recipe.depth


def stack_of(recipe: Recipe, bounds: Sequence[tuple[str, int, int]]) -> Stack:
    """The stack of slices with known boundaries, with the factors that `parameters` give to each layer."""
    found: list[LayerRef] = []
    check_height(sum(stop - start for _, start, stop in bounds), _Spot(recipe, ("slices",)))
    for number, (model, start, stop) in enumerate(bounds):
        for index in range(start, stop):
            scalings = slice_scalings(_levels(recipe, number), index - start, stop - start)
            found.append(LayerRef(model=model, index=index, scalings=scalings))
    return tuple(found)


def end_scalings(recipe: Recipe) -> tuple[Groups, Groups]:
    """Factors for what stands before the stack, by the first slice, and behind it, by the last."""
    last = 0 if recipe.slices is None else len(recipe.slices) - 1
    return slice_scalings(_levels(recipe, 0), 0, 2), slice_scalings(_levels(recipe, last), 0, 2)


def _levels(recipe: Recipe, number: int) -> list[Parameters | None]:
    if recipe.slices is None:
        return [recipe.parameters]
    part = recipe.slices[number]
    return [part.source.parameters, part.parameters, recipe.parameters]
