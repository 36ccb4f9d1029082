"""Losses: models run as any stack of their layers. States that several stacks have in common are computed once.

Layers are called as the model's own forward calls them, each with the mask and positions of its own kind, whatever stands before it.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from layercut.caches import cache_folder
from layercut.calibration import Auto, Calibration
from layercut.checkpoint import Checkpoint
from layercut.encoding import SharedTokenizer
from layercut.engine import batches
from layercut.errors import CalibrationError, CheckpointError, LayercutError
from layercut.exceptions import PADDED
from layercut.fitting import PROBE, Fitter, Studio
from layercut.loading import load_tokenizer, pick_device, quiet
from layercut.measurements import Measurements, key_of
from layercut.memory import give_back
from layercut.perplexity import CHUNK_BYTES, LOGIT_BYTES
from layercut.plan import Measurement
from layercut.players import Player, Recorded, module_of
from layercut.ranks import ALONE, Ranks
from layercut.reading import Reading, Text, read
from layercut.relay import Place, Relay
from layercut.resident import padded
from layercut.routes import Node, Order
from layercut.schedules import fits, rooms
from layercut.stack import Fold, LayerRef, Stack, runs
from layercut.tokens import Sample
from layercut.trials import Loss, Part
from layercut.version import __version__


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
        self._relay: Relay | None = None
        self._made: dict[LayerRef, nn.Module] = {}
        self._fitted: Fitter | None = None

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

    def check_foldable(self, stack: Stack) -> None:
        """See `trials.Losses`. Raises RefusedError."""
        with quiet():
            self._fitter.check(stack)

    def fit(self, given: Stack, wanted: Stack, ridge: float) -> Fold:
        """See `trials.Losses`. Raises RefusedError, and as `losses` does."""
        with quiet():
            fold = self._fitter.fit(given, wanted, ridge)
        self._made = {layer: made for layer, made in self._made.items() if not layer.folds or layer in given}  # maps that were not taken go
        return fold

    @property
    def _fitter(self) -> Fitter:
        """What fits maps on the calibration text."""
        if self._fitted is None:
            reading, cache = self._book("calibration").reading, self._cache
            key = "" if cache is None or not self._ranks.main else key_of(self._models, reading.text.sequences, self._settings("folds"))
            probe = max(reading.text.ids[:64], key=len)[:PROBE].tolist()
            players, share = partial(self._held, reading), partial(self._share, reading)
            self._fitted = Fitter(Studio(players, self._module, share, probe, self._device, self._ranks, cache, key))
        return self._fitted

    def _held(self, reading: Reading) -> dict[str, Player]:
        """The models, all of them in memory. Raises CalibrationError when they do not fit."""
        players = self._loaded(reading)
        if self._relay is not None:
            hint = "give more with --memory, or leave out heal"
            raise CalibrationError("maps are fitted with the models in memory, and they do not fit", hint=hint)
        return players

    def _share(self, reading: Reading) -> Iterator[list[Sample]]:
        """This rank's part of a text, for one pass."""
        count = len(reading.text.ids)
        alike = any(model.config.get("model_type") in PADDED for model in self._models.values())
        mine = len(range(count)[self._ranks.seat.rank :: self._ranks.seat.world])
        with tqdm(total=mine, desc="fitting", unit="sample", disable=not self._progress, leave=False) as bar:
            for batch in self._ranks.share(batches(reading.text, 0, count, self._calibration.batch_size, alike)):
                yield batch
                bar.update(len(batch))

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
        self._relay = None
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

    def _settings(self, what: str = "losses") -> dict[str, Any]:
        return {
            "what": what,
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
        limit = LOGIT_BYTES if self._relay is None else self._relay.limit(LOGIT_BYTES)
        size = max(1, min(self._calibration.batch_size, limit // (length * width)))
        total = len(orders) * len(range(start, stop)[self._ranks.seat.rank :: self._ranks.seat.world])
        alike = any(model.config.get("model_type") in PADDED for model in self._models.values())
        name = f"losses of {len(orders)} stacks" if len(orders) > 1 else "loss"
        shown = tqdm(total=total, desc=name, unit="sample", disable=not self._progress, leave=False)
        mine = self._ranks.share(batches(reading.text, start, stop, size, alike))
        with self._together(), shown as bar, quiet():
            if self._relay is not None:
                self._relay.run(orders, list(mine), partial(self._add, sums, start, bar), partial(module_of, players=players))
                mine = iter(())
            for batch in mine:
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

    @torch.inference_mode()
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

        def step(layer: LayerRef, state: Tensor) -> Tensor:
            return recorded[layer.model].run(layer.index, self._module(layer), state)

        def end(number: int, state: Tensor) -> None:
            self._add(sums, start, bar, number, batch, recorded[orders[number].last].logits(state))

        for alias, root in roots.items():
            root.walk(recorded[alias].state.clone(), step, end)  # layers may be given the first state, too

    def _add(self, sums: Tensor, start: int, bar: tqdm[Any], number: int, batch: Sequence[Sample], logits: Tensor) -> None:
        """Put down what a stack loses on a batch."""
        ids, mask = (tensor.to(self._device) for tensor in padded(batch))
        sums[number, [sample.number - start for sample in batch]] = _sums(logits, ids, mask)
        bar.update(len(batch))

    def _module(self, layer: LayerRef) -> nn.Module:
        """A layer, made once where it is not as its model has it."""
        if layer.plain:
            return self._players[layer.model].staged.layers[layer.index]
        if layer not in self._made:
            self._made[layer] = module_of(layer, self._players)
        return self._made[layer]

    def _loaded(self, reading: Reading) -> dict[str, Player]:
        """The models, opened and looked at when they are first needed: held in memory, or streamed where they do not fit."""
        if not self._players:
            gc.collect()
            give_back()
            room, host = rooms(self._device, self._memory, self._ranks.seat.local_world)
            make = Player.load if fits(list(self._models.values()), self._device, self._dtype, room) else Player.streamed
            ids = torch.tensor([max(reading.text.ids[:64], key=len).tolist()], device=self._device)
            players: dict[str, Player] = {}
            for alias, model in self._models.items():
                player = make(alias, model, self._depths[alias], self._prefixes[alias], self._device, self._dtype)
                player.limits.check([Sample(0, ids[0].tolist())])
                if player.skeleton is None:
                    player.check(ids)
                players[alias] = player
            self._relay = self._relayed(players, Place(self._device, room, host, cache_folder()), ids)
            self._players = players
        return self._players

    def _relayed(self, players: Mapping[str, Player], place: Place, ids: Tensor) -> Relay | None:
        """What runs models that are not in memory; None for those that are. Looks whether predictions depend on earlier tokens only."""
        skeletons = {alias: player.skeleton for alias, player in players.items() if player.skeleton is not None}
        if not skeletons:
            return None
        relay = Relay(skeletons, place, lambda alias, calls: players[alias].look(calls))
        for alias, player in players.items():
            own = Order(alias, tuple(LayerRef(model=alias, index=index) for index in range(self._depths[alias])), alias)
            pair = [Sample(at, sample[0].tolist()) for at, sample in enumerate((ids, player.changed(ids)))]
            found: list[Tensor] = []
            relay.run([own], [pair], lambda number, batch, logits, found=found: found.append(logits))  # type: ignore[misc]
            player.compare(found[0][:1], found[0][1:])
        relay.progress = self._progress
        return relay

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
