"""Accumulators on made-up states: tables against plain loops, tokens that count, merging, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import failure
from hypothesis import given, settings
from hypothesis import strategies as st

from layercut import accumulators
from layercut.accumulators import Accumulators, Model
from layercut.errors import CalibrationError, CheckpointError, LayercutError, RefusedError
from layercut.metrics import CKA, Angular, Cosine, Euclidean, Linear, Metric, Procrustes, RelativeMagnitude
from layercut.plan import Table
from layercut.tokens import Sample

torch.set_num_threads(1)

ONE = (Model("m", 3, torch.float32),)
TWO = (Model("a", 3, torch.float32), Model("b", 1, torch.bfloat16))
TOKENWISE: tuple[Metric, ...] = (
    Angular(),
    Cosine(),
    RelativeMagnitude(),
    Euclidean(token="skip-first-2"),
    Euclidean(token=0, normalised=True),
)
ALL: tuple[Metric, ...] = (*TOKENWISE, Linear(), Procrustes(draw=16), CKA(draw=64), CKA(draw=20, token="all"))
SAMPLES = [Sample(number, [7] * length) for number, length in enumerate([5, 3, 9, 4, 9, 7])]
HIDDEN = 6


def state_of(number: int, place: int, boundary: int, hidden: int = HIDDEN) -> torch.Tensor:
    """A state that depends on sample, place and boundary alone; each boundary adds to the one before."""
    parts = [
        torch.randn(hidden, generator=torch.Generator().manual_seed(1000 * number + 10 * place + step + 1)) for step in range(boundary + 1)
    ]
    return torch.stack(parts).sum(0)


def states_of(batch: Sequence[Sample], rows: torch.Tensor, sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    places = [(batch[row].number, place) for row, place in rows.nonzero().tolist()]
    return [
        torch.stack([state_of(number, place, boundary, hidden) for number, place in places] or [torch.zeros(hidden)])[: len(places)].to(
            dtype
        )
        for boundary, hidden in enumerate(sizes)
    ]


def feed(total: Accumulators, batch: Sequence[Sample], sizes: Sequence[int] = (HIDDEN,) * 4) -> None:
    rows = total.choose(batch)
    total.add(batch, rows, states_of(batch, rows, sizes))


def fed(metrics: Sequence[Metric], samples: Sequence[Sample] = SAMPLES, models: Sequence[Model] = ONE, step: int = 2) -> Accumulators:
    total = Accumulators(models, metrics)
    sizes = [HIDDEN] * sum(model.depth + 1 for model in models)
    for start in range(0, len(samples), step):
        feed(total, samples[start : start + step], sizes)
    return total


def same(one: Sequence[Table], two: Sequence[Table], within: float = 1e-12) -> bool:
    assert [(t.metric, t.a, t.b) for t in one] == [(t.metric, t.a, t.b) for t in two]
    return all(
        abs(x - y) <= within
        for a, b in zip(one, two, strict=True)
        for left, right in ((a.mean, b.mean), (a.stderr, b.stderr))
        for row, other in zip(left, right, strict=True)
        for x, y in zip(row, other, strict=True)
    )


def distance(metric: Metric, x: list[float], y: list[float]) -> float:
    long_x, long_y, dot = math.hypot(*x), math.hypot(*y), math.fsum(a * b for a, b in zip(x, y, strict=True))
    if isinstance(metric, Angular):
        return math.acos(max(-1.0, min(1.0, dot / long_x / long_y))) / math.pi
    if isinstance(metric, Cosine):
        return 1 - dot / long_x / long_y
    if isinstance(metric, Euclidean) and metric.normalised:
        return math.dist([a / long_x for a in x], [b / long_y for b in y])
    return math.dist(x, y) / (long_y if isinstance(metric, RelativeMagnitude) else 1)


PLACES: dict[Any, Any] = {"last": lambda n: [n - 1], "all": range, "skip-first-2": lambda n: range(2, n), 0: lambda n: [0]}


def test_single_token_metrics_equal_plain_loops() -> None:
    tables = fed(TOKENWISE).tables()
    assert [table.metric for table in tables] == [metric.label for metric in TOKENWISE]
    for metric, table in zip(TOKENWISE, tables, strict=True):
        for i in range(4):
            for j in range(i, 4):
                sums, counts = [], []
                for sample in SAMPLES:
                    pairs = [
                        [state_of(sample.number, at, boundary).double().tolist() for boundary in (i, j)]
                        for at in PLACES[metric.token](len(sample.ids))
                    ]
                    sums.append(math.fsum(distance(metric, x, y) for x, y in pairs))
                    counts.append(len(pairs))
                mean = sum(sums) / sum(counts)
                spread = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
                assert table.mean[i][j] == table.mean[j][i] == pytest.approx(mean, abs=1e-6)
                assert table.stderr[i][j] == table.stderr[j][i] == pytest.approx(math.sqrt(6 / 5 * spread) / sum(counts), abs=1e-6)


def test_drawn_tokens_are_those_that_count() -> None:
    """All tokens fit into the draw: the scores are those of all tokens but the first of each sample, in any order."""
    table = fed([CKA(draw=64)]).tables()[0]
    places = [(sample.number, place) for sample in SAMPLES for place in range(1, len(sample.ids))]
    states = [torch.stack([state_of(*place, boundary) for place in places]).double() for boundary in range(4)]
    wanted = torch.ones(4, 4, dtype=torch.bool).triu(1)
    value, stderr = CKA().compare(states, torch.tensor([number for number, _ in places]), wanted)
    for i in range(4):
        for j in range(i + 1, 4):
            assert table.mean[i][j] == table.mean[j][i] == pytest.approx(value[i, j].item(), abs=1e-12)
            assert table.stderr[i][j] == table.stderr[j][i] == pytest.approx(stderr[i, j].item(), abs=1e-12)
    assert {table.mean[i][i] for i in range(4)} == {0.0}


@settings(max_examples=25)
@given(st.permutations(SAMPLES), st.integers(1, 6))
def test_batches_and_their_order_change_nothing(samples: list[Sample], step: int) -> None:
    assert same(fed(ALL, samples, step=step).tables(), fed(ALL).tables(), 1e-9)


def test_choosing_all_before_adding_any() -> None:
    # what a schedule does that runs layer by layer
    total = Accumulators(ONE, ALL)
    batches = [SAMPLES[:3], SAMPLES[3:]]
    rows = [total.choose(batch) for batch in batches]
    for batch, row in zip(batches, rows, strict=True):
        total.add(batch, row, states_of(batch, row, [HIDDEN] * 4))
    assert same(total.tables(), fed(ALL).tables())


@settings(max_examples=25)
@given(st.permutations(SAMPLES), st.integers(0, 6), st.integers(0, 6))
def test_merging_what_processes_gathered(samples: list[Sample], one: int, two: int) -> None:
    first, second = sorted((one, two))
    total = Accumulators(ONE, ALL)
    for part in (samples[:first], samples[first:second], samples[second:]):  # a process may have seen nothing
        state = fed(ALL, part).state()
        assert all(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in state.values())
        total.merge(state)
    assert same(total.tables(), fed(ALL).tables(), 1e-9)


def test_only_what_is_wanted_is_chosen() -> None:
    batch = [SAMPLES[0], SAMPLES[1]]
    assert Accumulators(ONE, [Angular()]).choose(batch).nonzero().tolist() == [[0, 4], [1, 2]]
    assert Accumulators(ONE, [Angular(), Cosine(token=0)]).choose(batch).nonzero().tolist() == [[0, 0], [0, 4], [1, 0], [1, 2]]
    assert Accumulators(ONE, [CKA()]).choose(batch).nonzero().tolist() == [[0, 1], [0, 2], [0, 3], [0, 4], [1, 1], [1, 2]]
    drawn = Accumulators(ONE, [CKA(draw=16)])
    assert sum(int(drawn.choose([sample]).sum()) for sample in SAMPLES) < 31  # the later of them only if their priority is less
    assert Accumulators(ONE, ALL).choose(batch).sum() == 8


def test_completions() -> None:
    samples = [Sample(0, [1] * 4, (False, True, True, False)), Sample(1, [1] * 3, (False,) * 3), Sample(2, [1] * 2, (True, True))]
    table = fed([Cosine(token="completion"), CKA(token="completion")], samples).tables()[0]
    places = [(0, 1), (0, 2), (2, 0), (2, 1)]  # a sample without any does not count
    pairs = [[state_of(*place, boundary).double().tolist() for boundary in (0, 2)] for place in places]
    assert table.mean[0][2] == pytest.approx(sum(distance(Cosine(), x, y) for x, y in pairs) / 4, abs=1e-9)
    sums = [sum(distance(Cosine(), x, y) for x, y in part) for part in (pairs[:2], pairs[2:])]
    mean = sum(sums) / 4
    assert table.stderr[0][2] == pytest.approx(math.sqrt(2 * sum((s - 2 * mean) ** 2 for s in sums)) / 4, abs=1e-9)


def test_small_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fed(TOKENWISE).tables()
    monkeypatch.setattr(accumulators, "CHUNK_BYTES", 8 * 4 * HIDDEN * 3)  # three tokens at a time
    assert same(fed(TOKENWISE).tables(), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_states_of_any_dtype(dtype: torch.dtype) -> None:
    total, exact = Accumulators(ONE, ALL), Accumulators(ONE, ALL)
    for each, kind in ((total, dtype), (exact, torch.float64)):
        rows = each.choose(SAMPLES)
        each.add(SAMPLES, rows, [state.to(kind) for state in states_of(SAMPLES, rows, [HIDDEN] * 4, dtype)])
    assert same(total.tables(), exact.tables())


def test_rows_of_pads_only() -> None:
    # an empty sample has no token: it takes part in nothing
    assert same(fed(ALL[:4], [SAMPLES[0], Sample(9, []), *SAMPLES[1:]], step=3).tables(), fed(ALL[:4]).tables())
    total = Accumulators(ONE, [Cosine()])
    rows = total.choose([Sample(0, []), Sample(1, [])])
    assert rows.shape == (2, 0)
    total.add([Sample(0, []), Sample(1, [])], rows, [torch.zeros(0, HIDDEN)] * 4)
    with pytest.raises(CalibrationError) as caught:
        total.tables()
    assert str(caught.value) == "no sample has a token that metric cosine[all] counts; use longer texts or another token"


class Elsewhere:
    """A state on a device."""

    def __init__(self, kind: str) -> None:
        self.device = torch.device(kind)
        self.moved = False

    def cpu(self) -> Elsewhere:
        self.moved = True
        return self


@pytest.mark.parametrize(("kind", "moved"), [("mps", True), ("cuda", False), ("cpu", False)])
def test_arithmetic_is_done_where_float64_can_be_had(kind: str, moved: bool) -> None:
    states: list[Any] = [Elsewhere(kind), Elsewhere(kind)]
    assert list(accumulators.exact(states)) == states
    assert [state.moved for state in states] == [moved, moved]


# Two models


def test_tables_between_two_models() -> None:
    metrics = [Cosine(), RelativeMagnitude(), Linear(), CKA()]
    tables = {(t.metric, t.a, t.b): t for t in fed(metrics, models=TWO).tables()}
    pairs = {"cosine[all]": ["aa", "ab", "bb"], "relative_magnitude[all]": ["aa", "ab", "ba", "bb"]}
    pairs |= {"linear[skip-first-1]": ["aa", "ab", "ba", "bb"], "cka[skip-first-1]": ["aa", "ab", "bb"]}
    assert sorted(tables) == sorted((metric, *pair) for metric, found in pairs.items() for pair in found)
    # boundary 1 of a and 0 of b, which is boundary 4 here: the state that is expected comes second
    places = [(sample.number, place) for sample in SAMPLES for place in range(len(sample.ids))]
    for a, b, i, j in (("a", "b", 1, 4), ("b", "a", 4, 1)):
        pairs_of = [[state_of(*place, boundary).double().tolist() for boundary in (i, j)] for place in places]
        mean = sum(distance(RelativeMagnitude(), x, y) for x, y in pairs_of) / len(places)
        table = tables["relative_magnitude[all]", a, b]
        assert table.mean[i % 4][j % 4] == pytest.approx(mean, abs=1e-9)
        assert (len(table.mean), len(table.mean[0])) == ((4, 2) if a == "a" else (2, 4))
    assert tables["linear[skip-first-1]", "a", "b"].mean[1][0] != pytest.approx(tables["linear[skip-first-1]", "b", "a"].mean[0][1])
    alone = {t.metric: t for t in fed(metrics).tables()}
    for metric, table in alone.items():
        assert tables[metric, "a", "a"].mean == tuple(pytest.approx(row, abs=1e-12) for row in table.mean)


def test_models_of_different_hidden_sizes() -> None:
    sizes = [6, 6, 6, 6, 4, 4]
    total = Accumulators(TWO, [CKA(), Linear(), Procrustes()])
    feed(total, SAMPLES, sizes)
    tables = total.tables()
    assert len(tables) == 3 + 4 + 3
    assert all(0 < value < 2 for table in tables if table.a != table.b for row in table.mean for value in row)
    with pytest.raises(RefusedError) as caught:
        feed(Accumulators(TWO, [CKA(), Euclidean()]), SAMPLES, sizes)
    message = "models 'a' and 'b' have hidden sizes 6 and 4; euclidean[all] needs states of the same size"
    assert str(caught.value) == message


# What is refused


def refused(kind: type[LayercutError], metrics: Sequence[Metric], samples: Sequence[Sample]) -> str:
    return failure(kind, lambda: fed(metrics, samples).tables())


def test_too_few_tokens() -> None:
    short, long = Sample(0, [1, 1, 1]), Sample(1, [1] * 30)
    message = refused(CalibrationError, [Cosine(token="skip-first-4")], [short])
    assert message == "no sample has a token that metric cosine[skip-first-4] counts; use longer texts or another token"
    message = refused(CalibrationError, [CKA()], [short])
    assert message == "metric cka[skip-first-1] needs 4 tokens of 1 sample or more, but found 2 of 1; use more text"
    message = refused(CalibrationError, [Linear()], [long])
    assert message == "metric linear[skip-first-1] needs 4 tokens of 2 samples or more, but found 29 of 1; use more text"
    assert len(fed([Linear()], [short, long]).tables()) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("metric", [Angular(), Euclidean(), RelativeMagnitude(), CKA()], ids=lambda metric: metric.name)
def test_states_that_are_not_finite(metric: Metric, value: float) -> None:
    for boundary, place in (
        (2, "the output of layer 1 of model 'a'"),
        (4, "the embedding in model 'b'"),
        (5, "the output of layer 0 of model 'b'"),
    ):
        total = Accumulators(TWO, [metric])
        rows = total.choose(SAMPLES)
        states = states_of(SAMPLES, rows, [HIDDEN] * 6)
        at = int((rows.nonzero()[:, 0] == 3).nonzero()[-1])  # the last token of sample 3
        states[boundary][at, 1] = value
        states[5][at, 0] = math.nan  # a later boundary is bad as well: the first is blamed
        with pytest.raises(CheckpointError) as caught:
            total.add(SAMPLES, rows, states)
        hint = "the weights are damaged" if boundary < 4 else "measure with dtype float32"
        assert str(caught.value) == f"{place} is not finite on sample 3 (metric {metric.label}); {hint}"
