from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_canvas import read
from test_end_to_end import reloaded

from layercut.errors import CalibrationError, CheckpointError, LayercutError, OutputError, RefusedError
from layercut.metrics import Cosine
from layercut.short_transformers import ShortTransformer
from layercut.short_transformers.dist import (
    Distance,
    angular_distance_all_tokens,
    angular_distance_last_token,
    bi_score,
    get_angular_distance_ith_token,
    get_euclidian_dist_ith_token,
    get_linear_approximation_ith_token,
    relative_magnitude,
)
from layercut.short_transformers.utils import draw_diagram, get_best_pruning_start, get_scored_blocks

ROWS = [
    {"text": "the quick brown fox jumps over the lazy dog"},
    {"text": "one two three four"},
    {"text": "a longer line of words, then more"},
]

# The two examples of the README of short-transformers 1.0.0 (MIT licence), word for word but for `short_mdoel`, which is no name there.
QUICKSTART = """
from short_transformers import ShortTransformer
from datasets import load_dataset

# load from path/hf_hub
model = ShortTransformer.from_pretrained(model_name)

# or use hf model
# model = ShortTransformer.from_model(hf_model)

# load hf dataset
dataset = load_dataset("allenai/c4", "en", split="validation", streaming=True)

# remove 5 layers, use the dataset to find the least important layers to remove
short_model = model.remove_layers(block_size=5, dataset=dataset, limit=1000)

# continue training to heal after the cut
# ...

# save as hf model
short_model.save_pretrained(output_path)
"""
STEPS = """
from datasets import load_dataset
from short_transformers import ShortTransformer
from short_transformers.utils import (
    draw_diagram,
    get_scored_blocks,
    get_best_pruning_start,
)
# load from path/hf_hub
model_name = "meta-llama/Meta-Llama-3-8B"

model = ShortTransformer.from_pretrained(model_name, device_map="auto")

dataset = load_dataset("allenai/c4", "en", split="validation", streaming=True)

# calculate distances between inputs/outputs from/to model layers
# results in a triangular numpy array of shape (layer_count, layer_count)
# results[x, y] - averaged distances for block of size x starting at layer y
results = model.analyse_layers(
    dataset=dataset,
    tokenizer=tokenizer,
    use_chat_template=False,
    key="text",
    limit=100,
    max_length=1000,
)

# draw results
# diagrams style matches the style of original article
# "The Unreasonable Ineffectiveness of the Deeper Layers"
draw_diagram(results, "results.png", title="Meta-Llama-3-8B", normalized=True)

# find optimial block of size 'block_size' to prune
start_layer = get_best_pruning_start(results, block_size=5)

# evaluate all possibe block sizes to prune,
# for each block returns score 0-1
# which is averaged over samples distance between input and output to/from a block
block_score = get_scored_blocks(results, return_md=True, threshold=0.3)

# prune 5-layers block
model.prune(start_layer=start_layer, block_size=5)

# save the pruned model
model.save_pretrained("model_output_dir")

from short_transformers.dist import get_angular_distance_ith_token

# choose metric
# calculate distances based on the angular distance of the i=0 token
model.set_metric(get_angular_distance_ith_token(i=0))

# load dataset ...

results = model.analyse_layers(
    dataset=dataset,
    tokenizer=tokenizer,
    key="text",
    limit=1,
    max_length=1000,
)
"""


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Any:
    return ShortTransformer.from_pretrained(tiny("llama"))


def hooks(model: Any) -> list[str]:
    """Everything that is attached to a module of the model."""
    found = []
    for name, module in model.named_modules():
        attached = [value for key, value in vars(module).items() if key.endswith("_hooks") and value]
        found += [name] * (len(attached) + ("forward" in vars(module)))
    return found


# The documented examples


