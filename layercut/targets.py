"""Targets: which module of a layer a map can be folded into. Found by trying, never from a list of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

STEPS = 16
"""Roundings in the layer's dtype by which what is added may differ from what comes out."""

SLOPE = 4
"""The same for what comes out of each token in units of what was added to it."""


class Target(NamedTuple):
    """A module whose output a layer adds to the stream as it is."""

    module: str
    """Its name in the layer."""
    columns: bool
    """Whether its outputs are the columns of its weight."""


class NoTarget(Exception):
    """There is no such module in a layer, for the reason given."""


def find_target(layer: nn.Module, size: int, run: Callable[[], Tensor]) -> Target:
    """The module of a layer that writes to the stream last, unchanged by what follows. `run` runs the layer on a probe, (..., size).

    A plain linear layer counts when anything that is added to its output is found in the output of the layer, to rounding. So neither
    a norm behind it, nor a factor, nor a gate or router can be overlooked. Of several (attention and MLP side by side) it is the one with
    most inputs. Raises NoTarget.
    """
    known = {name: module for name, module in layer.named_modules() if _outputs(module) == size}
    seen: dict[str, list[Tensor]] = {name: [] for name in known}
    with _hooked({module: partial(_note, seen[name]) for name, module in known.items()}):
        before = run()
    writers = [name for name, outs in seen.items() if len(outs) == 1 and outs[0].numel() == before.numel()]
    if not writers or before.shape[-1] != size:
        raise NoTarget("it has no plain linear layer that gives a state for every token (experts and quantised layers are none)")
    found = [name for name in writers if _is_added(known[name], seen[name][0], before, run)]
    if not found:
        raise NoTarget(f"what {writers[-1]} gives does not come out as it is (a norm, a factor, a gate or experts follow)")
    best = max(found, key=lambda name: (known[name].get_parameter("weight").numel(), found.index(name)))
    return Target(best, _by_columns(known[best]))


def _by_columns(module: nn.Module) -> bool:
    """Whether it is the linear layer of transformers whose weight has its outputs as columns."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def _outputs(module: nn.Module) -> int:
    """Outputs of a plain linear layer; of other modules, and of what was derived from one, none."""
    columns = _by_columns(module)
    if not columns and type(module) is not nn.Linear:
        return 0
    weight = module.get_parameter("weight")
    return weight.shape[1 if columns else 0] if weight.is_floating_point() else 0


def _note(outs: list[Tensor], out: Tensor) -> None:
    outs.append(out.detach().clone())


def _is_added(module: nn.Module, own: Tensor, before: Tensor, run: Callable[[], Tensor]) -> bool:
    """Whether the output of the layer changes by just what is added to the output of a module."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(own.shape, generator=generator, dtype=torch.float32).to(own)
    added = noise * before.float().square().mean().sqrt().to(own)
    with _hooked({module: lambda out: out + added}):
        after = run()
    wide = [tensor.cpu().double().reshape(before.shape) for tensor in (before, after, own, added)]
    change, step = wide[1] - wide[0], torch.finfo(before.dtype).eps
    near = (change - wide[3]).abs() <= STEPS * step * sum(tensor.abs() for tensor in wide)
    slope = (change * wide[3]).sum(-1) / wide[3].square().sum(-1)  # over all of a token, where roundings cancel out
    return bool(near.all() and ((slope - 1).abs() <= SLOPE * step).all())


@contextmanager
def _hooked(hooks: dict[nn.Module, Callable[[Tensor], Any]]) -> Iterator[None]:
    """Calls functions on the outputs of modules; what they return, if anything, takes its place."""
    handles = [module.register_forward_hook(_hook(work)) for module, work in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(work: Callable[[Tensor], Any]) -> Callable[..., Any]:
    return lambda module, args, output: work(output)


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of a module while the context lasts."""
    outs: list[Tensor] = []
    with _hooked({module: partial(_note, outs)}):
        yield outs
