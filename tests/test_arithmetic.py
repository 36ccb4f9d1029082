"""arithmetic.py: computed tensors are what torch computes step by step, whatever the pieces, threads and NaNs."""

from __future__ import annotations

import math
import struct
from contextlib import ExitStack

import pytest
import torch
from conftest import failure
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from layercut import arithmetic
from layercut.arithmetic import DTYPES, made_pieces, write_made
from layercut.copying import BUFFER, SourceFiles
from layercut.errors import CheckpointError, OutputError
from layercut.fits import span_of
from layercut.folding import folded
from layercut.plan import Band, Grown, Map, Part, TensorMade

SHAPE = (37, 53)
START = 24  # bytes of the file before the first tensor


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def torch_dtype(name):
    return getattr(torch, DTYPES[name])


def random_tensor(dtype, seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(torch_dtype(dtype))


def run(tmp_path, parts, *, dtype, factors=(), compute=None, shape=SHAPE, offset=7, amend=None):
    """Bytes that are written for [(tensor, dtype, weight)]; every part stands in one file, after the other."""
    path, data, records = tmp_path / "source", b"#" * START, []
    for tensor, name, weight in parts:
        piece = tensor if isinstance(tensor, bytes) else raw(tensor)
        records.append(Part(model="m", file="source", begin=len(data), end=len(data) + len(piece), dtype=name, weight=weight))
        data += piece
    path.write_bytes(data + b"#")
    made = TensorMade(name="model.w", dtype=dtype, shape=shape, parts=tuple(records), factors=factors, compute=compute, amend=amend)
    moves = []
    with ExitStack() as stack, (tmp_path / "target").open("wb") as target:
        write_made(made, {"m": tmp_path}, SourceFiles(stack), target.fileno(), offset, moves.append)
    written = (tmp_path / "target").read_bytes()
    assert len(written) == (offset + made.nbytes if made.nbytes else 0)
    assert written[:offset] == bytes(min(offset, len(written)))
    assert sum(moves) == made.nbytes
    return written[offset:]


def overflow(tmp_path, parts, **how):
    return failure(OutputError, lambda: run(tmp_path, parts, **how))


# By hand, without torch


def test_numbers_by_hand(tmp_path):
    one, two = struct.pack("<4f", 1.0, -2.0, 0.5, 0.0), struct.pack("<4f", 3.0, 2.0, -0.25, 8.0)
    scaled = run(tmp_path, [(one, "F32", 1)], dtype="F32", factors=(0.5,), shape=(4,))
    assert struct.unpack("<4f", scaled) == (0.5, -1.0, 0.25, 0.0)
    average = run(tmp_path, [(one, "F32", 0.25), (two, "F32", 0.75)], dtype="F32", shape=(2, 2))
    assert struct.unpack("<4f", average) == (2.5, 1.0, -0.0625, 6.0)
    halves = run(tmp_path, [(one, "F32", 1)], dtype="F16", shape=(4,))
    assert struct.unpack("<4e", halves) == (1.0, -2.0, 0.5, 0.0)


def test_bfloat16_by_hand(tmp_path):
    # bfloat16 is the upper half of float32: 1.0 is 3f80. 3 * 0.1 rounds to 3e9a, 1 + 2**-8 is a tie and goes to the even 3f80.
    values = struct.pack("<2H", 0x4040, 0x3F80)
    assert run(tmp_path, [(values, "BF16", 1)], dtype="BF16", factors=(0.1,), shape=(2,)) == struct.pack("<2H", 0x3E9A, 0x3DCD)
    wide = struct.pack("<3f", 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20)
    assert run(tmp_path, [(wide, "F32", 1)], dtype="BF16", shape=(3,)) == struct.pack("<3H", 0x3F80, 0x3F82, 0x3F81)


def test_signs_of_zero(tmp_path):
    zeros = struct.pack("<2f", 0.0, -0.0)
    assert run(tmp_path, [(zeros, "F32", 1)], dtype="F32", factors=(-1.0,), shape=(2,)) == struct.pack("<2f", -0.0, 0.0)
    assert run(tmp_path, [(zeros, "F32", 1)], dtype="F16", shape=(2,)) == struct.pack("<2e", 0.0, -0.0)
    # a weight that is not 1 multiplies, and -0.0 + 0.0 is 0.0
    assert run(tmp_path, [(zeros, "F32", -2)], dtype="F32", shape=(2,)) == struct.pack("<2f", -0.0, 0.0)
    assert run(tmp_path, [(zeros, "F32", 1), (zeros, "F32", -1)], dtype="F32", shape=(2,)) == struct.pack("<2f", 0.0, 0.0)


# Against torch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [(0.5,), (math.sqrt(0.5),), (0.1, 3.0), (-1.7, 0.3, 1 / 3)], ids=str)
def test_scale_rounds_every_product(tmp_path, dtype, factors):
    tensor = random_tensor(dtype, 1)
    expected = tensor
    for factor in factors:
        expected = expected * factor
    assert expected.dtype == tensor.dtype
    assert run(tmp_path, [(tensor, dtype, 1)], dtype=dtype, factors=factors) == raw(expected)


def test_factors_are_not_joined(tmp_path):
    tensor = random_tensor("BF16", 1)
    assert run(tmp_path, [(tensor, "BF16", 1)], dtype="BF16", factors=(0.1, 3.3)) != raw(tensor * (0.1 * 3.3))


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cast(tmp_path, dtype, to):
    tensor = random_tensor(dtype, 2)
    assert run(tmp_path, [(tensor, dtype, 1)], dtype=to) == raw(tensor.to(torch_dtype(to)))


@pytest.mark.parametrize(
    ("dtype", "compute", "to"), [("F32", "BF16", "BF16"), ("BF16", "F32", "BF16"), ("F16", "F32", "F16"), ("F32", "F16", "F32")]
)
def test_cast_scale_and_cast_as_mergekit_does(tmp_path, dtype, compute, to):
    """mergekit casts to `dtype` when it loads, multiplies by a Python float there, and casts to `out_dtype` when it writes."""
    tensor = random_tensor(dtype, 3)
    loaded = tensor.to(torch_dtype(compute))
    expected = (loaded * math.sqrt(0.5) * 0.3).to(torch_dtype(to))
    assert run(tmp_path, [(tensor, dtype, 1)], dtype=to, compute=compute, factors=(math.sqrt(0.5), 0.3)) == raw(expected)
    assert raw(expected) != raw((tensor * math.sqrt(0.5) * 0.3).to(torch_dtype(to))), "the dtype of the computation matters"


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7), (1, -1), (0.2, 0.3, 0.5), (1 / 3, 1 / 3, 1 / 3), (1, 1, 1)], ids=str)
def test_average_is_taken_in_float32_in_order(tmp_path, dtype, weights):
    tensors = [random_tensor(dtype, seed) for seed in range(len(weights))]
    total = tensors[0].float() * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + tensor.float() * weight
    parts = [(tensor, dtype, weight) for tensor, weight in zip(tensors, weights, strict=True)]
    assert run(tmp_path, parts, dtype=dtype) == raw(total.to(torch_dtype(dtype)))


