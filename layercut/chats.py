"""Chats: the text that a tokenizer's own chat template makes of a conversation, and which of its tokens the assistant wrote.

Templates come from checkpoints. They run in `apply_chat_template` of transformers and nowhere else: jinja2's ImmutableSandboxedEnvironment,
which sees plain data only, and refuses what reaches for anything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from layercut.conversations import ASSISTANT, Conversation
from layercut.errors import CalibrationError, first_line
from layercut.sampling import RefusedConversation

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag that says which part of a template the assistant writes, as transformers looks for it."""
MARKS = "\ue000\ue001\ue002\ue003"
"""Signs of no meaning that stand for the words of the assistant while they are looked for."""
DAY = {
    "%-d": "26", "%d": "26", "%e": "26", "%-m": "7", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%y": "24", "%a": "Fri",
    "%A": "Friday", "%-H": "12", "%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM", "%j": "208", "%F": "2024-07-26",
    "%T": "12:00:00", "%Z": "UTC", "%z": "+0000",
}  # fmt: skip
"""What templates that print the date are told: always the same day, the one that Llama's falls back to, so that numbers do not change
from day to day."""
CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{directive}', '{text}')" for directive, text in DAY.items())
    + " }}{% endmacro %}\n"
)


class Span(NamedTuple):
    """A part of a text, [start, stop) in characters."""

    start: int
    stop: int


class ChatTemplate:
    """The chat template of a tokenizer, for several models of the first one that has any."""

    def __init__(self, tokenizers: Mapping[str, Any]) -> None:
        """Raises CalibrationError when none has a template."""
        found = next(((alias, one) for alias, one in tokenizers.items() if getattr(one, "chat_template", None)), None)
        if found is None:
            names = " and ".join(f"'{alias}'" for alias in tokenizers)
            message = f"the text holds conversations, but no chat template comes with the tokenizer of {names}"
            raise CalibrationError(message, hint="put the chat_template.jinja of its chat model beside it, or name a column of plain text")
        self._alias, self._tokenizer = found
        try:
            template: str = self._tokenizer.get_chat_template()
        except ValueError as error:  # several, and none of them the default
            raise CalibrationError(f"the chat template of '{self._alias}' cannot be told: {first_line(error)}") from None
        self._template = CLOCK + template if "strftime_now" in template else template

    def text(self, conversation: Conversation) -> str:
        """The whole conversation as text. Raises RefusedConversation when the template says that it does not take it, and
        CalibrationError when it does not run."""
        return str(self._applied(conversation, tokenize=False))

    def completion(self, conversation: Conversation, text: str, ids: Sequence[int]) -> list[bool]:
        """For each token of the conversation whether the assistant wrote it: the words of its turns, and the special token behind them.

        Where the template marks what is generated, that counts. Otherwise the words are found by rendering the conversation with a mark
        in their place: what differs is theirs. Raises CalibrationError when that cannot be told.
        """
        if not self._tokenizer.is_fast:
            message = f"the tokenizer of '{self._alias}' does not tell which characters a token stands for, so that completions are unknown"
            raise CalibrationError(message, hint="use another token than completion")
        if GENERATION.search(self._template):
            return self._tagged(conversation, ids)
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        ends = set(self._tokenizer.all_special_ids) - {self._tokenizer.unk_token_id}
        wanted = [False] * len(ids)
        for start, stop in self._spans(conversation, text):
            inside = [at for at, (first, last) in enumerate(offsets) if first < stop and last > start]
            behind = inside[-1] + 1 if inside else next((at for at, (first, _) in enumerate(offsets) if first >= start), len(ids))
            for at in inside:
                wanted[at] = True
            if behind < len(ids) and ids[behind] in ends:
                wanted[behind] = True
        return wanted

    def _tagged(self, conversation: Conversation, ids: Sequence[int]) -> list[bool]:
        """What stands between generation tags."""
        quiet = {"verbose": False}
        found = self._applied(conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=quiet)
        if list(found["input_ids"]) != list(ids):
            raise CalibrationError(f"the chat template of '{self._alias}' does not give the same text twice")
        return [bool(wanted) for wanted in found["assistant_masks"]]

    def _spans(self, conversation: Conversation, text: str) -> Iterator[Span]:
        """The words of the assistant, turn by turn: where the text differs from the one with a mark instead of them."""
        mark = next((mark for mark in MARKS if mark not in text), "")
        before = 0
        for number, message in enumerate(conversation):
            if message["role"] not in ASSISTANT:
                continue
            other = self.text((*conversation[:number], {"role": message["role"], "content": mark}, *conversation[number + 1 :]))
            start = _common(text, other)
            shorter = min(len(text), len(other)) - start
            stop = len(text) - _common(text[len(text) - shorter :][::-1], other[len(other) - shorter :][::-1])
            if not mark or other.count(mark) != 1 or start < before:
                fault = f"the chat template of '{self._alias}' does not write turn {number + 1} of a conversation in one place"
                raise CalibrationError(fault, hint="use another token than completion, or a template with {% generation %} tags")
            yield Span(start, stop)
            before = stop

    def _applied(self, conversation: Conversation, **how: Any) -> Any:
        from jinja2.exceptions import TemplateError

        try:
            return self._tokenizer.apply_chat_template([dict(message) for message in conversation], chat_template=self._template, **how)
        except TemplateError as error:
            if type(error) is TemplateError:  # what `raise_exception` of a template raises; errors of the template have kinds of their own
                raise RefusedConversation(first_line(error)) from None
            raise self._broken(error) from None
        except Exception as error:  # whatever the template does with the messages
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> CalibrationError:
        return CalibrationError(f"the chat template of '{self._alias}' does not run: {type(error).__name__}: {first_line(error)}")


def _common(a: str, b: str) -> int:
    """Length of the common start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
