"""Tokens: one sample of the calibration text, and which of its tokens a metric is averaged over."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, TypeAlias

from pydantic import BeforeValidator, StrictInt, StringConstraints
from pydantic_core import PydanticCustomError

from layercut.errors import CalibrationError

SKIP = re.compile(r"skip-first-([0-9]{1,6})")


class Sample(NamedTuple):
    """One token sequence. A schedule may pad it; pads are no part of it."""

    number: int
    """Place in the order of the text, over all batches and ranks: seeded choices depend on it alone."""
    ids: list[int]
    completion: Sequence[int] | None = None
    """For each token whether the model is meant to write it (a turn of the assistant); None when the text is no conversation."""


def _check_token(value: object) -> object:
    """One message instead of one for each kind of value."""
    named = isinstance(value, str) and (value in ("last", "all", "completion") or SKIP.fullmatch(value))
    if not named and (isinstance(value, bool) or not isinstance(value, int)):
        message = "token must be last, all, completion, skip-first-K such as skip-first-4, or the index of a token"
        raise PydanticCustomError("token", message)
    return value


Skip: TypeAlias = Annotated[str, StringConstraints(pattern=f"^{SKIP.pattern}$")]
Token: TypeAlias = Annotated[Literal["last", "all", "completion"] | StrictInt | Skip, BeforeValidator(_check_token)]
"""The tokens of a sample that a metric is averaged over."""


def positions(token: Token, sample: Sample, label: str) -> Sequence[int]:
    """Places of the tokens of a sample that count, in order; none when the sample has no such token.

    `label` names the metric in messages. Raises CalibrationError when the sample lacks the one token that is asked for, or
    when completions are asked for and it is no conversation.
    """
    length = len(sample.ids)
    if isinstance(token, int):
        hint = "use longer texts or a token that all of them have"
        check_index(token, length, label, f"sample {sample.number} has {length}", hint)
        return (token % length,)
    if token == "completion":
        if sample.completion is None:
            hint = "use conversations, or another token"
            raise CalibrationError(f"metric {label} needs completions, but sample {sample.number} is no conversation", hint=hint)
        return [at for at, wanted in enumerate(sample.completion) if wanted]
    skip = SKIP.fullmatch(token)
    if skip is not None:
        return range(int(skip[1]), length)
    return range(length) if token == "all" else range(max(length - 1, 0), length)


def check_index(token: Token, length: int, label: str, found: str, hint: str) -> None:
    """Raise CalibrationError unless `length` tokens hold the one that is asked for; `found` says what there is."""
    needs = needed(token)
    if length < needs:
        raise CalibrationError(f"metric {label} needs {needs} token{'s' if needs > 1 else ''}, but {found}", hint=hint)


def needed(token: Token) -> int:
    """Tokens that a sample must have for the policy to find one."""
    if isinstance(token, int):
        return token + 1 if token >= 0 else -token
    skip = SKIP.fullmatch(token)
    return 1 if skip is None else int(skip[1]) + 1