def test_average_then_computation_dtype_then_factors(tmp_path):
    one, two = random_tensor("F32", 1), random_tensor("BF16", 2)
    average = (one * 0.3 + two.float() * 0.7).to(torch.float16)
    expected = ((average * 0.1) * 7.0).float()
    parts = [(one, "F32", 0.3), (two, "BF16", 0.7)]
    assert run(tmp_path, parts, dtype="F32", compute="F16", factors=(0.1, 7.0)) == raw(expected)


def test_average_with_float64_is_taken_in_float64(tmp_path):
    one, two = random_tensor("F32", 1), random_tensor("F64", 2)
    expected = (one.double() * 0.3 + two * 0.7).float()
    assert run(tmp_path, [(one, "F32", 0.3), (two, "F64", 0.7)], dtype="F32") == raw(expected)
    assert raw(expected) != raw(one * 0.3 + two.float() * 0.7)


def test_one_part_with_a_weight_is_an_average(tmp_path):
    tensor = random_tensor("BF16", 4)
    expected = ((tensor.float() * 0.3).to(torch.bfloat16) * 0.7).to(torch.float16)
    assert run(tmp_path, [(tensor, "BF16", 0.3)], dtype="F16", factors=(0.7,)) == raw(expected)


names = st.sampled_from(list(DTYPES))
numbers = st.floats(-4, 4, allow_subnormal=False).filter(lambda value: value != 0)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(names, numbers), min_size=1, max_size=4), names, st.none() | names, st.lists(numbers, max_size=3), st.integers(1, 50)
)
def test_pieces_do_not_show(tmp_path, parts, dtype, compute, factors, piece):
    """Whole or in pieces, and as each element comes out when it is computed alone."""
    shape = (5, 9)
    data = [(random_tensor(name, seed, shape), name, weight) for seed, (name, weight) in enumerate(parts)]
    how = {"dtype": dtype, "compute": compute, "factors": tuple(factors)}
    whole = run(tmp_path, data, shape=shape, **how)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(arithmetic, "PIECE", piece)
        assert run(tmp_path, data, shape=shape, **how) == whole
    width = len(whole) // 45
    single = [(tensor.ravel()[31:32], name, weight) for tensor, name, weight in data]
    assert run(tmp_path, single, shape=(1,), **how) == whole[31 * width : 32 * width]


