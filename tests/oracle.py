"""What a cut must compute: the source model with layers skipped in place, made with nothing but transformers and torch."""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import zoo

IDS = [[5, 9, 23, 44, 51, 12, 37, 33, 18, 40, 41, 29]]
STARTS = [[3, 15, 27, 8, 51, 66]]
PIXELS = (1, 3, 32, 32)
NEEDS: dict[str, dict[str, tuple[int, ...]]] = {
    "BlipForConditionalGeneration": {"pixel_values": PIXELS},
    "Blip2ForConditionalGeneration": {"pixel_values": PIXELS},
    "IdeficsForVisionText2Text": {"pixel_values": (1, 1, 3, 32, 32), "image_attention_mask": (1, 12, 1)},
    "InstructBlipForConditionalGeneration": {"pixel_values": PIXELS},
    "InstructBlipVideoForConditionalGeneration": {"pixel_values": (1, 2, 3, 32, 32)},
    "Kosmos2ForConditionalGeneration": {"pixel_values": PIXELS},
    "PPFormulaNetForConditionalGeneration": {"pixel_values": PIXELS},
    "Pix2StructForConditionalGeneration": {"flattened_patches": (1, 4, 770)},
    "UdopForConditionalGeneration": {"bbox": (1, 12, 4)},
    "VisionEncoderDecoderModel": {"pixel_values": PIXELS},
    "VoxtralRealtimeForConditionalGeneration": {"input_features": (1, 128, 96)},
}
"""What a model class cannot do without, beside text: shapes of random values."""


class Loaded(NamedTuple):
    """A model from a folder, and what transformers said when it loaded it."""

    model: Any
    problems: tuple[str, ...]


def load(folder: Path) -> Loaded:
    """Load a checkpoint in fp32, as the class that its config names. Problems are missing, unexpected and mismatched tensors."""
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, info = kind.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        local_files_only=True,
    )
    problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
    problems += [f"unexpected {name}" for name in sorted(info["unexpected_keys"])]
    problems += [f"mismatched {name}" for name, *_ in sorted(info["mismatched_keys"])]
    return Loaded(model.eval(), tuple(problems))


def inputs(model: Any) -> dict[str, Any]:
    """What a model is given: text, and what it cannot do without."""
    config, name = model.config, type(model).__name__
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {key: torch.randn(shape, generator=generator) for key, shape in NEEDS.get(name, {}).items()}
    ids = torch.tensor(IDS)
    if "shared_kv_states" in forward_parameters(model):  # a draft model: it reads keys and values of its target
        text = config.get_text_config()
        sizes = {kind: text.per_layer_config[kind].head_dim for kind in ("sliding_attention", "full_attention")}
        states = {kind: tuple(torch.randn(1, 2, 12, size, generator=generator) for _ in range(2)) for kind, size in sizes.items()}
        embeddings = torch.randn(1, 12, 2 * config.backbone_hidden_size, generator=generator)
        return {"inputs_embeds": embeddings, "shared_kv_states": states, "output_hidden_states": True}
    if name in ("MusicgenForCausalLM", "MusicgenMelodyForCausalLM"):
        ids = ids.repeat(config.num_codebooks, 1)
    if name.startswith(("Blip2", "InstructBlip")):
        ids = torch.cat([torch.full((1, 8 if "Video" in name else 4), 150), ids[:, -4:]], 1)
    if name.startswith("Kosmos2"):
        made["image_embeds_position_mask"] = torch.tensor([[False] + [True] * 4 + [False] * 7])
    if "image_attention_mask" in made:
        made["image_attention_mask"] = torch.ones(1, 12, 1)
    if "flattened_patches" in made:
        made["flattened_patches"][..., :2] = 1  # row and column
    if "bbox" in made:
        made["bbox"] = made["bbox"].sigmoid()
    if "qformer_input_ids" in forward_parameters(model):
        made["qformer_input_ids"] = ids
    if name == "Llama4ForConditionalGeneration":  # it asks its text model for what only images have
        transformers.modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None
    if "input_ids" in forward_parameters(model):
        made["input_ids"] = ids
    if "decoder_input_ids" in forward_parameters(model):
        made["decoder_input_ids"] = torch.tensor(STARTS)
    return made


def forward_parameters(model: Any) -> Any:
    """Names that the forward pass takes."""
    return inspect.signature(model.forward).parameters


def logits(model: Any) -> torch.Tensor:
    """Logits of a fixed text."""
    accepted = forward_parameters(model)
    passed_on = any(given.kind is inspect.Parameter.VAR_KEYWORD for given in accepted.values())
    more = {"use_cache": False} if "use_cache" in accepted or passed_on else {}
    with torch.no_grad():
        torch.manual_seed(0)
        out = model(**inputs(model), **more)
    return out[0] if isinstance(out, tuple) else out.logits


