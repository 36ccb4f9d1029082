"""What layers are called with is kept once, however many layers and batches share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layercut.arguments import Arguments
from layercut.spill import Spill
from layercut.standins import Call

CPU = torch.device("cpu")


def mask(value: float = 1.0) -> Tensor:
    return torch.full((2, 1, 4, 4), value)


@pytest.fixture(params=[10**9, 0], ids=["memory", "file"])
def spill(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with Spill(request.param, tmp_path) as made:
        yield made


def size(spill: Spill) -> int:
    return spill.in_memory + spill.in_file


def test_calls_come_back(spill: Spill) -> None:
    arguments = Arguments(spill, CPU)
    tables = (torch.arange(4.0), torch.arange(4.0) * 2)
    arguments.keep(0, [Call((mask(), None), {"position_embeddings": tables, "use_cache": False}, False), Call((), {"x": 3}, True)])
    first = arguments.call(0, 0)
    assert torch.equal(first.args[0], mask()) and first.args[1] is None and not first.named
    assert isinstance(first.kwargs["position_embeddings"], tuple)
    assert [table.tolist() for table in first.kwargs["position_embeddings"]] == [[0, 1, 2, 3], [0, 2, 4, 6]]
    assert first.kwargs["use_cache"] is False
    assert arguments.call(0, 1) == Call((), {"x": 3}, True)


def test_layers_and_batches_share_what_is_equal(spill: Spill) -> None:
    arguments = Arguments(spill, CPU)
    for batch in range(5):
        shared = mask()
        arguments.keep(batch, [Call((shared,), {"twin": mask()}, False) for _ in range(10)])
    assert size(spill) == mask().numel() * 4
    arguments.keep(5, [Call((mask(2.0),), {}, False)])
    assert size(spill) == 2 * mask().numel() * 4
    assert arguments.call(4, 9).args[0].max() == 1 and arguments.call(5, 0).args[0].max() == 2


def test_equal_bytes_of_other_shape_or_dtype_are_other_tensors(spill: Spill) -> None:
    arguments = Arguments(spill, CPU)
    values = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(0), torch.zeros(0, 3)]
    arguments.keep(0, [Call(tuple(values), {}, False)])
    found = arguments.call(0, 0).args
    assert [(value.shape, value.dtype) for value in found] == [(value.shape, value.dtype) for value in values]


def test_objects_that_layers_write_to_stay_what_they_are(spill: Spill) -> None:
    """A dict in which one layer leaves something for a later one is the same dict for all layers of a batch."""
    shared: dict[str, Tensor] = {}
    arguments = Arguments(spill, CPU)
    arguments.keep(0, [Call((), {"shared": shared}, False)] * 2)
    arguments.call(0, 0).kwargs["shared"]["left"] = torch.ones(1)
    assert arguments.call(0, 1).kwargs["shared"]["left"].item() == 1


def test_views_are_kept_by_value(spill: Spill) -> None:
    arguments = Arguments(spill, CPU)
    view = torch.arange(3).expand(4, 3)
    arguments.keep(0, [Call((view, torch.arange(6).reshape(2, 3).T), {}, False)])
    found = arguments.call(0, 0).args
    assert torch.equal(found[0], view) and found[1].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_drop(spill: Spill) -> None:
    arguments = Arguments(spill, CPU)
    arguments.keep(0, [Call((mask(),), {}, False)])
    arguments.drop()
    assert spill.in_memory == 0
    with pytest.raises(KeyError):
        arguments.call(0, 0)
    arguments.keep(0, [Call((mask(),), {}, False)])
    assert torch.equal(arguments.call(0, 0).args[0], mask())
