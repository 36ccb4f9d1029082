"""Fitting: the linear map that makes one layer stand in for those behind it, by least squares over the calibration text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from layercut.errors import CalibrationError, CheckpointError, RefusedError
from layercut.fits import fault_of, keep_map, map_of, path_of
from layercut.measurements import Measurements
from layercut.plan import Measurement
from layercut.players import Player, Recorded
from layercut.ranks import Ranks
from layercut.resident import padded
from layercut.stack import Fold, LayerRef, Stack
from layercut.targets import NoTarget, Target, find_target, outputs_of
from layercut.tokens import Sample

PROBE = 24
"""Tokens of the text on which it is tried what can be folded into."""
HINT = "leave out heal, or remove layers with prune in place of replace"


class Studio(NamedTuple):
    """Models, ready to run on the calibration text."""

    players: Callable[[], Mapping[str, Player]]
    module: Callable[[LayerRef], nn.Module]
    """A layer as a stack has it."""
    batches: Callable[[], Iterator[list[Sample]]]
    """This rank's share of the text."""
    probe: list[int]
    """The tokens of a sample."""
    device: torch.device
    ranks: Ranks
    cache: Path | None
    key: str
    """Names all that a fit depends on but its stacks and ridge; what was fitted before is found by it."""


class Sums(NamedTuple):
    """Sums over tokens, in float64. M is what the module adds (d), D what is missing in the stream behind it (d)."""

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


class States(NamedTuple):
    """States of a batch, (samples, tokens, d) each."""

    added: Tensor
    """What the module that is mapped adds to the stream."""
    state: Tensor
    """What leaves its layer."""
    aim: Tensor
    """What leaves the layers that it stands in for."""