def stacks(model: Any, depth: int) -> dict[str, list[str]]:
    """The module lists of each stack of layers: `decoder` or `encoder` where there are both, else `""`."""
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth and not zoo.TOWER.search(name.removeprefix("perceiver."))
    ]
    lists = [name for name in lists if not any(name != other and re.match(re.escape(other) + r"\.\d+\.", name) for other in lists)]
    sides = {
        name: re.search(r"(?:^|\.)(?:text_|local_)?(encoder|decoder)\.", name) for name in lists
    }  # the first word: a decoder may be a BERT
    encoders, decoders = (
        [name for name, side in sides.items() if side is not None and side[1] == wanted] for wanted in ("encoder", "decoder")
    )
    if encoders and decoders:
        weights = [
            {weight.data_ptr() for name in side for weight in model.get_submodule(name).parameters()} for side in (encoders, decoders)
        ]
        if weights[0] & weights[1]:  # one set of layers serves both
            return {"": lists}
        others = [name for name, side in sides.items() if side is None]
        return {**({"": others} if others else {}), "decoder": decoders, "encoder": encoders}
    return {"": lists}


DELETED = ("SqueezeBertEncoder", "ZayaModel", "BltLocalDecoder", "BltLocalEncoder", "Inkling2TextModel", "PegasusXEncoder")
"""Classes whose layers are taken out of their lists: no hook sees all that a layer hands on, or the parts of a layer are in two lists."""


TOPK = "prev_topk_indices"
"""What layers hand on of the last indexer, beside the hidden states: it is the second thing that they give."""


