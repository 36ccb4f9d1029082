from __future__ import annotations

from typing import Any

import pytest

from layercut.errors import CheckpointError
from layercut.exceptions import EXCEPTIONS, Case, hopeless, objection, objections, remarks

DEPTH = 6
WHOLE = [0, 1, 2, 3, 4, 5]
TAIL, HEAD, MIDDLE, DOUBLED = [0, 1, 2, 3], [1, 2, 3, 4, 5], [0, 1, 4, 5], [0, 1, 2, 1, 2, 3, 4, 5]
F, S, L = "full_attention", "sliding_attention", "linear_attention"


def case(kind: str | None, config: dict[str, Any], order: list[int], **more: Any) -> Case:
    return Case(kind, {"model_type": kind, **config}, order, DEPTH, **more)


def says(kind: str | None, reason: str, fatal: bool = False) -> str:
    end = "not run as it is" if fatal else "load but compute something else"
    return f"model type {kind}: {reason}, so this stack would {end}"


GROUP = "layers take the weights of groups in turns, and some would take those of another (num_hidden_groups)"
NO_QUERY = "only the first layer attends to no earlier block, and it has no weights to attend with"
RUNS = "blocks of layers run again and again, and what they hand to the next run has its weights in one tensor for all of them"
STAGGERED = "every second layer of the encoder attends to shifted blocks (stagger_local_blocks), and would do so where it did not before"
BLOCKS = "the layers stand in blocks between which the text is pooled"
SHARED = "layers read keys and values of layers that would be gone, or others (num_kv_shared_layers)"
TOPK = "a layer reuses the top-k of an indexer before it, and there would be none (indexer_types)"
AT_ONCE = "a layer reuses the top-k of the layer right before it, and that would have none (indexer_types)"
GEMMA = {"num_kv_shared_layers": 2, "layer_types": [S, F, S, F, S, F]}  # 4 reads layer 2, 5 reads layer 3
DSA = {"indexer_types": ["full", "shared", "full", "full", "shared", "shared"]}
NEXT = {"indexer_types": ["full", "full", "full", "shared", "full", "shared"]}
NORM = "the first layer has no attention norm"
RANKS = "the rank of a layer in ple_layer_ids shapes its tables"
NONE_LEFT = "no layer of attention would be left, and the cache of the class wants one"
TOGETHER = "the attention and the MLP of a layer stand in the file as two, the first of an even number, and must stay together"
ALONE = "one cross-attention serves the whole stack of one layer, and would be repeated with it"


@pytest.mark.parametrize(
    ("kind", "config", "order", "reason"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, MIDDLE, None),
        ("diffllama", {}, HEAD, None),
        ("minimax", {}, HEAD, "the decay of lightning attention depends on the layer index, and the file does not hold it"),
        ("minimax", {}, TAIL, None),
        ("minicpm3", {}, HEAD, None),
        ("rwkv", {}, HEAD, None),
        ("albert", {}, TAIL, None),
        ("albert", {"num_hidden_groups": 2}, TAIL, GROUP),
        ("albert", {"num_hidden_groups": 2}, [0, 1, 3, 4], None),
        ("albert", {"num_hidden_groups": 0}, TAIL, GROUP),
        ("albert", {"num_hidden_groups": 6}, HEAD, None),
        ("rwkv", {}, [0, 0, 1], None),
        ("modernbert", {}, HEAD, NORM),
        ("modernbert-decoder", {}, HEAD, NORM),
        ("modernbert-decoder", {}, DOUBLED, None),
        ("deberta-v2", {"conv_kernel_size": 3}, HEAD, "a convolution is applied behind the first layer"),
        ("deberta-v2", {"conv_kernel_size": 0}, HEAD, None),
        ("zaya", {}, MIDDLE, None),
        ("zaya", {}, HEAD, None),
        ("dory", {"layer_types": [S, "mlp"] * 6}, HEAD, None),
        ("reformer", {}, MIDDLE, None),
        ("mt5", {"num_layers": 6, "num_decoder_layers": 4}, TAIL, None),
        ("mt5", {"num_layers": 6, "num_decoder_layers": 8}, TAIL, None),
        ("mt5", {"num_layers": 6}, TAIL, "the class makes a cache with as many layers as the encoder has, and the decoder needs more"),
        ("gpt_neox_japanese", {}, TAIL, None),
        ("gpt_neox_japanese", {}, [4, 5, 5], "only the last layer has an attention bias"),
        ("gemma3n_text", GEMMA, [0, 2, 3, 4, 5], None),
        ("gemma3n_text", GEMMA, [0, 1, 2, 4, 5], SHARED),
        ("gemma3n_text", GEMMA, [0, 1, 3, 4, 5], SHARED),
        ("gemma3n_text", {**GEMMA, "num_kv_shared_layers": 0}, [0, 1, 3, 4, 5], None),
        ("novel", GEMMA, [0, 1, 2, 4, 5], SHARED),
        ("glm_moe_dsa", DSA, [0, 1, 3, 4, 5], None),
        ("glm_moe_dsa", DSA, [0, 1, 2, 4, 5], None),
        ("glm_moe_dsa", DSA, [0, 4, 5], None),
        ("neomme", {"layer_types": [S, F, S, F, S, F]}, [0, 1, 2, 5], None),
        (
            "neomme",
            {"layer_types": [S, F, S, F, S, F]},
            [0, 2, 3, 5],
            "value embeddings feed the first and the last layer of full attention",
        ),
        ("llama", {}, HEAD, None),
        ("llama", {}, DOUBLED, None),
        ("gemma3_text", {"layer_types": [S, F, S, F, S, F]}, MIDDLE, None),
        (None, {}, HEAD, None),
    ],
)
def test_objections(kind: str | None, config: dict[str, Any], order: list[int], reason: str | None) -> None:
    found = [objection.text for objection in objections(case(kind, config, order))]
    assert found == ([] if reason is None else [says(kind, reason)])


