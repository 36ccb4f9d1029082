"""The runner: hooks that keep boundary states, whatever form a layer gives them, and what a model can take in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layercut.errors import CalibrationError, CheckpointError
from layercut.runner import Boundaries, Limits
from layercut.tokens import Sample

torch.set_num_threads(1)


class Looped(nn.Module):
    """Layers that hand over by keyword or by position, give tuples or tensors, and may run in a loop."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.layers = nn.ModuleList([Scaled(2.0), Scaled(3.0)])

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            state = self.layers[0](hidden_states=state)
            state = self.layers[1](state)[0]
        return state


class Scaled(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, hidden_states: torch.Tensor) -> Any:
        hidden_states *= self.by  # in place: the kept input must not change
        return (hidden_states, None) if self.by == 3.0 else hidden_states


def test_boundaries_take_keywords_tuples_and_copies() -> None:
    model = Looped(1)
    rows = torch.tensor([[True, False, True]])
    with Boundaries("m", model.layers, rows) as boundaries:
        model(torch.ones(1, 3, 4))
    assert [state.tolist() for state in boundaries.states()] == [[[value] * 4] * 2 for value in (1.0, 2.0, 6.0)]


def test_layers_that_run_twice_are_refused() -> None:
    model = Looped(2)
    with Boundaries("m", model.layers, torch.ones(1, 3, dtype=torch.bool)) as boundaries:
        model(torch.ones(1, 3, 4))
    with pytest.raises(CheckpointError) as caught:
        boundaries.states()
    assert str(caught.value) == "the layers of model 'm' do not run once each, in order; it cannot be measured"


def test_states_of_another_form_are_refused() -> None:
    model = Looped(1)
    with pytest.raises(CheckpointError) as caught, Boundaries("m", model.layers, torch.ones(1, 3, dtype=torch.bool)):
        model(torch.ones(2, 5, 3, 4))
    expected = "boundary 0 of model 'm' is no tensor of (samples, tokens, hidden); this architecture cannot be measured"
    assert str(caught.value) == expected


def test_limits() -> None:
    limits = Limits("m", 4, 100)
    limits.check([Sample(0, [99, 0, 1, 2]), Sample(1, [])])
    Limits("m", None, 100).check([Sample(0, [1] * 1000)])
    with pytest.raises(CalibrationError) as caught:
        limits.check([Sample(0, [1]), Sample(7, [1] * 5)])
    assert str(caught.value) == "model 'm' has 4 positions, but sample 7 has 5 tokens; set max_length to 4 or less"
    with pytest.raises(CheckpointError) as other:
        limits.check([Sample(0, [100])])
    assert str(other.value) == "the tokenizer gives token 100, but model 'm' has 100 embeddings; the tokenizer belongs to another model"
