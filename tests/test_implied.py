"""Every row of implied.py against the configuration class whose values it makes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layercut.errors import CheckpointError
from layercut.implied import IMPLIED, implied_values

DEPTHS = (7, 13)
# The one class whose default is of its own depth, and of no other.
ONLY = {"gpt_neo": (24,)}


def class_of(kind: str) -> Any:
    """The configuration class of a model type, also of those inside others."""
    if kind in CONFIG_MAPPING:
        return CONFIG_MAPPING[kind]
    for name in sorted(dir(transformers)):
        found = getattr(transformers, name, None) if name.endswith("Config") else None
        if isinstance(found, type) and getattr(found, "model_type", None) == kind:
            return found
    raise AssertionError(f"transformers has no configuration of type {kind}")


def plain(value: Any) -> Any:
    """A value as config.json holds it, with keys that are layer indices as numbers."""
    data = json.loads(json.dumps(value))
    return {int(key): item for key, item in data.items()} if isinstance(data, dict) and all(key.isdigit() for key in data) else data


PAIRS = [(kind, row.key) for row in IMPLIED for kind in row.model_types]


@pytest.mark.parametrize(("kind", "key"), PAIRS)
@pytest.mark.filterwarnings("ignore")
def test_the_class_makes_the_same(kind: str, key: str) -> None:
    keys = {row.key for row in IMPLIED if kind in row.model_types}
    for depth in ONLY.get(kind, DEPTHS):
        config = class_of(kind)(num_hidden_layers=depth)
        written = config.to_dict()
        bare = {name: value for name, value in written.items() if name not in keys} | {"num_hidden_layers": depth, "model_type": kind}
        made = implied_values(bare, kind, depth)
        assert plain(made[key]) == plain(written.get(key, getattr(config, key, None)))


def test_what_is_written_is_not_implied() -> None:
    kind, key = PAIRS[0]
    value = implied_values({"model_type": kind}, kind, 4)[key]
    assert key not in implied_values({"model_type": kind, key: value}, kind, 4)
    assert implied_values({}, "llama", 4) == {}
    assert implied_values({}, None, 4) == {}


def test_gemma2_alternates_and_qwen3_windows_from_a_layer_on() -> None:
    full, sliding = "full_attention", "sliding_attention"
    assert implied_values({}, "gemma2", 4)["layer_types"] == [sliding, full, sliding, full]
    node = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    assert implied_values(node, "qwen3", 4)["layer_types"] == [full, full, sliding, sliding]
    assert implied_values({**node, "use_sliding_window": False}, "qwen3", 4)["layer_types"] == [full] * 4


@pytest.mark.parametrize(
    ("kind", "key", "node"),
    [
        ("exaone4", "layer_types", {"sliding_window_pattern": {"a": 1}}),
        ("kimi_linear", "layer_types", {"linear_attn_config": "x"}),
        ("deepseek_v4", "layer_types", {"compress_ratios": [[]]}),
        ("zamba", "layers_block_type", {"attn_layer_period": 0}),
        ("smollm3", "layer_types", {"no_rope_layers": 5}),
        ("axk1", "mlp_layer_types", {"moe_layer_freq": 0}),
        ("axk1", "mlp_layer_types", {"moe_layer_freq": [1]}),
        ("gemma4_text", "per_layer_config", {"layer_types": 5}),
    ],
)
def test_values_that_the_class_could_not_read(kind: str, key: str, node: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        implied_values(node, kind, 4)
    assert str(caught.value) == f"config.json: {key} follows from other values, and one is of a kind that model type {kind} does not take"
