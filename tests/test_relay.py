"""The relay against models in memory: the same losses for every kind of stack, and each weight read as often as it must be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conftest import byte_tokenizer
from test_losses import TEXT, layers, meter, removed
from torch import Tensor

from layercut import memory
from layercut.architecture import find_stack
from layercut.calibration import TextCalibration
from layercut.checkpoint import open_checkpoint
from layercut.errors import CalibrationError, RefusedError
from layercut.losses import Meter
from layercut.memory import Room
from layercut.players import Player
from layercut.relay import Place, Relay
from layercut.routes import Order
from layercut.skeleton import Skeleton
from layercut.stack import LayerRef, Scaling, Share, Stack
from layercut.tokens import Sample
from layercut.weights import Weights

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
ROOM = Room(1 << 30, "1 GB of a test")
SCALED = LayerRef(model="m", index=4, scalings=((Scaling(tensors="*down_proj.weight", by=0.5),),))
MEAN = LayerRef(model="m", index=1, span=2, shares=(Share(model="m", index=1, weight=0.75), Share(model="m", index=2, weight=0.25)))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, no model fits into memory."""
    return lambda: monkeypatch.setattr(memory, "free_memory", lambda: {"memory": 1000})


def both(small: Callable[[], None], stacks: Sequence[Stack], *folders: Path, **options: Any) -> None:
    """Losses in memory and streamed are the same."""
    whole = meter(options.pop("text", TEXT), *folders)
    expected = whole.losses(stacks)
    assert whole._relay is None
    small()
    streamed = meter(whole._calibration, *folders)
    found = streamed.losses(stacks)
    assert streamed._relay is not None
    for one, other in zip(found, expected, strict=True):
        assert one.counts == other.counts and one.sums == pytest.approx(other.sums, rel=1e-5)
    assert len({round(one.mean, 9) for one in found}) == len(stacks), "no two stacks are the same"


def stacks_of(depth: int) -> list[Stack]:
    return [
        removed(depth),
        removed(depth, 1),
        removed(depth, 1, 2),
        removed(depth, 0, depth - 1),
        layers(0, *range(depth), depth - 1),
        layers(*range(depth - 2), depth - 1, depth - 2),
        layers(1, 0, 1, 0),
    ]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_losses_are_those_of_models_in_memory(tiny: Tiny, small: Callable[[], None], kind: str) -> None:
    both(small, stacks_of(6), tiny(kind))


@pytest.mark.parametrize("kind", ["mixtral", "mamba", "jamba"])
def test_losses_of_experts_and_of_recurrent_layers(small: Callable[[], None], tmp_path: Path, kind: str) -> None:
    zoo.tiny_model(kind, "causal").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    depth = find_stack(open_checkpoint(tmp_path)).depth
    both(small, [removed(depth), removed(depth, 1), removed(depth, 2, 3)], tmp_path)


def test_averaged_and_scaled_layers(tiny: Tiny, small: Callable[[], None]) -> None:
    stacks = [removed(6), (*layers(0), MEAN, *layers(3, 4, 5)), (*layers(0, 1, 2, 3), SCALED, *layers(5)), (SCALED, MEAN, SCALED)]
    both(small, stacks, tiny("llama", dtype="bfloat16"))


def test_tied_ends(tiny: Tiny, small: Callable[[], None]) -> None:
    both(small, [removed(6), removed(6, 2)], tiny("llama", tie_word_embeddings=True))


def test_stacks_of_two_models(tiny: Tiny, small: Callable[[], None]) -> None:
    other = layers(3, 4, 5, model="m1")
    stacks = [layers(0, 1, 2) + other, removed(6), layers(*range(6), model="m1"), layers(0, model="m1") + layers(5, 4) + other]
    both(small, stacks, tiny("llama"), tiny("llama", seed=1))


