"""The streamed schedule: models layer by layer from their files, each weight read once for all samples.

All samples go through one layer before the next one is loaded. Between layers their states wait in memory, or in a file
where they do not fit; so do the states of chosen tokens, which the accumulators take batch by batch at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from layercut.accumulators import Accumulators, Model
from layercut.architecture import find_stack
from layercut.arguments import Arguments
from layercut.checkpoint import Checkpoint
from layercut.errors import CalibrationError, CheckpointError
from layercut.loading import quiet
from layercut.memory import Room, give_back, shown
from layercut.resident import padded
from layercut.runner import Limits, by_token
from layercut.skeleton import Skeleton
from layercut.spill import Spill
from layercut.tokens import Sample
from layercut.weights import Weights


class Source(NamedTuple):
    """A model to be streamed."""

    alias: str
    checkpoint: Checkpoint
    depth: int
    prefix: str | None = None
    """Where the checkpoint keeps the layers; None to look for it."""


class Part(NamedTuple):
    """Samples of a batch whose states go to the accumulators together, and the tokens of each whose states are wanted."""

    start: int
    samples: list[Sample]
    rows: Tensor
    shape: tuple[int, int]
    """Samples and tokens of the whole batch, pads included."""

    def pick(self, state: Tensor) -> Tensor:
        """The wanted states, (tokens, hidden), of the state of the whole batch."""
        found = by_token(state, *self.shape)
        if found is None:
            message = f"a state between layers is {tuple(state.shape)}, where a batch has (samples, tokens) {self.shape}"
            raise CheckpointError(message, hint="this architecture cannot be measured")
        return found[self.start : self.start + len(self.samples), : self.rows.shape[1]][self.rows.to(state.device)]


class Work(NamedTuple):
    """The batches of a run, and the parts of each."""

    batches: list[list[Sample]]
    parts: list[list[Part]]

    @classmethod
    def of(cls, batches: list[list[Sample]], accumulators: Accumulators, size: int) -> Work:
        """Parts of `size` samples at most."""

        def part(batch: list[Sample], start: int) -> Part:
            samples = batch[start : start + size]
            return Part(start, samples, accumulators.choose(samples), (len(batch), _width(batch)))

        return cls(batches, [[part(batch, start) for start in range(0, len(batch), size)] for batch in batches])

    @property
    def tokens(self) -> int:
        """Tokens, pads included."""
        return sum(map(_area, self.batches))

    @property
    def chosen(self) -> int:
        """Tokens whose states are wanted."""
        return sum(int(part.rows.sum()) for parts in self.parts for part in parts)


class Streamed:
    """Runs every model layer by layer, one model after another. Memory does not grow with the number of layers."""

    def __init__(
        self,
        sources: Sequence[Source],
        device: torch.device,
        dtypes: Mapping[str, torch.dtype],
        room: Room,
        host: Room,
        folder: Path,
        *,
        progress: bool = True,
    ) -> None:
        """`dtypes` are by alias; `room` is that for weights on the device, `host` that for states beside it (the same on a CPU).

        States that do not fit stand in a file in `folder`. Raises CheckpointError when transformers does not know a model,
        RefusedError when it cannot be streamed, and CalibrationError when the user asked for less memory than a layer takes.
        """
        self._device, self._room, self._host, self._folder, self._progress = device, room, host, folder, progress
        self._weights = [Weights(source.checkpoint, pinned=device.type == "cuda") for source in sources]
        self._skeletons = [
            Skeleton(
                source.checkpoint,
                weights,
                source.depth,
                source.prefix or find_stack(source.checkpoint).prefix,
                device,
                dtypes[source.alias],
            )
            for source, weights in zip(sources, self._weights, strict=True)
        ]
        self._limits = [Limits.of(source.alias, skeleton.model) for source, skeleton in zip(sources, self._skeletons, strict=True)]
        self.models = tuple(Model(source.alias, source.depth, dtypes[source.alias]) for source in sources)
        self.spilled = 0
        """Bytes of states that went to disk."""
        for source, skeleton in zip(sources, self._skeletons, strict=True):
            if room.asked and self._fixed(skeleton) > room.size:
                message = f"a layer of model '{source.alias}' takes {shown(self._fixed(skeleton))} with what loading it takes"
                raise CalibrationError(f"{message}, and {shown(room.size)} are left ({room.reason})", hint="give more with --memory")

    @property
    def read(self) -> dict[str, int]:
        """Bytes of weights that were read, by file."""
        return {str(weights.checkpoint.folder / name): count for weights in self._weights for name, count in weights.read.items()}

    def run(self, batches: Iterable[list[Sample]], accumulators: Accumulators) -> None:
        """Run all batches through each layer, then hand over the states of each batch."""
        batches = list(batches)
        for limits in self._limits:
            for batch in batches:
                limits.check(batch)
        work = Work.of(batches, accumulators, self._part_size(batches))
        widest = max(map(_area, batches), default=0)
        taken = max(self._fixed(skeleton) + skeleton.activations(widest) for skeleton in self._skeletons)
        taken = 0 if self._device.type == "cuda" else taken
        room = max(0, self._host.size - taken) // 2
        try:
            with Spill(room, self._folder, self._expected(work)) as spill, quiet():
                for model, skeleton in enumerate(self._skeletons):
                    self._walk(model, skeleton, work, spill)
                self._hand_over(work, spill, accumulators)
                self.spilled = spill.in_file
        except torch.OutOfMemoryError:
            raise CalibrationError(f"out of memory on {self._device}", hint="lower batch_size or max_length") from None

    def _hand_over(self, work: Work, spill: Spill, accumulators: Accumulators) -> None:
        """Give the states of all boundaries of each part to the accumulators."""
        for number, parts in enumerate(work.parts):
            for part in parts:
                keys = [(model, number, part.start, at) for model, one in enumerate(self.models) for at in range(one.depth + 1)]
                accumulators.add(part.samples, part.rows, [spill.pop(key, self._device) for key in keys])

    def _walk(self, model: int, skeleton: Skeleton, work: Work, spill: Spill) -> None:
        """Put the boundary states of one model into the spill: (model, batch, start of the part, boundary)."""
        arguments = Arguments(spill, self._device)
        with self._weights[model], self._bar(skeleton) as bar:
            with skeleton.rest():
                for number, batch in enumerate(work.batches):
                    ids, mask = (tensor.to(self._device) for tensor in padded(batch))
                    state, calls = skeleton.record(ids, mask)
                    arguments.keep(number, calls)
                    self._keep(spill, (model, number), state, work.parts[number], 0)
            for index in range(len(skeleton.layers)):
                with skeleton.layer(index) as layer, torch.inference_mode():
                    if self._device.type == "cuda" or self._fits_two(skeleton):
                        skeleton.fetch(index + 1)
                    for number in range(len(work.batches)):
                        state = spill.get((model, number), self._device)
                        state = skeleton.output(arguments.call(number, index), layer, state)
                        self._keep(spill, (model, number), state, work.parts[number], index + 1)
                give_back()
                bar.update()
            for number in range(len(work.batches)):
                spill.pop((model, number))
            arguments.drop()

    def _keep(self, spill: Spill, key: tuple[int, int], state: Tensor, parts: Sequence[Part], boundary: int) -> None:
        for part in parts:
            spill.put((*key, part.start, boundary), part.pick(state))
        spill.put(key, state)

    def _part_size(self, batches: Sequence[Sequence[Sample]]) -> int:
        """Samples whose states at all boundaries take a quarter of the room at most; one at least."""
        longest = max((len(sample.ids) for batch in batches for sample in batch), default=1)
        wide = zip(self._skeletons, self.models, strict=True)
        each = sum(skeleton.hidden * skeleton.dtype.itemsize * (model.depth + 1) for skeleton, model in wide) * longest
        return max(1, min(self._room.size, self._host.size) // (4 * each))

    def _fixed(self, skeleton: Skeleton) -> int:
        """Bytes that a model takes at once, whatever the samples: what is not in the layers, or a layer while it is loaded."""
        return max(skeleton.rest_size, skeleton.layer_peak)

    def _fits_two(self, skeleton: Skeleton) -> bool:
        """Whether the next layer may be read while one computes."""
        return self._fixed(skeleton) + skeleton.layer_size <= self._room.size // 2

    def _expected(self, work: Work) -> int:
        """Bytes of states at the end, when there are most."""
        sizes = [skeleton.hidden * skeleton.dtype.itemsize for skeleton in self._skeletons]
        kept = sum(size * work.chosen * (model.depth + 1) for size, model in zip(sizes, self.models, strict=True))
        return kept + max(sizes) * work.tokens

    def _bar(self, skeleton: Skeleton) -> tqdm[Any]:
        return tqdm(total=len(skeleton.layers), desc="measuring", unit="layer", disable=not self._progress, leave=False)


def _area(batch: Sequence[Sample]) -> int:
    """Tokens of a batch, pads included."""
    return len(batch) * _width(batch)


def _width(batch: Sequence[Sample]) -> int:
    return max(len(sample.ids) for sample in batch)
