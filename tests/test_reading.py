"""Reading, with real tokenizers: sources, shares, and the account that is given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, byte_tokenizer, chat_tokenizer, failure

from layercut.calibration import Calibration, MixCalibration, TextCalibration, TextPart
from layercut.encoding import SharedTokenizer
from layercut.errors import CalibrationError
from layercut.reading import Reading, read

BYTES = byte_tokenizer()


def rows(path: Path, values: Sequence[Any], column: str = "text") -> str:
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values), encoding="utf-8")
    return str(path)


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[at % 2], "content": turn} for at, turn in enumerate(turns)]


def reading(calibration: Calibration, tokenizer: Any = BYTES, completions: bool = False) -> Reading:
    return read(calibration, SharedTokenizer({"m": tokenizer}, calibration.bos), completions)


def said(found: Reading, tokenizer: Any = BYTES) -> list[str]:
    return [tokenizer.decode(ids.tolist()) for ids in found.text.ids]


def fault(*arguments: Any) -> str:
    return failure(CalibrationError, lambda: reading(*arguments))


def mix(tmp_path: Path, counts: Sequence[int], weights: Sequence[float], **settings: Any) -> MixCalibration:
    """Sources of documents a0, a1, ...; b0, b1, ..."""
    parts = [
        TextPart(path=rows(tmp_path / f"{name}.jsonl", [f"{name}{number}" for number in range(count)]), weight=weight)
        for name, count, weight in zip("abc", counts, weights, strict=False)
    ]
    return MixCalibration(of=tuple(parts), **settings)


# Mixes


def test_shares_are_exact_and_take_turns(tmp_path: Path) -> None:
    found = reading(mix(tmp_path, (9, 9), (2, 1), samples=6))
    assert said(found) == ["a0", "b0", "a1", "a2", "b1", "a3"]
    assert (list(found.owners), list(found.wanted)) == ([0, 1, 0, 0, 1, 0], [4, 2])


def test_a_source_that_ends_is_not_replaced(tmp_path: Path) -> None:
    found = reading(mix(tmp_path, (9, 1), (1, 1), samples=6))
    assert said(found) == ["a0", "b0", "a1", "a2"]
    path = str(tmp_path / "b.jsonl")
    assert found.account(4)["by_source"][1] == {
        "source": "text", "path": path, "column": None, "prompt": None, "completion": None, "weight": 1.0,
        "samples_wanted": 3, "samples_found": 1, "samples": 1, "tokens": 2, "documents_read": 1, "documents_skipped": {},
    }  # fmt: skip


def test_the_account_is_of_the_samples_that_were_used(tmp_path: Path) -> None:
    account = reading(mix(tmp_path, (9, 9), (2, 1), samples=6)).account(3)
    assert [(part["samples"], part["samples_found"], part["tokens"]) for part in account["by_source"]] == [(2, 4, 4), (1, 2, 2)]
    assert (account["documents_read"], account["documents_skipped"]) == (6, {})


def test_a_seed_shuffles_every_source_and_keeps_the_turns(tmp_path: Path) -> None:
    calibration = mix(tmp_path, (40, 40), (2, 1), samples=6, seed=3)
    found, again = (said(reading(calibration)) for _ in range(2))
    assert found == again != said(reading(calibration.model_copy(update={"seed": None})))
    assert [text[0] for text in found] == ["a", "b", "a", "a", "b", "a"]
    assert len(set(found)) == 6


def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    found = reading(mix(tmp_path, (500, 500), (1, 3), samples=8))
    assert [tally.read for tally in found.tallies] == [2, 6]


def test_a_source_that_gives_nothing_is_named(tmp_path: Path) -> None:
    found = fault(mix(tmp_path, (3, 2), (1, 1), samples=4, min_length=3))
    hint = "lower min_length or use longer texts"
    assert found == f"{tmp_path / 'a.jsonl'} gives no sample: of 3 documents 3 too short; {hint}"
    calibration = mix(tmp_path, (3, 2), (1, 1e-6), samples=2, max_length=4)
    assert said(reading(calibration)) == ["a0", "a1"]  # a share of nothing needs none


def test_one_source_that_gives_nothing(tmp_path: Path) -> None:
    calibration = TextCalibration(path=rows(tmp_path / "a.jsonl", ["a", "", "b"]), min_length=9)
    hint = "lower min_length or use longer texts"
    assert fault(calibration) == f"the calibration text gives no sample: of 3 documents 2 too short, 1 empty; {hint}"


# Conversations


def test_conversations_in_chatml(tmp_path: Path) -> None:
    calibration = TextCalibration(path=rows(tmp_path / "a.jsonl", [talk("hi", "yes")], "messages"))
    tokenizer = chat_tokenizer()
    found = reading(calibration, tokenizer, True)
    assert said(found, tokenizer)[0].replace("<unk>", "\n") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    (completion,) = found.text.completions
    assert completion is not None
    mine = [token for token, wanted in zip(found.text.ids[0], completion, strict=True) if wanted]
    assert tokenizer.decode(mine) == "yes<|im_end|>"
    assert list(found.text.sequences) == [found.text.ids[0], list(completion)]
    assert reading(calibration, tokenizer).text.completions == [None]


BOS = "{{ bos_token }}" + CHATML


@pytest.mark.parametrize(
    ("template", "policy", "starts", "told"),
    [
        (CHATML, "auto", False, "not added"),
        (CHATML, True, True, "added"),
        (CHATML, False, False, "not added"),
        (BOS, "auto", True, "added"),
        (BOS, True, True, "added"),
        (BOS, False, False, "not added"),
    ],
)
def test_bos_is_what_the_template_writes_unless_the_recipe_says_otherwise(
    tmp_path: Path, template: str, policy: Any, starts: bool, told: str
) -> None:
    calibration = TextCalibration(path=rows(tmp_path / "a.jsonl", [talk("hi", "yes")], "messages"), bos=policy)
    found = reading(calibration, chat_tokenizer(template), True)
    ids, completion = found.text.ids[0].tolist(), found.text.completions[0]
    assert (ids[0] == 1, ids.count(1)) == (starts, int(starts))
    assert completion is not None and len(completion) == len(ids)
    assert [token for token, wanted in zip(ids, completion, strict=True) if wanted] == [*BYTES("yes")["input_ids"], 100]
    assert (found.account(1)["bos"], found.account(1)["bos_policy"]) == (told, policy)


def test_text_and_conversations_may_start_differently(tmp_path: Path) -> None:
    paths = rows(tmp_path / "a.jsonl", ["x", "y", "z"]), rows(tmp_path / "b.jsonl", [talk("q", "a")], "messages")
    found = reading(MixCalibration(of=tuple(TextPart(path=path) for path in paths), samples=2), chat_tokenizer(BOS))
    assert found.account(2)["bos"] == "in 1 of 2 samples"


def test_prompts_and_completions(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "2+2?", "a": "4"}\n', encoding="utf-8")
    found = reading(TextCalibration(path=str(path), prompt="q", completion="a"), chat_tokenizer(), True)
    same = reading(TextCalibration(path=rows(tmp_path / "b.jsonl", [talk("2+2?", "4")], "messages")), chat_tokenizer(), True)
    assert found.text == same.text


def test_a_base_model_has_no_template(tmp_path: Path) -> None:
    calibration = TextCalibration(path=rows(tmp_path / "a.jsonl", [talk("hi", "yes")], "messages"))
    message = "the text holds conversations, but no chat template comes with the tokenizer of 'm'; "
    assert fault(calibration).startswith(message)


# Packed


def test_eos_stands_between_packed_documents_and_bos_before_each_sample(tmp_path: Path) -> None:
    calibration = TextCalibration(path=rows(tmp_path / "a.jsonl", ["abc", "de", "f"]), packed=True, max_length=5)
    assert said(reading(calibration)) == ["abc</s>d"]
    found = reading(calibration, byte_tokenizer(bos=True))
    assert said(found) == ["<s>abc</s>", "<s>de</s>f"]
    assert found.tallies[0].read == 3


def test_a_tokenizer_without_eos(tmp_path: Path) -> None:
    calibration = TextCalibration(path=rows(tmp_path / "a.jsonl", ["abc", "de"]), packed=True, max_length=5)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert said(reading(calibration, tokenizer)) == ["abc<s>d"]
    tokenizer.bos_token = tokenizer.pad_token = None
    message = "the tokenizer of 'm' has neither EOS nor BOS to stand between packed documents; leave out packed"
    assert fault(calibration, tokenizer) == message
    assert said(reading(calibration.model_copy(update={"packed": False}), tokenizer)) == ["abc", "de"]
