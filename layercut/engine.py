"""The distance engine: one pass over the calibration text gives every metric between all boundaries of all models.

Boundary states are taken at the layers themselves: their inputs, and the output of the last one before the final norm. The
LM head is never computed. All arithmetic on states is float64.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from tqdm import tqdm

from layercut.accumulators import Accumulators, Model, Schedule
from layercut.calibration import Auto, Calibration
from layercut.checkpoint import Checkpoint
from layercut.encoding import SharedTokenizer
from layercut.exceptions import PADDED
from layercut.loading import load_tokenizer, pick_device, quiet
from layercut.measurements import FOLDER, Measurements, key_of, missing, only, with_tables
from layercut.metrics import Angular, Cosine, Euclidean, Metric, RelativeMagnitude, TokenMetric
from layercut.plan import Measurement
from layercut.ranks import ALONE, Ranks
from layercut.reading import Reading, Text, read
from layercut.schedules import pick_schedule
from layercut.settling import BEST_BLOCKS, Question, Verdict, judge, look_sizes
from layercut.streaming import Source
from layercut.tokens import Sample, check_index, positions
from layercut.version import __version__

READ_AHEAD = 8
"""Batches whose samples are sorted by length together, so that a batch has few pads."""


class Running(NamedTuple):
    """Models, whole and on this machine, and how they are run."""

    models: Mapping[str, Checkpoint]
    depths: Mapping[str, int]
    """The number of layers of each model."""
    prefixes: Mapping[str, str] = MappingProxyType({})
    """Where the checkpoint of each model keeps its layers."""
    progress: bool = True
    dtype: str | None = None
    device: str | None = None
    memory: int | None = None
    """Bytes that the process may take; None for what is free. Models that do not fit are streamed layer by layer."""
    ranks: Ranks = ALONE
    """The processes that share the samples; every one of them is given what was measured."""
    cache: Path | None = None
    """A folder where measurements are kept: what was measured before on the same weights, tokens and settings costs no forward and is the
    same to the last bit."""

    @property
    def where(self) -> torch.device:
        """The device of this process."""
        return pick_device(self.device, self.ranks.seat.local_rank)


def measure(running: Running, metrics: Sequence[Metric], calibration: Calibration, question: Question | None = None) -> Measurement:
    """Measure the distances between all boundaries of all models on the same tokens.

    The result has a table for each metric and each pair of models (a, b) with a before or equal to b, of (depth of a + 1) x (depth of
    b + 1) distances. Metrics that are directed have a table for (b, a) as well. Standard errors take the sample as the unit.

    `question` tells what is chosen on a measurement: with `samples: auto` text is taken until that is settled, and what was settled before
    for the same question is found in the cache; the nearest blocks of all sizes if not given.

    Raises CalibrationError when the text does not do, CheckpointError when a model does not load, runs out of finite
    numbers or has no layers where they should be, and RefusedError when two models cannot be compared.
    """
    for metric in metrics:
        check_index(metric.token, calibration.max_length, metric.label, f"max_length is {calibration.max_length}", "raise max_length")
    alike = any(model.config.get("model_type") in PADDED for model in running.models.values())
    labels = tuple(dict.fromkeys(metric.label for metric in metrics))
    settings = Settings(running, calibration, running.where, question or BEST_BLOCKS, labels, alike)
    reading = _read(running.models, calibration, metrics)  # before the models: text fails faster than they load
    shelf = None if running.cache is None else Shelf(running.cache, settings, reading.text)
    lacking = missing(None if shelf is None else shelf.known, labels)
    if shelf is not None and shelf.known is not None and not lacking:
        told = {**shelf.known.details, **reading.account(shelf.known.samples)}  # of the text as it is read now
        return only(shelf.known.model_copy(update={"details": told}), labels)
    wanted = [metric for metric in metrics if metric.label in lacking]
    return only(_run(wanted, reading, settings, shelf), labels)


def _read(models: Mapping[str, Checkpoint], calibration: Calibration, metrics: Sequence[Metric]) -> Reading:
    """The samples. Raises CalibrationError when there is none, or when a metric wants completions and one of them has none."""
    tokenizer = SharedTokenizer({alias: load_tokenizer(model.folder) for alias, model in models.items()}, calibration.bos)
    wanting = [metric for metric in metrics if metric.token == "completion"]
    with quiet():
        reading = read(calibration, tokenizer, completions=bool(wanting))
    for metric in wanting:
        for sample in _samples(reading.text, 0, len(reading.text.ids)):
            positions(metric.token, sample, metric.label)
    return reading


def _family(metrics: Sequence[Metric]) -> list[Metric]:
    """The metrics, and those that the same inner products give: asked for later, they cost nothing."""
    tokens = dict.fromkeys(metric.token for metric in metrics if isinstance(metric, TokenMetric))
    relatives = [kind(token=token) for token in tokens for kind in (Angular, Cosine, RelativeMagnitude, Euclidean)]
    return list({metric.label: metric for metric in (*metrics, *relatives)}.values())


class Settings(NamedTuple):
    """All that numbers depend on besides the models and the text."""

    running: Running
    calibration: Calibration
    device: torch.device
    question: Question
    labels: Sequence[str]
    alike: bool = False
    """Whether a batch has samples of one length only."""

    @property
    def asks(self) -> bool:
        """Whether the number of samples depends on what is chosen."""
        return isinstance(self.calibration.samples, Auto)

    def as_json(self) -> dict[str, Any]:
        """As text that a key is made of; all settings of the calibration, since they stand in the result."""
        asked = {"question": self.question.name, "metrics": list(self.labels)} if self.asks else {}
        return {
            **asked,
            "calibration": self.calibration.model_dump(mode="json"),
            "device": str(self.device) if self.device.type != "cuda" else torch.cuda.get_device_name(self.device),
            "dtype": self.running.dtype,
            "memory": self.running.memory,
            "world": self.running.ranks.seat.world,
            "depths": dict(self.running.depths),
            "prefixes": dict(self.running.prefixes),
            "versions": [__version__, torch.__version__, transformers.__version__],
        }


class Shelf:
    """The place of one measurement in the cache. The main rank reads and writes it."""

    def __init__(self, root: Path, settings: Settings, text: Text) -> None:
        running, ranks = settings.running, settings.running.ranks
        self._cache = Measurements(root)
        self.known: Measurement | None = None
        if ranks.main:
            self._key = key_of(running.models, text.sequences, settings.as_json())
            self.known = self._cache.find(self._key, running.depths)
            ranks.hand_out("known", "" if self.known is None else self.known.model_dump_json())
        else:
            found = ranks.hand_out("known")
            self.known = Measurement.model_validate_json(found) if found else None
        if self.known is not None and running.progress and ranks.main:
            count = len(self.known.tables)
            tables = "1 table comes" if count == 1 else f"{count} tables come"
            print(f"measured before: {tables} from {root / FOLDER}", file=sys.stderr)

    def keep(self, measurement: Measurement) -> Measurement:
        """Write what was measured, and return it with what was known."""
        whole = with_tables(self.known, measurement)
        self._cache.keep(self._key, whole)
        return whole if self.known is None else whole.model_copy(update={"details": self.known.details})


def _run(metrics: Sequence[Metric], reading: Reading, settings: Settings, shelf: Shelf | None) -> Measurement:
    """Run the models, and keep what was measured. Every rank is given the same."""
    running, ranks, where = settings.running, settings.running.ranks, settings.device
    sources = [Source(alias, model, running.depths[alias], running.prefixes.get(alias)) for alias, model in running.models.items()]
    sharers = ranks.seat.local_world
    schedule, reason = pick_schedule(sources, where, running.dtype, running.memory, sharers=sharers, progress=running.progress)
    found = metrics if shelf is None or settings.asks else _family(metrics)
    looked = _look(schedule, found, reading.text, settings)
    if looked is None:
        return Measurement.model_validate_json(ranks.hand_out("measurement"))
    details = _details(schedule.models, reading, looked.used.samples, where, reason)
    details |= {"ranks": ranks.seat.world} if ranks.seat.world > 1 else {}
    if looked.verdicts:
        details["settled"] = all(verdict.settled for verdict in looked.verdicts)
        details["settling"] = [verdict.text for verdict in looked.verdicts]
    measurement = Measurement(tables=looked.seen.tables(), samples=looked.used.samples, tokens=looked.used.tokens, details=details)
    if shelf is not None:
        measurement = shelf.keep(measurement)
    ranks.hand_out("measurement", measurement.model_dump_json())
    return measurement


class Looked(NamedTuple):
    """What was seen, on how much text, and whether it was enough."""

    seen: Accumulators
    used: Used
    verdicts: list[Verdict]


def _look(schedule: Schedule, metrics: Sequence[Metric], text: Text, settings: Settings) -> Looked | None:
    """Run the models over the text: all of it, or look by look until what is asked is settled. None on ranks that are not the main one."""
    calibration, ranks, length = settings.calibration, settings.running.ranks, len(text.ids)
    auto = calibration.samples if isinstance(calibration.samples, Auto) else None
    sizes = [length] if auto is None else look_sizes(auto.least, min(auto.most, length))
    looks = 1 if auto is None else len(look_sizes(auto.least, auto.most))
    seen: Accumulators | None = None
    used, verdicts, done = Used(), list[Verdict](), 0
    with tqdm(total=sizes[-1], desc="measuring", unit="sample", disable=not settings.running.progress, leave=False) as bar, quiet():
        for size in sizes:
            now, mine = Accumulators(schedule.models, metrics, keep=auto is not None), Used()
            taken = batches(text, done, size, calibration.batch_size, settings.alike)
            schedule.run(mine.counted(ranks.share(taken), bar), now)
            found, done = ranks.collect(now.state(), asdict(mine)), size
            for state, _ in found if seen is not None else found[1:]:
                (seen or now).merge(state)
            used = Used(used.samples + sum(one["samples"] for _, one in found), used.tokens + sum(one["tokens"] for _, one in found))
            seen = seen or now
            if auto is None:
                break
            if ranks.main:
                measured = Measurement(tables=seen.tables(), samples=used.samples, tokens=used.tokens, details={})
                verdicts = judge(settings.question, measured, seen.kept(), seen.starts, looks)
            if ranks.hand_out("settled", "yes" if ranks.main and all(one.settled for one in verdicts) else "") == "yes":
                break
    return Looked(seen, used, verdicts) if ranks.main and seen is not None else None


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


def batches(text: Text, first: int, last: int, size: int, alike: bool = False) -> Iterator[list[Sample]]:
    """Batches of samples of similar length, or of one. The order depends on the text only, up to the read-ahead.

    None has as many samples as tokens: whether layers take samples or tokens first would show nowhere.
    """
    numbered = _samples(text, first, last)
    while ahead := list(itertools.islice(numbered, READ_AHEAD * size)):
        ahead.sort(key=lambda sample: len(sample.ids))
        groups = [list(group) for _, group in itertools.groupby(ahead, key=lambda sample: len(sample.ids) if alike else 0)]
        for group in groups:
            for start in range(0, len(group), size):
                batch = group[start : start + size]
                square = len(batch) == len(batch[-1].ids) > 1
                yield from (batch[:1], batch[1:]) if square else (batch,)


def _samples(text: Text, first: int, last: int) -> Iterator[Sample]:
    for number in range(first, last):
        yield Sample(number, text.ids[number].tolist(), text.completions[number])


def _details(models: Sequence[Model], reading: Reading, used: int, where: torch.device, reason: str) -> dict[str, Any]:
    return {
        **reading.calibration.model_dump(mode="json", exclude={"batch_size", "bos"}),
        **reading.account(used),
        "dtype": {model.alias: str(model.dtype).removeprefix("torch.") for model in models},
        "device": f"{where} ({torch.cuda.get_device_name(where)})" if where.type == "cuda" else where.type,
        "schedule": reason,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
