from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from layercut.errors import LayercutError, RecipeError
from layercut.metrics import Cosine, Metric
from layercut.operations import OPERATIONS, Duplicate, Every, Keep, Operation, Prune, Selectors, apply_all, count_of, positions
from layercut.stack import LayerRef, Stack

SELECTORS: TypeAdapter[Any] = TypeAdapter(Selectors)


class Site:
    """Answers for the planner: takes the start it was told, and remembers what it was asked."""

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.asked: list[tuple[int, int, Metric | None, str]] = []
        self.built: list[Stack] = []

    def error(self, message: str, *path: str | int, hint: str | None = None) -> LayercutError:
        return RecipeError(message, where=".".join(map(str, path)), hint=hint)

    def block(self, length: int, count: int, build: Callable[[int], Stack], metric: Metric | None, verb: str) -> int:
        self.asked.append((length, count, metric, verb))
        self.built = [build(start) for start in range(count)]
        return self.start


def whole(depth: int) -> Stack:
    return tuple(LayerRef(model="m", index=index) for index in range(depth))


def indices(stack: Stack) -> list[int]:
    return [layer.index for layer in stack]


def chosen(at: Any, depth: int = 10) -> list[int]:
    return positions(SELECTORS.validate_python(at), depth, Site())


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (3, [3]),
        (0, [0]),
        (-1, [9]),
        (-10, [0]),
        ("3", None),
        ("2-4", [2, 3, 4]),
        ("4-4", [4]),
        ("0-9", list(range(10))),
        ("-4--1", [6, 7, 8, 9]),
        ("7--2", [7, 8]),
        ("-10-1", [0, 1]),
        ({"every": 2}, [0, 2, 4, 6, 8]),
        ({"every": 3, "from": 1}, [1, 4, 7]),
        ({"every": 2, "from": 2, "to": 6}, [2, 4, 6]),  # `to` is inclusive
        ({"every": 2, "from": 2, "to": 5}, [2, 4]),
        ({"every": 1, "to": 3}, [0, 1, 2, 3]),
        ({"every": 4, "from": -5, "to": -1}, [5, 9]),
        ({"every": 99}, [0]),
        ([5, 1, 3], [5, 1, 3]),
        ([7, "0-2", {"every": 2, "from": 4, "to": 6}, -1], [7, 0, 1, 2, 4, 6, 9]),
        ([2], [2]),
    ],
)
def test_selectors(at: Any, expected: list[int] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="expected a layer such as 3, a range such as"):
            chosen(at)
    else:
        assert chosen(at) == expected


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (10, "at: layer 10 does not exist: the stack has layers 0 to 9 here"),
        (-11, "at: layer -11 does not exist: the stack has layers 0 to 9 here"),
        ([0, 10], "at.1: layer 10 does not exist: the stack has layers 0 to 9 here"),
        ("8-10", "at: layer 10 does not exist: the stack has layers 0 to 9 here"),
        ("-12-3", "at: layer -12 does not exist: the stack has layers 0 to 9 here"),
        ("0-999999999", "at: layer 999999999 does not exist: the stack has layers 0 to 9 here"),
        ({"every": 1, "to": 10}, "at: layer 10 does not exist: the stack has layers 0 to 9 here"),
        ({"every": 1, "from": -99}, "at: layer -99 does not exist: the stack has layers 0 to 9 here"),
        ({"every": 1, "from": 10**30, "to": 10**40}, f"at: layer {10**40} does not exist: the stack has layers 0 to 9 here"),
        ("5-3", "at: the range 5 to 3 is empty: it ends before it starts"),
        ("-1--4", "at: the range 9 to 6 is empty: it ends before it starts"),
        ({"every": 2, "from": 6, "to": 4}, "at: the range 6 to 4 is empty: it ends before it starts"),
        ([3, 3], "at.1: layer 3 is named twice"),
        ([9, -1], "at.1: layer 9 is named twice"),
        (["2-5", 0, "4-6"], "at.2: layer 4 is named twice"),
    ],
)
def test_selectors_that_cannot_be(at: Any, message: str) -> None:
    assert refusal(lambda: chosen(at)) == message


