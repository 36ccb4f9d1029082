"""Pickled weights (`pytorch_model.bin`, one file or shards) become a folder of safetensors once, tensor by tensor, and are kept.

torch reads them with `weights_only=True`, which builds tensors and containers and calls nothing else. The files are mapped, not loaded,
so that memory stays at one tensor; files of the format before torch 1.6 cannot be mapped and take the memory of one shard.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from layercut.checkpoint import (
    CONFIG,
    INDEX,
    MAX_JSON,
    SINGLE,
    Checkpoint,
    adapter_beside,
    open_checkpoint,
    read_config,
    read_text,
    weight_files,
)
from layercut.companions import ADAPTER, files_beside, reject_escape
from layercut.conversions import announce, converted
from layercut.errors import CheckpointError
from layercut.header import ITEM_BITS, encode_header, parse_json, quoted

if TYPE_CHECKING:
    import torch

PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"

LEAST_TORCH = (2, 10)
"""Before this version a pickle can break out of `weights_only` (CVE-2025-32434, CVE-2026-24747)."""

ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of what torch.save writes, from 1.6 and before."""

TIE = "tie_word_embeddings"
TOKENS = re.compile(r"(^|\.)(shared|embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|embeddings?)\.weight$")
"""Token embeddings: of several names for one matrix, loaders fill the others from this one."""

DTYPES: Mapping[str, str] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
"""Dtypes that can be taken over: name in safetensors by name in torch."""


class Shard(NamedTuple):
    """One weight file: its name, and the tensors that the index expects in it (None: whatever is there)."""

    name: str
    tensors: frozenset[str] | None


class Entry(NamedTuple):
    """One tensor of a shard, by its name and its dtype in safetensors."""

    name: str
    dtype: str
    value: torch.Tensor


def holds_pickled(names: Iterable[str]) -> bool:
    """Whether files with these names are a checkpoint whose only weights are pickled."""
    present = set(names)
    return CONFIG in present and not present & {SINGLE, INDEX} and bool(present & {PICKLED, PICKLED_INDEX})


def weight_names(names: Iterable[str], index: str | None, where: Path | str) -> list[str]:
    """The pickled weight files of a checkpoint with these files; `index` is the text of its index. Raises CheckpointError."""
    if index is None:
        return [PICKLED]
    listed = sorted(set(weight_files(index, Path(where) / PICKLED_INDEX).values()))
    if PICKLED in names and PICKLED not in listed:
        message = f"both {PICKLED} and an index of other files: loaders disagree on which are the weights"
        raise CheckpointError(message, where=where, hint="move one of them away")
    return listed


