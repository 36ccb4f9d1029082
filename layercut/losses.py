"""Losses: models in memory, run as any stack of their layers. States that several stacks have in common are computed once.

Layers are called as the model's own forward calls them, each with the mask and positions of its own kind, whatever stands before it.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from layercut.calibration import Auto, Calibration
from layercut.checkpoint import Checkpoint
from layercut.encoding import SharedTokenizer
from layercut.engine import batches
from layercut.errors import CalibrationError, CheckpointError, LayercutError, RefusedError
from layercut.exceptions import PADDED
from layercut.loading import load_tokenizer, pick_device, pick_dtype, quiet
from layercut.measurements import Measurements, key_of
from layercut.memory import shown, whole_size
from layercut.perplexity import CHUNK_BYTES, LOGIT_BYTES
from layercut.plan import Measurement
from layercut.players import Player, Recorded, module_of
from layercut.ranks import ALONE, Ranks
from layercut.reading import Reading, Text, read
from layercut.resident import padded
from layercut.schedules import ACTIVATIONS, rooms
from layercut.stack import LayerRef, Stack, runs
from layercut.tokens import Sample
from layercut.trials import Loss, Part
from layercut.version import __version__


class Order(NamedTuple):
    """How a stack runs: whose embeddings, which layers, whose head. Layers that add nothing are left out."""

    first: str
    layers: Stack
    last: str

    @classmethod
    def of(cls, stack: Stack) -> Order:
        """Raises RefusedError when the stack is empty."""
        if not stack:
            raise RefusedError("a stack without layers has no loss")
        return cls(stack[0].model, tuple(layer for layer in stack if not layer.identity), stack[-1].model)

    @property
    def name(self) -> str:
        """What tells it apart: layers as they are by their range, others by all that is done to them."""
        parts = [list(run) for run in runs(self.layers)]
        made = [layer.model_dump(mode="json", exclude_defaults=True) for layer in self.layers if not layer.plain]
        return json.dumps([self.first, parts, self.last, *([made] if made else [])])


@dataclass
class Node:
    """Where the ways of stacks part that began alike."""

    children: dict[LayerRef, Node] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    """Numbers of the stacks that end here."""
    size: int = 0
    """Stacks that come through here."""

    @classmethod
    def of(cls, orders: Sequence[Order]) -> dict[str, Node]:
        """The stacks as trees, one for each model that some of them begin with."""
        roots: dict[str, Node] = {}
        for number, order in enumerate(orders):
            node = roots.setdefault(order.first, cls())
            node.size += 1
            for layer in order.layers:
                node = node.children.setdefault(layer, cls())
                node.size += 1
            node.ends.append(number)
        return roots

    def walk(self, state: Tensor, step: Callable[[LayerRef, Tensor], Tensor], end: Callable[[int, Tensor], None]) -> None:
        """Every state once, those of the fewest stacks first: so that few states wait, however many stacks there are."""
        waiting: list[tuple[Node, LayerRef | None, Tensor]] = [(self, None, state)]
        while waiting:
            node, layer, state = waiting.pop()
            if layer is not None:
                state = step(layer, state)
            for number in node.ends:
                end(number, state.clone())
            shared = len(node.children) > 1
            for layer, child in sorted(node.children.items(), key=lambda one: -one[1].size):
                waiting.append((child, layer, state.clone() if shared else state))  # a layer may change its input in place


@dataclass
class Book:
    """The losses that are known of one part of the text."""

    reading: Reading
    known: dict[str, list[float]]
    """Sums of the first samples, by the name of the order."""
    keep: Callable[[], None]

    @property
    def counts(self) -> list[int]:
        """Tokens of every sample that are predicted."""
        return [len(ids) - 1 for ids in self.reading.text.ids]


class Meter:
    """Runs stacks of the layers of some models on the calibration text of a recipe, and keeps what they lose (`trials.Losses`)."""

    def __init__(
        self,
        models: Mapping[str, Checkpoint],
        calibration: Calibration,
        *,
        depths: Mapping[str, int],
        prefixes: Mapping[str, str],
        progress: bool = True,
        dtype: str | None = None,
        device: str | None = None,
        memory: int | None = None,
        ranks: Ranks = ALONE,
        cache: Path | None = None,
    ) -> None:
        """Parameters are those of `engine.measure`. Nothing is loaded before a loss is asked for that is not known."""
        if isinstance(calibration.samples, Auto):
            hint = "give a number of samples, or choose by distance"
            raise CalibrationError("samples: auto cannot tell whether a choice by loss is settled", hint=hint)
        self._models, self._calibration, self._depths, self._prefixes = dict(models), calibration, dict(depths), dict(prefixes)
        self._device, self._dtype, self._memory = pick_device(device, ranks.seat.local_rank), dtype, memory
        self._ranks, self._cache, self._progress = ranks, cache, progress and ranks.main
        self._books: dict[Part, Book] = {}
        self._players: dict[str, Player] = {}
        self._made: dict[LayerRef, nn.Module] = {}

    def losses(self, stacks: Sequence[Stack], part: Part = "calibration", share: float = 1.0) -> list[Loss]:
        """The loss of every stack on a part of the text; see `trials.Losses`.

        Raises CalibrationError when the text or the memory does not do, CheckpointError when a loss is not finite, and RefusedError when
        a model has no loss, or cannot be followed layer by layer.
        """
        book = self._book(part)
        count = max(1, math.ceil(share * len(book.reading.text.ids)))
        orders = {order.name: order for order in map(Order.of, stacks)}
        lacking: dict[int, list[str]] = {}
        for name in orders:
            have = len(book.known.get(name, ()))
            if have < count:
                lacking.setdefault(have, []).append(name)
        for have, names in sorted(lacking.items()):
            sums = self._run([orders[name] for name in names], book.reading, have, count)
            for name, row in zip(names, sums, strict=True):
                self._check_finite(row, orders[name])
                book.known[name] = [*book.known.get(name, ()), *row]
        if lacking:
            book.keep()
        counts = tuple(book.counts[:count])
        return [Loss(tuple(book.known[Order.of(stack).name][:count]), counts) for stack in stacks]

    def about(self) -> dict[str, Any]:
        """What was measured on, and how."""
        found: dict[str, Any] = {"unit": "nats a token", **self._calibration.model_dump(mode="json", exclude={"batch_size"})}
        for part, book in self._books.items():
            text = book.reading.text.ids
            found[part.replace(" ", "_")] = {"text": _named(self._calibration, part), "samples": len(text), "tokens": sum(map(len, text))}
        return found | {"device": str(self._device), "torch": torch.__version__, "transformers": transformers.__version__}

    def release(self) -> None:
        """Give the memory of the models back until they are needed again."""
        self._players.clear()
        self._made.clear()
        gc.collect()

    def _book(self, part: Part) -> Book:
        if part not in self._books:
            tokenizers = {alias: load_tokenizer(model.folder) for alias, model in self._models.items()}
            with quiet():
                tokenizer = SharedTokenizer(tokenizers, self._calibration.bos)
                reading = read(self._calibration, tokenizer, held_out=part == "held out")
            long = [ids for ids in reading.text.ids if len(ids) > 1]
            reading = reading._replace(text=Text(long, [None] * len(long)))
            if not long:
                raise CalibrationError("the calibration text gives no token to predict", hint="use longer texts")
            self._books[part] = self._opened(reading)
        return self._books[part]

    def _opened(self, reading: Reading) -> Book:
        """What was measured before on this text, if anything. The main rank reads and writes."""
        if self._cache is None:
            return Book(reading, {}, lambda: None)
        shelf, key = Measurements(self._cache), ""
        if self._ranks.main:
            key = key_of(self._models, reading.text.sequences, self._settings())
            found = shelf.find(key, self._depths)
            self._ranks.hand_out("losses known", json.dumps({} if found is None else found.details.get("losses")))
            known = _sane({} if found is None else found.details.get("losses"), len(reading.text.ids))
        else:
            known = _sane(json.loads(self._ranks.hand_out("losses known")), len(reading.text.ids))
        book = Book(reading, known, lambda: None)

        def keep() -> None:
            samples, tokens = len(reading.text.ids), sum(map(len, reading.text.ids))
            shelf.keep(key, Measurement(tables=(), samples=samples, tokens=tokens, details={"losses": book.known}))

        if self._ranks.main:
            book.keep = keep
        return book

    def _settings(self) -> dict[str, Any]:
        return {
            "what": "losses",
            "calibration": self._calibration.model_dump(mode="json"),
            "device": str(self._device) if self._device.type != "cuda" else torch.cuda.get_device_name(self._device),
            "dtype": self._dtype,
            "depths": self._depths,
            "prefixes": self._prefixes,
            "versions": [__version__, torch.__version__, transformers.__version__],
        }

    def _run(self, orders: Sequence[Order], reading: Reading, start: int, stop: int) -> list[list[float]]:
        """Sums of every stack for the samples from `start` to `stop`, the same on every rank."""
        with self._together():
            players = self._loaded(reading)
        roots, sums = Node.of(orders), torch.zeros(len(orders), stop - start, dtype=torch.float64)
        length, width = max(map(len, reading.text.ids[start:stop])), max(player.logit_size for player in players.values())
        size = max(1, min(self._calibration.batch_size, LOGIT_BYTES // (length * width)))
        total = len(orders) * len(range(start, stop)[self._ranks.seat.rank :: self._ranks.seat.world])
        alike = any(model.config.get("model_type") in PADDED for model in self._models.values())
        name = f"losses of {len(orders)} stacks" if len(orders) > 1 else "loss"
        shown = tqdm(total=total, desc=name, unit="sample", disable=not self._progress, leave=False)
        with self._together(), shown as bar, quiet(), torch.inference_mode():
            for batch in self._ranks.share(batches(reading.text, start, stop, size, alike)):
                try:
                    self._run_batch(batch, players, orders, roots, sums, start, bar)
                except torch.OutOfMemoryError:
                    raise CalibrationError(f"out of memory on {self._device}", hint="lower batch_size or max_length") from None
        found = self._ranks.collect({"sums": sums}, {})
        whole = json.dumps(torch.stack([state["sums"] for state, _ in found]).sum(0).tolist()) if found else None
        rows: list[list[float]] = json.loads(self._ranks.hand_out("losses", whole))
        return rows

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What fails on one rank fails on all: some choices go on without losses then, and all ranks must."""
        failure: LayercutError | None = None
        try:
            yield
        except LayercutError as error:
            failure = error
        said = torch.tensor(list(str(failure or "").encode()), dtype=torch.uint8)
        found = [bytes(state["said"].tolist()).decode() for state, _ in self._ranks.collect({"said": said}, {})]
        first = self._ranks.hand_out("losses failed", next(filter(None, found), ""))
        if failure is not None:
            raise failure
        if first:
            raise CalibrationError(first)

    def _run_batch(
        self,
        batch: list[Sample],
        players: Mapping[str, Player],
        orders: Sequence[Order],
        roots: Mapping[str, Node],
        sums: Tensor,
        start: int,
        bar: tqdm[Any],
    ) -> None:
        ids, mask = (tensor.to(self._device) for tensor in padded(batch))
        recorded: dict[str, Recorded] = {}
        for alias, player in players.items():
            player.limits.check(batch)
            recorded[alias] = player.record(ids, mask)
        numbers = torch.tensor([sample.number - start for sample in batch])

        def step(layer: LayerRef, state: Tensor) -> Tensor:
            return recorded[layer.model].run(layer.index, self._module(layer), state)

        def end(number: int, state: Tensor) -> None:
            logits = recorded[orders[number].last].logits(state)
            sums[number, numbers] = _sums(logits, ids, mask)
            bar.update(len(batch))

        for alias, root in roots.items():
            root.walk(recorded[alias].state.clone(), step, end)  # layers may be given the first state, too

    def _module(self, layer: LayerRef) -> nn.Module:
        """A layer, made once where it is not as its model has it."""
        if layer.plain:
            return self._players[layer.model].staged.layers[layer.index]
        if layer not in self._made:
            self._made[layer] = module_of(layer, self._players)
        return self._made[layer]

    def _loaded(self, reading: Reading) -> dict[str, Player]:
        """The models, loaded and looked at when they are first needed."""
        if not self._players:
            self._check_room()
            longest = max(reading.text.ids[:64], key=len).tolist()
            for alias, model in self._models.items():
                player = Player.load(alias, model, self._depths[alias], self._prefixes[alias], self._device, self._dtype)
                player.limits.check([Sample(0, longest)])
                player.check(torch.tensor([longest], device=self._device))
                self._players[alias] = player
        return self._players

    def _check_room(self) -> None:
        """Raise CalibrationError when the models do not fit into memory."""
        picked = pick_dtype(self._device, self._dtype)
        size = sum(whole_size(model, None if picked == "auto" else picked.itemsize) for model in self._models.values())
        room, _ = rooms(self._device, self._memory, self._ranks.seat.local_world)
        needed = int(ACTIVATIONS * size)
        quantised = any(model.config.get("quantization_config") is not None for model in self._models.values())
        if needed > room.size and not (quantised and not room.asked):
            message = f"losses need the models in memory: {shown(needed)} with what running them takes, and {shown(room.size)} are left"
            raise CalibrationError(
                f"{message} ({room.reason})", hint="give more with --memory, or choose by distance, which streams models"
            )

    def _check_finite(self, row: Sequence[float], order: Order) -> None:
        if not all(map(math.isfinite, row)):
            kept = " + ".join(f"{run.model}{run}" for run in runs(order.layers)) or "no layers"
            raise CheckpointError(f"the loss of the stack {kept} is not finite", hint="measure in another dtype, or protect the layers")


