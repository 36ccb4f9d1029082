"""Schedules: whether models are held in memory as a whole or streamed layer by layer. Both give the same numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from layercut.accumulators import Schedule
from layercut.caches import cache_folder
from layercut.checkpoint import Checkpoint
from layercut.loading import load_backbone, pick_dtype, settled_dtype
from layercut.memory import Room, room_of, shown, whole_size
from layercut.resident import Resident
from layercut.runner import Runner
from layercut.streaming import Source, Streamed

ACTIVATIONS = 1.2
"""Memory of a model that runs batch by batch, in units of its weights."""


class Picked(NamedTuple):
    """A schedule, and why it is that one."""

    schedule: Schedule
    reason: str


def pick_schedule(
    sources: Sequence[Source],
    device: torch.device,
    dtype: str | None,
    memory: int | None = None,
    *,
    sharers: int = 1,
    progress: bool = True,
) -> Picked:
    """Hold the models in memory when they fit, else stream them.

    `memory` is what the process may take on the device, in bytes; None for what is free there, of which each of `sharers`
    processes has its part. Raises CheckpointError and RefusedError as loading does.
    """
    room, host = rooms(device, memory, sharers)
    picked = pick_dtype(device, dtype)
    models = [source.checkpoint for source in sources]
    size = loaded_size(models, device, dtype)
    text = f"{shown(size)} of weights in {'their own dtype' if picked == 'auto' else str(picked).removeprefix('torch.')}"
    limit = f"{shown(memory)} of memory" if memory is not None else "the memory that is free"
    if fits(models, device, dtype, room):
        runners = [Runner(one.alias, load_backbone(one.checkpoint.folder, device, dtype), one.depth, one.prefix) for one in sources]
        return Picked(Resident(runners, device), f"resident: {text}")
    dtypes = {source.alias: settled_dtype(source.checkpoint, device, dtype) for source in sources}
    streamed = Streamed(sources, device, dtypes, room, host, cache_folder(), progress=progress)
    return Picked(streamed, f"streamed layer by layer: {text} and what running them takes are more than {limit}")


def loaded_size(models: Iterable[Checkpoint], device: torch.device, dtype: str | None) -> int:
    """Bytes of the weights of models in memory."""
    picked = pick_dtype(device, dtype)
    return sum(whole_size(model, None if picked == "auto" else picked.itemsize) for model in models)


def fits(models: Sequence[Checkpoint], device: torch.device, dtype: str | None, room: Room) -> bool:
    """Whether models can be held in memory as a whole. Quantised ones cannot be streamed: they are loaded unless the user set a limit."""
    quantised = any(model.config.get("quantization_config") is not None for model in models)
    return ACTIVATIONS * loaded_size(models, device, dtype) <= room.size or (quantised and not room.asked)


def rooms(device: torch.device, memory: int | None, sharers: int) -> tuple[Room, Room]:
    """What may be used on the device, and for states on the machine that it is in. Only a CUDA device has memory of its own."""
    free = room_of()
    free = free._replace(size=free.size // sharers)
    if device.type != "cuda":
        own = free if memory is None else room_of(memory)
        return own, own
    there = {str(device): torch.cuda.mem_get_info(device)[0]}
    return (room_of(free=there) if memory is None else Room(memory, f"{shown(memory)} as asked", asked=True)), free