def test_threads_do_not_show(tmp_path):
    shape, before, written = (1_000_003,), torch.get_num_threads(), []
    values = random_tensor("F32", 5, shape)
    values[::1001] = math.nan
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.get_num_threads() == threads
            written.append(run(tmp_path, [(values, "F32", 0.3)] * 2, dtype="BF16", factors=(0.7,), shape=shape))
    finally:
        torch.set_num_threads(before)
    assert written[0] == written[1]


# Zeros


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_parts_are_zero(tmp_path, dtype):
    assert run(tmp_path, [], dtype=dtype, shape=(3, 5)) == bytes(15 * torch.zeros(1, dtype=torch_dtype(dtype)).element_size())


def test_zeros_are_not_held(tmp_path, monkeypatch):
    real, sizes = arithmetic.write_at, []
    monkeypatch.setattr(arithmetic, "write_at", lambda target, data, at: sizes.append(len(data)) or real(target, data, at))
    assert run(tmp_path, [], dtype="F32", shape=(BUFFER // 2 + 5,)) == bytes(2 * BUFFER + 20)
    assert sizes == [BUFFER, BUFFER, 20]


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_tensors_without_elements(tmp_path, shape):
    assert run(tmp_path, [], dtype="F32", shape=shape) == b""
    assert run(tmp_path, [(b"", "F32", 0.5), (b"", "F32", 0.5)], dtype="BF16", factors=(2.0,), shape=shape) == b""


def test_a_scalar(tmp_path):
    assert run(tmp_path, [(struct.pack("<f", 3.0), "F32", 1)], dtype="F32", factors=(2.0,), shape=()) == struct.pack("<f", 6.0)


# Overflow, infinities and NaN


@pytest.mark.parametrize(
    ("value", "dtype", "how", "found"),
    [
        (70_000.0, "F32", {"dtype": "F16"}, "F16"),
        (1e39, "F64", {"dtype": "F32"}, "F32"),
        (3.39e38, "F32", {"dtype": "BF16"}, None),
        (3.4e38, "F32", {"dtype": "BF16"}, "BF16"),
        (60_000.0, "F16", {"dtype": "F16", "factors": (2.0,)}, "F16"),
        (60_000.0, "F16", {"dtype": "F32", "factors": (2.0,)}, "F16"),
        (60_000.0, "F16", {"dtype": "F32", "factors": (2.0,), "compute": "F32"}, None),
        (70_000.0, "F32", {"dtype": "F32", "compute": "F16"}, "F16"),
        (70_000.0, "F32", {"dtype": "F16", "factors": (0.5,)}, None),
        (1.0, "F32", {"dtype": "F16", "factors": (1e300, 0.5)}, "F32"),
        (65_519.0, "F32", {"dtype": "F16"}, None),
        (65_520.0, "F32", {"dtype": "F16"}, "F16"),
    ],
)  # fmt: skip
def test_overflow_of_finite_weights(tmp_path, value, dtype, how, found):
    tensor = torch.tensor([1.0, value, 0.5], dtype=torch_dtype(dtype))
    if found is None:
        run(tmp_path, [(tensor, dtype, 1)], shape=(3,), **how)
    else:
        message = f"tensor 'model.w': overflows {found}; use a dtype of larger range, or smaller factors"
        assert overflow(tmp_path, [(tensor, dtype, 1)], shape=(3,), **how) == message


def test_an_average_may_pass_through_what_would_overflow(tmp_path):
    big = torch.tensor([60_000.0], dtype=torch.float16)
    assert run(tmp_path, [(big, "F16", 0.9), (big, "F16", 0.1)], dtype="F16", shape=(1,)) == raw(big)
    message = "tensor 'model.w': overflows F16; use a dtype of larger range, or smaller factors"
    assert overflow(tmp_path, [(big, "F16", 1), (big, "F16", 1)], dtype="F32", shape=(1,)) == message


def test_what_was_not_finite_stays(tmp_path):
    tensor = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    expected = torch.tensor([-math.inf, math.inf, math.nan, -2.0], dtype=torch.float16)
    assert run(tmp_path, [(tensor, "F32", 1)], dtype="F16", factors=(-2.0,), shape=(4,)) == raw(expected)
    other = torch.tensor([-math.inf, 1.0, 1.0, 1.0])
    sums = torch.tensor([math.nan, -math.inf, math.nan, 2.0])
    assert run(tmp_path, [(tensor, "F32", 1), (other, "F32", 1)], dtype="F32", shape=(4,)) == raw(sums)


def test_an_infinity_hides_no_overflow(tmp_path):
    tensor = torch.tensor([math.inf, math.nan, 70_000.0])
    assert overflow(tmp_path, [(tensor, "F32", 1)], dtype="F16", shape=(3,)).startswith("tensor 'model.w': overflows F16")


def test_an_overflow_in_a_later_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "PIECE", 4)
    tensor = torch.tensor([1.0] * 10 + [1e5])
    assert overflow(tmp_path, [(tensor, "F32", 1)], dtype="F16", shape=(11,)).startswith("tensor 'model.w': overflows F16")
    assert (tmp_path / "target").read_bytes()[7:] == raw(torch.ones(8, dtype=torch.float16))


@pytest.mark.parametrize(("dtype", "bits"), [("BF16", b"\xc0\x7f"), ("F16", b"\x00\x7e"), ("F32", b"\x00\x00\xc0\x7f")])
@pytest.mark.parametrize("payload", [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF])
def test_there_is_one_nan(tmp_path, dtype, bits, payload):
    """Vector instructions and the scalar code for the rest spell NaN in different ways: 33 elements meet both."""
    tensor = struct.pack("<33I", *[payload] * 33)
    assert run(tmp_path, [(tensor, "F32", 1)], dtype=dtype, factors=(2.0,), shape=(33,)) == bits * 33


def test_a_hostile_name_is_quoted(tmp_path):
    (tmp_path / "source").write_bytes(struct.pack("<f", 1e9))
    part = Part(model="m", file="source", begin=0, end=4, dtype="F32", weight=1)
    made = TensorMade(name="a\nb\x1b[31m", dtype="F16", shape=(1,), parts=(part,))
    with ExitStack() as stack, (tmp_path / "target").open("wb") as target, pytest.raises(OutputError) as caught:
        write_made(made, {"m": tmp_path}, SourceFiles(stack), target.fileno(), 0, lambda count: None)
    assert str(caught.value).startswith("tensor 'a\\nb\\x1b[31m': overflows F16; ")


# Sources


def test_a_source_that_ends_early(tmp_path):
    (tmp_path / "source").write_bytes(bytes(10))
    part = Part(model="m", file="source", begin=0, end=12, dtype="F32", weight=1)
    made = TensorMade(name="w", dtype="F16", shape=(3,), parts=(part,))
    with ExitStack() as stack, (tmp_path / "target").open("wb") as target, pytest.raises(CheckpointError) as caught:
        write_made(made, {"m": tmp_path}, SourceFiles(stack), target.fileno(), 0, lambda count: None)
    assert str(caught.value) == f"{tmp_path / 'source'}: ended early: 2 bytes are missing from byte 10 on; plan again"


def test_parts_are_read_a_piece_at_a_time_and_sources_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "PIECE", 100)
    real, asked = SourceFiles.read, []
    monkeypatch.setattr(SourceFiles, "read", lambda self, part: asked.append((part.begin, part.end)) or real(self, part))
    one, two = random_tensor("F32", 1, (250,)), random_tensor("BF16", 2, (250,))
    run(tmp_path, [(one, "F32", 0.5), (two, "BF16", 0.5)], dtype="F32", shape=(250,))
    second = START + 1000
    assert asked == [
        (START, START + 400), (second, second + 200),
        (START + 400, START + 800), (second + 200, second + 400),
        (START + 800, START + 1000), (second + 400, second + 500),
    ]  # fmt: skip
    assert (tmp_path / "source").read_bytes() == b"#" * START + raw(one) + raw(two) + b"#"