@pytest.mark.parametrize(
    ("kind", "config", "order", "reason"),
    [
        (
            "gemma4_text",
            {"layer_types": [S, F, S, F, S, F]},
            [0, 1, 2],
            "the class makes the last layer one of full attention, whatever layer_types says",
        ),
        (
            "olmo_hybrid",
            {"layer_types": [L, L, L, F, L, F]},
            [3, 5],
            "the class wants a layer of linear attention and one of full attention",
        ),
        ("qwen3_next", {"layer_types": [L, L, L, F, L, L]}, [0, 1], NONE_LEFT),
        ("nemotron_h", {"layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "moe"]}, [0, 1], NONE_LEFT),
        ("qwen4_exp_text", {"ple_layer_ids": [2, 4]}, [0, 2, 3, 4, 5], RANKS),
        (
            "zamba",
            {"layers_block_type": [L, "hybrid", L, L, "hybrid", L]},
            TAIL,
            "the class ties the block that hybrid layers share, and cannot when one of them is left",
        ),
        ("glm_moe_dsa", DSA, [1, 2, 3, 4, 5], TOPK),
        ("novel", DSA, [4, 0], TOPK),
        ("glm5_next_text", {**NEXT, "layer_types": [F, L, F, F, F, L]}, [0, 1, 3, 4, 5], AT_ONCE),
        ("glm5_next_text", {**NEXT, "layer_types": [F, F, F, F, F, F]}, [0, 1, 2, 3, 5], AT_ONCE),
        ("funnel", {}, TAIL, BLOCKS),
        ("inkling2_text", {}, HEAD, NO_QUERY),
        ("inkling2_text", {}, [0, 1, 0], NO_QUERY),
        ("inkling2_loop_text", {}, TAIL, RUNS),
        ("dory", {"layer_types": [S, "mlp", S, "mlp", F, "mlp"]}, HEAD, TOGETHER),
    ],
)
def test_what_no_recipe_can_allow(kind: str, config: dict[str, Any], order: list[int], reason: str) -> None:
    found = objections(case(kind, config, order))
    assert [(objection.text, objection.fatal) for objection in found] == [(says(kind, reason, True), True)]


@pytest.mark.parametrize(
    ("kind", "config", "order"),
    [
        ("qwen4_exp_text", {"ple_layer_ids": [2, 4]}, [0, 1, 2, 4, 5]),
        ("qwen4_exp_text", {"ple_layer_ids": []}, HEAD),
        ("lfm2", {"layer_types": ["conv", "conv", F, "conv", F, F]}, [0, 1, 2]),
        ("mamba", {}, HEAD),
        ("zamba", {"layers_block_type": [L, "hybrid", L, L, "hybrid", L]}, HEAD),
        ("gemma4_text", {"layer_types": [S, F, S, F, S, F]}, [0, 1]),
        ("glm5_next_text", {**NEXT, "layer_types": [F, L, F, F, F, L]}, [4, 3, 5, 2, 3]),
    ],
)
def test_the_same_types_where_it_is_exact(kind: str, config: dict[str, Any], order: list[int]) -> None:
    assert objections(case(kind, config, order)) == []


@pytest.mark.parametrize(("order", "cross", "fatal"), [([0, 0], False, True), ([0, 0], True, False), ([0], False, False)])
def test_the_one_cross_attention_of_the_one_layer_of_blt(order: list[int], cross: bool, fatal: bool) -> None:
    one = Case("blt_local_encoder", {"cross_attn_all_layers": cross}, order, 1, stack="encoder")
    assert [(objection.text, objection.fatal) for objection in objections(one)] == [(says("blt_local_encoder", ALONE, True), True)] * fatal
    deep = Case("blt_local_decoder", {}, DOUBLED, DEPTH, stack="decoder")
    assert objections(deep) == []


def test_minimax_is_exact_when_the_file_holds_its_decay() -> None:
    assert objections(case("minimax", {}, HEAD, tensors=["model.layers.0.self_attn.slope_rate"])) == []


@pytest.mark.parametrize(
    ("order", "config", "exact"),
    [(TAIL, {}, True), (HEAD, {}, False), (HEAD, {"stagger_local_blocks": False}, True), (MIDDLE, {}, True), ([0, 3, 2, 1], {}, True)],
)
def test_the_encoder_of_pegasus_x_only(order: list[int], config: dict[str, Any], exact: bool) -> None:
    found = objections(case("pegasus_x", config, order, stack="encoder"))
    assert [objection.text for objection in found] == ([] if exact else [says("pegasus_x", STAGGERED)])
    assert objections(case("pegasus_x", config, order, stack="decoder")) == []


def test_a_type_stands_in_one_row_of_its_own_only() -> None:
    loose = [kind for row in EXCEPTIONS for kind in row.model_types if not kind.startswith(("gemma", "diffusion", "embedding"))]
    assert len(loose) == len(set(loose))


def test_index_dependent_types_accept_the_whole_stack() -> None:
    for row in EXCEPTIONS:
        kind = row.model_types[0] if row.model_types else "any"
        if row.exact(case(kind, {}, TAIL)) or row.exact(case(kind, {}, HEAD)):
            assert row.exact(case(kind, {}, WHOLE)), row.model_types


def test_what_cannot_be_edited_at_all() -> None:
    assert hopeless({"model_type": "funnel"}) == says("funnel", BLOCKS, True)
    assert hopeless({"model_type": "albert"}) is None
    assert hopeless({"model_type": "novel", "text_config": {"model_type": "funnel"}}) == says("funnel", BLOCKS, True)
    assert hopeless({"model_type": "llama"}) is None
    assert hopeless({"model_type": ["funnel"]}) is None
    inner = case("inkling2_vision", {}, TAIL, root={"model_type": "inkling2_loop"})
    assert [objection.fatal for objection in objections(inner)] == [True]


def test_features_of_images_behind_the_first_layers() -> None:
    root = {"model_type": "qwen3_vl", "vision_config": {"deepstack_visual_indexes": [3, 5]}}
    told = ["features of images are added behind the first 2 layers, whichever these are; texts without images are not concerned"]
    assert remarks(case("qwen3_vl_text", {}, [0, 2, 3], root=root)) == told
    assert remarks(case("qwen3_vl_text", {}, [0, 1, 3], root=root)) == []
    assert remarks(case("llama", {}, HEAD)) == []


@pytest.mark.parametrize(
    ("order", "told"),
    [
        ([0, 1, 3, 4, 5], []),
        ([0, 1, 2, 4, 5], ["layers 3, 4 of the new stack reuse"]),
        ([0, 1, 2, 3, 5, 2, 5], ["layer 6 of the new stack reuses"]),
        ([1, 0], ["layer 0 of the new stack reuses"]),
    ],
)
def test_layers_that_follow_another_indexer_are_told_of(order: list[int], told: list[str]) -> None:
    end = "the top-k of another layer's indexer than before, the one that now stands before (indexer_types)"
    assert remarks(case("glm_moe_dsa", DSA, order)) == [f"{start} {end}" for start in told]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gemma3n_text", {"num_kv_shared_layers": 2, "layer_types": [[]] * DEPTH}),
        ("olmo_hybrid", {"layer_types": [{}] * DEPTH}),
        ("qwen4_exp", {"ple_layer_ids": ["1"]}),
        ("qwen4_exp", {"ple_layer_ids": 1}),
        ("dory", {"layer_types": 6}),
        ("albert", {"num_hidden_groups": 10**400}),
    ],
)
def test_values_that_the_class_could_not_read(kind: str, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        objections(case(kind, config, HEAD))
    said = f"config.json: a value that says something of the layers is of a kind that model type {kind} does not take"
    assert str(caught.value) == said


def test_an_objection_of_another_table() -> None:
    assert objection("gpt2", "weights are packed") == (says("gpt2", "weights are packed"), False)


def test_the_norm_of_the_embeddings_is_told_of() -> None:
    told = ["the norm of the embeddings, which layer 0 keeps (pre_ln), stays before the first layer"]
    assert [remarks(case("rwkv", {}, order)) for order in (HEAD, MIDDLE)] == [told, []]
