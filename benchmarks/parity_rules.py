"""Compares what two tools wrote, and explains every difference by a documented rule, or not at all. Runs no tool."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from parity_cases import Case

Tensors = Mapping[str, "torch.Tensor"]
DEPTHS = ("num_hidden_layers", "n_layer", "layer_types", "tie_word_embeddings")


class Outcome(NamedTuple):
    """What one tool made of a recipe."""

    failure: str | None
    """The last line of its error, or None when it succeeded."""
    tensors: Tensors
    """What it wrote, also when it failed afterwards."""
    config: Mapping[str, Any]
    fault: str | None
    """Why the output does not load as it should, or None when it does."""


class Source(NamedTuple):
    """A model that a recipe names."""

    tensors: Tensors
    config: Mapping[str, Any]


class Pair(NamedTuple):
    """The outcomes of both tools for a recipe, and the models that it names, in order."""

    case: Case
    mergekit: Outcome
    layercut: Outcome
    sources: Mapping[str, Source]


class Difference(NamedTuple):
    """Something in which the outputs differ: a tensor, or a key of the config (`config:KEY`)."""

    what: str
    how: str


class Rule(NamedTuple):
    """A known reason for differences. `explains` checks it on the values, and says which differences it accounts for."""

    name: str
    text: str
    explains: Callable[[Pair, Difference], bool]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by name; those of a run that failed too."""
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a mapping
    return found


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit: -0.0 is not 0.0 here, and NaN is itself."""
    import torch

    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(_bytes(one), _bytes(two))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """A value of config.json; `dtype` in either spelling."""
    return config.get("dtype", config.get("torch_dtype")) if key == "dtype" else config.get(key)


def differences(pair: Pair) -> list[Difference]:
    """All differences between two outputs, tensors first, each sorted by name. Empty when both tools failed."""
    if pair.mergekit.failure and pair.layercut.failure:
        return []
    found: list[Difference] = []
    theirs, ours = pair.mergekit.tensors, pair.layercut.tensors
    for name in sorted({*theirs, *ours}):
        if name not in ours:
            found.append(Difference(name, "mergekit only"))
        elif name not in theirs:
            found.append(Difference(name, "layercut only"))
        elif not same_bits(theirs[name], ours[name]):
            kinds = [f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in (theirs[name], ours[name])]
            found.append(Difference(name, "values" if kinds[0] == kinds[1] else f"{kinds[0]} and {kinds[1]}"))
    for key in (*DEPTHS, "dtype"):
        values = [config_value(outcome.config, key) for outcome in (pair.mergekit, pair.layercut)]
        if values[0] != values[1]:
            found.append(Difference(f"config:{key}", f"{json.dumps(values[0])} and {json.dumps(values[1])}"))
    for name, outcome, other in (("mergekit", pair.mergekit, pair.layercut), ("layercut", pair.layercut, pair.mergekit)):
        if outcome.failure and not other.failure:
            found.append(Difference(f"failure:{name}", outcome.failure))
        elif outcome.fault and not outcome.failure:
            found.append(Difference(f"load:{name}", outcome.fault))
    return found


def explain(pair: Pair, found: list[Difference]) -> tuple[dict[str, int], list[Difference]]:
    """Number of differences by rule, and the differences that no rule explains."""
    counts: dict[str, int] = {}
    rest: list[Difference] = []
    for difference in found:
        rule = next((rule for rule in RULES if rule.explains(pair, difference)), None)
        if rule is None:
            rest.append(difference)
        else:
            counts[rule.name] = counts.get(rule.name, 0) + 1
    return counts, rest


# The rules


def _true_zeros(pair: Pair, difference: Difference) -> bool:
    theirs, ours = pair.mergekit.tensors.get(difference.what), pair.layercut.tensors.get(difference.what)
    return theirs is not None and ours is not None and theirs.dtype == ours.dtype and not theirs.any() and not _bytes(ours).any()


EXPERTS = re.compile(r"(.*\.)(?:block_sparse_moe|mlp)\.experts\.(?:\d+\.(w[123])\.weight|(gate_up_proj|down_proj))")
ROUTER = re.compile(r"(.*\.)(?:block_sparse_moe|mlp)\.gate\.weight")


def _fused_experts(pair: Pair, difference: Difference) -> bool:
    """The tensors of both spellings are equal once those of layercut are stacked as transformers does."""
    import torch

    theirs, ours = pair.mergekit.tensors, pair.layercut.tensors
    router = ROUTER.fullmatch(difference.what)
    if router is not None:
        names = [f"{router[1]}mlp.gate.weight", f"{router[1]}block_sparse_moe.gate.weight"]
        return names[0] in theirs and names[1] in ours and same_bits(theirs[names[0]], ours[names[1]])
    match = EXPERTS.fullmatch(difference.what)
    if match is None:
        return False
    prefix, down = match[1], match[2] == "w2" or match[3] == "down_proj"
    fused = theirs.get(f"{prefix}mlp.experts.{'down' if down else 'gate_up'}_proj")
    number = sum(re.fullmatch(re.escape(prefix) + r"block_sparse_moe\.experts\.\d+\.w1\.weight", name) is not None for name in ours)
    if fused is None or not number:
        return False
    rows = [[ours[f"{prefix}block_sparse_moe.experts.{e}.{w}.weight"] for w in (("w2",) if down else ("w1", "w3"))] for e in range(number)]
    return same_bits(fused, torch.stack([torch.cat(row) for row in rows]))


def _lost_biases(pair: Pair, difference: Difference) -> bool:
    if difference.what == "load:mergekit":
        return any(name.endswith(".bias") and name not in pair.mergekit.tensors for name in pair.layercut.tensors)
    ours = pair.layercut.tensors.get(difference.what)
    if difference.how != "layercut only" or ours is None or not difference.what.endswith(".bias"):
        return False
    rest = re.sub(r".*\.layers\.\d+\.", "", difference.what)
    return any(
        name.endswith(rest) and same_bits(tensor, ours) for source in pair.sources.values() for name, tensor in source.tensors.items()
    )


def _tied_head(pair: Pair, difference: Difference) -> bool:
    """One model is tied and the other is not: layercut writes the head that the last model used, and says so in the config."""
    head = pair.layercut.tensors.get("lm_head.weight")
    ties = {"lm_head.weight" in source.tensors for source in pair.sources.values()}
    if head is None or ties != {True, False} or pair.layercut.config.get("tie_word_embeddings"):
        return False
    names = ("lm_head.weight", "model.embed_tokens.weight")
    used = any(same_bits(head, source.tensors[name]) for source in pair.sources.values() for name in names if name in source.tensors)
    return used and difference.what in ("lm_head.weight", "config:tie_word_embeddings", "load:mergekit")


def _division(pair: Pair, difference: Difference) -> bool:
    """Weights within two units in the last place, and those of layercut are the bits of a source."""
    import torch

    theirs, ours = pair.mergekit.tensors.get(difference.what), pair.layercut.tensors.get(difference.what)
    if theirs is None or ours is None or theirs.dtype != torch.float32 or ours.shape != theirs.shape:
        return False
    exact = any(same_bits(tensor, ours) for source in pair.sources.values() for tensor in source.tensors.values())
    return exact and bool(((theirs - ours).abs() <= 2**-22 * ours.abs()).all())


def _failed(pattern: str) -> Callable[[Pair, Difference], bool]:
    """mergekit stopped with this message; what it had written by then is equal, and layercut's output loads."""

    def explains(pair: Pair, difference: Difference) -> bool:
        if pair.mergekit.failure is None or not re.search(pattern, pair.mergekit.failure) or pair.layercut.failure or pair.layercut.fault:
            return False
        return difference.what == "failure:mergekit" or (not pair.mergekit.config and difference.what.startswith("config:"))

    return explains


