from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tensors, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.disclosure import _inside, disclosed, pinned, repo_of
from layercut.executor import execute
from layercut.planner import build_plan
from layercut.recipe import parse_recipe
from layercut.report import Published, Report, ReportSource
from layercut.yamltext import YamlText

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Made = Callable[..., Report]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """The report of a recipe. Names of models in `hub` are taken for repositories of the Hub."""

    def make(text: str, hub: tuple[str, ...] = (), **config: Any) -> Report:
        def resolve(reference: str) -> Checkpoint:
            remote = reference.partition("@")[0] in hub
            folder = tmp_path / "hub" / reference.partition("@")[0] if remote else Path(reference)
            if not folder.exists():
                whole = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 6, "vocab_size": 8, **config}
                write_checkpoint(folder, byte_tensors(6, reference), whole)
            return open_checkpoint(folder, reference=reference, revision=COMMIT if remote else None)

        def never(*_: object) -> None:
            raise AssertionError("nothing is measured here")

        plan = build_plan(parse_recipe(YamlText(text, "r.yaml")), resolve=resolve, measure=never)  # type: ignore[arg-type]
        return execute(plan, tmp_path / "out", overwrite=True, progress=False)

    return make


def test_a_report_of_hub_models_comes_out_equal(made: Made) -> None:
    report = made("model: org/a@main\nsteps: [{prune: {at: 2}}]\noutput: out\n", hub=("org/a",))
    assert disclosed(report) == report
    assert disclosed(report).to_json() == report.to_json()


def test_local_models_lose_their_names(made: Made, tmp_path: Path) -> None:
    first, second = tmp_path / "secret project" / "base", tmp_path / "other"
    report = made(
        f"slices:\n- {{model: '{first}', layer_range: [0, 4]}}\n- {{model: '{second}', layer_range: [3, 6]}}\noutput: {tmp_path}/result\n"
    )
    told = disclosed(report)
    assert list(told.sources) == ["./local-model", "./local-model-2"] == [source.reference for source in told.sources.values()]
    assert told.donor == "./local-model" and {layer.model for layer in told.layers} == set(told.sources)
    assert told.recipe["slices"][1]["model"] == "./local-model-2"
    assert told.recipe["output"]["path"] == "./result"
    assert list(told.kept) == list(told.dropped) == list(told.sources)
    assert str(tmp_path) not in told.to_json() and "secret" not in told.to_json()
    assert disclosed(told) == told


def test_aliases_stay(made: Made, tmp_path: Path) -> None:
    report = made(f"models: {{chat: '{tmp_path}/x', code: org/b}}\nslices:\n- {{model: chat, layer_range: [0, 4]}}\n"
                  "- {model: code, layer_range: [4, 6]}\n", hub=("org/b",))  # fmt: skip
    told = disclosed(report)
    assert list(told.sources) == ["chat", "code"]
    assert told.recipe["models"] == {"chat": "./local-model", "code": "org/b"}
    assert told.sources["chat"].reference == "./local-model" and told.sources["code"].reference == "org/b"


