"""executor.py: an output folder is complete and exact, or it is not there; and a hostile plan writes nothing."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import byte_tensors, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from layercut import arithmetic, executor, journal, writer
from layercut.checkpoint import open_checkpoint
from layercut.copying import SourceFiles
from layercut.errors import CheckpointError, LayercutError, OutputError
from layercut.executor import KEPT, execute
from layercut.header import encode_header
from layercut.plan import Actions, Companion, LeftOut, OutputFile, Part, Plan, Source, TensorCopy, TensorMade
from layercut.report import VOLATILE, read_report
from layercut.stack import LayerRef
from layercut.staging import SLACK
from layercut.verify import verify

INDEX = "model.safetensors.index.json"
LAYER = re.compile(r"(.*?\.)(\d+)(\..+)")


def plan_for(folders, layers, *, shards=1, companions=True) -> Plan:
    """A plan by hand: the first source is the donor, `layers` is a list of (alias, index)."""
    opened = {alias: open_checkpoint(folder) for alias, folder in folders.items()}
    donor = next(iter(opened))
    copies = [copy_of(tensor, donor, tensor.name) for tensor in opened[donor].tensors.values() if not LAYER.fullmatch(tensor.name)]
    for position, (alias, index) in enumerate(layers):
        for tensor in opened[alias].tensors.values():
            match = LAYER.fullmatch(tensor.name)
            if match and int(match[2]) == index:
                copies.append(copy_of(tensor, alias, f"{match[1]}{position}{match[3]}"))
    names = ["model.safetensors"] if shards == 1 else [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    parts = [copies[n * len(copies) // shards : (n + 1) * len(copies) // shards] for n in range(shards)]
    files = tuple(OutputFile(name=name, metadata={"format": "pt"}, tensors=part) for name, part in zip(names, parts, strict=True))
    weight_map = {copy.name: file.name for file in files for copy in file.tensors}
    index = None if shards == 1 else json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n"
    key = next(key for key in ("num_hidden_layers", "n_layer") if key in opened[donor].config)
    config = re.sub(rf'("{key}": )\d+', rf"\g<1>{len(layers)}", opened[donor].config_text)
    carried = [Companion(name=name, model=donor, size=size) for name, size in opened[donor].companions] if companions else []
    return Plan(
        version="0.1.0",
        recipe={"model": donor},
        output=None,
        sources={alias: source_of(checkpoint) for alias, checkpoint in opened.items()},
        donor=donor,
        seams=(),
        choices=(),
        edits=(),
        left_out=tuple(LeftOut(model=donor, what=what, reason=reason) for what, reason in opened[donor].left_out),
        measurement=None,
        actions=Actions(
            layers=[LayerRef(model=alias, index=index) for alias, index in layers],
            config=config,
            files=files,
            index=index,
            companions=carried,
        ),
    )


def copy_of(tensor, alias, name) -> TensorCopy:
    return TensorCopy(name=name, dtype=tensor.dtype, shape=tensor.shape, model=alias, file=tensor.file, begin=tensor.begin, end=tensor.end)


def made_of(copy, *others, weights=(1.0,), **how) -> TensorMade:
    """The tensor computed from its own bytes and those of `others`, as many as there are weights."""
    copies = [copy, *others][: len(weights)]
    parts = tuple(
        Part(model=c.model, file=c.file, begin=c.begin, end=c.end, dtype=c.dtype, weight=weight)
        for c, weight in zip(copies, weights, strict=True)
    )
    return TensorMade(**{"name": copy.name, "dtype": copy.dtype, "shape": copy.shape, "parts": parts, **how})


def with_made(plan: Plan, make) -> Plan:
    """The plan with `make(tensor)` in the place of every tensor for which that is not None."""
    files = tuple(
        file.model_copy(update={"tensors": tuple(make(tensor) or tensor for tensor in file.tensors)}) for file in plan.actions.files
    )
    return plan.model_copy(update={"actions": plan.actions.model_copy(update={"files": files})})


def source_of(checkpoint) -> Source:
    depth = checkpoint.config.get("num_hidden_layers") or checkpoint.config["n_layer"]
    return Source(
        reference=checkpoint.folder.name,
        folder=str(checkpoint.folder),
        revision=None,
        depth=depth,
        parameters=checkpoint.parameters,
        digest=checkpoint.digest,
        files={name: file.size for name, file in checkpoint.files.items()},
    )


def edited(plan: Plan, *changes) -> Plan:
    """The plan after changes (path, value) to its JSON, as a hostile file would hold them."""
    data = json.loads(plan.to_json())
    for path, value in changes:
        node = data
        *parents, last = path.split(".")
        for part in parents:
            node = node[int(part) if part.isdigit() else part]
        node[int(last) if last.isdigit() else last] = value
    return Plan.from_json(json.dumps(data))


def tree(folder: Path) -> dict[str, str]:
    """Every path below a folder, with what it holds: two equal trees are the same to any reader."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        else:
            found[name] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def stable(folder: Path) -> dict[str, object]:
    """The tree of an output without clocks."""
    found: dict[str, object] = dict(tree(folder))
    report = json.loads((folder / "layercut.json").read_text())
    found["layercut.json"] = json.dumps({key: value for key, value in report.items() if key not in VOLATILE})
    return found


def weights(folder: Path) -> dict[str, bytes]:
    """All tensors of a folder, read by the safetensors library."""
    return {name: array.tobytes() for path in sorted(folder.glob("*.safetensors")) for name, array in load_file(path).items()}


STAGING = ".out.layercut-partial"


def beside(folder: Path) -> dict[str, str]:
    """The tree without the staging, of which there must be one to go on from."""
    found = tree(folder)
    assert f"{STAGING}/journal" in found and f"{STAGING}/content" in found
    return {name: what for name, what in found.items() if not name.startswith(STAGING)}


def failing(monkeypatch, error, after=0):
    """Make the copy raise after some calls."""
    real, calls = SourceFiles.copy, []

    def copy(self, *args):
        calls.append(args)
        if len(calls) > after:
            raise error
        real(self, *args)

    monkeypatch.setattr(SourceFiles, "copy", copy)


@pytest.fixture
def source(byte_checkpoint):
    """Six layers in two shards, with files beside them."""
    folder = byte_checkpoint("source", layers=6, shards=2)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_bytes(b"")
    return folder


@pytest.fixture
def plan(source):
    return plan_for({"source": source}, [("source", 0), ("source", 1), ("source", 4), ("source", 5)], shards=3)


# What is written


def expected_weights(layers, donor="source"):
    made = {alias: byte_tensors(6, alias) for alias in {donor, *(alias for alias, _ in layers)}}
    found = {name: data for name, (_, _, data) in made[donor].items() if not LAYER.fullmatch(name)}
    for position, (alias, index) in enumerate(layers):
        for name, (_, _, data) in made[alias].items():
            match = LAYER.fullmatch(name)
            if match and int(match[2]) == index:
                found[f"{match[1]}{position}{match[3]}"] = data
    return found


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("indices", [[0, 1, 2, 3, 4, 5], [0, 1, 4, 5], [5, 3, 3, 0], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5], [2]], ids=str)
def test_every_tensor_is_where_it_belongs(source, tmp_path, indices, shards):
    layers = [("source", index) for index in indices]
    execute(plan_for({"source": source}, layers, shards=shards), tmp_path / "out", progress=False)
    assert weights(tmp_path / "out") == expected_weights(layers)


