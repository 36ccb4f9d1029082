"""Samples: documents as token sequences. Knows no tokenizer beyond what an `Encoder` does.

One document is one sample, cut off at `max_length` tokens. Plain text (`.txt` files and the built-in text) has no document
boundaries: each file is cut into consecutive windows of `max_length` tokens, and what is left at its end is dropped unless
the file gave no full window. With `packed` the documents are joined, and cut like that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from random import Random
from typing import NamedTuple, Protocol, TypeVar

from layercut.calibration import CalibrationBase
from layercut.conversations import Conversation, is_answered
from layercut.documents import CUT_OFF, EMPTY, NO_ANSWER, REFUSED, SHORT, Passage, Tally
from layercut.errors import CalibrationError

Item = TypeVar("Item")

BUFFER = 1024
"""Samples that a shuffle chooses from."""


class Encoded(NamedTuple):
    """Text as tokens."""

    ids: list[int]
    completion: list[bool] | None = None
    """For each token whether the assistant wrote it; None where that was not asked, or the text is no conversation."""


class RefusedConversation(Exception):
    """A chat template does not take a conversation, and says why: roles that do not alternate, for example."""


class Encoder(Protocol):
    """A tokenizer, as far as samples depend on it."""

    @property
    def prefix(self) -> list[int]:
        """Tokens that start each sample of plain text."""

    @property
    def separator(self) -> int:
        """The token between packed documents. Raises CalibrationError when there is none."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens around it."""

    def converse(self, conversation: Conversation, completions: bool) -> Encoded:
        """Tokens of a conversation, all special tokens included. Raises RefusedConversation."""


def samples(
    texts: Iterable[Passage], encoder: Encoder, settings: CalibrationBase, tally: Tally, completions: bool = False
) -> Iterator[Encoded]:
    """Token sequences of `min_length` to `max_length` tokens, lazily. With `completions` every sample of a conversation has a token
    that the assistant wrote, and knows which ones these are."""
    prefix, longest = encoder.prefix, settings.max_length
    if settings.min_length > longest:
        raise CalibrationError(f"min_length {settings.min_length} is more than max_length {longest}")
    if longest - len(prefix) < 1:
        raise CalibrationError(f"max_length {longest} leaves no room after {len(prefix)} special tokens")
    documents = _encoded(texts, encoder, tally, completions)
    cut = _packed(documents, encoder, longest) if settings.packed else _apart(documents, prefix, longest, tally)
    for sample in cut:
        if len(sample.ids) < settings.min_length:
            tally.skip(SHORT)
        else:
            tally.samples += 1
            yield sample


class _Document(NamedTuple):
    stream: str | None
    """As in `Passage`."""
    whole: bool
    """Whether it has its special tokens: a conversation."""
    tokens: Encoded


def _encoded(texts: Iterable[Passage], encoder: Encoder, tally: Tally, completions: bool) -> Iterator[_Document]:
    """Documents, and parts of running texts, as tokens; those that give none are skipped."""
    for content, stream, place in texts:
        if isinstance(content, str):
            ids = encoder.encode(content)
            if ids or stream is not None:
                yield _Document(stream, False, Encoded(ids))
            else:
                tally.skip(EMPTY)
            continue
        if completions and not is_answered(content):
            tally.skip(NO_ANSWER)
            continue
        try:
            tokens = encoder.converse(content, completions)
        except RefusedConversation as error:
            tally.skip(REFUSED, f"{place}: {error}")
            continue
        if tokens.completion is not None and not any(tokens.completion):
            tally.skip(NO_ANSWER)
        elif tokens.ids:
            yield _Document(None, True, tokens)
        else:
            tally.skip(EMPTY)


def _apart(documents: Iterable[_Document], prefix: list[int], longest: int, tally: Tally) -> Iterator[Encoded]:
    """A sample for each document, and windows of running texts."""
    for stream, group in itertools.groupby(documents, key=lambda document: document.stream):
        if stream is not None:
            for window in windows((document.tokens.ids for document in group), longest - len(prefix)):
                yield Encoded([*prefix, *window])
            continue
        for document in group:
            ids, completion = document.tokens
            ids = (ids if document.whole else [*prefix, *ids])[:longest]
            if completion is not None and not any(completion[:longest]):
                tally.skip(CUT_OFF)
            else:
                yield Encoded(ids, None if completion is None else completion[:longest])


def _packed(documents: Iterable[_Document], encoder: Encoder, longest: int) -> Iterator[Encoded]:
    """Windows of all documents together. A window of text, or one that holds a part of one, has no completion."""
    prefix, separator = encoder.prefix, encoder.separator

    def joined() -> Iterator[list[tuple[int, bool | None]]]:
        before: _Document | None = None
        for document in documents:
            ids, completion = document.tokens
            if not ids:
                continue
            goes_on = before is not None and document.stream is not None and document.stream == before.stream
            if before is not None and not goes_on and before.tokens.ids[-1] != separator:
                yield [(separator, None if completion is None else False)]
            yield list(zip(ids, completion or itertools.repeat(None), strict=False))
            before = document

    for window in windows(joined(), longest - len(prefix)):
        ids = [token for token, _ in window]
        start = [] if ids[: len(prefix)] == prefix else prefix  # a chat template may have written it
        flags = [bool(wanted) for _, wanted in window]
        known = all(wanted is not None for _, wanted in window)
        yield Encoded([*start, *ids], [False] * len(start) + flags if known else None)


def shuffled(items: Iterable[Item], seed: int | None) -> Iterator[Item]:
    """The items in a seeded order, through a buffer: each comes from the next `BUFFER` ones. In their own order without a seed."""
    if seed is None:
        yield from items
        return
    random, buffer = Random(seed), list[Item]()
    for item in items:
        if len(buffer) < BUFFER:
            buffer.append(item)
            continue
        at = random.randrange(BUFFER)
        yield buffer[at]
        buffer[at] = item
    random.shuffle(buffer)
    yield from buffer


def windows(parts: Iterable[list[Item]], size: int) -> Iterator[list[Item]]:
    """Consecutive windows of `size` tokens of a running text; a shorter rest is dropped unless it is all there is."""
    rest: list[Item] = []
    full = False
    for part in parts:
        rest += part
        for start in range(0, len(rest) - size + 1, size):
            full = True
            yield rest[start : start + size]
        rest = rest[len(rest) - len(rest) % size :]
    if rest and not full:
        yield rest
