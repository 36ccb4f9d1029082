"""The distance engine: one pass over the calibration text gives every metric between all boundaries of all models.

Boundary states are taken at the layers themselves: their inputs, and the output of the last one before the final norm. The
LM head is never computed. All arithmetic on states is float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from layercut.calibration import Calibration, Tally, passages, samples
from layercut.checkpoint import Checkpoint
from layercut.errors import CalibrationError, CheckpointError, RefusedError
from layercut.loading import bos_prefix, encode, layers_of, load_backbone, load_tokenizer, pick_device, quiet
from layercut.metrics import Metric
from layercut.plan import Measurement, Table

CHUNK_BYTES = 64 << 20
"""Bytes that one float64 array of a chunk of tokens takes at most."""
READ_AHEAD = 64
"""Samples that are read and sorted by length together, so that a batch has few pads."""


def measure(
    models: Mapping[str, Checkpoint],
    metrics: Sequence[Metric],
    calibration: Calibration,
    *,
    depths: Mapping[str, int],
    prefixes: Mapping[str, str] | None = None,
    progress: bool = True,
    dtype: str | None = None,
    device: str | None = None,
) -> Measurement:
    """Measure the distances between all boundaries of all models on the same tokens.

    `depths` gives the number of layers of each model and `prefixes` where its checkpoint keeps them. The result has a table
    for each metric and each pair of models (a, b) with a before or equal to b, of (depth of a + 1) x (depth of b + 1)
    means over tokens. Standard errors take the sample as the unit: see `Sums.stderr`.

    Raises CalibrationError when the text does not do, CheckpointError when a model does not load, runs out of finite
    numbers or has no layers where they should be, and RefusedError when two models cannot be compared.
    """
    where = pick_device(device)
    metrics = tuple({metric.label: metric for metric in metrics}.values())
    for metric in metrics:
        _check_index(metric, calibration.max_length, f"max_length is {calibration.max_length}", "raise max_length")
    tokenizer = SharedTokenizer({alias: load_tokenizer(model.folder) for alias, model in models.items()}, calibration.bos)
    tally = Tally()
    sequences = samples(passages(calibration, tally=tally), tokenizer.encode, tokenizer.prefix, calibration.max_length, tally)
    first = next(sequences, None)  # before the models: text fails faster than they load
    if first is None:
        raise CalibrationError("the calibration text gives no tokens")
    sequences = itertools.islice(itertools.chain([first], sequences), calibration.samples)
    runners = [
        Runner(alias, load_backbone(model.folder, where, dtype), depths[alias], (prefixes or {}).get(alias))
        for alias, model in models.items()
    ]
    sums = [Sums(metric) for metric in metrics]
    count = tokens = 0
    with tqdm(total=calibration.samples, desc="measuring", unit="sample", disable=not progress, leave=False) as bar, quiet():
        for batch in _batches(sequences, calibration.batch_size):
            _measure_batch(runners, batch, sums, where)
            count += len(batch)
            tokens += sum(len(sample.ids) for sample in batch)
            bar.update(len(batch))
    details = _details(runners, tokenizer, calibration, tally, where)
    return Measurement(tables=_tables(runners, sums), samples=count, tokens=tokens, details=details)


class SharedTokenizer:
    """One encoding for several models: refuses the first text that their tokenizers read differently."""

    def __init__(self, tokenizers: Mapping[str, Any], bos: bool | Literal["auto"]) -> None:
        self._tokenizers = dict(tokenizers)
        self._alias, self._first = next(iter(self._tokenizers.items()))
        self.prefix = bos_prefix(self._first, bos)
        vocabulary: dict[str, int] = self._first.get_vocab()
        for alias, tokenizer in list(self._tokenizers.items())[1:]:
            for token, index in sorted(tokenizer.get_vocab().items()):
                if vocabulary.get(token, index) != index:
                    self._refuse(alias, f"token '{token}' is {vocabulary[token]} in '{self._alias}' and {index} in '{alias}'")
            prefix = bos_prefix(tokenizer, bos)
            if prefix != self.prefix:
                reason = f"samples start with {self.tokens(self.prefix)} in '{self._alias}' and {self.tokens(prefix)} in '{alias}'"
                self._refuse(alias, reason, "set bos: true or bos: false")

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens, the same for every model."""
        ids = encode(self._first, text)
        for alias, tokenizer in list(self._tokenizers.items())[1:]:
            other = encode(tokenizer, text)
            if other != ids:
                at = next((at for at, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
                shown = " and ".join(str(part[at]) if at < len(part) else "the end" for part in (ids, other))
                self._refuse(alias, f"token {at} of a text is {shown}")
        return ids

    def tokens(self, ids: list[int]) -> list[str]:
        """The tokens as text."""
        return list(self._first.convert_ids_to_tokens(ids))

    def _refuse(self, alias: str, reason: str, hint: str | None = None) -> None:
        message = f"the tokenizers of '{self._alias}' and '{alias}' differ: {reason}"
        raise RefusedError(message, hint=hint or "distances between two models need the same tokens")


class Sample(NamedTuple):
    """One token sequence and its number in the order of the text."""

    number: int
    ids: list[int]


class Runner:
    """One loaded model: gives the boundary states of chosen tokens, in one forward pass."""

    def __init__(self, alias: str, backbone: nn.Module, depth: int, prefix: str | None) -> None:
        self.alias = alias
        self.backbone = backbone
        self.layers = layers_of(backbone, depth, prefix)
        weight = next(iter(self.layers.parameters()), torch.empty(0))
        self.dtype = weight.dtype
        config: Any = backbone.config
        self.positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.vocabulary = int(backbone.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    def states(self, batch: Sequence[Sample], ids: Tensor, mask: Tensor, rows: Tensor) -> list[Tensor]:
        """Boundary states h_0 .. h_L of the tokens that `rows` (samples, width; bool) picks: L + 1 tensors of (tokens, d)."""
        self._check(batch)
        with Boundaries(self.alias, self.layers, rows) as boundaries, torch.inference_mode():
            self.backbone(input_ids=ids, attention_mask=mask, use_cache=False)
        return boundaries.states()

    def _check(self, batch: Sequence[Sample]) -> None:
        for sample in batch:
            if self.positions is not None and len(sample.ids) > self.positions:
                message = f"model '{self.alias}' has {self.positions} positions, but sample {sample.number} has {len(sample.ids)} tokens"
                raise CalibrationError(message, hint=f"set max_length to {self.positions} or less")
            if max(sample.ids) >= self.vocabulary:
                message = f"the tokenizer gives token {max(sample.ids)}, but model '{self.alias}' has {self.vocabulary} embeddings"
                raise CheckpointError(message, hint="the tokenizer belongs to another model")


class Boundaries:
    """Hooks on the layers that keep chosen tokens of every boundary state; as a context, so that none stays attached."""

    def __init__(self, alias: str, layers: nn.ModuleList, rows: Tensor) -> None:
        self._alias = alias
        self._layers = layers
        self._rows = rows
        self._order: list[int] = []
        self._kept: list[Tensor] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Boundaries:
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_pre_hook(self._input_hook(index), with_kwargs=True))
        self._handles.append(self._layers[last].register_forward_hook(self._output_hook))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def states(self) -> list[Tensor]:
        """The states, in order. Raises CheckpointError unless every layer ran once, one after the other."""
        if self._order != list(range(len(self._layers) + 1)):
            raise CheckpointError(f"the layers of model '{self._alias}' do not run once each, in order", hint="it cannot be measured")
        return self._kept

    def _input_hook(self, index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(index, args[0] if args else kwargs.get("hidden_states"))

        return hook

    def _output_hook(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Layers gave tuples before transformers 4.54 and tensors since then.
        self._keep(len(self._layers), output[0] if isinstance(output, tuple) else output)

    def _keep(self, boundary: int, state: Any) -> None:
        shape = tuple(state.shape) if isinstance(state, Tensor) else None
        if shape is None or len(shape) != 3 or shape[:2] != tuple(self._rows.shape):
            message = f"boundary {boundary} of model '{self._alias}' is no tensor of (samples, tokens, hidden)"
            raise CheckpointError(message, hint="this architecture cannot be measured")
        self._order.append(boundary)
        self._kept.append(state[self._rows])  # a copy: a layer may change its input in place


@dataclass
class Sums:
    """Running sums of one metric over tokens, kept by sample for the standard error. Shifted by the first sample for accuracy."""

    metric: Metric
    samples: int = 0
    count: float = 0.0
    count_square: float = 0.0
    shift: Tensor = field(default_factory=lambda: torch.zeros(0))
    first: Tensor = field(default_factory=lambda: torch.zeros(0))
    square: Tensor = field(default_factory=lambda: torch.zeros(0))
    cross: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, sums: Tensor, counts: Tensor) -> None:
        """Take in samples: sums of distances (samples, B, B) and numbers of tokens (samples), both float64."""
        weight = counts[:, None, None]
        if not self.samples:
            self.shift = sums[0] / counts[0]
            self.first, self.square, self.cross = (torch.zeros_like(self.shift) for _ in range(3))
        shifted = sums - self.shift * weight
        self.first += shifted.sum(0)
        self.square += shifted.square().sum(0)
        self.cross += (shifted * weight).sum(0)
        self.samples += len(counts)
        self.count += float(counts.sum())
        self.count_square += float(counts.square().sum())

    def mean(self) -> Tensor:
        """Mean over tokens, (B, B)."""
        return self.shift + self.first / self.count

    def stderr(self) -> Tensor:
        """Standard error of the mean with the sample as the unit, (B, B).

        sqrt(K / (K - 1) sum_k (s_k - mean n_k)^2) / sum_k n_k, with s_k the sum over the n_k tokens of sample k of K. One
        sample has no spread, and gives 0.
        """
        if self.samples < 2:
            return torch.zeros_like(self.shift)
        mean = self.first / self.count
        spread = self.square - 2 * mean * self.cross + mean.square() * self.count_square
        return (spread.clamp(min=0) * self.samples / (self.samples - 1)).sqrt() / self.count


def _batches(sequences: Iterator[list[int]], size: int) -> Iterator[list[Sample]]:
    """Batches of samples of similar length. The order depends on the text only, up to the read-ahead."""
    numbered = (Sample(number, ids) for number, ids in enumerate(sequences))
    while ahead := list(itertools.islice(numbered, max(READ_AHEAD, size))):
        ahead.sort(key=lambda sample: len(sample.ids))
        for start in range(0, len(ahead), size):
            yield ahead[start : start + size]


def _check_index(metric: Metric, length: int, found: str, hint: str) -> None:
    if isinstance(metric.token, int) and not -length <= metric.token < length:
        needs = metric.token + 1 if metric.token >= 0 else -metric.token
        raise CalibrationError(f"metric {metric.label} needs {needs} tokens, but {found}", hint=hint)


def _picked(metric: Metric, batch: Sequence[Sample], width: int) -> Tensor:
    """The tokens that a metric is averaged over: bool, (samples, width)."""
    picked = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, sample in enumerate(batch):
        length = len(sample.ids)
        _check_index(metric, length, f"sample {sample.number} has {length}", "use longer texts or a token that all of them have")
        if metric.token == "all":
            picked[row, :length] = True
        else:
            index = -1 if metric.token == "last" else int(metric.token)
            picked[row, index if index >= 0 else length + index] = True
    return picked


def _measure_batch(runners: Sequence[Runner], batch: Sequence[Sample], sums: Sequence[Sums], device: torch.device) -> None:
    width = max(len(sample.ids) for sample in batch)
    ids = torch.tensor([sample.ids + [0] * (width - len(sample.ids)) for sample in batch])  # masked, so any token will do
    mask = torch.tensor([[1] * len(sample.ids) + [0] * (width - len(sample.ids)) for sample in batch])
    picked = [_picked(total.metric, batch, width) for total in sums]
    rows = torch.stack(picked).any(0)
    try:
        states = [runner.states(batch, ids.to(device), mask.to(device), rows.to(device)) for runner in runners]
        sizes = [state[0].shape[-1] for state in states]
        for runner, size in zip(runners, sizes, strict=True):
            if size != sizes[0]:
                message = f"models '{runners[0].alias}' and '{runner.alias}' have hidden sizes {sizes[0]} and {size}"
                raise RefusedError(message, hint="distances need states of the same size")
        _add_distances(runners, batch, list(itertools.chain(*states)), rows, picked, sums)
    except torch.OutOfMemoryError:
        raise CalibrationError(f"out of memory on {device}", hint="lower batch_size or max_length") from None


def _add_distances(
    runners: Sequence[Runner], batch: Sequence[Sample], states: list[Tensor], rows: Tensor, picked: list[Tensor], sums: Sequence[Sums]
) -> None:
    """Gram matrices of all boundaries, chunk by chunk of tokens, and from them every metric, summed by sample."""
    tokens, hidden = states[0].shape
    boundaries, device = len(states), states[0].device
    owner = rows.nonzero()[:, 0].to(device)
    chosen = [mask[rows].to(device) for mask in picked]
    totals = torch.zeros(len(sums), len(batch), boundaries, boundaries, dtype=torch.float64, device=device)
    step = max(1, CHUNK_BYTES // (8 * boundaries * max(hidden, boundaries)))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        chunk = torch.stack([state[part] for state in states], dim=1).double()
        gram = torch.bmm(chunk, chunk.transpose(1, 2))
        for index, total in enumerate(sums):
            own = chosen[index][part]
            if not own.any():
                continue
            distances = total.metric.distances(gram[own])
            if not distances.isfinite().all():
                _blame(runners, batch, total.metric, gram[own], distances, owner[part][own])
            totals[index].index_add_(0, owner[part][own], distances)
    for index, total in enumerate(sums):
        total.add(totals[index], picked[index].sum(1).to(device, torch.float64))


def _blame(runners: Sequence[Runner], batch: Sequence[Sample], metric: Metric, gram: Tensor, distances: Tensor, owner: Tensor) -> None:
    """Raise the error that names the first boundary which is not finite."""
    bad = ~gram.diagonal(dim1=1, dim2=2).isfinite()
    if not bad.any():
        bad = ~distances.isfinite().all(2)
    boundary = int(bad.any(0).nonzero()[0])
    number = batch[int(owner[bad[:, boundary]][0])].number
    for runner in runners:
        if boundary <= len(runner.layers):
            break
        boundary -= len(runner.layers) + 1
    place = f"the output of layer {boundary - 1} of" if boundary else "the embedding in"
    message = f"{place} model '{runner.alias}' is not finite on sample {number} (metric {metric.label})"
    hint = "the weights are damaged" if runner.dtype in (torch.float32, torch.float64) else "measure with dtype float32"
    raise CheckpointError(message, hint=hint)


def _details(
    runners: Sequence[Runner], tokenizer: SharedTokenizer, calibration: Calibration, tally: Tally, where: torch.device
) -> dict[str, Any]:
    return {
        **calibration.model_dump(mode="json", exclude={"batch_size", "bos"}),
        "documents_read": tally.read,
        "documents_skipped": tally.skipped,
        "bos": "added" if tokenizer.prefix else "not added",
        "bos_policy": calibration.bos,
        "prefix": tokenizer.tokens(tokenizer.prefix),
        "dtype": {runner.alias: str(runner.dtype).removeprefix("torch.") for runner in runners},
        "device": where.type if where.type == "cpu" else f"{where} ({torch.cuda.get_device_name(where)})",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _tables(runners: Sequence[Runner], sums: Sequence[Sums]) -> tuple[Table, ...]:
    ends = list(itertools.accumulate(len(runner.layers) + 1 for runner in runners))
    spans = {runner.alias: slice(end - len(runner.layers) - 1, end) for runner, end in zip(runners, ends, strict=True)}
    return tuple(
        Table(metric=total.metric.label, a=a, b=b, mean=_rows(mean[spans[a], spans[b]]), stderr=_rows(stderr[spans[a], spans[b]]))
        for total, mean, stderr in [(total, total.mean().cpu(), total.stderr().cpu()) for total in sums]
        for a, b in itertools.combinations_with_replacement(spans, 2)
    )


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