def test_layers_of_two_models(byte_checkpoint, tmp_path):
    folders = {"a": byte_checkpoint("a", shards=2), "b": byte_checkpoint("b", shards=3)}
    layers = [("a", 0), ("b", 3), ("b", 4), ("a", 2), ("b", 5)]
    execute(plan_for(folders, layers, shards=2), tmp_path / "out", progress=False)
    assert weights(tmp_path / "out") == expected_weights(layers, "a")


def test_the_identity_plan_gives_the_same_tensors_and_files(source, tmp_path):
    plan = plan_for({"source": source}, [("source", index) for index in range(6)], shards=2)
    execute(plan, tmp_path / "out", progress=False)
    assert weights(tmp_path / "out") == weights(source)
    for name in ("config.json", "tokenizer.json", "templates/chat.jinja", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5)), min_size=1, max_size=9), shards=st.integers(1, 4))
def test_any_stack_is_written_exactly(tmp_path, layers, shards):
    folders = {alias: tmp_path / alias for alias in "ab"}
    for alias, folder in folders.items():
        if not folder.exists():
            write_checkpoint(folder, byte_tensors(6, alias), {"num_hidden_layers": 6}, shards=2)
    execute(plan_for(folders, layers, shards=shards), tmp_path / "out", overwrite=True, progress=False)
    assert weights(tmp_path / "out") == expected_weights(layers, "a")
    open_checkpoint(tmp_path / "out")


def test_the_folder_holds_what_the_plan_says_and_nothing_else(plan, source, tmp_path):
    before = tree(source)
    report = execute(plan, tmp_path / "out", progress=False)
    files = ["LICENSE", "config.json", "layercut.json", INDEX, "templates/chat.jinja", "tokenizer.json"]
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()) == sorted(
        files + shards
    )
    assert (tmp_path / "out" / "config.json").read_text() == plan.actions.config
    assert (tmp_path / "out" / INDEX).read_text() == plan.actions.index
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert tree(source) == before
    assert read_report(tmp_path / "out") == report
    assert report.files.keys() == {*files, *shards} - {"layercut.json"}


def test_headers_and_bytes_of_a_weight_file(plan, tmp_path):
    execute(plan, tmp_path / "out", progress=False)
    for file in plan.actions.files:
        header = encode_header([(t.name, t.dtype, t.shape) for t in file.tensors], {"format": "pt"})
        data = expected_weights([("source", index) for index in (0, 1, 4, 5)])
        assert (tmp_path / "out" / file.name).read_bytes() == header + b"".join(data[t.name] for t in file.tensors)


def test_neighbours_are_copied_in_one_call(source, tmp_path, monkeypatch):
    folder = tmp_path / "one"
    write_checkpoint(folder, byte_tensors(6, "one"), {"num_hidden_layers": 6})
    plan = plan_for({"one": folder}, [("one", 0), ("one", 1), ("one", 2), ("one", 5)])
    real, calls = SourceFiles.copy, []
    monkeypatch.setattr(SourceFiles, "copy", lambda self, part, *rest: calls.append(part) or real(self, part, *rest))
    execute(plan, tmp_path / "out", progress=False)
    # embeddings | norm and head | layers 0 to 2 | layer 5: two tensors of 64 bytes a layer
    assert [part.end - part.begin for part in calls] == [64, 128, 3 * 128, 128]


def test_report_facts(plan, tmp_path):
    report = execute(plan, tmp_path / "out", progress=False, started=1_700_000_000.0)
    file = report.files["model-00001-of-00003.safetensors"]
    raw = (tmp_path / "out" / "model-00001-of-00003.safetensors").read_bytes()
    assert file.bytes == len(raw)
    assert file.header_sha256 == hashlib.sha256(raw[: 8 + int.from_bytes(raw[:8], "little")]).hexdigest()
    assert file.sha256 is None
    assert report.files["tokenizer.json"].sha256 == hashlib.sha256(b'{"version": "1.0"}\n').hexdigest()
    assert (report.parameters.before, report.parameters.after) == (64 * 15, 64 * 11)
    assert report.weight_bytes.after == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert report.timings["started"] == "2023-11-14T22:13:20+00:00"
    assert report.timings["seconds"] > report.timings["write_seconds"]


def test_two_runs_are_byte_identical(plan, tmp_path):
    execute(plan, tmp_path / "one", progress=False)
    before = os.umask(0o077)
    try:
        execute(plan, tmp_path / "two", progress=False)
    finally:
        os.umask(before)
    assert stable(tmp_path / "one") == stable(tmp_path / "two")
    for name in ("config.json", "model-00001-of-00003.safetensors", "tokenizer.json", "layercut.json"):
        assert (tmp_path / "two" / name).stat().st_mode & 0o777 == 0o644


SCRIPT = """
import sys
from pathlib import Path
from layercut.executor import execute
from layercut.plan import Plan
execute(Plan.from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), progress=False)
heavy = sorted({"torch", "transformers", "numpy", "datasets", "huggingface_hub", "safetensors", "tqdm"} & sys.modules.keys())
status = Path("/proc/self/status")
peak = [int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")] if status.exists() else [0]
print(heavy, peak[0])
"""


def in_a_fresh_process(plan, tmp_path, out, seed="0"):
    (tmp_path / "plan.json").write_text(plan.to_json())
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(executor.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "plan.json", out], env=environment, capture_output=True, text=True, check=True
    )
    heavy, kilobytes = done.stdout.rsplit(" ", 1)
    return heavy, int(kilobytes)


def test_other_processes_write_the_same_without_heavy_imports(plan, tmp_path):
    for seed in ("1", "2"):
        heavy, _ = in_a_fresh_process(plan, tmp_path, tmp_path / f"out{seed}", seed)
        assert heavy == "[]"
    assert stable(tmp_path / "out1") == stable(tmp_path / "out2")


