"""The page: an analysis as one HTML file that asks nothing of the network. Names of others are text in it, and nothing else."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from layercut.blockscores import triangle
from layercut.errors import printable
from layercut.plan import Table

DIGITS = 7
"""Significant digits of a number in the page; the JSON beside it has all."""


def make_page(title: str, about: str, tables: Iterable[Table]) -> str:
    """The page of some tables: hover values, a switch of metrics, the nearest block of each size marked; `about` is its second line."""
    data = {"about": printable(about), "views": [_view(table) for table in tables]}
    template = (resources.files("layercut") / "data" / "analysis.html").read_text(encoding="utf-8")
    parts = {"@TITLE@": html.escape(printable(title)), "@DATA@": _harmless(json.dumps(data, ensure_ascii=True, separators=(",", ":")))}
    return re.sub("@TITLE@|@DATA@", lambda found: parts[found[0]], template)  # in one pass: what is put in is not looked at again


def _view(table: Table) -> Mapping[str, Any]:
    """A table within one model by block sizes, and one between two models as it is."""
    within = table.a == table.b
    mean, stderr = (triangle(matrix) if within else matrix for matrix in (table.mean, table.stderr))
    a, b, metric = map(printable, (table.a, table.b, table.metric))
    return {"a": a, "b": b, "metric": metric, "mean": _rounded(mean), "stderr": _rounded(stderr)}


def _rounded(matrix: Iterable[Iterable[float]]) -> list[list[float]]:
    return [[float(f"{value:.{DIGITS}g}") for value in row] for row in matrix]


def _harmless(document: str) -> str:
    """JSON with the same meaning that can stand in a script element: nothing in it ends the element or begins a comment."""
    return document.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
