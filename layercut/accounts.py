"""Accounts: what a measurement says of its text, for people: samples, tokens, documents and why some were skipped, BOS.

Measurements stand in plans and reports that anyone may have written: what does not have the form that is expected is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from layercut.plan import Measurement


def text_name(details: Mapping[str, Any]) -> str:
    """What the text is called: its files, its dataset, or all parts of a mix."""
    parts = details.get("by_source")
    if isinstance(parts, list) and parts:
        return " and ".join(text_name(part) for part in parts if isinstance(part, Mapping))
    named = next((str(details[key]) for key in ("path", "dataset") if details.get(key)), None)
    return named or f"{details.get('source', 'unknown')} text"


def account_rows(measurement: Measurement) -> Iterator[tuple[str, str]]:
    """What was measured on, as rows of a table."""
    used = f"{_samples(measurement.samples)}, {measurement.tokens} tokens of {text_name(measurement.details)}"
    first, *parts = account_lines(measurement.details)
    yield "measured", f"{used}; {first}" if first else used
    yield from (("", part) for part in parts)


def account_lines(details: Mapping[str, Any]) -> Iterator[str]:
    """What became of the documents, and BOS; and for each source of a mix what it gave."""
    yield f"{_documents(details)}; {_bos(details)}" if "documents_read" in details else ""
    parts = details.get("by_source")
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, Mapping):
            yield f"{_share(part)}; {_documents(part)}"


def _share(part: Mapping[str, Any]) -> str:
    """What a source of a mix gave, and whether that is less than its share."""
    wanted, found = part.get("samples_wanted"), part.get("samples_found")
    ended = f", which ended after {found} of {wanted} samples" if wanted != found else ""
    return f"{_samples(part.get('samples'))}, {part.get('tokens')} tokens of {text_name(part)}{ended}"


def _samples(count: object) -> str:
    return f"{count} sample{'s' * (count != 1)}"


def _documents(details: Mapping[str, Any]) -> str:
    read, skipped = details.get("documents_read"), details.get("documents_skipped")
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) if isinstance(skipped, Mapping) else ""
    return f"{read} document{'s' * (read != 1)} read, {f'skipped {reasons}' if reasons else 'none skipped'}"


def _bos(details: Mapping[str, Any]) -> str:
    policy = details.get("bos_policy")
    return f"BOS {details.get('bos')} ({'auto' if policy == 'auto' else f'bos: {str(policy).lower()}'})"