def run(example: str, smollm2: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, **names: Any) -> dict[str, Any]:
    """An example with the package's name changed in the imports, on a local data set in place of C4 and a local model."""
    import datasets

    texts = [" ".join(f"word{number} and {number * line}" for number in range(12)) for line in range(1, 5)]
    (folder / "c4.jsonl").write_text("".join(json.dumps({"text": text, "url": ""}) + "\n" for text in texts))
    load = datasets.load_dataset

    def local(*arguments: Any, **keywords: Any) -> Any:
        assert (arguments, keywords) == (("allenai/c4", "en"), {"split": "validation", "streaming": True})
        return load("json", data_files=str(folder / "c4.jsonl"), split="train", streaming=True, cache_dir=str(folder / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.chdir(folder)
    code = example.replace("from short_transformers", "from layercut.short_transformers")
    exec(compile(code.replace("meta-llama/Meta-Llama-3-8B", str(smollm2), 1), "README", "exec"), names)
    return names


def test_the_quickstart_of_the_readme(smollm2: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = run(QUICKSTART, smollm2, monkeypatch, tmp_path, model_name=str(smollm2), output_path=str(tmp_path / "out"))
    assert names["short_model"] is names["model"] and names["model"].layer_count == 25
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(saved) is transformers.LlamaForCausalLM and saved.config.num_hidden_layers == 25
    ids = torch.arange(40, 60)[None]
    assert torch.equal(saved(ids).logits, names["model"].eval()(ids).logits)


def test_pruning_in_steps_of_the_readme(smollm2: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    calls = count_forwards(monkeypatch)
    names = run(STEPS, smollm2, monkeypatch, tmp_path, tokenizer=tokenizer)
    assert calls == {"layers": 30 * 4 + 25}, "each layer once a row, then those that stay once"
    assert hooks(names["model"]) == []
    assert names["block_score"].startswith("| Block_size | Removed_layers | Score (avg dist)|\n| -------- | ------- | -------- |\n| 1 | ")
    assert read((tmp_path / "results.png").read_bytes()).width > 700
    assert names["results"].shape == (25, 25)
    ids = torch.arange(40, 60)[None]
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model_output_dir").eval()
    assert torch.equal(saved(ids).logits, names["model"].eval()(ids).logits)
    assert names["model"].generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 23)
    assert calls["layers"] == 30 * 4 + 25 + 2 * 25 + 3 * 25, "a later forward runs every layer once and nothing else"


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the forwards of all Llama layers from now on."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    calls = {"layers": 0}
    plain = LlamaDecoderLayer.forward

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        calls["layers"] += 1
        return plain(self, *arguments, **keywords)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    return calls


# Results


def states(model: Any, text: str) -> list[Any]:
    """The states at all boundaries of one text, by transformers; the last one, which it norms, from a hook."""
    ids = byte_tokenizer()(text, return_tensors="pt")["input_ids"]
    last = []
    handle = model.model.layers[-1].register_forward_hook(lambda module, given, output: last.append(output))
    with torch.inference_mode():
        found = list(model(ids, output_hidden_states=True).hidden_states[:-1])
    handle.remove()
    return [state.double() for state in (*found, last[0])]


def angle(a: Any, b: Any) -> float:
    return math.acos(float(torch.nn.functional.cosine_similarity(a, b, dim=0))) / math.pi


def cell(function: Callable[[Any, Any], float], pair: tuple[Any, Any]) -> float:
    """Mean of a function of two states over the tokens of a sample."""
    return float(numpy.mean([function(a, b) for a, b in zip(pair[0][0], pair[1][0], strict=True)]))


ORACLES: list[tuple[Any, Callable[[Any, Any], float]]] = [
    (angular_distance_last_token, lambda a, b: angle(a[0, -1], b[0, -1])),
    (get_angular_distance_ith_token(2), lambda a, b: angle(a[0, 2], b[0, 2])),
    (get_euclidian_dist_ith_token(-2), lambda a, b: float((a[0, -2] - b[0, -2]).norm())),
    (angular_distance_all_tokens, lambda a, b: cell(angle, (a, b))),
    (bi_score, lambda a, b: cell(lambda x, y: 1 - float(x @ y / x.norm() / y.norm()), (a, b))),
    (relative_magnitude, lambda a, b: cell(lambda x, y: float((y - x).norm() / y.norm()), (a, b))),
]


@pytest.mark.parametrize(("distance", "oracle"), ORACLES)
def test_results_are_those_of_plain_loops(distance: Any, oracle: Callable[[Any, Any], float], model: Any) -> None:
    """Row n is block size n, whatever the batch. A metric over all tokens is a mean over tokens, not over rows."""
    model.set_metric(distance)
    found = model.analyse_layers(ROWS, limit=9)
    every = [states(model, row["text"]) for row in ROWS]
    weights = [len(sample[0][0]) if distance.metric.token == "all" else 1 for sample in every]
    for size in range(1, 6):
        for start in range(6 - size + 1):
            expected = numpy.average([oracle(sample[start], sample[start + size]) for sample in every], weights=weights)
            assert found[size, start] == pytest.approx(expected, abs=1e-6)
    assert found.shape == (6, 6) and found.dtype == numpy.float64
    assert not found[0].any() and not any(found[size, start] for size in range(6) for start in range(6) if start + size > 6)
    assert model.analyse_layers(ROWS, limit=9, batch_size=2) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize(("distance", "oracle"), ORACLES)
def test_distances_can_be_called(distance: Any, oracle: Callable[[Any, Any], float]) -> None:
    torch.manual_seed(0)
    pair = torch.randn(1, 5, 8).double(), torch.randn(1, 5, 8).double()
    assert distance(*pair) == pytest.approx(oracle(*pair), abs=1e-9)
    batch = [torch.cat([state, state]) for state in pair]
    assert distance(*batch) == pytest.approx(oracle(*pair), abs=1e-9)
    assert distance(pair[0], pair[0]) == pytest.approx(0, abs=1e-7)


def test_other_tokens_can_be_named() -> None:
    torch.manual_seed(0)
    pair = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    assert Distance(Cosine(token="skip-first-2"))(*pair) == bi_score(pair[0][:, 2:], pair[1][:, 2:])
    with pytest.raises(CalibrationError, match=r"^metric cosine\[skip-first-5\] needs 6 tokens, but the states have 5; "):
        Distance(Cosine(token="skip-first-5"))(*pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_distance_of_ones_own(dtype: torch.dtype, tiny: Callable[..., Path]) -> None:
    """It sees the states of one text at a time, without pads, in float32; and measures as the one of layercut does."""
    model = ShortTransformer.from_pretrained(tiny("llama"), dtype=dtype)
    seen = []

    def own(before: Any, after: Any) -> Any:
        seen.append((before.dtype, before.device.type, tuple(before.shape)))
        return angular_distance_last_token(before, after)

    model.set_metric(own)
    found = model.analyse_layers(ROWS, limit=2, batch_size=2)
    lengths = [len(byte_tokenizer()(row["text"])["input_ids"]) for row in ROWS[:2]]
    assert seen == [(torch.float32, "cpu", (1, length, 32)) for length in lengths for _ in range(21)]
    model.set_metric(angular_distance_last_token)
    assert found == pytest.approx(model.analyse_layers(ROWS, limit=2), abs=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "the metric gave nan for layers 0 to 0 on sample 0"),
        ("far", "the metric gave str, not one number"),
        (torch.zeros(2), "the metric gave Tensor, not one number"),
    ],
)
def test_a_distance_that_is_no_number(value: Any, message: str, model: Any) -> None:
    model.set_metric(lambda before, after: value)
    with pytest.raises(LayercutError) as caught:
        model.analyse_layers(ROWS)
    assert str(caught.value) == message
    assert hooks(model) == []


def test_the_linear_approximation_is_between_0_and_1(model: Any) -> None:
    """One score for many samples: what no linear map explains, on held-out ones."""
    model.set_metric(get_linear_approximation_ith_token(-1))
    rows = [{"text": f"{number} {'x' * number} text"} for number in range(12)]
    found = model.analyse_layers(rows, limit=12)
    assert found[1].min() > 0 and found.max() < 1.5
    with pytest.raises(CalibrationError, match=r"^metric linear\[-1\] needs .*; use more text$"):
        model.analyse_layers(rows, limit=1)
    distance = get_linear_approximation_ith_token(0)
    state = torch.randn(16, 3, 4)
    assert distance(state, 2 * state) == pytest.approx(0, abs=1e-9)
    with pytest.raises(CalibrationError, match=r"^metric linear\[0\] compares many samples: it needs 2, and the states have 1; "):
        distance(state[:1], state[:1])


def test_16_bit_models_are_measured_in_full_precision(tiny: Callable[..., Path]) -> None:
    found = ShortTransformer.from_pretrained(tiny("llama"), dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    plain = ShortTransformer.from_pretrained(tiny("llama"))
    assert found.analyse_layers(ROWS, limit=3) == pytest.approx(plain.analyse_layers(ROWS, limit=3), abs=0.02)
    assert found.dtype == torch.bfloat16


# Nothing stays attached


def test_nothing_is_attached_before_during_or_after(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hooks(model) == []
    calls, measured = count_forwards(monkeypatch), []
    model.set_metric(lambda before, after: measured.append(1) or 0.0)
    ids = torch.arange(3, 20)[None]
    model(ids)
    assert (calls["layers"], len(measured)) == (6, 0)
    model.analyse_layers(ROWS, limit=3)
    assert (calls["layers"], len(measured)) == (6 + 3 * 6, 3 * 21)
    model(ids, labels=ids).loss.backward()
    assert (calls["layers"], len(measured)) == (12 + 3 * 6, 3 * 21)
    assert hooks(model) == []


def test_other_forwards_do_not_contaminate(model: Any) -> None:
    before = model.analyse_layers(ROWS, limit=3)
    model(torch.arange(3, 20)[None])
    model.generate(torch.arange(3, 20)[None], max_new_tokens=3)
    assert numpy.array_equal(model.analyse_layers(ROWS, limit=3), before)


def test_an_error_leaves_nothing_attached(model: Any) -> None:
    def bad() -> Iterator[Any]:
        yield ROWS[0]
        raise OSError("the stream broke")

    with pytest.raises(OSError, match="the stream broke"):
        model.analyse_layers(bad(), limit=3)
    assert hooks(model) == []
    assert numpy.isfinite(model.analyse_layers(ROWS)).all()


def test_modules_keep_their_mode(tiny: Callable[..., Path]) -> None:
    """Dropout is off while measuring; a layer that was frozen in eval mode stays so in a model that trains."""
    found = ShortTransformer.from_pretrained(tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)).train()
    found.transformer.h[2].eval()
    first = found.analyse_layers(ROWS, limit=3)
    assert numpy.array_equal(found.analyse_layers(ROWS, limit=3), first)
    assert found.training and not found.transformer.h[2].training and found.transformer.h[3].mlp.training


# The model


def test_it_stays_the_model_that_it_was(tiny: Callable[..., Path], tmp_path: Path) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny("qwen3"))
    found = ShortTransformer.from_model(plain)
    assert found is plain and isinstance(found, ShortTransformer) and isinstance(found, transformers.Qwen3ForCausalLM)
    assert ShortTransformer.from_model(found) is found and type(found).__name__ == "Qwen3ForCausalLM"
    found.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert type(reloaded(tmp_path)) is transformers.Qwen3ForCausalLM


def test_copies_and_pickles_are_models_of_their_own(model: Any) -> None:
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, ShortTransformer) and isinstance(other, transformers.LlamaForCausalLM)
        other.prune(0, 2)
        assert (other.layer_count, model.layer_count) == (4, 6)
        assert other.analyse_layers(ROWS, byte_tokenizer()).shape == (4, 4)


def test_pruned_and_analysed_again_and_again(tiny: Callable[..., Path], tmp_path: Path) -> None:
    found = ShortTransformer.from_pretrained(tiny("qwen3"))
    ids = torch.arange(3, 20)[None]
    for depth in (5, 4, 3, 2):
        assert found.remove_layers(block_size=1, dataset=ROWS, limit=3) is found
        assert found.layer_count == found.config.num_hidden_layers == len(found.config.layer_types) == depth
        assert found.analyse_layers(ROWS).shape == (depth, depth)
        cached, plain = (found.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (True, False))
        assert torch.equal(cached, plain)
        found.save_pretrained(tmp_path / str(depth))
        assert torch.equal(reloaded(tmp_path / str(depth))(ids).logits, found.eval()(ids).logits)


def test_remove_layers_takes_the_nearest_block(model: Any) -> None:
    results = model.analyse_layers(ROWS, limit=3)
    kept = list(model.model.layers)
    start = get_best_pruning_start(results, 2)
    model.remove_layers(byte_tokenizer(), 2, ROWS, limit=3)
    assert all(a is b for a, b in zip(model.model.layers, kept[:start] + kept[start + 2 :], strict=True))


def test_what_cannot_be_cut(tiny: Callable[..., Path], model: Any) -> None:
    other = ShortTransformer.from_pretrained(tiny("gpt2", scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(RefusedError):
        other.prune(1, 2)
    for size in (0, 6):
        with pytest.raises(LayercutError, match=f"^block_size is {size}, and a model of 6 layers has blocks of 1 to 5$"):
            model.remove_layers(block_size=size, dataset=ROWS)
    with pytest.raises(LayercutError, match=r"^\[4, 7\) is no block of a model of 6 layers"):
        model.prune(4, 3)


def test_what_is_no_model() -> None:
    with pytest.raises(LayercutError, match=r"^from_model takes a model of transformers, not Linear$"):
        ShortTransformer.from_model(torch.nn.Linear(2, 2))
    with pytest.raises(LayercutError, match=r"^a metric is called with two states, and str cannot be$"):
        ShortTransformer.set_metric(object(), "angular")  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"trust_remote_code": True}, {"use_safetensors": False}])
