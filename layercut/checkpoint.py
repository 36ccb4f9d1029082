"""A checkpoint on disk: config, tensors with their byte ranges, and the files beside them. Reads headers, never weights.

The weight list comes from `model.safetensors.index.json`, or else from `model.safetensors`, never from what lies around.
Nothing leads out of the folder, except into the blobs of the Hub cache that the folder is a snapshot of.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from layercut.companions import ADAPTER, files_beside, is_plain, listed_beside, reject_escape
from layercut.errors import CheckpointError
from layercut.header import Header, parse_json, quoted, read_header
from layercut.smallfile import read_small

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

MAX_CONFIG = 16_000_000
"""Bytes of config.json that are read at most."""

MAX_JSON = 50_000_000
"""Bytes of the index that are read at most: it takes half of that for 200,000 tensors."""

MAX_DEPTH = 64
"""Nesting of config.json that is taken for honest."""


class Tensor(NamedTuple):
    """One tensor and where its bytes stand (absolute in `file`, half-open)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class WeightFile(NamedTuple):
    """One safetensors file of the checkpoint."""

    name: str
    """Relative to the folder, with forward slashes."""
    size: int
    data_start: int
    digest: str
    """sha256 of the header: the first `data_start` bytes."""


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. Everything was validated, no weight was read."""

    folder: Path
    """Absolute."""
    reference: str
    """The model as the user named it."""
    revision: str | None
    """Commit of a Hub model."""
    config_text: str = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)
    """By name, in the order of files, then of bytes."""
    files: Mapping[str, WeightFile] = field(repr=False)
    companions: tuple[tuple[str, int], ...] = field(repr=False)
    """Name and size of every file that goes along unchanged, sorted."""
    left_out: tuple[tuple[str, str], ...] = field(repr=False)
    """What of the folder does not go along, and why, sorted."""
    metadata: dict[str, str] = field(repr=False)
    """Header metadata, normally `{"format": "pt"}`."""
    fetch: Callable[[str], object] | None = field(default=None, repr=False, compare=False)
    """Puts a file that goes along into the folder, where not all of them are there from the start."""

    def path(self, name: str) -> Path:
        """Where a file that goes along is; it is fetched when it is not there yet."""
        if self.fetch is not None:
            self.fetch(name)
        return self.folder / name

    @property
    def digest(self) -> str:
        """sha256 over config.json and over name, size and header of every weight file: tells another structure apart, not other values."""
        config = hashlib.sha256(self.config_text.encode()).hexdigest()
        parts = [config, [[file.name, file.size, file.digest] for file in self.files.values()]]
        return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def open_checkpoint(
    folder: Path, *, reference: str | None = None, revision: str | None = None, beside: Sequence[tuple[str, int]] | None = None
) -> Checkpoint:
    """Open a folder. Raises CheckpointError when it is missing, damaged, or holds no safetensors weights.

    `beside`: name and size of all files that the folder stands for, when not all of them are in it.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would lose the commit in the path of a Hub snapshot
    try:
        return _open(folder, str(folder) if reference is None else reference, revision, beside)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=error.filename or folder) from None


def _open(folder: Path, reference: str, revision: str | None, beside: Sequence[tuple[str, int]] | None) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError("not a folder" if folder.exists() else "no such folder", where=folder)
    config_text, config = read_config(folder)
    weight_map = _weight_map(folder, config)
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    headers = _read_headers(folder, names)
    tensors, metadata, left_out = _join(folder, headers)
    if weight_map is not None:
        _check_index(folder, weight_map, tensors)
    known = {CONFIG, INDEX, *names}
    companions, others = files_beside(folder, known) if beside is None else listed_beside(beside, known)
    return Checkpoint(
        folder=folder,
        reference=reference,
        revision=revision,
        config_text=config_text,
        config=config,
        tensors=tensors,
        files={name: WeightFile(name, size, header.data_start, header.digest) for name, (size, header) in headers.items()},
        companions=tuple(sorted(companions)),
        left_out=tuple(sorted([*left_out, *others])),
        metadata=metadata,
    )


