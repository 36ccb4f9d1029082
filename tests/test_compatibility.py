from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import failure, write_checkpoint

from layercut.architecture import Member, find_stack
from layercut.checkpoint import open_checkpoint
from layercut.compatibility import check_together
from layercut.errors import RefusedError

HINT = "; to stack them all the same, say 'allow: inexact' in the recipe"
PAIR = "'a' and 'b' would load together but compute something else: "
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "vocab_size": 8,
}
GONE = object()
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def member(
    folder: Path, files: dict[str, bytes] | None = None, tensors: Tensors | None = None, prefix: str = "model.layers.", **change: Any
) -> Member:
    """Two layers; a key of the config that is `GONE` is absent."""
    found: Tensors = {f"{prefix}{layer}.{name}": ("U8", (2, 2), b"....") for layer in range(2) for name in ("mlp.up.weight", "norm.weight")}
    config = {key: value for key, value in {**CONFIG, **change}.items() if value is not GONE}
    write_checkpoint(folder, {**found, **(tensors or {})}, config)
    for name, text in (files or {}).items():
        (folder / name).write_bytes(text)
    checkpoint = open_checkpoint(folder)
    return Member(checkpoint, find_stack(checkpoint))


def check(one: Member, two: Member, *, inexact: bool = False) -> tuple[str, ...]:
    return check_together({"a": one, "b": two}, "a", ("a", "b"), "a", inexact=inexact)


def refusal(one: Member, two: Member, *, inexact: bool = False) -> str:
    return failure(RefusedError, lambda: check(one, two, inexact=inexact))


