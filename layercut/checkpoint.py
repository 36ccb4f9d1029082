"""A checkpoint on disk: config, tensors with their byte ranges, and the files beside them. Reads headers, never weights.

The weight list comes from `model.safetensors.index.json`, or else from `model.safetensors`, never from what lies around.
Nothing leads out of the folder, except into the blobs of the Hub cache that the folder is a snapshot of.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, NoReturn

from layercut.errors import CheckpointError
from layercut.header import Header, parse_json, quoted, read_header
from layercut.smallfile import read_small

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"

MAX_CONFIG = 16_000_000
"""Bytes of config.json that are read at most."""

MAX_JSON = 50_000_000
"""Bytes of the index that are read at most: it takes half of that for 200,000 tensors."""

MAX_DEPTH = 64
"""Nesting of config.json that is taken for honest."""


UNCUT = "weights of the uncut model, in another format or copy"
PICKLE = "pickle of a training run: runs code when it is read"
SCAFFOLD = "version control or cache, not the model"

LEFT_OUT_FOLDERS = (
    (("original", "onnx", "openvino", "coreml", "checkpoint-*", "global_step*"), UNCUT),
    ((".git", ".cache", "__pycache__", ".ipynb_checkpoints"), SCAFFOLD),
)
"""Folders that do not go along; the first row only at the top of the checkpoint."""

LEFT_OUT_FILES = (
    (("*.safetensors", "*pytorch_model*.bin", "model*.bin", "consolidated*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ot"), UNCUT),
    (("*.onnx", "*.onnx_data*", "*.onnx.data", "*.h5", "*.msgpack", "*.tflite", "*.mlmodel", "openvino_*.bin", "openvino_*.xml"), UNCUT),
    (("*.index.json",), "index of weights that are left out"),
    ((ADAPTER, "adapter_model.*"), "adapter of the uncut model"),
    (("training_args.bin", "optimizer.bin", "scheduler.bin", "*.pkl", "*.pickle"), PICKLE),
    (("layercut.json", "layercut.png"), "report of an earlier cut"),
    ((".git", ".gitattributes", ".ds_store"), SCAFFOLD),
)
"""Names, in lower case, of files that do not go along."""

MODULE_WEIGHTS = re.compile(r"\d+_\w+/model\.safetensors")
"""A module of sentence-transformers after the model, which has weights of its own."""


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


def open_checkpoint(folder: Path, *, reference: str | None = None, revision: str | None = None) -> Checkpoint:
    """Open a folder. Raises CheckpointError when it is missing, damaged, or holds no safetensors weights."""
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would lose the commit in the path of a Hub snapshot
    try:
        return _open(folder, str(folder) if reference is None else reference, revision)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=error.filename or folder) from None


def _open(folder: Path, reference: str, revision: str | None) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError("not a folder" if folder.exists() else "no such folder", where=folder)
    config_text, config = read_config(folder)
    weight_map = _weight_map(folder, config)
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    headers = _read_headers(folder, names)
    tensors, metadata, left_out = _join(folder, headers)
    if weight_map is not None:
        _check_index(folder, weight_map, tensors)
    companions, others = files_beside(folder, {CONFIG, INDEX, *names})
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
        if not _is_plain(file):
            raise CheckpointError(f"weight_map names {quoted(file)}, which is not a plain path inside the folder", where=where)
        twin = spelt.setdefault(file.casefold(), file)
        if twin != file:
            raise CheckpointError(f"weight_map names {quoted(twin)} and {quoted(file)}, which are one file on many systems", where=where)
    return weight_map


def _is_plain(name: str) -> bool:
    path = PurePosixPath(name)
    odd = "\\" in name or "\0" in name or ".." in path.parts or path.is_absolute() or bool(PureWindowsPath(name).drive)
    return bool(name) and not odd and str(path) == name and name != "." and name.isprintable()


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


def left_out_reason(name: str) -> str | None:
    """Why a file of a checkpoint (relative, with forward slashes; a folder ends with one) does not go along, or None when it does."""
    *folders, base = name.split("/")
    (top, top_reason), (anywhere, reason) = LEFT_OUT_FOLDERS
    if any(folder in anywhere for folder in folders):
        return reason
    if folders and any(fnmatchcase(folders[0], pattern) for pattern in top):
        return top_reason
    if MODULE_WEIGHTS.fullmatch(name):
        return None
    for patterns, reason in LEFT_OUT_FILES:
        if any(fnmatchcase(base.lower(), pattern) for pattern in patterns):
            return reason
    return None


def files_beside(folder: Path, known: set[str]) -> tuple[list[tuple[str, int]], list[tuple[str, str]]]:
    """Files that go along with their sizes, and what does not with the reason. `known` are the files that are read otherwise."""
    companions: list[tuple[str, int]] = []
    left_out: list[tuple[str, str]] = []
    below = [""]
    while below:
        parent = below.pop()
        with os.scandir(folder / parent) as entries:
            for entry in entries:
                name = f"{parent}{entry.name}"
                if name in known:
                    continue
                is_folder = entry.is_dir()
                name += "/" if is_folder else ""
                reason = left_out_reason(name)
                if reason is not None and not (is_folder and any(file.startswith(name) for file in known)):
                    left_out.append((name, reason))
                    continue
                reason = _odd(entry, folder)
                if reason is not None:
                    left_out.append((name if name.isprintable() else quoted(name)[1:-1], reason))
                elif is_folder:
                    below.append(name)
                else:
                    companions.append((name, entry.stat().st_size))
    twins = dict(_twins(sorted(name for name, _ in companions), known))
    left_out += [(name, f"its name differs from {other} only in case: they are one file on many systems") for name, other in twins.items()]
    return [companion for companion in companions if companion[0] not in twins], left_out


def _twins(names: Iterable[str], known: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names that are spelt like one before, or like one of the files that are read, but for the case."""
    spelt = {name.casefold(): name for name in sorted(known)}
    for name in names:
        other = spelt.setdefault(name.casefold(), name)
        if other != name:
            yield name, other


def _odd(entry: os.DirEntry[str], folder: Path) -> str | None:
    """Why an entry cannot be carried, whatever it is for."""
    if not entry.name.isprintable():
        return "its name holds characters that do not print"
    if entry.is_symlink():
        reject_escape(Path(entry.path), folder)
        if entry.is_dir():
            return "link to a folder"
        if not entry.is_file():
            raise CheckpointError("link to nothing", where=entry.path, hint="download the model again, or remove the link")
    return None if entry.is_file() or entry.is_dir() else "not a regular file"


def reject_escape(path: Path, folder: Path) -> None:
    """Raise CheckpointError when a file of the folder is, through links, one elsewhere; blobs of the folder's own Hub cache excepted."""
    real = Path(os.path.realpath(folder))
    roots = [real]
    for parent in real.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            roots += [parent.parent / "blobs", parent.parent.parent / "blobs"]
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(f"link out of the folder, to {quoted(str(target))}", where=path, hint="put the file itself there")
