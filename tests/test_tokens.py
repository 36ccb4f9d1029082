"""Tokens of a sample: what each policy picks, and what it says when there is no such token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut.errors import CalibrationError
from layercut.tokens import Sample, check_index, needed, positions

FIVE = Sample(3, [10, 11, 12, 13, 14], (False, True, True, False, True))
ONE = Sample(4, [10])
NONE = Sample(5, [])


@pytest.mark.parametrize(
    ("token", "five", "one", "none"),
    [
        ("last", [4], [0], []),
        ("all", [0, 1, 2, 3, 4], [0], []),
        ("skip-first-0", [0, 1, 2, 3, 4], [0], []),
        ("skip-first-3", [3, 4], [], []),
        ("skip-first-9", [], [], []),
    ],
)
def test_what_is_picked(token: Any, five: list[int], one: list[int], none: list[int]) -> None:
    assert [list(positions(token, sample, "m")) for sample in (FIVE, ONE, NONE)] == [five, one, none]


def test_one_token_by_its_index() -> None:
    assert [list(positions(token, FIVE, "m")) for token in (0, 4, -1, -5)] == [[0], [4], [4], [0]]
    hint = "use longer texts or a token that all of them have"
    for token, sample, needs in (
        (5, FIVE, "6 tokens, but sample 3 has 5"),
        (-6, FIVE, "6 tokens, but sample 3 has 5"),
        (0, NONE, "1 token, but sample 5 has 0"),
    ):
        with pytest.raises(CalibrationError) as caught:
            positions(token, sample, "cosine[x]")
        assert str(caught.value) == f"metric cosine[x] needs {needs}; {hint}"


def test_completions() -> None:
    assert list(positions("completion", FIVE, "m")) == [1, 2, 4]
    assert list(positions("completion", Sample(0, [1, 2], [False, False]), "m")) == []
    with pytest.raises(CalibrationError) as caught:
        positions("completion", ONE, "cosine[completion]")
    message = "metric cosine[completion] needs completions, but sample 4 is no conversation; use conversations, or another token"
    assert str(caught.value) == message


def test_what_a_policy_needs() -> None:
    tokens: list[Any] = ["last", "all", "completion", 0, 7, -1, -7, "skip-first-0", "skip-first-7"]
    assert [needed(token) for token in tokens] == [1, 1, 1, 1, 8, 1, 7, 1, 8]
    check_index("skip-first-7", 8, "m", "", "")
    with pytest.raises(CalibrationError) as caught:
        check_index("skip-first-7", 7, "m[skip-first-7]", "max_length is 7", "raise max_length")
    assert str(caught.value) == "metric m[skip-first-7] needs 8 tokens, but max_length is 7; raise max_length"


@given(st.one_of(st.sampled_from(["last", "all", "skip-first-2"]), st.integers(-6, 5)), st.integers(0, 8))
def test_positions_are_in_the_sample_in_order(token: Any, length: int) -> None:
    sample = Sample(0, [7] * length)
    try:
        found = list(positions(token, sample, "m"))
    except CalibrationError:
        assert isinstance(token, int)
        assert length < needed(token)
        return
    assert found == sorted(set(found))
    assert all(0 <= at < length for at in found)
    assert (length >= needed(token)) == bool(found)
