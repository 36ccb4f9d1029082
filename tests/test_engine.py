"""The engine against plain loops over true boundary states, planted layers, refusals, and a real model.

The true states come without hooks: `output_hidden_states` of each sample alone and unpadded, with the final norm taken out.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import byte_tokenizer, chat_tokenizer, failure, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layercut import accumulators, encoding, engine, memory, schedules
from layercut.calibration import BuiltinCalibration, TextCalibration
from layercut.checkpoint import open_checkpoint
from layercut.engine import Running, measure
from layercut.errors import CalibrationError, CheckpointError, LayercutError, RefusedError
from layercut.loading import bos_prefix, layers_of, load_backbone, load_tokenizer, pick_device
from layercut.metrics import Angular, Cosine, Metric
from layercut.plan import Measurement, Table
from layercut.reading import Text
from layercut.resident import Resident

torch.set_num_threads(1)

KINDS = ("llama", "qwen3", "gpt2", "gemma3_text")
STACKS = {"llama": "model.layers.", "qwen3": "model.layers.", "gpt2": "transformer.h.", "gemma3_text": "model.layers."}
LONG = "The third one: 1, 2, 3 and so on, until it is longer than all others!"
TEXTS = ["a first text of some length", "short", LONG, "abc abc abc", "x y"]
METRICS: tuple[Metric, ...] = (Angular(), Cosine(), Angular(token="all"), Cosine(token=2), Cosine(token=-2))

Tiny = Callable[..., Path]


def jsonl(path: Path, texts: Sequence[str]) -> TextCalibration:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return TextCalibration(path=str(path), max_length=64)


def run(folders: dict[str, Path], metrics: Sequence[Metric], calibration: Any, depths: int = 6, **options: Any) -> Measurement:
    models = {alias: open_checkpoint(folder) for alias, folder in folders.items()}
    question = options.pop("question", None)
    return measure(Running(models, dict.fromkeys(models, depths), progress=False, **options), metrics, calibration, question)


def states_of(folder: Path, ids: list[int], dtype: str = "float32") -> list[list[list[float]]]:
    """True boundary states of one sample, [boundary][token][hidden], without hooks: the final norm is replaced by nothing."""
    model = load_backbone(folder, torch.device("cpu"), dtype)
    final = "ln_f" if hasattr(model, "ln_f") else "norm"
    setattr(model, final, nn.Identity())
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return [state[0].double().tolist() for state in output.hidden_states]


def distance(name: str, x: list[float], y: list[float]) -> float:
    dot, xx, yy = (math.fsum(a * b for a, b in zip(p, q, strict=True)) for p, q in ((x, y), (x, x), (y, y)))
    cosine = max(-1.0, min(1.0, dot / math.sqrt(xx * yy)))
    return math.acos(cosine) / math.pi if name == "angular" else 1 - cosine


def by_hand(metric: Metric, left: list[Any], right: list[Any]) -> tuple[list[list[float]], list[list[float]]]:
    """Mean and standard error by loops; `left` and `right` hold the states of each sample."""
    mean, stderr = [], []
    for i in range(len(left[0])):
        mean.append([0.0] * len(right[0]))
        stderr.append([0.0] * len(right[0]))
        for j in range(len(right[0])):
            sums, counts = [], []
            for a, b in zip(left, right, strict=True):
                length = len(a[0])
                tokens = range(length) if metric.token == "all" else [-1 if metric.token == "last" else metric.token]
                sums.append(sum(distance(metric.name, a[i][t], b[j][t]) for t in tokens))
                counts.append(len(tokens))
            mean[i][j] = sum(sums) / sum(counts)
            squares = sum((s - mean[i][j] * n) ** 2 for s, n in zip(sums, counts, strict=True))
            stderr[i][j] = math.sqrt(squares * len(sums) / (len(sums) - 1)) / sum(counts)
    return mean, stderr


def worst(table: Table, expected: tuple[list[list[float]], list[list[float]]]) -> float:
    assert len(table.mean) == len(expected[0])
    assert len(table.mean[0]) == len(expected[0][0])
    pairs = [*zip(table.mean, expected[0], strict=True), *zip(table.stderr, expected[1], strict=True)]
    return max(abs(a - b) for found, wanted in pairs for a, b in zip(found, wanted, strict=True))


def lists(table: Table) -> tuple[list[list[float]], list[list[float]]]:
    return [list(row) for row in table.mean], [list(row) for row in table.stderr]


def ids_of(folder: Path, texts: Sequence[str], prefix: Sequence[int] = ()) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    return [[*prefix, *tokenizer(text, add_special_tokens=False)["input_ids"]][:64] for text in texts]


# Correct values


@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_loops(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(kind)
    true = [states_of(folder, ids) for ids in ids_of(folder, TEXTS)]
    assert {len(sample[0]) for sample in true} == {27, 5, 64, 11, 3}  # so that batches are padded
    expected = {metric.label: by_hand(metric, true, true) for metric in METRICS}
    for size in (1, 8):  # without and with pads
        calibration = jsonl(tmp_path / "t.jsonl", TEXTS).model_copy(update={"batch_size": size})
        found = run({"m": folder}, METRICS, calibration, prefixes={"m": STACKS[kind]})
        assert [table.metric for table in found.tables] == ["angular[last]", "cosine[all]", "angular[all]", "cosine[2]", "cosine[-2]"]
        assert (found.samples, found.tokens) == (5, 110)
        for table in found.tables:
            assert worst(table, expected[table.metric]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_models(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(kind, dtype="bfloat16")
    calibration = jsonl(tmp_path / "t.jsonl", TEXTS[2:3] * 4).model_copy(update={"batch_size": 1})
    for dtype, native in ((None, "float32"), ("bfloat16", "bfloat16")):
        true = [states_of(folder, ids, native) for ids in ids_of(folder, TEXTS[2:3])]
        found = run({"m": folder}, [Cosine()], calibration, dtype=dtype)
        mean = by_hand(Cosine(), true * 2, true * 2)[0]
        assert worst(found.tables[0], (mean, [[0.0] * 7] * 7)) < 1e-5  # equal samples: no spread
        assert found.details["dtype"] == {"m": native}


def test_bf16_batches_with_pads(tiny: Tiny, tmp_path: Path) -> None:
    # Rounding to bf16 inside the model depends on the shape of the batch, so the true states come from the same batch.
    folder = tiny("llama", dtype="bfloat16")
    texts = [TEXTS[0], TEXTS[3]]
    ids = sorted(ids_of(folder, texts), key=len)
    width = max(map(len, ids))
    model = load_backbone(folder, pick_device("cpu"), "bfloat16")
    model.norm = nn.Identity()
    batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    with torch.no_grad():
        output = model(input_ids=batch, attention_mask=mask, output_hidden_states=True)
    true = [[state[row, : len(ids[row])].double().tolist() for state in output.hidden_states] for row in range(2)]
    found = run({"m": folder}, METRICS, jsonl(tmp_path / "t.jsonl", texts), dtype="bfloat16")
    for metric, table in zip(METRICS, found.tables, strict=True):
        assert worst(table, by_hand(metric, true, true)) < 1e-5


def test_running_text_is_measured_in_windows(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")
    text = "one two three four five six seven eight"  # 39 characters: windows of 16 and 16 tokens, 7 dropped
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    found = run({"m": folder}, [Cosine()], TextCalibration(path=str(tmp_path / "t.txt"), max_length=16))
    assert (found.samples, found.tokens) == (2, 32)
    whole = ids_of(folder, [text])[0]
    true = [states_of(folder, whole[:16]), states_of(folder, whole[16:32])]
    assert worst(found.tables[0], by_hand(Cosine(), true, true)) < 1e-5


def test_results_do_not_depend_on_the_batch_size(tiny: Tiny, tmp_path: Path) -> None:
    calibration = jsonl(tmp_path / "t.jsonl", [TEXTS[2][: 3 + 7 * number % 50] for number in range(90)])  # more than is read ahead
    runs = [run({"m": tiny("qwen3")}, METRICS, calibration.model_copy(update={"batch_size": size})) for size in (1, 3, 32, 90)]
    for other in runs[1:]:
        for table, reference in zip(other.tables, runs[0].tables, strict=True):
            assert worst(table, lists(reference)) < 1e-6
    assert run({"m": tiny("qwen3")}, METRICS, calibration) == run({"m": tiny("qwen3")}, METRICS, calibration)


@pytest.mark.parametrize("size", [4, 16])
def test_samples_of_similar_length_share_a_batch(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Sorted over eight batches, lengths of 4 to 63 leave about an eighth of their range in pads, whatever the size of a batch."""
    batches: list[list[int]] = []
    monkeypatch.setattr(Resident, "_run", lambda self, batch, accumulators: batches.append([len(sample.ids) for sample in batch]))
    texts = [LONG[: 4 + 37 * number % 60] for number in range(128)]
    with pytest.raises(CalibrationError, match="no sample has a token"):
        run({"m": tiny("llama")}, [Cosine()], jsonl(tmp_path / "t.jsonl", texts).model_copy(update={"batch_size": size}))
    assert sorted(length for batch in batches for length in batch) == sorted(map(len, texts))
    padded = sum(len(batch) * max(batch) for batch in batches)
    plain = sum(size * max(map(len, texts[at : at + size])) for at in range(0, len(texts), size))
    assert padded < 1.15 * sum(map(len, texts)) < 1.5 * sum(map(len, texts)) < plain


