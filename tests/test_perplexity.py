"""Perplexity against plain loops over windows and against the loss of transformers; greedy text against an argmax loop."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CHATML, byte_tokenizer, chat_tokenizer, failure

from layercut import memory
from layercut import perplexity as module
from layercut.calibration import BuiltinCalibration, TextCalibration
from layercut.errors import CalibrationError, CheckpointError
from layercut.loading import load_causal_lm, load_tokenizer
from layercut.perplexity import LanguageModel, Perplexity, generate, perplexity

torch.set_num_threads(1)

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again and again. " * 5
Tiny = Callable[..., Path]


def running(path: Path, text: str = TEXT, **settings: Any) -> TextCalibration:
    path.write_text(text, encoding="utf-8")
    return TextCalibration(path=str(path), **{"max_length": 32, **settings})


def by_hand(folder: Path, windows: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Mean negative log-likelihood by loops: one window at a time, one token at a time."""
    model = load_causal_lm(folder, torch.device("cpu"))
    total, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double().tolist()
        for at in range(1, len(window)):
            top = max(logits[at - 1])
            total += top + math.log(math.fsum(math.exp(x - top) for x in logits[at - 1])) - logits[at - 1][window[at]]
            count += 1
    return total / count, count


def ids_of(folder: Path, text: str) -> list[int]:
    ids: list[int] = load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"]
    return ids


