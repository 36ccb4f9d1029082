from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import byte_tensors, write_checkpoint
from huggingface_hub import ModelCardData

from layercut.cardmetadata import base_models, card_metadata, choose_licence, is_merge, is_pruned, tags
from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.errors import LayercutError
from layercut.executor import execute
from layercut.planner import build_plan
from layercut.recipe import parse_recipe
from layercut.report import Report
from layercut.stated import Licence, Stated
from layercut.upload import Upload
from layercut.yamltext import YamlText

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Made = Callable[[str], Report]
ONE, TWO = "model: org/a\n", "slices:\n- {model: org/a, layer_range: [0, 4]}\n- {model: org/b, layer_range: [3, 6]}\n"
MIT, APACHE = Stated(Licence(("mit",))), Stated(Licence(("apache-2.0",)))
NAMED = Licence(("other",), "Terms", "LICENSE")


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """The report of a recipe whose models are of the Hub, but those whose names begin with a dot."""

    def make(text: str) -> Report:
        def resolve(reference: str) -> Checkpoint:
            folder = tmp_path / "models" / reference.replace("@", "/").lstrip("./")
            if not folder.exists():
                config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 6, "vocab_size": 8}
                write_checkpoint(folder, byte_tensors(6, reference), config)
                (folder / "LICENSE").write_text("Do what you like.\n", encoding="utf-8")
            return open_checkpoint(folder, reference=reference, revision=None if reference.startswith(".") else COMMIT)

        def never(*_: object) -> None:
            raise AssertionError("nothing is measured here")

        plan = build_plan(parse_recipe(YamlText(text, "r.yaml")), resolve=resolve, measure=never)  # type: ignore[arg-type]
        return execute(plan, tmp_path / "out", overwrite=True, progress=False)

    return make


def choose(report: Report, stated: Mapping[str, Stated], upload: Upload | None) -> Licence:
    return choose_licence(report.sources, report.files, stated, upload)


