from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_checkpoint

from layercut.architecture import Member, find_stack
from layercut.checkpoint import open_checkpoint
from layercut.ends import Ends, find_ends, is_tied, outside
from layercut.errors import RefusedError
from layercut.plan import Edit

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def member(folder: Path, head: bool, *, rows: int = 8, tensors: Tensors | None = None, **config: Any) -> Member:
    """A model of two layers, with or without a head in its file."""
    found: Tensors = {
        "model.embed_tokens.weight": ("U8", (rows, 2), bytes(2 * rows)),
        "model.layers.0.w": ("U8", (1,), b"0"),
        "model.layers.1.w": ("U8", (1,), b"1"),
        "model.norm.weight": ("U8", (2,), b"nn"),
        **({"lm_head.weight": ("U8", (rows, 2), bytes(2 * rows))} if head else {}),
        **(tensors or {}),
    }
    checkpoint = open_checkpoint(write_checkpoint(folder, found, {"model_type": "llama", "num_hidden_layers": 2, **config}))
    return Member(checkpoint, find_stack(checkpoint))


def named(ends: Ends) -> list[tuple[str, str, str]]:
    """Output name, model, and name in the source."""
    return [(part.name, part.model, part.tensor.name) for part in (*ends.before, *ends.behind)]


EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
TIED, FREE = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
NOTE = "head and embeddings stay tied: both come from 'a'"
UNTIE = "the head of 'b' is not the embeddings of 'a'"


@pytest.mark.parametrize(
    ("first", "last", "head", "edits", "notes"),
    [
        ((True, FREE), (True, FREE), ("b", HEAD), [], ()),
        ((False, TIED), (False, TIED), None, [], (NOTE,)),
        ((False, TIED), (True, FREE), ("b", HEAD), [("tie_word_embeddings", True, False, UNTIE)], ()),
        ((True, FREE), (False, TIED), ("b", EMBED), [], ()),
        ((False, FREE), (False, TIED), None, [("tie_word_embeddings", False, True, "the head of 'b' is tied to the embeddings")], (NOTE,)),
        # the key is absent: the file shows it
        ((True, {}), (True, {}), ("b", HEAD), [], ()),
        ((False, {}), (False, {}), None, [], (NOTE,)),
        ((False, {}), (True, {}), ("b", HEAD), [("tie_word_embeddings", None, False, UNTIE)], ()),
        ((True, {}), (False, {}), ("b", EMBED), [], ()),
        # a head that is in the file although the config ties it
        ((True, TIED), (True, TIED), ("b", HEAD), [("tie_word_embeddings", True, False, UNTIE)], ()),
        ((True, TIED), (False, TIED), ("b", EMBED), [("tie_word_embeddings", True, False, UNTIE)], ()),
    ],
)
def test_embeddings_of_the_first_model_and_head_of_the_last(
    first: tuple[bool, dict[str, bool]],
    last: tuple[bool, dict[str, bool]],
    head: tuple[str, str] | None,
    edits: list[tuple[str, Any, Any, str]],
    notes: tuple[str, ...],
    tmp_path: Path,
) -> None:
    members = {"a": member(tmp_path / "a", first[0], **first[1]), "b": member(tmp_path / "b", last[0], **last[1])}
    ends = find_ends(members, "a", "a", "b")
    assert named(ends) == [(EMBED, "a", EMBED), (NORM, "b", NORM), *([(HEAD, *head)] if head else [])]
    assert ends.edits == tuple(Edit(key=key, before=before, after=after, reason=reason) for key, before, after, reason in edits)
    assert ends.notes == notes


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("config", [TIED, FREE, {}])
def test_one_model_is_left_as_it_is(head: bool, config: dict[str, bool], tmp_path: Path) -> None:
    ends = find_ends({"a": member(tmp_path / "a", head, **config)}, "a", "a", "a")
    assert named(ends) == [(EMBED, "a", EMBED), (NORM, "a", NORM), *([(HEAD, "a", HEAD)] if head else [])]
    assert (ends.edits, ends.notes) == ((), ())