def test_nothing_global_is_set(tmp_path):
    def state():
        return torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.random.get_rng_state().tolist()

    before = state()
    run(tmp_path, [(random_tensor("F32", 1), "F32", 0.5), (random_tensor("F32", 2), "F32", 0.5)], dtype="BF16", factors=(2.0,))
    assert state() == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [3, 7, 1 << 20])
def test_a_factor_for_the_first_columns(tmp_path, monkeypatch, dtype, piece):
    monkeypatch.setattr(arithmetic, "PIECE", piece)
    tensor = random_tensor(dtype, 3, (4, 6))
    expected = torch.cat([tensor[:, :2] * 0.5 * 0.3, tensor[:, 2:] * 0.5], 1)
    found = run(tmp_path, [(tensor, dtype, 1)], dtype=dtype, factors=(0.5,), shape=(4, 6), amend=Band(by=0.3, row=6, stop=2))
    assert found == raw(expected)
    rest = Band(by=0.3, row=6, stop=2, at=9)  # a later piece of the same tensor
    flat = tensor.flatten()[9:]
    assert run(tmp_path, [(flat, dtype, 1)], dtype=dtype, factors=(0.5,), shape=(15,), amend=rest) == raw(expected.flatten()[9:])


def test_a_band_overflows_as_a_factor_does(tmp_path):
    tensor = torch.tensor([60_000.0, 60_000.0], dtype=torch.float16)
    band = Band(by=2.0, row=2, stop=1)
    with pytest.raises(OutputError, match="overflows F16"):
        run(tmp_path, [(tensor, "F16", 1)], dtype="F16", shape=(2,), amend=band)


