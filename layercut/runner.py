"""The runner: one loaded model that gives the boundary states of chosen tokens, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layercut.errors import CalibrationError, CheckpointError, LayercutError, first_line
from layercut.loading import given, layers_of
from layercut.tokens import Sample


class Limits(NamedTuple):
    """What a model can take in."""

    alias: str
    positions: int | None
    """Tokens of a sample at most; None when nothing bounds them."""
    vocabulary: int
    """Tokens that it has embeddings for."""

    @classmethod
    def of(cls, alias: str, backbone: nn.Module) -> Limits:
        """Those of a loaded model, or of one without weights."""
        config: Any = backbone.config
        text = config.get_text_config()
        try:
            embeddings: Any = backbone.get_input_embeddings()  # type: ignore[operator]
            vocabulary = int(embeddings.weight.shape[0])
        except (NotImplementedError, AttributeError):  # a decoder without its encoder does not say where they are
            vocabulary = int(text.vocab_size)
        positions = getattr(text, "max_position_embeddings", None)
        return cls(alias, positions if positions is None or positions > 0 else None, vocabulary)

    def check(self, batch: Sequence[Sample]) -> None:
        """Raise CalibrationError or CheckpointError when a sample does not fit."""
        for sample in batch:
            if self.positions is not None and len(sample.ids) > self.positions:
                message = f"model '{self.alias}' has {self.positions} positions, but sample {sample.number} has {len(sample.ids)} tokens"
                raise CalibrationError(message, hint=f"set max_length to {self.positions} or less")
            top = max(sample.ids, default=0)
            if top >= self.vocabulary:
                message = f"the tokenizer gives token {top}, but model '{self.alias}' has {self.vocabulary} embeddings"
                raise CheckpointError(message, hint="the tokenizer belongs to another model")


class Runner:
    """One loaded model: gives the boundary states of chosen tokens, in one forward pass."""

    def __init__(self, alias: str, backbone: nn.Module, depth: int, prefix: str | None = None) -> None:
        self.alias = alias
        self.backbone = backbone
        self.layers = layers_of(backbone, depth, prefix)
        self.dtype = next(iter(self.layers.parameters()), torch.empty(0)).dtype
        self.limits = Limits.of(alias, backbone)

    def states(self, batch: Sequence[Sample], ids: Tensor, mask: Tensor, rows: Tensor) -> list[Tensor]:
        """Boundary states h_0 .. h_L of the tokens that `rows` (samples, width; bool) picks: L + 1 tensors of (tokens, d)."""
        self.limits.check(batch)
        with Boundaries(self.alias, self.layers, rows) as boundaries, torch.inference_mode():
            try:
                self.backbone(**given(self.backbone, ids, mask))
            except (torch.OutOfMemoryError, LayercutError):
                raise
            except Exception as error:  # a model that wants pictures or sounds says so in whatever way it breaks
                message = f"model '{self.alias}' does not run on a text alone: {first_line(error)}"
                raise CheckpointError(message, hint="this architecture cannot be measured") from None
        return boundaries.states()


def by_token(state: Tensor, samples: int, width: int) -> Tensor | None:
    """A state as (samples, tokens, hidden), or None where it is none.

    Some layers take tokens before samples, and some several streams at once: behind the tokens, or before all else. Streams stand side by
    side then, as one hidden size. A batch must not have as many samples as tokens: nothing could be told apart.
    """
    shape = tuple(state.shape)
    if state.ndim == 3 and shape[:2] != (samples, width):
        return state.transpose(0, 1) if shape[:2] == (width, samples) else None
    if state.ndim == 4 and shape[:2] != (samples, width):
        return state.movedim(0, 2).flatten(2) if shape[1:3] == (samples, width) else None
    return state.flatten(2) if state.ndim in (3, 4) else None


class Boundaries:
    """Hooks on the layers that keep chosen tokens of every boundary state; as a context, so that none stays attached."""

    def __init__(self, alias: str, layers: nn.ModuleList, rows: Tensor) -> None:
        self._alias = alias
        self._layers = layers
        self._rows = rows
        self._whole = bool(rows.all())
        self._order: list[int] = []
        self._kept: list[Tensor] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Boundaries:
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_pre_hook(self._input_hook(index), with_kwargs=True))
        self._handles.append(self._layers[last].register_forward_hook(self._output_hook))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def states(self) -> list[Tensor]:
        """The states, in order. Raises CheckpointError unless every layer ran once, one after the other."""
        if not self._order:
            message = f"no layer of this stack of model '{self._alias}' is called when the model is given a text alone"
            raise CheckpointError(message, hint="it cannot be measured")
        if self._order != list(range(len(self._layers) + 1)):
            raise CheckpointError(f"the layers of model '{self._alias}' do not run once each, in order", hint="it cannot be measured")
        return self._kept

    def _input_hook(self, index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(index, args[0] if args else kwargs.get("hidden_states"))

        return hook

    def _output_hook(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Layers gave tuples before transformers 4.54 and tensors since then.
        self._keep(len(self._layers), output[0] if isinstance(output, tuple | list) else output)

    def _keep(self, boundary: int, state: Any) -> None:
        found = by_token(state, *self._rows.shape) if isinstance(state, Tensor) else None
        if found is None:
            message = f"boundary {boundary} of model '{self._alias}' is no tensor of (samples, tokens, hidden)"
            raise CheckpointError(message, hint="this architecture cannot be measured")
        self._order.append(boundary)
        # A copy: a layer may change its input in place. Where all tokens are wanted, it is three times as fast.
        self._kept.append(found.flatten(0, 1).clone() if self._whole else found[self._rows])
