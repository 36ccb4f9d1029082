"""A GGUF file becomes a checkpoint folder once, by transformers, and is kept. The weights are unpacked; nothing is made up.

Dtype of the folder: float32 when all matrices of the file are F32, float16 when they are F32 and F16, and bfloat16 for BF16 and for
every quantised type.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from layercut.checkpoint import open_checkpoint
from layercut.conversions import announce, converted
from layercut.errors import CheckpointError
from layercut.ggufmetadata import Metadata

NEEDED = ("torch", "transformers", "accelerate", "gguf")
"""Packages that a conversion takes."""

STRETCHED_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that change the rotary embedding (Llama 3.1, Phi 3), which transformers passes over: the model would compute something else."""


class Contents(NamedTuple):
    """What a GGUF file holds."""

    dtype: str
    """Dtype that the folder gets, as torch names it."""
    elements: int
    """Elements of all tensors."""


def convert(path: Path, cache: Path) -> Path:
    """The folder of safetensors that a GGUF file was converted into, below `cache/gguf`; made when it is not there yet.

    The folder is named after the file and the sha256 of its bytes. Raises CheckpointError.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - the name counts, not what a link of a Hub cache points to
    _check_magic(path)
    return converted(cache / "gguf", path.stem, {path.name: path}, lambda staging, folder: _convert(path, staging, folder), path)


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError("not a GGUF file", where=path)
    except OSError as error:
        raise CheckpointError(f"cannot be converted: {error.strerror or error}", where=path) from None


def _convert(path: Path, staging: Path, folder: Path) -> Path:
    """Convert in `staging`, and check."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError("a GGUF model is converted by transformers first", where=path, hint=f"pip install {' '.join(missing)}")
    contents = _contents(path)
    announce(path.name, folder)
    target = staging / "target"
    try:
        _transform(path, staging, target, contents.dtype)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever it meets
        raise CheckpointError(f"transformers cannot convert this GGUF file: {_line(error)}", where=path) from error
    taken = open_checkpoint(target).parameters
    if taken != contents.elements:
        message = f"transformers took {taken} of {contents.elements} weights of this GGUF file"
        raise CheckpointError(message, where=path, hint="use the safetensors version of the model")
    return target


def _contents(path: Path) -> Contents:
    """Read the tensor table. Refuses what the conversion would lose."""
    from gguf import GGUFReader

    with path.open("rb") as file:
        Metadata(file, path).check()
    try:
        reader = GGUFReader(path)
        tensors = [(tensor.name, tensor.tensor_type.name, [int(length) for length in tensor.shape]) for tensor in reader.tensors]
        parts = reader.fields.get("split.count")
        count = 1 if parts is None else int(parts.contents())
        layers = max((int(field.contents()) for name, field in reader.fields.items() if name.endswith(".block_count")), default=0)
    except Exception as error:  # the reader raises whatever a damaged file leads it to
        raise CheckpointError(f"damaged GGUF file: {_line(error)}", where=path, hint="download it again") from None
    if count > 1:
        message = f"one of {count} parts of a split GGUF model"
        raise CheckpointError(message, where=path, hint="join them with: llama-gguf-split --merge FIRST_PART WHOLE")
    if layers > len(tensors):  # transformers would make them all before it looks
        message = f"damaged GGUF file: {layers} layers in {len(tensors)} tensors"
        raise CheckpointError(message, where=path, hint="download it again")
    stretched = [name for name, _, _ in tensors if name in STRETCHED_ROPE]
    if stretched:
        message = f"{stretched[0]} changes the rotary embedding, and transformers would drop it"
        raise CheckpointError(message, where=path, hint="use the safetensors version of the model")
    types = {kind for _, kind, shape in tensors if len(shape) > 1}
    dtype = "float32" if types <= {"F32"} else "float16" if types <= {"F32", "F16"} else "bfloat16"
    return Contents(dtype, sum(math.prod(shape) for _, _, shape in tensors))


def _transform(path: Path, staging: Path, target: Path, dtype: str) -> None:
    """Let transformers read the file and write a folder: weights, config, generation config and tokenizer."""
    with _quiet():
        import torch
        import transformers

        source = staging / "source"
        source.mkdir()
        # Alone in a folder: transformers would take tokenizer files, adapters and code from beside the file.
        (source / "model.gguf").symlink_to(path)
        # Without it, packed weights are kept where kernels for them are installed, and a model that was packed cannot be saved.
        plain = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, gguf_file="model.gguf", dtype=getattr(torch, dtype), output_loading_info=True, **plain
        )
        model, info = loaded
        absent = sorted(info["missing_keys"])
        if absent:
            more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
            raise CheckpointError(f"the GGUF file does not hold {absent[0]}{more}, which its architecture needs", where=path)
        model.save_pretrained(target)
        transformers.AutoTokenizer.from_pretrained(source, gguf_file="model.gguf").save_pretrained(target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither progress bars nor warnings; errors still raise."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging as chatter

        verbosity = chatter.get_verbosity()
        chatter.set_verbosity(logging.ERROR)
        try:
            yield
        finally:
            chatter.set_verbosity(verbosity)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