@pytest.mark.parametrize(
    ("model", "donor", "after", "reason"),
    [
        ((True, FREE), (False, TIED), False, "the head of 'a' is not other embeddings"),
        ((False, TIED), (True, FREE), True, "the head of 'a' is tied to the embeddings"),
        ((True, FREE), (True, FREE), None, ""),
        ((False, TIED), (False, TIED), None, ""),
        ((True, {}), (False, {}), False, "the head of 'a' is not other embeddings"),
    ],
)
def test_the_config_of_a_base_model_says_what_the_layers_need(
    model: tuple[bool, dict[str, bool]], donor: tuple[bool, dict[str, bool]], after: bool | None, reason: str, tmp_path: Path
) -> None:
    members = {"a": member(tmp_path / "a", model[0], **model[1]), "base": member(tmp_path / "base", donor[0], **donor[1])}
    ends = find_ends(members, "base", "a", "a")
    assert {part.model for part in (*ends.before, *ends.behind)} == {"a"}
    before = donor[1].get("tie_word_embeddings")
    expected = () if after is None else (Edit(key="tie_word_embeddings", before=before, after=after, reason=reason),)
    assert ends.edits == expected


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"text_config": {"num_hidden_layers": 2, "tie_word_embeddings": True}}, "text_config.tie_word_embeddings"),
        ({"text_config": {"num_hidden_layers": 2}, "tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"text_config": {"num_hidden_layers": 2}}, "text_config.tie_word_embeddings"),
        (
            {"text_config": {"num_hidden_layers": 2, "tie_word_embeddings": True}, "tie_word_embeddings": False},
            "text_config.tie_word_embeddings",
        ),
    ],
)
def test_ties_are_written_where_the_config_speaks_of_them(config: dict[str, Any], key: str, tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": ("U8", (8, 2), bytes(16)),
        "model.layers.0.w": ("U8", (1,), b"0"),
        "model.layers.1.w": ("U8", (1,), b"1"),
    }
    members = {}
    for name, head in (("a", {}), ("b", {"lm_head.weight": ("U8", (8, 2), bytes(16))})):
        checkpoint = open_checkpoint(write_checkpoint(tmp_path / name, {**tensors, **head}, config))
        members[name] = Member(checkpoint, find_stack(checkpoint))
    assert is_tied(members["a"])
    (edit,) = find_ends(members, "a", "a", "b").edits
    assert (edit.key, edit.after) == (key, False)


@pytest.mark.parametrize(
    ("first", "last", "donor", "message"),
    [
        (8, 9, "a", "'a' and 'b' do not fit together: the shape of lm_head.weight is [8, 2] in one and [9, 2] in the other"),
        (8, 9, "b", "'b' and 'a' do not fit together: the shape of model.embed_tokens.weight is [9, 2] in one and [8, 2] in the other"),
    ],
)
def test_vocabularies_of_two_sizes_would_not_load(first: int, last: int, donor: str, message: str, tmp_path: Path) -> None:
    members = {"a": member(tmp_path / "a", True, rows=first, **FREE), "b": member(tmp_path / "b", True, rows=last, **FREE)}
    with pytest.raises(RefusedError) as caught:
        find_ends(members, donor, "a", "b")
    assert str(caught.value) == message


def test_a_head_is_held_against_the_embeddings_that_the_donor_ties_it_to(tmp_path: Path) -> None:
    members = {"a": member(tmp_path / "a", False, **TIED), "b": member(tmp_path / "b", True, rows=9, **FREE)}
    with pytest.raises(RefusedError) as caught:
        find_ends(members, "a", "a", "b")
    assert str(caught.value) == "'a' and 'b' do not fit together: the shape of lm_head.weight is [8, 2] in one and [9, 2] in the other"


