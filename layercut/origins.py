"""The cards of the sources of an output: where they are found, and what they state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from layercut.disclosure import repo_of
from layercut.errors import LayercutError
from layercut.hubreader import HubReader
from layercut.report import Report, ReportSource, file_digest
from layercut.smallfile import read_small
from layercut.stated import CARD, MAX_CARD, Stated, read_stated


def stated_by(sources: Mapping[str, ReportSource], own: Mapping[str, str]) -> dict[str, Stated]:
    """What the card of every source states. `own` are cards that are at hand, by alias; others are read where the source is.

    The card of a Hub model is taken at the commit that was used, from the cache or from the Hub. A source without a card states
    nothing. Raises LayercutError when the Hub cannot be asked: what is not known is not taken for nothing.
    """
    return {alias: read_stated(own[alias] if alias in own else _card_of(source)) for alias, source in sources.items()}


def carried(folder: Path, report: Report) -> str | None:
    """The card of the donor, when the output holds it as it was; None when it has none, or another."""
    listed, path = report.files.get(CARD), folder / CARD
    if listed is None or not path.is_file() or file_digest(path) != listed:
        return None
    return _text(path)


def _card_of(source: ReportSource) -> str:
    """The text of a card, or an empty one."""
    repo = repo_of(source)
    if repo is not None:
        return _downloaded(source, repo)
    folder = Path(os.path.expanduser(source.reference))  # noqa: PTH111 - Path.expanduser raises where there is no such user
    try:
        return _text(folder / CARD)
    except (OSError, ValueError):
        return ""


def _downloaded(source: ReportSource, repo: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def look() -> str:
        try:
            return hf_hub_download(repo, CARD, revision=source.revision)
        except LocalEntryNotFoundError:
            raise  # it could not be asked for
        except EntryNotFoundError:
            return ""

    path = HubReader(source.reference, repo, progress=False).ask(look)
    return _text(Path(path)) if path else ""


def _text(path: Path) -> str:
    """The text of a card. What is too long for one, or no text, states nothing."""
    try:
        return read_small(path, 4 * MAX_CARD).decode()
    except (LayercutError, UnicodeDecodeError):
        return ""
