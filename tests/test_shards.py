"""shards.py: files are filled in order up to their limit, and where blocks can be shared, long runs stand in step with their source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercut.header import ITEM_BITS, encode_header
from layercut.plan import OutputFile, Part, TensorCopy, TensorMade
from layercut.shards import Entry, Grid, index_text, shard

PT = {"format": "pt"}
BLOCK = 4096
NONE = 10**15
GRID = Grid.shared(BLOCK)
LARGE = GRID.large
MIB = 1 << 20


def copy(name: str, begin: int, size: int, *, file: str = "f", model: str = "m", dtype: str = "U8") -> TensorCopy:
    count = size * 8 // ITEM_BITS[dtype]
    return TensorCopy(name=name, dtype=dtype, shape=(count,), model=model, file=file, begin=begin, end=begin + size)


def made(name: str, size: int) -> TensorMade:
    part = Part(model="m", file="f", begin=8, end=8 + size, dtype="F32", weight=1.0)
    return TensorMade(name=name, dtype="F32", shape=(size // 4,), parts=(part,), factors=(2.0,))


def spread(entries: Sequence[Entry], limit: int = NONE, grids: dict[str, Grid] | None = None) -> list[OutputFile]:
    return list(shard(entries, limit, PT, {"m": GRID} if grids is None else grids))


def names(files: Sequence[OutputFile]) -> list[str]:
    return ["".join(tensor.name for tensor in file.tensors) for file in files]


def start(file: OutputFile) -> int:
    """Position of the first weight byte."""
    return len(encode_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in file.tensors], file.metadata, file.header_size))


def in_step(file: OutputFile, block: int = BLOCK) -> str:
    """Names of the tensors that stand at the same place in their block as in the source."""
    position, found = start(file), ""
    for tensor in file.tensors:
        if isinstance(tensor, TensorCopy) and (position - tensor.begin) % block == 0:
            found += tensor.name
        position += tensor.nbytes
    return found


# Without sharing


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(NONE, ["abcd"]), (30, ["abc", "d"]), (29, ["ab", "cd"]), (20, ["ab", "cd"]), (10, ["a", "b", "c", "d"]), (1, [*"abcd"])],
)
def test_files_are_filled_up_to_the_limit(limit: int, expected: list[str]) -> None:
    files = spread([copy(name, 8, 10) for name in "abcd"], limit, {})
    assert names(files) == expected
    assert {file.header_size for file in files} == {None}
    total = len(files)
    assert [file.name for file in files] == (
        ["model.safetensors"] if total == 1 else [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    )


def test_what_no_source_shares_is_laid_out_as_ever() -> None:
    entries = [copy("a", 16, LARGE), copy("b", 24, LARGE, model="elsewhere"), copy("c", 16, LARGE)]
    assert spread(entries, grids={"another": GRID}) == spread(entries, grids={})
    assert names(spread(entries, grids={})) == ["abc"]


def test_the_index_lists_every_tensor() -> None:
    files = spread([copy(name, 8, 10) for name in "ba"], 10, {})
    text = index_text(files)
    assert text is not None
    assert json.loads(text) == {
        "metadata": {"total_size": 20},
        "weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
    }
    assert index_text(spread([copy("a", 8, 10)])) is None


# With sharing


@pytest.mark.parametrize("begin", [8, 4096, 4088, 123456, 5 * MIB + 16])
def test_the_header_meets_the_source(begin: int) -> None:
    [file] = spread([copy("a", begin, LARGE)])
    assert file.header_size is not None
    assert (file.header_size - begin) % BLOCK == 0
    plain = len(encode_header([("a", "U8", (LARGE,))], PT))
    assert plain <= file.header_size < plain + BLOCK


def test_blocks_of_other_sizes() -> None:
    for block in (512, 16384, 65536):
        [file] = spread([copy("a", 1000, LARGE + block)], grids={"m": Grid.shared(block)})
        assert file.header_size is not None
        assert (file.header_size - 1000) % block == 0


def test_small_tensors_before_a_run_go_along() -> None:
    [file] = spread([copy("n", 8, 24), copy("a", 800, LARGE)])
    assert in_step(file) == "a"


def test_a_run_of_many_small_tensors_is_large() -> None:
    [file] = spread([copy(chr(97 + number), 16 + number * MIB, MIB) for number in range(9)])
    assert in_step(file) == "abcdefghi"


def test_runs_in_step_stay_in_one_file() -> None:
    [file] = spread([copy("a", 16, LARGE), copy("b", 16 + 5 * LARGE, LARGE), copy("c", 16, LARGE)])
    assert in_step(file) == "abc"


def test_a_run_out_of_step_begins_a_file() -> None:
    files = spread([copy("a", 16, LARGE), copy("b", 24, LARGE), copy("c", 24 + LARGE, 10), copy("d", 16, 2 * LARGE)])
    assert names(files) == ["a", "bc", "d"]
    assert [in_step(file) for file in files] == ["a", "bc", "d"]


def test_a_short_run_out_of_step_is_copied_where_it_stands() -> None:
    [file] = spread([copy("a", 16, LARGE), copy("b", 24, LARGE - BLOCK), copy("c", 16, LARGE)])
    assert in_step(file) == "ac"
    files = spread([copy("a", 16, LARGE), copy("b", 24, LARGE - 8), copy("c", 16, LARGE)])
    assert names(files) == ["ab", "c"]  # c would come 8 bytes too early
    assert [in_step(file) for file in files] == ["a", "c"]


def test_a_layer_that_stands_twice() -> None:
    """Layers of an odd size: the second copy cannot be in step with the first in one file."""
    size = LARGE + 1536
    files = spread([copy("a", 1024, size), copy("b", 1024 + size, size), copy("c", 1024, size), copy("d", 1024 + size, size)])
    assert names(files) == ["ab", "cd"]
    assert [in_step(file) for file in files] == ["ab", "cd"]


def test_another_source_file_is_another_run() -> None:
    files = spread([copy("a", 16, LARGE), copy("b", 16 + LARGE, LARGE, file="g")])
    assert names(files) == ["ab"]  # in step by chance
    files = spread([copy("a", 16, LARGE), copy("b", 24, LARGE, file="g"), copy("c", 24 + LARGE, 8, file="g")])
    assert names(files) == ["a", "bc"]


def test_the_limit_holds_and_every_file_of_a_run_is_in_step() -> None:
    size = 3 * MIB + 8
    entries = [copy(chr(97 + number), 16 + number * size, size) for number in range(10)]
    files = spread(entries, 4 * size)
    assert names(files) == ["abcd", "efgh", "ij"]
    assert [in_step(file) for file in files] == ["abcd", "efgh", ""]  # the last is too short to be worth it


def test_a_source_that_no_header_can_meet() -> None:
    """Files of early safetensors had no padding: their weights begin anywhere."""
    entries = [copy("a", 13, LARGE), copy("b", 13 + LARGE, LARGE)]
    assert spread(entries) == spread(entries, grids={})
    files = spread([copy("a", 16, LARGE), copy("b", 13, 3), copy("c", 16, LARGE)])
    assert names(files) == ["ab", "c"]


def test_an_odd_start_that_the_file_happens_to_meet() -> None:
    [file] = spread([copy("a", 16, LARGE + 5), copy("b", 16 + LARGE + 5 + 2 * BLOCK, LARGE)])
    assert in_step(file) == "ab"


def test_computed_tensors_take_part_in_nothing() -> None:
    files = spread([made("z", 2 * LARGE), copy("a", 16, LARGE), made("y", 2 * LARGE), copy("b", 16 + LARGE, LARGE)])
    assert names(files) == ["zayb"]
    assert in_step(files[0]) == "ab"
    assert spread([made("z", LARGE)])[0].header_size is None


def test_where_the_widest_types_come_first_the_most_bytes_decide() -> None:
    [file] = spread([copy("a", 16, 3), copy("b", 24, 4, dtype="F32"), copy("c", 1007, LARGE)])
    assert [tensor.name for tensor in file.tensors] == ["b", "a", "c"]
    assert in_step(file) == "c"


WORDS = st.sampled_from(["U8", "BF16", "F32", "F64"])


@st.composite
def stacks(draw: st.DrawFn) -> list[TensorCopy]:
    """Tensors of two files and two models, taken in runs from anywhere, as layers are."""
    entries: list[TensorCopy] = []
    for _ in range(draw(st.integers(1, 6))):
        position = draw(st.integers(1, 5000)) * draw(st.sampled_from([1, 8, 8, 8]))
        model, file = draw(st.sampled_from(["m", "m", "n"])), draw(st.sampled_from("fg"))
        for _ in range(draw(st.integers(1, 5))):
            dtype = draw(WORDS)
            size = draw(st.integers(0, 400)) * draw(st.sampled_from([1, 8, 512])) * (ITEM_BITS[dtype] // 8)
            entries.append(copy(f"t{len(entries)};", position, size, model=model, file=file, dtype=dtype))
            position += size
    return entries


def shareable(file: OutputFile, block: int) -> dict[int, int]:
    """Bytes of runs, but a block of each, by the place in a block where the weights would have to begin."""
    runs: list[list[Any]] = []  # model, file, first byte, last byte, place in the block
    position = 0
    for tensor in file.tensors:
        assert isinstance(tensor, TensorCopy)
        if runs and (runs[-1][0], runs[-1][1], runs[-1][3]) == (tensor.model, tensor.file, tensor.begin):
            runs[-1][3] = tensor.end
        else:
            runs.append([tensor.model, tensor.file, tensor.begin, tensor.end, (tensor.begin - position) % block])
        position += tensor.nbytes
    found: dict[int, int] = {}
    for model, _, begin, end, place in runs:
        if model == "m" and place % 8 == 0:
            found[place] = found.get(place, 0) + max(0, end - begin - block)
    return found


@settings(max_examples=300, deadline=None)
@given(stacks(), st.sampled_from([NONE, 100_000, 1_000_000]), st.sampled_from([512, 4096]))
def test_sharing_changes_bounds_and_padding_only(entries: list[TensorCopy], limit: int, block: int) -> None:
    files = spread(entries, limit, {"m": Grid(block, 4 * block)})
    plain = spread(entries, limit, {})
    kept = [[tensor for file in found for tensor in file.tensors] for found in (files, plain)]
    assert sorted(kept[0], key=lambda tensor: tensor.name) == sorted(kept[1], key=lambda tensor: tensor.name)
    assert len(files) <= len(plain) + sum(tensor.nbytes for tensor in kept[0]) // (4 * block)
    for file in files:
        assert len(file.tensors) == 1 or sum(tensor.nbytes for tensor in file.tensors) <= limit
        assert file.header_size is None or file.header_size % 8 == 0
        position = start(file)
        for tensor in file.tensors:
            assert position % (ITEM_BITS[tensor.dtype] // 8) == 0
            position += tensor.nbytes
        found = shareable(file, block)
        best = max(found.values(), default=0)
        assert (file.header_size is None) == (best < 3 * block)
        if file.header_size is not None:
            assert found[file.header_size % block] == best


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), min_size=1, max_size=8))
def test_every_layer_of_any_stack_is_in_step(slices: list[tuple[int, int]]) -> None:
    """Layers of 33,000 bytes, taken in any order from one file: every one of them is shared, whatever stands before it."""
    size, entries = 33_000, []
    for first, count in slices:
        for layer in range(first, first + count):
            entries.append(copy(f"{len(entries)};", 1008 + layer * size, size))
    files = spread(entries, grids={"m": Grid(BLOCK, size)})
    assert [name for file in files for name in in_step(file).split(";")[:-1]] == [str(number) for number in range(len(entries))]
    assert len(files) <= len(slices)


def test_the_same_tensors_give_the_same_files() -> None:
    entries: list[Any] = [copy("a", 16, LARGE), copy("b", 24, LARGE), made("c", 8), copy("d", 32, LARGE)]
    assert spread(entries) == spread(list(entries))
