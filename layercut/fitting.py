"""Fitting: the linear map that makes one layer stand in for those behind it, by least squares over the calibration text."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from layercut.crossings import AtHand, Crossing, States, Take
from layercut.errors import CheckpointError, RefusedError
from layercut.fits import fault_of, keep_map, map_of, path_of
from layercut.loading import quiet
from layercut.measurements import Measurements
from layercut.plan import Measurement
from layercut.players import Player, Recorded
from layercut.ranks import Ranks
from layercut.resident import padded
from layercut.stack import Fold, LayerRef, Stack
from layercut.targets import NoTarget, Target, find_target
from layercut.tokens import Sample
from layercut.trials import Loss, Misses, Part

PROBE = 24
"""Tokens of the text on which it is tried what can be folded into."""
HINT = "leave out heal, or remove layers with prune in place of replace"


class Studio(NamedTuple):
    """Models, ready to run on the text."""

    players: Callable[[], Mapping[str, Player]]
    at_hand: AtHand
    cross: Callable[[Part, Crossing, Take], None]
    """Gives the states at a seam, for each batch of this rank's share of a part of the text."""
    counts: Callable[[Part], list[int]]
    """Tokens of every sample of a part of the text."""
    probe: list[int]
    """The tokens of a sample."""
    device: torch.device
    ranks: Ranks
    cache: Path | None
    key: Callable[[Part], str]
    """Names all that is found on a part of the text depends on but stacks, ridge and map; what was found before is known by it."""


class Sums(NamedTuple):
    """Sums over tokens, in float64. M is what the module adds (d), D what is missing in the stream behind it (d).

    Both are in units of the length of the state that is expected: few tokens have states a hundred times as long as the others, and the
    norm of the layer behind the seam takes the length away.
    """

    gram: Tensor
    """M' M, (d, d)."""
    cross: Tensor
    """M' D, (d, d)."""
    missing: Tensor
    """Squared norm of D, ()."""
    tokens: Tensor

    def map(self, ridge: float) -> Tensor:
        """T = I + (M'M + aI)^-1 M'D, (d, d) of float64: with it M T is nearest to M + D. a is `ridge` times the mean of the diagonal.

        ReplaceMe (arXiv 2505.02819, appendix A.2) solves T = (M'M + aI)^-1 M'(M + D). The two are the same without a ridge; with one,
        that map goes to zero and takes the module away where text tells little, while this one goes to the identity, the plain cut.
        """
        penalty = ridge * self.gram.diagonal().mean()
        eye = torch.eye(len(self.gram), dtype=torch.float64)
        change: Tensor = torch.linalg.solve(self.gram + penalty * eye, self.cross)
        return eye + change

    def explained(self, fold: Tensor) -> float:
        """Share of the squared norm of D that the map makes up for."""
        change = fold - torch.eye(len(fold), dtype=torch.float64)
        gain = 2 * (change * self.cross).sum() - (change * (self.gram @ change)).sum()
        return float(gain / self.missing) if self.missing > 0 else 0.0