def weight_files(text: str, where: Path) -> dict[str, str]:
    """The weight_map of an index: file name by tensor name. Raises CheckpointError when it is malformed or names a file elsewhere."""
    index = parse_json(text, where)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("no weight_map, or an empty one", where=where)
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"weight_map of tensor {quoted(name)} is not a file name", where=where)
    spelt: dict[str, str] = {}
    for file in sorted(set(weight_map.values())):
        if not is_plain(file):
            raise CheckpointError(f"weight_map names {quoted(file)}, which is not a plain path inside the folder", where=where)
        twin = spelt.setdefault(file.casefold(), file)
        if twin != file:
            raise CheckpointError(f"weight_map names {quoted(twin)} and {quoted(file)}, which are one file on many systems", where=where)
    return weight_map


def read_text(path: Path, folder: Path, limit: int = MAX_JSON) -> str:
    """UTF-8 text of a file of the folder, newlines as they stand. Raises CheckpointError, and OSError when it cannot be read."""
    reject_escape(path, folder)
    try:
        return read_small(path, limit).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"not UTF-8 (byte {error.start})", where=path) from None


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Text and data of config.json. Raises CheckpointError, and OSError when it cannot be read."""
    path = folder / CONFIG
    if not path.is_file():
        gguf = sorted(found.name for found in folder.glob("*.gguf"))
        hint = f"for a GGUF model name the file itself: {folder / gguf[0]}" if gguf else "name the folder that holds the model"
        below = sorted(found.parent for pattern in (f"*/{CONFIG}", f"snapshots/*/{CONFIG}") for found in folder.glob(pattern))
        hint = f"{hint}, such as {below[0]}" if below and not gguf else hint
        if (folder / ADAPTER).is_file():
            raise CheckpointError("an adapter, not a model", where=folder, hint="merge it into its base model first")
        raise CheckpointError(f"no {CONFIG} in {folder}", hint=hint)
    text = read_text(path, folder, MAX_CONFIG)
    config = parse_json(text, path, infinity=True)
    if not isinstance(config, dict):
        raise CheckpointError("not a JSON object", where=path)
    layer: list[Any] = [config]
    for _ in range(MAX_DEPTH):
        for key in (key for item in layer if isinstance(item, dict) for key in item if not key.isprintable()):
            raise CheckpointError(f"key {quoted(key)} does not print", where=path)
        layer = [value for item in layer for value in (item.values() if isinstance(item, dict) else item) if isinstance(value, dict | list)]
        if not layer:
            return text, config
    raise CheckpointError(f"nested deeper than {MAX_DEPTH}", where=path)


def _weight_map(folder: Path, config: Mapping[str, Any]) -> dict[str, str] | None:
    """The index's weight_map, or None when all weights are in one file."""
    index, single = folder / INDEX, folder / SINGLE
    if (folder / ADAPTER).exists():
        adapter_beside(folder)
    named = config.get("transformers_weights")
    if named not in (None, SINGLE, INDEX):
        message = f"transformers_weights names {quoted(named)} as the weights"
        raise CheckpointError(message, where=folder / CONFIG, hint=f"layercut reads {INDEX} or {SINGLE}: rename the file and drop the key")
    if not index.is_file():
        if not single.is_file():
            no_weights((path.name for path in folder.iterdir()), folder)
        return None
    weight_map = weight_files(read_text(index, folder), index)
    other = next((name for name in weight_map.values() if not name.endswith(".safetensors")), None)
    if other is not None:  # loaders go by the suffix: they would read the same bytes as a pickle
        raise CheckpointError(f"weight_map names {quoted(other)}, which is not a .safetensors file", where=index)
    if single.exists() and SINGLE not in weight_map.values():
        weights_disagree(folder)
    return weight_map


