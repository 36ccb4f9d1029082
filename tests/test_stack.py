from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from layercut.stack import Block, Boundary, Fold, Joint, LayerRef, Run, Scaling, Share, Stack, blocks_of, joints, models_of, runs

DEPTHS = {"a": 6, "b": 4}


def stack(*names: str) -> Stack:
    """`stack("a0", "b3")` is layer 0 of a, then layer 3 of b."""
    return tuple(LayerRef(model=name[0], index=int(name[1:])) for name in names)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("a0 a1 a2 a3 a4 a5", []),
        ("a0 a1 a4 a5", [(2, "a", 2, "a", 4)]),
        ("a2 a3 a4 a5", [(0, "a", 0, "a", 2)]),
        ("a0 a1 a2 a3", [(4, "a", 4, "a", 6)]),
        ("a0 a1 a0 a1 a2 a3 a4 a5", [(2, "a", 2, "a", 0)]),
        ("a0 a1 a2 a3 a4 a5 a5", [(6, "a", 6, "a", 5)]),
        ("a1 a0 a2 a3 a4 a5", [(0, "a", 0, "a", 1), (1, "a", 2, "a", 0), (2, "a", 1, "a", 2)]),
        ("a0 a1 a2 b3", [(3, "a", 3, "b", 3)]),
        ("a0 b1 b2 b3", [(1, "a", 1, "b", 1)]),
        ("b1 a2", [(0, "b", 0, "b", 1), (1, "b", 2, "a", 2), (2, "a", 3, "a", 6)]),
        ("b3", [(0, "b", 0, "b", 3)]),
        ("a0", [(1, "a", 1, "a", 6)]),
    ],
)
def test_joints(layers: str, expected: list[tuple[int, str, int, str, int]]) -> None:
    found = list(joints(stack(*layers.split()), DEPTHS))
    assert found == [Joint(at, Boundary(m, i), Boundary(n, j)) for at, m, i, n, j in expected]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("a0 a1 a2", [("a", 0, 3)]),
        ("a0 a2 a3", [("a", 0, 1), ("a", 2, 4)]),
        ("a0 a1 b2 b3 a2", [("a", 0, 2), ("b", 2, 4), ("a", 2, 3)]),
        ("a1 a1", [("a", 1, 2), ("a", 1, 2)]),
        ("a2 a1 a0", [("a", 2, 3), ("a", 1, 2), ("a", 0, 1)]),
        ("a0 b1", [("a", 0, 1), ("b", 1, 2)]),
    ],
)
def test_runs(layers: str, expected: list[tuple[str, int, int]]) -> None:
    assert list(runs(stack(*layers.split()))) == [Run(*run) for run in expected]


def test_runs_of_nothing() -> None:
    assert runs(()) == ()


def test_a_run_is_written_half_open() -> None:
    assert str(Run("a", 3, 7)) == "[3, 7)"


def test_a_layer_that_adds_nothing_hands_on_the_state_that_it_gets() -> None:
    copy = LayerRef(model="a", index=2, identity=True)
    whole = stack("a0", "a1", "a2", "a3", "a4", "a5")
    assert list(joints((*whole[:3], copy, *whole[3:]), DEPTHS)) == []
    assert list(joints((copy, *whole, copy), DEPTHS)) == []
    assert list(joints((*whole[:2], copy, *whole[4:]), DEPTHS)) == [Joint(3, Boundary("a", 2), Boundary("a", 4))]
    assert list(joints((copy, *whole[1:]), DEPTHS)) == [Joint(1, Boundary("a", 0), Boundary("a", 1))]
    assert runs((*whole[:3], copy, *whole[3:])) == (Run("a", 0, 3), Run("a", 2, 3), Run("a", 3, 6))


def test_a_layer_that_stands_for_several_meets_its_neighbours_without_a_seam() -> None:
    whole = stack("a0", "a1", "a2", "a3", "a4", "a5")
    average = LayerRef(model="a", index=2, span=2, shares=(Share(model="a", index=2, weight=0.5), Share(model="a", index=3, weight=0.5)))
    assert list(joints((*whole[:2], average, *whole[4:]), DEPTHS)) == []
    assert list(joints((*whole[:2], average, *whole[3:]), DEPTHS)) == [Joint(3, Boundary("a", 4), Boundary("a", 3))]
    assert runs((*whole[:2], average, *whole[4:])) == (Run("a", 0, 2), Run("a", 2, 4), Run("a", 4, 6))


