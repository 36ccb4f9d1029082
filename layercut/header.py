"""The header of a safetensors file: read, validated, and written. Knows nothing of models, and never reads a weight byte.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes little-endian length, that many bytes of JSON, then the
bytes of all tensors without a hole. A header is hostile input; what is read here is safe to copy ranges by.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from layercut.errors import CheckpointError

MAX_HEADER = 25_000_000
"""Bytes of JSON that are read at most: 125,000 tensors of long names. The library takes 100,000,000, which cost 300 MB of memory."""

MAX_VALUES = 1_000_000
"""Commas and brackets in JSON that is taken for honest: 125,000 tensors in one file. Python takes 100 bytes and more for each."""

MAX_ELEMENTS = 2**63
"""No tensor has as many elements, nor a dimension as long: torch counts in int64."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes that are computed with."""
ITEM_BITS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("F4",), 4),
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
        **dict.fromkeys(("I32", "U32", "F32"), 32),
        **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    }
)
"""Bits of one element, for every dtype of safetensors 0.8."""

PIECE = 1 << 20
METADATA_KEY = "__metadata__"
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


class TensorEntry(NamedTuple):
    """One tensor and the place of its bytes in the file (absolute, half-open)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a safetensors file says of itself."""

    tensors: tuple[TensorEntry, ...]
    """In the order of their bytes."""
    metadata: dict[str, str]
    data_start: int
    """Position of the first weight byte."""
    digest: str
    """sha256 of the first `data_start` bytes."""


def read_header(path: Path) -> Header:
    """Read and validate the header of a safetensors file.

    Raises CheckpointError, naming the file and the tensor, for everything that the library refuses, and for what it passes
    over: names that stand twice, unknown keys, and lengths that do not fit int64.
    """
    raw, size = _read_raw(path)
    start, digest = len(raw), hashlib.sha256(raw).hexdigest()
    try:
        text = str(memoryview(raw)[8:], "utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"header is not UTF-8 (byte {error.start + 8})", where=path) from None
    del raw  # a long header is held once, not three times
    if not text.startswith("{"):
        raise CheckpointError("header does not start with '{'", where=path, hint="is it a safetensors file?")
    entries = parse_json(text, path)
    del text
    metadata = _metadata(entries.pop(METADATA_KEY, None), path)
    tensors = [_entry(name, value, start, path) for name, value in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end, tensor.name))
    _check_cover(tensors, start, size, path)
    return Header(tuple(tensors), metadata, start, digest)


def encode_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], size: int | None = None) -> bytes:
    """The first bytes of a safetensors file whose tensors (name, dtype, shape) follow in this order without holes.

    The 8-byte length and the JSON, padded with spaces so that the weights start at a multiple of 8, or just at `size`. Equal
    arguments give equal bytes. Raises CheckpointError for a header that `read_header` would refuse, or that takes more than `size`.
    """
    entries: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        if name in entries or name == METADATA_KEY:
            raise CheckpointError(f"two tensors of one file cannot both be called {quoted(name)}")
        end = position + _nbytes(name, dtype, shape, None)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    length = len(text) if size is None else size - 8
    if length > MAX_HEADER:
        raise CheckpointError(f"a header of {length} bytes is over the {MAX_HEADER} that layercut reads", hint="write more shards")
    if length < len(text) or length % 8:
        raise CheckpointError(f"a header of {len(text) + 8} bytes cannot be padded to {length + 8}")
    text = text.ljust(length)
    return len(text).to_bytes(8, "little") + text


def quoted(name: object) -> str:
    """A name from a hostile file, fit for one line of a terminal: quoted, escaped, and cut when it is long."""
    if isinstance(name, str) and len(name) > 200:  # the middle goes anyway
        name = f"{name[:100]}{name[-100:]}"
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:80]}…{text[-20:]}"


def parse_json(text: str, where: Path, *, infinity: bool = False) -> Any:
    """Parse JSON as strictly as the safetensors library does, and refuse keys that stand twice.

    `infinity` admits Infinity and -Infinity, which Python writes and real config.json files hold (`time_step_limit` of Mamba 2).
    Raises CheckpointError with line and column where they are known.
    """

    def constant(word: str) -> float:
        if infinity and word != "NaN":
            return float(word)
        raise CheckpointError(f"{word} is not JSON", where=where)

    def number(word: str) -> float:
        value = float(word)
        if value in (float("inf"), float("-inf")):
            raise CheckpointError(f"number out of range: {word[:40]}", where=where)
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            count = Counter(key for key, _ in pairs)
            raise CheckpointError(f"key {quoted(count.most_common(1)[0][0])} stands {max(count.values())} times", where=where)
        return value

    if sum(map(text.count, ",[{")) > MAX_VALUES:
        raise CheckpointError(f"JSON holds more than {MAX_VALUES} values", where=where)
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_float=number)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise CheckpointError(f"not JSON: {error.msg}", where=f"{where}:{error.lineno}:{error.colno}") from None
    except RecursionError:
        raise CheckpointError("JSON is nested too deeply", where=where) from None
    except UnicodeEncodeError:
        raise CheckpointError("JSON holds half of a surrogate pair, which is no character", where=where) from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise CheckpointError(f"not JSON: {error}", where=where) from None
    return value


