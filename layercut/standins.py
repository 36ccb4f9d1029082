"""Stand-ins: they take the places of layers during a forward pass, note what these would be called with, and hand the state on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

STATE = "hidden_states"
"""What layers call the state, where they do not take it by position."""


MORE = "layer {} is given more of what layers before it made than the state"


class Call(NamedTuple):
    """What a layer is called with. The state itself is left out: it stands first, or under its name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool
    """Whether the state is passed by name."""

    def on(self, layer: nn.Module, state: Tensor) -> Any:
        """Call a layer with this state."""
        return layer(*self.args, **self.kwargs, **{STATE: state}) if self.named else layer(state, *self.args, **self.kwargs)


class Recording(NamedTuple):
    """What a forward pass comes to before its layers: the state that enters the first of them, and how each is called."""

    state: Tensor
    calls: list[Call]


class Mark:
    """Stands for what a layer returns beside its state. No layer may be given one: it would need the real thing."""


FORMS = (lambda state: state, lambda state: (state,), lambda state: (state, Mark()), lambda state: (state, Mark(), Mark()))
"""What layers return: the state (since transformers 4.54, mostly), or a tuple that starts with it."""


class StandIn(nn.Module):
    """Takes the place of a layer: notes its call, and hands the state on. Whatever else is asked of it, the layer answers."""

    def __init__(self, layer: nn.Module, script: Script) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # no submodule: it has weights that must not be loaded
        self.__dict__["script"] = script

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.script.play(self.layer, args, kwargs)


class Script:
    """What happens during one forward pass over stand-ins."""

    def __init__(self, layers: Sequence[nn.Module], form: Any, last: Tensor | None = None, shift: float = 0.0) -> None:
        """`shift` is added to the state by each layer: what else changes with it comes from layers."""
        self._layers = list(layers)
        self._form = form
        self._last, self._shift = last, shift
        self._handed: list[Tensor] = []
        self.state: Tensor | None = None
        self.calls: list[Call] = []

    def play(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of a stand-in: checks that it comes in turn with the state of the one before it."""
        if len(self.calls) >= len(self._layers) or self._layers[len(self.calls)] is not layer:
            raise Unreadable("its layers do not run once each, in order")
        named = not args
        state = kwargs.get(STATE) if named else args[0]
        if not isinstance(state, Tensor) or state.ndim not in (3, 4):
            raise TypeError(f"layer {len(self.calls)} is given no state of (samples, tokens, hidden)")
        if self._handed and state is not self._handed[-1]:
            raise Unreadable(f"something is done to the state between layers {len(self.calls) - 1} and {len(self.calls)}")
        if self.state is None:
            self.state = state
        rest = {name: value for name, value in kwargs.items() if not named or name != STATE}
        self._check([*args[1:], *rest.values()])
        self.calls.append(Call(args[1:], rest, named))
        done = len(self.calls) == len(self._layers)
        # A tensor of its own, so that it is known again wherever it turns up.
        handed = state + self._shift if self._shift else state.view(state.shape)
        self._handed.append(self._last if done and self._last is not None else handed)
        return self._form(self._handed[-1])

    def compare(self, other: Script) -> None:
        """Raise when a layer is called otherwise in a pass with other states: what it is given is made of them."""
        for at, (mine, its) in enumerate(zip(self.calls, other.calls, strict=True)):
            if not _alike([mine.args, mine.kwargs], [its.args, its.kwargs]):
                raise Unreadable(MORE.format(at))

    def _check(self, values: Any) -> None:
        """Raise when a layer is given something that another layer made: it is not known before that one has run."""
        for value in values.values() if isinstance(values, dict) else values:
            if isinstance(value, Mark) or any(value is state for state in self._handed):
                raise Unreadable(MORE.format(len(self.calls)))
            if isinstance(value, tuple | list | dict):
                self._check(value)

    def check_all_ran(self) -> None:
        """Raise when the pass ended before the last layer."""
        if len(self.calls) != len(self._layers):
            raise Unreadable(f"{len(self.calls)} of its {len(self._layers)} layers run")


class Unreadable(Exception):
    """A forward pass that stand-ins cannot follow."""


def _alike(one: Any, other: Any) -> bool:
    """Whether all tensors in two values of the same form are equal."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, dict):
        return isinstance(other, dict) and _alike(list(one.values()), list(other.values()))
    if isinstance(one, tuple | list):
        return isinstance(other, tuple | list) and len(one) == len(other) and all(map(_alike, one, other))
    return True
