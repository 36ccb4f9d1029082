"""The distance engine: one pass over the calibration text gives every metric between all boundaries of all models.

Boundary states are taken at the layers themselves: their inputs, and the output of the last one before the final norm. The
LM head is never computed. All arithmetic on states is float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from tqdm import tqdm

from layercut.accumulators import Accumulators, Model
from layercut.calibration import Calibration, Tally, passages, samples
from layercut.checkpoint import Checkpoint
from layercut.encoding import SharedTokenizer
from layercut.errors import CalibrationError
from layercut.loading import load_tokenizer, pick_device, quiet
from layercut.metric import Metric
from layercut.plan import Measurement
from layercut.ranks import ALONE, Ranks
from layercut.schedules import pick_schedule
from layercut.streaming import Source
from layercut.tokens import Sample, check_index

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
    memory: int | None = None,
    ranks: Ranks = ALONE,
) -> Measurement:
    """Measure the distances between all boundaries of all models on the same tokens.

    `depths` gives the number of layers of each model and `prefixes` where its checkpoint keeps them. The result has a table
    for each metric and each pair of models (a, b) with a before or equal to b, of (depth of a + 1) x (depth of b + 1)
    distances. Metrics that are directed have a table for (b, a) as well. Standard errors take the sample as the unit.

    `memory` is what the process may take, in bytes; None for what is free. Models that do not fit are streamed layer by layer.
    `ranks` are the processes that share the samples; every one of them is given the measurement.

    Raises CalibrationError when the text does not do, CheckpointError when a model does not load, runs out of finite
    numbers or has no layers where they should be, and RefusedError when two models cannot be compared.
    """
    where = pick_device(device, ranks.seat.local_rank)
    for metric in metrics:
        check_index(metric.token, calibration.max_length, metric.label, f"max_length is {calibration.max_length}", "raise max_length")
    tokenizer = SharedTokenizer({alias: load_tokenizer(model.folder) for alias, model in models.items()}, calibration.bos)
    tally = Tally()
    sequences = samples(passages(calibration, tally=tally), tokenizer.encode, tokenizer.prefix, calibration.max_length, tally)
    first = next(sequences, None)  # before the models: text fails faster than they load
    if first is None:
        raise CalibrationError("the calibration text gives no tokens")
    sequences = itertools.islice(itertools.chain([first], sequences), calibration.samples)
    sources = [Source(alias, model, depths[alias], (prefixes or {}).get(alias)) for alias, model in models.items()]
    schedule, reason = pick_schedule(sources, where, dtype, memory, sharers=ranks.seat.local_world, progress=progress)
    accumulators = Accumulators(schedule.models, metrics)
    used = Used()
    with tqdm(total=calibration.samples, desc="measuring", unit="sample", disable=not progress, leave=False) as bar, quiet():
        schedule.run(used.counted(ranks.share(_batches(sequences, calibration.batch_size)), bar), accumulators)
    found = ranks.collect(accumulators.state(), asdict(used))
    if not ranks.main:
        return Measurement.model_validate_json(ranks.hand_out("measurement"))
    for state, counts in found[1:]:
        accumulators.merge(state)
        used = Used(used.samples + counts["samples"], used.tokens + counts["tokens"])
    details = _details(schedule.models, tokenizer, calibration, tally, where, reason) | ({"ranks": len(found)} if len(found) > 1 else {})
    measurement = Measurement(tables=accumulators.tables(), samples=used.samples, tokens=used.tokens, details=details)
    ranks.hand_out("measurement", measurement.model_dump_json())
    return measurement


@dataclass
class Used:
    """Counts what was measured on."""

    samples: int = 0
    tokens: int = 0

    def counted(self, batches: Iterator[list[Sample]], bar: tqdm[Any]) -> Iterator[list[Sample]]:
        """The batches, each counted when the next one is asked for: it is done then."""
        for batch in batches:
            yield batch
            self.samples += len(batch)
            self.tokens += sum(len(sample.ids) for sample in batch)
            bar.update(len(batch))


def _batches(sequences: Iterator[list[int]], size: int) -> Iterator[list[Sample]]:
    """Batches of samples of similar length. The order depends on the text only, up to the read-ahead."""
    numbered = (Sample(number, ids) for number, ids in enumerate(sequences))
    while ahead := list(itertools.islice(numbered, max(READ_AHEAD, size))):
        ahead.sort(key=lambda sample: len(sample.ids))
        for start in range(0, len(ahead), size):
            yield ahead[start : start + size]


def _details(
    models: Sequence[Model], tokenizer: SharedTokenizer, calibration: Calibration, tally: Tally, where: torch.device, reason: str
) -> dict[str, Any]:
    return {
        **calibration.model_dump(mode="json", exclude={"batch_size", "bos"}),
        "documents_read": tally.read,
        "documents_skipped": tally.skipped,
        "bos": "added" if tokenizer.prefix else "not added",
        "bos_policy": calibration.bos,
        "prefix": tokenizer.tokens(tokenizer.prefix),
        "dtype": {model.alias: str(model.dtype).removeprefix("torch.") for model in models},
        "device": f"{where} ({torch.cuda.get_device_name(where)})" if where.type == "cuda" else where.type,
        "schedule": reason,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