class Fitter:
    """Fits maps, and keeps what was fitted."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._shelf = None if studio.cache is None or not studio.ranks.main else Measurements(studio.cache)
        self._known: dict[str, Any] | None = None

    def check(self, stack: Stack) -> None:
        """Raise RefusedError when a map can be folded into no layer of the stack."""
        reason = ""
        for layer in dict.fromkeys(stack):
            found = self._told(layer)
            if not isinstance(found, str):
                return
            reason = reason or f"layer {layer.index} of model '{layer.model}': {found}"
        raise RefusedError(f"no map can be folded into this model: {reason}", hint=HINT)

    def fit(self, given: Stack, wanted: Stack, ridge: float) -> Fold:
        """See `trials.Losses.fit`."""
        ranks, text = self._studio.ranks, json.dumps([_described(given), _described(wanted), ridge])
        name = f"fit {hashlib.sha256(text.encode()).hexdigest()}"
        fold = _fold_of(self._recall(name))
        if ranks.hand_out("fit known", "" if fold is None else "yes") != "yes":
            fold = self._fit(given, wanted, ridge)
            if fold is not None:
                self._remember(name, fold.model_dump(mode="json"))
        return self._shared(fold)

    def _fit(self, given: Stack, wanted: Stack, ridge: float) -> Fold | None:
        """The fold, on the main rank."""
        layer, target = given[-1], self._told(given[-1])
        where = f"layer {layer.index} of model '{layer.model}'"
        if isinstance(target, str):
            raise RefusedError(f"no map can be folded into {where}: {target}", hint=HINT)
        try:
            sums = self._sum(given, wanted, target)
        except torch.OutOfMemoryError:
            raise CalibrationError(f"out of memory on {self._studio.device}", hint="lower batch_size or max_length") from None
        parts = self._studio.ranks.collect(sums._asdict(), {})
        if not parts:
            return None
        return self._solved(Sums(*(torch.stack([state[key] for state, _ in parts]).sum(0) for key in Sums._fields)), target, ridge, where)

    def _solved(self, sums: Sums, target: Target, ridge: float, where: str) -> Fold:
        """The map that sums come to, kept in its file."""
        if not all(bool(part.isfinite().all()) for part in sums):
            raise CheckpointError(f"the states at {where} are not finite", hint="measure in another dtype")
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

    @torch.inference_mode()
    def _sum(self, given: Stack, wanted: Stack, target: Target) -> Sums:
        """The sums of this rank's share of the text."""
        studio = self._studio
        players = studio.players().values()
        module = studio.module(given[-1]).get_submodule(target.module)
        size = module.get_parameter("weight").shape[1 if target.columns else 0]
        device = torch.device("cpu") if studio.device.type == "mps" else studio.device  # it has no float64
        square = torch.zeros(size, size, dtype=torch.float64, device=device)
        sums = Sums(square, square.clone(), square.new_zeros(()), square.new_zeros(()))
        for batch in studio.batches():
            for player in players:
                player.limits.check(batch)
            ids, mask = (tensor.to(studio.device) for tensor in padded(batch))
            there = mask.bool()
            states = self._states(ids, mask, given, wanted, target)
            if states.state.shape != states.aim.shape:
                raise RefusedError("a map cannot lead from one hidden size to another", hint=HINT)
            added, state, aim = (part[there].to(device, torch.float64) for part in states)
            sums.gram.addmm_(added.T, added)
            sums.cross.addmm_(added.T, aim - state)
            sums.missing.add_((aim - state).square().sum())
            sums.tokens.add_(len(added))
        return Sums(*(part.cpu() for part in sums))

    def _states(self, ids: Tensor, mask: Tensor, given: Stack, wanted: Stack, target: Target) -> States:
        """The states of a batch. Both stacks begin alike, and what they have in common runs once."""
        recorded = {alias: player.record(ids, mask) for alias, player in self._studio.players().items()}
        own, other = (tuple(layer for layer in stack if not layer.identity) for stack in (given[:-1], wanted))
        alike = next((at for at, (one, two) in enumerate(zip(own, other, strict=False)) if one != two), min(len(own), len(other)))
        state = self._run(recorded, recorded[given[0].model].state.clone(), own[:alike])
        aim = state.clone()
        state = self._run(recorded, state, own[alike:])
        module = self._studio.module(given[-1])
        with outputs_of(module.get_submodule(target.module)) as outs:
            state = recorded[given[-1].model].run(given[-1].index, module, state).clone()
        return States(outs[0].reshape(state.shape), state, self._run(recorded, aim, other[alike:]))

    def _run(self, recorded: Mapping[str, Recorded], state: Tensor, layers: Stack) -> Tensor:
        for layer in layers:
            state = recorded[layer.model].run(layer.index, self._studio.module(layer), state)
        return state

    # What a map can be folded into

    def _told(self, layer: LayerRef) -> Target | str:
        """The module of a layer that a map can be folded into, or why there is none. The same on every rank."""
        ranks, told = self._studio.ranks, None
        if ranks.main:
            name = f"target {json.dumps(_described((layer,)))}"
            told = self._recall(name)
            if not isinstance(told, str) and not (isinstance(told, list) and [type(one) for one in told] == [str, bool]):
                told = self._tried(layer)
                self._remember(name, told)
        told = json.loads(ranks.hand_out("target", json.dumps(told)))
        return told if isinstance(told, str) else Target(*told)

    @torch.inference_mode()
    def _tried(self, layer: LayerRef) -> Target | str:
        if layer.identity:
            return "it adds nothing"
        studio = self._studio
        player = studio.players()[layer.model]
        ids = torch.tensor([studio.probe], device=studio.device)
        recorded = player.record(ids, torch.ones_like(ids))
        module = studio.module(layer)
        try:
            target = find_target(module, recorded.state.shape[-1], lambda: recorded.run(layer.index, module, recorded.state.clone()))
            held = player.weights(layer.index)
        except NoTarget as error:
            return str(error)
        except RefusedError as error:
            return error.message
        if f"{target.module}.weight" not in held:
            return f"its file has no {target.module}.weight"
        return target

    # What was found before

    def _recall(self, name: str) -> Any:
        if self._known is None:
            entry = None if self._shelf is None else self._shelf.find(self._studio.key, {})
            found = None if entry is None else entry.details.get("folds")
            self._known = found if isinstance(found, dict) else {}
        return self._known.get(name)

    def _remember(self, name: str, value: Any) -> None:
        self._recall(name)
        assert self._known is not None
        self._known[name] = value
        if self._shelf is not None:
            self._shelf.keep(self._studio.key, Measurement(tables=(), samples=1, tokens=1, details={"folds": self._known}))


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