def test_memory_does_not_grow_with_the_model(tmp_path):
    folder, layers, size = tmp_path / "big", 10, 50 << 20
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    header = encode_header([(f"model.layers.{layer}.w", "U8", (size,)) for layer in range(layers)], {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for layer in range(layers):
            file.seek(len(header) + layer * size)
            file.write(f"layer {layer}".encode())
        file.truncate(len(header) + layers * size)
    plan = plan_for({"big": folder}, [("big", layer) for layer in (9, 8, 7, 6, 5, 4, 3, 2, 1, 0)])
    assert plan.weight_bytes == 500 << 20
    _, kilobytes = in_a_fresh_process(plan, tmp_path, tmp_path / "out")
    assert kilobytes < 80_000
    start = len(header)
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        for position in range(layers):
            file.seek(start + position * size)
            assert file.read(8) == f"layer {9 - position}\0".encode()
    shutil.rmtree(tmp_path / "out")


def test_progress_counts_every_byte(plan, tmp_path, monkeypatch):
    bars = []

    @contextmanager
    def tqdm(**settings):
        bars.append((settings, []))
        yield SimpleNamespace(update=bars[-1][1].append)

    fake = ModuleType("tqdm")
    fake.tqdm = tqdm
    monkeypatch.setitem(sys.modules, "tqdm", fake)
    report = execute(plan, tmp_path / "out")
    [(settings_, moves)] = bars
    assert settings_["total"] == sum(moves) == sum(file.bytes for file in report.files.values())
    assert settings_["disable"] is None


def test_no_bar_where_stderr_is_no_terminal(plan, tmp_path, capsys):
    execute(plan, tmp_path / "out")
    assert capsys.readouterr() == ("", "")


# Tensors that are computed, files that are written from text, and what cannot be executed


def float_tensors(layers, size=16):
    """Layers with two F32 matrices whose values say layer and matrix: 10, 11, 20, 21, ..."""
    tensors = {"model.embed_tokens.weight": ("F32", (2, size), struct.pack(f"<{2 * size}f", *[5.0] * 2 * size))}
    for layer in range(layers):
        for number, name in enumerate("ab"):
            values = [10.0 * (layer + 1) + number] * size
            tensors[f"model.layers.{layer}.{name}"] = ("F32", (size,), struct.pack(f"<{size}f", *values))
    return tensors


@pytest.fixture
def floats(tmp_path):
    return write_checkpoint(tmp_path / "floats", float_tensors(4), {"model_type": "llama", "num_hidden_layers": 4}, shards=2)


@pytest.fixture
def made_plan(floats):
    """Layers 0, 2, 3: the first doubled, `b` of the second zero, the third untouched."""

    def make(tensor):
        if tensor.name.startswith("model.layers.0."):
            return made_of(tensor, factors=(2.0,))
        return made_of(tensor, weights=()) if tensor.name == "model.layers.1.b" else None

    return with_made(plan_for({"floats": floats}, [("floats", 0), ("floats", 2), ("floats", 3)]), make)


def test_computed_and_copied_tensors_stand_in_order(made_plan, tmp_path):
    report = execute(made_plan, tmp_path / "out", progress=False)
    values = {"model.embed_tokens.weight": 5.0, "model.layers.0.a": 20.0, "model.layers.0.b": 22.0, "model.layers.1.a": 30.0}
    values |= {"model.layers.1.b": 0.0, "model.layers.2.a": 40.0, "model.layers.2.b": 41.0}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: set(array.ravel().tolist()) for name, array in found.items()} == {name: {value} for name, value in values.items()}
    header = encode_header([(t.name, t.dtype, t.shape) for t in made_plan.actions.files[0].tensors], {"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[: len(header)] == header
    assert (report.parameters.before, report.parameters.after) == (32 + 8 * 16, 32 + 6 * 16)
    assert report.weight_bytes.after == (tmp_path / "out" / "model.safetensors").stat().st_size == len(header) + 4 * 128
    assert report.weight_bytes.before == sum(path.stat().st_size for path in (tmp_path / "floats").glob("*.safetensors"))
    assert report.files["model.safetensors"].sha256 is None
    assert verify(tmp_path / "out", load=False).ok


def test_computed_tensors_break_a_slice_and_nothing_else_does(made_plan, tmp_path, monkeypatch):
    real, calls = SourceFiles.copy, []
    monkeypatch.setattr(SourceFiles, "copy", lambda self, part, *rest: calls.append(part) or real(self, part, *rest))
    execute(made_plan, tmp_path / "out", progress=False)
    # embeddings | layers 0 computed | 1.a | 1.b zero | layer 2
    assert [part.end - part.begin for part in calls] == [128, 64, 128]


def test_progress_counts_computed_bytes(made_plan, tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "PIECE", 5)
    moves, totals = [], []

    @contextmanager
    def meter(total, progress):
        totals.append(total)
        yield moves.append

    monkeypatch.setattr(executor, "_meter", meter)
    report = execute(made_plan, tmp_path / "out")
    assert totals == [sum(moves)] == [sum(file.bytes for file in report.files.values())]
    assert moves.count(20) == 6  # 16 values in pieces of 5, two tensors


def test_zeros_load_no_torch_and_arithmetic_does(made_plan, floats, tmp_path):
    plan = plan_for({"floats": floats}, [("floats", 0), ("floats", 2), ("floats", 3)])
    zero = with_made(plan, lambda tensor: made_of(tensor, weights=(), dtype="BF16") if tensor.name.endswith(".a") else None)
    heavy, _ = in_a_fresh_process(zero, tmp_path, tmp_path / "zero")
    assert heavy == "[]"
    heavy, _ = in_a_fresh_process(made_plan, tmp_path, tmp_path / "made")
    assert "torch" in heavy and "transformers" not in heavy
    raw = (tmp_path / "zero" / "model.safetensors").read_bytes()
    entry = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["model.layers.1.a"]
    begin, end = (8 + int.from_bytes(raw[:8], "little") + offset for offset in entry["data_offsets"])
    assert (entry["dtype"], raw[begin:end]) == ("BF16", bytes(32))


GROWTH = """
import sys
import torch
from pathlib import Path
from layercut.executor import execute
from layercut.plan import Plan
(torch.ones(9, dtype=torch.bfloat16) * 2.0).isfinite()
def peak():  # not by getrusage: Linux counts the process that started this one, which may have been larger than this will ever be
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before = peak()
execute(Plan.from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), progress=False)
print(peak() - before)
"""


def test_memory_does_not_grow_with_a_computed_tensor(tmp_path):
    folder, elements = tmp_path / "big", 100 << 20
    folder.mkdir()
    (folder / "config.json").write_text('{"num_hidden_layers": 1}')
    header = encode_header([("model.layers.0.w", "BF16", (elements,))], {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * elements)
        file.seek(-2, os.SEEK_END)
        file.write(b"\x80\x3f")  # 1.0
    plan = with_made(plan_for({"big": folder}, [("big", 0)]), lambda tensor: made_of(tensor, factors=(2.0,)))
    (tmp_path / "plan.json").write_text(plan.to_json())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(executor.__file__).parents[1])}
    command = [sys.executable, "-c", GROWTH, tmp_path / "plan.json", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000  # kB, for a tensor of 200 MB
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == len(header) + 2 * elements
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"\0\0\0\x40"  # 2.0
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_an_error_in_the_middle_of_a_computed_tensor(made_plan, tmp_path, monkeypatch, error):
    monkeypatch.setattr(arithmetic, "PIECE", 5)
    before, real, calls = tree(tmp_path), arithmetic.write_at, []

    def write_at(target, data, offset):
        calls.append(len(data))
        if len(calls) == 3:
            raise error
        real(target, data, offset)

    monkeypatch.setattr(arithmetic, "write_at", write_at)
    with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
        execute(made_plan, tmp_path / "out", progress=False)
    assert calls == [20, 20, 20]
    message = f"{tmp_path}/out/model.safetensors: cannot be written: No space left on device; free some space; {KEPT}"
    assert str(caught.value) == (message if isinstance(error, OSError) else KEPT)
    assert beside(tmp_path) == before
    monkeypatch.undo()
    execute(made_plan, tmp_path / "out", progress=False)
    execute(made_plan, tmp_path / "clean", progress=False)
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")


def test_an_overflow_leaves_nothing(floats, tmp_path):
    plan = with_made(
        plan_for({"floats": floats}, [("floats", 3)]),
        lambda tensor: made_of(tensor, factors=(2000.0,), dtype="F16") if tensor.name.endswith("b") else None,
    )
    before = tree(tmp_path)
    with pytest.raises(OutputError) as caught:
        execute(plan, tmp_path / "out", progress=False)
    assert str(caught.value) == "tensor 'model.layers.0.b': overflows F16; use a dtype of larger range, or smaller factors"
    assert tree(tmp_path) == before


def test_a_source_that_changes_while_it_is_computed_with(made_plan, floats, tmp_path, monkeypatch):
    real, path = SourceFiles.read, floats / "model-00001-of-00002.safetensors"

    def read(self, part):
        os.utime(path, ns=(1, 1))
        return real(self, part)

    monkeypatch.setattr(SourceFiles, "read", read)
    with pytest.raises(CheckpointError, match=rf"^{path}: was changed while it was copied"):
        execute(made_plan, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["floats"]


def with_texts(plan: Plan, texts) -> Plan:
    """The plan with texts, which take the place of companions."""
    companions = tuple(companion for companion in plan.actions.companions if companion.name not in texts)
    return plan.model_copy(update={"actions": plan.actions.model_copy(update={"texts": texts, "companions": companions})})


def test_texts_stand_in_for_companions(plan, tmp_path):
    texts = {"templates/chat.jinja": "{{ größe }}\n", "notes/a.md": "", "chat_template.jinja": "{{ x }}"}
    before = os.umask(0o077)
    try:
        report = execute(with_texts(plan, texts), tmp_path / "out", progress=False)
    finally:
        os.umask(before)
    for name, text in texts.items():
        assert (tmp_path / "out" / name).read_bytes() == text.encode()
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o644
        assert report.files[name].sha256 == hashlib.sha256(text.encode()).hexdigest()
    files = [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted([*report.files, "layercut.json"]) == sorted(files)
    checks = {check.name: check.ok for check in verify(tmp_path / "out", load=False).checks}
    assert checks["files"] and checks["no other files"]


def test_the_order_of_texts_does_not_show(plan, tmp_path):
    texts = {"b.txt": "b", "a.txt": "a"}
    one, two = with_texts(plan, texts), with_texts(plan, dict(sorted(texts.items())))
    assert one.digest == two.digest
    execute(one, tmp_path / "one", progress=False)
    execute(two, tmp_path / "two", progress=False)
    assert stable(tmp_path / "one") == stable(tmp_path / "two")


def test_texts_count_for_space_and_progress(plan, tmp_path, monkeypatch):
    totals = []

    @contextmanager
    def meter(total, progress):
        moves = []
        yield moves.append
        totals.append((total, sum(moves)))

    monkeypatch.setattr(executor, "_meter", meter)
    execute(plan, tmp_path / "without")
    execute(with_texts(plan, {"card.md": "ß" * 100}), tmp_path / "with")
    assert totals[1] == (totals[0][0] + 200, totals[0][1] + 200)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../x", "plan writes to '../x', which is not a plain name inside the output folder"),
        ("/x", "plan writes to '/x', which is not a plain name inside the output folder"),
        ("a\nb", "plan writes to 'a\\nb', which is not a plain name inside the output folder"),
        ("tokenizer.json", "plan writes 'tokenizer.json' twice"),
        ("config.json", "plan writes 'config.json' twice"),
        ("layercut.json", "plan writes 'layercut.json' twice"),
        ("model-00001-of-00003.safetensors", "plan writes 'model-00001-of-00003.safetensors' twice"),
        ("templates", "plan writes 'templates' as a file and as a folder"),
        ("LICENSE/x", "plan writes 'LICENSE' as a file and as a folder"),
        ("x.safetensors", "plan writes 'x.safetensors' from text, which no checkpoint carries (weights of the uncut model"),
        ("pytorch_model.bin", "plan writes 'pytorch_model.bin' from text, which no checkpoint carries (weights of the uncut model"),
        ("x.index.json", "plan writes 'x.index.json' from text, which no checkpoint carries (index of weights that are left out)"),
        ("adapter_config.json", "plan writes 'adapter_config.json' from text, which no checkpoint carries (adapter of the uncut model)"),
        (".git/config", "plan writes '.git/config' from text, which no checkpoint carries (version control or cache, not the model)"),
    ],
)  # fmt: skip
def test_hostile_texts(plan, tmp_path, name, message):
    before = tree(tmp_path)
    with pytest.raises(OutputError) as caught:
        execute(edited(plan, ("actions.texts", {name: "x"})), tmp_path / "out", progress=False)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_an_index_cannot_come_as_text(floats, tmp_path):
    plan = with_texts(plan_for({"floats": floats}, [("floats", 0)]), {INDEX: "{}"})
    with pytest.raises(OutputError, match=rf"^plan writes '{INDEX}' from text, which no checkpoint carries"):
        execute(plan, tmp_path / "out", progress=False)


@pytest.mark.parametrize("name", ["card.md", "config.json", INDEX])
def test_texts_that_cannot_be_encoded(plan, tmp_path, name):
    change = {"config.json": {"config": "{} \ud800"}, INDEX: {"index": "{} \ud800"}}.get(name, {"texts": {name: "{} \ud800"}})
    broken = plan.model_copy(update={"actions": plan.actions.model_copy(update=change)})
    with pytest.raises(OutputError, match=rf"^plan's '{name}' holds half of a surrogate pair at 3, which is no character"):
        execute(broken, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


# Where it may not be written


def test_an_output_that_holds_something_is_not_touched(plan, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    before = tree(tmp_path)
    monkeypatch.setattr(executor, "staged", None)  # nothing is staged either
    with pytest.raises(OutputError) as caught:
        execute(plan, tmp_path / "out", progress=False)
    assert str(caught.value) == f"{tmp_path}/out/ is not empty; choose another folder or pass --overwrite"
    assert tree(tmp_path) == before


def test_an_empty_output_is_used(plan, tmp_path):
    (tmp_path / "out").mkdir()
    execute(plan, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_a_file(plan, tmp_path, overwrite):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match=r"out is a file; choose another folder$"):
        execute(plan, tmp_path / "out", overwrite=overwrite, progress=False)
    assert (tmp_path / "out").read_text() == "mine"


def test_parents_are_made_and_a_file_among_them_is_refused(plan, tmp_path):
    execute(plan, tmp_path / "a" / "b" / "out", progress=False)
    assert (tmp_path / "a" / "b" / "out" / "config.json").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=rf"^{tmp_path}/file is a file, {tmp_path}/file/x/out cannot lie in it"):
        execute(plan, tmp_path / "file" / "x" / "out", progress=False)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["source", "source/out", "source/templates", "."])
def test_output_and_source_do_not_lie_in_each_other(plan, source, tmp_path, where, overwrite):
    before = tree(tmp_path)
    with pytest.raises(OutputError) as caught:
        execute(plan, tmp_path / where, overwrite=overwrite, progress=False)
    assert str(caught.value) == f"{tmp_path / where} and the source {source} lie in each other; choose a folder outside the sources"
    assert tree(tmp_path) == before


def test_a_source_reached_by_a_link_is_seen(plan, source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(OutputError, match="lie in each other"):
        execute(plan, tmp_path / "link", overwrite=True, progress=False)
    with pytest.raises(OutputError, match="lie in each other"):
        execute(plan, tmp_path / "link" / "out", progress=False)


def test_an_output_that_holds_the_files_of_a_source(tmp_path, source):
    hub = tmp_path / "hub" / "models--x--y"
    snapshot, blobs = hub / "snapshots" / "000", hub / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.glob("*.*"):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    plan = plan_for({"source": snapshot}, [("source", 1)])
    with pytest.raises(OutputError) as caught:
        execute(plan, blobs, overwrite=True, progress=False)
    assert str(caught.value).startswith(f"{blobs} holds model-00001-of-00002.safetensors of the source 'source'; choose")
    execute(plan, tmp_path / "out", progress=False)
    assert weights(tmp_path / "out") == expected_weights([("source", 1)])
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_current_and_home_folder_are_refused(plan, tmp_path, monkeypatch):
    (tmp_path / "home" / "me").mkdir(parents=True)
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    monkeypatch.chdir(tmp_path / "work" / "here")
    current, home = "the current directory", "the home folder"
    for name, what in [("work", current), ("work/here", current), ("home/me", home), ("home", home)]:
        with pytest.raises(OutputError) as caught:
            execute(plan, tmp_path / name, overwrite=True, progress=False)
        assert str(caught.value) == f"{tmp_path / name} is {what} or holds it; choose another folder"
    with pytest.raises(OutputError, match=r"^\. is the current directory"):
        execute(plan, Path(), overwrite=True, progress=False)
    execute(plan, Path("out"), progress=False)
    assert (tmp_path / "work" / "here" / "out" / "config.json").exists()


@pytest.mark.parametrize("root", ["/", "/../.."])
def test_the_root_is_refused(plan, root, monkeypatch, tmp_path):
    monkeypatch.setattr(executor, "staged", None)
    with pytest.raises(OutputError, match="lie in each other"):
        execute(plan, Path(root), overwrite=True, progress=False)


def test_a_mount_point_is_refused(plan, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(OutputError, match=r"out is a mount point and cannot be put in place at once; choose a folder inside it$"):
        execute(plan, tmp_path / "out", progress=False)


def test_a_parent_that_is_not_writable(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    before = tree(tmp_path)
    with pytest.raises(OutputError) as caught:
        execute(plan, tmp_path / "new" / "out", progress=False)
    assert str(caught.value) == f"{tmp_path} is not writable; choose another folder"
    assert tree(tmp_path) == before


def test_too_little_space(plan, tmp_path, monkeypatch):
    before = tree(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4_500_000))
    with pytest.raises(OutputError) as caught:
        execute(plan, tmp_path / "out", progress=False)
    assert str(caught.value) == f"needs 33.6 MB, 4.5 MB free on {tmp_path}; free some space or choose another folder"
    assert tree(tmp_path) == before


def test_space_is_counted_in_full(plan, tmp_path, monkeypatch):
    total = sum(file.bytes for file in execute(plan, tmp_path / "first", progress=False).files.values())
    for free, fits in [(total + SLACK, True), (total + SLACK - 1, False)]:
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if fits:
            execute(plan, tmp_path / "out", progress=False)
        else:
            with pytest.raises(OutputError, match=r"^needs 33"):
                execute(plan, tmp_path / "out2", progress=False)


def test_what_a_killed_run_left_counts_as_free(plan, tmp_path, monkeypatch):
    content = tmp_path / ".out.layercut-partial" / "content"
    content.mkdir(parents=True)
    (content / "model.safetensors").write_bytes(b"x" * (1 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=SLACK))
    execute(plan, tmp_path / "out", progress=False)
    assert "model.safetensors" not in tree(tmp_path / "out")


def test_a_symlinked_output_stays_a_link(plan, tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    execute(plan, tmp_path / "out", progress=False)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "real" / "config.json").exists()
    (tmp_path / "disk" / "real" / "stale").write_text("old")
    execute(plan, tmp_path / "out", overwrite=True, progress=False)
    assert (tmp_path / "out").is_symlink()
    assert not (tmp_path / "out" / "stale").exists()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


# Sources


def test_a_source_that_changed_since_the_plan(plan, source, tmp_path):
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace('"vocab_size": 8', '"vocab_size": 9'))
    with pytest.raises(CheckpointError) as caught:
        execute(plan, tmp_path / "out", progress=False)
    assert str(caught.value) == f"{source}: source changed since the plan was made; plan again"
    assert not (tmp_path / "out").exists()


def test_a_companion_that_changed_since_the_plan(plan, source, tmp_path):
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        execute(plan, tmp_path / "out", progress=False)
    assert str(caught.value) == f"{source / 'tokenizer.json'}: changed since the plan was made; plan again"


def test_a_plan_with_other_file_sizes(plan, tmp_path):
    with pytest.raises(CheckpointError, match="source changed since the plan was made; plan again"):
        execute(edited(plan, ("sources.source.files", {})), tmp_path / "out", progress=False)


def test_a_source_that_is_gone(plan, source, tmp_path):
    shutil.rmtree(source)
    with pytest.raises(CheckpointError, match=f"{source}: no such folder"):
        execute(plan, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_truncated_while_it_is_copied(plan, source, tmp_path, monkeypatch):
    real = SourceFiles.copy
    path = source / "model-00002-of-00002.safetensors"

    def copy(self, part, *rest):
        if part.path == path:
            os.truncate(path, part.begin + 5)
        real(self, part, *rest)

    monkeypatch.setattr(SourceFiles, "copy", copy)
    with pytest.raises(CheckpointError, match=rf"^{path}: ended early: \d+ bytes are missing from byte \d+ on; plan again$"):
        execute(plan, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_is_written_to_while_it_is_copied(plan, source, tmp_path, monkeypatch):
    real = SourceFiles.copy
    path = source / "tokenizer.json"

    def copy(self, part, *rest):
        real(self, part, *rest)
        if part.path == path:
            os.utime(path, ns=(1, 1))

    monkeypatch.setattr(SourceFiles, "copy", copy)
    with pytest.raises(CheckpointError) as caught:
        execute(plan, tmp_path / "out", progress=False)
    assert str(caught.value) == f"{path}: was changed while it was copied; run again when nothing writes to it"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Hostile plans

TENSOR = "actions.files.0.tensors.0"
COMPANION = "actions.companions.0"
EMBED = "tensor 'model.embed_tokens.weight'"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("actions.files.0.name", "/tmp/x.safetensors")], "plan writes to '/tmp/x.safetensors', which is not a plain name"),
        ([("actions.files.0.name", "../x.safetensors")], "plan writes to '../x.safetensors', which is not a plain name"),
        ([("actions.files.0.name", "a/../../x.safetensors")], "plan writes to 'a/../../x.safetensors', which is not a plain"),
        ([("actions.files.0.name", "..\\x.safetensors")], "plan writes to '..\\\\x.safetensors', which is not a plain name"),
        ([("actions.files.0.name", "./x.safetensors")], "plan writes to './x.safetensors', which is not a plain name"),
        ([("actions.files.0.name", "a//x.safetensors")], "plan writes to 'a//x.safetensors', which is not a plain name"),
        ([("actions.files.0.name", "x\n.safetensors")], "plan writes to 'x\\n.safetensors', which is not a plain name"),
        ([("actions.files.0.name", "x\0.safetensors")], "plan writes to 'x\\x00.safetensors', which is not a plain name"),
        ([("actions.files.0.name", "")], "plan writes to '', which is not a plain name inside the output folder"),
        ([("actions.files.0.name", "x.bin")], "plan writes weights to 'x.bin', which is not a .safetensors file"),
        ([("actions.files.0.name", "model-00002-of-00003.safetensors")], "plan writes 'model-00002-of-00003.safetensors' twice"),
        ([("actions.files.0.name", "config.json")], "plan writes 'config.json' twice"),
        ([("actions.files.0.name", "layercut.json")], "plan writes 'layercut.json' twice"),
        ([("actions.files.0.name", "tokenizer.json/x.safetensors")], "plan writes 'tokenizer.json' as a file and as a folder"),
        ([(f"{COMPANION}.name", "../secret")], "plan writes to '../secret', which is not a plain name"),
        ([(f"{COMPANION}.name", "secret")], "plan copies 'secret', which is no file of 'source'"),
        ([(f"{COMPANION}.name", "tokenizer.json")], "plan writes 'tokenizer.json' twice"),
        ([(f"{COMPANION}.model", "other")], "plan copies 'LICENSE', which is no file of 'other'"),
        ([(f"{TENSOR}.file", "../../../etc/passwd")], f"plan copies {EMBED} from '../../../etc/passwd', which is no weight file of"),
        ([(f"{TENSOR}.file", "tokenizer.json")], f"plan copies {EMBED} from 'tokenizer.json', which is no weight file"),
        ([(f"{TENSOR}.model", "other")], f"plan copies {EMBED} from 'model-00001-of-00002.safetensors', which is no weight file"),
        ([(f"{TENSOR}.begin", 0), (f"{TENSOR}.end", 64)], f"plan copies {EMBED} from bytes 0 to 64, which are not weights"),
        ([(f"{TENSOR}.begin", -64), (f"{TENSOR}.end", 0)], "plan: actions.files.0.tensors.0.TensorCopy.begin: Input"),
        ([(f"{TENSOR}.begin", 10**9), (f"{TENSOR}.end", 10**9 + 64)], f"plan copies {EMBED} from bytes 1000000000 to 1000000064, which"),
        ([(f"{TENSOR}.dtype", "U9")], f"plan gives {EMBED} the unknown dtype 'U9'"),
        ([(f"{TENSOR}.dtype", "U16")], f"plan copies 64 bytes for {EMBED}, U16 of shape [8, 8]"),
        ([(f"{TENSOR}.shape", [8, 9])], f"plan copies 64 bytes for {EMBED}, U8 of shape [8, 9]"),
        ([(f"{TENSOR}.shape", [-8, -8])], "plan: actions.files.0.tensors.0.TensorCopy.shape: Value error, a shape holds whole numbers"),
        ([(f"{TENSOR}.name", "lm_head.weight")], "plan writes tensor 'lm_head.weight' twice"),
        ([("donor", "other")], "plan names the donor 'other', which is no source of it"),
        ([("actions.layers.0.model", "other")], "plan holds layer 0 of 'other', which is not there"),
        ([("actions.layers.0.index", 6)], "plan holds layer 6 of 'source', which is not there"),
        ([("actions.layers.0.index", -1)], "plan holds layer -1 of 'source', which is not there"),
        ([("actions.files", [])], "plan writes no weights"),
        ([("actions.index", None)], "plan writes several weight files without an index"),
        ([("actions.index", '{"weight_map": {"a": "model-00001-of-00003.safetensors"}}')], f"plan's {INDEX} does not list its tensors"),
        ([("actions.index", "[]")], f"{INDEX}: no weight_map, or an empty one"),
        ([("actions.config", "[]")], "plan's config.json is not a JSON object"),
        ([("actions.config", "{")], "config.json:1:2: not JSON"),
    ],
)  # fmt: skip
def test_a_hostile_plan_writes_nothing(plan, tmp_path, changes, message):
    before = tree(tmp_path)
    with pytest.raises(LayercutError) as caught:
        execute(edited(plan, *changes), tmp_path / "out", overwrite=True, progress=False)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


MADE = "actions.files.0.tensors.1"
PART = f"{MADE}.parts.0"
FIRST = "tensor 'model.layers.0.a'"
FLOATS = "F64, F32, F16, BF16"
REFUSED = f"plan: {MADE}."  # by whoever reads the plan, before the executor sees it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(f"{PART}.model", "other")], f"plan reads {FIRST} from 'model-00001-of-00002.safetensors', which is no weight file of 'other'"),
        ([(f"{PART}.file", "../x")], f"plan reads {FIRST} from '../x', which is no weight file of 'floats'"),
        ([(f"{PART}.file", "config.json")], f"plan reads {FIRST} from 'config.json', which is no weight file of 'floats'"),
        ([(f"{PART}.begin", 0), (f"{PART}.end", 64)], f"plan reads {FIRST} from bytes 0 to 64, which are not weights of"),
        ([(f"{PART}.begin", 10**9), (f"{PART}.end", 10**9 + 64)], f"plan reads {FIRST} from bytes 1000000000 to 1000000064, which"),
        ([(f"{PART}.dtype", "F16")], f"plan reads 64 bytes for {FIRST}, F16 of shape [16]"),
        ([(f"{PART}.dtype", "U8")], f"plan computes {FIRST} in 'U8'; arithmetic is for {FLOATS}"),
        ([(f"{MADE}.dtype", "I32")], f"plan computes {FIRST} in 'I32'; arithmetic is for {FLOATS}"),
        ([(f"{MADE}.dtype", "float32")], f"plan computes {FIRST} in 'float32'; arithmetic is for {FLOATS}"),
        ([(f"{MADE}.compute", "")], f"plan computes {FIRST} in ''; arithmetic is for {FLOATS}"),
        ([(f"{MADE}.compute", "F8_E4M3")], f"plan computes {FIRST} in 'F8_E4M3'; arithmetic is for {FLOATS}"),
        ([(f"{MADE}.shape", [17])], f"plan reads 64 bytes for {FIRST}, F32 of shape [17]"),
        ([(f"{MADE}.shape", [-4, -4])], REFUSED),
        ([(f"{MADE}.shape", [-16]), (f"{MADE}.parts", []), (f"{MADE}.factors", [])], REFUSED),
        ([(f"{MADE}.parts", [])], f"plan multiplies {FIRST}, which has no parts"),
        ([(f"{PART}.weight", float("nan"))], REFUSED),
        ([(f"{MADE}.factors", [1.0, float("-inf")])], REFUSED),
        ([(f"{MADE}.amend", {"by": 2, "row": 16, "stop": 17})], f"plan amends {FIRST} in a way that does not fit it"),
        ([(f"{MADE}.amend", {"by": 2, "row": 5, "stop": 2})], f"plan amends {FIRST} in a way that does not fit it"),
        ([(f"{MADE}.amend", {"by": 2, "row": 4, "stop": 2, "at": 4})], f"plan amends {FIRST} in a way that does not fit it"),
        ([(f"{MADE}.amend", {"by": 0.5})], f"plan amends {FIRST} in a way that does not fit it"),
        ([(f"{MADE}.amend", {"by": 0})], REFUSED),
        ([(f"{MADE}.amend", {"by": float("inf")})], REFUSED),
        ([(f"{MADE}.amend", {"by": 2, "row": 0, "stop": 0})], REFUSED),
        ([(f"{MADE}.name", "model.layers.2.a")], "plan writes tensor 'model.layers.2.a' twice"),
        ([("actions.layers.0.shares", [{"model": "other", "index": 0, "weight": 1}])], "plan holds layer 0 of 'other', which is not there"),
        ([("actions.layers.0.shares", [{"model": "floats", "index": 4, "weight": 1}])], "plan holds layer 4 of 'floats'"),
        ([("actions.layers.2.span", 2)], "plan holds layer 4 of 'floats', which is not there"),
        ([("actions.layers.0.span", 0)], "plan lets layer 0 of 'floats' stand for 0 layers"),
    ],
)  # fmt: skip
def test_a_hostile_computation_writes_nothing(made_plan, tmp_path, changes, message):
    before = tree(tmp_path)
    with pytest.raises(LayercutError) as caught:
        execute(edited(made_plan, *changes), tmp_path / "out", overwrite=True, progress=False)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_zeros_without_end_do_not_fit(made_plan, tmp_path):
    before = tree(tmp_path)
    for shape, error, message in (
        ([10**9, 10**9], OutputError, r"^needs 4000000\.0 TB, "),
        ([2**62, 2], LayercutError, r"fewer than 2\*\*63 elements"),
    ):
        with pytest.raises(error, match=message):
            endless = edited(made_plan, (f"{MADE}.shape", shape), (f"{MADE}.parts", []), (f"{MADE}.factors", []))
            execute(endless, tmp_path / "out", progress=False)
    assert tree(tmp_path) == before


