"""targets.py: what is added to the stream as it is, is found; what is scaled, normed, gated or routed is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conftest import byte_tokenizer
from torch import nn
from transformers.pytorch_utils import Conv1D

from layercut.architecture import find_stack
from layercut.checkpoint import open_checkpoint
from layercut.players import Player
from layercut.targets import NoTarget, Target, find_target, outputs_of

SIZE = 8
CHANGED = "does not come out as it is (a norm, a factor, a gate or experts follow)"
NONE = "it has no plain linear layer that gives a state for every token (experts and quantised layers are none)"


class Block(nn.Module):
    """A layer of attention (here: a linear layer) and MLP, whose parts are put together as a test says."""

    def __init__(self, join: Callable[..., Any], kind: Callable[..., nn.Module] = nn.Linear, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.o_proj = nn.Linear(SIZE, SIZE)
        self.up, self.down = nn.Linear(SIZE, 3 * SIZE), kind(3 * SIZE, SIZE, bias) if kind is not Conv1D else Conv1D(SIZE, 3 * SIZE)
        self.norm, self.join = nn.LayerNorm(SIZE), join

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.norm(x))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(self, x)


def serial(block: Block, x: torch.Tensor) -> torch.Tensor:
    x = x + block.attend(x)
    return x + block.mlp(x)


def parallel(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + block.attend(x) + block.mlp(x)


def normed(block: Block, x: torch.Tensor) -> torch.Tensor:
    x = x + block.norm(block.attend(x))
    return x + block.norm(block.mlp(x))


def scaled(factor: float) -> Callable[..., torch.Tensor]:
    return lambda block, x: x + factor * block.mlp(x)


def gated(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + torch.sigmoid(x.sum(-1, keepdim=True)) * block.mlp(x)


def routed(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Half of the tokens go through the MLP."""
    return torch.cat([x[:, ::2] + block.mlp(x[:, ::2]), x[:, 1::2]], 1)


def twice(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + block.mlp(x) + block.mlp(x)


def found(block: nn.Module, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Target:
    state = (torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
    block.to(dtype)
    with torch.inference_mode():
        return find_target(block, SIZE, lambda: block(state.clone()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_the_mlp_of_a_plain_layer(dtype: torch.dtype, scale: float) -> None:
    assert found(Block(serial), dtype, scale) == Target("down", False)


def test_a_weight_that_lies_the_other_way_and_one_without_bias() -> None:
    assert found(Block(serial, Conv1D)) == Target("down", True)
    assert found(Block(serial, bias=False)) == Target("down", False)


def test_of_attention_and_mlp_side_by_side_the_wider_one() -> None:
    assert found(Block(parallel)) == Target("down", False)


def test_attention_counts_where_nothing_follows_it() -> None:
    assert found(Block(lambda block, x: x + block.attend(x))) == Target("o_proj", False)


class Quantised(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (Block(normed), f"what down gives {CHANGED}"),
        (Block(scaled(0.9)), f"what down gives {CHANGED}"),
        (Block(scaled(-1.0)), f"what down gives {CHANGED}"),
        (Block(gated), f"what down gives {CHANGED}"),
        (Block(routed), NONE),
        (Block(twice), NONE),
        (Block(scaled(1.0), Quantised), NONE),
        (Block(lambda block, x: torch.cat([x, x], -1)), NONE),
        (Block(lambda block, x: x + 0.5 * block.attend(x)), f"what o_proj gives {CHANGED}"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_added_as_it_is(block: Block, said: str, dtype: torch.dtype) -> None:
    with pytest.raises(NoTarget) as caught:
        found(block, dtype)
    assert str(caught.value) == said
    assert not any(module._forward_hooks for module in block.modules())


def test_numbers_that_are_not_finite_are_no_proof() -> None:
    block = Block(serial)
    with torch.no_grad():
        block.up.weight[0, 0] = torch.nan
    with pytest.raises(NoTarget, match="what down gives does not come out"):
        found(block)


def test_outputs_are_noted_while_the_context_lasts() -> None:
    block, state = Block(serial), torch.ones(1, 2, SIZE)
    with outputs_of(block.down) as outs:
        block(state)
    block(state)
    assert len(outs) == 1 and outs[0].shape == (1, 2, SIZE)


FAMILIES = {
    "llama": Target("mlp.down_proj", False),
    "gpt2": Target("mlp.c_proj", True),
    "gpt_neox": Target("mlp.dense_4h_to_h", False),  # parallel by default
    "phi": Target("mlp.fc2", False),
    "opt": Target("fc2", False),
    "qwen3": Target("mlp.down_proj", False),
    "gemma2": "what mlp.down_proj gives does not come out",
    "olmo2": "what mlp.down_proj gives does not come out",
    "granite": "what mlp.down_proj gives does not come out",
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind: str, tmp_path: Path) -> None:
    more = {"granite": {"residual_multiplier": 0.22}}.get(kind, {})
    torch.manual_seed(0)
    model = zoo.tiny_model(kind, "causal")
    for name, value in more.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    stack = find_stack(checkpoint)
    player = Player.load("m", checkpoint, stack.depth, stack.prefix, torch.device("cpu"), None)
    ids = torch.arange(5, 21)[None]
    with torch.inference_mode():
        recorded = player.record(ids, torch.ones_like(ids))
        layer = player.staged.layers[1]
        told: Any
        try:
            told = find_target(layer, recorded.state.shape[-1], lambda: recorded.run(1, layer, recorded.state.clone()))
        except NoTarget as error:
            told = str(error)
    wanted = FAMILIES[kind]
    assert told == wanted if isinstance(wanted, Target) else told.startswith(wanted)
