from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import byte_tensors, write_checkpoint
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from layercut.card import LONGEST, code, fenced, make_card, untouched
from layercut.cardmetadata import card_metadata
from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.executor import execute
from layercut.plan import Distance, LeftOut
from layercut.planner import build_plan
from layercut.recipe import parse_recipe
from layercut.report import Report
from layercut.stated import Licence, split_card
from layercut.yamltext import YamlText

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Made = Callable[..., Report]
CUT = "model: org/a@main\nsteps: [{prune: {at: [2, 3]}}]\noutput: out\n"
PERPLEXITY = {"source": "builtin", "windows": 8, "max_length": 256, "dtype": "float32"}


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """The report of a recipe whose models are of the Hub, but those whose names begin with a dot or a slash."""

    def make(text: str = CUT, **changed: Any) -> Report:
        def resolve(reference: str) -> Checkpoint:
            local = reference.startswith((".", "/"))
            folder = Path(reference) if local else tmp_path / "hub" / reference.replace("@", "/")
            if not folder.exists():
                config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 6, "vocab_size": 8}
                write_checkpoint(folder, byte_tensors(6, reference), config)
            return open_checkpoint(folder, reference=reference, revision=None if local else COMMIT)

        def never(*_: object) -> None:
            raise AssertionError("nothing is measured here")

        plan = build_plan(parse_recipe(YamlText(text, "r.yaml")), resolve=resolve, measure=never)  # type: ignore[arg-type]
        report = execute(plan, tmp_path / "out", overwrite=True, progress=False)
        return Report.model_validate({**json.loads(report.to_json()), **changed})

    return make


def text_of(report: Report, repo: str = "me/a-4L", **arguments: Any) -> str:
    return make_card(report, card_metadata(report, {}, Licence(("mit",)), ["LlamaForCausalLM"]), repo, **arguments).text


def measured(model: str = "org/a@main") -> dict[str, Any]:
    """A measurement of a model of six layers, in which the block from 2 to 4 is marked."""
    mean = [[abs(i - j) / 10 for j in range(7)] for i in range(7)]
    tables = [{"metric": metric, "a": model, "b": model, "mean": mean, "stderr": mean} for metric in ("cosine", "angular[last]")]
    return {
        "measurement": {"tables": tables, "samples": 4, "tokens": 1024, "details": {}},
        "choices": [{"where": "steps.0.prune", "metric": "angular[last]", "chosen": "layers [2, 4)", "cost": 0.2}],
    }


def test_the_card_of_a_cut_model(made: Made) -> None:
    report = made(environment={"layercut": "1.2.3", "python": "3.11.7", "torch": "2.13.0+cpu", "platform": "linux x86_64"}, version="1.2.3")
    card = text_of(report)
    link = f"[`org/a`](https://huggingface.co/org/a/tree/{COMMIT})"
    lines = card.splitlines()
    assert lines[:11] == [
        "---", "license: mit", "library_name: transformers", "pipeline_tag: text-generation", "base_model: org/a", "tags:", "- layercut",
        "- depth-pruning", "---", "", "# a-4L",
    ]  # fmt: skip
    for line in (
        f"4 of the 6 layers of {link}, put together by layercut `1.2.3`. Nothing was trained after it.",
        'model = AutoModelForCausalLM.from_pretrained("me/a-4L", dtype="auto")',
        "  [0, 2)  ## 2 layers",
        "          ~ seam 2 -> 4",
        f"| {link} | 6 | `[0, 2) + [4, 6)` | `2, 3` |",
        "| before layer | state given | state expected |",
        "| 2 | h_2 | h_4 |",
        f"model: org/a@{COMMIT}",
        "pip install layercut==1.2.3 torch==2.13.0",
        "layercut run recipe.yaml",
        f"Equal weights come from an equal plan: `layercut.json` then states the plan `{report.plan}`. Made with `layercut` `1.2.3`, "
        "`platform` `linux x86_64`, `python` `3.11.7`, `torch` `2.13.0+cpu`; transformers, safetensors took no part in it.",
        "layers 2 to 3 (4 tensors, model.layers.*)  not in the stack that the recipe asks for",
    ):
        assert line in lines, line
    assert "## Perplexity" not in card and "layercut.png" not in card and "Inexact" not in card


def test_the_client_of_the_hub_reads_the_card(made: Made) -> None:
    card = ModelCard(text_of(made()))
    assert card.data.to_dict() == {
        "license": "mit", "library_name": "transformers", "pipeline_tag": "text-generation", "base_model": "org/a",
        "tags": ["layercut", "depth-pruning"],
    }  # fmt: skip
    assert card.text.startswith("\n# a-4L\n")


