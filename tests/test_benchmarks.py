"""The benchmarks without the tools they compare with: recipes, comparison and rules of parity; what that of the engine runs and says."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tensors, write_checkpoint
from packaging.requirements import Requirement

from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.errors import RecipeError
from layercut.planner import build_plan
from layercut.recipe import parse_recipe
from layercut.tokens import Sample
from layercut.yamltext import YamlText

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import engine as speed  # noqa: E402
import engine_peer as peer  # noqa: E402
import healing  # noqa: E402
import mergekit_parity as parity  # noqa: E402
import parity_cases as cases  # noqa: E402
import parity_rules as rules  # noqa: E402
import real_models  # noqa: E402
import settling as looking  # noqa: E402
import strategies as choosing  # noqa: E402

Tensors = Mapping[str, torch.Tensor]
CASE = cases.Case("x", "llama", "slices: []\n")
REFUSED = {"range above the model", "range that runs backwards", "range that is empty"}


def outcome(
    tensors: Tensors, config: Mapping[str, Any] | None = None, failure: str | None = None, fault: str | None = None
) -> rules.Outcome:
    return rules.Outcome(failure, tensors, config or {}, fault)


def pair(theirs: rules.Outcome, ours: rules.Outcome, *sources: rules.Source, case: cases.Case = CASE) -> rules.Pair:
    return rules.Pair(case, theirs, ours, {str(number): source for number, source in enumerate(sources)})


def judged(made: rules.Pair) -> tuple[dict[str, int], list[str]]:
    counts, rest = rules.explain(made, rules.differences(made))
    return counts, [difference.what for difference in rest]


# Cases


def test_cases_cover_what_the_page_says() -> None:
    assert len(cases.CASES) >= 25
    assert len({(case.family, case.name) for case in cases.CASES}) == len(cases.CASES)
    assert {case.family for case in cases.CASES} >= {"llama", "mistral", "phi3", "gpt2", "mixtral"}
    texts = " ".join(case.text for case in cases.CASES)
    for word in ("dtype:", "out_dtype:", "base_model:", "models:", "linear", "filter:", "lora: null", "llama-tied", "scale: ["):
        assert word in texts
    assert {name for name in cases.MODELS if not any(re.search(rf"\b{name}\b(?!-)", case.text) for case in cases.CASES)} == set()


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: f"{case.family}, {case.name}")
def test_case_is_read_and_planned(case: cases.Case, tmp_path: Path) -> None:
    """By layercut, on byte models of six layers; the three that name layers that are not there are refused."""
    made: dict[str, Checkpoint] = {}

    def resolve(reference: str) -> Checkpoint:
        assert reference in cases.MODELS
        if reference not in made:
            tied = reference == "llama-tied"
            data = ("F32", (4, 4), struct.pack("<16f", *range(16)))
            tensors = {name: data for name in byte_tensors(6) if not (tied and name == "lm_head.weight")}
            config = {"model_type": "llama", "num_hidden_layers": 6, "vocab_size": 4, "tie_word_embeddings": tied}
            made[reference] = open_checkpoint(write_checkpoint(tmp_path / reference, tensors, config))
        return made[reference]

    def planned() -> int:
        recipe = parse_recipe(YamlText(case.text, "recipe.yaml"))
        return len(build_plan(recipe, resolve=resolve, measure=None).actions.layers)  # type: ignore[arg-type]

    if case.name in REFUSED:
        with pytest.raises(RecipeError, match=r"leaves the model|is empty"):
            planned()
    else:
        assert planned() == expected_depth(case)


def expected_depth(case: cases.Case) -> int:
    """Layers by plain counting over the ranges in the text, a source of weight 0 left out."""
    text = "\n".join(line for line in case.text.splitlines() if "weight: 0}" not in line)
    ranges = re.findall(r"layer_range: \['?([\d.]+)'?, '?(\d+)'?\]", text)
    return sum(int(stop) - int(float(start)) for start, stop in ranges) if ranges else cases.LAYERS


# The comparison


def test_equal_outputs_have_no_difference() -> None:
    one = {"a": torch.tensor([1.0, float("nan"), -0.0]), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
    config = {"num_hidden_layers": 2, "torch_dtype": "bfloat16"}
    same = pair(outcome(one, config), outcome({k: v.clone() for k, v in one.items()}, {"num_hidden_layers": 2, "dtype": "bfloat16"}))
    assert rules.differences(same) == []


@pytest.mark.parametrize(
    ("theirs", "ours", "how"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0]), "values"),
        (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]]), "float32[2] and float32[1, 2]"),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float16), "float32[1] and float16[1]"),
        (torch.tensor([1.0]), torch.tensor([1.0]).nextafter(torch.tensor(2.0)), "values"),
    ],
)
def test_one_bit_is_a_difference(theirs: torch.Tensor, ours: torch.Tensor, how: str) -> None:
    assert rules.differences(pair(outcome({"w": theirs}), outcome({"w": ours}))) == [rules.Difference("w", how)]


def test_names_configs_and_faults_are_compared() -> None:
    t = torch.ones(1)
    made = pair(
        outcome({"a": t}, {"num_hidden_layers": 6, "layer_types": ["x"]}, fault="2 missing keys, b first"),
        outcome({"b": t}, {"num_hidden_layers": 4, "layer_types": ["x"], "torch_dtype": "float16"}),
    )
    assert rules.differences(made) == [
        rules.Difference("a", "mergekit only"),
        rules.Difference("b", "layercut only"),
        rules.Difference("config:num_hidden_layers", "6 and 4"),
        rules.Difference("config:dtype", 'null and "float16"'),
        rules.Difference("load:mergekit", "2 missing keys, b first"),
    ]
    assert judged(made)[1], "nothing explains all of that"


def test_failures_are_differences_unless_both_fail() -> None:
    t = {"a": torch.ones(1)}
    failed, done = outcome({}, failure="error: x"), outcome(t)
    assert rules.differences(pair(failed, failed)) == []
    assert judged(pair(done, failed)) == ({}, ["a", "failure:layercut"])
    assert judged(pair(failed, done)) == ({}, ["a", "failure:mergekit"])


def test_a_layercut_output_that_does_not_load_is_never_explained() -> None:
    good = {"model.layers.0.w": torch.ones(1)}
    for fault in ("1 missing keys, lm_head.weight first", "logits are not finite"):
        made = pair(outcome(good, {"num_hidden_layers": 6}), outcome(good, {"num_hidden_layers": 1}, fault=fault))
        assert "load:layercut" in judged(made)[1]


# The rules


def test_rules_have_a_name_and_a_sentence() -> None:
    assert len({rule.name for rule in rules.RULES}) == len(rules.RULES)
    assert all(rule.text.endswith(".") and len(rule.text) > 40 for rule in rules.RULES)
    assert len(list(rules.rules_text())) == len(rules.RULES)


def test_true_zeros() -> None:
    minus = torch.tensor([0.0, -0.0])
    assert judged(pair(outcome({"w": minus}), outcome({"w": torch.zeros(2)}))) == ({"true zeros": 1}, [])
    assert judged(pair(outcome({"w": torch.zeros(2)}), outcome({"w": minus})))[1] == ["w"], "the zeros of layercut are the plain ones"
    assert judged(pair(outcome({"w": torch.tensor([0.0, 1e-30])}), outcome({"w": torch.zeros(2)})))[1] == ["w"]


def experts(number: int = 3) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One layer in both spellings: fused, and expert by expert."""
    torch.manual_seed(0)
    one = {
        f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight": torch.randn(*((4, 6) if w == "w2" else (6, 4)))
        for e in range(number)
        for w in ("w1", "w2", "w3")
    }
    one["model.layers.0.block_sparse_moe.gate.weight"] = torch.randn(number, 4)

    def stacked(*names: str) -> torch.Tensor:
        rows = [torch.cat([one[f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight"] for w in names]) for e in range(number)]
        return torch.stack(rows)

    fused = {
        "model.layers.0.mlp.experts.gate_up_proj": stacked("w1", "w3"),
        "model.layers.0.mlp.experts.down_proj": stacked("w2"),
        "model.layers.0.mlp.gate.weight": one["model.layers.0.block_sparse_moe.gate.weight"],
    }
    return fused, one


def test_fused_experts() -> None:
    fused, one = experts()
    assert judged(pair(outcome(fused), outcome(one))) == ({"fused experts": 13}, [])
    wrong = {**one, "model.layers.0.block_sparse_moe.experts.1.w3.weight": torch.zeros(6, 4)}
    left = judged(pair(outcome(fused), outcome(wrong)))[1]
    assert "model.layers.0.mlp.experts.gate_up_proj" in left and "model.layers.0.mlp.experts.down_proj" not in left
    swapped = {**one, "model.layers.0.block_sparse_moe.gate.weight": torch.zeros(3, 4)}
    assert len(judged(pair(outcome(fused), outcome(swapped)))[1]) == 2


def test_lost_biases() -> None:
    bias, weight = torch.tensor([1.0, 2.0]), torch.ones(2, 2)
    source = rules.Source({"model.layers.3.q.bias": bias, "model.layers.3.q.weight": weight}, {})
    theirs = outcome({"model.layers.0.q.weight": weight}, fault="1 missing keys, model.layers.0.q.bias first")
    ours = {"model.layers.0.q.weight": weight, "model.layers.0.q.bias": bias.clone()}
    assert judged(pair(theirs, outcome(ours), source)) == ({"lost biases": 2}, [])
    invented = {**ours, "model.layers.0.q.bias": bias + 1}
    assert judged(pair(theirs, outcome(invented), source))[1] == ["model.layers.0.q.bias"]
    assert judged(pair(outcome({}), outcome({"model.layers.0.q.weight": weight}), source))[1] == ["model.layers.0.q.weight"]


def test_head_of_the_last_model() -> None:
    embed, head, other = torch.randn(3, 2), torch.randn(3, 2), torch.randn(3, 2)
    tied = rules.Source({"model.embed_tokens.weight": embed}, {"tie_word_embeddings": True})
    untied = rules.Source({"model.embed_tokens.weight": other, "lm_head.weight": head}, {"tie_word_embeddings": False})
    theirs = outcome({}, {"tie_word_embeddings": True}, fault="1 missing keys, lm_head.weight first")
    said = {"tie_word_embeddings": False}
    assert judged(pair(theirs, outcome({"lm_head.weight": embed.clone()}, said), untied, tied)) == ({"head of the last model": 3}, [])
    assert "lm_head.weight" in judged(pair(theirs, outcome({"lm_head.weight": embed + 1}, said), untied, tied))[1]
    assert "lm_head.weight" in judged(pair(theirs, outcome({"lm_head.weight": embed}, said), untied, untied))[1]


def test_weight_and_division() -> None:
    exact = torch.tensor([0.1, 0.7, -3.3])
    source = rules.Source({"w": exact}, {})
    near = exact * 0.7 / 0.7
    near[0] = exact[0].nextafter(torch.tensor(1.0))
    assert judged(pair(outcome({"w": near}), outcome({"w": exact.clone()}), source)) == ({"weight and division": 1}, [])
    assert judged(pair(outcome({"w": exact}), outcome({"w": near}), source))[1] == ["w"], "the copy is that of layercut"
    assert judged(pair(outcome({"w": exact * 1.001}), outcome({"w": exact.clone()}), source))[1] == ["w"]


def test_lists_of_layers() -> None:
    message = "StrictDataclassClassValidationError: num_hidden_layers (4) must be equal to the number of layer_types (6)"
    tensors, config = {"w": torch.ones(1)}, {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    assert judged(pair(outcome(tensors, {}, failure=message), outcome(tensors, config))) == ({"lists of layers": 3}, [])
    assert judged(pair(outcome(tensors, {}, failure="OutOfMemory"), outcome(tensors, config)))[1][-1] == "failure:mergekit"
    other = {"w": torch.zeros(1)}
    assert judged(pair(outcome(other, {}, failure=message), outcome(tensors, config)))[1] == ["w"], "what was written must be equal"


def test_depth_of_unknown_types() -> None:
    tensors = {f"model.layers.{n}.w": torch.ones(1) for n in range(4)}
    theirs = outcome(tensors, {"num_hidden_layers": 6}, fault="18 missing keys, model.layers.4.w first")
    assert judged(pair(theirs, outcome(tensors, {"num_hidden_layers": 4}))) == ({"depth of unknown types": 2}, [])
    assert len(judged(pair(theirs, outcome(tensors, {"num_hidden_layers": 5})))[1]) == 2


def test_giver_of_the_config() -> None:
    one, two = rules.Source({}, {"torch_dtype": "float32"}), rules.Source({}, {"torch_dtype": "bfloat16"})
    theirs, ours = outcome({}, {"dtype": "bfloat16"}), outcome({}, {"torch_dtype": "float32"})
    assert judged(pair(theirs, ours, one, two)) == ({"giver of the config": 1}, [])
    assert judged(pair(theirs, ours, two, one))[1] == ["config:dtype"], "layercut takes the first"
    named = cases.Case("x", "llama", "base_model: one\n")
    assert judged(pair(theirs, ours, one, two, case=named))[1] == ["config:dtype"]


def test_name_of_the_dtype() -> None:
    fault = "does not load: module 'torch' has no attribute 'torch.float16'"
    theirs = outcome({}, {"dtype": "torch.float16"}, fault=fault)
    assert judged(pair(theirs, outcome({}, {"dtype": "float16"}))) == ({"name of the dtype": 2}, [])
    assert len(judged(pair(theirs, outcome({}, {"dtype": "bfloat16"})))[1]) == 2


def test_empty_ranges() -> None:
    refused = outcome({}, failure="error: r.yaml:4:1: layer_range [3, 1] is empty: [a, b) holds layers a to b - 1; did you mean [1, 3]?")
    assert judged(pair(outcome({"w": torch.ones(1)}, {"num_hidden_layers": 2}), refused))[1] == []
    other = outcome({}, failure="error: r.yaml:4:1: no such folder")
    assert judged(pair(outcome({"w": torch.ones(1)}), other))[1] == ["w", "failure:layercut"]


# The table and the page


def row(verdict: str = "equal") -> parity.Row:
    failure = "RuntimeError: a | b" if verdict == "fails" else None
    odd = [rules.Difference("w", "values"), rules.Difference("v", "values")] if verdict == "odd" else []
    named = {"true zeros": 2} if verdict == "explained" else {}
    loads = ["mergekit", "layercut"] if failure is None else ["layercut"]
    return parity.Row(CASE, parity.Run(failure, 6.0), parity.Run(None, 0.5), 10, 10 - len(odd), named, odd, loads)


def test_table() -> None:
    lines = parity.table([row(), row("explained"), row("odd"), row("fails")]).splitlines()
    assert lines[2:] == [
        "| x | llama | ok | 10 of 10 | equal | both | 6.0 / 0.5 | 12.0 |",
        "| x | llama | ok | 10 of 10 | explained: true zeros | both | 6.0 / 0.5 | 12.0 |",
        "| x | llama | ok | 8 of 10 | NOT EXPLAINED: w (values) and 1 more | both | 6.0 / 0.5 | 12.0 |",
        "| x | llama | fails: RuntimeError: a \\| b | 10 of 10 | equal | layercut | 6.0 / 0.5 | 12.0 |",
    ]


def test_summary_counts() -> None:
    text = parity.summary([row(), row("explained"), row("odd")])
    assert text.startswith(
        "3 recipes: 1 equal to the bit, 1 with differences that the rules explain, 0 refused by both, 1 with differences"
    )
    assert "Processor time, mergekit / layercut: 12.0 to 12.0, median 12.0." in text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Traceback\n  x\nRuntimeError: bad\n", "RuntimeError: bad"),
        ("a.b.SomeError: first:\n  second\n", "a.b.SomeError: first: second"),
        ("error: one line\n", "error: one line"),
        ("nothing known\nlast\n", "last"),
        ("", "no message"),
    ],
)
def test_last_error(text: str, line: str) -> None:
    assert parity._last_error(text) == line


def test_the_page_is_that_of_these_cases() -> None:
    """The page that is kept was made from all cases as they are, and holds no difference that nothing explains."""
    page = (BENCHMARKS / "mergekit_parity.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (\S+) \| (?:ok|fails)", page, re.MULTILINE)
    assert [(family, name.replace("\\*", "*")) for name, family in rows] == [(case.family, case.name) for case in cases.CASES]
    assert "NOT EXPLAINED" not in page and ", 0 with differences that nothing explains." in page
    assert "mergekit 0.1.5, torch 2.13.0, transformers 5.24.0" in page
    assert all(f"- **{rule.name}**: {rule.text}" in page for rule in rules.RULES)
    assert not re.search(r"(^|[\s(`'\"])/(?:tmp|root|home|work)\b", page), "no path of a machine"


def test_versions_are_pinned() -> None:
    pins = [
        Requirement(line) for line in (BENCHMARKS / "parity-constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"
    ]
    assert all([spec.operator for spec in pin.specifier] == ["=="] and "+" not in str(pin.specifier) for pin in pins)
    found = {pin.name.lower(): str(pin.specifier) for pin in pins}
    assert {found[name] for name in ("mergekit", "torch")} == {"==0.1.5", "==2.13.0"}
    assert set(parity.PACKAGES) <= set(found)


# The engine


def test_engine_runs_measure_what_they_say(tiny: Callable[..., Path]) -> None:
    setting = speed.prepare(tiny("llama"), 5, 32, 2)
    assert [[len(sample.ids) for sample in batch] for batch in setting.batches] == [[32, 32], [32, 32], [32]]
    assert [sample.number for batch in setting.batches for sample in batch] == [0, 1, 2, 3, 4]
    assert setting.tokens == 160
    ways = speed.runs(setting)
    assert list(ways) == [speed.BARE, speed.BACKBONE, *speed.RUNS]
    for name, metrics in speed.RUNS.items():
        assert [table.metric for table in ways[name]()] == [metric.label for metric in metrics]
    labels = [metric.label for metric in speed.FIVE]
    assert labels == ["angular[last]", "angular[all]", "cosine[all]", "relative_magnitude[all]", "euclidean[all]"]


def test_engine_compares_round_by_round(tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    setting = speed.prepare(tiny("llama"), 2, 16, 2)
    measured, theirs = speed.compare(setting, 3, None)
    assert theirs == {}
    assert {name: len(values) for name, values in measured.items()} == dict.fromkeys([speed.BARE, speed.BACKBONE, *speed.RUNS], 3)
    assert all(value > 0 for values in measured.values() for value in values)
    assert len(capsys.readouterr().err.splitlines()) == 15


FIRST, SECOND, THIRD = speed.RUNS
MEASURED = {
    speed.BARE: [10.0, 20.0, 10.0],
    speed.BACKBONE: [8.0, 16.0, 8.0],
    FIRST: [9.0, 17.0, 9.5],
    SECOND: [13.0, 22.0, 12.0],
    THIRD: [20.0] * 3,
}


def test_engine_verdicts() -> None:
    # round by round 0.9, 0.85, 0.95 and 1.3, 1.1, 1.2; the median of the second, 13, in 60 of the other tool
    theirs = {"one": speed.Theirs(30.0, []), "two": speed.Theirs(30.0, [])}
    assert [(value, limit) for _, value, limit in speed.verdicts(MEASURED, theirs)] == [
        (pytest.approx(0.9), 0.92),
        (pytest.approx(1.2), 1.3),
        (pytest.approx(13 / 60), 0.2),
    ]
    assert len(speed.verdicts(MEASURED, {})) == 2
    table = speed.table(MEASURED, theirs).splitlines()
    assert table[2] == "| forward with head | 10.00 | 1.000 | 1.000 | 1.000 |"
    assert table[4] == f"| layercut: {FIRST} | 9.50 | 0.900 | 0.850 | 0.950 |"
    assert table[-1] == "| short-transformers: all 2 | 60.00 | 6.000 | | |"


def test_engine_page() -> None:
    setting = speed.Setting(Path("m"), [[Sample(0, [1] * 4)], [Sample(1, [1] * 3)]])
    page = speed.document(setting, MEASURED, {"one": speed.Theirs(60.0, [])}, {"bi": 1.5e-6}, "Model")
    assert page.endswith("differ by at most 1.5e-06 (bi).\n")
    assert "Model, float32, 2 samples, 7 tokens, 1 samples at once" in page
    assert f"| {FIRST}, in seconds of a forward with head | 0.900 | 0.92 |" in page


FAKE = """
import json, sys
from types import SimpleNamespace
from short_transformers import dist
class ShortTransformer:
    @classmethod
    def from_pretrained(cls, folder, torch_dtype):
        model = cls()
        model.seen = [folder, str(torch_dtype)]
        return model
    def set_metric(self, metric):
        self.seen.append(metric)
    def analyse_layers(self, dataset, tokenizer, limit):
        inputs = [tokenizer(row["content"], return_tensors="pt").to("cpu") for row in dataset]
        print(self.seen, limit, [{key: value.tolist() for key, value in each.items()} for each in inputs], file=sys.stderr)
        return [[0.5, 0.25]]
"""
DIST = """
angular_distance_last_token, angular_distance_all_tokens, bi_score, relative_magnitude = "last", "all", "bi", "magnitude"
def get_linear_approximation_ith_token(i): return f"linear {i}"
def get_euclidian_dist_ith_token(i): return f"euclidean {i}"
"""


def fake_peer(folder: Path) -> None:
    package = folder / "short_transformers"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE, encoding="utf-8")
    (package / "dist.py").write_text(DIST, encoding="utf-8")


def test_engine_peer_gives_it_the_same_tokens(tmp_path: Path) -> None:
    fake_peer(tmp_path)
    (tmp_path / "ids.json").write_text("[[5, 6, 7], [8]]", encoding="utf-8")
    command = [sys.executable, str(BENCHMARKS / "engine_peer.py"), "folder", str(tmp_path / "ids.json"), "linear last"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True)
    found = json.loads(done.stdout)
    assert found["rows"] == 1
    assert found["first"] == [0.5, 0.25]
    assert 0 <= found["seconds"] < time.monotonic() - began
    given = [{"input_ids": [ids], "attention_mask": [[1] * len(ids)]} for ids in ([5, 6, 7], [8])]
    assert done.stderr.strip().splitlines()[-1] == f"['folder', 'torch.float32', 'linear -1'] 2 {given}"
    assert (
        peer.METRICS == speed.PEER_METRICS == ("angular last", "angular all", "linear last", "euclidean last", "bi", "relative magnitude")
    )


def test_engine_runs_its_peer_over_the_same_model(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_peer(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    setting = speed.prepare(tiny("llama"), 2, 16, 2)
    made = speed.make_peer(Path(sys.executable), setting, tmp_path)
    config = json.loads((made.folder / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert (made.folder / "model.safetensors").resolve() == (tiny("llama") / "model.safetensors").resolve()
    assert json.loads(made.ids.read_text(encoding="utf-8")) == [sample.ids for sample in setting.batches[0]]
    theirs = {metric: speed.peer_run(made, metric) for metric in ("angular last", "bi")}
    assert theirs["bi"].first == [0.5, 0.25]
    apart = speed.disagreement(setting, theirs)
    table = speed.runs(setting)[FIRST]()[2]
    assert apart["bi"] == max(abs(table.mean[0][1] - 0.5), abs(table.mean[1][2] - 0.25))
    assert list(apart) == ["angular last", "bi"]
    with pytest.raises(SystemExit, match="KeyError: 'nonesuch'"):
        speed.peer_run(made, "nonesuch")


def test_engine_pins_what_it_installs() -> None:
    pins = [Requirement(line) for line in speed.PINS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert {pin.name for pin in pins} >= set(speed.PACKAGES)
    assert all([spec.operator for spec in pin.specifier] == ["=="] for pin in pins)
    assert str(next(pin.specifier for pin in pins if pin.name == "transformers")) == "==4.46.3"


# samples: auto


def kept_of(rows: list[list[float]]) -> Any:
    """A model of two layers, of which each sample says how far layer 0 and layer 1 turn the state."""
    sums = torch.zeros(len(rows), 3, 3, dtype=torch.float64)
    sums[:, 0, 1], sums[:, 1, 2] = torch.tensor(rows, dtype=torch.float64).T
    return looking.Kept(sums, torch.ones(len(rows), dtype=torch.float64))


def test_auto_stops_where_the_samples_agree() -> None:
    clear = kept_of([[0.1 + 0.001 * (number % 3), 0.5] for number in range(64)])
    assert looking.auto(clear, "angular[last]", 1, 32)[:3] == (0, 8, True)
    close = kept_of([[0.1 + 0.2 * (number % 2), 0.201] for number in range(64)])
    start, samples, settled, text = looking.auto(close, "angular[last]", 1, 32)
    assert (start, samples, settled) == (0, 32, False)
    assert text.endswith("more text may lead to [1, 2)")


def test_the_page_of_auto_counts_what_was_wrong() -> None:
    told = looking.Outcome(1, 128, False, "not settled; more text may lead to [0, 1)")
    rows = [("angular[last]", 1, 0, [looking.Outcome(0, 8, True, ""), told])]
    text, kept = looking.page(rows, 512, 56, 128, 1.0)
    assert "| angular[last] | 1 | [0, 1) | 1 of 2 | 1 | 0 | 1 | 1 | 13.3% |" in text
    assert "1 choices were called settled, 0 of them wrongly" in text
    assert kept
    text, kept = looking.page([("angular[last]", 1, 0, [looking.Outcome(1, 8, True, "settled")])], 512, 56, 128, 1.0)
    assert "1 choices were called settled, 1 of them wrongly" in text
    assert "1 choices of another block were made without saying so" in text
    assert not kept


def test_real_models_are_compared_with_their_layers_skipped(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("gemma3_text", layers=12)
    rows = list(real_models.compare(str(model), tmp_path / "build"))
    assert [row.cut for row in rows] == ["layer 0", "layer 1", "layer 6", "layer 10", "layer 11", "layers 4 to 7"]
    assert [len(row.kinds) for row in rows] == [11] * 5 + [8]
    assert all(row.difference < 1e-5 and row.problems == 0 for row in rows)
    page = real_models.document(rows)
    assert page.count("\n| model") == 1 and page.count("layer 6") == 1
    assert not (tmp_path / "build" / "cut").exists()


def test_a_real_encoder_without_a_head_is_compared_by_its_hidden_states(tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    rows = list(real_models.compare(str(tmp_path / "bert"), tmp_path / "build"))
    assert [row.cut for row in rows] == ["layer 0", "layer 1", "layer 3", "layer 4", "layer 5", "layers 2 to 5"]
    assert all(row.difference < 1e-5 and row.problems == 0 and row.kinds == "" for row in rows)


def test_strategies_are_compared(tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--model", str(tiny("llama")), "--counts", "1", "2", "--samples", "3", "--length", "24", "--judged", "5"]
    assert choosing.main([*wanted, "--report", str(tmp_path / "p.md")]) == 0
    page = (tmp_path / "p.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == page + "\n"
    names = re.findall(r"^\| `(\w+)` \| [0-9 -]+ \| \**[0-9.,]+\** \| \**[0-9.]+\** \|$", page, re.MULTILINE)
    assert names == 2 * ["block", "blocks", "rank", "deepest", "loss", "greedy", "evolve", "best"]
    assert "all are judged on 5 more" in page and page.count("## ") == 2
    assert "on 2 of them is taken where no strategy is named" in page and page.count("\n| none named | ") == 2


def test_a_best_that_is_not_best_fails_the_benchmark() -> None:
    def of(name: str, mean: float, *tried: float) -> Any:
        one = [choosing.Attempt(name, (), choosing.Loss((value,), (1,))) for value in tried]
        return choosing.Outcome(name, (), choosing.Loss((mean,), (1,)), choosing.Loss((mean,), (1,)), tuple(one))

    evolve = of("evolve", 2.0, 3.0, 2.0)
    default = of("none named", 3.0)
    assert choosing.sound([of("block", 3.0), evolve, of("best", 2.0), default])
    assert not choosing.sound([of("block", 3.0), evolve, of("best", 2.5), default])
    assert not choosing.sound([of("block", 3.0), of("evolve", 2.0, 2.0, 3.0), of("best", 2.0), default])


def test_healing_is_measured(tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--model", str(tiny("llama")), "--counts", "1", "2", "--samples", "6", "--length", "48", "--judged", "4", "--ridges", "0.5"]
    assert healing.main([*wanted, "--report", str(tmp_path / "p.md")]) == 0
    page = (tmp_path / "p.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == page + "\n"
    rows = re.findall(r"^\| (\S.*) \| [0-9 -]+ \| [0-9.,]+ \| [0-9.,]+ \| -?\d+% \| (\d) of (\d) \|$", page, re.MULTILINE)
    names = [name for rows in rows for name in rows[0].replace("`", "").split(", ")]
    assert sorted(names) == ["0.5", *sorted(2 * ["block", "rank", "deepest"])]
    assert all(int(taken) <= int(count) for _, taken, count in rows) and "judged on 4 more" in page
    assert re.search(r"^\d{4}-\d\d-\d\d; \d+ CPUs, \S+ \S+, Python [0-9.]+, torch \S+, one thread\.$", page, re.MULTILINE)


def test_healing_that_does_harm_fails_the_benchmark() -> None:
    def of(*losses: tuple[str, float]) -> Any:
        tried = tuple(choosing.Attempt(name, (), choosing.Loss((mean,), (1,))) for name, mean in losses)
        one = choosing.Loss((1.0,), (1,))
        return healing.Outcome("block", (), one, one, healing.Healed((), tried, ()))

    assert of(("the cut", 3.0), ("map", 2.0), ("map, not taken", 4.0)).sound and of(("the cut", 3.0)).sound
    assert not of(("the cut", 3.0), ("map", 4.0)).sound