def _sane(found: Any, samples: int) -> dict[str, list[float]]:
    """What of an entry can be losses of so many samples at most."""
    if not isinstance(found, dict):
        return {}
    return {
        name: row
        for name, row in found.items()
        if isinstance(row, list) and len(row) <= samples and all(isinstance(one, int | float) and math.isfinite(one) for one in row)
    }


def _named(calibration: Calibration, part: Part) -> str:
    """Which text a part is, in words."""
    first = f"the first {calibration.most} samples" if part == "calibration" else f"up to {calibration.most} samples that follow those"
    if calibration.source == "builtin":
        return "the built-in text" if part == "calibration" else "the held-out part of the built-in text, from its end"
    return f"{first}, in turns" if calibration.source == "mix" else first


def _sums(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of the tokens of every sample but its first, summed: (samples) of float64. Computed in float32."""
    there = mask[:, 1:].bool()
    owners = torch.arange(len(ids), device=ids.device)[:, None].expand_as(there)[there]
    targets, rows = ids[:, 1:][there], logits[:, :-1][there]
    step = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    losses = [
        torch.nn.functional.cross_entropy(part.float(), target, reduction="none").double()
        for part, target in zip(torch.split(rows, step), torch.split(targets, step), strict=True)
    ]
    sums = torch.zeros(len(ids), dtype=torch.float64)
    return sums.index_add(0, owners.cpu(), torch.cat(losses).cpu())