def _read_raw(path: Path) -> tuple[bytearray, int]:
    """Length and JSON of the header as they stand, and the size of the file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before open: opening a pipe waits for ever
            raise CheckpointError("not a regular file", where=path)
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise CheckpointError(f"file is {size} bytes, too short for safetensors: truncated, download it again", where=path)
            start = file.read(8)
            if start == b"version ":
                raise CheckpointError("a Git LFS pointer, not the weights", where=path, hint="fetch the file itself with git lfs pull")
            length = int.from_bytes(start, "little")
            if length > MAX_HEADER:
                message = f"header length {length} is over the {MAX_HEADER} that layercut reads"
                raise CheckpointError(message, where=path, hint="is it a safetensors file?")
            if length > size - 8:
                _truncated(size, f"more than {length + 8}", path)
            return _read_json(file, length, path), size
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=path) from None


def _read_json(file: FileIO, length: int, path: Path) -> bytearray:
    """The length and the bytes of the JSON, given up as soon as they cannot be a header."""
    raw = bytearray(length.to_bytes(8, "little"))
    values = 0
    while len(raw) < length + 8:
        part = file.read(min(PIECE, length + 8 - len(raw)))
        if not part:
            raise CheckpointError("file became shorter while it was read", where=path)
        if len(raw) == 8 and not part.startswith(b"{"):
            raise CheckpointError("header does not start with '{'", where=path, hint="is it a safetensors file?")
        if b"\0" in part:
            raise CheckpointError(f"not JSON: NUL at byte {len(raw) + part.index(0)}", where=path)
        values += sum(map(part.count, (b",", b"[", b"{")))
        if values > MAX_VALUES:
            raise CheckpointError(f"JSON holds more than {MAX_VALUES} values", where=path)
        raw += part
    return raw


def _metadata(value: object, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{METADATA_KEY} is not an object", where=path)
    for key, text in value.items():
        if not isinstance(text, str):
            raise CheckpointError(f"{METADATA_KEY} {quoted(key)} is not a string", where=path)
    return value


def _entry(name: str, value: object, data_start: int, path: Path) -> TensorEntry:
    """One entry of the header, with absolute positions."""
    if not isinstance(value, dict):
        _refuse(name, "entry is not an object", path)
    if value.keys() != ENTRY_KEYS:
        missing = sorted(ENTRY_KEYS - value.keys())
        _refuse(name, f"no {missing[0]}" if missing else f"unknown key {quoted(min(value.keys() - ENTRY_KEYS))}", path)
    shape, offsets = value["shape"], value["data_offsets"]
    if not (isinstance(shape, list) and all(type(length) is int and length >= 0 for length in shape)):
        _refuse(name, "shape is not a list of whole numbers from 0", path)
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int and offset >= 0 for offset in offsets)):
        _refuse(name, "data_offsets is not a pair of whole numbers from 0", path)
    begin, end = offsets
    if max(offsets) >= MAX_ELEMENTS:
        _refuse(name, "data_offsets overflow int64", path)
    if begin > end:
        _refuse(name, f"data_offsets begin at {begin}, after their end {end}", path)
    wanted = _nbytes(name, value["dtype"], shape, path)
    if end - begin != wanted:
        _refuse(name, f"data_offsets span {end - begin} bytes, {value['dtype']} of shape {quoted(shape)} takes {wanted}", path)
    return TensorEntry(name, value["dtype"], tuple(shape), data_start + begin, data_start + end)


def _nbytes(name: str, dtype: object, shape: Sequence[int], path: Path | None) -> int:
    """Bytes that a tensor takes."""
    bits = ITEM_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        _refuse(name, f"unknown dtype {quoted(dtype)}", path)
    elements = 1
    for length in shape:
        elements *= length
        if length >= MAX_ELEMENTS or elements >= MAX_ELEMENTS:
            _refuse(name, f"shape {quoted(list(shape))} overflows int64", path)
    whole, rest = divmod(elements * bits, 8)
    if rest:
        _refuse(name, f"{elements} elements of {dtype} do not fill whole bytes", path)
    return whole


def _check_cover(tensors: Sequence[TensorEntry], data_start: int, size: int, path: Path) -> None:
    """Every byte after the header belongs to one tensor."""
    position = data_start
    for tensor in tensors:
        if tensor.begin != position:
            problem = f"overlaps the tensor before it by {position - tensor.begin} bytes"
            if tensor.begin > position:
                problem = f"leaves a hole of {tensor.begin - position} bytes before it"
            _refuse(tensor.name, problem, path)
        position = tensor.end
    if size < position:
        _truncated(size, str(position), path)
    if size > position:
        message = f"file is {size} bytes, the header accounts for {position}: {size - position} bytes belong to no tensor"
        raise CheckpointError(message, where=path)


def _refuse(name: str, problem: str, path: Path | None) -> NoReturn:
    raise CheckpointError(f"tensor {quoted(name)}: {problem}", where=path)


def _truncated(size: int, promised: str, path: Path) -> NoReturn:
    raise CheckpointError(f"file is {size} bytes, the header promises {promised}: truncated, download it again", where=path)
