from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import failure
from hypothesis import given, settings
from hypothesis import strategies as st

from layercut.errors import CheckpointError
from layercut.header import ITEM_BITS, MAX_HEADER, TensorEntry, encode_header, parse_json, read_header

U8 = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


def write(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header: an object that becomes JSON, or bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def refusal(path: Path) -> str:
    text = failure(CheckpointError, lambda: read_header(path))
    assert text.startswith(str(path))
    return text.removeprefix(str(path)).removeprefix(": ")


def library_accepts(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def we_accept(path: Path) -> bool:
    try:
        read_header(path)
    except CheckpointError:
        return False
    return True


def test_header_of_a_file_that_the_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"b": np.zeros((2, 3), np.float32), "a": np.zeros((), np.int64), "empty": np.zeros((0, 4), np.float16)}
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    start = header.data_start
    raw = path.read_bytes()
    assert header.metadata == {"format": "pt"}
    assert header.digest == hashlib.sha256(raw[:start]).hexdigest()
    assert start == 8 + int.from_bytes(raw[:8], "little")
    assert header.tensors == (
        TensorEntry("a", "I64", (), start, start + 8),
        TensorEntry("b", "F32", (2, 3), start + 8, start + 32),
        TensorEntry("empty", "F16", (0, 4), start + 32, start + 32),
    )


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A sparse file of 4 TB opens at once."""
    path = tmp_path / "x.safetensors"
    head = encode_header([("w", "F32", (1 << 40,))], {})
    path.write_bytes(head)
    os.truncate(path, len(head) + (1 << 42))
    assert read_header(path).tensors == (TensorEntry("w", "F32", (1 << 40,), len(head), len(head) + (1 << 42)),)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ([], b"", "header does not start with '{'; is it a safetensors file?"),
        (b" {}", b"", "header does not start with '{'; is it a safetensors file?"),
        (b"", b"", "header does not start with '{'; is it a safetensors file?"),
        (b'{"\xff":1}', b"", "header is not UTF-8 (byte 10)"),
        (b'{"a":', b"", "1:6: not JSON: Expecting value"),
        (b'{"a\x01":1}', b"", "1:4: not JSON: Invalid control character at"),
        (b'{"\\ud800":1}', b"", "JSON holds half of a surrogate pair, which is no character"),
        (b'{"a":NaN}', b"", "NaN is not JSON"),
        (b'{"a":-Infinity}', b"", "-Infinity is not JSON"),
        (b'{"a":1e999}', b"", "number out of range: 1e999"),
        (b'{"a":{},"a":{}}', b"", "key 'a' stands 2 times"),
        (b'{"a":{"dtype":"U8","dtype":"U8"}}', b"", "key 'dtype' stands 2 times"),
        (b'{"__metadata__":{"k":"1","k":"2"}}', b"", "key 'k' stands 2 times"),
        ({"__metadata__": []}, b"", "__metadata__ is not an object"),
        ({"__metadata__": {"n": 1}}, b"", "__metadata__ 'n' is not a string"),
        ({"a": ["U8", [2], [0, 2]]}, b"ab", "tensor 'a': entry is not an object"),
        ({"a": {"dtype": "U8", "shape": [2]}}, b"ab", "tensor 'a': no data_offsets"),
        ({"a": U8 | {"strides": [1]}}, b"ab", "tensor 'a': unknown key 'strides'"),
        ({"a": U8 | {"dtype": "U7"}}, b"ab", "tensor 'a': unknown dtype 'U7'"),
        ({"a": U8 | {"dtype": 8}}, b"ab", "tensor 'a': unknown dtype 8"),
        ({"a": U8 | {"shape": 2}}, b"ab", "tensor 'a': shape is not a list of whole numbers from 0"),
        ({"a": U8 | {"shape": [-2]}}, b"ab", "tensor 'a': shape is not a list of whole numbers from 0"),
        ({"a": U8 | {"shape": [True, 2]}}, b"ab", "tensor 'a': shape is not a list of whole numbers from 0"),
        ({"a": U8 | {"shape": [2.0]}}, b"ab", "tensor 'a': shape is not a list of whole numbers from 0"),
        ({"a": U8 | {"shape": [2**62, 2]}}, b"", "tensor 'a': shape [4611686018427387904, 2] overflows int64"),
        ({"a": U8 | {"shape": [2**62, 2, 0]}}, b"", "tensor 'a': shape [4611686018427387904, 2, 0] overflows int64"),
        ({"a": U8 | {"data_offsets": [0]}}, b"ab", "tensor 'a': data_offsets is not a pair of whole numbers from 0"),
        ({"a": U8 | {"data_offsets": [False, 2]}}, b"ab", "tensor 'a': data_offsets is not a pair of whole numbers from 0"),
        ({"a": U8 | {"data_offsets": [2, 0]}}, b"ab", "tensor 'a': data_offsets begin at 2, after their end 0"),
        ({"a": U8 | {"data_offsets": [0, 3]}}, b"abc", "tensor 'a': data_offsets span 3 bytes, U8 of shape [2] takes 2"),
        ({"a": U8 | {"dtype": "F4", "shape": [3]}}, b"ab", "tensor 'a': 3 elements of F4 do not fill whole bytes"),
        ({"a": U8, "b": U8 | {"data_offsets": [1, 3]}}, b"abc", "tensor 'b': overlaps the tensor before it by 1 bytes"),
        ({"a": U8, "b": U8}, b"ab", "tensor 'b': overlaps the tensor before it by 2 bytes"),
        ({"a": U8, "b": U8 | {"data_offsets": [3, 5]}}, b"abcde", "tensor 'b': leaves a hole of 1 bytes before it"),
    ],
)
def test_refused(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = write(tmp_path, header, data)
    assert refusal(path).removeprefix(":") == message


def test_a_short_file_is_truncated(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": U8}, b"a")
    size = path.stat().st_size
    assert refusal(path) == f"file is {size} bytes, the header promises {size + 1}: truncated, download it again"


def test_a_file_cut_inside_its_header_is_truncated(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, b"{}", length=50)) == "file is 10 bytes, the header promises more than 58: truncated, download it again"


def test_a_file_without_a_length_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"1234567")
    assert refusal(path) == "file is 7 bytes, too short for safetensors: truncated, download it again"


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 337000\n")
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value) == f"{path}: a Git LFS pointer, not the weights; fetch the file itself with git lfs pull"


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": U8}, b"abcd")
    size = path.stat().st_size
    assert refusal(path) == f"file is {size} bytes, the header accounts for {size - 2}: 2 bytes belong to no tensor"


def test_a_length_over_the_limit_reads_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, b"{}", length=MAX_HEADER + 1)
    assert refusal(path) == "header length 25000001 is over the 25000000 that layercut reads; is it a safetensors file?"


@pytest.mark.parametrize("bomb", [b"[" * 200_000, b'{"a":' * 200_000])
def test_nesting_bombs(tmp_path: Path, bomb: bytes) -> None:
    assert refusal(write(tmp_path, b'{"a":' + bomb)) == "JSON is nested too deeply"


def test_a_number_of_ten_thousand_digits(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,2]}}', b"ab")
    assert refusal(path).startswith("not JSON: Exceeds the limit")


def test_many_keys_that_stand_twice_are_found_in_linear_time() -> None:
    keys = [f'"{number}":0' for number in range(200_000)]
    with pytest.raises(CheckpointError, match=r"^x: key '199999' stands 2 times$"):
        parse_json("{" + ",".join([*keys, keys[-1]]) + "}", Path("x"))


def test_names_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, {"\x1b[31m\n" + "n" * 10_000: 1}))
    assert text.startswith(r"tensor '\x1b[31m\n") and len(text) < 200


def test_not_a_regular_file(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "not a regular file"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert refusal(pipe) == "not a regular file"
    assert refusal(tmp_path / "none") == "cannot be read: No such file or directory"


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, {"a": U8}, b"ab")

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    assert refusal(path) == "cannot be read: Permission denied"


@pytest.mark.parametrize("dtype", sorted(ITEM_BITS))
def test_the_library_reads_every_dtype_with_as_many_bits(tmp_path: Path, dtype: str) -> None:
    data = encode_header([("w", dtype, (3, 8))], {}) + bytes(3 * ITEM_BITS[dtype])
    ((name, view),) = safetensors.deserialize(data)
    assert (name, view["dtype"], view["shape"], len(view["data"])) == ("w", dtype, [3, 8], 3 * ITEM_BITS[dtype])
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert read_header(path).tensors[0].shape == (3, 8)


def test_encoded_bytes() -> None:
    text = b'{"__metadata__":{"a":"1","format":"pt"},"w\xc3\xa9":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
    text += b'"s":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}'
    expected = struct.pack("<Q", 160) + text + b" " * (160 - len(text))
    assert encode_header([("wé", "BF16", (2, 3)), ("s", "F32", ())], {"format": "pt", "a": "1"}) == expected


def test_empty_header() -> None:
    assert encode_header([], {}) == struct.pack("<Q", 8) + b"{}      "


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", "U8", (1,)), ("a", "U8", (1,))], "two tensors of one file cannot both be called 'a'"),
        ([("__metadata__", "U8", (1,))], "two tensors of one file cannot both be called '__metadata__'"),
        ([("a", "U9", (1,))], "tensor 'a': unknown dtype 'U9'"),
        ([("a", "F6_E2M3", (2,))], "tensor 'a': 2 elements of F6_E2M3 do not fill whole bytes"),
        ([("a", "U8", (2**63,))], "tensor 'a': shape [9223372036854775808] overflows int64"),
    ],
)
def test_encode_refuses_what_read_would(tensors: list[tuple[str, str, tuple[int, ...]]], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        encode_header(tensors, {})
    assert str(caught.value) == message


def test_the_library_loads_values_under_an_encoded_header(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    path = tmp_path / "x.safetensors"
    values = np.arange(6, dtype=np.float32)
    path.write_bytes(encode_header([("z", "F32", (2, 3)), ("a", "I64", (1,))], {"format": "pt"}) + values.tobytes() + bytes(8))
    assert np.array_equal(safetensors.numpy.load_file(path)["z"], values.reshape(2, 3))
    assert torch.equal(load_file(path)["z"], torch.arange(6.0).reshape(2, 3))


names = st.text(st.characters(exclude_categories=("Cs",)), max_size=8).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(lambda shape: (*shape, 8))  # a multiple of 8 fills bytes with any dtype
layouts = st.dictionaries(names, st.tuples(st.sampled_from(sorted(ITEM_BITS)), shapes), max_size=5)


@given(layouts, st.dictionaries(names, st.text(st.characters(exclude_categories=("Cs",)), max_size=5), max_size=2))
@settings(max_examples=80, deadline=None)
def test_headers_go_there_and_back(tmp_path_factory: pytest.TempPathFactory, layout: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors = [(name, dtype, shape) for name, (dtype, shape) in layout.items()]
    head = encode_header(tensors, metadata)
    sizes = [int(np.prod(shape)) * ITEM_BITS[dtype] // 8 for _, dtype, shape in tensors]
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    path.write_bytes(head + bytes(sum(sizes)))
    header = read_header(path)
    assert header.metadata == metadata and header.data_start == len(head) and len(head) % 8 == 0
    assert {(name, dtype, shape) for name, dtype, shape, _, _ in header.tensors} == set(tensors)
    assert sum(tensor.end - tensor.begin for tensor in header.tensors) == sum(sizes)
    loaded = dict(safetensors.deserialize(path.read_bytes()))
    assert {name: (view["dtype"], tuple(view["shape"])) for name, view in loaded.items()} == layout


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid file of up to three tensors with one to three things about it changed."""
    entries: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(st.sampled_from("abc"), unique=True)):
        dtype, shape = draw(st.sampled_from(["U8", "F16", "F4", "F6_E3M2", "C64"])), draw(st.lists(st.integers(0, 4), max_size=2))
        end = position + int(np.prod(shape)) * ITEM_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    data = bytes(position)
    for _ in range(draw(st.integers(0, 2))):
        if entries:
            entry = entries[draw(st.sampled_from(sorted(entries)))]
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            numbers = st.one_of(st.integers(-1, 6), st.sampled_from([2**31, 2**62, 2**64, 1.0, True, None, "1"]))
            words = st.sampled_from(["U8", "F16", "F4", "u8", "", None, 1])
            entry[key] = draw(words if key == "dtype" else st.one_of(st.lists(numbers, max_size=3), words))
    text = json.dumps(entries).encode() + draw(st.sampled_from([b"", b" ", b"\n", b"\0", b"}", b",", b"x"]))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + draw(st.sampled_from([b"", b"{", b"9", b'"', b"\xff", b"e", b"-"])) + text[at + 1 :]
    data += draw(st.sampled_from([b"", b"", b"", b"x"]))
    length = len(text) + draw(st.sampled_from([0, 0, 0, -1, 1, 2**40]))
    return struct.pack("<Q", length) + text + data


