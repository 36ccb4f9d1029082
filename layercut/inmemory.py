"""A loaded model as a stack of layers: where they are, and the cut of a block in place. Reads and writes no file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layercut.amends import changes, row_of
from layercut.architecture import Member, find_stack
from layercut.checkpoint import Checkpoint, Tensor
from layercut.errors import LayercutError, RefusedError
from layercut.homes import homes
from layercut.plan import Edit
from layercut.stack import LayerRef
from layercut.surgery import operate
from layercut.tables import gathered

NAME = "model"
RECIPE = "cut its checkpoint with a recipe"
NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_index")
"""Names under which modules keep the index of their layer."""


def member_of(model: Any) -> Member:
    """A transformers model with its stack of layers, found as in a checkpoint. Raises CheckpointError when there is none."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    tensors = {name: _tensor(name, value) for name, value in model.state_dict().items()}
    checkpoint = Checkpoint(
        folder=Path(f"{type(model).__name__} in memory"), reference=NAME, revision=None, config_text=json.dumps(config, indent=2),
        config=config, tensors=tensors, files={}, companions=(), left_out=(), metadata={},
    )  # fmt: skip
    return Member(checkpoint, find_stack(checkpoint))


def _tensor(name: str, value: Any) -> Tensor:
    """What the locator of layers asks of a tensor: its name and shape."""
    return Tensor(name=name, dtype="F32", shape=tuple(value.shape), file="", begin=0, end=4 * value.numel())


def layers_in(model: Any, member: Member) -> Any:
    """The `ModuleList` of the layers."""
    return model.get_submodule(member.stack.prefix.rstrip("."))


def cut(model: Any, start: int, stop: int) -> None:
    """Remove layers [start, stop) of a transformers model in place, so that it runs, generates and saves as one of fewer layers.

    The config follows as in a recipe, every per-layer value of it; layers that stay know their new index, by which caches are
    addressed. Raises RefusedError, before anything is changed, when the shorter model would compute something else than its layers
    do, and LayercutError when the block is no block.
    """
    member = member_of(model)
    depth = member.stack.depth
    if not 0 <= start < stop <= depth or stop - start == depth:
        raise LayercutError(f"[{start}, {stop}) is no block of a model of {depth} layers", hint="at least one layer must stay")
    if member.stack.shared:
        raise RefusedError("the layers of this model share their weights: there is no list of them", hint=RECIPE)
    if any(sibling.stride != 1 for sibling in member.stack.siblings):
        raise RefusedError("this model keeps parts of every few layers in a list of its own", hint=RECIPE)
    order = [index for index in range(depth) if not start <= index < stop]
    stack = [LayerRef(model=NAME, index=index) for index in order]
    surgery = operate(member.checkpoint.config_text, NAME, {NAME: member}, stack)
    if member.stack.depth_key.form == "pairs":
        raise RefusedError("the config of this model counts attention and MLP apart on disk only", hint=RECIPE)
    row = row_of(member)
    if row is not None and changes({NAME: member}, stack):
        raise RefusedError(f"{row.reason}, and weights would have to make up for it", hint=RECIPE)
    if _moves_weights(member, stack):
        raise RefusedError("weights that one layer, or one tensor, keeps for others would have to move", hint=RECIPE)
    for prefix in member.stack.prefixes:
        _keep(model, prefix.rstrip("."), order)
    for edit in surgery.edits:
        _write(model.config, edit)
    _follow_devices(model, member.stack.prefixes, order)


def _moves_weights(member: Member, order: Sequence[LayerRef]) -> bool:
    """Whether a tensor would change its layer, or lose a part for one of them."""
    found = homes({NAME: member}, order)
    if any(added.zero for home in found.values() for added in home.added):
        return True
    if any({added.rest for added in home.added} != home.gone for home in found.values()):
        return True
    outside = (tensor for name, tensor in member.checkpoint.tensors.items() if member.stack.place(name) is None)
    return any(gathered(tensor, {NAME: member}, order) is not None for tensor in outside)


def _keep(model: Any, name: str, order: Sequence[int]) -> None:
    """Put a list of the layers that stay in place of the list of all, and number them."""
    from torch import nn

    parent, _, own = name.rpartition(".")
    layers = model.get_submodule(name)
    kept = [layers[index] for index in order]
    for now, (before, layer) in enumerate(zip(order, kept, strict=True)):
        for module in layer.modules():
            for key in NUMBERS:
                if module.__dict__.get(key) == before and type(module.__dict__[key]) is int:
                    setattr(module, key, now)
    setattr(model.get_submodule(parent), own, nn.ModuleList(kept))


def _write(config: Any, edit: Edit) -> None:
    """Set a value of a config object, or of a plain mapping in it."""
    *path, last = edit.key.split(".")
    for part in path:
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    if isinstance(config, dict):
        config[last] = edit.after
    else:
        setattr(config, last, edit.after)


def _follow_devices(model: Any, prefixes: Sequence[str], order: Sequence[int]) -> None:
    """Make the map of devices, which accelerate keeps by name, speak of the new layers."""
    devices = getattr(model, "hf_device_map", None)
    if not devices:
        return
    places = {index: place for place, index in enumerate(order)}
    found = {}
    for name, device in devices.items():
        match = next((m for prefix in prefixes if (m := re.fullmatch(rf"({re.escape(prefix)})(\d+)(\..*)?", name))), None)
        if match is None:
            found[name] = device
        elif int(match[2]) in places:
            found[f"{match[1]}{places[int(match[2])]}{match[3] or ''}"] = device
    model.hf_device_map = found
