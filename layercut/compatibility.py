"""Whether layers of several models can stand in one stack: configs, shapes and tokenizers are compared before anything moves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from layercut.architecture import DEPTH_KEYS, MTP_KEYS, Member, config_node
from layercut.checkpoint import Checkpoint
from layercut.errors import RefusedError
from layercut.quantization import ROOTS, stripped
from layercut.rules import RULES
from layercut.views import decode

# Keys that say nothing about what a layer computes.
HARMLESS = (
    "_name_or_path", "_model_name_or_path", "transformers_version", "transformers.js_config", "torch_dtype", "dtype",
    "architectures", "auto_map", "use_cache", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "sep_token_id", "cls_token_id", "pretraining_tp", "model_max_length", "attention_dropout", "hidden_dropout", "attn_pdrop",
    "embd_pdrop", "resid_pdrop", "dropout", "layerdrop", "id2label", "label2id", "tie_word_embeddings", "output_attentions",
    "output_hidden_states", "return_dict", "problem_type", "task_specific_params", "gradient_checkpointing", "vocab_size",
    "max_position_embeddings", "n_positions", "n_ctx", "_attn_implementation",
)  # fmt: skip
# What an absent key means, where classes agree on it.
ABSENT: Mapping[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "hidden_act": "silu",
}
TRAINED = "original_max_position_embeddings"
ROPE = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "rotary_pct",
    "rotary_emb_base",
    TRAINED,
)
# Files that define how text becomes ids: the first that both models have is compared.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tekken.json")
MISSING = object()


class Difference(NamedTuple):
    """Something in which two models differ."""

    what: str
    mine: Any
    theirs: Any

    def __str__(self) -> str:
        return f"{self.what} is {_shown(self.mine)} in one and {_shown(self.theirs)} in the other"


def _shown(value: Any) -> str:
    text = "absent" if value is MISSING else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def check_together(
    members: Mapping[str, Member], donor: str, givers: Sequence[str], tokenizer: str, *, inexact: bool = False
) -> tuple[str, ...]:
    """Compare what comes from several models. Returns notes; raises RefusedError for a mismatch that would load but compute something else.

    The config of `donor` has to describe the layers of all `givers`; the ids of `tokenizer` have to mean the same in all of
    them. With `inexact`, such mismatches become notes; shapes that do not fit are refused always, since they would not load.
    """
    found: list[tuple[str, str, Difference]] = []
    for alias in givers:
        if alias != donor:
            for difference in _shapes(members[donor], members[alias]):
                raise RefusedError(f"'{donor}' and '{alias}' do not fit together: {difference}")
            found += [(donor, alias, difference) for difference in _configs(members[donor], members[alias])]
        if alias != tokenizer:
            pair = (members[tokenizer].checkpoint, members[alias].checkpoint)
            found += [(tokenizer, alias, difference) for difference in _tokenizers(*pair)]
    notes = [f"'{one}' and '{other}' would load together but compute something else: {difference}" for one, other, difference in found]
    if notes and not inexact:
        raise RefusedError(notes[0], hint="to stack them all the same, say 'allow: inexact' in the recipe")
    return tuple(notes)


def _shapes(donor: Member, member: Member) -> Iterator[Difference]:
    """Tensors of the layers that have one name and two shapes."""
    shapes: list[dict[str, set[tuple[int, ...]]]] = []
    for checkpoint, stack in (donor, member):
        found: dict[str, set[tuple[int, ...]]] = {}
        for tensor in checkpoint.tensors.values():
            place = stack.place(tensor.name)
            if place is not None:
                found.setdefault(place.rest, set()).add(tensor.shape)
        shapes.append(found)
    for name in sorted(shapes[0].keys() & shapes[1].keys()):
        if not shapes[0][name] & shapes[1][name]:
            yield Difference(f"the shape of layer tensor {name}", list(min(shapes[0][name])), list(min(shapes[1][name])))
    if donor.stack.prefix != member.stack.prefix:
        yield Difference("the name of layers", f"{donor.stack.prefix}*", f"{member.stack.prefix}*")
    if not shapes[0].keys() & shapes[1].keys() and not donor.stack.shared:
        yield Difference("the name of layer tensors", min(shapes[0], default=""), min(shapes[1], default=""))


def _configs(donor: Member, member: Member) -> Iterator[Difference]:
    """Values of the configs that change what a layer computes."""
    sides = [(config_node(m.checkpoint.config, m.stack.node), m) for m in (donor, member)]
    mine, theirs = (node for node, _ in sides)
    known = {*HARMLESS, *ROPE, *DEPTH_KEYS, *MTP_KEYS}
    for key in sorted((mine.keys() | theirs.keys()) - known):
        if any(decode(rule, node.get(key), m.checkpoint.config, m.stack) is not None for rule in RULES.get(key, ()) for node, m in sides):
            continue  # surgery gathers what is said of single layers
        pair = [stripped(_value(node, key), m) if key in ROOTS else _value(node, key) for node, m in sides]
        if pair[0] != pair[1]:
            shown = [MISSING if key not in node and value is None else value for (node, _), value in zip(sides, pair, strict=True)]
            yield Difference(f"config {key}", *shown)
    ropes = [_rope(node) for node in (mine, theirs)]
    if ropes[0] != ropes[1]:
        yield Difference("rope", *ropes)


def _value(node: Mapping[str, Any], key: str) -> Any:
    if key in node:
        value = node[key]
    elif key == "num_key_value_heads":
        value = node.get("num_attention_heads")
    elif key == "head_dim" and isinstance(node.get("hidden_size"), int) and isinstance(node.get("num_attention_heads"), int):
        value = node["hidden_size"] // max(1, node["num_attention_heads"])
    else:
        value = ABSENT.get(key, None)
    return value


def _rope(node: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings in one spelling, old (`rope_theta`, `rope_scaling`) or new (`rope_parameters`)."""
    scaling = node.get("rope_parameters") or node.get("rope_scaling") or {}
    found = dict(scaling) if isinstance(scaling, Mapping) else {"scaling": scaling}
    kind = found.pop("rope_type", None) or found.pop("type", None)
    found.pop("type", None)
    if kind not in (None, "default"):
        found["rope_type"] = kind
    found.setdefault("rope_theta", node.get("rope_theta", node.get("rotary_emb_base", 10000.0)))
    for key in ("partial_rotary_factor", "rotary_pct"):
        if node.get(key) is not None:
            found.setdefault("partial_rotary_factor", node[key])
    if found.get("partial_rotary_factor") == 1:
        del found["partial_rotary_factor"]
    if "rope_type" in found and node.get(TRAINED) is not None:
        found.setdefault(TRAINED, node[TRAINED])
    return dict(sorted(found.items()))


