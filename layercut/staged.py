"""Staged models: stand-ins in the places of their layers, so that their own forward tells how layers are called and what comes of a state.

How the layers are called is not written down here for any architecture: the model's own forward runs over stand-ins for its
layers, which note what they are called with and hand the state on. The real layers are then called with the same arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layercut.errors import LayercutError, RefusedError, first_line
from layercut.loading import given, quiet
from layercut.standins import FORMS, Call, Recording, Script, StandIn, Unreadable


class Refusal(NamedTuple):
    """What is said of a model that stand-ins cannot follow."""

    message: str
    hint: str


class Staged:
    """A model whose layers are stand-ins. The layers themselves are kept beside it."""

    def __init__(self, model: nn.Module, stack: nn.ModuleList, folder: Path, refusal: Refusal) -> None:
        self.model, self.folder, self._refusal = model, folder, refusal
        self.layers = list(stack)
        self._stack, self._form, self._sure = stack, 0, False
        for index, layer in enumerate(self.layers):
            stack[index] = StandIn(layer, Script([], FORMS[0]))

    def record(self, ids: Tensor, mask: Tensor | None) -> Recording:
        """Run the model's forward over the stand-ins. Raises RefusedError when that cannot tell how its layers are called."""
        script, _ = self._play(ids, mask, None)
        assert script.state is not None
        if not self._sure:
            try:
                script.compare(self._play(ids, mask, None, shift=1.0)[0])
            except Unreadable as error:
                raise self._refused(str(error)) from None
            self._sure = True
        return Recording(script.state, script.calls)

    def finish(self, ids: Tensor, mask: Tensor | None, last: Tensor) -> Any:
        """What the model makes of the state that leaves its last layer."""
        return self._play(ids, mask, last)[1]

    def whole(self, ids: Tensor, mask: Tensor | None) -> Any:
        """What the model gives with its own layers in their places."""
        stand_ins = list(self._stack)
        for index, layer in enumerate(self.layers):
            self._stack[index] = layer
        try:
            with quiet(), torch.inference_mode():
                return self.model(**given(self.model, ids, mask))
        finally:
            for index, stand_in in enumerate(stand_ins):
                self._stack[index] = stand_in

    def output(self, call: Call, layer: nn.Module, state: Tensor) -> Tensor:
        """The state that a layer makes of one."""
        output = call.on(layer, state)
        output = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(output, Tensor) or output.shape != state.shape:
            message = f"a layer of this model ({type(layer).__name__}) returns no state of the shape that it was given"
            raise RefusedError(message, where=self.folder, hint="it cannot be measured")
        return output

    def _play(self, ids: Tensor, mask: Tensor | None, last: Tensor | None, shift: float = 0.0) -> tuple[Script, Any]:
        furthest, reason = (-1, False), ""
        for form in range(self._form, len(FORMS)):
            script = Script(self.layers, FORMS[form], last, shift)
            for stand_in in self._stack:
                stand_in.__dict__["script"] = script
            try:
                with quiet(), torch.inference_mode():
                    output = self.model(**given(self.model, ids, mask))
                script.check_all_ran()
            except (torch.OutOfMemoryError, LayercutError):
                raise
            except Exception as error:  # whatever a model does with a return value of another form
                came = len(script.calls), isinstance(error, Unreadable)
                if came > furthest:
                    furthest, reason = came, first_line(error)
                continue
            self._form = form
            return script, output
        raise self._refused(reason)

    def _refused(self, reason: str) -> RefusedError:
        return RefusedError(f"{self._refusal.message}: {reason}", where=self.folder, hint=self._refusal.hint)
