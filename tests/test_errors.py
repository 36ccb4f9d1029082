"""Errors: one line each, whatever it is about, and nothing in it that could work on a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut import errors
from layercut.errors import LayercutError, RecipeError, did_you_mean, printable


@pytest.mark.parametrize(
    ("message", "where", "hint", "text"),
    [
        ("is missing", None, None, "is missing"),
        ("is missing", "a.yaml:1:2", None, "a.yaml:1:2: is missing"),
        ("is missing", Path("/m/config.json"), "copy it", "/m/config.json: is missing; copy it"),
        ("is missing", None, "copy it", "is missing; copy it"),
        ("two\nlines", "there", None, "there: two\nlines"),
        ("found", "a\nb\nc", "do", "a\\nb\\nc: found; do"),
        ("found", "a\x1b[31m", None, "a\\x1b[31m: found"),
        ("found \u202e", None, "\udc80", "found \\u202e; \\udc80"),
    ],
)
def test_what_it_says(message: str, where: object, hint: str | None, text: str) -> None:
    error = LayercutError(message, where=where, hint=hint)
    assert str(error) == text and error.args == (text,)
    assert (error.message, error.where, error.hint) == (message, None if where is None else str(where), hint)


@given(st.text(), st.text(), st.none() | st.text())
def test_a_place_never_adds_a_line(message: str, where: str, hint: str | None) -> None:
    """Names of files may hold anything; only a message, which we wrote, may have lines."""
    text = str(LayercutError(message, where=where, hint=hint))
    assert text.count("\n") == message.count("\n") + (hint or "").count("\n")
    assert text.replace("\n", "").isprintable()
    text.encode()


@given(st.text())
def test_printable_text_stays_and_other_text_is_spelled_out(text: str) -> None:
    found = printable(text)
    assert found.replace("\n", "").isprintable() and printable(found) == found
    assert (found == text) == text.replace("\n", "").isprintable()
    assert found.count("\n") == text.count("\n")


@pytest.mark.parametrize(
    ("text", "shown"), [("a\tb", "a\\tb"), ("\x00", "\\x00"), ("é 中", "é 中"), ("\u200b", "\\u200b"), ("\r\n", "\\r\n")]
)
def test_signs(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("prun", ["prune", "keep"], "did you mean 'prune'?"),
        ("keeep", ["prune", "keep"], "did you mean 'keep'?"),
        ("xyz", ["prune", "keep"], None),
        ("prune", [], None),
        ("pixels", ["prune", "keep"], None),
        ("model", iter(["models", "mode"]), "did you mean 'models'?"),
    ],
)
def test_the_nearest_word(word: str, known: list[str], hint: str | None) -> None:
    assert did_you_mean(word, known) == hint


def test_every_kind_is_the_users_to_fix() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LayercutError)]
    assert len(kinds) == 7 and all(kind is LayercutError or kind.__base__ is LayercutError for kind in kinds)
    with pytest.raises(LayercutError, match=r"^x: y$"):
        raise RecipeError("y", where="x")
