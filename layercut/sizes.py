"""Numbers that people write: `5GB`, `6B`, `1e-3`. Numbers from text, and nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator, StringConstraints

BYTES: Mapping[str, int] = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
COUNTS: Mapping[str, int] = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


AMOUNT = r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)"


def _parse(text: object, units: Mapping[str, int], example: str) -> int:
    match = re.fullmatch(AMOUNT, str(text))
    if isinstance(text, bool) or match is None or match[2].upper() not in units:
        raise ValueError(f"expected {example}")
    return int(Fraction(match[1]) * units[match[2].upper()])


def parse_size(text: str | int) -> int:
    """Bytes of a size such as `5GB` (decimal, as on the Hub), `5GiB`, or a plain number."""
    size = _parse(text, BYTES, "a size such as 5GB, 500MB or 5GiB")
    if size < 1:
        raise ValueError("a size must be at least one byte")
    return size


def parse_count(text: str | int) -> int:
    """A number of parameters such as `6B` or `135M`, or a plain number."""
    count = _parse(text, COUNTS, "a number of parameters such as 6B or 135M")
    if count < 1:
        raise ValueError("a number of parameters must be at least one")
    return count


def parse_number(value: object) -> float:
    """A finite number; text such as `1e-3`, which YAML does not take for a number, is read too."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("expected a number such as 0.5")
    return number


Written = Annotated[str, StringConstraints(pattern=f"^{AMOUNT}$")]
Size = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=int | Written)]
ParameterCount = Annotated[int, BeforeValidator(parse_count, json_schema_input_type=int | Written)]
Number = Annotated[float, BeforeValidator(parse_number)]


def shown_size(count: int) -> str:
    """Bytes for people, in the units in which disks and models are sold."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