def test_no_selector_names_no_layer() -> None:
    assert refusal(lambda: positions((), 10, Site())) == "at: names no layer"


@given(st.integers(1, 30), st.data())
def test_a_range_is_what_its_ends_say(depth: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, depth - 1))
    last = data.draw(st.integers(first, depth - 1))
    step = data.draw(st.integers(1, depth))
    expected = [position for position in range(depth) if first <= position <= last]
    assert chosen(f"{first}-{last}", depth) == expected
    assert chosen(f"{first - depth}-{last - depth}", depth) == expected
    assert chosen({"every": step, "from": first, "to": last}, depth) == [p for p in expected if (p - first) % step == 0]


@pytest.mark.parametrize(
    ("layers", "depth", "count"),
    [(6, 10, 6), ("25%", 32, 8), ("25%", 30, 7), ("100%", 7, 7), ("10%", 10, 1), ("33.3%", 3, None), ("33.4%", 3, 1), ("0.1%", 1000, 1)],
)
def test_counts(layers: int | str, depth: int, count: int | None) -> None:
    if count is None:
        assert refusal(lambda: count_of(layers, depth, Site())) == "layers: 33.3% of 3 layers is less than one layer"
    else:
        assert count_of(layers, depth, Site()) == count


@given(st.integers(1, 300), st.integers(1, 1000))
def test_percentages_are_exact(depth: int, tenths: int) -> None:
    exact = depth * tenths // 1000
    text = f"{tenths // 10}.{tenths % 10}%"
    if exact:
        assert count_of(text, depth, Site()) == exact
    else:
        assert refusal(lambda: count_of(text, depth, Site())) == f"layers: {text} of {depth} layers is less than one layer"


def make(name: str, **fields: Any) -> Operation:
    return OPERATIONS[name].model_validate(fields)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (make("prune", at=0), [1, 2, 3, 4, 5]),
        (make("prune", at=[-1, "1-2"]), [0, 3, 4]),
        (make("prune", at={"every": 2}), [1, 3, 5]),
        (make("keep", at=["4-5", "0-1"]), [0, 1, 4, 5]),  # in the order of the stack
        (make("keep", at="0-5"), [0, 1, 2, 3, 4, 5]),
        (make("keep", at=3), [3]),
        (make("duplicate", at=2), [0, 1, 2, 2, 3, 4, 5]),
        (make("duplicate", at="1-3"), [0, 1, 2, 3, 1, 2, 3, 4, 5]),
        (make("duplicate", at="0-1", times=3), [0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 4, 5]),
        (make("duplicate", at=[0, 2, 3, 5]), [0, 0, 1, 2, 3, 2, 3, 4, 5, 5]),
        (make("duplicate", at=[3, 2]), [0, 1, 2, 3, 2, 3, 4, 5]),  # consecutive whatever the order they are written in
        (make("duplicate", at="0-5"), [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]),
        (make("duplicate", at={"every": 1, "from": 4}, times=2), [0, 1, 2, 3, 4, 5, 4, 5, 4, 5]),
    ],
)
def test_named_layers(operation: Operation, expected: list[int]) -> None:
    site = Site()
    assert indices(operation.apply(whole(6), site)) == expected
    assert site.asked == []
    assert not operation.measured


def test_positions_are_those_of_the_stack_not_of_the_model() -> None:
    stack = make("prune", at="0-1").apply(whole(6), Site())
    assert indices(make("prune", at=0).apply(stack, Site())) == [3, 4, 5]
    doubled = make("duplicate", at="0-1").apply(whole(4), Site())
    assert indices(make("keep", at=[2, 3]).apply(doubled, Site())) == [0, 1]