def test_the_recipe_of_the_card_is_one(made: Made) -> None:
    text = CUT + "chat_template: chatml\n"
    block = text_of(made(text)).partition("```yaml\n")[2].partition("\n```\n")[0]
    recipe = parse_recipe(YamlText(block, "card.yaml"))
    assert recipe.described() == {**made(text).recipe, "model": f"org/a@{COMMIT}"}


def test_an_output_that_only_the_command_line_named(made: Made) -> None:
    assert "\nlayercut run recipe.yaml --out a-4L\n" in text_of(made(CUT.replace("output: out\n", "")))


def test_measured_distances(made: Made) -> None:
    report = made(**measured())
    seams = [seam.model_copy(update={"distances": {"angular[last]": Distance(mean=0.2, stderr=0.01)}}) for seam in report.seams]
    report = report.model_copy(update={"seams": tuple(seams)})
    card = make_card(report, {}, "me/x")
    assert card.heatmap is not None and card.heatmap.startswith(b"\x89PNG")
    assert "| 2 | h_2 | h_4 | 0.2000 ± 0.0100 |" in card.text
    assert "![Distances between the states at all boundaries, the seams framed](layercut.png)" in card.text
    assert (
        "`angular[last]` between the states at the boundaries, from 0 (bright) to 0.6 (dark), on 4 samples with 1024 tokens." in card.text
    )


def test_perplexity_and_continuations(made: Made) -> None:
    evaluation = {
        "perplexity": {"before": {"value": 25.987, **PERPLEXITY}, "after": {"value": 42.7949, **PERPLEXITY}},
        "generate": {"prompt": "Paris | is", "before": "a\ncity", "after": "`the`"},
    }
    lines = text_of(made(evaluation=evaluation)).splitlines()
    assert "| 25.99 | 42.79 | `builtin` text, 8 windows of 256 tokens, `float32` |" in lines
    assert "Greedy continuations of `Paris | is`:" in lines
    assert "| `a city` | `` `the` `` |" in lines


@pytest.mark.parametrize(
    "evaluation",
    [
        {}, {"perplexity": None}, {"perplexity": {"before": {}}}, {"perplexity": {"before": 1, "after": 2}}, {"generate": []},
        {"perplexity": {"before": {"value": "a", **PERPLEXITY}, "after": {"value": 1, **PERPLEXITY}}}, {"generate": {"prompt": 1}},
    ],
)  # fmt: skip
def test_an_evaluation_of_another_form_is_left_out(made: Made, evaluation: dict[str, Any]) -> None:
    card = text_of(made(evaluation=evaluation))
    assert "## Perplexity" not in card and "Greedy" not in card


def test_several_models(made: Made) -> None:
    card = text_of(made("slices:\n- {model: org/a, layer_range: [0, 4]}\n- {model: org/b, layer_range: [3, 6]}\n"))
    a, b = (f"[`org/{name}`](https://huggingface.co/org/{name}/tree/{COMMIT})" for name in "ab")
    assert f"A stack of 7 layers of {a}, {b}, put together by layercut" in card
    assert "| 4 | h_4 of `org/a` | h_3 of `org/b` |" in card
    assert f"| {b} | 6 | `[3, 6)` | `0, 1, 2` |" in card
    assert "stands in their cards: [`org/a`](https://huggingface.co/org/a), [`org/b`](https://huggingface.co/org/b)." in card