def test_a_tensor_cannot_be_the_metadata(plan, tmp_path):
    index = plan.actions.index.replace("model.embed_tokens.weight", "__metadata__")
    changes = [(f"{TENSOR}.name", "__metadata__"), ("actions.index", index)]
    with pytest.raises(CheckpointError, match="__metadata__"):
        execute(edited(plan, *changes), tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_companion_that_leads_out_of_its_folder(plan, source, tmp_path):
    (tmp_path / "secret").write_bytes((source / "tokenizer.json").read_bytes())
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="link out of the folder"):
        execute(plan, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


# Failures on the way


@pytest.mark.parametrize(
    ("code", "tail"),
    [
        (errno.ENOSPC, "No space left on device; free some space"),
        (errno.EDQUOT, "Disk quota exceeded; free some space"),
        (errno.EIO, "Input/output error"),
        (errno.EACCES, "Permission denied"),
        (errno.EROFS, "Read-only file system"),
    ],
)
def test_an_error_half_way_keeps_what_was_written(plan, source, tmp_path, monkeypatch, code, tail):
    before = tree(source)
    failing(monkeypatch, OSError(code, os.strerror(code)), after=2)
    with pytest.raises(OutputError) as caught:
        execute(plan, tmp_path / "new" / "out", progress=False)
    assert str(caught.value) == f"{tmp_path}/new/out/model-00002-of-00003.safetensors: cannot be written: {tail}; {KEPT}"
    assert [path.name for path in (tmp_path / "new").iterdir()] == [STAGING]
    assert tree(source) == before
    monkeypatch.undo()
    execute(plan, tmp_path / "new" / "out", progress=False)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert weights(tmp_path / "new" / "out") == expected_weights([("source", index) for index in (0, 1, 4, 5)])


def test_an_error_of_the_disk_names_both_files(plan, source, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "copy_file_range", broken)
    with pytest.raises(OutputError) as caught:
        execute(plan, tmp_path / "out", progress=False)
    names = f"{tmp_path}/out/model-00001-of-00003.safetensors", f"{source}/model-00001-of-00002.safetensors"
    assert str(caught.value) == f"{names[0]}: cannot be written: Input/output error (copying from {names[1]}); {KEPT}"


@pytest.mark.parametrize("after", [0, 2, 5])
def test_an_interrupt_keeps_what_was_written(plan, tmp_path, monkeypatch, after):
    before = tree(tmp_path)
    failing(monkeypatch, KeyboardInterrupt(), after)
    with pytest.raises(KeyboardInterrupt) as caught:
        execute(plan, tmp_path / "out", progress=False)
    assert caught.value.args == (KEPT,)
    assert beside(tmp_path) == before
    monkeypatch.undo()
    execute(plan, tmp_path / "out", progress=False)
    execute(plan, tmp_path / "clean", progress=False)
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")


KILLED = """
import os, signal, sys
from pathlib import Path
from layercut import executor
from layercut.copying import SourceFiles
from layercut.plan import Plan
real, calls = SourceFiles.copy, []
def copy(self, *args):
    calls.append(args)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, *args)
SourceFiles.copy = copy
executor.execute(Plan.from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), progress=False)
"""


@pytest.mark.parametrize("call", [1, 4])
def test_a_killed_run_has_no_final_name_and_the_next_one_finishes(plan, tmp_path, call):
    (tmp_path / "plan.json").write_text(plan.to_json())
    environment = {**os.environ, "PYTHONPATH": str(Path(executor.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "plan.json", tmp_path / "out", str(call)], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.layercut-partial" / "content" / "config.json").exists()
    execute(plan, tmp_path / "out", progress=False)
    execute(plan, tmp_path / "clean", progress=False)
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "out", "plan.json", "source"]


def test_what_was_written_wrong_gets_no_name(plan, tmp_path, monkeypatch):
    real = SourceFiles.check_unchanged

    def damage(self):
        path = tmp_path / ".out.layercut-partial" / "content" / "model-00001-of-00003.safetensors"
        data = path.read_bytes()
        path.write_bytes(data.replace(b'"pt"', b'"px"'))
        real(self)

    before = tree(tmp_path)
    monkeypatch.setattr(SourceFiles, "check_unchanged", damage)
    with pytest.raises(OutputError) as caught:
        execute(plan, tmp_path / "out", progress=False)
    assert str(caught.value) == f"{tmp_path}/out/model-00001-of-00003.safetensors: is not what was written; check the disk; {KEPT}"
    assert beside(tmp_path) == before
    monkeypatch.undo()
    execute(plan, tmp_path / "out", progress=False)
    assert weights(tmp_path / "out") == expected_weights([("source", index) for index in (0, 1, 4, 5)])


def test_what_cannot_be_read_back_gets_no_name(plan, tmp_path, monkeypatch):
    real = SourceFiles.check_unchanged

    def damage(self):
        os.truncate(tmp_path / ".out.layercut-partial" / "content" / "model-00001-of-00003.safetensors", 100)
        real(self)

    before = tree(tmp_path)
    monkeypatch.setattr(SourceFiles, "check_unchanged", damage)
    with pytest.raises(OutputError, match=rf"^{tmp_path}/out: what was written cannot be read back: .*truncated.*; {re.escape(KEPT)}$"):
        execute(plan, tmp_path / "out", progress=False)
    assert beside(tmp_path) == before
    monkeypatch.undo()
    execute(plan, tmp_path / "out", progress=False)
    assert weights(tmp_path / "out") == expected_weights([("source", index) for index in (0, 1, 4, 5)])


def test_everything_is_on_the_disk_before_it_gets_its_name(plan, tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    report = execute(plan, tmp_path / "out", progress=False)
    content = f"{tmp_path}/.out.layercut-partial/content"
    assert synced[-1] == str(tmp_path)
    assert {f"{content}/{name}" for name in report.files} | {content, f"{content}/templates"} <= set(synced)
    assert sum("layercut.json" in name for name in synced) == 1


# Without waiting for the disk


def test_without_waiting_for_the_disk_the_output_is_the_same(plan, tmp_path, monkeypatch):
    execute(plan, tmp_path / "out", progress=False)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink())))
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: pytest.fail("the disk was hurried"))
    execute(plan, tmp_path / "new" / "fast", durable=False, progress=False)
    staging = tmp_path / "new" / ".fast.layercut-partial"
    # What was there is no more: that alone must be on the disk before others take its place.
    assert synced == [str(staging / "journal"), str(staging), str(staging.parent)]
    assert stable(tmp_path / "new" / "fast") == stable(tmp_path / "out")