class Fitter:
    """Fits maps, and keeps what was fitted."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._shelf = None if studio.cache is None or not studio.ranks.main else Measurements(studio.cache)
        self._known: dict[Part, dict[str, Any]] = {}
        self._probes: dict[str, Recorded] = {}

    def check(self, stack: Stack) -> None:
        """Raise RefusedError when a map can be folded into no layer of the stack."""
        reason = ""
        for layer in dict.fromkeys(stack):
            found = self._told(layer)
            if not isinstance(found, str):
                return
            reason = reason or f"{_where(layer)}: {found}"
        raise RefusedError(f"no map can be folded into this model: {reason}", hint=HINT)

    def fit(self, given: Stack, wanted: Stack, ridge: float) -> Fold:
        """See `trials.Losses.fit`."""
        ranks, text = self._studio.ranks, json.dumps([_described(given), _described(wanted), ridge])
        name = f"fit {hashlib.sha256(text.encode()).hexdigest()}"
        fold = _fold_of(self._recall("calibration", name))
        if ranks.hand_out("fit known", "" if fold is None else "yes") != "yes":
            fold = self._fit(given, wanted, ridge)
            if fold is not None:
                self._remember("calibration", name, fold.model_dump(mode="json"))
        return self._shared(fold)

    def _fit(self, given: Stack, wanted: Stack, ridge: float) -> Fold | None:
        """The fold, on the main rank."""
        target, where = self._told(given[-1]), _where(given[-1])
        if isinstance(target, str):
            raise RefusedError(f"no map can be folded into {where}: {target}", hint=HINT)
        sums = self._sum(Crossing(given, wanted, target.module), self._size(given[-1], target))
        parts = self._studio.ranks.collect(sums._asdict(), {})
        if not parts:
            return None
        return self._solved(Sums(*(torch.stack([state[key] for state, _ in parts]).sum(0) for key in Sums._fields)), target, ridge, where)

    def _solved(self, sums: Sums, target: Target, ridge: float, where: str) -> Fold:
        """The map that sums come to, kept in its file."""
        if not all(bool(part.isfinite().all()) for part in sums):
            raise _not_finite(where)
        if not bool(sums.gram.any()):
            raise RefusedError(f"no map can be folded into {where}: {target.module} adds nothing to the stream", hint=HINT)
        try:
            found = sums.map(ridge).float()
        except RuntimeError:  # the text says less than a map has unknowns
            raise RefusedError(f"the text does not determine a map for {where}", hint="raise ridge, or take more samples") from None
        digest = keep_map(found.contiguous().numpy().astype("<f4", copy=False).tobytes(), len(found))
        return Fold(
            sha256=digest, size=len(found), module=target.module, columns=target.columns, tokens=int(sums.tokens), ridge=ridge,
            explained=sums.explained(found.double()),
        )  # fmt: skip

    def _shared(self, fold: Fold | None) -> Fold:
        """The fold that the main rank has, with its map, on every rank."""
        ranks = self._studio.ranks
        made = Fold.model_validate_json(ranks.hand_out("fold", None if fold is None else fold.model_dump_json()))
        if ranks.seat.world > 1:
            data = ranks.hand_out("map", map_of(made.sha256, made.size).numpy().tobytes().hex() if ranks.main else None)
            if not ranks.main:
                keep_map(bytes.fromhex(data), made.size)
        return made

    def _size(self, layer: LayerRef, target: Target) -> int:
        """Elements of what a module gives for a token."""
        module = self._studio.players()[layer.model].staged.layers[layer.index].get_submodule(target.module)
        return module.get_parameter("weight").shape[1 if target.columns else 0]

    def _sum(self, crossing: Crossing, size: int) -> Sums:
        """The sums of this rank's share of the calibration text."""
        device = self._sums_on
        square = torch.zeros(size, size, dtype=torch.float64, device=device)
        sums = Sums(square, square.clone(), square.new_zeros(()), square.new_zeros(()))

        def take(batch: Sequence[Sample], states: States) -> None:
            there = padded(batch)[1].bool()
            added, state, aim = (part[there.to(part.device)].to(device, torch.float64) for part in _alike(states))
            length = _length(aim)
            added, missing = added / length, (aim - state) / length
            sums.gram.addmm_(added.T, added)
            sums.cross.addmm_(added.T, missing)
            sums.missing.add_(missing.square().sum())
            sums.tokens.add_(len(added))

        self._studio.cross("calibration", crossing, take)
        return Sums(*(part.cpu() for part in sums))

    # How far it leads

    def misses(self, given: Stack, wanted: Stack, fold: Fold) -> Misses:
        """See `trials.Losses.misses`."""
        ranks, counts = self._studio.ranks, self._studio.counts("held out")
        text = json.dumps([_described(given), _described(wanted), fold.sha256])
        name = f"miss {hashlib.sha256(text.encode()).hexdigest()}"
        rows = _rows_of(self._recall("held out", name), len(counts))
        known = json.loads(ranks.hand_out("miss known", json.dumps(rows)))
        if known is None:
            found = ranks.collect({"misses": self._missed(Crossing(given, wanted, fold.module), fold, len(counts))}, {})
            rows = torch.stack([state["misses"] for state, _ in found]).sum(0).tolist() if found else None
            known = json.loads(ranks.hand_out("miss", json.dumps(rows)))
            if not all(math.isfinite(one) for row in known for one in row):
                raise _not_finite(_where(given[-1]))
            self._remember("held out", name, known)
        return Misses(*(Loss(tuple(row), tuple(counts)) for row in known))

    def _missed(self, crossing: Crossing, fold: Fold, samples: int) -> Tensor:
        """Sums over the tokens of every held-out sample of this rank's share, without and with the map: (2, samples)."""
        device = self._sums_on
        change = map_of(fold.sha256, fold.size).to(device, torch.float64)
        change.diagonal().sub_(1)
        found = torch.zeros(2, samples, dtype=torch.float64)

        def take(batch: Sequence[Sample], states: States) -> None:
            there = padded(batch)[1].bool()
            added, state, aim = (part.to(device, torch.float64) for part in _alike(states))
            missing = aim - state
            for row, error in enumerate((missing, missing - added @ change)):
                shares = (error / _length(aim)).square().sum(-1)
                found[row, [sample.number for sample in batch]] = shares.cpu().where(there, 0.0).sum(1)

        self._studio.cross("held out", crossing, take)
        return found

    @property
    def _sums_on(self) -> torch.device:
        """Where there is float64."""
        return torch.device("cpu") if self._studio.device.type == "mps" else self._studio.device

    # What a map can be folded into

    def _told(self, layer: LayerRef) -> Target | str:
        """The module of a layer that a map can be folded into, or why there is none. The same on every rank."""
        ranks, told = self._studio.ranks, None
        if ranks.main:
            name = f"target {json.dumps(_described((layer,)))}"
            told = self._recall("calibration", name)
            if not isinstance(told, str) and not (isinstance(told, list) and [type(one) for one in told] == [str, bool]):
                told = self._tried(layer)
                self._remember("calibration", name, told)
        told = json.loads(ranks.hand_out("target", json.dumps(told)))
        return told if isinstance(told, str) else Target(*told)

    def _tried(self, layer: LayerRef) -> Target | str:
        if layer.identity:
            return "it adds nothing"
        player = self._studio.players()[layer.model]
        recorded = self._probed(layer.model, player)
        try:
            with self._studio.at_hand(layer) as module, torch.inference_mode(), quiet():
                target = find_target(module, recorded.state.shape[-1], lambda: recorded.run(layer.index, module, recorded.state.clone()))
            held = player.weights(layer.index)
        except NoTarget as error:
            return str(error)
        except RefusedError as error:
            return error.message
        if f"{target.module}.weight" not in held:
            return f"its file has no {target.module}.weight"
        return target

    def _probed(self, alias: str, player: Player) -> Recorded:
        """A model that has read the probe; read once."""
        if alias not in self._probes:
            ids = torch.tensor([self._studio.probe], device=self._studio.device)
            with player.rest():
                self._probes[alias] = player.record(ids, torch.ones_like(ids))
        return self._probes[alias]

    def release(self) -> None:
        """Forget the models, but not what was found with them."""
        self._probes.clear()

    # What was found before

    def _recall(self, part: Part, name: str) -> Any:
        if part not in self._known:
            entry = None if self._shelf is None else self._shelf.find(self._studio.key(part), {})
            found = None if entry is None else entry.details.get("folds")
            self._known[part] = found if isinstance(found, dict) else {}
        return self._known[part].get(name)

    def _remember(self, part: Part, name: str, value: Any) -> None:
        self._recall(part, name)
        known = self._known[part]
        known[name] = value
        if self._shelf is not None:
            self._shelf.keep(self._studio.key(part), Measurement(tables=(), samples=1, tokens=1, details={"folds": known}))


