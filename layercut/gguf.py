"""A GGUF file becomes a checkpoint folder once, by transformers, and is kept. The weights are unpacked; nothing is made up.

Dtype of the folder: float32 when all matrices of the file are F32, float16 when they are F32 and F16, and bfloat16 for BF16 and for
every quantised type.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from layercut.checkpoint import open_checkpoint
from layercut.errors import CheckpointError

NEEDED = ("torch", "transformers", "accelerate", "gguf")
"""Packages that a conversion takes."""

STRETCHED_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that change the rotary embedding (Llama 3.1, Phi 3), which transformers passes over: the model would compute something else."""

BLOCK = 1 << 22


class Contents(NamedTuple):
    """What a GGUF file holds."""

    dtype: str
    """Dtype that the folder gets, as torch names it."""
    elements: int
    """Elements of all tensors."""


def convert(path: Path, cache: Path) -> Path:
    """The folder of safetensors that a GGUF file was converted into, below `cache/gguf`; made when it is not there yet.

    The folder is named after the file and the sha256 of its bytes. A file whose place, size, inode and times are known is not read
    again. The work is done beside the folder and renamed, so that a folder is complete or does not exist. Raises CheckpointError.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - the name counts, not what a link of a Hub cache points to
    root = cache / "gguf"
    try:
        key = _key(path)
        note = root / "known" / key
        known = _recall(root, note)
        if known is not None:
            return known
        _check_magic(path)
        folder = root / f"{path.stem[:100]}-{_sha256(path)[:16]}"
        if not folder.is_dir():
            _convert_into(path, folder)
            if _key(path) != key:
                shutil.rmtree(folder)
                raise CheckpointError("file changed while it was read", where=path)
        _remember(folder, note)
        return folder
    except OSError as error:
        raise CheckpointError(f"cannot be converted: {error.strerror or error}", where=error.filename or path) from None


def _key(path: Path) -> str:
    """Tells a file from another version of itself without reading it."""
    found = path.stat()
    parts = [str(path.resolve()), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _recall(root: Path, note: Path) -> Path | None:
    """The folder that was made from a file before, if it is still there."""
    if not note.is_file():
        return None
    name = note.read_text(encoding="utf-8")
    folder = root / name
    return folder if name and folder.parent == root and folder.is_dir() else None


def _remember(folder: Path, note: Path) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=note.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(folder.name)
    Path(name).replace(note)


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError("not a GGUF file", where=path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _convert_into(path: Path, folder: Path) -> None:
    """Convert beside `folder`, check, and rename."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError("a GGUF model is converted by transformers first", where=path, hint=f"pip install {' '.join(missing)}")
    contents = _contents(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"converting {path.name} to safetensors once, into {folder}", file=sys.stderr)
    staging = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
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
        with contextlib.suppress(OSError):  # another process was first, with the same bytes
            target.rename(folder)
        if not folder.is_dir():
            raise CheckpointError("the converted model cannot be put in its place", where=folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _contents(path: Path) -> Contents:
    """Read the tensor table. Refuses what the conversion would lose."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        tensors = [(tensor.name, tensor.tensor_type.name, [int(length) for length in tensor.shape]) for tensor in reader.tensors]
        parts = reader.fields.get("split.count")
        count = 1 if parts is None else int(parts.contents())
    except Exception as error:  # the reader raises whatever a damaged file leads it to
        raise CheckpointError(f"damaged GGUF file: {_line(error)}", where=path, hint="download it again") from None
    if count > 1:
        message = f"one of {count} parts of a split GGUF model"
        raise CheckpointError(message, where=path, hint="join them with: llama-gguf-split --merge FIRST_PART WHOLE")
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