@pytest.mark.parametrize("started_again", [False, True])
@pytest.mark.parametrize("then", [False, True])
def test_a_stopped_run_that_did_not_wait_goes_on_unless_the_machine_was_started_again(plan, tmp_path, monkeypatch, started_again, then):
    failing(monkeypatch, KeyboardInterrupt(), after=4)
    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", durable=False, progress=False)
    monkeypatch.undo()
    if started_again:
        monkeypatch.setattr(journal, "boot_id", lambda: "another")
    calls, real = [], SourceFiles.copy
    monkeypatch.setattr(SourceFiles, "copy", lambda self, part, *rest: calls.append(part) or real(self, part, *rest))
    execute(plan, tmp_path / "out", durable=then, progress=False)
    again = len(calls)
    execute(plan, tmp_path / "clean", progress=False)
    assert (again == len(calls) - again) == started_again
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")


# Several files at a time


@pytest.fixture
def many_hands(monkeypatch):
    monkeypatch.setattr(writer, "SMALL", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)


@pytest.fixture
def wide(byte_checkpoint):
    """A plan of seven weight files."""
    folder = byte_checkpoint("source", layers=12, shards=3)
    return plan_for({"source": folder}, [("source", index) for index in (0, 1, 2, 5, 6, 7, 8, 11)], shards=7)