def test_silent_layers_at_the_ends_still_give_embeddings_and_head() -> None:
    """Embeddings come with the first layer, final norm and head with the last, whatever these layers add."""
    silent = {index: LayerRef(model="b", index=index, identity=True) for index in (0, 3)}
    whole = stack("a0", "a1", "a2", "a3", "a4", "a5")
    assert list(joints((silent[0], *whole), DEPTHS)) == [Joint(1, Boundary("b", 0), Boundary("a", 0))]
    assert list(joints((*whole, silent[3]), DEPTHS)) == [Joint(7, Boundary("a", 6), Boundary("b", 4))]
    assert list(joints((silent[0], silent[3]), DEPTHS)) == [Joint(2, Boundary("b", 0), Boundary("b", 4))]
    assert list(joints((), DEPTHS)) == []


def test_a_layer_with_a_map_stands_alone_and_keeps_its_seam() -> None:
    whole = stack("a0", "a1", "a2", "a3", "a4", "a5")
    fold = Fold(sha256="0" * 64, size=4, module="mlp.down_proj", tokens=1, ridge=0.01, explained=1)
    folded = whole[1].model_copy(update={"folds": (fold,)})
    assert list(joints((whole[0], folded, *whole[4:]), DEPTHS)) == [Joint(2, Boundary("a", 2), Boundary("a", 4))]
    assert runs((whole[0], folded, *whole[2:])) == (Run("a", 0, 1), Run("a", 1, 2), Run("a", 2, 6))
    assert not folded.plain and folded != whole[1]


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 63}, {"sha256": "G" * 64}, {"sha256": "0" * 64 + "\n"}, {"size": 0}, {"size": 1 << 20}])
def test_a_fold_names_its_file_by_its_digest(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Fold.model_validate({"sha256": "0" * 64, "size": 4, "module": "m", "tokens": 1, "ridge": 1, "explained": 1, **wrong})


def test_the_models_of_a_layer() -> None:
    assert models_of(LayerRef(model="a", index=0)) == ("a",)
    shares = (Share(model="b", index=0, weight=0.5), Share(model="c", index=1, weight=0.5))
    assert models_of(LayerRef(model="a", index=0, shares=shares)) == ("b", "c")


@given(st.sets(st.integers(0, 20)))
def test_blocks_are_maximal_and_hold_the_positions(positions: set[int]) -> None:
    blocks = blocks_of(sorted(positions, reverse=True))
    assert [p for block in blocks for p in range(block.start, block.stop)] == sorted(positions)
    assert all(one.stop < two.start for one, two in pairwise(blocks))
    assert all(block.start < block.stop for block in blocks)


def test_blocks_of_nothing() -> None:
    assert blocks_of([]) == ()
    assert blocks_of([3]) == (Block(3, 4),)


def test_plain_layers_are_byte_copies() -> None:
    assert LayerRef(model="a", index=0).plain
    assert not LayerRef(model="a", index=0, scalings=((Scaling(tensors="*", by=0.5),),)).plain
    assert not LayerRef(model="a", index=0, shares=(Share(model="a", index=0, weight=1),)).plain


layers = st.sampled_from([LayerRef(model=model, index=index) for model, depth in DEPTHS.items() for index in range(depth)])


@given(st.lists(layers, min_size=1, max_size=12).map(tuple))
def test_runs_are_the_stack_again_and_meet_at_seams(order: Stack) -> None:
    found = runs(order)
    assert tuple(LayerRef(model=run.model, index=index) for run in found for index in range(run.start, run.stop)) == order
    inner = [joint for joint in joints(order, DEPTHS) if 0 < joint.at < len(order)]
    assert len(inner) == len(found) - 1
    for joint, before, after in zip(inner, found, found[1:], strict=False):
        assert joint.source == Boundary(before.model, before.stop)
        assert joint.target == Boundary(after.model, after.start)


@given(st.lists(layers, min_size=1, max_size=12).map(tuple))
def test_seams_are_in_order_and_never_join_a_state_with_itself(order: Stack) -> None:
    found = list(joints(order, DEPTHS))
    assert [joint.at for joint in found] == sorted({joint.at for joint in found})
    assert all(joint.source != joint.target for joint in found)


def test_a_record_is_frozen_and_refuses_unknown_keys() -> None:
    layer = LayerRef(model="a", index=1)
    with pytest.raises(ValidationError, match="frozen"):
        layer.index = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="extra_forbidden"):
        LayerRef(model="a", index=1, depth=3)  # type: ignore[call-arg]
    assert hash(layer) == hash(LayerRef(model="a", index=1))
