"""The cache of measurements: what comes back, what does not, and that nothing on the disk can harm a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layercut import measurements
from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.measurements import FOLDER, Measurements, key_of, missing, only, with_tables
from layercut.plan import Measurement, Table

KEY = "0" * 64
DEPTHS = {"m": 1}


def table(metric: str = "angular[last]", value: float = 0.1, alias: str = "m") -> Table:
    return Table(metric=metric, a=alias, b=alias, mean=((0.0, value), (value, 0.0)), stderr=((0.0, value / 3), (value / 3, 0.0)))


def measured(*tables: Table) -> Measurement:
    return Measurement(tables=tables or (table(),), samples=2, tokens=9, details={"dtype": {"m": "float32"}})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_back_to_the_last_bit(tmp_path: Path, value: float) -> None:
    cache = Measurements(tmp_path)
    cache.keep(KEY, measured(table(value=value)))
    assert cache.find(KEY, DEPTHS) == measured(table(value=value))


def test_what_was_not_kept_is_not_there(tmp_path: Path) -> None:
    assert Measurements(tmp_path / "none").find(KEY, DEPTHS) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"{}", b"null", measured(table(alias="other")).model_dump_json().encode(),
     measured().model_dump_json().replace("0.1", "NaN").encode(),
     measured().model_dump_json().replace('"samples":2', '"samples":0').encode(),
     measured().model_dump_json().replace("[0.1,0.0]", "[0.1]").encode()],
    ids=["empty", "cut", "deep", "no text", "no fields", "null", "another model", "not finite", "no samples", "another shape"],
)  # fmt: skip
def test_damaged_entries_count_as_not_there(tmp_path: Path, content: bytes) -> None:
    cache = Measurements(tmp_path)
    cache.keep(KEY, measured())
    assert cache.find(KEY, DEPTHS) is not None
    (tmp_path / FOLDER / f"{KEY}.json").write_bytes(content)
    assert cache.find(KEY, DEPTHS) is None
    cache.keep(KEY, measured())
    assert cache.find(KEY, DEPTHS) == measured()


def test_entries_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Measurements(tmp_path)
    cache.keep(KEY, measured())
    monkeypatch.setattr(measurements, "MAX_ENTRY", 100)
    assert cache.find(KEY, DEPTHS) is None
    cache.keep("1" * 64, measured())
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [f"{KEY}.json"]


def test_the_entry_that_was_not_used_for_longest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Measurements(tmp_path)
    for number, key in enumerate("abc"):
        cache.keep(key, measured())
        os.utime(tmp_path / FOLDER / f"{key}.json", (number, number))
    size = (tmp_path / FOLDER / "a.json").stat().st_size
    monkeypatch.setattr(measurements, "MAX_BYTES", 3 * size)
    assert cache.find("a", DEPTHS) is not None  # used: now the youngest
    cache.keep("d", measured())
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["a.json", "c.json", "d.json"]


def test_a_disk_that_does_not_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder would be")
    Measurements(tmp_path).keep(KEY, measured())
    assert Measurements(tmp_path).find(KEY, DEPTHS) is None

    def full(self: Path, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    Measurements(tmp_path / "other").keep(KEY, measured())
    assert list((tmp_path / "other" / FOLDER).iterdir()) == []


def test_tables_are_put_together() -> None:
    old, new = measured(table("a"), table("b", 0.2)), measured(table("b", 0.3), table("c"))
    both = with_tables(old, new)
    assert [(one.metric, one.mean[0][1]) for one in both.tables] == [("a", 0.1), ("b", 0.3), ("c", 0.1)]
    assert with_tables(None, new) is new
    assert [one.metric for one in only(both, ["c", "a"]).tables] == ["c", "a"]
    assert missing(both, ["a", "x"]) == ["x"]
    assert missing(None, ["a"]) == ["a"]


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(tiny_model(tmp_path / "model", layers=2))


def test_the_key_says_what_numbers_depend_on(model: Checkpoint) -> None:
    ids, settings = [[1, 2], [3]], {"dtype": None}
    key = key_of({"m": model}, ids, settings)
    assert key == key_of({"m": model}, ids, settings)
    others = [
        key_of({"n": model}, ids, settings),
        key_of({"m": model}, [[1], [2, 3]], settings),
        key_of({"m": model}, [[3], [1, 2]], settings),
        key_of({"m": model}, ids, {"dtype": "float32"}),
        key_of({"m": model, "n": model}, ids, settings),
    ]
    assert len({key, *others}) == 6


def test_other_weights_give_another_key(model: Checkpoint) -> None:
    """Same names, shapes and size: the digest of the headers does not tell."""
    before = key_of({"m": model}, [[1]], {})
    path = model.folder / next(iter(model.files))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    again = open_checkpoint(model.folder)
    assert again.digest == model.digest
    assert key_of({"m": again}, [[1]], {}) != before