def yarn(**more: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": 4.0, **more}


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        ({}, {"num_attention_heads": 2}, "config num_attention_heads is 4 in one and 2 in the other"),
        ({}, {"num_key_value_heads": 4}, "config num_key_value_heads is 2 in one and 4 in the other"),
        ({}, {"num_key_value_heads": GONE}, "config num_key_value_heads is 2 in one and 4 in the other"),
        ({}, {"head_dim": 4}, "config head_dim is 2 in one and 4 in the other"),
        ({}, {"hidden_size": 16}, "config hidden_size is 8 in one and 16 in the other"),
        ({}, {"rms_norm_eps": 1e-6}, "config rms_norm_eps is 1e-05 in one and 1e-06 in the other"),
        ({}, {"rms_norm_eps": GONE}, "config rms_norm_eps is 1e-05 in one and absent in the other"),
        ({}, {"hidden_act": "gelu"}, 'config hidden_act is "silu" in one and "gelu" in the other'),
        ({"hidden_act": "gelu"}, {"hidden_act": GONE}, 'config hidden_act is "gelu" in one and "silu" in the other'),
        ({}, {"model_type": "mistral"}, 'config model_type is "llama" in one and "mistral" in the other'),
        ({}, {"attention_bias": True}, "config attention_bias is false in one and true in the other"),
        ({}, {"sliding_window": 4096}, "config sliding_window is absent in one and 4096 in the other"),
        ({}, {"attention_multiplier": 0.5}, "config attention_multiplier is absent in one and 0.5 in the other"),
        (
            {},
            {"quantization_config": {"quant_method": "fp8"}},
            'config quantization_config is absent in one and {"quant_method": "fp8"} in the other',
        ),
        # rope, in the old and in the new spelling
        ({}, {"rope_theta": 500000.0}, 'rope is {"rope_theta": 10000.0} in one and {"rope_theta": 500000.0} in the other'),
        (
            {},
            {"rope_theta": GONE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            'rope is {"rope_theta": 10000.0} in one and {"rope_theta": 1000000.0} in the other',
        ),
        (
            {},
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            'rope is {"rope_theta": 10000.0} in one and {"factor": 2.0, "rope_theta": 10000.0, "rope_type": "linear"} in the other',
        ),
        (
            {"rope_scaling": yarn()},
            {"rope_parameters": yarn(rope_theta=10000.0, factor=2.0)},
            'rope is {"factor": 4.0, "rope_theta": 10000.0, "rope_type": "yarn"} in one '
            'and {"factor": 2.0, "rope_theta": 10000.0, "rope_type": "yarn"} in the other',
        ),
        (
            {},
            {"partial_rotary_factor": 0.5},
            'rope is {"rope_theta": 10000.0} in one and {"partial_rotary_factor": 0.5, "rope_theta": 10000.0} in the other',
        ),
    ],
)
def test_what_would_compute_something_else(mine: dict[str, Any], theirs: dict[str, Any], message: str, tmp_path: Path) -> None:
    one, two = member(tmp_path / "a", **mine), member(tmp_path / "b", **theirs)
    assert refusal(one, two) == f"{PAIR}{message}{HINT}"
    assert f"{PAIR}{message}" in check(one, two, inexact=True)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({}, {}),
        ({"torch_dtype": "bfloat16"}, {"dtype": "float32", "transformers_version": "5.0.0"}),
        ({"bos_token_id": 1, "eos_token_id": [2, 3]}, {"bos_token_id": 5, "pad_token_id": 0}),
        ({}, {"vocab_size": 16, "max_position_embeddings": 4096, "_name_or_path": "x", "use_cache": False, "initializer_range": 0.1}),
        ({}, {"attention_bias": False, "mlp_bias": False, "sliding_window": None, "use_sliding_window": False}),
        ({"hidden_act": GONE}, {}),
        ({"head_dim": 2}, {}),
        ({"num_key_value_heads": 4}, {"num_key_value_heads": GONE}),
        ({"something": None}, {}),
        ({}, {"tie_word_embeddings": True, "architectures": ["X"]}),
        ({}, {"rope_theta": 10000}),
        ({}, {"rope_theta": GONE}),
        ({}, {"rope_theta": GONE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ({}, {"rope_scaling": None}),
        ({}, {"partial_rotary_factor": 1.0}),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, {"rope_scaling": yarn(type="yarn")}),
        ({"rope_scaling": yarn()}, {"rope_theta": GONE, "rope_parameters": yarn(rope_theta=10000.0)}),
        ({"partial_rotary_factor": 0.5}, {"rotary_pct": 0.5}),
        ({"partial_rotary_factor": 1.0}, {"rope_theta": GONE, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}}),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}, "original_max_position_embeddings": 4096},
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0],
                    "original_max_position_embeddings": 4096,
                }
            },
        ),
        # what is said of single layers follows them
        ({"layer_types": ["x", "y"]}, {"layer_types": ["y", "y"]}),
        ({"max_window_layers": 1}, {"max_window_layers": 2}),
        ({"num_key_value_heads": [2, 1]}, {"num_key_value_heads": [1, 1]}),
        ({"num_nextn_predict_layers": 0}, {}),
    ],
)
def test_what_is_tolerated(mine: dict[str, Any], theirs: dict[str, Any], tmp_path: Path) -> None:
    one, two = member(tmp_path / "a", **mine), member(tmp_path / "b", **theirs)
    assert check(one, two) == check(two, one) == ()


def test_a_depth_of_its_own_is_tolerated(tmp_path: Path) -> None:
    third = {f"model.layers.2.{name}": ("U8", (2, 2), b"....") for name in ("mlp.up.weight", "norm.weight")}
    assert check(member(tmp_path / "a"), member(tmp_path / "b", tensors=third, num_hidden_layers=3)) == ()


@pytest.mark.parametrize("inexact", [False, True])
@pytest.mark.parametrize(
    ("tensors", "prefix", "message"),
    [
        (
            {f"model.layers.{n}.mlp.up.weight": ("U8", (3, 2), b"......") for n in (0, 1)},
            "model.layers.",
            "the shape of layer tensor mlp.up.weight is [2, 2] in one and [3, 2] in the other",
        ),
        ({}, "transformer.h.", 'the name of layers is "model.layers.*" in one and "transformer.h.*" in the other'),
    ],
)
def test_what_would_not_load_is_refused_always(inexact: bool, tensors: Tensors, prefix: str, message: str, tmp_path: Path) -> None:
    one, two = member(tmp_path / "a"), member(tmp_path / "b", tensors=tensors, prefix=prefix)
    assert refusal(one, two, inexact=inexact) == f"'a' and 'b' do not fit together: {message}"


