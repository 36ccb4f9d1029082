"""One encoding for several models, with tokenizers that are made up. Real ones are in test_engine."""

from __future__ import annotations

from typing import Literal

import pytest
from conftest import CHATML, byte_tokenizer, chat_tokenizer

from layercut.encoding import SharedTokenizer
from layercut.errors import CalibrationError, RefusedError


class Letters:
    """A tokenizer of one token a letter, with neither pad nor BOS."""

    bos_token_id = None

    def __init__(self, letters: str, drop: str = "") -> None:
        self.letters, self.drop = letters, drop

    def get_vocab(self) -> dict[str, int]:
        return {letter: at for at, letter in enumerate(self.letters)}

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [self.letters.index(letter) for letter in text if letter not in self.drop]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.letters[at] for at in ids]


def test_one_tokenizer() -> None:
    shared = SharedTokenizer({"m": Letters("abc")}, "auto")
    assert (shared.prefix, shared.encode("cab"), shared.encode(""), shared.tokens([2, 0])) == ([], [2, 0, 1], [], ["c", "a"])


def test_two_that_agree() -> None:
    shared = SharedTokenizer({"m": Letters("abc"), "n": Letters("abcd")}, "auto")
    assert shared.encode("cab") == [2, 0, 1]


def test_bos_where_there_is_none() -> None:
    with pytest.raises(CalibrationError) as caught:
        SharedTokenizer({"m": Letters("abc")}, True)
    assert str(caught.value) == "bos is true, but the tokenizer has no BOS token; set bos: auto or bos: false"
    assert SharedTokenizer({"m": byte_tokenizer()}, True).prefix == [1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Letters("acb"), "token 'b' is 1 in 'm' and 2 in 'n'"),
        (Letters("abc", drop="a"), "token 1 of a text is 0 and 1"),
        (Letters("abc", drop="b"), "token 2 of a text is 1 and the end"),
    ],
)
def test_two_that_differ(other: Letters, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        SharedTokenizer({"m": Letters("abc"), "n": other}, False).encode("cab")
    assert str(caught.value) == f"the tokenizers of 'm' and 'n' differ: {message}; distances between two models need the same tokens"


TALK = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"})


def test_the_token_between_packed_documents() -> None:
    tokenizer = byte_tokenizer()
    assert SharedTokenizer({"m": tokenizer}, "auto").separator == 2
    tokenizer.eos_token = None
    assert SharedTokenizer({"m": tokenizer}, "auto").separator == 1


def test_a_conversation_is_read_alike_by_several_models() -> None:
    """With the template of the first that has one."""
    base, chat = chat_tokenizer(None), chat_tokenizer(CHATML)
    alone, both = SharedTokenizer({"chat": chat}, "auto"), SharedTokenizer({"base": base, "chat": chat}, "auto")
    found = both.converse(TALK, True)
    assert found == alone.converse(TALK, True)
    assert found.completion is not None
    assert both.tokens([token for token, mine in zip(found.ids, found.completion, strict=True) if mine]) == ["y", "e", "s", "<|im_end|>"]
    assert both.converse(TALK, False) == (found.ids, None)


def test_models_that_read_a_conversation_differently() -> None:
    with pytest.raises(RefusedError, match="the tokenizers of 'plain' and 'chat' differ: token 0 of a text is "):
        SharedTokenizer({"plain": byte_tokenizer(), "chat": chat_tokenizer()}, "auto").converse(TALK, False)


@pytest.mark.parametrize(
    ("policy", "template", "starts"), [(True, CHATML, 1), (False, "{{ bos_token }}" + CHATML, 99), ("auto", CHATML, 99)]
)
def test_bos_of_a_conversation(policy: bool | Literal["auto"], template: str, starts: int) -> None:
    found = SharedTokenizer({"m": chat_tokenizer(template)}, policy).converse(TALK, True)
    assert found.ids[0] == starts
    assert found.completion is not None and len(found.completion) == len(found.ids)
    assert [token for token, mine in zip(found.ids, found.completion, strict=True) if mine][-1] == 100