def test_small_outputs_are_written_one_file_after_the_other(plan, tmp_path, monkeypatch):
    real, seen = writer.together, []
    monkeypatch.setattr(writer, "together", lambda jobs, hands: seen.append((len(jobs), hands)) or real(jobs, hands))
    execute(plan, tmp_path / "out", progress=False)
    assert seen == [(3, 1)]


def test_many_hands_write_the_same(wide, tmp_path, monkeypatch, many_hands):
    threads, counts, real, together = set(), [], SourceFiles.copy, threading.Barrier(3, timeout=300)

    def copy(self, *args):
        if threading.current_thread() not in threads:
            threads.add(threading.current_thread())
            together.wait()  # or the first might be done with all before the others begin
        real(self, *args)

    @contextmanager
    def meter(total, progress):
        yield counts.append
        assert sum(counts) == total

    monkeypatch.setattr(SourceFiles, "copy", copy)
    monkeypatch.setattr(executor, "_meter", meter)
    execute(wide, tmp_path / "out", progress=False)
    assert len(threads) == 3 and threading.main_thread() not in threads
    monkeypatch.setattr(SourceFiles, "copy", real)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    counts.clear()
    execute(wide, tmp_path / "clean", progress=False)
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")


def test_an_error_stops_all_hands_and_names_its_file(wide, tmp_path, monkeypatch, many_hands):
    copied = set()

    def copy(self, part, target, offset, advance):
        name = Path(f"/proc/self/fd/{target}").readlink().name
        if name == "model-00003-of-00007.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copied.add(name)
        while True:  # a copy of many steps: only the error ends it
            advance(0)
            time.sleep(0.001)

    monkeypatch.setattr(SourceFiles, "copy", copy)
    with pytest.raises(OutputError) as caught:
        execute(wide, tmp_path / "out", progress=False)
    tail = f"cannot be written: No space left on device; free some space; {KEPT}"
    assert str(caught.value) == f"{tmp_path}/out/model-00003-of-00007.safetensors: {tail}"
    assert copied <= {"model-00001-of-00007.safetensors", "model-00002-of-00007.safetensors"}
    monkeypatch.undo()
    execute(wide, tmp_path / "out", progress=False)
    execute(wide, tmp_path / "clean", progress=False)
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")


