"""crossings.py: the states at a seam against plain hooks, in memory and streamed, for every kind of stack that can meet there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from test_fitting import states
from test_losses import TEXT, layers, meter
from test_relay import CPU, MEAN, ROOM, SCALED, Counted, Tiny, skeleton, small  # noqa: F401 - two fixtures

from layercut.crossings import Crossing, States
from layercut.memory import Room
from layercut.relay import Place, Relay
from layercut.scalings import literal
from layercut.skeleton import Skeleton
from layercut.stack import LayerRef, Scaling, Stack
from layercut.tokens import Sample

MODULE = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}
NOTHING = LayerRef(model="m", index=2, identity=True, scalings=((Scaling(tensors=literal("x"), by=0),),))


def crossed(crossing: Crossing, *folders: Path) -> list[tuple[list[int], States]]:
    """What a meter gives of the calibration text, batch by batch: numbers of its samples, and the states."""
    found: list[tuple[list[int], States]] = []
    meter(TEXT, *folders)._cross("calibration", crossing, lambda batch, states: found.append(([one.number for one in batch], states)))
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_states_are_those_of_plain_hooks(tiny: Tiny, kind: str) -> None:
    folder = tiny(kind)
    ids = meter(TEXT, folder)._book("calibration").reading.text.ids
    found = crossed(Crossing(layers(0, 1, 2), layers(0, 1, 2, 3, 4), MODULE[kind]), folder)
    assert [numbers for numbers, _ in found] == [[0, 1], [2, 3], [4]]
    for numbers, batch in found:
        for row, number in enumerate(numbers):
            inputs, added = states(folder, ids[number].tolist(), 6)
            for one, expected in zip(batch, (added[2], inputs[3], inputs[5]), strict=True):
                assert torch.allclose(one[row, : len(ids[number])], expected, atol=1e-5)


CROSSINGS = [
    (layers(0, 1, 2), layers(0, 1, 2, 3, 4)),
    (layers(0), layers(0, 1, 2, 3, 4, 5)),
    (layers(0, 3), layers(0, 1, 2, 3, 4)),
    ((*layers(0), MEAN), layers(0, 1, 2, 3)),
    ((*layers(0, 2), SCALED), (*layers(0, 2), SCALED, *layers(5))),
    (layers(0, 1, 0, 1), layers(0, 1, 0, 1, 2)),
    ((*layers(0, 1), NOTHING, *layers(3)), (*layers(0, 1), NOTHING, *layers(3, 4))),
    (layers(0, 1), (*layers(0, 1), NOTHING)),
]


@pytest.mark.parametrize(("given", "wanted"), CROSSINGS)
def test_streamed_states_are_those_in_memory(
    tiny: Tiny,
    small: Callable[[], None],  # noqa: F811
    given: Stack,
    wanted: Stack,
) -> None:
    crossing = Crossing(given, wanted, "mlp.down_proj")
    whole = crossed(crossing, tiny("llama"))
    small()
    alike(crossed(crossing, tiny("llama")), whole)


def test_two_models_meet(tiny: Tiny, small: Callable[[], None]) -> None:  # noqa: F811
    folders = tiny("llama"), tiny("llama", seed=1)
    crossing = Crossing(layers(0, 1), (*layers(0, 1), *layers(2, 3, model="m1")), "mlp.down_proj")
    whole = crossed(crossing, *folders)
    small()
    alike(crossed(crossing, *folders), whole)


def alike(found: Sequence[tuple[list[int], States]], expected: Sequence[tuple[list[int], States]]) -> None:
    assert [numbers for numbers, _ in found] == [numbers for numbers, _ in expected] == [[0, 1], [2, 3], [4]]
    for (_, one), (_, other) in zip(found, expected, strict=True):
        for mine, its in zip(one, other, strict=True):
            assert mine.shape == its.shape and torch.allclose(mine, its, atol=1e-5)
        assert not torch.equal(one.added, one.state)


BATCHES = [[Sample(0, [5, 6, 7]), Sample(1, [9, 8, 7, 6])], [Sample(2, [1, 2])]]


@pytest.mark.parametrize("room", [ROOM, Room(0, "nothing")])
def test_layers_are_read_once_up_to_the_seam_and_no_head(skeleton: tuple[Skeleton, Counted], tmp_path: Path, room: Room) -> None:  # noqa: F811
    made, weights = skeleton
    found: list[States] = []
    relay = Relay({"m": made}, Place(CPU, room, room, tmp_path))
    relay.cross(Crossing(layers(0, 2), layers(0, 1, 2, 3), "mlp.down_proj"), BATCHES, lambda batch, states: found.append(states))
    assert [tuple(states.added.shape) for states in found] == [(2, 4, 32), (1, 2, 32)]
    times = {name.split(".")[2]: count for name, count in weights.times.items() if name.startswith("model.layers.")}
    assert times == {"0": 1, "1": 1, "2": 1, "3": 1}, "layer 2 is the end of the cut, and waits for the states that come through layer 1"
    assert {count for name, count in weights.times.items() if not name.startswith("model.layers.")} == {1}


def test_no_batches(skeleton: tuple[Skeleton, Counted], tmp_path: Path) -> None:  # noqa: F811
    made, weights = skeleton
    relay = Relay({"m": made}, Place(CPU, ROOM, ROOM, tmp_path))
    relay.cross(Crossing(layers(0), layers(0, 1), "mlp.down_proj"), [], lambda batch, states: pytest.fail("there is none"))
    assert not weights.times