def _where(layer: LayerRef) -> str:
    return f"layer {layer.index} of model '{layer.model}'"


def _not_finite(where: str) -> CheckpointError:
    return CheckpointError(f"the states at {where} are not finite", hint="measure in another dtype")


def _length(states: Tensor) -> Tensor:
    """Lengths of states, (..., 1): what is seen of a state behind the norm of the next layer is relative to it."""
    lengths: Tensor = states.norm(dim=-1, keepdim=True)
    return lengths.clamp(min=torch.finfo(states.dtype).tiny)


def _alike(states: States) -> States:
    """States of one size. Raises RefusedError."""
    if states.state.shape != states.aim.shape:
        raise RefusedError("a map cannot lead from one hidden size to another", hint=HINT)
    return states


def _described(stack: Stack) -> list[dict[str, Any]]:
    """What tells stacks apart, as JSON."""
    return [layer.model_dump(mode="json", exclude_defaults=True) for layer in stack]


def _fold_of(known: Any) -> Fold | None:
    """A fit that was kept, while its map is still there."""
    try:
        fold = Fold.model_validate(known)
    except ValidationError:
        return None
    return fold if fault_of(path_of(fold.sha256), fold.sha256, fold.size) is None else None


def _rows_of(known: Any, samples: int) -> list[list[float]] | None:
    """What was kept of so many samples, without and with a map."""
    if not isinstance(known, list) or len(known) != 2:
        return None
    for row in known:
        if not isinstance(row, list) or len(row) != samples:
            return None
        if not all(isinstance(one, int | float) and math.isfinite(one) for one in row):
            return None
    return known