VECTORS = st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4)


@settings(max_examples=50)
@given(query=VECTORS, key=VECTORS.filter(lambda found: max(map(abs, found)) > 0.1), by=st.floats(1e-3, 0.6))
def test_a_vector_grows_along_another(tmp_path_factory, query, key, by):
    """exp(q . k) is larger by what was asked, and q has moved along k and no other way."""
    q, k = torch.tensor(query, dtype=torch.float64), torch.tensor(key, dtype=torch.float64)
    found = run(tmp_path_factory.mktemp("g"), [(q, "F64", 1), (k, "F64", 0)], dtype="F64", shape=(4,), amend=Grown(by=by))
    grown = torch.frombuffer(bytearray(found), dtype=torch.float64)
    before, after = float(q @ k), float(grown @ k)
    assert math.isclose(math.exp(after) - math.exp(before), by, rel_tol=1e-6)
    moved = grown - q
    assert float((moved - k * float(moved @ k) / float(k @ k)).abs().max()) < 1e-12
    assert float(moved @ k) > 0


@pytest.mark.parametrize(("dtype", "to"), [("F32", "F32"), ("BF16", "BF16"), ("F16", "F32"), ("BF16", "F16")])
def test_what_has_grown_is_rounded_once_to_each_dtype(tmp_path, dtype, to):
    q, k = (random_tensor(dtype, seed, (8,)) for seed in (1, 2))
    a = math.fsum(float(one) * float(other) for one, other in zip(q, k, strict=True))
    step = math.log1p(0.25 * math.exp(-a)) / math.fsum(float(one) ** 2 for one in k)
    expected = (q.double() + k.double() * step).to(torch_dtype(dtype)).to(torch_dtype(to))
    how = {"dtype": to, "shape": (8,)}
    found = run(tmp_path, [(q, dtype, 1), (k, dtype, 0)], amend=Grown(by=0.25), **how)
    assert found == raw(expected)
    later = {**how, "shape": (3,)}
    assert run(tmp_path, [(q, dtype, 1), (k, dtype, 0)], amend=Grown(by=0.25, at=4), **later) == raw(expected[4:7])