def message(call: Callable[[], object], kind: type[Exception] = CalibrationError) -> str:
    return failure(kind, call)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_equals_a_plain_loop(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(kind)
    ids = ids_of(folder, TEXT)
    windows = [ids[at : at + 32] for at in range(0, len(ids) - 31, 32)]
    assert len(ids) == 410  # 12 windows, 26 tokens dropped
    nll, tokens = by_hand(folder, windows)
    for size in (1, 5, 8):
        found = perplexity(folder, running(tmp_path / "t.txt", batch_size=size), progress=False)
        assert found.nll == pytest.approx(nll, abs=1e-5)
        assert found.value == math.exp(found.nll)
        assert (found.windows, found.tokens, found.max_length) == (12, 12 * 31, 32) == (len(windows), tokens, 32)
        assert (found.dtype, found.source) == ("float32", str(tmp_path / "t.txt"))


def test_equals_the_loss_of_transformers(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")
    found = perplexity(folder, running(tmp_path / "t.txt", max_length=64), progress=False)
    model = load_causal_lm(folder, torch.device("cpu"))
    ids = torch.tensor(ids_of(folder, TEXT)[: 6 * 64]).reshape(6, 64)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    assert found.value == pytest.approx(math.exp(sum(losses) / 6), rel=1e-5)


def test_chunks_and_small_batches_give_the_same(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny("llama"))
    calibration = running(tmp_path / "t.txt")
    whole = model.perplexity(calibration, progress=False)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 128 * 5)  # five rows of logits
    monkeypatch.setattr(module, "LOGIT_BYTES", 1)  # one window
    rows: list[int] = []
    inner = model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        return inner(*args, **kwargs)

    model.model.forward = forward
    assert model.perplexity(calibration, progress=False).nll == pytest.approx(whole.nll, abs=1e-6)
    assert rows == [1] * 12


def test_samples_limit_the_windows(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")
    found = perplexity(folder, running(tmp_path / "t.txt", samples=3), progress=False)
    ids = ids_of(folder, TEXT)
    assert found.windows == 3
    assert found.nll == pytest.approx(by_hand(folder, [ids[0:32], ids[32:64], ids[64:96]])[0], abs=1e-5)


def test_a_short_text_is_one_window(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")
    found = perplexity(folder, running(tmp_path / "t.txt", "eight ch"), progress=False)
    assert (found.windows, found.tokens) == (1, 7)
    assert found.nll == pytest.approx(by_hand(folder, [ids_of(folder, "eight ch")])[0], abs=1e-5)


def test_each_window_starts_with_bos(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "bos"
    shutil.copytree(tiny("llama"), folder)
    byte_tokenizer(bos=True).save_pretrained(folder)
    ids = ids_of(folder, TEXT)
    windows = [[1, *ids[at : at + 31]] for at in range(0, len(ids) - 30, 31)]
    found = perplexity(folder, running(tmp_path / "t.txt"), progress=False)
    assert (found.windows, found.tokens) == (13, 13 * 31)  # every token of the text is predicted
    assert found.nll == pytest.approx(by_hand(folder, windows)[0], abs=1e-5)
    without = perplexity(folder, running(tmp_path / "t.txt", bos=False), progress=False)
    assert without.nll == pytest.approx(perplexity(tiny("llama"), running(tmp_path / "t.txt"), progress=False).nll, abs=1e-7)


def test_documents_are_joined_by_a_blank_line(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one document", "", "and another one", "x")), encoding="utf-8")
    found = perplexity(folder, TextCalibration(path=str(path), max_length=16), progress=False)
    ids = ids_of(folder, "one document\n\nand another one\n\nx")
    assert found.windows == len(ids) // 16 == 2
    assert found.nll == pytest.approx(by_hand(folder, [ids[:16], ids[16:32]])[0], abs=1e-5)


def test_conversations_are_text_as_the_chat_template_writes_them(tiny: Tiny, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHATML)
    folder = tmp_path / "chat"
    shutil.copytree(tiny("llama"), folder)
    tokenizer.save_pretrained(folder)
    talks = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}] for said in ("yes", "no")]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in (talks[0], talks[0] * 2, talks[1])), encoding="utf-8")
    found = perplexity(folder, TextCalibration(path=str(path), max_length=25), progress=False)
    text = "\n\n".join(tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.windows == len(ids) // 25 == 2
    assert found.nll == pytest.approx(by_hand(folder, [ids[:25], ids[25:50]])[0], abs=1e-5)
    assert found.source == str(path)


def test_the_built_in_text_is_the_held_out_part(tiny: Tiny) -> None:
    folder = tiny("llama")
    found = perplexity(folder, BuiltinCalibration(samples=2, max_length=64), progress=False)
    text = (Path(module.__file__).parent / "data" / "held_out.txt").read_text(encoding="utf-8")
    ids = ids_of(folder, text[:200])
    assert found.nll == pytest.approx(by_hand(folder, [ids[:64], ids[64:128]])[0], abs=1e-5)
    assert found.source == "builtin"


def test_bf16_runs_in_float32_on_the_cpu_unless_asked(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama", dtype="bfloat16")
    calibration = running(tmp_path / "t.txt")
    exact = perplexity(folder, calibration, progress=False)
    ids = ids_of(folder, TEXT)
    assert exact.dtype == "float32"
    assert exact.nll == pytest.approx(by_hand(folder, [ids[at : at + 32] for at in range(0, len(ids) - 31, 32)])[0], abs=1e-5)
    rough = perplexity(folder, calibration, dtype="bfloat16", progress=False)
    assert rough.dtype == "bfloat16"
    assert 0 < abs(rough.nll - exact.nll) < 0.02


def test_generate_is_greedy(tiny: Tiny, tmp_path: Path) -> None:
    for kind in ("llama", "gpt2"):
        model = LanguageModel(tiny(kind))
        ids = ids_of(tiny(kind), "Once upon")
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        expected = model.tokenizer.decode(ids[9:], skip_special_tokens=True)
        assert model.generate("Once upon", tokens=12) == expected
        assert generate(tiny(kind), "Once upon", 12) == expected


def test_generate_ignores_how_the_checkpoint_wants_to_sample(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny("llama"), folder)
    settings = {"do_sample": True, "temperature": 5.0, "num_beams": 4, "repetition_penalty": 9.0, "eos_token_id": 2, "max_length": 5}
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    plain = LanguageModel(tiny("llama")).generate("Once upon", tokens=12)
    model = LanguageModel(folder)
    capfd.readouterr()
    assert model.generate("Once upon", tokens=12) == plain
    assert model.model.generation_config.num_beams == 4
    assert capfd.readouterr() == ("", "")


def test_one_loaded_model_serves_both(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Path] = []

    def load(folder: Path, *rest: Any) -> Any:
        loads.append(folder)
        return load_causal_lm(folder, *rest)

    monkeypatch.setattr(module, "load_causal_lm", load)
    model = LanguageModel(tiny("llama"))
    before = model.perplexity(running(tmp_path / "t.txt"), progress=False)
    model.generate("abc", tokens=3)
    assert model.perplexity(running(tmp_path / "t.txt"), progress=False) == before
    assert loads == [tiny("llama")]


def test_record_round_trip(tiny: Tiny, tmp_path: Path) -> None:
    found = perplexity(tiny("llama"), running(tmp_path / "t.txt", samples=1), progress=False)
    assert Perplexity.model_validate_json(found.model_dump_json()) == found


def test_progress_goes_to_stderr(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = LanguageModel(tiny("llama"))
    capfd.readouterr()
    model.perplexity(running(tmp_path / "t.txt"), progress=False)
    assert capfd.readouterr() == ("", "")
    model.perplexity(running(tmp_path / "t.txt"))
    out, err = capfd.readouterr()
    assert out == ""
    assert "perplexity" in err


def test_messages(tiny: Tiny, tmp_path: Path) -> None:
    model = LanguageModel(tiny("llama"))
    path = tmp_path / "t.txt"
    assert message(lambda: model.perplexity(running(path, "x"), progress=False)) == f"{path}: the text gives no tokens to predict"
    found = message(lambda: model.perplexity(running(path, max_length=300), progress=False))
    assert found == f"{model.folder}: the model has 256 positions, but a window has 300 tokens; set max_length to 256 or less"
    assert message(lambda: model.generate("")) == "the prompt gives no tokens"
    none = TextCalibration(path=str(tmp_path / "no.txt"))
    assert message(lambda: model.perplexity(none, progress=False)) == f"{none.path}: no such file"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(tiny: Tiny, tmp_path: Path, value: float) -> None:
    model = LanguageModel(tiny("llama"))
    with torch.no_grad():
        model.model.lm_head.weight[:] = value
    found = message(lambda: model.perplexity(running(tmp_path / "t.txt"), progress=False), CheckpointError)
    assert found == f"{model.folder}: the loss is not finite (nan)"


def test_a_head_that_is_missing(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "headless"
    shutil.copytree(tiny("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert message(lambda: LanguageModel(folder), CheckpointError) == f"{folder}: weights are missing: lm_head.weight"


# A model that does not fit


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no memory for any model."""
    monkeypatch.setattr(memory, "free_memory", lambda: {"memory": 1000})


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_layer_by_layer_the_numbers_are_the_same(tiny: Tiny, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = running(tmp_path / "t.txt", batch_size=2)
    whole = LanguageModel(tiny(kind))
    expected, written = whole.perplexity(text, progress=False), whole.generate("Once upon", tokens=6)
    assert whole._streamed is None
    monkeypatch.setattr(memory, "free_memory", lambda: {"memory": 1000})
    streamed = LanguageModel(tiny(kind))
    assert streamed._streamed is not None and all(part.is_meta for part in streamed.model.parameters())
    found = streamed.perplexity(text, progress=False)
    assert found.nll == pytest.approx(expected.nll, rel=1e-5) and found.value == pytest.approx(expected.value, rel=1e-5)
    assert found.model_copy(update={"nll": 0, "value": 0}) == expected.model_copy(update={"nll": 0, "value": 0})
    assert streamed.generate("Once upon", tokens=6) == written
    assert perplexity(tiny(kind), text, progress=False) == found


def test_streamed_text_ends_where_the_model_ends_it(tiny: Tiny, little: None) -> None:
    model = LanguageModel(tiny("llama"))
    tokens = iter([40, 41, 2, 43])
    model._streamed = model._streamed and _Told(model._streamed, tokens)  # type: ignore[assignment]
    assert model.generate("Once", tokens=9) == model.tokenizer.decode([40, 41])
    assert next(tokens) == 43, "nothing was asked after the end"


class _Told:
    """A model that says what it is told to."""

    def __init__(self, streamed: Any, tokens: Any) -> None:
        self.model, self._tokens = streamed.model, tokens

    def next(self, ids: list[int]) -> int:
        return int(next(self._tokens))


def test_a_model_without_a_finite_loss_layer_by_layer(tiny: Tiny, tmp_path: Path, little: None) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    found = message(lambda: LanguageModel(tmp_path / "m").perplexity(running(tmp_path / "t.txt"), progress=False), CheckpointError)
    assert found == f"{tmp_path / 'm'}: the loss is not finite (nan)"


def test_less_memory_than_a_part_of_the_model_takes(tiny: Tiny) -> None:
    found = message(lambda: LanguageModel(tiny("llama"), memory=1))
    assert found.startswith(f"model '{tiny('llama')}' takes ") and found.endswith("(1 bytes as asked); give more with --memory")
