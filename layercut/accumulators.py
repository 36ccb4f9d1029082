"""Accumulators: what a schedule hands boundary states to, and what the tables of all metrics come from.

A schedule is any way of running models over samples: all of a model batch by batch, or layer by layer. Accumulators know
neither models nor text; what several processes gathered is merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from layercut.draw import Draw
from layercut.errors import CalibrationError, CheckpointError, RefusedError
from layercut.metric import Inner, Metric, SampleMetric, Scores, TokenMetric
from layercut.plan import Table
from layercut.settling import Kept
from layercut.sums import Sums
from layercut.tokens import Sample, Token, positions

Kind = TypeVar("Kind", bound=Metric)

CHUNK_BYTES = 4 << 20
"""Bytes that the float64 states of a chunk of tokens take at most: what a cache holds is not read twice from memory."""
CHUNK_BYTES_ELSEWHERE = 256 << 20
"""The same on devices other than the CPU, where each chunk costs a start."""


class Model(NamedTuple):
    """What is known here of a model."""

    alias: str
    depth: int
    dtype: torch.dtype
    """That of its weights."""


class Schedule(Protocol):
    """A way of running models over samples."""

    @property
    def models(self) -> Sequence[Model]:
        """The models, in the order of their states."""

    def run(self, batches: Iterable[list[Sample]], accumulators: Accumulators) -> None:
        """Run every batch once: `choose`, then `add`."""


class Accumulators:
    """The sums of every metric. Boundaries of all models stand one after another: B in all, L + 1 of a model of L layers."""

    def __init__(self, models: Sequence[Model], metrics: Sequence[Metric], seed: int = 0, *, keep: bool = False) -> None:
        """`keep` holds what every sample adds, for metrics that are averaged over tokens: memory grows with the samples."""
        self._models = tuple(models)
        self._metrics = tuple({metric.label: metric for metric in metrics}.values())
        self._device = torch.device("cpu")
        self._tokenwise = _by_token(metric for metric in self._metrics if isinstance(metric, TokenMetric))
        self._samplewise = _by_token(metric for metric in self._metrics if isinstance(metric, SampleMetric))
        self._sums = {metric.label: Sums(keep) for metrics in self._tokenwise.values() for metric in metrics}
        self._draws = {token: Draw(max(metric.draw for metric in found), seed) for token, found in self._samplewise.items()}

    def choose(self, batch: Sequence[Sample]) -> Tensor:
        """The tokens whose states `add` wants: bool, (samples, width of the longest), on the CPU; never a pad. Once a batch."""
        rows = [self._picked(token, metrics[0].label, batch) for token, metrics in self._tokenwise.items()]
        rows += [self._draws[token].choose(batch, self._picked(token, found[0].label, batch)) for token, found in self._samplewise.items()]
        return torch.stack(rows).any(0)

    def add(self, batch: Sequence[Sample], rows: Tensor, states: Sequence[Tensor]) -> None:
        """Take in the states of a batch: for each of the B boundaries (tokens, d), tokens in the order of `rows.nonzero()`.

        `rows` is what `choose` gave. States may have any floating dtype, and none is kept. Raises CheckpointError with model,
        boundary and sample when a state is not finite, and RefusedError when the models cannot be compared.
        """
        if not rows.any():
            return
        self._check_sizes(states)
        states = exact(states)
        self._device = states[0].device
        owner = rows.nonzero()[:, 0].to(self._device)
        for token, metrics in self._tokenwise.items():
            picked = self._picked(token, metrics[0].label, batch)
            places = picked[rows].nonzero()[:, 0].to(self._device)
            self._sum(batch, metrics, states, places, owner[places], picked.sum(1))
        for token, found in self._samplewise.items():
            draw = self._draws[token]
            taken = draw.still(batch, rows & self._picked(token, found[0].label, batch))
            places = taken[rows].nonzero()[:, 0].to(self._device)
            kept = [state[places] for state in states]
            if not all(state.isfinite().all() for state in kept):
                self._blame(batch, found[0], kept, owner[places])
            draw.add(batch, taken, kept)

    def _sum(
        self,
        batch: Sequence[Sample],
        metrics: Sequence[TokenMetric],
        states: Sequence[Tensor],
        places: Tensor,
        owner: Tensor,
        counts: Tensor,
    ) -> None:
        """Add the distances of the tokens at `places`, of the samples `owner`, to the sums of metrics that are averaged over them."""
        totals = torch.zeros(len(metrics), len(batch), len(states), len(states), dtype=torch.float64, device=self._device)
        for part, inner in _inners(states, places):
            for total, metric in zip(totals, metrics, strict=True):
                total.index_add_(0, owner[part], metric.distances(inner))
        for total, metric in zip(totals, metrics, strict=True):
            if not total.isfinite().all():
                self._blame(batch, metric, [state[places] for state in states], owner)
            self._sums[metric.label].add(total, counts.to(self._device, torch.float64))

    def state(self) -> dict[str, Tensor]:
        """All that was gathered: tensors on the CPU, by keys that are the same in every process that saw tokens."""
        return {f"{name}/{key}": value for name, part in self._parts().items() for key, value in part.state().items()}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Take in what another process gathered, given by its `state`."""
        for name, part in self._parts().items():
            part.merge({key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")})

    def kept(self) -> dict[str, Kept]:
        """What every sample adds, by the label of the metric."""
        return {label: Kept(*sums.by_sample()) for label, sums in self._sums.items()}

    @property
    def starts(self) -> dict[str, int]:
        """Place of the first boundary of each model."""
        return {alias: start for alias, (start, _) in self._spans().items()}

    def tables(self) -> tuple[Table, ...]:
        """The distances of every metric between every two models. Raises CalibrationError when too few tokens counted."""
        return tuple(table for metric in self._metrics for table in self._tables(metric))

    def _parts(self) -> dict[str, Sums | Draw]:
        return {**self._sums, **{f"drawn from {token}": draw for token, draw in self._draws.items()}}

    def _picked(self, token: Token, label: str, batch: Sequence[Sample]) -> Tensor:
        """The tokens that a metric is averaged over: bool, (samples, width)."""
        picked = torch.zeros(len(batch), max(len(sample.ids) for sample in batch), dtype=torch.bool)
        for row, sample in enumerate(batch):
            picked[row, list(positions(token, sample, label))] = True
        return picked

    def _check_sizes(self, states: Sequence[Tensor]) -> None:
        first = [states[start].shape[-1] for start, _ in self._spans().values()]
        for model, size in zip(self._models, first, strict=True):
            for metric in self._metrics:
                if size != first[0] and not metric.sizes_may_differ:
                    message = f"models '{self._models[0].alias}' and '{model.alias}' have hidden sizes {first[0]} and {size}"
                    raise RefusedError(message, hint=f"{metric.label} needs states of the same size")

    def _spans(self) -> dict[str, tuple[int, int]]:
        """The boundaries of every model, [start, stop)."""
        stops = list(accumulate(model.depth + 1 for model in self._models))
        return {model.alias: (stop - model.depth - 1, stop) for model, stop in zip(self._models, stops, strict=True)}

    def _blame(self, batch: Sequence[Sample], metric: Metric, states: Sequence[Tensor], owner: Tensor) -> None:
        """Raise the error that names the first boundary which is not finite."""
        boundary, bad = next(
            ((boundary, bad) for boundary, state in enumerate(states) if (bad := ~state.isfinite().all(1)).any()),
            (0, torch.ones_like(owner, dtype=torch.bool)),
        )
        number = batch[int(owner[bad][0])].number
        spans = self._spans()
        model = next(model for model in self._models if boundary < spans[model.alias][1])
        layer = boundary - spans[model.alias][0] - 1
        place = f"the output of layer {layer} of" if layer >= 0 else "the embedding in"
        hint = "the weights are damaged" if model.dtype in (torch.float32, torch.float64) else "measure with dtype float32"
        raise CheckpointError(f"{place} model '{model.alias}' is not finite on sample {number} (metric {metric.label})", hint=hint)

    def _scores(self, metric: Metric) -> Scores:
        if isinstance(metric, SampleMetric):
            states, owners = self._draws[metric.token].drawn(metric.draw, self._device)
            samples = len(set(owners.tolist()))
            if len(owners) < metric.least_tokens or samples < metric.least_samples:
                needs = f"{metric.least_tokens} tokens of {metric.least_samples} sample{'s' if metric.least_samples > 1 else ''} or more"
                raise CalibrationError(f"metric {metric.label} needs {needs}, but found {len(owners)} of {samples}", hint="use more text")
            return metric.compare(states, owners, self._wanted(metric))
        if not self._sums[metric.label].samples:
            raise CalibrationError(f"no sample has a token that metric {metric.label} counts", hint="use longer texts or another token")
        return self._sums[metric.label].scores()

    def _wanted(self, metric: Metric) -> Tensor:
        """Pairs of boundaries that a table has and that are no mirror of another: bool, (B, B)."""
        spans = [slice(*span) for span in self._spans().values()]
        wanted = torch.zeros(spans[-1].stop, spans[-1].stop, dtype=torch.bool)
        for at, a in enumerate(spans):
            for b in spans[0 if metric.directed else at :]:
                wanted[a, b] = True
            wanted[a, a] = wanted[a, a].triu(1)
        return wanted.to(self._device)

    def _tables(self, metric: Metric) -> Iterator[Table]:
        scores = self._scores(metric)
        spans = {alias: slice(*span) for alias, span in self._spans().items()}
        aliases = list(spans)
        for at, a in enumerate(aliases):
            for b in aliases[0 if metric.directed else at :]:
                found = [matrix[spans[a], spans[b]] for matrix in scores]
                if a == b:  # the earlier state is given, whichever way the seam goes
                    found = [matrix.triu() + matrix.triu(1).T for matrix in found]
                yield Table(metric=metric.label, a=a, b=b, mean=_rows(found[0]), stderr=_rows(found[1]))


def _by_token(metrics: Iterable[Kind]) -> dict[Token, list[Kind]]:
    """Metrics together that are taken over the same tokens."""
    found: dict[Token, list[Kind]] = {}
    for metric in metrics:
        found.setdefault(metric.token, []).append(metric)
    return found


def exact(states: Sequence[Tensor]) -> Sequence[Tensor]:
    """The states where float64 can be had: on the CPU when they are on Apple's GPU, which has none."""
    return [state.cpu() for state in states] if states[0].device.type == "mps" else states


def _inners(states: Sequence[Tensor], places: Tensor) -> Iterator[tuple[slice, Inner]]:
    """Inner products of all boundaries for the tokens at these places, chunk by chunk."""
    hidden, tokens = states[0].shape[1], len(places)
    whole = tokens == len(states[0])
    size = CHUNK_BYTES if states[0].device.type == "cpu" else CHUNK_BYTES_ELSEWHERE
    step = max(1, size // (8 * len(states) * max(hidden, len(states))))
    room = torch.empty(min(step, tokens), len(states), hidden, dtype=torch.float64, device=states[0].device)
    for start in range(0, tokens, step):
        part = slice(start, min(start + step, tokens))
        chunk = room[: part.stop - start]
        for boundary, state in enumerate(states):
            chunk[:, boundary] = state[part if whole else places[part]]
        yield part, Inner(torch.bmm(chunk, chunk.transpose(1, 2)))


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
