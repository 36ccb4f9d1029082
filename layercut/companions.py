"""The files beside the weights: which go along to an output, which do not and why, and that none leads out of the folder."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath

from layercut.caches import cache_folder, hub_cache
from layercut.errors import CheckpointError
from layercut.header import quoted

ADAPTER = "adapter_config.json"
MIRRORS = "hub"
"""Folder of layercut's cache in which repositories of the Hub stand, with as much of them as was needed."""

UNCUT = "weights of the uncut model, in another format or copy"
PICKLE = "pickle of a training run: runs code when it is read"
SCAFFOLD = "version control or cache, not the model"
HALF = "what a killed layercut left"

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
    ((".*.layercut-partial",), HALF),
)
"""Names, in lower case, of files that do not go along."""

MODULE_WEIGHTS = re.compile(r"\d+_\w+/model\.safetensors")
"""A module of sentence-transformers after the model, which has weights of its own."""


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
    return _without_twins(companions, left_out, known)


def listed_beside(files: Iterable[tuple[str, int]], known: Collection[str]) -> tuple[list[tuple[str, int]], list[tuple[str, str]]]:
    """The same for the files of a repository, by name and size: nothing of them need be on the disk."""
    companions: list[tuple[str, int]] = []
    left_out: list[tuple[str, str]] = []
    for name, size in files:
        if name in known:
            continue
        reason = left_out_reason(name) if is_plain(name) else "not a plain name inside a folder"
        if reason is None:
            companions.append((name, size))
        else:
            left_out.append((name if name.isprintable() else quoted(name)[1:-1], reason))
    return _without_twins(companions, left_out, known)


def _without_twins(
    companions: list[tuple[str, int]], left_out: list[tuple[str, str]], known: Collection[str]
) -> tuple[list[tuple[str, int]], list[tuple[str, str]]]:
    """Of files whose names differ only in case, one goes along."""
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
            if parent.parent.parent == Path(
                os.path.realpath(cache_folder() / MIRRORS)
            ):  # layercut's own: what is whole is a link to the Hub cache
                shared = Path(os.path.realpath(hub_cache()))
                roots += [shared / parent.parent.name, shared / "blobs"]
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(f"link out of the folder, to {quoted(str(target))}", where=path, hint="put the file itself there")


def is_plain(name: str) -> bool:
    """Whether a name that someone else wrote is a relative path inside a folder, on every system, and prints."""
    path = PurePosixPath(name)
    odd = "\\" in name or "\0" in name or ".." in path.parts or path.is_absolute() or bool(PureWindowsPath(name).drive)
    return bool(name) and not odd and str(path) == name and name != "." and name.isprintable()
