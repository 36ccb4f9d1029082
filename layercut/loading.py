"""Models and tokenizers for measuring, loaded by transformers: local files only, safetensors only, no code from checkpoints."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as chatter

from layercut.checkpoint import Checkpoint, read_config
from layercut.errors import CalibrationError, CheckpointError, LayercutError, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""Dtypes that a model can be measured in."""
STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


COPY = "copy tokenizer.json and tokenizer_config.json of the original model into the folder"
TOKENIZERS = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken", "source", "target", "bpe")
"""How the names of files begin that tokenizers are loaded from."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers and Python warnings, and puts everything back. Errors still raise."""
    verbosity, bar = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(logging.CRITICAL)
    chatter.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(verbosity)
        if bar:
            chatter.enable_progress_bar()  # type: ignore[no-untyped-call]


def pick_device(device: str | None = None, local_rank: int = 0) -> torch.device:
    """The device by its name; without one, the CUDA device for the rank on this machine, or else the CPU."""
    if device is None and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    device = "cpu" if device is None else device
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise LayercutError(f"device '{device}' cannot be used: {first_line(error)}") from None
    return picked


def pick_dtype(device: torch.device, dtype: str | None = None) -> torch.dtype | Literal["auto"]:
    """The dtype by its name; without one, float32 on the CPU (16-bit weights upcast exactly) and the checkpoint's own elsewhere."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise LayercutError(f"unknown dtype '{dtype}'", hint=f"known are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def settled_dtype(checkpoint: Checkpoint, device: torch.device, dtype: str | None = None) -> torch.dtype:
    """The dtype of `pick_dtype`, and where that is the checkpoint's own, which one it is: by config.json, else its first float tensor."""
    picked = pick_dtype(device, dtype)
    if picked != "auto":
        return picked
    config = checkpoint.config
    named = config.get("dtype") or config.get("torch_dtype")
    stored = next((tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype in STORED), "F32")
    return DTYPES.get(str(named), STORED[stored])


def load_backbone(folder: Path, device: torch.device, dtype: str | None = None) -> nn.Module:
    """The model without its head, in eval mode. Raises CheckpointError when a weight is missing.

    A checkpoint of a task may lack what the bare model of its type has (a pooler, say), and a type may have no bare model: then it
    is the backbone of the class that config.json names.
    """
    try:
        model: nn.Module = load_as(AutoModel, folder, device, dtype)
    except CheckpointError as error:
        named = named_class(folder)
        if named is None:
            raise
        try:
            model = load_as(named, folder, device, dtype).base_model
        except CheckpointError:
            raise error from None
    return model


def named_class(folder: Path) -> Any:
    """The class of transformers that config.json names under `architectures`, or None. Never one that a checkpoint brings along."""
    names = read_config(folder)[1].get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, first, None) if isinstance(first, str) and first.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def load_causal_lm(folder: Path, device: torch.device, dtype: str | None = None) -> Any:
    """The model with its LM head, in eval mode. Raises CheckpointError when a weight is missing."""
    return load_as(AutoModelForCausalLM, folder, device, dtype)


def load_as(kind: Any, folder: Path, device: torch.device, dtype: str | None, **config: object) -> Any:
    """The model as an (auto) class has it, in eval mode. Raises CheckpointError when a weight is missing."""
    try:
        with quiet():
            model, found = kind.from_pretrained(
                folder,
                dtype=pick_dtype(device, dtype),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **config,
            )
    except LayercutError:
        raise
    except Exception as error:  # transformers and its backends have no common base class
        raise own_code(error, folder) or CheckpointError(
            f"transformers cannot load this model: {first_line(error)}", where=folder
        ) from None
    check_complete(found, folder)
    return model.to(device).eval()


def check_complete(found: Mapping[str, Any], folder: Path, hint: str | None = None) -> None:
    """Raise CheckpointError when transformers says that it missed a weight, or found one of another shape."""
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"weights are missing: {missing[0]}{more}", where=folder, hint=hint)
    mismatched = sorted(found["mismatched_keys"])
    if mismatched:
        name, has, wants = mismatched[0]
        raise CheckpointError(f"{name} has shape {list(has)}, but config.json asks for {list(wants)}", where=folder)