def open_pickled(folder: Path, cache: Path, *, reference: str, revision: str | None = None) -> Checkpoint:
    """Open a folder of pickled weights: the folder below `cache/pickled` that it was converted into, made when it is not there yet.

    What of the source does not go along is listed, tensors too that were only another name of the embeddings. Raises CheckpointError.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would lose the commit in the path of a Hub snapshot
    try:
        shards = _shards(folder)
        read_config(folder)
        known = {CONFIG, PICKLED_INDEX, *(shard.name for shard in shards)}
        companions, others = files_beside(folder, known)
        for name in known & {path.name for path in folder.iterdir()}:
            reject_escape(folder / name, folder)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=error.filename or folder) from None
    along = [CONFIG, *(name for name, _ in companions)]
    files = {name: folder / name for name in (*along, *(shard.name for shard in shards))}
    made = converted(
        cache / "pickled", folder.name, files, lambda staging, final: _convert(folder, shards, along, staging / "target", final), folder
    )
    checkpoint = open_checkpoint(made, reference=reference, revision=revision)
    dropped = parse_json(read_text(made / INDEX, made), made / INDEX)["metadata"]["left_out"]
    left_out = {**dict(checkpoint.left_out), **dict(others), **dropped}
    return dataclasses.replace(checkpoint, left_out=tuple(sorted(left_out.items())))


def _shards(folder: Path) -> list[Shard]:
    """The weight files in order, all of them there."""
    if (folder / ADAPTER).exists():
        adapter_beside(folder)
    path = folder / PICKLED_INDEX
    text = read_text(path, folder) if path.is_file() else None
    names = weight_names({found.name for found in folder.iterdir()}, text, folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"missing shard {quoted(missing[0])[1:-1]}{more}", where=folder, hint="download the model again")
    homes = {} if text is None else weight_files(text, path)
    return [Shard(name, frozenset(key for key, file in homes.items() if file == name) if homes else None) for name in names]


def _convert(folder: Path, shards: list[Shard], along: list[str], target: Path, final: Path) -> Path:
    """Write weights, index, config and companions to `target`. The index also says which names were left out."""
    _check_torch(folder)
    needed = sum((folder / shard.name).stat().st_size for shard in shards)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        message = f"converting takes {needed} bytes in {final.parent}, where {free} are free"
        raise CheckpointError(message, where=folder, hint="set LAYERCUT_CACHE to a folder on a larger disk")
    aliases: dict[str, str] = {}
    for shard in shards:  # mapping a file costs nothing: what cannot be taken over is refused before anything is written
        aliases |= _aliases(_entries(folder / shard.name, shard.tensors))
    if aliases and not _is_tied(folder):
        aliases = {}
    announce(folder.name, final)
    target.mkdir()
    homes: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        written = _convert_shard(folder / shard.name, target / name, shard.tensors, aliases)
        twice = sorted(homes.keys() & set(written))
        if twice:
            raise CheckpointError(f"tensor {quoted(twice[0])} stands in two shards", where=folder, hint="save the model again")
        homes |= dict.fromkeys(written, name)
    for name in along:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)
    left_out = {name: f"the same matrix as {kept}, to which it is tied" for name, kept in aliases.items()}
    metadata = {"total_size": sum((target / name).stat().st_size for name in set(homes.values())), "left_out": left_out}
    (target / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": homes}, indent=2) + "\n", encoding="utf-8")
    open_checkpoint(target)
    return target


def _convert_shard(path: Path, target: Path, expected: frozenset[str] | None, aliases: Collection[str]) -> list[str]:
    """Write one weight file without the aliases. Gives the names of its tensors."""
    size = path.stat().st_size
    entries = [entry for entry in _entries(path, expected) if entry.name not in aliases]
    _write(target, entries, path, size)
    return [entry.name for entry in entries]


def _check_torch(folder: Path) -> None:
    wanted = ".".join(map(str, LEAST_TORCH))
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise CheckpointError("pickled weights are read by torch", where=folder, hint=f"pip install 'torch>={wanted}'") from None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < LEAST_TORCH:
        message = f"torch {version} does not keep pickled weights from running code"
        raise CheckpointError(message, where=folder, hint=f"pip install 'torch>={wanted}'")


def _is_tied(folder: Path) -> bool:
    """Whether loaders fill the head from the embeddings: as config.json says or, when it does not say, as its class does."""
    _, config = read_config(folder)
    nodes = [config, *(value for value in config.values() if isinstance(value, dict))]
    said = [bool(node[TIE]) for node in nodes if TIE in node]
    if said:
        return all(said)
    import transformers

    try:
        return bool(getattr(transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False), TIE, False))
    except Exception:  # a class that transformers does not know: then nothing is left out
        return False


def _entries(path: Path, expected: frozenset[str] | None) -> list[Entry]:
    """The tensors of a file in its order. CheckpointError for anything that is no plain tensor."""
    state = _load(path)
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"holds a {type(state).__name__}, not a state dict", where=path, hint="save model.state_dict() itself")
    entries = []
    size = path.stat().st_size
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable():
            raise CheckpointError(f"{quoted(name)} is no name of a tensor", where=path)
        entries.append(Entry(name, _dtype(name, value, size, path), value))
    missing = sorted(expected - state.keys()) if expected is not None else []
    if missing:
        raise CheckpointError(f"the index puts tensor {quoted(missing[0])} here, but it is not here", where=path)
    return entries


def _dtype(name: str, value: Any, size: int, path: Path) -> str:
    """The dtype in safetensors of a tensor that is what it seems: dense, on the CPU, and no larger than its file."""
    import torch

    if not isinstance(value, torch.Tensor):
        hint = "save model.state_dict() itself" if isinstance(value, Mapping) else None
        raise CheckpointError(f"entry {quoted(name)} is a {type(value).__name__}, not a tensor", where=path, hint=hint)
    plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided and value.device.type == "cpu"
    dtype = DTYPES.get(str(value.dtype).removeprefix("torch."))
    if not plain or dtype is None:
        kind = f"{value.layout} {value.dtype} on {value.device}".replace("torch.", "")
        raise CheckpointError(f"tensor {quoted(name)} is {kind}, which safetensors does not hold", where=path)
    if value.numel() * value.element_size() > size:
        message = f"tensor {quoted(name)} stands for {value.numel()} values, more than the file holds"
        raise CheckpointError(message, where=path, hint="save it with .contiguous()")
    return dtype


def _load(path: Path) -> Any:
    """What torch.save wrote, without calling anything that the file names."""
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
    zipped = start.startswith(ZIP)
    if not zipped and start != LEGACY:
        pointer = start.startswith(b"version https:")
        hint = "this is a Git LFS pointer: fetch the file itself with git lfs pull" if pointer else "download it again"
        raise CheckpointError("not a file of torch.save", where=path, hint=hint)
    if zipped:
        _check_zip(path)
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {quoted(asked[1])[1:-1]}" if asked else "holds more than tensors"
        message = f"refused: the pickle {what}, and might run code; nothing of it was run"
        raise CheckpointError(message, where=path, hint="ask the author for safetensors") from None
    except Exception as error:  # torch raises whatever a damaged file leads it to
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"torch cannot read it: {line}", where=path, hint="download it again") from None


def _check_zip(path: Path) -> None:
    """Refuse what torch.save does not write: packed entries, which could grow without bound, and a pickle of any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"damaged: {error}", where=path, hint="download it again") from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or (entry.filename.endswith(".pkl") and entry.file_size > MAX_JSON):
            raise CheckpointError(f"entry {quoted(entry.filename)} is packed or too long; torch.save writes no such file", where=path)


