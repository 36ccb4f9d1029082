"""Errors that the user can fix: one clear line each, never a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

UNREADABLE = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
"""What code that reads a config as its class does raises where that holds a value of another kind."""


class LayercutError(Exception):
    """The input is at fault (exit status 1).

    `where` names the place (``file:line:column``, a file, or a tensor), `message` says what was found there, and `hint`
    says what to do. `str()` joins them: ``where: message; hint``.
    """

    def __init__(self, message: str, *, where: object = None, hint: str | None = None) -> None:
        self.message = message
        self.where = None if where is None else str(where)
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        text = self.message if self.where is None else f"{self.where}: {self.message}".replace("\n", "\\n", self.where.count("\n"))
        return printable(text if self.hint is None else f"{text}; {self.hint}")


class RecipeError(LayercutError):
    """A recipe, or an override of one, says something that layercut does not understand or cannot do."""


class CheckpointError(LayercutError):
    """A checkpoint is missing, damaged, or of a kind that cannot be read."""


class RefusedError(LayercutError):
    """The edit would load but compute something else, or cannot be described in config.json."""


class OutputError(LayercutError):
    """The output folder cannot be written: it holds something, or there is no room, or no permission."""


class CalibrationError(LayercutError):
    """The calibration text cannot be read, is empty, or is too short for what was asked."""


class UploadError(LayercutError):
    """The result cannot be published: no right to, no way to the Hub, or something in the repository that must not be lost."""


def printable(text: str) -> str:
    """The text with everything that could work on a terminal, or cannot be encoded, spelled out; lines stay lines."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign == "\n" else sign.encode("unicode_escape").decode() for sign in text)


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """A hint with the nearest known word, whatever its case, or None when nothing is near (1 is equal, 0 has nothing in common)."""
    words = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(word.casefold(), list(words), n=1, cutoff=cutoff)
    return f"did you mean '{words[near[0]]}'?" if near else None


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
