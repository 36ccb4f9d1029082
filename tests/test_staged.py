"""Staged models: whole and in parts they give the same, and they are whole again when their own layers are wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layercut.errors import RefusedError
from layercut.loading import layers_of, load_causal_lm
from layercut.staged import Refusal, Staged

Tiny = Callable[..., Any]


def staged(folder: Any, depth: int = 6) -> Staged:
    model = load_causal_lm(folder, torch.device("cpu"))
    return Staged(model, layers_of(model, depth), folder, Refusal("cannot be staged", "do without"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_a_staged_model_runs_whole_and_in_parts(tiny: Tiny, kind: str) -> None:
    made = staged(tiny(kind))
    ids = torch.arange(5, 29).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.inference_mode():
        expected = made.whole(ids, mask).logits
        state, calls = made.record(ids, mask)
        for call, layer in zip(calls, made.layers, strict=True):
            state = made.output(call, layer, state)
        found = made.finish(ids, mask, state).logits
        again = made.whole(ids, mask).logits
    assert torch.equal(found[mask.bool()], expected[mask.bool()]) and torch.equal(again, expected)


def test_the_last_state_is_all_that_counts(tiny: Tiny) -> None:
    made = staged(tiny())
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        one, other = (made.finish(ids, None, torch.full((1, 12, 32), value)).logits for value in (1.0, -1.0))
    assert torch.allclose(one, -other) and not torch.allclose(one, other)


def test_stand_ins_are_back_when_the_whole_model_fails(tiny: Tiny) -> None:
    made = staged(tiny())
    with pytest.raises(IndexError):
        made.whole(torch.tensor([[100_000]]), None)
    assert len(made.record(torch.tensor([[5, 6]]), None).calls) == 6


def test_a_model_that_cannot_be_followed_says_what_it_is_told_to(tiny: Tiny) -> None:
    made = staged(tiny())
    stack: Any = made._stack
    stack[1], stack[2] = stack[2], stack[1]
    with pytest.raises(RefusedError, match=r"cannot be staged: its layers do not run once each, in order; do without$"):
        made.record(torch.tensor([[5, 6]]), None)


class Collecting(torch.nn.Module):
    """Every layer is given the states that entered all others, as one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Bilinear(2, 2, 2) for _ in range(3)])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        state = input_ids[..., None].float().expand(*input_ids.shape, 2)
        seen = state.unsqueeze(-2)
        for layer in self.layers:
            state = layer(state, seen.sum(-2))
            seen = torch.cat([seen, state.unsqueeze(-2)], -2)
        return state


def test_states_that_are_collected_for_later_layers_are_found() -> None:
    model = Collecting()
    made = Staged(model, model.layers, Path("there"), Refusal("cannot be staged", "do without"))
    with pytest.raises(RefusedError) as caught:
        made.record(torch.tensor([[5, 6]]), None)
    said = "there: cannot be staged: layer 1 is given more of what layers before it made than the state; do without"
    assert str(caught.value) == said


def test_whether_a_model_can_be_followed_is_looked_at_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plays = staged(tiny()), []
    play = Staged._play
    monkeypatch.setattr(Staged, "_play", lambda self, *given, **more: plays.append(more) or play(self, *given, **more))
    for _ in range(3):
        made.record(torch.tensor([[5, 6]]), None)
    assert plays == [{}, {"shift": 1.0}, {}, {}]