@pytest.mark.parametrize("start", range(5))
def test_prune_removes_the_block_that_the_site_chooses(start: int) -> None:
    site = Site(start)
    operation = make("prune", layers=2, metric="cosine")
    assert operation.measured
    assert indices(operation.apply(whole(6), site)) == [index for index in range(6) if not start <= index < start + 2]
    assert site.asked == [(2, 5, Cosine(), "remove")]
    assert [indices(stack) for stack in site.built] == [[i for i in range(6) if not s <= i < s + 2] for s in range(5)]


@pytest.mark.parametrize("start", range(4))
def test_duplicate_repeats_the_block_that_the_site_chooses(start: int) -> None:
    site = Site(start)
    operation = make("duplicate", layers="50%", times=2)
    assert operation.measured
    block = [start, start + 1, start + 2]
    assert indices(operation.apply(whole(6), site)) == [*range(start), *block, *block, *block, *range(start + 3, 6)]
    assert site.asked == [(3, 4, None, "repeat")]
    assert len(site.built) == 4


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (make("prune", at="0-5"), "at: removes all 6 layers"),
        (make("prune", layers=6), "layers: cannot remove 6 of 6 layers; at most 5"),
        (make("prune", layers=10**30), f"layers: cannot remove {10**30} of 6 layers; at most 5"),
        (make("prune", layers="1%"), "layers: 1% of 6 layers is less than one layer"),
        (make("duplicate", layers=7), "layers: cannot repeat 7 of 6 layers; at most 6"),
        (make("keep", at=[0, 6]), "at.1: layer 6 does not exist: the stack has layers 0 to 5 here"),
        (make("duplicate", at=[0, 0]), "at.1: layer 0 is named twice"),
    ],
)
def test_operations_that_cannot_be(operation: Operation, message: str) -> None:
    assert refusal(lambda: operation.apply(whole(6), Site())) == message


def test_the_whole_stack_can_be_repeated() -> None:
    assert indices(make("duplicate", layers=3).apply(whole(3), Site(0))) == [0, 1, 2, 0, 1, 2]


@given(st.integers(1, 12), st.data())
def test_pruning_the_copies_undoes_duplicate(depth: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, depth - 1))
    last = data.draw(st.integers(first, depth - 1))
    times = data.draw(st.integers(1, 3))
    doubled = Duplicate(at=f"{first}-{last}", times=times).apply(whole(depth), Site())
    length = last - first + 1
    assert len(doubled) == depth + times * length
    assert Prune(at=f"{last + 1}-{last + times * length}").apply(doubled, Site()) == whole(depth)
    assert Prune(at=f"{first}-{first + times * length - 1}").apply(doubled, Site()) == whole(depth)


@given(st.integers(1, 12))
def test_keeping_all_is_the_identity(depth: int) -> None:
    for at in (f"0-{depth - 1}", f"{-depth}--1", Every(every=1), tuple(range(depth))):
        assert Keep(at=at).apply(whole(depth), Site()) == whole(depth)


@given(st.integers(2, 12), st.data())
def test_prune_and_keep_are_complements(depth: int, data: st.DataObject) -> None:
    some = data.draw(st.lists(st.integers(0, depth - 1), min_size=1, max_size=depth - 1, unique=True))
    rest = tuple(position for position in range(depth) if position not in some)
    assert Prune(at=tuple(some)).apply(whole(depth), Site()) == Keep(at=rest).apply(whole(depth), Site())


def test_apply_all_goes_in_order() -> None:
    steps = [(make("prune", at=0), Site()), (make("duplicate", at=0), Site()), (make("prune", at=-1), Site())]
    assert indices(apply_all(whole(4), steps)) == [1, 1, 2]
    assert apply_all(whole(4), []) == whole(4)


def test_every_operation_says_what_it_does() -> None:
    for name, kind in OPERATIONS.items():
        assert kind.__name__.lower() == name
        assert kind.__doc__ and kind.__doc__[0].isupper()
        assert all(field.description for field in kind.model_fields.values())