def test_layers_without_a_name_in_common(tmp_path: Path) -> None:
    other = open_checkpoint(write_checkpoint(tmp_path / "b", {f"model.layers.{n}.x": ("U8", (1,), b".") for n in (0, 1)}, CONFIG))
    message = 'the name of layer tensors is "mlp.up.weight" in one and "x" in the other'
    assert refusal(member(tmp_path / "a"), Member(other, find_stack(other))) == f"'a' and 'b' do not fit together: {message}"


def test_layers_of_two_kinds_fit_where_one_kind_is_common(tmp_path: Path) -> None:
    """Dense and expert layers of one model have tensors of one name and two shapes."""
    second = {"model.layers.1.mlp.up.weight": ("U8", (3, 2), b"......")}
    assert check(member(tmp_path / "a", tensors=second), member(tmp_path / "b")) == ()


# Tokenizers


def fast(vocabulary: Any, added: Any = ()) -> bytes:
    return json.dumps(
        {"model": {"vocab": vocabulary}, "added_tokens": [{"content": text, "id": number} for text, number in added]}
    ).encode()


ABC = {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("name", "mine", "theirs", "message"),
    [
        ("tokenizer.json", fast(ABC), fast({**ABC, "b": 2, "c": 1}), "the tokenizer's id of 'b' is 1 in one and 2 in the other"),
        ("tokenizer.json", fast(ABC), fast({"a": 0, "b": 1, "d": 2}), 'the tokenizer\'s token of id 2 is "c" in one and "d" in the other'),
        ("tokenizer.json", fast(ABC, [("<x>", 3)]), fast(ABC, [("<x>", 4)]), "the tokenizer's id of '<x>' is 3 in one and 4 in the other"),
        (
            "tokenizer.json",
            fast(ABC, [("<x>", 3)]),
            fast(ABC, [("<y>", 3)]),
            'the tokenizer\'s token of id 3 is "<x>" in one and "<y>" in the other',
        ),
        (
            "tokenizer.json",
            fast([["a", 0.0], ["b", -1.0]]),
            fast([["b", 0.0], ["a", 1.0]]),
            "the tokenizer's id of 'a' is 0 in one and 1 in the other",
        ),
        (
            "vocab.json",
            json.dumps(ABC).encode(),
            json.dumps({**ABC, "a": 7}).encode(),
            "the tokenizer's id of 'a' is 0 in one and 7 in the other",
        ),
        (
            "tokenizer.model",
            b"\x0a\x01x",
            b"\x0a\x01yz",
            'the tokenizer (tokenizer.model) is "3 bytes" in one and "4 other bytes" in the other',
        ),
        ("spiece.model", b"1", b"2", 'the tokenizer (spiece.model) is "1 bytes" in one and "1 other bytes" in the other'),
        ("tokenizer.json", b"{", fast(ABC), 'the tokenizer (tokenizer.json) is "1 bytes" in one and "66 other bytes" in the other'),
    ],
)
def test_ids_that_mean_two_tokens(name: str, mine: bytes, theirs: bytes, message: str, tmp_path: Path) -> None:
    one, two = member(tmp_path / "a", {name: mine}), member(tmp_path / "b", {name: theirs})
    assert refusal(one, two) == f"{PAIR}{message}{HINT}"
    assert check(one, two, inexact=True) == (f"{PAIR}{message}",)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({"tokenizer.json": fast(ABC)}, {"tokenizer.json": fast({**ABC, "d": 3}, [("<x>", 4)])}),
        ({"tokenizer.json": fast(ABC)}, {"tokenizer.json": fast(ABC).replace(b" ", b"  ")}),
        ({"tokenizer.model": b"same"}, {"tokenizer.model": b"same"}),
        ({"tokenizer.json": fast(ABC)}, {"tokenizer.model": b"other"}),  # nothing that can be compared
        ({"tokenizer.json": fast(ABC), "tokenizer.model": b"1"}, {"tokenizer.json": fast(ABC), "tokenizer.model": b"2"}),
        ({}, {"tokenizer.json": fast(ABC)}),
    ],
)
def test_tokenizers_that_agree(mine: dict[str, bytes], theirs: dict[str, bytes], tmp_path: Path) -> None:
    assert check(member(tmp_path / "a", mine), member(tmp_path / "b", theirs)) == ()


