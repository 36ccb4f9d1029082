"""Accounts: what is said of the text of a measurement, also of one that anyone may have written."""

from __future__ import annotations

from typing import Any

import pytest

from layercut.accounts import account_rows, text_name
from layercut.plan import Measurement

BOTH = {"bos": "added", "bos_policy": "auto"}


def rows(**details: Any) -> list[tuple[str, str]]:
    return list(account_rows(Measurement(tables=(), samples=4, tokens=100, details=details)))


def test_one_source() -> None:
    assert rows(source="builtin", documents_read=1, documents_skipped={}, **BOTH) == [
        ("measured", "4 samples, 100 tokens of builtin text; 1 document read, none skipped; BOS added (auto)"),
    ]


def test_what_was_skipped_and_why() -> None:
    skipped = {"empty": 2, "without an assistant turn": 1}
    ((_, told),) = rows(source="text", path="a.jsonl", documents_read=7, documents_skipped=skipped, bos="not added", bos_policy=False)
    documents = "7 documents read, skipped 2 empty, 1 without an assistant turn"
    assert told == f"4 samples, 100 tokens of a.jsonl; {documents}; BOS not added (bos: false)"


def test_a_mix_and_a_source_that_ended() -> None:
    parts = [
        {"source": "text", "path": "a.txt", "samples_wanted": 3, "samples_found": 3, "samples": 3, "tokens": 90, "documents_read": 1,
         "documents_skipped": {}},
        {"source": "hub", "dataset": "x/y", "samples_wanted": 2, "samples_found": 1, "samples": 1, "tokens": 10, "documents_read": 3,
         "documents_skipped": {"too short": 2}},
    ]  # fmt: skip
    assert rows(source="mix", by_source=parts, documents_read=4, documents_skipped={"too short": 2}, **BOTH) == [
        ("measured", "4 samples, 100 tokens of a.txt and x/y; 4 documents read, skipped 2 too short; BOS added (auto)"),
        ("", "3 samples, 90 tokens of a.txt; 1 document read, none skipped"),
        ("", "1 sample, 10 tokens of x/y, which ended after 1 of 2 samples; 3 documents read, skipped 2 too short"),
    ]


@pytest.mark.parametrize(
    "details",
    [{}, {"by_source": 5}, {"by_source": [5, None]}, {"documents_read": None, "documents_skipped": "x"}, {"path": ["a"], "bos": {}}],
)
def test_details_of_any_form(details: dict[str, Any]) -> None:
    told = rows(**details)
    assert told[0][0] == "measured"
    assert all(isinstance(text, str) for row in told for text in row)


def test_names() -> None:
    assert text_name({"source": "builtin"}) == "builtin text"
    assert text_name({"source": "hub", "dataset": "x/y", "path": None}) == "x/y"
    assert text_name({}) == "unknown text"