def test_a_base_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    members = {"a": member(tmp_path / "a", True, **FREE), "base": member(tmp_path / "base", True, rows=9, **FREE)}
    with pytest.raises(RefusedError) as caught:
        find_ends(members, "base", "a", "a")
    expected = "'base' and 'a' do not fit together: the shape of model.embed_tokens.weight is [9, 2] in one and [8, 2] in the other"
    assert str(caught.value) == expected


def test_a_model_without_a_head_is_not_called_tied(tmp_path: Path) -> None:
    score = {"score.weight": ("U8", (1, 2), b"ss")}
    members = {name: member(tmp_path / name, False, tensors=score, **FREE) for name in ("a", "b")}
    ends = find_ends(members, "a", "a", "b")
    assert (ends.edits, ends.notes) == ((), ())
    assert ("score.weight", "b", "score.weight") in named(ends)


@pytest.mark.parametrize(
    ("head", "config", "tied"),
    [(True, {}, False), (False, {}, True), (True, TIED, True), (False, FREE, False), (False, {"tie_word_embeddings": None}, False)],
)
def test_what_is_tied(head: bool, config: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    assert is_tied(member(tmp_path / "m", head, **config)) is tied


@pytest.mark.parametrize(
    ("name", "behind"),
    [
        ("model.norm.weight", True),
        ("lm_head.weight", True),
        ("transformer.ln_f.weight", True),
        ("ln_f.bias", True),
        ("model.final_layernorm.weight", True),
        ("gpt_neox.final_layer_norm.weight", True),
        ("model.decoder.final_layer_norm.weight", True),
        ("backbone.norm_f.weight", True),
        ("embed_out.weight", True),
        ("output.weight", True),
        ("score.weight", True),
        ("classifier.dense.weight", True),
        ("model.decoder.project_out.weight", True),
        ("language_model.lm_head.weight", True),
        ("model.embed_tokens.weight", False),
        ("transformer.wte.weight", False),
        ("transformer.wpe.weight", False),
        ("embeddings.word_embeddings.weight", False),
        ("embeddings.LayerNorm.weight", False),
        ("transformer.word_embeddings_layernorm.weight", False),
        ("model.rotary_emb.inv_freq", False),
        ("multi_modal_projector.linear_1.weight", False),
    ],
)
def test_what_stands_before_the_layers_and_what_behind(name: str, behind: bool, tmp_path: Path) -> None:
    tensors: Tensors = {"model.layers.0.w": ("U8", (1,), b"0"), name: ("U8", (1,), b"x")}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", tensors, {"num_hidden_layers": 1}))
    parts = outside(checkpoint, find_stack(checkpoint))
    assert [tensor.name for tensor in parts[behind]] == [name]
    assert parts[not behind] == ()


def test_edits_of_the_ends_reach_the_config_text(tmp_path: Path) -> None:
    """A key that is missing goes to the end of its object."""
    from layercut.planner import build_plan
    from layercut.recipe import parse_recipe
    from layercut.yamltext import YamlText

    members = {"a": member(tmp_path / "a", False), "b": member(tmp_path / "b", True)}
    text = "slices: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [1, 2]}]"
    recipe = parse_recipe(YamlText(text, "r.yaml"))
    plan = build_plan(recipe, resolve=lambda name: members[name].checkpoint, measure=lambda *_: pytest.fail("static"))
    assert plan.actions.config == '{\n  "model_type": "llama",\n  "num_hidden_layers": 2,\n  "tie_word_embeddings": false\n}\n'
    assert json.loads(plan.actions.config)["tie_word_embeddings"] is False
    assert [edit.key for edit in plan.edits] == ["tie_word_embeddings"]
    head = next(tensor for file in plan.actions.files for tensor in file.tensors if tensor.name == HEAD)
    assert head.model == "b"
    assert [(left.model, left.what) for left in plan.left_out] == [
        ("a", "layer 1 (1 tensor, model.layers.*)"), ("a", NORM), ("b", "layer 0 (1 tensor, model.layers.*)"), ("b", EMBED),
        ("b", "config.json"),
    ]  # fmt: skip