HOSTILE = [
    b"[]", b"null", b'{"model": []}', b'{"model": {"vocab": 5}}', b'{"model": {"vocab": [1, 2]}}', b'{"model": {"vocab": [[[1], 2]]}}',
    b'{"model": {"vocab": {"a": [1], "b": {}}}}', b'{"model": {"vocab": {"a": null}}, "added_tokens": [5]}',
    b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": 5, "id": 6}]}', b'{"model": {"vocab": {"a": 0}}, "added_tokens": 7}',
    b"[" * 100_000, b"\xff\xfe", b'{"model": {"vocab": {"a": 1e999}}}',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:40])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_tokenizers_that_cannot_be_read_are_compared_as_bytes(name: str, text: bytes, tmp_path: Path) -> None:
    one, two = member(tmp_path / "a", {name: text}), member(tmp_path / "b", {name: b" " + text})
    expected = f'the tokenizer ({name}) is "{len(text)} bytes" in one and "{len(text) + 1} other bytes" in the other'
    assert refusal(one, two) == f"{PAIR}{expected}{HINT}"


# Who is compared with whom


def test_every_model_that_gives_layers_is_compared_and_no_other(tmp_path: Path) -> None:
    members = {"a": member(tmp_path / "a"), "b": member(tmp_path / "b"), "c": member(tmp_path / "c", rms_norm_eps=1e-6)}
    assert check_together(members, "a", ("a", "b"), "a") == ()
    with pytest.raises(RefusedError, match=r"^'a' and 'c' would load together"):
        check_together(members, "a", ("a", "b", "c"), "a")


def test_a_base_model_must_describe_the_layers(tmp_path: Path) -> None:
    members = {"a": member(tmp_path / "a"), "base": member(tmp_path / "base", rms_norm_eps=1e-6)}
    with pytest.raises(RefusedError) as caught:
        check_together(members, "base", ("a",), "base")
    message = "'base' and 'a' would load together but compute something else: config rms_norm_eps is 1e-06 in one and 1e-05 in the other"
    assert str(caught.value) == message + HINT


def test_the_tokenizer_must_mean_the_same_ids(tmp_path: Path) -> None:
    files = {"tokenizer.json": fast(ABC)}
    members = {"a": member(tmp_path / "a", files), "t": member(tmp_path / "t", {"tokenizer.json": fast({**ABC, "c": 5})}, rms_norm_eps=9)}
    with pytest.raises(
        RefusedError, match=r"^'t' and 'a' would load together but compute something else: the tokenizer's id of 'c' is 5 in one"
    ):
        check_together(members, "a", ("a",), "t")


def test_inexact_tells_every_mismatch(tmp_path: Path) -> None:
    one = member(tmp_path / "a", {"tokenizer.model": b"1"})
    two = member(tmp_path / "b", {"tokenizer.model": b"2"}, rms_norm_eps=1e-6, rope_theta=5.0)
    assert [note.removeprefix(PAIR).split(" is ")[0] for note in check(one, two, inexact=True)] == [
        "config rms_norm_eps", "rope", "the tokenizer (tokenizer.model)",
    ]  # fmt: skip


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    message = refusal(member(tmp_path / "a"), member(tmp_path / "b", long=["x"] * 100))
    assert message == f"{PAIR}config long is absent in one and {json.dumps(['x'] * 100)[:77]}... in the other{HINT}"
