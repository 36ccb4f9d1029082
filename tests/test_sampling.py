"""Samples: documents as token sequences, apart and packed, with what the assistant wrote."""

from __future__ import annotations

from typing import Any

from conftest import failure
from hypothesis import given
from hypothesis import strategies as st

from layercut.calibration import BuiltinCalibration
from layercut.conversations import Conversation
from layercut.documents import Passage, Tally
from layercut.errors import CalibrationError
from layercut.sampling import BUFFER, Encoded, RefusedConversation, samples, shuffled, windows


class Letters:
    """An encoder of one token a character. A conversation is `role:content;` for each message; `!` in it is refused."""

    def __init__(self, prefix: str = "", separator: str | None = "|") -> None:
        self.prefix, self._separator = by_character(prefix), separator

    @property
    def separator(self) -> int:
        if self._separator is None:
            raise CalibrationError("no separator")
        return ord(self._separator)

    def encode(self, text: str) -> list[int]:
        return [] if text == "silent" else by_character(text)

    def converse(self, conversation: Conversation, completions: bool) -> Encoded:
        ids: list[int] = []
        wanted: list[bool] = []
        for message in conversation:
            if "!" in message["content"]:
                raise RefusedConversation("it shouts")
            ids += by_character(f"{message['role'][0]}:{message['content']};")
            written = message["role"] == "assistant"
            wanted += [False, False, *[written] * (len(message["content"]) + 1)]
        return Encoded(ids, wanted if completions else None)


def by_character(text: str) -> list[int]:
    return [ord(character) for character in text]


def said(sample: Encoded) -> str:
    return "".join(chr(token) for token in sample.ids)


def answers(sample: Encoded) -> str:
    """What the assistant wrote."""
    assert sample.completion is not None and len(sample.completion) == len(sample.ids)
    return "".join(chr(token) for token, wanted in zip(sample.ids, sample.completion, strict=True) if wanted)


def cut(
    texts: list[Passage], longest: int, prefix: str = "", separator: str | None = "|", completions: bool = False, **settings: Any
) -> tuple[list[Encoded], Tally]:
    tally = Tally(read=len(texts))
    calibration = BuiltinCalibration(max_length=longest, **settings)
    return list(samples(iter(texts), Letters(prefix, separator), calibration, tally, completions)), tally


def strings(*arguments: Any, **settings: Any) -> list[str]:
    return [said(sample) for sample in cut(*arguments, **settings)[0]]


def fault(*arguments: Any, **settings: Any) -> str:
    return failure(CalibrationError, lambda: cut(*arguments, **settings))


def talk(*turns: str, place: str = "a:1") -> Passage:
    """The user begins."""
    roles = ("user", "assistant")
    return Passage(tuple({"role": roles[at % 2], "content": turn} for at, turn in enumerate(turns)), None, place)


# Apart


def test_a_document_is_a_sample() -> None:
    found, tally = cut([Passage("abcdef"), Passage("xy"), Passage("0123")], 4)
    assert [said(sample) for sample in found] == ["abcd", "xy", "0123"]
    assert [sample.completion for sample in found] == [None, None, None]
    assert tally == Tally(read=3, samples=3)


def test_a_running_text_is_cut_into_windows() -> None:
    # 10 characters in three parts: windows of 4 cross the parts, the rest of 2 is dropped
    assert strings([Passage("abc", "f"), Passage("defgh", "f"), Passage("ij", "f")], 4) == ["abcd", "efgh"]
    assert strings([Passage("abcdefgh", "f")], 4) == ["abcd", "efgh"]


def test_a_short_running_text_is_one_sample() -> None:
    assert strings([Passage("abc", "f")], 4) == ["abc"]


def test_running_texts_do_not_mix() -> None:
    texts = [Passage("abcdef", "f"), Passage("0123456", "g"), Passage("doc", None), Passage("xy", "h")]
    assert strings(texts, 4) == ["abcd", "0123", "doc", "xy"]


def test_the_prefix_counts() -> None:
    assert strings([Passage("abcdef"), Passage("uvwxyz", "f")], 4, "<") == ["<abc", "<uvw", "<xyz"]
    assert fault([Passage("a")], 2, "<>") == "max_length 2 leaves no room after 2 special tokens"


def test_short_documents_are_skipped_and_counted() -> None:
    texts = [Passage("abc"), Passage("ab"), Passage("silent"), Passage("abcdef"), Passage("x", "a.txt")]
    found, tally = cut(texts, 5, "<", min_length=4)
    assert [said(sample) for sample in found] == ["<abc", "<abcd"]
    assert tally == Tally(read=5, skipped={"too short": 2, "empty": 1}, samples=2)
    assert fault(texts, 5, min_length=6) == "min_length 6 is more than max_length 5"


# Conversations


def test_a_conversation_brings_its_own_special_tokens() -> None:
    found, tally = cut([talk("hi", "yes"), Passage("text")], 12, "<")
    assert [said(sample) for sample in found] == ["u:hi;a:yes;", "<text"]
    assert tally.skipped == {}


