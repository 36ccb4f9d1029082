"""Sizes that people write: `5GB`, `6B`. Numbers from text, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator

BYTES: Mapping[str, int] = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
COUNTS: Mapping[str, int] = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _parse(text: object, units: Mapping[str, int], example: str) -> int:
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)", str(text))
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


Size = Annotated[int, BeforeValidator(parse_size)]
ParameterCount = Annotated[int, BeforeValidator(parse_count)]