def _tokenizers(donor: Checkpoint, other: Checkpoint) -> Iterator[Difference]:
    """Vocabularies in which one id means two tokens."""
    names = [{name for name, _ in checkpoint.companions} for checkpoint in (donor, other)]
    name = next((name for name in TOKENIZERS if name in names[0] and name in names[1]), None)
    if name is None:
        return
    texts = [checkpoint.path(name).read_bytes() for checkpoint in (donor, other)]
    if texts[0] == texts[1]:
        return
    read = READERS.get(name)
    tables = [table for text in texts if read is not None and (table := read(text)) is not None]
    if len(tables) < 2:
        yield Difference(f"the tokenizer ({name})", f"{len(texts[0])} bytes", f"{len(texts[1])} other bytes")
        return
    for token in sorted(tables[0].keys() & tables[1].keys()):
        if tables[0][token] != tables[1][token]:
            yield Difference(f"the tokenizer's id of {token!r}", tables[0][token], tables[1][token])
            return
    taken = [{number: token for token, number in table.items()} for table in tables]
    for number in sorted(taken[0].keys() & taken[1].keys()):
        if taken[0][number] != taken[1][number]:
            yield Difference(f"the tokenizer's token of id {number}", taken[0][number], taken[1][number])
            return


def _fast_vocabulary(text: bytes) -> dict[str, int] | None:
    """Tokens and ids of a tokenizer.json, the added ones included."""
    try:
        data = json.loads(text)
        vocabulary = data["model"]["vocab"]
        table = dict(vocabulary) if isinstance(vocabulary, dict) else {entry[0]: number for number, entry in enumerate(vocabulary)}
        return _checked({**table, **{added["content"]: added["id"] for added in data.get("added_tokens") or []}})
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None


def _plain_vocabulary(text: bytes) -> dict[str, int] | None:
    try:
        return _checked(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _checked(table: Any) -> dict[str, int] | None:
    """A table of tokens and ids, or None for anything else."""
    fits = isinstance(table, dict) and all(isinstance(token, str) and isinstance(number, int) for token, number in table.items())
    return table if fits else None


READERS: Mapping[str, Callable[[bytes], dict[str, int] | None]] = {"tokenizer.json": _fast_vocabulary, "vocab.json": _plain_vocabulary}