def test_small_chunks_give_the_same(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = jsonl(tmp_path / "t.jsonl", TEXTS)
    whole = run({"m": tiny("llama")}, METRICS, calibration)
    monkeypatch.setattr(accumulators, "CHUNK_BYTES", 8 * 7 * 32 * 3)  # three tokens at a time
    for table, reference in zip(run({"m": tiny("llama")}, METRICS, calibration).tables, whole.tables, strict=True):
        assert worst(table, lists(reference)) < 1e-12


def test_two_models_share_one_pass(tiny: Tiny, tmp_path: Path) -> None:
    a, b = tiny("llama"), tiny("qwen3", layers=4, seed=3)
    models = {"a": open_checkpoint(a), "b": open_checkpoint(b)}
    found = measure(Running(models, {"a": 6, "b": 4}, progress=False), [Angular(), Cosine()], jsonl(tmp_path / "t.jsonl", TEXTS))
    assert [(t.metric, t.a, t.b) for t in found.tables] == [
        (metric, *pair) for metric in ("angular[last]", "cosine[all]") for pair in (("a", "a"), ("a", "b"), ("b", "b"))
    ]
    true = {alias: [states_of(folder, ids) for ids in ids_of(a, TEXTS)] for alias, folder in (("a", a), ("b", b))}
    for table in found.tables:
        metric = Angular() if table.metric == "angular[last]" else Cosine()
        assert worst(table, by_hand(metric, true[table.a], true[table.b])) < 1e-5
    alone = run({"a": a}, [Cosine()], jsonl(tmp_path / "t.jsonl", TEXTS))
    assert worst(found.table("cosine[all]", "a", "a"), lists(alone.tables[0])) < 1e-9


def test_planted_layers_that_do_next_to_nothing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path / "m", "llama", layers=6)
    weights = load_file(folder / "model.safetensors")
    for layer in (2, 3):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{name}.weight"] *= 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for table in run({"m": folder}, [Angular(), Cosine(), Angular(token="all")], jsonl(tmp_path / "t.jsonl", TEXTS)).tables:
        near = {(i, j) for i in range(7) for j in range(i + 1, 7) if table.mean[i][j] < 2e-3}
        assert near == {(2, 3), (3, 4), (2, 4)}
        assert min(table.mean[i][j] for i in range(7) for j in range(i + 1, 7) if (i, j) not in near) > 1e-2
        assert max(table.mean[i][i] for i in range(7)) == 0.0