def test_what_the_assistant_wrote() -> None:
    found, _ = cut([talk("hi", "yes", "why", "so")], 50, completions=True)
    assert [answers(sample) for sample in found] == ["yes;so;"]
    found, _ = cut([talk("hi", "yes", "why", "so")], 9, completions=True)
    assert [(said(sample), answers(sample)) for sample in found] == [("u:hi;a:ye", "ye")]


def test_conversations_that_cannot_be_used_are_counted_by_reason() -> None:
    texts = [talk("hi", "yes"), talk("alone"), talk("a long question", "x"), talk("hi!", "x", place="a:4"), talk("hi!!", "x", place="a:5")]
    found, tally = cut(texts, 12, completions=True)
    assert [said(sample) for sample in found] == ["u:hi;a:yes;"]
    reasons = {"without an assistant turn": 1, "with the assistant turn beyond max_length": 1, "refused by the chat template": 2}
    assert tally == Tally(read=5, skipped=reasons, samples=1, example="a:4: it shouts")


def test_a_conversation_without_an_answer_is_text_when_answers_are_not_asked_for() -> None:
    assert strings([talk("alone"), talk("a long question", "x")], 12) == ["u:alone;", "u:a long que"]


# Packed


def test_packed_documents_are_joined_and_cut() -> None:
    texts = [Passage("abc"), Passage("defg"), Passage("silent"), Passage("h"), Passage("ij")]
    assert strings(texts, 5, packed=True) == ["abc|d", "efg|h"]  # "|ij" is dropped
    assert strings(texts, 6, "<", packed=True) == ["<abc|d", "<efg|h"]
    assert strings(texts, 99, packed=True) == ["abc|defg|h|ij"]


def test_parts_of_a_running_text_are_packed_without_a_token_between_them() -> None:
    texts = [Passage("ab", "f"), Passage("cd", "f"), Passage("ef", "g"), Passage("x"), Passage("y")]
    assert strings(texts, 99, packed=True) == ["abcd|ef|x|y"]


def test_packing_needs_a_token_between_documents() -> None:
    assert fault([Passage("a")], 4, separator=None, packed=True) == "no separator"
    assert strings([Passage("a")], 4, separator=None) == ["a"]


def test_packed_conversations_keep_what_the_assistant_wrote() -> None:
    texts = [talk("hi", "yes"), talk("you", "no")]
    found, _ = cut(texts, 12, separator=";", packed=True, completions=True)
    assert [said(sample) for sample in found] == ["u:hi;a:yes;u"]  # it ends with the separator already
    found, _ = cut(texts, 11, packed=True, completions=True)
    assert [(said(sample), answers(sample)) for sample in found] == [("u:hi;a:yes;", "yes;"), ("|u:you;a:no", "no")]
    found, _ = cut([*texts, Passage("text")], 13, packed=True, completions=True)
    assert [(said(sample), sample.completion is None) for sample in found] == [("u:hi;a:yes;|u", False), (":you;a:no;|te", True)]
    found, _ = cut([Passage("text"), *texts], 13, packed=True, completions=True)
    assert [(said(sample), sample.completion is None) for sample in found] == [("text|u:hi;a:y", True), ("es;|u:you;a:n", False)]


def test_a_window_that_begins_with_the_prefix_gets_no_second_one() -> None:
    assert strings([talk("a", "b")], 20, "u", packed=True) == ["u:a;a:b;"]
    assert strings([talk("a", "b")], 20, "<", packed=True) == ["<u:a;a:b;"]


def test_only_the_rest_of_a_packed_text_can_be_too_short() -> None:
    found, tally = cut([Passage("ab"), Passage("c")], 9, packed=True, min_length=5)
    assert (found, tally.skipped) == ([], {"too short": 1})


@given(st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=6), st.integers(2, 7))
def test_packed_windows_are_the_text(documents: list[str], size: int) -> None:
    found = strings([Passage(document) for document in documents], size, packed=True)
    whole = "|".join(documents)
    assert found == ([whole[at : at + size] for at in range(0, len(whole) - size + 1, size)] or [whole])


# Order


def test_a_shuffle_is_seeded_and_lazy() -> None:
    items = list(range(3 * BUFFER))
    assert list(shuffled(iter(items), None)) == items
    once, again, other = (list(shuffled(iter(items), seed)) for seed in (1, 1, 2))
    assert once == again
    assert sorted(once) == items
    assert len({tuple(order) for order in (items, once, other)}) == 3
    taken = iter(items)
    next(shuffled(taken, 1))
    assert next(taken) == BUFFER + 1


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=6), st.integers(1, 5))
def test_windows_are_the_text(parts: list[list[int]], size: int) -> None:
    text = [token for part in parts for token in part]
    found = list(windows(parts, size))
    full = len(text) // size
    if full:
        assert found == [text[at * size : (at + 1) * size] for at in range(full)]
    else:
        assert found == ([text] if text else [])
