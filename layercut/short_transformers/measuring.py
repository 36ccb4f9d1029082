"""Measuring a model in memory: one pass over the rows of a dataset, with hooks that are gone afterwards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from layercut.blockscores import triangle
from layercut.errors import CalibrationError, LayercutError, did_you_mean
from layercut.inmemory import NAME, member_of
from layercut.short_transformers.dist import Distance
from layercut.tokens import Sample

Callback: TypeAlias = Callable[[Any, Any], Any]
"""A distance of one's own: of two states of shape (1, tokens, hidden), float32 on the CPU."""
KEYS = ("text", "content")
"""Columns that hold the text when none is named."""


def measure_blocks(model: Any, samples: Iterable[Sample], distance: Distance | Callback, batch_size: int) -> list[list[float]]:
    """Distances of all blocks of 1, 2, ... layers, by their first layer: means over the samples.

    The model runs as it is, in its own dtype, without dropout; distances are float64 (those of a callback are its own). Raises
    LayercutError when there is nothing to measure, or a distance is no finite number.
    """
    from layercut.runner import Runner

    member = member_of(model)
    runner = Runner(NAME, model.base_model, member.stack.depth, member.stack.prefix)
    batches = _batches(iter(samples), batch_size)
    with _evaluating(model):
        matrix = _by_engine(runner, batches, distance) if isinstance(distance, Distance) else _by_callback(runner, batches, distance)
    return triangle(matrix)


def _by_engine(runner: Any, batches: Iterator[list[Sample]], distance: Distance) -> Any:
    """The matrix of all boundaries under a metric of layercut."""
    from layercut.accumulators import Accumulators, Model

    accumulators = Accumulators([Model(NAME, len(runner.layers), runner.dtype)], [distance.metric])
    for batch in batches:
        rows = accumulators.choose(batch)
        states = _states(runner, batch, rows)
        accumulators.add(batch, rows, [state.to(states[0].device) for state in states])
    return accumulators.tables()[0].mean


def _by_callback(runner: Any, batches: Iterator[list[Sample]], distance: Callback) -> Any:
    """The matrix of all boundaries under a distance of one's own, which is called once for each pair and sample."""
    import torch

    boundaries = len(runner.layers) + 1
    totals = [[0.0] * boundaries for _ in range(boundaries)]
    count = 0
    for batch in batches:
        for sample in batch:
            rows = torch.ones(1, len(sample.ids), dtype=torch.bool)
            states = [state.float().cpu().unsqueeze(0) for state in _states(runner, [sample], rows)]
            count += 1
            for early, late in itertools.combinations(range(boundaries), 2):
                totals[early][late] += _number(distance(states[early], states[late]), early, late, sample.number)
    return [[total / max(count, 1) for total in row] for row in totals]


def _number(value: Any, early: int, late: int, sample: int) -> float:
    """What a callback gave, as a number. Raises LayercutError when it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise LayercutError(f"the metric gave {type(value).__name__}, not one number") from None
    if not math.isfinite(number):
        raise LayercutError(f"the metric gave {number} for layers {early} to {late - 1} on sample {sample}")
    return number


def _states(runner: Any, batch: list[Sample], rows: Any) -> list[Any]:
    """States of the chosen tokens at all boundaries; each where its layer is, for a model may lie on several devices."""
    from layercut.resident import padded

    ids, mask = (tensor.to(runner.backbone.device) for tensor in padded(batch))
    found: list[Any] = runner.states(batch, ids, mask, rows)
    return found


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout and the like are off, and every module is as it was afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def read_samples(rows: Iterable[Any], tokenizer: Any, *, key: str | None, limit: int, max_length: int, chat: bool) -> Iterator[Sample]:
    """The first `limit` rows that give tokens, each cut to `max_length` tokens; special tokens as the tokenizer adds them.

    With `chat` a row holds the messages of a conversation. Raises CalibrationError for a column that is not there, and when no row
    gives a token.
    """
    count = 0
    for number, row in enumerate(rows):
        content = _content(row, key, number)
        if not content:
            continue
        ids = _encoded(content, tokenizer, max_length, chat, number)
        if ids:
            yield Sample(count, ids)
            count += 1
        if count >= limit:
            return
    if not count:
        raise CalibrationError("no row of the dataset gives a token")


def _encoded(content: Any, tokenizer: Any, max_length: int, chat: bool, number: int) -> list[int]:
    """Token ids of a text or a conversation."""
    if chat and isinstance(content, str):
        hint = "leave out use_chat_template, or name the column of messages with key"
        raise CalibrationError(f"row {number} holds text, not messages", hint=hint)
    if chat:
        return list(tokenizer.apply_chat_template(content, tokenize=True, add_generation_prompt=False, return_dict=False))[:max_length]
    if not isinstance(content, str):
        hint = "for conversations set use_chat_template=True"
        raise CalibrationError(f"row {number} holds {type(content).__name__}, not text", hint=hint if isinstance(content, list) else None)
    return list(tokenizer(content, truncation=True, max_length=max_length)["input_ids"])


def _content(row: Any, key: str | None, number: int) -> Any:
    """The column that is measured on."""
    if not isinstance(row, Mapping):
        raise CalibrationError(f"row {number} of the dataset is {type(row).__name__}, not a mapping of columns")
    wanted = (key,) if key is not None else KEYS
    found = next((name for name in wanted if name in row), None)
    if found is None:
        columns = ", ".join(f"'{name}'" for name in row) or "none"
        hint = did_you_mean(wanted[0], [name for name in row if isinstance(name, str)])
        raise CalibrationError(f"no column '{wanted[0]}' (available: {columns})", where=f"row {number} of the dataset", hint=hint)
    return row[found]
