"""Stand-ins: what they note, what they hand on, and forward passes that they cannot follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layercut.standins import FORMS, Call, Script, StandIn, Unreadable

STATE = torch.arange(6.0).reshape(1, 2, 3)


class Layer(nn.Module):
    kind = "full"

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return hidden_states + self.by * scale


def played(forward: Callable[[list[Any], Tensor], Any], depth: int = 2, form: int = 0, last: Tensor | None = None) -> tuple[Script, Any]:
    layers = [Layer(float(at + 1)) for at in range(depth)]
    script = Script(layers, FORMS[form], last)
    output = forward([StandIn(layer, script) for layer in layers], STATE)
    script.check_all_ran()
    return script, output


def test_calls_are_noted_and_give_what_the_layers_give() -> None:
    def forward(layers: list[Any], state: Tensor) -> Tensor:
        state = layers[0](state, 2.0)
        return layers[1](hidden_states=state, scale=3.0)

    script, output = played(forward)
    assert script.calls == [Call((2.0,), {}, named=False), Call((), {"scale": 3.0}, named=True)]
    assert script.state is STATE and torch.equal(output, STATE)
    state = STATE
    for number, call in enumerate(script.calls):
        state = call.on(Layer(float(number + 1)), state)
    assert torch.equal(state, STATE + 1 * 2 + 2 * 3)


def test_the_last_state_may_be_given() -> None:
    _, output = played(lambda layers, state: layers[1](layers[0](state)) * 2, last=STATE + 5)
    assert torch.equal(output, (STATE + 5) * 2)


@pytest.mark.parametrize("form", [1, 2, 3])
def test_tuples_start_with_the_state(form: int) -> None:
    script, output = played(lambda layers, state: layers[1](layers[0](state)[0])[0], form=form)
    assert len(script.calls) == 2 and torch.equal(output, STATE)


def test_several_streams_are_a_state_too() -> None:
    script = Script([Layer(1.0)], FORMS[0])
    assert script.play(script._layers[0], (torch.zeros(1, 2, 4, 3),), {}).shape == (1, 2, 4, 3)


def test_whatever_else_is_asked_of_a_stand_in_the_layer_answers() -> None:
    stand_in = StandIn(Layer(1.0), Script([], FORMS[0]))
    assert stand_in.kind == "full" and not list(stand_in.parameters())
    with pytest.raises(AttributeError, match="nothing"):
        _ = stand_in.nothing


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda layers, state: layers[1](state), "its layers do not run once each, in order"),
        (lambda layers, state: layers[0](layers[1](layers[0](state))), "its layers do not run once each, in order"),
        (lambda layers, state: layers[1](layers[0](state) + 1), "something is done to the state between layers 0 and 1"),
        (lambda layers, state: layers[0](state), "1 of its 2 layers run"),
    ],
)
def test_passes_that_cannot_be_followed(forward: Callable[[list[Any], Tensor], Any], message: str) -> None:
    with pytest.raises(Unreadable, match=f"^{message}$"):
        played(forward)


def test_what_another_layer_made_is_not_known_yet() -> None:
    def forward(layers: list[Any], state: Tensor) -> Any:
        state, mark = layers[0](state)
        return layers[1](state, [{"bias": mark}])

    with pytest.raises(Unreadable, match=r"^layer 1 is given more of what layers before it made than the state$"):
        played(forward, form=2)


@pytest.mark.parametrize("state", [None, torch.zeros(2, 3), torch.zeros(1, 2, 3, 4, 5)])
def test_no_state(state: Any) -> None:
    with pytest.raises(TypeError, match=r"^layer 0 is given no state of \(samples, tokens, hidden\)$"):
        played(lambda layers, _: layers[0](state))


def test_what_is_made_of_the_states_of_layers_is_seen_when_these_differ() -> None:
    """A tensor that was put together from the state of a layer is another one in a pass in which the layers hand on something else."""

    def collecting(layers: list[Any], state: Tensor) -> Tensor:
        first = layers[0](state)
        return layers[1](first, extra={"seen": [torch.cat([state, first])]})

    def independent(layers: list[Any], state: Tensor) -> Tensor:
        return layers[1](layers[0](state), extra={"seen": (torch.cat([state, state]), torch.tensor(math.nan))})

    for forward in (collecting, independent):
        layers: list[nn.Module] = [Layer(1.0), Layer(2.0)]
        plain, shifted = Script(layers, FORMS[0]), Script(layers, FORMS[0], shift=1.0)
        for script in (plain, shifted):
            forward([StandIn(layer, script) for layer in layers], STATE)
        plain.compare(plain)
        if forward is independent:
            plain.compare(shifted)
        else:
            with pytest.raises(Unreadable, match=r"^layer 1 is given more of what layers before it made than the state$"):
                plain.compare(shifted)


def test_layers_that_are_handed_on_more_can_be_shifted() -> None:
    layers: list[nn.Module] = [Layer(1.0), Layer(2.0)]
    script = Script(layers, FORMS[0], shift=0.5)
    first, second = (StandIn(layer, script) for layer in layers)
    assert torch.equal(second(first(STATE)), STATE + 1)
    last = Script(layers, FORMS[0], STATE * 7, shift=0.5)
    first, second = (StandIn(layer, last) for layer in layers)
    assert torch.equal(second(first(STATE)), STATE * 7), "the last state is what was given"
