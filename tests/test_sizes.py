from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from layercut.sizes import Number, ParameterCount, Size, parse_count, parse_number, parse_size, shown_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("5 GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        ("1.5GB", 1_500_000_000),
        ("500MB", 500_000_000),
        ("2KB", 2000),
        ("1TB", 10**12),
        ("5GiB", 5 * 2**30),
        ("1MiB", 2**20),
        ("1KiB", 1024),
        ("7B", 7),
        ("7", 7),
        (123, 123),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a size such as 5GB, 500MB or 5GiB"),
        ("GB", "expected a size such as 5GB, 500MB or 5GiB"),
        ("5G", "expected a size such as 5GB, 500MB or 5GiB"),
        ("-5GB", "expected a size such as 5GB, 500MB or 5GiB"),
        ("1e3", "expected a size such as 5GB, 500MB or 5GiB"),
        ("5,5GB", "expected a size such as 5GB, 500MB or 5GiB"),
        ("9" * 400 + "TB", "expected a size such as 5GB, 500MB or 5GiB"),
        ("0GB", "a size must be at least one byte"),
        ("0.4B", "a size must be at least one byte"),
    ],
)
def test_sizes_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse_size(text)


@given(st.integers(1, 10**12), st.sampled_from(["KB", "MB", "KiB"]))
def test_whole_sizes_are_exact(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * {"KB": 10**3, "MB": 10**6, "KiB": 2**10}[unit]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("6B", 6 * 10**9),
        ("6b", 6 * 10**9),
        ("6.5 B", 6_500_000_000),
        ("135M", 135_000_000),
        ("0.135B", 135_000_000),
        ("12k", 12_000),
        ("1T", 10**12),
        ("7", 7),
        (123, 123),
    ],
)
def test_numbers_of_parameters(text: str | int, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("6GB", "expected a number of parameters such as 6B or 135M"),
        ("six", "expected a number of parameters such as 6B or 135M"),
        (True, "expected a number of parameters such as 6B or 135M"),
        (-6, "expected a number of parameters such as 6B or 135M"),
        (None, "expected a number of parameters such as 6B or 135M"),
        (0, "a number of parameters must be at least one"),
        ("0.0001K", "a number of parameters must be at least one"),
    ],
)
def test_what_is_no_number_of_parameters(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse_count(text)


@given(st.integers(1, 10**6), st.integers(0, 999))
def test_fractions_are_exact(whole: int, thousandths: int) -> None:
    assert parse_size(f"{whole}.{thousandths:03}GB") == whole * 10**9 + thousandths * 10**6
    assert parse_count(f"{whole}.{thousandths:03}B") == whole * 10**9 + thousandths * 10**6


@pytest.mark.parametrize(("value", "number"), [(2, 2.0), (0.5, 0.5), (-1, -1.0), ("1e-3", 0.001), ("0.25", 0.25), (0, 0.0)])
def test_numbers(value: Any, number: float) -> None:
    assert parse_number(value) == number
    assert type(parse_number(value)) is float


@pytest.mark.parametrize("value", [True, None, "half", "", [1], float("inf"), float("nan"), "nan", "-inf", 10**400, "1e999", {}])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^expected a number such as 0\.5$"):
        parse_number(value)


def test_editors_are_told_both_ways_of_writing() -> None:
    for kind in (Size, ParameterCount):
        plain, text = TypeAdapter(kind).json_schema()["anyOf"]
        assert plain == {"type": "integer"}
        assert text["type"] == "string"
    assert TypeAdapter(Number).json_schema() == {"type": "number"}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (4_500_000_000, "4.5 GB"), (123 * 10**8, "12.3 GB"), (3 * 10**16, "30000.0 TB")],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert shown_size(count) == text