def test_no_code_and_no_pickle_of_a_checkpoint(arguments: dict[str, bool], tiny: Callable[..., Path]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(CheckpointError, match=rf"^from_pretrained does not take {name}={value}; load the model with transformers and hand"):
        ShortTransformer.from_pretrained(tiny("llama"), **arguments)


# The rows of a data set


def count(model: Any, rows: Any, **arguments: Any) -> list[int]:
    """Tokens of every sample that is measured."""
    lengths = []
    model.set_metric(lambda before, after: lengths.append(before.shape[1]) or 0.0)
    model.analyse_layers(rows, byte_tokenizer(), **arguments)
    return lengths[::21]


def test_rows_without_text_are_passed_over(model: Any) -> None:
    rows = [{"text": ""}, {"text": "abc"}, {"text": None}, {"text": "abcdef"}, {"text": "ab"}]
    assert count(model, rows, limit=2) == [3, 6]
    assert count(model, iter(rows), limit=99) == [3, 6, 2]
    assert count(model, rows, limit=3, max_length=4) == [3, 4, 2]
    assert count(model, rows, limit=3, max_length=4, batch_size=2) == [3, 4, 2]


def test_the_column_is_text_or_content_unless_named(model: Any) -> None:
    assert count(model, [{"content": "abcd", "id": "x"}]) == [4]
    assert count(model, [{"content": "abcd", "text": "abc"}]) == [3]
    assert count(model, [{"content": "abcd", "text": "abc", "words": "ab"}], key="words") == [2]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"txet": "a", "id": "b"}], {}, "row 0 of the dataset: no column 'text' (available: 'txet', 'id'); did you mean 'txet'?"),
        ([{"text": "a"}], {"key": "body"}, "row 0 of the dataset: no column 'body' (available: 'text')"),
        (["a"], {}, "row 0 of the dataset is str, not a mapping of columns"),
        ([{"text": 7}], {}, "row 0 holds int, not text"),
        ([{"text": [{"role": "user"}]}], {}, "row 0 holds list, not text; for conversations set use_chat_template=True"),
        ([{"text": ""}], {}, "no row of the dataset gives a token"),
        ([], {}, "no row of the dataset gives a token"),
        (ROWS, {"limit": 0}, "limit is 0, and must be 1 or more"),
        (ROWS, {"batch_size": 0}, "batch_size is 0, and must be 1 or more"),
    ],
)
def test_what_cannot_be_measured(rows: Any, arguments: dict[str, Any], message: str, model: Any) -> None:
    with pytest.raises(LayercutError) as caught:
        model.analyse_layers(rows, byte_tokenizer(), **arguments)
    assert str(caught.value) == message