def checked(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata that the client of the Hub reads as it was meant, from the YAML that cards are written in."""
    again = yaml.safe_load(yaml.safe_dump(dict(metadata), sort_keys=False))
    assert again == metadata
    assert ModelCardData(**again).to_dict() == again
    return dict(metadata)


def test_pruning(made: Made) -> None:
    stated = {"org/a": Stated(Licence(("apache-2.0",)), ("en",), ("allenai/c4",), None)}
    report = made(ONE + "steps: [{prune: {at: [2, 3]}}]\n")
    metadata = card_metadata(report, stated, choose(report, stated, None), ["LlamaForCausalLM"])
    assert checked(metadata) == {
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/a",
        "tags": ["layercut", "depth-pruning"],
        "datasets": ["allenai/c4"],
    }, "no relation: it was neither trained, nor merged, nor quantised"


def test_a_frankenmerge(made: Made) -> None:
    metadata = card_metadata(made(TWO), {"org/a": MIT, "org/b": MIT}, Licence(("mit",)), ["LlamaForCausalLM"])
    assert checked(metadata) == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": ["org/a", "org/b"],
        "base_model_relation": "merge",
        "tags": ["layercut", "merge"],
    }


@pytest.mark.parametrize(
    ("recipe", "pruned", "merged"),
    [
        (ONE, False, False),
        (ONE + "steps: [{prune: {at: 2}}]\n", True, False),
        (ONE + "steps: [{keep: {at: '0-3'}}]\n", True, False),
        (ONE + "steps: [{duplicate: {at: '1-2'}}]\n", False, True),
        (ONE + "steps: [{prune: {at: [0, 1]}}, {duplicate: {at: 2}}]\n", True, True),
        (ONE + "steps: [{reorder: {to: [1, 0, '2-5']}}]\n", False, False),
        (TWO, False, True),
        ("slices:\n- {model: org/a, layer_range: [0, 4]}\n- {model: org/a, layer_range: [2, 6]}\n", False, True),
        ("slices:\n- {model: org/a, layer_range: [0, 2]}\n- {model: org/a, layer_range: [4, 6]}\n", True, False),
        ("slices:\n- {model: org/a, layer_range: [0, 2]}\n- {model: org/b, layer_range: [4, 6]}\n", False, True),
    ],
)
def test_what_an_output_is(made: Made, recipe: str, pruned: bool, merged: bool) -> None:
    report = made(recipe)
    assert (is_pruned(report), is_merge(report)) == (pruned, merged)
    assert tags(report) == ["layercut", *["depth-pruning"] * pruned, *["merge"] * merged]
    assert (card_metadata(report, {}, Licence()).get("base_model_relation") == "merge") == merged


def test_folders_of_this_machine_are_no_base_models(made: Made) -> None:
    report = made(TWO.replace("org/b", "./b"))
    metadata = checked(card_metadata(report, {}, Licence()))
    assert base_models(report) == ("org/a",)
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/a", "merge")
    alone = checked(card_metadata(made("model: ./b\nsteps: [{duplicate: {at: 2}}]\n"), {}, Licence()))
    assert alone == {"library_name": "transformers", "tags": ["layercut", "merge"]}


def test_only_layers_make_a_base_model(made: Made) -> None:
    report = made(TWO + "tokenizer_source: org/c\nbase_model: org/d\n")
    assert set(report.sources) == {"org/a", "org/b", "org/c", "org/d"}
    assert base_models(report) == ("org/a", "org/b")


def test_the_revision_is_no_part_of_the_id(made: Made) -> None:
    assert base_models(made("model: org/a@refs/pr/3\n")) == ("org/a",)


@pytest.mark.parametrize(
    ("stated", "architectures", "task"),
    [
        ("image-text-to-text", ["LlamaForCausalLM"], "image-text-to-text"),
        (None, ["LlamaForCausalLM"], "text-generation"),
        (None, ["GPT2LMHeadModel"], "text-generation"),
        (None, ["BertForMaskedLM"], "fill-mask"),
        (None, ["BertForSequenceClassification"], "text-classification"),
        (None, ["BertModel"], None),
        (None, [], None),
        (None, [7], None),
    ],
)
def test_the_task(made: Made, stated: str | None, architectures: list[object], task: str | None) -> None:
    assert card_metadata(made(ONE), {"org/a": Stated(pipeline_tag=stated)}, Licence(), architectures).get("pipeline_tag") == task


def test_languages_and_data_are_those_of_all_sources(made: Made) -> None:
    report = made(TWO)
    english, german = Stated(languages=("en",), datasets=("x/y",)), Stated(languages=("de",), datasets=("x/y",))
    assert card_metadata(report, {"org/a": english, "org/b": english}, Licence())["language"] == ["en"]
    mixed = card_metadata(report, {"org/a": english, "org/b": german}, Licence())
    assert "language" not in mixed and "datasets" not in mixed
    assert "language" not in card_metadata(report, {"org/a": english}, Licence()), "of one nothing is known"


# Licences


def test_a_licence_is_inherited(made: Made) -> None:
    assert choose(made(ONE), {"org/a": MIT}, None) == Licence(("mit",))
    assert choose(made(TWO), {"org/a": MIT, "org/b": MIT}, None) == Licence(("mit",))
    assert choose(made(ONE), {}, None) == Licence()


def test_licences_that_differ_are_asked_about(made: Made) -> None:
    with pytest.raises(LayercutError) as caught:
        choose(made(TWO), {"org/a": MIT, "org/b": APACHE}, Upload(repo="me/x"))
    assert str(caught.value) == (
        "the sources differ in their licences: 'org/a' states mit, 'org/b' states apache-2.0; "
        "say which holds for the result: upload: {license: …} in the recipe, or push --license"
    )


def test_an_unknown_licence_is_not_taken_for_the_known_one(made: Made) -> None:
    with pytest.raises(LayercutError, match="'org/a' states mit, 'org/b' states no licence"):
        choose(made(TWO), {"org/a": MIT}, None)


def test_a_tokenizer_has_a_licence_too(made: Made) -> None:
    with pytest.raises(LayercutError, match=r"'org/c' states apache-2\.0"):
        choose(made(ONE + "tokenizer_source: org/c\n"), {"org/a": MIT, "org/c": APACHE}, None)


def test_the_answer_in_the_recipe_counts(made: Made) -> None:
    upload = Upload(repo="me/x", license="other", license_name="Both", license_link="LICENSE")
    licence = choose(made(TWO), {"org/a": MIT, "org/b": APACHE}, upload)
    metadata = checked(card_metadata(made(TWO), {}, licence))
    assert [metadata[key] for key in ("license", "license_name", "license_link")] == ["other", "Both", "LICENSE"]


def test_links_to_the_file_of_a_licence(made: Made) -> None:
    """The LICENSE of the donor goes along. Another's is linked where it is."""
    assert choose(made(ONE), {"org/a": Stated(NAMED)}, None) == NAMED
    elsewhere = NAMED._replace(link="TERMS.md")
    link = f"https://huggingface.co/org/a/blob/{COMMIT}/TERMS.md"
    assert choose(made(ONE), {"org/a": Stated(elsewhere)}, None) == NAMED._replace(link=link)
    assert choose(made("model: ./a\n"), {"./a": Stated(elsewhere)}, None) == NAMED._replace(link=None)


def test_equal_licences_with_links_of_their_own_are_equal(made: Made) -> None:
    stated = {"org/a": Stated(NAMED._replace(link="A")), "org/b": Stated(NAMED._replace(link="B"))}
    assert choose(made(TWO), stated, None).link == f"https://huggingface.co/org/a/blob/{COMMIT}/A"


def test_several_licences_of_one_model(made: Made) -> None:
    licence = Licence(("mit", "apache-2.0"))
    assert checked(card_metadata(made(ONE), {}, licence))["license"] == ["mit", "apache-2.0"]
