"""report.py: the facts of a run, the same on every machine, replaced at once and read back exactly."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from layercut.errors import CheckpointError, OutputError
from layercut.plan import Actions, Candidate, Choice, Distance, Edit, LeftOut, Measurement, Plan, Seam, Source, Table
from layercut.report import VOLATILE, Change, WrittenFile, file_digest, layer_ranges, make_report, read_report, write_report
from layercut.stack import LayerRef, Scaling, Share


def stack(*layers):
    return tuple(LayerRef(model=model, index=index) for model, index in layers)


def source(name, depth, files):
    return Source(
        reference=f"org/{name}",
        folder=f"/secret/{name}",
        revision="f" * 40,
        depth=depth,
        parameters=100 * depth,
        digest=name * 3,
        files=files,
    )


@pytest.fixture
def plan():
    """Two models, a measurement, and something of everything."""
    distances = {"angular[last]": Distance(mean=0.1, stderr=0.01)}
    seam = Seam(at=2, from_model="a", from_boundary=2, to_model="b", to_boundary=3, distances=distances)
    candidate = Candidate(start=2, stop=3, cost=0.1, stderr=0.0)
    choice = Choice(where="steps.0.prune", metric="angular[last]", chosen="[2, 3)", cost=0.1, candidates=(candidate,))
    table = Table(metric="angular[last]", a="a", b="b", mean=((0.0, 0.5), (0.25, 1e-17)), stderr=((0.0, 0.0), (0.0, 0.0)))
    return Plan(
        version="0.1.0",
        recipe={"models": {"a": "./a"}, "steps": [{"prune": {"layers": 1}}]},
        output="./out",
        sources={"b": source("b", 4, {"y": 7}), "a": source("a", 3, {"x": 11, "z": 13})},
        donor="a",
        seams=(seam,),
        choices=(choice,),
        edits=(Edit(key="num_hidden_layers", before=3, after=4, reason="depth"),),
        left_out=(LeftOut(model="b", what="lm_head.weight", reason="the donor's is used"),),
        notes=("one note",),
        measurement=Measurement(tables=(table,), samples=3, tokens=99, details={"bos": "auto"}),
        actions=Actions(layers=stack(("a", 0), ("a", 1), ("b", 3), ("a", 1)), config="{}", files=(), index=None, companions=()),
    )


FILES = {
    "config.json": WrittenFile(bytes=2, sha256="c" * 64),
    "model-1.safetensors": WrittenFile(bytes=20, header_sha256="1" * 64),
    "model-2.safetensors": WrittenFile(bytes=30, header_sha256="2" * 64),
}


@pytest.fixture
def report(plan):
    return make_report(plan, files=FILES, parameters=321, timings={"started": "2024-01-01T00:00:00+00:00", "seconds": 1.5})


def test_facts_of_the_plan_are_all_there(plan, report):
    for name in ("version", "recipe", "donor", "seams", "choices", "edits", "left_out", "notes", "measurement"):
        assert getattr(report, name) == getattr(plan, name)
    assert report.plan == plan.digest
    assert report.layers == plan.actions.layers
    assert list(report.sources) == ["b", "a"]
    assert report.sources["a"].model_dump() == {"reference": "org/a", "revision": "f" * 40, "digest": "aaa", "depth": 3, "parameters": 300}


def test_kept_and_dropped_layers(report):
    assert report.kept == {"b": ("[3, 4)",), "a": ("[0, 2)", "[1, 2)")}
    assert report.dropped == {"b": (0, 1, 2), "a": (2,)}


def test_layers_of_an_average_are_not_dropped(plan):
    shares = Share(model="a", index=0, weight=0.5), Share(model="b", index=2, weight=0.5)
    scaled = LayerRef(model="a", index=2, scalings=((Scaling(tensors="*", by=0.0),),), identity=True)
    layers = LayerRef(model="a", index=0, span=2, shares=shares), scaled
    averaged = plan.model_copy(update={"actions": plan.actions.model_copy(update={"layers": layers})})
    report = make_report(averaged, files=FILES, parameters=1, timings={})
    assert report.layers == layers
    assert report.dropped == {"b": (0, 1, 3), "a": (1,)}
    assert report.kept == {"b": (), "a": ("[0, 2)", "[2, 3)")}


def test_numbers_before_are_the_donors(report):
    assert report.parameters == Change(before=300, after=321)
    assert report.weight_bytes == Change(before=24, after=50)


def test_nothing_names_this_machine_but_what_can_be_stripped(report):
    data = json.loads(report.to_json())
    for key in VOLATILE:
        del data[key]
    text = json.dumps(data)
    assert "/secret" not in text
    assert str(Path.cwd()) not in text
    assert "2024" not in text


def test_equal_plans_give_equal_reports_but_for_the_clock(plan, report):
    later = make_report(Plan.from_json(plan.to_json()), files=FILES, parameters=321, timings={"started": "later", "seconds": 2.5})
    assert later != report
    first, second = json.loads(report.to_json()), json.loads(later.to_json())
    for key in VOLATILE:
        del first[key], second[key]
    assert json.dumps(first) == json.dumps(second)


def test_environment_names_libraries_only_when_they_are_loaded(plan, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    fake = ModuleType("transformers")
    fake.__version__ = "9.9"
    monkeypatch.setitem(sys.modules, "transformers", fake)
    found = make_report(plan, files=FILES, parameters=1, timings={}).environment
    assert found["transformers"] == "9.9"
    assert "torch" not in found
    assert "torch" not in sys.modules
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(
    ("layers", "ranges"),
    [
        ([], ()),
        ([("m", 0)], ("[0, 1)",)),
        ([("m", 0), ("m", 1), ("m", 2), ("m", 5)], ("[0, 3)", "[5, 6)")),
        ([("m", 1), ("m", 0)], ("[1, 2)", "[0, 1)")),
        ([("m", 3), ("m", 3)], ("[3, 4)", "[3, 4)")),
        ([("m", 0), ("x", 1), ("m", 1)], ("[0, 1)", "[1, 2)")),
        ([("x", 0), ("x", 1)], ()),
    ],
)
def test_layer_ranges(layers, ranges):
    assert layer_ranges(stack(*layers), "m") == ranges


@given(st.lists(st.integers(0, 5), max_size=20))
def test_layer_ranges_say_every_layer_in_order(indices):
    ranges = [text.strip("[)").split(", ") for text in layer_ranges(stack(*(("m", index) for index in indices)), "m")]
    assert [index for start, stop in ranges for index in range(int(start), int(stop))] == indices


def test_written_and_read_back(report, tmp_path):
    before = os.umask(0o077)
    try:
        write_report(tmp_path, report)
    finally:
        os.umask(before)
    assert read_report(tmp_path) == report
    assert (tmp_path / "layercut.json").read_text() == report.to_json()
    assert (tmp_path / "layercut.json").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["layercut.json"]


def test_evaluation_is_added_and_nothing_else_changes(report, tmp_path):
    write_report(tmp_path, report)
    result = {"perplexity": {"before": 10.5, "after": 12.25}}
    evaluated = report.with_evaluation(result)
    write_report(tmp_path, evaluated)
    assert report.evaluation is None
    assert read_report(tmp_path).evaluation == result
    assert read_report(tmp_path).model_copy(update={"evaluation": None}) == report


def test_reports_do_not_change(report):
    with pytest.raises(ValidationError, match="frozen"):
        report.donor = "b"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_replacement_keeps_the_older_report(report, tmp_path, monkeypatch, error, raised):
    write_report(tmp_path, report)

    def broken(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(raised) as caught:
        write_report(tmp_path, report.with_evaluation({"a": 1}))
    if raised is OutputError:
        place = tmp_path / "layercut.json"
        assert str(caught.value) == f"{place}: cannot be written: No space left on device; free some space and run again"
    assert read_report(tmp_path) == report
    assert [path.name for path in tmp_path.iterdir()] == ["layercut.json"]


def test_writing_into_no_folder(report, tmp_path):
    with pytest.raises(OutputError) as caught:
        write_report(tmp_path / "gone", report)
    assert str(caught.value) == f"{tmp_path}/gone/layercut.json: cannot be written: No such file or directory"


def test_reading_where_there_is_none(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read_report(tmp_path)
    assert str(caught.value) == f"{tmp_path}/layercut.json: is missing; only folders that layercut wrote have one"


def test_reading_a_folder_of_that_name(tmp_path):
    (tmp_path / "layercut.json").mkdir()
    with pytest.raises(CheckpointError) as caught:
        read_report(tmp_path)
    assert str(caught.value) == f"{tmp_path}/layercut.json: cannot be read: Is a directory"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format="layercut-report/2"), "format: Input should be 'layercut-report/1'"),
        (lambda data: data.update(surprise=1), "surprise: Extra inputs are not permitted"),
        (lambda data: data.pop("donor"), "donor: Field required"),
        (lambda data: data["files"]["config.json"].update(bytes="many"), "files.config.json.bytes: Input should be a valid integer"),
        (lambda data: data["layers"][0].pop("index"), "layers.0.index: Field required"),
    ],
)
def test_reading_another_report(report, tmp_path, change, message):
    data = json.loads(report.to_json())
    change(data)
    (tmp_path / "layercut.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError) as caught:
        read_report(tmp_path)
    prefix = f"{tmp_path}/layercut.json: is not a report that this version can read: "
    assert str(caught.value).startswith(prefix + message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": NaN}'])
def test_reading_what_is_no_report(tmp_path, text):
    (tmp_path / "layercut.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"layercut\.json: is not a report that this version can read: ") as caught:
        read_report(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (2 << 20) + 3])
def test_file_digest(tmp_path, size):
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file") == WrittenFile(bytes=size, sha256=hashlib.sha256(data).hexdigest())