def test_only_one_tensor_is_computed_at_a_time(floats, tmp_path, monkeypatch, many_hands):
    whole = plan_for({"floats": floats}, [("floats", index) for index in range(4)], shards=4)
    made = with_made(whole, lambda copy: made_of(copy, factors=(2.0,)))
    real, at_work, most = writer.write_made, [], []

    def write_made(*args):
        at_work.append(1)
        most.append(len(at_work))
        time.sleep(0.01)
        real(*args)
        at_work.pop()

    monkeypatch.setattr(writer, "write_made", write_made)
    execute(made, tmp_path / "out", progress=False)
    assert len(most) > 4
    assert set(most) == {1}


# Two runs at once


def test_a_second_run_is_refused(plan, tmp_path):
    staging = tmp_path / ".out.layercut-partial"
    staging.mkdir()
    (staging / "content").mkdir()
    (staging / "content" / "theirs").write_text("theirs")
    with (staging / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError) as caught:
            execute(plan, tmp_path / "out", progress=False)
        assert str(caught.value) == f"another layercut is writing {tmp_path}/out; wait for it or choose another folder"
        assert (staging / "content" / "theirs").read_text() == "theirs"
    execute(plan, tmp_path / "out", progress=False)
    assert not staging.exists()


def test_a_run_that_ends_while_the_next_one_starts(plan, tmp_path, monkeypatch):
    lock, real, calls = tmp_path / ".out.layercut-partial" / "lock", fcntl.flock, []

    def flock(descriptor, how):
        if not calls:
            lock.unlink()  # the other run has removed the file that was just opened
        calls.append(how)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    execute(plan, tmp_path / "out", progress=False)
    assert len(calls) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_file_system_without_locks(plan, tmp_path, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    execute(plan, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_staging_folder_that_is_a_trap(plan, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "content").mkdir()
    (tmp_path / "victim" / "content" / "mine").write_text("mine")
    (tmp_path / ".out.layercut-partial").symlink_to(tmp_path / "victim")
    before = tree(tmp_path)
    with pytest.raises(OutputError) as caught:
        execute(plan, tmp_path / "out", progress=False)
    assert str(caught.value) == f"{tmp_path}/.out.layercut-partial is in the way; remove it"
    assert tree(tmp_path) == before


def test_a_folder_that_is_filled_meanwhile_is_not_replaced(plan, tmp_path, monkeypatch):
    real = executor.write_report

    def meanwhile(folder, report, durable):
        real(folder, report, durable)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")

    monkeypatch.setattr(executor, "write_report", meanwhile)
    with pytest.raises(OutputError, match="cannot be written: Directory not empty"):
        execute(plan, tmp_path / "out", progress=False)
    assert tree(tmp_path / "out").keys() == {"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [STAGING, "out", "source"]
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"/ is not empty; choose another folder or pass --overwrite$"):
        execute(plan, tmp_path / "out", progress=False)
    assert tree(tmp_path) == before
    monkeypatch.undo()
    monkeypatch.setattr(SourceFiles, "copy", None)  # all of it is there
    execute(plan, tmp_path / "out", overwrite=True, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


# Overwriting


@pytest.fixture
def occupied(tmp_path):
    """An output folder with an older model of more shards."""
    folder = tmp_path / "out"
    write_checkpoint(folder, byte_tensors(3, "older"), {"num_hidden_layers": 3}, shards=4)
    return folder


def test_overwrite_leaves_nothing_of_the_older_folder(plan, tmp_path, occupied):
    execute(plan, occupied, overwrite=True, progress=False)
    execute(plan, tmp_path / "clean", progress=False)
    assert stable(occupied) == stable(tmp_path / "clean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "out", "source"]


def test_an_error_keeps_the_older_folder(plan, tmp_path, occupied, monkeypatch):
    before = tree(tmp_path)
    failing(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), after=2)
    with pytest.raises(OutputError, match="No space left on device"):
        execute(plan, occupied, overwrite=True, progress=False)
    assert beside(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2])
def test_a_rename_that_fails_brings_the_older_folder_back(plan, tmp_path, occupied, monkeypatch, error, at):
    before, real, calls = tree(tmp_path), Path.rename, []

    def rename(self, target):
        calls.append(self)
        if len(calls) == at:
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError):
        execute(plan, occupied, overwrite=True, progress=False)
    assert beside(tmp_path) == before
    monkeypatch.undo()
    execute(plan, occupied, overwrite=True, progress=False)
    assert weights(occupied) == expected_weights([("source", index) for index in (0, 1, 4, 5)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_killed_between_the_renames_is_undone(plan, tmp_path, occupied, overwrite):
    before = tree(occupied)
    occupied.rename(tmp_path / ".out.layercut-old")
    if overwrite:
        execute(plan, occupied, overwrite=True, progress=False)
        assert (occupied / "layercut.json").exists()
    else:
        with pytest.raises(OutputError, match="is not empty"):
            execute(plan, occupied, progress=False)
        assert tree(occupied) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_the_rest_of_a_killed_overwrite_is_removed_by_the_next(plan, tmp_path, occupied):
    (tmp_path / ".out.layercut-old").mkdir()
    (tmp_path / ".out.layercut-old" / "older").write_text("older")
    execute(plan, occupied, overwrite=True, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_older_folder_that_cannot_be_removed(plan, tmp_path, occupied, monkeypatch):
    real = shutil.rmtree

    def rmtree(path, **options):
        if Path(path).name != ".out.layercut-trash":
            real(path, **options)
        elif not options.get("ignore_errors"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(OutputError) as caught:
        execute(plan, occupied, overwrite=True, progress=False)
    message = f"{occupied} is complete, but the folder that it replaces could not be removed: Permission denied"
    assert str(caught.value) == f"{message}; remove {tmp_path}/.out.layercut-trash"
    assert (occupied / "layercut.json").exists()