def own_code(error: Exception, folder: Path) -> CheckpointError | None:
    """What to say when transformers asks to run code that comes with the checkpoint: it never is."""
    if "trust_remote_code" not in str(error):
        return None
    message = "transformers could read this only with Python code that comes with it, and layercut runs no code of a checkpoint"
    return CheckpointError(message, where=folder, hint="what loads no model works: recipes without 'auto', verify --no-load")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint. Raises CheckpointError when there is none."""
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the same: no common base class
        files = any(path.name.startswith(TOKENIZERS) for path in folder.iterdir())
        why = first_line(error).rstrip(":") if files else "there is no file of one"
        raise own_code(error, folder) or CheckpointError(f"no tokenizer can be loaded: {why}", where=folder, hint=COPY) from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise CheckpointError("the tokenizer has an empty vocabulary", where=folder, hint=COPY)
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def bos_prefix(tokenizer: Any, bos: bool | Literal["auto"]) -> list[int]:
    """The token ids that start each sample: what the tokenizer puts first by default (auto), at least BOS (True), or none (False)."""
    if bos is False:
        return []
    plain = encode(tokenizer, "a")
    full: list[int] = tokenizer("a", verbose=False)["input_ids"]
    starts = [at for at in range(len(full) - len(plain) + 1) if full[at : at + len(plain)] == plain]
    prefix = full[: starts[0]] if starts else []
    if bos == "auto" or tokenizer.bos_token_id in prefix:
        return prefix
    if tokenizer.bos_token_id is None:
        raise CalibrationError("bos is true, but the tokenizer has no BOS token", hint="set bos: auto or bos: false")
    return [tokenizer.bos_token_id]


def given(backbone: nn.Module, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """What a forward pass is called with: the text alone, which a model with a decoder of its own reads on both sides."""
    named = inspect.signature(backbone.forward).parameters
    passed: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "use_cache" in named or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in named.values()):
        passed["use_cache"] = False
    if "decoder_input_ids" in named:
        passed["decoder_input_ids"] = ids
    both = getattr(getattr(backbone, "config", None), "is_encoder_decoder", False)
    if both and "decoder_attention_mask" in named:  # of others it may cover more than the text
        passed["decoder_attention_mask"] = mask
    wrapped = "input_ids" not in named  # a forward pass that somebody wrapped does not tell what it takes
    return {name: value for name, value in passed.items() if wrapped or name in named or name == "use_cache"}


def layers_of(model: nn.Module, depth: int, prefix: str | None = None) -> nn.ModuleList:
    """The decoder layers: the list of `depth` modules that matches `prefix` best, else the outermost one.

    `prefix` is where the checkpoint keeps the stack, for example `model.language_model.layers.`; a backbone may lack its
    first components, so the longest common end decides. Raises CheckpointError when there is no such list, or more than one.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = [name for name, module in lists.items() if len(module) == depth]
    found = [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]
    if not found:
        seen = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
        raise CheckpointError(f"{type(model).__name__} has no list of {depth} layers (lists: {seen})")
    wanted = (prefix or "").strip(".").split(".")
    ranked = {name: _match(name.split("."), wanted) for name in found}
    best = [name for name in found if ranked[name] == max(ranked.values())]
    if len(best) > 1:
        raise CheckpointError(f"{type(model).__name__} has several lists of {depth} layers: {', '.join(best)}")
    parts = [name for name in found if name.rpartition(".")[0] == best[0].rpartition(".")[0]]
    if len(parts) > 1:
        message = f"{type(model).__name__} keeps the parts of its layers in several lists ({', '.join(parts)})"
        raise CheckpointError(message, hint="no state between layers can be seen there")
    return lists[best[0]]


def _match(name: list[str], wanted: list[str]) -> tuple[int, int, int]:
    """How well a module name fits: length of the common end, components in common, and the outermost first."""
    end = 0
    while end < min(len(name), len(wanted)) and name[-1 - end] == wanted[-1 - end]:
        end += 1
    return end, len(set(name) & set(wanted)), -len(name)
