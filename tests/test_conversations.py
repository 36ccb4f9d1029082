"""Conversations: the forms that datasets have for them."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import failure

from layercut.conversations import exchange, is_answered, is_conversation, messages
from layercut.errors import CalibrationError

OPENAI = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def fault(value: list[Any]) -> str:
    return failure(CalibrationError, lambda: messages(value, "a.jsonl:3"))


def test_roles_and_contents() -> None:
    assert messages(OPENAI, "a:1") == tuple(OPENAI)


def test_sharegpt() -> None:
    shared = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "hello", "weight": None},
        {"from": "gpt", "value": "hi"},
        {"from": "tool", "value": "5"},
    ]
    assert messages(shared, "a:1") == (*OPENAI, {"role": "tool", "content": "5"})


def test_other_keys_stay_and_those_without_value_go() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "reasoning_content": "so"}
    assert messages([called], "a:1") == ({"role": "assistant", "tool_calls": [{"name": "f"}], "reasoning_content": "so"},)
    parts = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    assert messages([parts], "a:1") == (parts,)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({}, "no role; a message is {role, content}, or {from, value}"),
        ({"role": None, "content": "x"}, "no role; a message is {role, content}, or {from, value}"),
        ({"from": ["human"], "value": "x"}, "no role; a message is {role, content}, or {from, value}"),
        ({"role": "user"}, "no content; a message is {role, content}, or {from, value}"),
        ({"from": "gpt", "value": None}, "no content; a message is {role, content}, or {from, value}"),
        ({"role": "user", "content": {"a": 1}}, "the content is dict, not text"),
    ],
)
def test_messages_that_are_none(message: dict[str, Any], text: str) -> None:
    assert fault([OPENAI[0], message]) == f"a.jsonl:3: message 2: {text}"


@pytest.mark.parametrize(
    ("value", "found"),
    [(OPENAI, True), (tuple(OPENAI), True), ([], False), ("text", False), ([1], False), ([{}, "x"], False), ({"role": "user"}, False)],
)
def test_what_has_the_shape_of_a_conversation(value: object, found: bool) -> None:
    assert is_conversation(value) is found


def test_exchanges() -> None:
    columns = ("question", "answer")
    assert exchange("2 + 2?", "4", columns, "a:1") == ({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"})
    assert exchange(OPENAI[:2], OPENAI[2:], columns, "a:1") == tuple(OPENAI)
    assert exchange(OPENAI[:2], "hi", columns, "a:1") == tuple(OPENAI)
    with pytest.raises(CalibrationError) as caught:
        exchange("2 + 2?", 4, columns, "a:1")
    assert str(caught.value) == "a:1: column 'answer' holds int, not text or messages"
    with pytest.raises(CalibrationError) as caught:
        exchange([{"role": "user"}], "x", columns, "a:1")
    assert str(caught.value).startswith("a:1: column 'question': message 1: no content; ")


def test_answered() -> None:
    assert is_answered(messages(OPENAI, "a"))
    assert is_answered(({"role": "model", "content": "x"},))
    assert not is_answered(messages(OPENAI[:2], "a"))