def adapter_beside(where: object) -> NoReturn:
    """Refuse an adapter next to the model: transformers applies it, so the model that is measured is not the one that is cut."""
    message = "an adapter lies beside the model, and loaders apply it without asking"
    raise CheckpointError(message, where=where, hint=f"merge it into the model, or move {ADAPTER} away")


def weights_disagree(where: object) -> NoReturn:
    """Refuse a model.safetensors beside an index that does not name it: transformers reads the first, others go by the index."""
    message = f"both {SINGLE} and an index of other files: loaders disagree on which are the weights"
    raise CheckpointError(message, where=where, hint="move one of them away")


def no_weights(names: Iterable[str], where: Path | str) -> NoReturn:
    """Say what was found instead of safetensors weights, in a folder or (`where` is a string) in a repository."""
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.index.json")
    top = sorted(name for name in names if "/" not in name)
    found = [name for pattern in patterns for name in top if fnmatchcase(name, pattern)]
    if not found:
        raise CheckpointError(f"no weights in {where}", hint=f"expected {SINGLE} or {INDEX}")
    first = found[0]
    hint = "convert it once with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
    if first.endswith(".gguf"):
        hint = f"name the file itself: {where / first}" if isinstance(where, Path) else "download the .gguf file and give its path"
    elif first == "adapter_model.safetensors":
        hint = "this is an adapter: merge it into its base model first"
    elif first.endswith(".safetensors") and len(found) == 1 and not first.startswith("consolidated"):
        hint = f"rename it to {SINGLE} if it holds the whole model"
    message = f"unsupported weights format: found {quoted(first)[1:-1]}; layercut reads safetensors: {SINGLE}, or the files of {INDEX}"
    raise CheckpointError(message, where=where, hint=hint)


def _read_headers(folder: Path, names: list[str]) -> dict[str, tuple[int, Header]]:
    """Size and header of every weight file, by name."""
    missing = [name for name in names if not os.path.exists(folder / name)]  # noqa: PTH110 - Path.exists raises on a name that is too long
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        message = f"missing shard {quoted(missing[0])[1:-1]}{more}"
        raise CheckpointError(message, where=folder, hint="download the model again")
    headers: dict[str, tuple[int, Header]] = {}
    for name in names:
        reject_escape(folder / name, folder)
        header = read_header(folder / name)
        headers[name] = (header.tensors[-1].end if header.tensors else header.data_start, header)
    return headers


def _join(folder: Path, headers: Mapping[str, tuple[int, Header]]) -> tuple[dict[str, Tensor], dict[str, str], list[tuple[str, str]]]:
    """Tensors and metadata of all files, and what of the metadata has no place.

    Loaders take every tensor of a file that the index names, indexed or not, so all of them belong to the model. A name in two files would
    be decided by the order of loading.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    left_out: list[tuple[str, str]] = []
    for file, (_, header) in headers.items():
        for name, dtype, shape, begin, end in header.tensors:
            if not name.isprintable():
                raise CheckpointError(f"the name of tensor {quoted(name)} does not print", where=folder / file)
            if name in tensors:
                message = f"tensor {quoted(name)} stands in {tensors[name].file} and in {file}"
                raise CheckpointError(message, where=folder, hint="loaders disagree on which counts: save the model again")
            tensors[name] = Tensor(name, dtype, shape, file, begin, end)
        for key, value in sorted(header.metadata.items()):
            if metadata.setdefault(key, value) != value:
                left_out.append((f"{file}: metadata {quoted(key)[1:-1]}", "another weight file has another value"))
    if not tensors:
        raise CheckpointError("the weight files hold no tensors", where=folder)
    return tensors, metadata, left_out


def _check_index(folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Every indexed tensor is in the file that the index says."""
    for name, file in weight_map.items():
        found = tensors.get(name)
        if found is None or found.file != file:
            place = "it is in no weight file" if found is None else f"it is in {found.file}"
            message = f"tensor {quoted(name)} should be in {file}, but {place}"
            raise CheckpointError(message, where=folder / INDEX, hint="download the model again")