@contextmanager
def skipped(model: Any, lists: Sequence[str], layers: Sequence[int]) -> Iterator[None]:
    """The model with these layers skipped in place: each gives its input where its output was."""
    groups = _groups(model)
    if groups is not None:
        with _called(groups, {layer: 0 for layer in layers}):
            yield
        return
    parent = model.get_submodule(lists[0].rpartition(".")[0]) if lists else None
    if (len(lists) > 1 and hasattr(parent, "n_layers")) or type(parent).__name__ in DELETED:
        kept = [at for at in range(len(model.get_submodule(lists[0]))) if at not in layers]
        with _rearranged(parent, lists, kept, [True] * len(kept)):
            yield
        return
    handles = []
    for name in lists:
        for layer in layers:
            handles.append(model.get_submodule(name)[layer].register_forward_hook(_through, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(model: Any) -> Any:
    """The module that runs groups of weights in turns, one call a layer, or None."""
    return next((module for module in model.modules() if hasattr(module, "albert_layer_groups")), None)


@contextmanager
def _called(groups: Any, times: Mapping[int, int]) -> Iterator[None]:
    """Groups of weights in turns, of which the call of some layers is made another number of times than once."""
    calls = itertools.count()

    def run(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        layer = next(calls)
        hidden = args[0] if times.get(layer) == 0 else output
        for _ in range(times.get(layer, 1) - 1):
            hidden = module.forward(hidden, *args[1:], **kwargs)
        return hidden

    def start(module: Any, args: Any) -> None:
        nonlocal calls
        calls = itertools.count()

    handles = [groups.register_forward_pre_hook(start)]
    handles += [group.register_forward_hook(run, with_kwargs=True) for group in groups.albert_layer_groups]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _rearranged(parent: Any, lists: Sequence[str], order: Sequence[int], own: Sequence[bool], other: Any = None) -> Iterator[None]:
    """The model with other layers in its lists: of itself, and where `own` does not hold, of another model."""
    names = [name.rpartition(".")[2] for name in lists]
    before = {name: getattr(parent, name) for name in names}
    depth, kinds = getattr(parent, "n_layers", 0), getattr(getattr(parent, "config", None), "layer_types", None)
    parent.n_layers = depth - len(before[names[0]]) + len(order)
    for name, whole in zip(names, lists, strict=True):
        theirs = None if other is None else other.get_submodule(whole)
        setattr(parent, name, torch.nn.ModuleList((before[name] if mine else theirs)[at] for at, mine in zip(order, own, strict=True)))
    if kinds is not None:
        parent.config.layer_types = [kinds[at] for at in order]
    try:
        yield
    finally:
        parent.n_layers = depth
        for name in names:
            setattr(parent, name, before[name])
        if kinds is not None:
            parent.config.layer_types = kinds


def _through(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = hidden_of(args, kwargs)
    if hasattr(module, "pre_ln"):  # the norm of the embeddings of RWKV, which its first layer applies for them
        hidden = module.pre_ln(hidden)
    if TOPK in kwargs:  # what an indexer before it has chosen passes it by
        output = (output[0], kwargs[TOPK], *output[2:])
    return _replaced(output, hidden, kwargs)


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states that a layer was called with."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _replaced(output: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
    """The output of a layer with other hidden states."""
    if hasattr(output, "attn_output"):  # two streams
        return output._replace(attn_output=kwargs["prev_attn_output"], hidden_states=hidden)
    if isinstance(output, torch.Tensor):
        assert output.shape == hidden.shape, (output.shape, hidden.shape)
        return hidden
    assert output[0].shape == hidden.shape, (output[0].shape, hidden.shape)
    return (hidden, *output[1:])


def _states(output: Any) -> torch.Tensor:
    states: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return states


def _brought(model: Any, other: Any, lists: Sequence[str], block: Sequence[int]) -> dict[int, Any]:
    """What layers of another model bring along beside their own weights: their parts of the tables with one part a layer."""
    parent, theirs = (one.get_submodule(lists[0].rpartition(".")[0]) for one in (model, other))
    tables = {name: getattr(parent, name) for name in ("embed_tokens_per_layer", "per_layer_model_projection") if hasattr(parent, name)}
    found: dict[int, Any] = {}

    def seen(layer: int) -> Any:
        return lambda module, args: found.__setitem__(layer, args[1])

    handles = [model.get_submodule(lists[0])[layer].register_forward_pre_hook(seen(layer)) for layer in block if tables]
    for name in tables:
        setattr(parent, name, getattr(theirs, name))
    if tables:
        logits(model)
    for name, table in tables.items():
        setattr(parent, name, table)
    for handle in handles:
        handle.remove()
    return found


@contextmanager
def again(model: Any, lists: Sequence[str], block: Sequence[int], other: Any = None) -> Iterator[None]:
    """The model with a block of layers run twice, in place: each with what it was called with the first time, but for the hidden states.

    The second time the layers may be those of another model.
    """
    groups = _groups(model)
    if groups is not None and other is None and len({group for group in groups.albert_layer_groups}) == 1:
        with _called(groups, {layer: 2 for layer in block}):  # all layers are one: it does not matter which of them runs again
            yield
        return
    parent = model.get_submodule(lists[0].rpartition(".")[0]) if lists else None
    if type(parent).__name__ in DELETED[1:]:
        before, behind = range(block[-1] + 1), range(block[-1] + 1, len(model.get_submodule(lists[0])))
        own = [True] * len(before) + [other is None] * len(block) + [True] * len(behind)
        with _rearranged(parent, lists, [*before, *block, *behind], own, other):
            yield
        return
    brought = _brought(model, other, lists, block) if other is not None and lists else {}
    handles = []
    for name in lists:
        first, second = (list((lender or model).get_submodule(name)) for lender in (model, other))
        calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def seen(layer: int, calls: Any = calls) -> Any:
            return lambda module, args, kwargs: calls.__setitem__(layer, (args, kwargs))

        def rerun(module: Any, args: Any, kwargs: Any, output: Any, calls: Any = calls, layers: Any = second) -> Any:
            hidden = _states(output)
            for layer in block:
                old, named = calls[layer]
                named = {**named, TOPK: output[1]} if TOPK in named else named
                old = (old[0], brought[layer], *old[2:]) if layer in brought else old
                made = (
                    layers[layer].forward(hidden, *old[1:], **named) if old else layers[layer].forward(**{**named, "hidden_states": hidden})
                )
                hidden = _states(made)
                output = made if TOPK in named else output
            return _replaced(output, hidden, kwargs)

        handles += [first[layer].register_forward_pre_hook(seen(layer), with_kwargs=True) for layer in block]
        handles.append(first[block[-1]].register_forward_hook(rerun, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest absolute difference."""
    assert left.shape == right.shape, (left.shape, right.shape)
    return float((left - right).abs().max())


def caches(model: Any) -> bool:
    """Whether the model generates, and the same with a cache as without. Only of a causal model that selects no tokens can it be asked."""
    try:
        if not _causal(model) or getattr(model.config.get_text_config(), "index_topk", None):
            return False  # near ties in a top-k of tiny models fall this way or that by the order of summing
        cached, plain = generated(model, True), generated(model, False)
        return cached.ids == plain.ids and difference(cached.logits, plain.logits) < 1e-3
    except Exception:  # it does not generate from a text, each class for its own reason
        return False


def _causal(model: Any) -> bool:
    """Whether what a model says of a token depends on those before it only: encoders that serve as decoders may see all of them."""
    given = inputs(model)
    if "decoder_input_ids" in given or "input_ids" not in given:
        return "decoder_input_ids" in given
    with torch.no_grad():
        torch.manual_seed(0)
        whole = model(**given)
        torch.manual_seed(0)
        other = model(**{**given, "input_ids": torch.cat([given["input_ids"][:, :-1], given["input_ids"][:, -1:] + 1], 1)})
    left, right = (out[0] if isinstance(out, tuple) else out.logits for out in (whole, other))
    return difference(left[:, :-1], right[:, :-1]) < 1e-5


class Generated(NamedTuple):
    """Eight tokens, greedily, and the logits that they were taken by."""

    ids: list[int]
    logits: torch.Tensor


def generated(model: Any, cache: bool) -> Generated:
    """What a model writes behind a fixed text."""
    given = {name: value for name, value in inputs(model).items() if name not in ("decoder_input_ids", "output_hidden_states")}
    more = {"return_dict_in_generate": True, "output_logits": True, "num_beams": 1, "use_cache": cache}
    with torch.no_grad():
        torch.manual_seed(0)
        out = model.generate(**given, max_new_tokens=8, min_new_tokens=8, do_sample=False, **more)
    return Generated(out.sequences[0].tolist(), torch.stack(out.logits))