def test_a_folder_with_the_name_of_a_word_leaves_words_alone(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = made("model: bfloat16\nsteps: [{prune: {at: 2}}]\ndtype: bfloat16\nallow: inexact\n".replace("dtype: bfloat16\n", ""))
    told = disclosed(report)
    assert told.recipe["model"] == "./local-model" and told.recipe["steps"] == [{"prune": {"at": 2}}]
    assert "bfloat16" not in told.sources


def test_where_it_was_published_is_not_published(made: Made) -> None:
    report = made("model: org/a\nupload: {repo: me/x, message: hello}\n", hub=("org/a",))
    published = report.with_published(Published(repo="me/x", revision="main", commit=COMMIT, url="https://huggingface.co/me/x"))
    told = disclosed(published)
    assert told.published is None and "upload" not in told.recipe
    assert told == disclosed(report)


def test_folders_in_sentences(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    report = made(f"model: {tmp_path}/m\n")
    notes = (
        f"{tmp_path}/m is odd",
        "see https://a.org/b/c and and/or 1/2 of it",
        "read from '/data/private/x.yml:3:4': no",
        "~alice/x, ~/y and C:\\Users\\alice\\z, or \\\\server\\share",
        "/home/alice/models/a",
    )
    told = disclosed(report.model_copy(update={"notes": notes}))
    assert told.notes == (
        "./local-model is odd",
        "see https://a.org/b/c and and/or 1/2 of it",
        "read from './…': no",
        "./…, ./… and ./…, or ./…",
        "./…/models/a",
    )


def test_a_chat_template_is_no_path(made: Made, tmp_path: Path) -> None:
    template = "{{ a }}/think {% if b %}/no{% endif %}"
    report = made(f"model: {tmp_path}/m\nchat_template: '{template}'\n")
    assert disclosed(report).recipe["chat_template"] == template


def test_data_and_evaluation(made: Made, tmp_path: Path) -> None:
    report = made(f"model: {tmp_path}/m\ncalibration: {{source: text, path: /data/held_out.txt}}\n")
    evaluation = {"perplexity": {"before": {"source": "text", "path": f"{tmp_path}/t.txt"}}, "generate": {"after": "/usr/bin"}}
    told = disclosed(report.model_copy(update={"evaluation": evaluation}))
    assert told.recipe["calibration"]["path"] == "./held_out.txt"
    assert told.evaluation == {"perplexity": {"before": {"source": "text", "path": "./t.txt"}}, "generate": {"after": "/usr/bin"}}


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("out", "out"), ("./a/b", "./a/b"), ("/a/b", "./b"), ("~/x", "./x"), ("~", "./data"), ("../secret/x.txt", "./x.txt"),
        ("/", "./data"),
        ("C:\\a\\b.txt", "./b.txt"), ("C:b", "./b"), ("a/../../b", "./b"), ("..", "./data"), ("allenai/c4", "allenai/c4"),
    ],
)  # fmt: skip
def test_paths_of_data(path: str, shown: str) -> None:
    assert _inside(path) == shown


@given(st.text(alphabet="ab/.~\\:", max_size=12))
def test_no_shown_path_leads_out(path: str) -> None:
    shown = _inside(path)
    assert not shown.startswith(("/", "~", "\\")) and ".." not in shown.replace("\\", "/").split("/") and _inside(shown) == shown


def test_pins(made: Made) -> None:
    text = "slices:\n- {sources: [{model: org/a@main, layer_range: [0, 4]}]}\n- {model: org/b, layer_range: [3, 6]}\nbase_model: org/b\n"
    report = made(text, hub=("org/a", "org/b"))
    recipe = pinned(disclosed(report).recipe, report)
    assert [part.get("model") or part["sources"][0]["model"] for part in recipe["slices"]] == [f"org/a@{COMMIT}", f"org/b@{COMMIT}"]
    assert recipe["base_model"] == f"org/b@{COMMIT}"
    assert disclosed(report).recipe == report.recipe, "only the card pins"


def test_pins_of_aliases(made: Made) -> None:
    report = made("models: {a: org/a, b: org/b}\nslices:\n- {model: b, layer_range: [0, 6]}\n", hub=("org/a", "org/b"))
    recipe = pinned(report.recipe, report)
    assert recipe["models"] == {"a": "org/a", "b": f"org/b@{COMMIT}"}, "a model that nothing is taken from has no commit"
    assert recipe["slices"][0]["model"] == "b"


@pytest.mark.parametrize(
    ("reference", "revision", "repo"),
    [("org/a@main", COMMIT, "org/a"), ("gpt2", COMMIT, "gpt2"), ("org/a", None, None), ("/a/b", COMMIT, None), ("a](x)", COMMIT, None)],
)
def test_repositories_of_sources(reference: str, revision: str | None, repo: str | None) -> None:
    assert repo_of(ReportSource(reference=reference, revision=revision, digest="", depth=1, parameters=1)) == repo


def test_keys_of_measurements_are_renamed_too(made: Made, tmp_path: Path) -> None:
    name = f"{tmp_path}/m"
    report = made(f"model: {name}\n")
    table = {"metric": "cosine", "a": name, "b": name, "mean": [[0.0]], "stderr": [[0.0]]}
    whole = json.loads(report.to_json())
    whole["measurement"] = {"tables": [table], "samples": 1, "tokens": 1, "details": {"dtype": {name: "float32"}, "source": "builtin"}}
    told = disclosed(Report.model_validate(whole)).measurement
    assert told is not None and (told.tables[0].a, told.details["dtype"]) == ("./local-model", {"./local-model": "float32"})