def _aliases(entries: list[Entry]) -> dict[str, str]:
    """Other names of the token embeddings, each with the name that is kept.

    Other tensors that share memory are written under each of their names: a layer that is taken alone needs its own.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, dtype, value in entries:
        if value.numel():
            place = value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride(), dtype
            groups.setdefault(place, []).append(name)
    aliases: dict[str, str] = {}
    for names in groups.values():
        tokens = sorted((name for name in names if TOKENS.search(name)), key=lambda name: (name.count("."), name))
        if tokens:
            aliases |= {name: tokens[0] for name in names if name != tokens[0]}
    return aliases


def _write(path: Path, entries: list[Entry], source: Path, size: int) -> None:
    """One safetensors file, the widest dtypes first so that each tensor is aligned. Holds one tensor at a time.

    The source is mapped: were it cut short, what lies behind its new end is a bad address, or ends this process without a word. So its
    size is looked at before each tensor.
    """
    import torch

    entries = sorted(entries, key=lambda entry: -ITEM_BITS[entry.dtype])
    with path.open("wb") as file:
        file.write(encode_header([(name, dtype, tuple(value.shape)) for name, dtype, value in entries], {"format": "pt"}))
        for entry in entries:
            if source.stat().st_size < size:
                raise CheckpointError("became shorter while it was read", where=source, hint="run again when nothing writes to it")
            plain = entry.value.detach().resolve_conj().resolve_neg().contiguous()
            file.write(plain.reshape(-1).view(torch.uint8).numpy().data)
