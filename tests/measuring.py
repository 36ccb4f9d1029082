"""Measures tiny models of every type, and compares the boundary states with what plain hooks see in the model of the task."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import oracle
import sweep
import torch
import zoo
from conftest import byte_tokenizer
from sweep import REFUSED, WRONG, Examined, Outcome

from layercut import engine, memory, schedules
from layercut.accumulators import Accumulators
from layercut.anatomy import LayerStack
from layercut.architecture import find_stack
from layercut.calibration import TextCalibration
from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.errors import LayercutError
from layercut.metrics import Angular, Cosine, Metric
from layercut.plan import Table
from layercut.tokens import Sample

TOLERANCE = 2e-4
"""Largest difference of states that fp32 arithmetic explains, in units of the largest state of the boundary."""
MEASURED, RESIDENT = "measured", "measured in memory only"
METRICS: tuple[Metric, ...] = (Angular(), Cosine(token="all"))
TEXTS = ("THE1STTEXT:12", "SHORT", "ANOTHER*TEXT*OF*29*CHARACTERS", "8LETTERS")
FREE = {"resident": 10**12, "streamed": 1000}
"""Free memory in bytes that makes layercut pick a schedule."""


class Wrong(Exception):
    """Something that must not happen."""


class Seen(NamedTuple):
    """What one run of the engine came to: boundary states of each sample, [sample][boundary] of (tokens, hidden), and the tables."""

    samples: Mapping[int, Sample]
    states: Mapping[int, list[torch.Tensor]]
    tables: tuple[Table, ...]


def examine(kind: str, task: str, scratch: Path) -> Examined:
    """Measure each stack of a type, resident and streamed."""
    try:
        source = sweep.saved(kind, task, scratch / "source")
    except sweep.Unrunnable as reason:
        return Examined(reason=str(reason))
    byte_tokenizer().save_pretrained(source.folder)
    for number, text in enumerate(TEXTS):
        (scratch / f"{number}.txt").write_text(text, encoding="utf-8")
    found = oracle.stacks(source.model, zoo.depth_of(kind))
    return Examined(tuple(_outcome(source, name, lists, scratch) for name, lists in found.items()))


def _outcome(source: sweep.Source, name: str, lists: Sequence[str], scratch: Path) -> Outcome:
    try:
        checkpoint = open_checkpoint(source.folder)
        stack = find_stack(checkpoint, name or None)
        whole = measured(checkpoint, stack, "resident", scratch)
    except LayercutError as error:
        return Outcome(name, REFUSED, sweep.plain(str(error), source.folder))
    except Wrong as fault:
        return Outcome(name, WRONG, str(fault))
    except Exception as error:  # whatever it is, a user would see a traceback
        return Outcome(name, WRONG, f"{type(error).__name__}: {error}")
    fault = compared(source.model, lists, whole, stack)
    if fault:
        return Outcome(name, WRONG, fault)
    try:
        streamed = measured(checkpoint, stack, "streamed", scratch)
    except LayercutError as error:
        return Outcome(name, RESIDENT, sweep.plain(str(error), source.folder))
    except Exception as error:  # the same
        return Outcome(name, WRONG, f"streamed: {type(error).__name__}: {error}")
    off = max(_off(streamed.states[number], whole.states[number]) for number in whole.states)
    for table, twin in zip(streamed.tables, whole.tables, strict=True):
        off = max(off, float((torch.tensor(table.mean) - torch.tensor(twin.mean)).abs().max()))
    return Outcome(name, WRONG, f"streamed is off by {off:.2g}") if not off <= TOLERANCE else Outcome(name, MEASURED)


def measured(checkpoint: Checkpoint, stack: LayerStack, way: str, scratch: Path) -> Seen:
    """Measure by the engine's own road, and keep the states that it hands to the accumulators."""
    samples: dict[int, Sample] = {}
    states: dict[int, list[torch.Tensor]] = {}

    class Kept(Accumulators):
        def add(self, batch: Sequence[Sample], rows: torch.Tensor, given: Sequence[torch.Tensor]) -> None:
            super().add(batch, rows, given)
            owners = rows.nonzero()[:, 0]
            for row, sample in enumerate(batch):
                samples[sample.number] = sample
                states[sample.number] = [state[owners == row].float() for state in given]

    calibration = TextCalibration(path=str(scratch / "*.txt"), max_length=32, batch_size=4)
    options: dict[str, Any] = {"depths": {"m": stack.depth}, "prefixes": {"m": stack.prefix}, "progress": False, "device": "cpu"}
    with (
        mock.patch.object(memory, "free_memory", lambda: {"memory": FREE[way]}),
        mock.patch.object(engine, "Accumulators", Kept),
        _unhooked(),
    ):
        found = engine.measure(engine.Running({"m": checkpoint}, **options), METRICS, calibration)
    if not found.details["schedule"].startswith(way) or found.samples != len(TEXTS):
        raise Wrong(f"{found.samples} samples, {found.details['schedule']}")
    return Seen(samples, states, found.tables)