def test_samples_of_different_lengths(tiny: Tiny, small: Callable[[], None], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\n" + "".join(f"{'some words ' * at}\n" for at in range(1, 8)), encoding="utf-8")
    text = TextCalibration(path=str(tmp_path / "t.csv"), samples=7, max_length=40, batch_size=3)
    both(small, stacks_of(6)[:3], tiny("qwen3"), text=text)


# What is read


class Counted(Weights):
    """Counts how often each tensor is read."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.times: Counter[str] = Counter()

    def _read(self, name: str) -> Tensor:
        self.times[name] += 1
        return super()._read(name)


@pytest.fixture
def skeleton(tiny: Tiny) -> Iterator[tuple[Skeleton, Counted]]:
    import transformers

    checkpoint = open_checkpoint(tiny("llama"))
    weights = Counted(checkpoint)
    yield Skeleton(checkpoint, weights, 6, "model.layers.", CPU, torch.float32, transformers.AutoModelForCausalLM), weights


def run(relay: Relay, stacks: Sequence[Stack], batches: int = 3) -> dict[tuple[int, int], Tensor]:
    found: dict[tuple[int, int], Tensor] = {}
    given = [[Sample(2 * at, [5, 6, 7 + at]), Sample(2 * at + 1, [9, 8, 7, 6])] for at in range(batches)]
    relay.run([Order.of(stack) for stack in stacks], given, lambda at, batch, logits: found.update({(at, batch[0].number // 2): logits}))
    return found


def test_each_layer_is_read_once_for_all_stacks_and_batches(skeleton: tuple[Skeleton, Counted], tmp_path: Path) -> None:
    made, weights = skeleton
    stacks = [removed(6), removed(6, 3), removed(6, 0, 5), removed(6, 1, 2)]
    found = run(Relay({"m": made}, Place(CPU, ROOM, ROOM, tmp_path)), stacks)
    assert sorted(found) == [(stack, batch) for stack in range(4) for batch in range(3)]
    assert {logits.shape for logits in found.values()} == {(2, 4, 128)}
    for name, times in weights.times.items():
        assert times == (1 if name.startswith("model.layers.") else 2), name
    assert len(weights.times) == len(weights.checkpoint.tensors)


def test_layers_that_come_again_are_read_again(skeleton: tuple[Skeleton, Counted], tmp_path: Path) -> None:
    made, weights = skeleton
    run(Relay({"m": made}, Place(CPU, ROOM, ROOM, tmp_path)), [layers(0, 1, 2, 1, 2, 3), layers(0, 1, 1, 3)])
    times = {name.split(".")[2]: count for name, count in weights.times.items() if name.startswith("model.layers.")}
    assert times == {"0": 1, "1": 3, "2": 2, "3": 2}


def test_states_that_have_no_room_wait_in_a_file(skeleton: tuple[Skeleton, Counted], tmp_path: Path) -> None:
    made, _ = skeleton
    stacks = [removed(6), removed(6, 3), layers(0, 1, 2, 0, 1, 2)]
    plenty = run(Relay({"m": made}, Place(CPU, ROOM, ROOM, tmp_path / "none")), stacks)
    none = Room(0, "nothing")
    spilled = run(Relay({"m": made}, Place(CPU, none, none, tmp_path / "states")), stacks)
    assert not (tmp_path / "none").exists() and (tmp_path / "states").is_dir()
    assert plenty.keys() == spilled.keys() and all(torch.equal(plenty[key], spilled[key]) for key in plenty)


def test_how_far_it_is_is_shown_when_asked(skeleton: tuple[Skeleton, Counted], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    relay = Relay({"m": skeleton[0]}, Place(CPU, ROOM, ROOM, tmp_path))
    run(relay, [removed(6), removed(6, 3)])
    assert capsys.readouterr() == ("", "")
    relay.progress = True
    run(relay, [removed(6), removed(6, 3)])
    out, err = capsys.readouterr()
    assert out == "" and "layer by layer:" in err and "/8 " in err


def test_no_batches(skeleton: tuple[Skeleton, Counted], tmp_path: Path) -> None:
    made, weights = skeleton
    assert run(Relay({"m": made}, Place(CPU, ROOM, ROOM, tmp_path)), [removed(6)], batches=0) == {} and not weights.times


# Models and budgets that do not do


def test_a_budget_that_no_part_of_a_model_fits_into(skeleton: tuple[Skeleton, Counted], tmp_path: Path) -> None:
    made, weights = skeleton
    least = max(made.rest_peak, made.layer_peak)
    assert made.rest_peak > made.rest_size > 2 * 128 * 32 * 4, "embeddings and head"
    asked = Room(least - 1, "50 kB as asked", asked=True)
    with pytest.raises(CalibrationError) as caught:
        Relay({"m": made}, Place(CPU, asked, asked, tmp_path))
    shown = memory.shown(least)
    said = f"model 'm' takes {shown} for what is loaded of it at once, and {memory.shown(least - 1)} are left (50 kB as asked)"
    assert str(caught.value) == f"{said}; give more with --memory"
    enough = Room(least, "as asked", asked=True)
    relay = Relay({"m": made}, Place(CPU, enough, enough, tmp_path))
    assert relay.limit(10**9) == least // 16 and relay.limit(10) == 10
    with pytest.raises(CalibrationError, match=r"takes .* with its predictions of a batch, .*, or lower batch_size or max_length$"):
        relay.run([Order.of(removed(6))], [[Sample(0, [5] * 200)]], lambda *given: None)
    assert not weights.times


def test_a_model_that_sees_what_it_is_to_predict(small: Callable[[], None], tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=4, architectures=["BertLMHeadModel"]
    )
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    small()
    with pytest.raises(RefusedError, match=r"sees the tokens that it is to predict \(it is no causal language model\): it has no loss"):
        meter(TEXT, tmp_path).losses([removed(4)])


def test_a_model_whose_layers_hand_on_more_is_looked_at(tiny: Tiny, small: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    monkeypatch.setattr(Player, "look", lambda self, calls: looked.append(len(calls)))
    small()
    meter(TEXT, tiny("llama")).losses([removed(6)])
    assert looked and set(looked) == {6}


def test_released_models_are_opened_again(tiny: Tiny, small: Callable[[], None]) -> None:
    small()
    found: Meter = meter(TEXT, tiny("llama"))
    (one,) = found.losses([removed(6, 3)])
    found.release()
    assert found._relay is None and found._players == {}
    assert found.losses([removed(6, 3)]) == [one] and found._relay is None, "nothing was to be run"
    assert found.losses([removed(6, 2)]) != [one] and found._relay is not None