def stricter_on_purpose(data: bytes) -> bool:
    """The differences that the mutations above can reach; each is pinned by hand in the test after this one."""
    text = data[8 : 8 + int.from_bytes(data[:8], "little")]
    if not text.startswith(b"{"):
        return True
    entries: list[dict[str, Any]] = []
    header = json.loads(text, object_pairs_hook=lambda pairs: entries.append(dict(pairs)) or pairs)
    twice = len(dict(header)) != len(header)
    keys = ["data_offsets", "dtype", "shape"]
    strange = any(not isinstance(value, list) or sorted(key for key, _ in value) != keys for _, value in header)
    long = any(isinstance(entry.get("shape"), list) and any(length >= 2**63 for length in entry["shape"]) for entry in entries)
    return twice or strange or long


@given(damaged())
@settings(max_examples=600, deadline=None)
def test_nothing_is_accepted_that_the_library_refuses(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(data)
    ours, theirs = we_accept(path), library_accepts(data)
    if ours != theirs and b"-0" not in data:
        assert theirs and stricter_on_purpose(data), data


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_noise_never_escapes_as_another_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    assert we_accept(path) is False or library_accepts(path.read_bytes())


@pytest.mark.parametrize(
    ("text", "data"),
    [
        # One of the two would be lost in a copy, and readers differ in which.
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"ab"),
        (b'{"__metadata__":{"k":"1","k":"2"}}', b""),
        # A key of a later format might change the meaning of the bytes.
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"strides":[1]}}', b"ab"),
        # Accidents of the library's JSON reader; the format has objects and strings here, and no white space before.
        (b'{"a":["U8",[2],[0,2]]}', b"ab"),
        (b'{"a":{"dtype":{"U8":null},"shape":[2],"data_offsets":[0,2]}}', b"ab"),
        (b" {}", b""),
        # Neither torch nor NumPy can hold such a dimension.
        (b'{"a":{"dtype":"U8","shape":[0,9223372036854775808],"data_offsets":[0,0]}}', b""),
        # No checkpoint has a header as long, and reading it would cost 300 MB.
        pytest.param(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}' + b" " * MAX_HEADER, b"ab", id="a long header"),
    ],
)
def test_stricter_than_the_library(tmp_path: Path, text: bytes, data: bytes) -> None:
    path = write(tmp_path, text, data)
    assert library_accepts(path.read_bytes())
    assert not we_accept(path)