def test_a_token_that_a_text_does_not_have(model: Any) -> None:
    model.set_metric(get_angular_distance_ith_token(4))
    with pytest.raises(CalibrationError, match=r"^metric angular\[4\] needs 5 tokens, but sample 1 has 2; "):
        model.analyse_layers([{"text": "abcdef"}, {"text": "ab"}], limit=2)
    with pytest.raises(CalibrationError, match=r"^metric angular\[4\] needs 5 tokens, but the states have 3; "):
        get_angular_distance_ith_token(4)(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2))


def test_conversations(model: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    lengths = []
    model.set_metric(lambda before, after: lengths.append(before.shape[1]) or 0.0)
    rows = [{"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]}]
    with pytest.raises(CalibrationError, match=r"^row 0 holds text, not messages; leave out use_chat_template, or name the column of mess"):
        model.analyse_layers([{"text": "Hello"}], tokenizer, use_chat_template=True)
    model.analyse_layers(rows, tokenizer, use_chat_template=True, key="messages")
    model.analyse_layers(rows, tokenizer, use_chat_template=True, key="messages", max_length=5)
    assert lengths[::21] == [9, 5]


def test_the_tokenizer_of_the_model_is_found(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Also after a cut: the name of the model stays what it was."""
    found = ShortTransformer.from_pretrained(tiny("llama"))
    found.prune(1, 1)
    assert found.analyse_layers(ROWS).shape == (5, 5)
    bare = ShortTransformer.from_pretrained(tiny("llama", tokenizer=False))
    with pytest.raises(CalibrationError, match=r": no tokenizer can be loaded: .*; pass tokenizer=\.\.\.$"):
        bare.analyse_layers(ROWS)
    made = ShortTransformer.from_model(transformers.AutoModelForCausalLM.from_config(found.config))
    made.config._name_or_path = ""
    with pytest.raises(CalibrationError, match=r"^no tokenizer can be loaded: the model was not loaded from anywhere; pass tokenizer="):
        made.analyse_layers(ROWS)


# Blocks, tables and diagrams


def square(depth: int, value: Callable[[int, int], float]) -> Any:
    results = numpy.zeros((depth, depth))
    for size in range(1, depth):
        for start in range(depth - size + 1):
            results[size, start] = value(size, start)
    return results


@given(st.integers(2, 10).flatmap(lambda depth: st.tuples(st.just(depth), st.integers(1, depth - 1), st.integers(0, 9))))
def test_a_planted_block_is_found_at_every_start(case: tuple[int, int, int]) -> None:
    """The row of a size is the row of that size, and its last start counts."""
    depth, size, start = case
    start = min(start, depth - size)
    results = square(depth, lambda n, at: 0.0 if (n, at) == (size, start) else 1.0)
    best = get_best_pruning_start(results, size)
    assert best == start and type(best) is int
    assert get_scored_blocks(results, return_md=False, threshold=0.5) == {size: {"start_layer": start, "score": 0.0}}


def test_the_table_of_the_readme() -> None:
    results = square(4, lambda size, start: size / 10 + abs(start - 1) / 1000)
    assert get_scored_blocks(results) == (
        "| Block_size | Removed_layers | Score (avg dist)|\n"
        "| -------- | ------- | -------- |\n"
        "| 1 | 1-1 | 0.1|\n"
        "| 2 | 1-2 | 0.2|\n"
        "| 3 | 1-3 | 0.3|\n"
    )
    assert list(get_scored_blocks(results, return_md=False, threshold=0.25)) == [1, 2]
    assert get_scored_blocks(results, threshold=0.0).count("\n") == 2


@pytest.mark.parametrize("size", [0, 4, -1, 2.0, True])
def test_a_block_size_that_no_block_has(size: Any) -> None:
    with pytest.raises(LayercutError, match=f"^block_size is {size!r}, and a model of 4 layers has blocks of 1 to 3$"):
        get_best_pruning_start(square(4, lambda n, at: 1.0), size)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([[0.0, 1.0]], "results must be square: a row for each block size and a column for each layer"),
        ([], "results must be square: a row for each block size and a column for each layer"),
        ([[0.0, 0.0], [1.0, math.nan]], "results hold a distance that is no finite number"),
    ],
)
def test_what_are_no_results(results: Any, message: str) -> None:
    with pytest.raises(LayercutError) as caught:
        get_scored_blocks(results)
    assert str(caught.value) == message


def test_diagrams(tmp_path: Path) -> None:
    results = square(6, lambda size, start: size + abs(start - 2))
    draw_diagram(results, tmp_path / "plain.png", title="A title", normalized=False)
    draw_diagram(results, str(tmp_path / "scaled"))
    pictures = [(tmp_path / name).read_bytes() for name in ("plain.png", "scaled.png")]
    assert all(read(picture).height > 300 for picture in pictures) and pictures[0] != pictures[1]
    with pytest.raises(OutputError, match=r"d\.pdf: pictures are written as PNG, not as '\.pdf'; name it d\.png$"):
        draw_diagram(results, tmp_path / "d.pdf")
    with pytest.raises(OutputError, match=r"missing/d\.png: cannot be written: No such file or directory$"):
        draw_diagram(results, tmp_path / "missing" / "d.png")
    with pytest.raises(LayercutError, match=r"^results of 1 layers cannot be drawn$"):
        draw_diagram([[0.0]], tmp_path / "one.png")
