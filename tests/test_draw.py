"""A draw of tokens: what is drawn depends on seed, sample and place alone, and the states are those of the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from layercut.draw import PLACES, Draw
from layercut.tokens import Sample

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def state_of(number: int, place: int, boundary: int) -> list[float]:
    """A state that says where it comes from."""
    return [float(number), float(place), float(boundary)]


def states_of(batch: Sequence[Sample], rows: torch.Tensor) -> list[torch.Tensor]:
    places = rows.nonzero().tolist()
    found = [[state_of(batch[row].number, place, boundary) for row, place in places] for boundary in range(2)]
    return [torch.tensor(each).reshape(-1, 3) for each in found]


def full(batch: Sequence[Sample]) -> torch.Tensor:
    width = max(len(sample.ids) for sample in batch)
    return torch.tensor([[place < len(sample.ids) for place in range(width)] for sample in batch], dtype=torch.bool).reshape(
        len(batch), width
    )


def feed(draw: Draw, batch: Sequence[Sample]) -> None:
    if not full(batch).any():
        return
    rows = draw.choose(batch, full(batch))
    draw.add(batch, rows, states_of(batch, rows))


def keys(draw: Draw, size: int | None = None) -> list[tuple[int, int]]:
    """The tokens drawn, after checking that their states are their own."""
    drawn, owners = draw.drawn(size or draw.size, CPU)
    states = list(drawn)
    if not states:
        return []
    found = [(int(number), int(place)) for number, place, _ in states[0].tolist()]
    for boundary, state in enumerate(states):
        assert state.tolist() == [state_of(number, place, boundary) for number, place in found]
    assert owners.tolist() == [number for number, _ in found]
    return found


def samples(lengths: Sequence[int]) -> list[Sample]:
    return [Sample(number, [7] * length) for number, length in enumerate(lengths)]


@given(LENGTHS, st.integers(1, 30), st.integers(1, 4), st.randoms())
def test_batches_and_their_order_change_nothing(lengths: list[int], size: int, step: int, random: object) -> None:
    whole = Draw(size, 0)
    feed(whole, samples(lengths))
    parts = Draw(size, 0)
    shuffled = samples(lengths)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for start in range(0, len(shuffled), step):
        feed(parts, shuffled[start : start + step])
    assert keys(whole) == keys(parts) == sorted(keys(whole))
    assert len(keys(whole)) == min(size, sum(lengths))


@given(LENGTHS, st.integers(1, 30))
def test_choosing_all_before_adding_any(lengths: list[int], size: int) -> None:
    batches = [[sample] for sample in samples(lengths) if sample.ids]
    late = Draw(size, 0)
    rows = [late.choose(batch, full(batch)) for batch in batches]
    for batch, row in zip(batches, rows, strict=True):
        late.add(batch, row, states_of(batch, row))
    soon = Draw(size, 0)
    for batch in batches:
        feed(soon, batch)
    assert keys(late) == keys(soon)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 8), st.integers(0, 8))
def test_merging_equals_one_draw(lengths: list[int], size: int, one: int, two: int) -> None:
    first, second = sorted((one, two))
    total = Draw(size, 0)
    for part in (samples(lengths)[:first], samples(lengths)[first:second], samples(lengths)[second:]):
        other = Draw(size, 0)
        if part:
            feed(other, part)
        total.merge(other.state())
    whole = Draw(size, 0)
    feed(whole, samples(lengths))
    assert keys(total) == keys(whole)


@given(LENGTHS, st.integers(1, 20), st.integers(1, 20))
def test_a_smaller_draw_is_part_of_a_larger_one(lengths: list[int], one: int, two: int) -> None:
    small, large = sorted((one, two))
    whole, less = Draw(large, 0), Draw(small, 0)
    feed(whole, samples(lengths))
    feed(less, samples(lengths))
    assert keys(whole, small) == keys(less)
    assert set(keys(less)) <= set(keys(whole))


def test_the_seed_decides() -> None:
    drawn = []
    for seed in (0, 0, 1):
        draw = Draw(10, seed)
        feed(draw, samples([40, 40]))
        drawn.append(keys(draw))
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_token_has_the_same_chance() -> None:
    counts = torch.zeros(2, 20)
    for seed in range(600):
        draw = Draw(10, seed)
        feed(draw, samples([20, 20]))
        for number, place in keys(draw):
            counts[number, place] += 1
    # 600 draws of 10 of 40 tokens: 150 each, with a spread of sqrt(600 * 1/4 * 3/4) = 10.6
    assert (counts - 150).abs().max() < 4.5 * 10.6
    assert abs(float(counts[0].sum()) - 3000) < 4.5 * 10.6 * 20**0.5


def test_tokens_that_are_not_offered_are_not_drawn() -> None:
    batch = samples([6, 4])
    offered = full(batch)
    offered[:, 0] = False
    draw = Draw(100, 0)
    rows = draw.choose(batch, offered)
    assert torch.equal(rows, offered)
    draw.add(batch, rows, states_of(batch, rows))
    assert keys(draw) == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 1), (1, 2), (1, 3)]


def test_states_keep_their_dtype() -> None:
    batch = samples([5])
    draw = Draw(3, 0)
    rows = draw.choose(batch, full(batch))
    draw.add(batch, rows, [state.bfloat16() for state in states_of(batch, rows)])
    state = draw.state()
    assert sorted(state) == ["keys", "priorities", "state00000", "state00001"]
    assert (state["state00000"].dtype, state["state00000"].shape) == (torch.bfloat16, (3, 3))
    assert state["keys"].tolist() == sorted(place for _, place in keys(draw))
    assert {each.dtype for each in draw.drawn(3, CPU).states} == {torch.bfloat16}
    assert PLACES > 1 << 31


def test_nothing_was_seen() -> None:
    draw = Draw(4, 0)
    assert draw.drawn(4, CPU).owners.tolist() == []
    assert draw.state()["keys"].tolist() == []
    other = Draw(4, 0)
    other.merge(draw.state())
    feed(other, samples([2]))
    assert keys(other) == [(0, 0), (0, 1)]