def test_layers_that_do_nothing_are_at_distance_zero(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path / "m", "llama", layers=6)
    weights = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.5.{name}.weight"] *= 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    table = run({"m": folder}, [Angular(token="all")], jsonl(tmp_path / "t.jsonl", TEXTS)).tables[0]
    assert table.mean[5][6] < 1e-7  # the last layer, before the final norm: the state is the same


# Conversations


CHATS = [["hi", "yes"], ["a longer question", "and an answer of some length", "more", "no"], ["x", "y"], ["why", "because it is so"]]


def chats(path: Path, talks: Sequence[Sequence[str]] = CHATS, **settings: Any) -> TextCalibration:
    rows = [{"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(talk)]} for talk in talks]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TextCalibration(path=str(path), **{"max_length": 160, **settings})


@pytest.mark.parametrize("free", [10**9, 300_000])
def test_completions_equal_plain_loops_in_both_schedules(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Over the words of the assistant and the token that ends its turn, and no other token; batches with pads."""
    tokenizer = chat_tokenizer()
    folder = with_tokenizer(tiny("llama"), tmp_path / "chat", tokenizer)
    samples, places = [], []
    for talk in CHATS:
        ids: list[int] = []
        mine: list[int] = []
        for turn, text in enumerate(talk):
            head, said = (
                tokenizer(part, add_special_tokens=False)["input_ids"]
                for part in (f"<|im_start|>{('user', 'assistant')[turn % 2]}\n", f"{text}<|im_end|>")
            )
            mine += range(len(ids) + len(head), len(ids) + len(head) + len(said)) if turn % 2 else ()
            ids += [*head, *said, head[-1]]  # a line ends as the head does
        samples.append(ids)
        places.append(mine)
    true = [states_of(folder, ids) for ids in samples]
    only = [[[state[at] for at in mine] for state in states] for states, mine in zip(true, places, strict=True)]
    monkeypatch.setattr(memory, "free_memory", lambda: {"memory": free})
    found = run({"m": folder}, [Cosine(token="completion"), Cosine()], chats(tmp_path / "c.jsonl", batch_size=3))
    assert found.details["schedule"].startswith("resident" if free == 10**9 else "streamed")
    assert found.tokens == sum(map(len, samples))
    assert worst(found.tables[0], by_hand(Cosine(), only, only)) < 1e-5
    assert worst(found.tables[1], by_hand(Cosine(), true, true)) < 1e-5


def test_plain_text_has_no_completions(tiny: Tiny, tmp_path: Path, spy: Spy) -> None:
    message = refused(CalibrationError, {"m": tiny("llama")}, [Cosine(token="completion")], jsonl(tmp_path / "t.jsonl", TEXTS))
    hint = "use conversations, or another token"
    assert message == f"metric cosine[completion] needs completions, but sample 0 is no conversation; {hint}"
    assert spy.model is None, "this is told before the model is loaded"


def test_two_models_read_a_conversation_alike(tiny: Tiny, tmp_path: Path) -> None:
    """The base model has no template: that of the chat model counts for both."""
    chat = with_tokenizer(tiny("llama"), tmp_path / "chat", chat_tokenizer())
    base = with_tokenizer(tiny("qwen3"), tmp_path / "base", chat_tokenizer(None))
    metric = Cosine(token="completion")
    both = run({"base": base, "chat": chat}, [metric], chats(tmp_path / "c.jsonl"))
    assert [(table.a, table.b) for table in both.tables] == [("base", "base"), ("base", "chat"), ("chat", "chat")]
    alone = run({"chat": chat}, [metric], chats(tmp_path / "c.jsonl"))
    assert worst(both.tables[2], lists(alone.tables[0])) < 1e-9
    plain = with_tokenizer(tiny("qwen3"), tmp_path / "plain", byte_tokenizer())
    message = refused(RefusedError, {"plain": plain, "chat": chat}, [metric], chats(tmp_path / "c.jsonl"))
    assert message.startswith("the tokenizers of 'plain' and 'chat' differ: token 0 of a text is ")


def test_packed_and_apart_are_two_measurements(tiny: Tiny, tmp_path: Path) -> None:
    calibration = jsonl(tmp_path / "t.jsonl", TEXTS).model_copy(update={"max_length": 16, "packed": True})
    found = run({"m": tiny("llama")}, [Cosine()], calibration)
    whole = [token for text in TEXTS for token in (*byte_tokenizer()(text)["input_ids"], 2)][:-1]
    true = [states_of(tiny("llama"), whole[at : at + 16]) for at in range(0, len(whole) - 15, 16)]
    assert (found.samples, found.tokens) == (len(true), 16 * len(true))
    assert worst(found.tables[0], by_hand(Cosine(), true, true)) < 1e-5


# One pass, and nothing left behind


class Spy:
    """Wraps `load_backbone`: counts forward passes and keeps the model to look at afterwards."""

    def __init__(self) -> None:
        self.model: Any = None
        self.forwards = 0
        self.layer_calls = 0
        self.on_forward: Callable[[], None] = lambda: None

    def __call__(self, folder: Path, device: torch.device, dtype: str | None = None) -> nn.Module:
        self.model = load_backbone(folder, device, dtype)
        inner, layer = self.model.forward, self.model.layers[3].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.forwards += 1
            self.on_forward()
            assert kwargs["use_cache"] is False
            output = inner(*args, **kwargs)
            assert "past_key_values" not in output
            return output

        def layer_forward(*args: Any, **kwargs: Any) -> Any:
            self.layer_calls += 1
            return layer(*args, **kwargs)

        self.model.forward, self.model.layers[3].forward = forward, layer_forward
        return cast(nn.Module, self.model)

    def attached(self) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules())


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    made = Spy()
    monkeypatch.setattr(schedules, "load_backbone", made)
    return made


def test_one_forward_a_batch_and_no_hook_stays(tiny: Tiny, tmp_path: Path, spy: Spy) -> None:
    calibration = jsonl(tmp_path / "t.jsonl", TEXTS * 4).model_copy(update={"batch_size": 6})
    assert run({"m": tiny("llama")}, METRICS, calibration).samples == 20
    assert spy.forwards == spy.layer_calls == 4  # 20 samples in batches of 6
    assert spy.attached() == 0
    assert not any("lm_head" in name for name, _ in spy.model.named_modules())


def test_no_hook_stays_after_an_error(tiny: Tiny, tmp_path: Path, spy: Spy) -> None:
    def fail() -> None:
        assert spy.attached() == 7  # six inputs and one output
        raise KeyboardInterrupt

    spy.on_forward = fail
    with pytest.raises(KeyboardInterrupt):
        run({"m": tiny("llama")}, METRICS, jsonl(tmp_path / "t.jsonl", TEXTS))
    assert spy.attached() == 0


def test_memory_does_not_grow_with_the_samples(tiny: Tiny, tmp_path: Path, spy: Spy) -> None:
    used: list[int] = []

    def resident() -> None:
        used.append(int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096)

    spy.on_forward = resident
    calibration = jsonl(tmp_path / "t.jsonl", TEXTS[2:3] * 800).model_copy(update={"samples": 800, "batch_size": 8})
    run({"m": tiny("llama")}, [Cosine()], calibration)
    assert len(used) == 100  # keeping the states would take 800 * 64 * 7 * 32 * 8 bytes = 92 MB
    assert max(used[50:]) - max(used[:25]) < 10_000_000


def test_transformers_and_warnings_are_put_back(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    run({"m": tiny("gpt2")}, [Cosine()], jsonl(tmp_path / "t.jsonl", TEXTS))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_stderr(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    models = {"m": open_checkpoint(tiny("llama"))}
    measure(Running(models, {"m": 6}), [Cosine()], jsonl(tmp_path / "t.jsonl", TEXTS))
    out, err = capfd.readouterr()
    assert out == ""
    assert "measuring" in err


# What the measurement says about itself


def test_details(tiny: Tiny, tmp_path: Path) -> None:
    import transformers

    calibration = jsonl(tmp_path / "t.jsonl", [*TEXTS, "", "  "]).model_copy(update={"samples": 16})
    found = run({"m": tiny("llama")}, [Cosine()], calibration)
    assert found.details == {
        "source": "text", "path": str(tmp_path / "t.jsonl"), "column": None, "samples": 16, "max_length": 64,
        "prompt": None, "completion": None, "min_length": 1, "packed": False, "seed": None,
        "documents_read": 7, "documents_skipped": {"empty": 2},
        "bos": "not added", "bos_policy": "auto", "prefix": [],
        "dtype": {"m": "float32"}, "device": "cpu", "schedule": "resident: 255.6 kB of weights in float32",
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    assert Measurement.model_validate_json(found.model_dump_json()) == found


def test_samples_are_limited(tiny: Tiny, tmp_path: Path) -> None:
    found = run({"m": tiny("llama")}, [Cosine()], jsonl(tmp_path / "t.jsonl", TEXTS).model_copy(update={"samples": 2}))
    assert (found.samples, found.tokens, found.details["documents_read"]) == (2, 27 + 5, 2)


def test_one_sample_has_no_spread(tiny: Tiny, tmp_path: Path) -> None:
    table = run({"m": tiny("llama")}, [Cosine()], jsonl(tmp_path / "t.jsonl", TEXTS[:1])).tables[0]
    assert {value for row in table.stderr for value in row} == {0.0}


def test_a_metric_given_twice_is_measured_once(tiny: Tiny, tmp_path: Path) -> None:
    found = run({"m": tiny("llama")}, [Cosine(), Cosine(token="all")], jsonl(tmp_path / "t.jsonl", TEXTS))
    assert len(found.tables) == 1


# Tokenizers


def with_tokenizer(folder: Path, target: Path, tokenizer: Any) -> Path:
    shutil.copytree(folder, target)
    tokenizer.save_pretrained(target)
    return target


def test_bos_policy(tiny: Tiny, tmp_path: Path) -> None:
    folder = with_tokenizer(tiny("llama"), tmp_path / "bos", byte_tokenizer(bos=True))
    calibration = jsonl(tmp_path / "t.jsonl", TEXTS)
    found = run({"m": folder}, [Cosine()], calibration)
    assert (found.details["bos"], found.details["prefix"], found.tokens) == ("added", ["<s>"], 110 + 4)  # one sample was full
    true = [states_of(folder, ids) for ids in ids_of(folder, TEXTS, [1])]
    assert worst(found.tables[0], by_hand(Cosine(), true, true)) < 1e-5
    without = run({"m": folder}, [Cosine()], calibration.model_copy(update={"bos": False}))
    assert (without.details["bos"], without.details["bos_policy"], without.tokens) == ("not added", False, 110)
    forced = run({"m": tiny("llama")}, [Cosine()], calibration.model_copy(update={"bos": True}))
    assert forced.tables == found.tables


def test_a_tokenizer_without_bos_and_pad(tiny: Tiny, tmp_path: Path) -> None:
    import transformers

    bare = cast(Any, transformers.PreTrainedTokenizerFast)(tokenizer_object=byte_tokenizer().backend_tokenizer)
    folder = with_tokenizer(tiny("gpt2"), tmp_path / "bare", bare)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token, tokenizer.bos_token) == (None, None)
    calibration = jsonl(tmp_path / "t.jsonl", TEXTS)
    assert run({"m": folder}, METRICS, calibration).tables == run({"m": tiny("gpt2")}, METRICS, calibration).tables
    with pytest.raises(CalibrationError) as caught:
        run({"m": folder}, METRICS, calibration.model_copy(update={"bos": True}))
    assert str(caught.value) == "bos is true, but the tokenizer has no BOS token; set bos: auto or bos: false"


def test_a_suffix_that_the_tokenizer_adds_is_left_out() -> None:
    import tokenizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert [bos_prefix(tokenizer, policy) for policy in ("auto", True, False)] == [[1], [1], []]


# Refusals


def refused(kind: type[LayercutError], *args: Any, **kwargs: Any) -> str:
    return failure(kind, lambda: run(*args, **kwargs))


def test_texts_that_are_too_short(tiny: Tiny, tmp_path: Path) -> None:
    calibration = jsonl(tmp_path / "t.jsonl", TEXTS)
    hint = "use longer texts or a token that all of them have"
    message = refused(CalibrationError, {"m": tiny("llama")}, [Cosine(token=7)], calibration)
    assert message == f"metric cosine[7] needs 8 tokens, but sample 4 has 3; {hint}"
    message = refused(CalibrationError, {"m": tiny("llama")}, [Cosine(token=-4)], calibration)
    assert message == f"metric cosine[-4] needs 4 tokens, but sample 4 has 3; {hint}"
    message = refused(CalibrationError, {"m": tiny("llama")}, [Cosine(token=64)], calibration)
    assert message == "metric cosine[64] needs 65 tokens, but max_length is 64; raise max_length"
    message = refused(CalibrationError, {"m": tiny("gpt2")}, [Cosine()], BuiltinCalibration())
    assert message == "model 'm' has 256 positions, but sample 0 has 512 tokens; set max_length to 256 or less"


def test_text_problems_come_before_the_model_is_loaded(tiny: Tiny, tmp_path: Path, spy: Spy) -> None:
    path = tmp_path / "none.txt"
    assert refused(CalibrationError, {"m": tiny("llama")}, [Cosine()], TextCalibration(path=str(path))) == f"{path}: no such file"
    assert spy.model is None


def test_text_without_tokens(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = jsonl(tmp_path / "t.jsonl", ["a"])
    monkeypatch.setattr(encoding, "encode", lambda tokenizer, text: [])
    assert refused(CalibrationError, {"m": tiny("llama")}, [Cosine()], calibration) == "the calibration text gives no tokens"


def poison(folder: Path, target: Path, name: str, value: float) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    weights[name][:] = value
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_the_run(tiny: Tiny, tmp_path: Path, value: float) -> None:
    folder = poison(tiny("llama"), tmp_path / "bad", "model.layers.3.mlp.down_proj.weight", value)
    calibration = jsonl(tmp_path / "t.jsonl", TEXTS)
    message = refused(CheckpointError, {"m": folder}, [Angular(), Cosine()], calibration)
    assert message == "the output of layer 3 of model 'm' is not finite on sample 4 (metric angular[last]); the weights are damaged"
    message = refused(CheckpointError, {"good": tiny("llama"), "bad": folder}, [Cosine()], calibration)
    assert message == "the output of layer 3 of model 'bad' is not finite on sample 4 (metric cosine[all]); the weights are damaged"


def test_embeddings_that_are_not_finite(tiny: Tiny, tmp_path: Path) -> None:
    folder = poison(tiny("llama"), tmp_path / "bad", "model.embed_tokens.weight", math.nan)
    message = refused(CheckpointError, {"m": folder}, [Cosine()], jsonl(tmp_path / "t.jsonl", TEXTS))
    assert message == "the embedding in model 'm' is not finite on sample 4 (metric cosine[all]); the weights are damaged"


def test_overflow_in_half_precision(tiny: Tiny, tmp_path: Path) -> None:
    folder = poison(tiny("llama"), tmp_path / "big", "model.layers.1.mlp.down_proj.weight", 6e4)
    calibration = jsonl(tmp_path / "t.jsonl", TEXTS)
    message = refused(CheckpointError, {"m": folder}, [Cosine()], calibration, dtype="float16")
    assert re.sub(r"sample \d", "sample N", message) == (
        "the output of layer 1 of model 'm' is not finite on sample N (metric cosine[all]); measure with dtype float32"
    )
    assert run({"m": folder}, [Cosine()], calibration).samples == 5


def test_models_of_different_sizes(tiny: Tiny, tmp_path: Path) -> None:
    models = {"a": tiny("llama"), "b": tiny("llama", hidden_size=48)}
    message = refused(RefusedError, models, [Cosine()], jsonl(tmp_path / "t.jsonl", TEXTS))
    assert message == "models 'a' and 'b' have hidden sizes 32 and 48; cosine[all] needs states of the same size"


def test_models_with_different_tokenizers(tiny: Tiny, tmp_path: Path) -> None:
    import tokenizers
    import transformers

    calibration = jsonl(tmp_path / "t.jsonl", ["hello"])
    vocabulary = byte_tokenizer().get_vocab()
    need = "distances between two models need the same tokens"

    def other(name: str, merges: list[tuple[str, str]], **changed: int) -> Path:
        core = tokenizers.Tokenizer(tokenizers.models.BPE({**vocabulary, **changed}, merges, unk_token="<unk>"))
        core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made = cast(Any, transformers.PreTrainedTokenizerFast)(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
        return with_tokenizer(tiny("llama"), tmp_path / name, made)

    message = refused(RefusedError, {"a": tiny("llama"), "b": other("swapped", [], A=36, B=35)}, [Cosine()], calibration)
    assert message == f"the tokenizers of 'a' and 'b' differ: token 'A' is 35 in 'a' and 36 in 'b'; {need}"
    message = refused(RefusedError, {"a": tiny("llama"), "b": other("merged", [("l", "l")], ll=99)}, [Cosine()], calibration)
    assert message == f"the tokenizers of 'a' and 'b' differ: token 2 of a text is 78 and 99; {need}"
    assert run({"a": tiny("llama"), "b": other("extra", [], zz=99)}, [Cosine()], calibration).samples == 1  # one more token does no harm
    bos = with_tokenizer(tiny("llama"), tmp_path / "bos", byte_tokenizer(bos=True))
    message = refused(RefusedError, {"a": tiny("llama"), "b": bos}, [Cosine()], calibration)
    assert message == "the tokenizers of 'a' and 'b' differ: samples start with [] in 'a' and ['<s>'] in 'b'; set bos: true or bos: false"


def test_tokens_without_embeddings(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama", vocab_size=64)
    message = refused(CheckpointError, {"m": folder}, [Cosine()], jsonl(tmp_path / "t.jsonl", ["az"]))
    assert message == "the tokenizer gives token 92, but model 'm' has 64 embeddings; the tokenizer belongs to another model"


def test_checkpoints_that_do_not_load(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    calibration = jsonl(tmp_path / "t.jsonl", TEXTS)
    missing = tmp_path / "missing"
    shutil.copytree(tiny("llama"), missing)
    weights = load_file(tiny("llama") / "model.safetensors")  # not of the file that is written: its bytes may be mapped
    dropped = {name: tensor for name, tensor in weights.items() if not name.startswith("model.layers.1.mlp.")}
    save_file(dropped, missing / "model.safetensors", {"format": "pt"})
    message = refused(CheckpointError, {"m": missing}, [Cosine()], calibration)
    assert message == f"{missing}: weights are missing: layers.1.mlp.down_proj.weight and 2 more"
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(5, 32)
    save_file(weights, missing / "model.safetensors", {"format": "pt"})
    message = refused(CheckpointError, {"m": missing}, [Cosine()], calibration)
    assert message == f"{missing}: layers.1.mlp.up_proj.weight has shape [5, 32], but config.json asks for [64, 32]"
    (missing / "tokenizer.json").unlink()
    assert refused(CheckpointError, {"m": missing}, [Cosine()], calibration).startswith(f"{missing}: no tokenizer can be loaded: ")
    unknown = tmp_path / "unknown"
    shutil.copytree(tiny("llama"), unknown)
    (unknown / "config.json").write_text('{"model_type": "nonesuch", "auto_map": {"AutoModel": "code.Model"}}', encoding="utf-8")
    (unknown / "code.py").write_text("raise SystemExit('code of a checkpoint was run')", encoding="utf-8")
    assert refused(CheckpointError, {"m": unknown}, [Cosine()], calibration).startswith(f"{unknown}: ")


def test_devices_and_dtypes(tiny: Tiny, tmp_path: Path) -> None:
    calibration = jsonl(tmp_path / "t.jsonl", TEXTS)
    message = refused(LayercutError, {"m": tiny("llama")}, [Cosine()], calibration, dtype="int8")
    assert message == "unknown dtype 'int8'; known are float32, bfloat16, float16, float64"
    message = refused(LayercutError, {"m": tiny("llama")}, [Cosine()], calibration, device="abacus")
    assert message.startswith("device 'abacus' cannot be used: ")


# Where the layers are


class Towers(nn.Module):
    def __init__(self, text: int, vision: int) -> None:
        super().__init__()
        self.vision_tower = nn.Module()
        self.vision_tower.encoder = nn.Module()
        self.vision_tower.encoder.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(vision))
        self.language_model = nn.Module()
        self.language_model.layers = nn.ModuleList(nn.ModuleList(nn.Linear(1, 1) for _ in range(text)) for _ in range(text))


def test_layers_by_prefix() -> None:
    model: Any = Towers(4, 4)
    for prefix in ("model.language_model.layers.", "language_model.model.layers.", "language_model.layers"):
        assert layers_of(model, 4, prefix) is model.language_model.layers
    assert layers_of(model, 4, "model.vision_tower.encoder.layers.") is model.vision_tower.encoder.layers
    assert layers_of(model, 4) is model.language_model.layers  # the outermost
    assert layers_of(Towers(3, 4), 3, "model.layers.") is not None  # lists inside of layers do not count


def test_layers_that_cannot_be_found() -> None:
    with pytest.raises(CheckpointError) as caught:
        layers_of(nn.Sequential(nn.ModuleList([nn.Linear(1, 1)])), 4)
    assert str(caught.value) == "Sequential has no list of 4 layers (lists: 0 (1))"
    twins = nn.ModuleDict({name: nn.ModuleList([nn.Linear(1, 1)]) for name in ("a", "b")})
    with pytest.raises(CheckpointError) as caught:
        layers_of(twins, 1)
    assert str(caught.value) == "ModuleDict has several lists of 1 layers: a, b"


# A real model


def test_smollm2_last_layer_is_measured_before_the_final_norm(smollm2: Path, tmp_path: Path) -> None:
    calibration = BuiltinCalibration(samples=2, max_length=96)
    found = run({"m": smollm2}, [Cosine(), Angular(token="all")], calibration, depths=30, prefixes={"m": "model.layers."})
    bi = [found.tables[0].mean[layer][layer + 1] for layer in range(30)]

    model: Any = load_backbone(smollm2, torch.device("cpu"))
    text = next(iter((Path(engine.__file__).parent / "data" / "calibration.txt").read_text(encoding="utf-8").splitlines()))
    ids = torch.tensor(load_tokenizer(smollm2)(text)["input_ids"][:192]).reshape(2, 96)
    with torch.no_grad():
        normed = model(input_ids=ids, output_hidden_states=True).hidden_states
        model.norm = nn.Identity()
        true = model(input_ids=ids, output_hidden_states=True).hidden_states

    def influence(before: torch.Tensor, after: torch.Tensor) -> float:
        return 1 - float(nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).mean())

    assert bi == pytest.approx([influence(true[layer], true[layer + 1]) for layer in range(30)], abs=1e-5)
    post_norm = influence(normed[29], normed[30])
    assert 0.1 < bi[29] < 0.5
    assert post_norm > 2 * bi[29]  # what tools see that read hidden_states[-1]
    assert min(range(30), key=bi.__getitem__) == 14
    angular = found.tables[1].mean
    best = {size: min((angular[start][start + size], start) for start in range(31 - size))[1] for size in (1, 3, 6)}
    assert best == {1: 14, 3: 13, 6: 13}


# Batches


def lengths(sizes: Sequence[int], size: int, alike: bool = False) -> list[list[int]]:
    text = Text([array("q", range(length)) for length in sizes], [None] * len(sizes))
    return [[len(sample.ids) for sample in batch] for batch in engine.batches(text, 0, len(sizes), size, alike)]


def test_batches_are_of_similar_length() -> None:
    assert lengths([9, 3, 5, 9, 4], 2) == [[3, 4], [5, 9], [9]]


def test_batches_of_one_length_where_pads_count() -> None:
    assert lengths([9, 3, 5, 9, 9, 5], 2, alike=True) == [[3], [5, 5], [9, 9], [9]]


def test_no_batch_has_as_many_samples_as_tokens() -> None:
    """Whether layers take samples or tokens first would show nowhere."""
    assert lengths([3, 3, 3, 4, 1], 3) == [[1], [3, 3], [3, 4]]
    assert lengths([2, 2, 2], 2) == [[2], [2], [2]]
    assert lengths([1], 1) == [[1]]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=30), st.integers(1, 7), st.booleans())
def test_batches_hold_every_sample_once(sizes: list[int], size: int, alike: bool) -> None:
    made = lengths(sizes, size, alike)
    assert sorted(length for batch in made for length in batch) == sorted(sizes)
    assert all(1 <= len(batch) <= size for batch in made)
    assert all(len(batch) != max(batch) or len(batch) == 1 for batch in made)
    assert not alike or all(len(set(batch)) == 1 for batch in made)