def test_models_of_this_machine(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "private" / "base"
    report = made(f"model: {folder}\nsteps: [{{prune: {{at: 2}}}}]\noutput: {tmp_path}/out\n")
    card = text_of(report)
    assert str(tmp_path) not in card and "private" not in card and "base_model" not in card
    digest = report.sources[str(folder)].digest
    assert f"Not every source is on the Hub. `./local-model`: structure digest `{digest}`." in card
    assert "Save the recipe as `recipe.yaml` with the models that are not on the Hub where it names them, and run:" in card


def test_a_branch(made: Made) -> None:
    assert 'from_pretrained("me/a", revision=\'24-layers\', dtype="auto")' in text_of(made(), "me/a", branch="24-layers")


def test_a_model_that_writes_no_text_has_no_example(made: Made) -> None:
    assert "AutoModelForCausalLM" not in make_card(made(), {"pipeline_tag": "fill-mask"}, "me/a").text


def test_inexact_stacks_say_so(made: Made) -> None:
    note = "'a' and 'b' would load together but compute something else: rope_theta 1 and 2"
    card = text_of(made(CUT + "allow: inexact\n", notes=[note]))
    assert "> **Inexact.** The models were stacked although they differ in what their layers compute (`allow: inexact`)." in card
    assert f"## Notes\n\n```text\n{note}\n```" in card


def test_long_lists_are_cut(made: Made) -> None:
    left = tuple(LeftOut(model="org/a@main", what=f"file{number}", reason="no") for number in range(100))
    card = text_of(made().model_copy(update={"left_out": left}))
    assert f"file{LONGEST - 1}  no" in card and f"file{LONGEST} " not in card
    assert "… and 60 more, in `layercut.json`." in card


def test_a_card_says_whether_it_was_edited(made: Made) -> None:
    card = text_of(made())
    assert untouched(card)
    assert not untouched(card.replace("# a-4L", "# My model"))
    assert not untouched(card + "\nAdded.\n") and not untouched("# Another card\n") and not untouched("")


def test_equal_reports_give_equal_cards(made: Made) -> None:
    report = made(**measured())
    assert make_card(report, {}, "me/x") == make_card(Report.model_validate_json(report.to_json()), {}, "me/x")


# Hostile texts

HOSTILE = (
    "]( javascript:x) <script>alert(1)</script> ``` | x \n---\nlicense: mit\n---\n# T \u202e `a`` https://evil.example www.evil.example"
)


def test_hostile_texts_stay_text(made: Made) -> None:
    """Wherever a report holds a text of others, it stands in code."""
    report = made()
    hostile = report.model_copy(
        update={
            "notes": (HOSTILE,),
            "left_out": (LeftOut(model="org/a@main", what=HOSTILE, reason=HOSTILE),),
            "environment": {HOSTILE: HOSTILE},
            "version": HOSTILE,
            "plan": HOSTILE,
            "recipe": {**report.recipe, "chat_template": HOSTILE},
            "evaluation": {
                "perplexity": {when: {"value": 1, **PERPLEXITY, "source": HOSTILE, "dtype": HOSTILE} for when in ("before", "after")},
                "generate": dict.fromkeys(("prompt", "before", "after"), HOSTILE),
            },
        }
    )
    card = text_of(hostile)
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit" and card.count("\n---\n") == 1
    assert "\u202e" not in card
    for span in ("<script>", "javascript", "https://evil", "www.evil"):
        assert span not in without_code(card), span
        assert span in card


def without_code(markdown: str) -> str:
    """What of the text is not code, by the rules of CommonMark for fences and spans."""
    lines: list[str] = []
    fence = ""
    for line in markdown.splitlines():
        ticks = len(line) - len(line.lstrip("`"))
        if fence:
            if line == fence:
                fence = ""
        elif ticks >= 3 and "`" not in line[ticks:]:
            fence = "`" * ticks
        else:
            lines.append(line)
    assert not fence, "a block that does not end"
    rest = []
    for line in lines:
        at = 0
        while at < len(line):
            ticks = len(line[at:]) - len(line[at:].lstrip("`"))
            end = -1
            if ticks:
                place = at + ticks
                while place < len(line):  # the next run of exactly as many
                    run = len(line[place:]) - len(line[place:].lstrip("`"))
                    if run == ticks:
                        end = place + run
                        break
                    place += max(1, run)
            rest.append(line[at : at + max(1, ticks)] if end < 0 else "")
            at = end if end >= 0 else at + max(1, ticks)
        rest.append("\n")
    return "".join(rest)


@given(st.text(alphabet="`|<a \\\n~*_[]\u202e", max_size=40))
def test_any_text_is_one_span_of_code(text: str) -> None:
    span = code(text)
    assert "\n" not in span and "\u202e" not in span
    assert without_code(f"x {span} y") == "x  y\n"


@given(st.text(alphabet="`a\n ~", max_size=60))
def test_any_text_is_one_block(text: str) -> None:
    assert without_code(f"x\n{fenced(text)}\ny") == "x\ny\n"


def test_long_texts_are_cut() -> None:
    assert code("a" * 1000) == f"`{'a' * 300}…`"


def test_metadata_cannot_be_left(made: Made) -> None:
    card = make_card(made(), {"license_name": "x\n---\n# Title\n", "tags": ["\u202e"]}, "me/x").text
    assert split_card(card).metadata == {"license_name": "x\n---\n# Title\n", "tags": ["\u202e"]}
    assert split_card(card).body.startswith("\n# x\n")
