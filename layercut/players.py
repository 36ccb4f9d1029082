"""Players: language models whose layers run in any order and number, averaged, scaled and folded. Refuses what has no loss."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from layercut.checkpoint import Checkpoint
from layercut.errors import CheckpointError, RefusedError, first_line
from layercut.fits import map_of
from layercut.folding import folded
from layercut.loading import STORED, layers_of, load_as, own_code, quiet, settled_dtype
from layercut.runner import Limits
from layercut.scalings import factors
from layercut.skeleton import Skeleton
from layercut.stack import LayerRef
from layercut.staged import Refusal, Staged
from layercut.standins import Call
from layercut.weights import Weights

BY_DISTANCE = "choose by distance: block, blocks, rank or deepest"


class Recorded(NamedTuple):
    """A model that has read a batch, up to its first layer."""

    staged: Staged
    ids: Tensor
    mask: Tensor
    state: Tensor
    """The state that enters the first layer, (samples, tokens, hidden)."""
    calls: list[Call]

    def run(self, index: int, layer: nn.Module, state: Tensor) -> Tensor:
        """The state that a layer makes of one, called as layer `index` is."""
        return self.staged.output(self.calls[index], layer, state.to(self.state.dtype))

    def logits(self, state: Tensor) -> Tensor:
        """What the model predicts from the state that leaves the last layer of a stack: (samples, tokens, vocabulary)."""
        logits: Tensor = self.staged.finish(self.ids, self.mask, state.to(self.state.dtype)).logits
        return logits


class Player:
    """A loaded model with its head."""

    def __init__(self, alias: str, staged: Staged, checkpoint: Checkpoint, prefix: str) -> None:
        self.alias, self.staged, self._checkpoint, self._prefix = alias, staged, checkpoint, prefix
        self.skeleton = staged if isinstance(staged, Skeleton) else None
        """The model, when its weights are not in memory."""
        self.limits = Limits.of(alias, staged.model)

    @classmethod
    def load(cls, alias: str, checkpoint: Checkpoint, depth: int, prefix: str, device: torch.device, dtype: str | None) -> Player:
        """Load a model. Raises CheckpointError when it does not load, and RefusedError when it predicts no next tokens."""
        model = load_as(_kind(alias, checkpoint), checkpoint.folder, device, dtype)
        refusal = Refusal(f"model '{alias}' cannot be followed layer by layer, which a loss needs", BY_DISTANCE)
        return cls(alias, Staged(model, layers_of(model, depth, prefix), checkpoint.folder, refusal), checkpoint, prefix)

    @classmethod
    def streamed(cls, alias: str, checkpoint: Checkpoint, depth: int, prefix: str, device: torch.device, dtype: str | None) -> Player:
        """A model of which little is in memory at a time. Raises as `load` does, and RefusedError when it cannot be streamed."""
        settled = settled_dtype(checkpoint, device, dtype)
        weights = Weights(checkpoint, pinned=device.type == "cuda")
        return cls(alias, Skeleton(checkpoint, weights, depth, prefix, device, settled, _kind(alias, checkpoint)), checkpoint, prefix)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A layer, with its weights in memory."""
        if self.skeleton is None:
            yield self.staged.layers[index]
        else:
            with self.skeleton.layer(index) as layer:
                yield layer

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Everything but the layers, in memory."""
        with nullcontext() if self.skeleton is None else self.skeleton.rest():
            yield

    @property
    def logit_size(self) -> int:
        """Bytes of the logits of one token."""
        model: Any = self.staged.model
        return int(model.config.get_text_config().vocab_size) * torch.finfo(model.dtype).bits // 8

    def weights(self, index: int) -> dict[str, tuple[str, Tensor]]:
        """The tensors of a layer as the file names them, by their names in the layer, with their dtypes there.

        Raises RefusedError when transformers puts the layer together from other tensors than the file holds.
        """
        place, found = f"{self._prefix}{index}.", {}
        with self.layer(index) as layer:
            held = layer.state_dict()
        for name, tensor in self._checkpoint.tensors.items():
            if name.startswith(place):
                own = held.get(name.removeprefix(place))
                if own is None or tuple(own.shape) != tensor.shape:
                    break
                found[name.removeprefix(place)] = (name, own.to(STORED.get(tensor.dtype, own.dtype)))
        if found.keys() != held.keys():
            message = (
                f"transformers holds layer {index} of model '{self.alias}' otherwise than its file: it does not run scaled or averaged"
            )
            raise RefusedError(message, where=self.staged.folder, hint="let the step that chooses by loss come before the arithmetic")
        return found

    def record(self, ids: Tensor, mask: Tensor) -> Recorded:
        """Read a batch: token ids and mask of (samples, tokens), pads on the right."""
        return Recorded(self.staged, ids, mask, *self.staged.record(ids, mask))

    @torch.inference_mode()
    def check(self, ids: Tensor) -> None:
        """Look at a sample, (1, tokens): whether predictions depend on earlier tokens only, and layers on their state only.

        Raises RefusedError when not: then there is no loss, or not that of the layers one after the other.
        """
        mask = torch.ones_like(ids)
        recorded = self.record(ids, mask)
        self.look(recorded.calls)
        whole = self._whole(ids, mask)
        self.compare(whole, self._whole(self.changed(ids), mask))
        near = _near(whole)
        state = recorded.state
        for index in range(len(recorded.calls)):
            state = recorded.run(index, self.staged.layers[index], state)
        if not (recorded.logits(state) - whole).abs().max() <= near:
            message = f"the layers of model '{self.alias}', one after the other, do not give what the model gives"
            raise RefusedError(message, where=self.staged.folder, hint=BY_DISTANCE)

    def look(self, calls: Sequence[Call]) -> None:
        """Raise RefusedError when layers hand each other more than the state."""
        for index, call in enumerate(calls):
            for value in _flat((*call.args, *call.kwargs.values())):
                if type(value).__name__.endswith("Cache") or (isinstance(value, MutableMapping) and (type(value) is not dict or not value)):
                    message = f"model '{self.alias}' hands a {type(value).__name__} from layer to layer ({index}), beside the state"
                    raise RefusedError(message, where=self.staged.folder, hint=BY_DISTANCE)

    def changed(self, ids: Tensor) -> Tensor:
        """The sample with another last token."""
        other = ids.clone()
        other[0, -1] = ids[0, 0] if ids[0, -1] != ids[0, 0] else (ids[0, 0] + 1) % self.limits.vocabulary
        return other

    def compare(self, logits: Tensor, changed: Tensor) -> None:
        """Raise RefusedError when the logits of a sample, (1, tokens, vocabulary), differ before the last token when that is changed."""
        if not (changed[:, :-1] - logits[:, :-1]).abs().max() <= _near(logits):
            message = f"model '{self.alias}' sees the tokens that it is to predict (it is no causal language model): it has no loss"
            raise RefusedError(message, where=self.staged.folder, hint=BY_DISTANCE)

    def _whole(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The logits of the model as it is, when it runs by itself. Raises CheckpointError when they are not finite."""
        try:
            logits: Tensor = self.staged.whole(ids, mask).logits
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            message = f"model '{self.alias}' does not run on a text alone: {first_line(error)}"
            raise CheckpointError(message, hint="this architecture has no loss") from None
        if not bool(logits.isfinite().all()):
            raise CheckpointError(f"the predictions of model '{self.alias}' are not finite", where=self.staged.folder)
        return logits