@contextlib.contextmanager
def _unhooked() -> Iterator[None]:
    """Checks that every model which is loaded has no more hooks afterwards."""
    loaded: list[tuple[Any, int]] = []
    load = schedules.load_backbone

    def watched(*args: Any) -> Any:
        model = load(*args)
        loaded.append((model, hooks(model)))
        return model

    with mock.patch.object(schedules, "load_backbone", watched):
        yield
    if any(hooks(model) != before for model, before in loaded):
        raise Wrong("hooks stay attached")


def hooks(model: torch.nn.Module) -> int:
    """Hooks on all modules of a model."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def compared(model: Any, lists: Sequence[str], seen: Seen, stack: LayerStack) -> str:
    """What is wrong with the states, against those of each sample alone, without pads or mask, in the model of the task."""
    if len(lists) > 1:  # the one that is meant by the name of its tensors, if any is
        lists = [name for name in lists if stack.prefix.endswith(f"{name.rpartition('.model.')[2]}.")] or lists
    told = {number: _fault(model, lists, seen, number, stack.depth) for number in seen.samples}
    faults = [fault for fault in told.values() if fault]
    if getattr(model.config.get_text_config(), "index_topk", None) and len(faults) < 2:
        return ""  # near ties in a top-k of tiny models fall this way or that by the order of summing
    return next(iter(faults), "")


def _fault(model: Any, lists: Sequence[str], seen: Seen, number: int, depth: int) -> str:
    sample, found = seen.samples[number], seen.states[number]
    if len(found) != depth + 1 or any(len(state) != len(sample.ids) for state in found):
        return f"{len(found)} boundaries of {[len(state) for state in found]} states, for {len(sample.ids)} tokens"
    hooked, told = true_states(model, lists, sample)
    if hooked is None and told is None:
        return "the oracle sees no states"
    name, wanted = ("output_hidden_states", told or []) if hooked is None else ("hooks", hooked)
    for at, state in enumerate(wanted):
        if state.shape != found[at].shape:
            return f"{name}: boundary {at} is {tuple(state.shape)}, found {tuple(found[at].shape)}"
        off = _off([found[at]], [state])
        if not off <= TOLERANCE:
            return f"{name}: boundary {at} of a sample of {len(sample.ids)} tokens is off by {off:.2g}"
    return "a layer does nothing" if any(bool((one == other).all()) for one, other in itertools.pairwise(found)) else ""


def _off(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in zip(found, wanted, strict=True))


class Truth(NamedTuple):
    """Boundary states of one sample, (tokens, hidden) each; None where they are not to be had."""

    hooked: list[torch.Tensor] | None
    """By plain hooks on the layers: all of them."""
    told: list[torch.Tensor] | None
    """As the model itself gives them: all but the last, which has the final norm behind it."""


def true_states(model: Any, lists: Sequence[str], sample: Sample) -> Truth:
    """The states of a sample alone, without pads or mask."""
    layers = list(model.get_submodule(lists[0])) if len(lists) == 1 else []
    seen: list[torch.Tensor] = []

    def enters(layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(oracle.hidden_of(args, named))

    def leaves(layer: Any, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple | list) else output)

    handles = [layer.register_forward_pre_hook(enters, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(leaves) for layer in layers[-1:]]
    ids, parameters = torch.tensor([sample.ids]), oracle.forward_parameters(model)
    given = {name: ids for name in ("input_ids", "decoder_input_ids") if name in parameters}
    more = {"use_cache": False} if "use_cache" in parameters else {}
    try:
        with torch.no_grad():
            out = model(**given, **more, output_hidden_states=True, return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
    hooked = [_plain(state, len(sample.ids)) for state in seen] if len(seen) == len(layers) + 1 and layers else None
    names = ("encoder_hidden_states" if "encoder" in lists[0] else "decoder_hidden_states", "hidden_states")
    told = next((states for name in names if (states := getattr(out, name, None)) is not None), ())
    return Truth(hooked, [_plain(state, len(sample.ids)) for state in told[:-1]] or None)


def _plain(state: torch.Tensor, width: int) -> torch.Tensor:
    """A state of one sample as (tokens, hidden): tokens may come first, and several streams before or behind them."""
    if state.ndim == 4 and state.shape[1:3] == (1, width):  # streams before all else
        return torch.cat(list(state[:, 0]), 1).float()
    if state.shape[:2] == (width, 1):
        return state[:, 0].float()
    return state[0].reshape(state.shape[1], -1).float()
