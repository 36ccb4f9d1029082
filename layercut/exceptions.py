"""Architectures whose layers know their place: one data row each, with the reason.

A cut that would load but compute something else is refused here, unless the recipe allows it; so is a cut that would not load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from layercut.errors import UNREADABLE, CheckpointError


class Case(NamedTuple):
    """A new stack, and what the model that its config comes from says of itself."""

    model_type: str | None
    node: Mapping[str, Any]
    """The config node of the stack, with what the class makes of absent keys."""
    order: Sequence[int]
    """Layer index in its model of every layer of the stack."""
    depth: int
    """Layers of the source."""
    stack: str = "text"
    """Name of the stack."""
    tensors: Collection[str] = ()
    """Names of all tensors of the source."""
    root: Mapping[str, Any] = {}
    """The whole config."""

    def kinds(self, key: str) -> list[Any]:
        """The values of a list with one entry a layer, in the source; empty when there is none."""
        value = self.node.get(key)
        return value[: self.depth] if isinstance(value, list) and len(value) >= self.depth else []


Test = Callable[[Case], bool]


def _tail(case: Case) -> bool:
    """Every layer keeps its index: only layers at the end were cut."""
    return list(case.order) == list(range(len(case.order)))


def _same_parity(case: Case) -> bool:
    """Layers of even index stand at even places, and those of odd index at odd ones."""
    return all(index % 2 == at % 2 for at, index in enumerate(case.order))


def _first(case: Case) -> bool:
    """Layer 0, and no other, stands where layer 0 stood."""
    return case.order[0] == 0 and 0 not in case.order[1:]


def _last_stays(case: Case) -> bool:
    """The last layer of the source stands nowhere but at the end."""
    return case.depth - 1 not in case.order[:-1]


def _never(case: Case) -> bool:
    return False


def _ranks(case: Case) -> bool:
    """The layers with n-gram tables, numbered from 1, keep their rank: only the last of them were cut."""
    listed = [number - 1 for number in case.node.get("ple_layer_ids") or []]
    kept = [index for index in case.order if index in listed]
    return kept == listed[: len(kept)]


def _leaders(case: Case) -> list[tuple[int | None, int | None]]:
    """For every layer of the new stack that reuses the top-k of an indexer: the layer that it takes it of, in the source and now."""
    kinds = case.kinds("indexer_types")
    found: list[tuple[int | None, int | None]] = []
    now: int | None = None
    for index in case.order if kinds else ():
        if kinds[index] == "full":
            now = index
        else:
            found.append((max((i for i in range(index) if kinds[i] == "full"), default=None), now))
    return found


def _led(case: Case) -> bool:
    """Every layer that reuses the top-k of an indexer has one before it."""
    return all(now is not None for _, now in _leaders(case))


def _led_at_once(case: Case) -> bool:
    """Every layer of attention that reuses the top-k of an indexer stands right behind a layer of attention with one."""
    modes, kinds = case.kinds("indexer_types"), case.kinds("layer_types")
    leads = [mode == "full" and kind != "linear_attention" for mode, kind in zip(modes, kinds, strict=False)]
    follows = [mode == "shared" and kind != "linear_attention" for mode, kind in zip(modes, kinds, strict=False)]
    before = [None, *case.order]
    return not leads or all(at is not None and leads[at] for at, index in zip(before, case.order, strict=False) if follows[index])


def _producers(case: Case) -> bool:
    """Every layer that reads keys and values of its kind still reads those of the same layer."""
    shared = case.node.get("num_kv_shared_layers")
    kinds = case.kinds("layer_types") or [None] * case.depth
    if type(shared) is not int or not 0 < shared < case.depth:
        return True
    first = case.depth - shared
    own = [index for index in case.order if index < first]
    before = {kinds[index]: index for index in range(first)}
    after = {kinds[index]: index for index in own}
    return all(after.get(kinds[index]) == before.get(kinds[index]) for index in case.order if index >= first)


def _whole_pairs(case: Case) -> bool:
    """The attention and the MLP of a layer, which stand as two in the file, stay together."""
    pairs = list(zip(case.order[::2], case.order[1::2], strict=False))
    return len(case.order) % 2 == 0 and all(first % 2 == 0 and second == first + 1 for first, second in pairs)


def _same_groups(case: Case) -> bool:
    """Every layer takes the weights of the group that it took them of; the class spreads the layers evenly over the groups."""
    groups = case.node.get("num_hidden_groups", 1)
    if type(groups) is not int or groups < 1:
        return False
    return [int(at / (len(case.order) / groups)) for at in range(len(case.order))] == [
        int(index / (case.depth / groups)) for index in case.order
    ]


def _cut_only(case: Case) -> bool:
    return len(case.order) <= case.depth


def _ends_full(case: Case) -> bool:
    kinds = case.kinds("layer_types")
    return not kinds or kinds[case.order[-1]] == "full_attention"


def _attends(case: Case) -> bool:
    """A layer of attention is left, where recurrent layers or convolutions stand between them."""
    kinds = [str(kind) for kind in case.kinds("layer_types") or case.kinds("layers_block_type")]
    attention = {kind for kind in kinds if re.search(r"attention|hybrid", kind) and not kind.startswith("linear")}
    recurrent = {kind for kind in kinds if re.search(r"linear_attention|mamba|conv|recurrent", kind)}
    return not attention or not recurrent or any(kinds[index] in attention for index in case.order)


def _both_kinds(case: Case) -> bool:
    """At least one layer of each kind that the source has."""
    kinds = case.kinds("layer_types")
    return {kinds[index] for index in case.order} == set(kinds) if kinds else True


def _outer_full(case: Case) -> bool:
    """The first and the last layer with full attention are those of the source."""
    full = [index for index, kind in enumerate(case.kinds("layer_types")) if kind == "full_attention"]
    kept = [index for index in case.order if index in full]
    return not full or (bool(kept) and (kept[0], kept[-1]) == (full[0], full[-1]))


def _two_hybrids(case: Case) -> bool:
    """At least two hybrid layers are left, or as many as the source has."""
    kinds = case.kinds("layers_block_type")
    return sum(kinds[index] == "hybrid" for index in case.order) >= min(2, kinds.count("hybrid")) if kinds else True


def _decoder_fits(case: Case) -> bool:
    """The decoder has no more layers than the encoder, or the source has it so too."""
    encoder, decoder = case.node.get("num_layers"), case.node.get("num_decoder_layers", case.node.get("num_layers"))
    if type(encoder) is not int or type(decoder) is not int or decoder > encoder:
        return True
    return len(case.order) <= encoder if case.stack == "decoder" else len(case.order) >= decoder


class Exceptional(NamedTuple):
    """A group of model types, the condition on their config, the orders that stay exact, and why others do not."""

    model_types: tuple[str, ...]
    """Empty: every type whose config meets the condition."""
    exact: Test
    reason: str
    when: Test = lambda case: True
    fatal: bool = False
    """Whether other orders would not even load, or load with weights that are not there: no recipe can allow them."""


GEMMA = ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified_text", "diffusion_gemma_text", "embedding_gemma2_text")

EXCEPTIONS = (
    Exceptional(
        ("minimax",),
        _tail,
        "the decay of lightning attention depends on the layer index, and the file does not hold it",
        lambda case: not any(name.endswith("slope_rate") for name in case.tensors),
    ),
    Exceptional(("modernbert", "modernbert-decoder"), _first, "the first layer has no attention norm"),
    Exceptional(
        ("deberta-v2",),
        _first,
        "a convolution is applied behind the first layer",
        lambda case: bool(case.node.get("conv_kernel_size")),
    ),
    Exceptional(("gpt_neox_japanese",), _last_stays, "only the last layer has an attention bias"),
    Exceptional(
        ("pegasus_x",),
        _same_parity,
        "every second layer of the encoder attends to shifted blocks (stagger_local_blocks), and would do so where it did not before",
        lambda case: case.stack == "encoder" and case.node.get("stagger_local_blocks") is not False,
    ),
    Exceptional((), _producers, "layers read keys and values of layers that would be gone, or others (num_kv_shared_layers)"),
    Exceptional((), _led, "a layer reuses the top-k of an indexer before it, and there would be none (indexer_types)", fatal=True),
    Exceptional(
        ("glm5_next_text",),
        _led_at_once,
        "a layer reuses the top-k of the layer right before it, and that would have none (indexer_types)",
        fatal=True,
    ),
    Exceptional((), _attends, "no layer of attention would be left, and the cache of the class wants one", fatal=True),
    Exceptional(GEMMA[2:], _ends_full, "the class makes the last layer one of full attention, whatever layer_types says", fatal=True),
    Exceptional(
        ("zamba",), _two_hybrids, "the class ties the block that hybrid layers share, and cannot when one of them is left", fatal=True
    ),
    Exceptional(
        ("mt5", "umt5"), _decoder_fits, "the class makes a cache with as many layers as the encoder has, and the decoder needs more"
    ),
    Exceptional(("olmo_hybrid",), _both_kinds, "the class wants a layer of linear attention and one of full attention", fatal=True),
    Exceptional(
        ("dory",),
        _whole_pairs,
        "the attention and the MLP of a layer stand in the file as two, the first of an even number, and must stay together",
        lambda case: len(case.node.get("layer_types") or ()) == case.depth and "mlp" in case.kinds("layer_types"),
        fatal=True,
    ),
    Exceptional(
        ("blt_local_encoder", "blt_local_decoder"),
        _cut_only,
        "one cross-attention serves the whole stack of one layer, and would be repeated with it",
        lambda case: case.depth == 1 and not case.node.get("cross_attn_all_layers", case.stack == "decoder"),
        fatal=True,
    ),
    Exceptional(("neomme",), _outer_full, "value embeddings feed the first and the last layer of full attention"),
    Exceptional(("qwen4_exp", "qwen4_exp_text"), _ranks, "the rank of a layer in ple_layer_ids shapes its tables", fatal=True),
    Exceptional(
        ("albert",),
        _same_groups,
        "layers take the weights of groups in turns, and some would take those of another (num_hidden_groups)",
        lambda case: case.node.get("num_hidden_groups", 1) != case.depth,
    ),
    Exceptional(("funnel",), _never, "the layers stand in blocks between which the text is pooled", fatal=True),
    Exceptional(
        ("inkling2_text",), _first, "only the first layer attends to no earlier block, and it has no weights to attend with", fatal=True
    ),
    Exceptional(
        ("inkling2_loop", "inkling2_loop_text"),
        _never,
        "blocks of layers run again and again, and what they hand to the next run has its weights in one tensor for all of them",
        fatal=True,
    ),
    Exceptional(("pi0",), _never, "two stacks run against each other, layer by layer", fatal=True),
)


class Objection(NamedTuple):
    """Why a stack would compute something else than its layers did, or would not load."""

    text: str
    fatal: bool


def objections(case: Case) -> list[Objection]:
    """Every row that a new stack offends. Raises CheckpointError for a config that the class could not read."""
    return [Objection(_said(case.model_type, row), row.fatal) for row in rows(case) if not _holds(row.exact, case)]


def rows(case: Case) -> list[Exceptional]:
    """The rows that apply to a model, whatever is done with its layers."""
    return [row for row in EXCEPTIONS if (not row.model_types or _speaks_of(row, case)) and _holds(row.when, case)]


def _holds(test: Test, case: Case) -> bool:
    try:
        return test(case)
    except UNREADABLE:
        said = "config.json: a value that says something of the layers is of a kind that"
        raise CheckpointError(f"{said} model type {case.model_type} does not take") from None


def _speaks_of(row: Exceptional, case: Case) -> bool:
    """Whether a row is for this model; what cannot be edited at all is refused whatever stack of it is meant."""
    return case.model_type in row.model_types or (row.exact is _never and case.root.get("model_type") in row.model_types)


def hopeless(config: Mapping[str, Any]) -> str | None:
    """Why the layers of a model cannot be edited at all, by its model types, or None."""
    kinds = list(_model_types(config))
    for row in EXCEPTIONS:
        kind = next((kind for kind in kinds if kind in row.model_types), None)
        if row.exact is _never and kind is not None:
            return _said(kind, row)
    return None


def _model_types(config: Mapping[str, Any]) -> Iterable[str]:
    kind = config.get("model_type")
    if isinstance(kind, str):
        yield kind
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _model_types(value)


def objection(kind: str | None, reason: str) -> Objection:
    """The objection that a stack would load, for a reason that stands in no row here."""
    return Objection(_said(kind, Exceptional((), _never, reason)), False)


def _said(kind: str | None, row: Exceptional) -> str:
    end = "this stack would not run as it is" if row.fatal else "this stack would load but compute something else"
    return f"model type {kind}: {row.reason}, so {end}"


PADDED = {
    "fnet": "its layers mix all positions, whatever the mask",
    "nystromformer": "landmarks are means of positions, pads among them",
    "yoso": "keys are normalised before they are masked",
    "convbert": "its convolutions see pads",
    "funnel": "positions are pooled, pads among them",
    "mobilebert": "an embedding is joined with those of its neighbours",
    "diffusion_gemma": "its canvas is read as a whole",
}
"""Model types in which pads change the states of other tokens, each with the reason: they are measured in batches of one length."""
DEEPSTACK = (
    "qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "cosmos3_omni", "cohere_compass", "granite_docling",
)  # fmt: skip


def remarks(case: Case) -> list[str]:
    """What the reader should know of a stack that is exact."""
    found = []
    if case.model_type == "rwkv" and case.order[0] != 0:
        found.append("the norm of the embeddings, which layer 0 keeps (pre_ln), stays before the first layer")
    kinds = case.kinds("indexer_types")
    followers = [at for at, index in enumerate(case.order) if kinds and kinds[index] != "full"]
    others = [str(at) for at, (before, now) in zip(followers, _leaders(case), strict=True) if before != now]
    if others:
        named = f"layer{'s' * (len(others) > 1)} {', '.join(others)} of the new stack reuse{'s' * (len(others) == 1)}"
        found.append(f"{named} the top-k of another layer's indexer than before, the one that now stands before (indexer_types)")
    kind = case.root.get("model_type")
    vision = case.root.get("vision_config")
    fed = vision.get("deepstack_visual_indexes") if isinstance(vision, Mapping) else None
    count = len(fed) if isinstance(fed, list) else 0
    if kind in DEEPSTACK and case.stack == "text" and list(case.order[:count]) != list(range(count)):
        found.append(
            f"features of images are added behind the first {count} layers, whichever these are; texts without images are not concerned"
        )
    return found