def module_of(layer: LayerRef, players: Mapping[str, Player]) -> nn.Module:
    """A layer as a stack has it: the model's own, or a copy with averaged, scaled and folded weights, computed as the executor does."""
    if layer.plain:
        return players[layer.model].staged.layers[layer.index]
    weights = players[layer.model].weights(layer.index)
    shares = [(players[share.model].weights(share.index), share.weight) for share in layer.shares] or [(weights, 1.0)]
    with players[layer.model].layer(layer.index) as own:
        made = copy.deepcopy(own)
    with torch.no_grad():
        for rest, tensor in made.state_dict().items():
            name, stored = weights[rest]
            value = stored
            if layer.shares and stored.is_floating_point():
                wide = torch.promote_types(stored.dtype, torch.float32)
                value = sum((held[rest][1].to(wide) * weight for held, weight in shares), torch.zeros_like(stored, dtype=wide)).to(
                    stored.dtype
                )
            for by in factors(layer.scalings, name):
                value = value * by
            for fold in layer.folds:
                if rest in (f"{fold.module}.weight", f"{fold.module}.bias"):
                    value = folded(value, map_of(fold.sha256, fold.size), fold.columns or value.ndim == 1, stored.dtype)
            tensor.copy_(value)
    return made


def _near(logits: Tensor) -> Tensor:
    """How far apart logits are that the arithmetic alone makes differ."""
    near: Tensor = torch.finfo(logits.dtype).eps ** 0.5 * logits.abs().max()
    return near


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


def _kind(alias: str, checkpoint: Checkpoint) -> Any:
    """The auto class that predicts next tokens. Raises RefusedError when there is none for this model."""
    try:
        with quiet():
            config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers has no common base class
        raise own_code(error, checkpoint.folder) or CheckpointError(
            f"transformers cannot load this model: {first_line(error)}", where=checkpoint.folder
        ) from None
    reads = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else None
    masked = [name for name in getattr(config, "architectures", None) or () if "ForMaskedLM" in name or "ForPreTraining" in name]
    reads = "a masked language model" if masked and not getattr(config, "is_decoder", False) else reads
    if reads is None and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if reads is None and type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    what = reads or f"a {getattr(config, 'model_type', 'model')} without a head for next tokens"
    message = f"model '{alias}' is {what}: the loss of predicting a text is not defined for it"
    raise RefusedError(message, where=checkpoint.folder, hint=BY_DISTANCE)
