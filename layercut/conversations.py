"""Conversations: what was said by whom, in the forms that datasets have for it. Knows no chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from layercut.errors import CalibrationError

Conversation: TypeAlias = tuple[Mapping[str, Any], ...]
"""Messages in order, each with a `role` and, unless it only calls tools, a `content`."""

ROLES: Mapping[str, str] = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
}  # fmt: skip
"""Roles under the names of ShareGPT and its like; others keep their name."""
ASSISTANT = ("assistant", "model")
"""Roles whose turns the model is meant to write."""


def is_conversation(value: object) -> bool:
    """Whether a value has the shape of one: a list of mappings."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(message, Mapping) for message in value)


def messages(value: Sequence[Mapping[str, Any]], place: str) -> Conversation:
    """A list of `{role, content}`, or of `{from, value}`, as a conversation. Keys without a value are left out.

    Raises CalibrationError with the number of the message, from 1, that is neither.
    """
    return tuple(_message(message, f"{place}: message {number}") for number, message in enumerate(value, 1))


def exchange(prompt: object, completion: object, columns: Sequence[str], place: str) -> Conversation:
    """A question and its answer; each is a text, or has messages of its own."""
    parts: list[Mapping[str, Any]] = []
    for value, role, column in zip((prompt, completion), ("user", "assistant"), columns, strict=True):
        if isinstance(value, list | tuple) and is_conversation(value):
            parts += messages(value, f"{place}: column '{column}'")
        elif isinstance(value, str):
            parts.append({"role": role, "content": value})
        else:
            raise CalibrationError(f"column '{column}' holds {type(value).__name__}, not text or messages", where=place)
    return tuple(parts)


def is_answered(conversation: Conversation) -> bool:
    """Whether the assistant says anything in it."""
    return any(message["role"] in ASSISTANT for message in conversation)


def _message(message: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    said = {key: value for key, value in message.items() if value is not None}
    if "role" not in said and "from" in said:
        said["role"] = said.pop("from")
        if "value" in said:
            said["content"] = said.pop("value")
        if isinstance(said["role"], str):
            said["role"] = ROLES.get(said["role"], said["role"])
    if not isinstance(said.get("role"), str):
        raise CalibrationError("no role; a message is {role, content}, or {from, value}", where=place)
    if not isinstance(said.get("content", ""), str | list):
        raise CalibrationError(f"the content is {type(said['content']).__name__}, not text", where=place)
    if "content" not in said and "tool_calls" not in said:
        raise CalibrationError("no content; a message is {role, content}, or {from, value}", where=place)
    return said