def _depth_left(pair: Pair, difference: Difference) -> bool:
    """The number of layers in the file is that of layercut's config, and not that of mergekit's."""
    layers = {int(match[1]) for name in pair.mergekit.tensors if (match := re.search(r"\.layers\.(\d+)\.", name))}
    depth = (pair.mergekit.config.get("num_hidden_layers"), pair.layercut.config.get("num_hidden_layers"))
    known = difference.what in ("config:num_hidden_layers", "load:mergekit")
    return known and pair.layercut.fault is None and len(layers) == depth[1] != depth[0]


def _dtype_name(pair: Pair, difference: Difference) -> bool:
    theirs, ours = (str(config_value(outcome.config, "dtype")) for outcome in (pair.mergekit, pair.layercut))
    return theirs == f"torch.{ours}" and difference.what in ("config:dtype", "load:mergekit")


def _giver(pair: Pair, difference: Difference) -> bool:
    """The value is that of the first model in one output, and that of another model in the other; no base_model says which."""
    key = difference.what.removeprefix("config:")
    if key == difference.what or "base_model:" in pair.case.text or not pair.sources:
        return False
    first, *others = [config_value(source.config, key) for source in pair.sources.values()]
    theirs, ours = (config_value(outcome.config, key) for outcome in (pair.mergekit, pair.layercut))
    return bool(ours == first and theirs in others)


def _refused(pattern: str) -> Callable[[Pair, Difference], bool]:
    def explains(pair: Pair, difference: Difference) -> bool:
        return pair.layercut.failure is not None and re.search(pattern, pair.layercut.failure) is not None

    return explains


RULES = (
    Rule("true zeros", "A factor of 0 writes zeros; mergekit multiplies, which leaves -0.0 where the weight was negative.", _true_zeros),
    Rule(
        "fused experts",
        "Experts keep the names and the layout of the source; mergekit writes the fused tensors that transformers 5 holds in memory. The "
        "values are equal once they are stacked.",
        _fused_experts,
    ),
    Rule("lost biases", "Every tensor of a layer moves; mergekit moves those in its table, which has no biases for llama.", _lost_biases),
    Rule(
        "head of the last model",
        "Where tied and untied models meet, the head that the last model used is written and the config says untied; mergekit follows the "
        "config of the donor alone.",
        _tied_head,
    ),
    Rule(
        "weight and division",
        "One source of any weight is a copy; mergekit multiplies by the weight and divides by it again, which rounds.",
        _division,
    ),
    Rule(
        "lists of layers",
        "Lists with one entry a layer follow the layers; mergekit sets the depth alone, and the config class of transformers refuses it "
        "after the weights are written.",
        _failed(r"num_hidden_layers.*layer_types|layer_types.*num_hidden_layers"),
    ),
    Rule(
        "depth of unknown types",
        "The depth key is found in config.json; mergekit has no entry for this type and leaves the depth of the source.",
        _depth_left,
    ),
    Rule(
        "giver of the config",
        "Without base_model the config is that of the first slice; mergekit takes one out of a set, not the same one in every run.",
        _giver,
    ),
    Rule(
        "name of the dtype",
        "The config says float16; mergekit writes the word of the recipe, torch.float16, which transformers does not take.",
        _dtype_name,
    ),
    Rule(
        "empty ranges",
        "A range without layers, or one that runs backwards, is refused; mergekit takes it.",
        _refused(r"is empty: \[a, b\)"),
    ),
)


def rules_text() -> Iterator[str]:
    """The rules as lines of Markdown."""
    for rule in RULES:
        yield f"- **{rule.name}**: {rule.text}"