@pytest.mark.parametrize(
    ("query", "key", "why"),
    [
        ([1.0, 2.0], [0.0, 0.0], "is zero"),
        ([1.0, 2.0], [0.0, -0.0], "is zero"),
        ([1.0, math.nan], [1.0, 1.0], "or it holds NaN, infinity or numbers too large"),
        ([1.0, 1.0], [math.inf, 1.0], "or it holds NaN, infinity or numbers too large"),
        ([-1e300, 0.0], [1e300, 0.0], "or it holds NaN, infinity or numbers too large"),
    ],
)
def test_a_vector_that_cannot_grow(tmp_path, query, key, why):
    parts = [(torch.tensor(one, dtype=torch.float64), "F64", 1) for one in (query, key)]
    with pytest.raises(OutputError) as caught:
        run(tmp_path, parts, dtype="F64", shape=(2,), amend=Grown(by=0.5))
    start = "tensor 'model.w': cannot make up for the new place of its layer: the tensor that it is multiplied with"
    assert str(caught.value) == f"{start} {why}"


# Maps


def mapped(tmp_path, tensor, dtype, *folds, columns=False, **how):
    """Bytes of a tensor that maps are folded into, each in a file as `fits` writes it."""
    maps, folders = [], {"m": tmp_path}
    for number, fold in enumerate(folds):
        digest = f"{number}" * 64
        path = tmp_path / digest
        save_file({"map": fold}, path)
        assert span_of(path, len(fold)).end == path.stat().st_size
        folders[digest] = path
        maps.append(Map(sha256=digest, size=len(fold), columns=columns))
    (tmp_path / "source").write_bytes(raw(tensor))
    part = Part(model="m", file="source", begin=0, end=tensor.nbytes, dtype=dtype, weight=1)
    made = TensorMade(name="model.w", dtype=how.pop("write", dtype), shape=tuple(tensor.shape), parts=(part,), maps=tuple(maps), **how)
    with ExitStack() as stack:
        return b"".join(made_pieces(made, folders, SourceFiles(stack))), made


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("columns", [False, True])
def test_a_map_is_multiplied_into_the_tensor_after_its_factors(tmp_path, dtype, columns, monkeypatch):
    monkeypatch.setattr(arithmetic, "PIECE", 100)
    tensor, fold = random_tensor(dtype, 1, (8, 20)), random_tensor("F32", 2, (20, 20) if columns else (8, 8))
    data, made = mapped(tmp_path, tensor, dtype, fold, columns=columns, factors=(0.5,))
    assert data == raw(folded(tensor * 0.5, fold, columns, torch_dtype(dtype))) and len(data) == made.nbytes


def test_maps_come_one_after_the_other_and_the_last_one_casts(tmp_path):
    tensor, one, two = random_tensor("BF16", 1, (8, 5)), random_tensor("F32", 2, (8, 8)), random_tensor("F32", 3, (8, 8))
    data, _ = mapped(tmp_path, tensor, "BF16", one, two, write="F32")
    assert data == raw(folded(folded(tensor, one, False, torch.bfloat16), two, False, torch.float32))
    data, _ = mapped(tmp_path, tensor, "BF16", one, compute="F32", write="F16")
    assert data == raw(folded(tensor.float(), one, False, torch.float16))


def test_a_map_that_leads_out_of_the_range_of_a_dtype(tmp_path):
    tensor = torch.full((2, 2), 60000.0, dtype=torch.float16)
    with pytest.raises(OutputError) as caught:
        mapped(tmp_path, tensor, "F16", torch.full((2, 2), 2.0))
    assert str(caught.value) == "tensor 'model.w': overflows F16; use a dtype of larger range"


def test_what_a_source_spoils_is_spelled_in_one_way(tmp_path):
    tensor = torch.tensor([[math.inf, 1.0], [2.0, 3.0]])
    data, _ = mapped(tmp_path, tensor, "F32", torch.eye(2))
    assert data == struct.pack("<4f", math.nan, 1.0, math.nan, 3.0)