def test_laxer_than_the_library_in_one_harmless_thing(tmp_path: Path) -> None:
    """Python reads -0 as the whole number 0; Rust reads it as a float."""
    path = write(tmp_path, b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[-0,2]}}', b"ab")
    assert not library_accepts(path.read_bytes())
    assert we_accept(path)


def test_null_metadata_is_none(tmp_path: Path) -> None:
    path = write(tmp_path, {"__metadata__": None, "a": U8}, b"ab")
    assert library_accepts(path.read_bytes())
    assert read_header(path).metadata == {}


@pytest.mark.parametrize("size", [72, 80, 4096, 4104, 65536])
def test_a_header_of_a_given_size(tmp_path, size):
    plain = encode_header([("a", "U8", (3,))], {})
    assert len(plain) <= 72
    data = encode_header([("a", "U8", (3,))], {}, size)
    assert len(data) == size
    assert int.from_bytes(data[:8], "little") == size - 8
    assert data[8:].rstrip(b" ") == plain[8:].rstrip(b" ")
    (tmp_path / "x").write_bytes(data + b"abc")
    header = read_header(tmp_path / "x")
    assert (header.data_start, header.tensors[0].begin) == (size, size)


def test_a_header_takes_just_its_size():
    plain = encode_header([("a", "U8", (3,))], {"format": "pt"})
    assert encode_header([("a", "U8", (3,))], {"format": "pt"}, len(plain)) == plain
    for size in (len(plain) - 8, len(plain) + 4, 0, -8):
        with pytest.raises(CheckpointError) as caught:
            encode_header([("a", "U8", (3,))], {"format": "pt"}, size)
        assert str(caught.value) == f"a header of {len(plain)} bytes cannot be padded to {size}"
    with pytest.raises(CheckpointError, match=r"^a header of 25000008 bytes is over the 25000000 that layercut reads"):
        encode_header([("a", "U8", (3,))], {}, 25_000_016)
