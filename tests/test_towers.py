"""Towers: words in names say which stack is meant, and no word of a language model is mistaken for one of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut.towers import OTHER_STACKS, TEXT, TOWERS, Role, Side, role_of, side_of


@pytest.mark.parametrize(
    ("prefix", "tower", "side"),
    [
        ("model.layers.", "text", None),
        ("layers.", "text", None),
        ("h.", "text", None),
        ("", "text", None),
        ("transformer.h.", "text", None),
        ("model.language_model.layers.", "text", None),
        ("language_model.model.layers.", "text", None),
        ("thinker.model.layers.", "text", None),
        ("backbone.layers.", "text", None),
        ("bert.encoder.layer.", "text", "encoder"),
        ("encoder.block.", "text", "encoder"),
        ("model.decoder.layers.", "text", "decoder"),
        ("text_decoder.bert.encoder.layer.", "text", "decoder"),
        ("decoder.model.encoder.layers.", "text", "decoder"),
        ("visual.blocks.", "vision", None),
        ("vision_tower.vision_model.encoder.layers.", "vision", "encoder"),
        ("model.vit.layers.", "vision", None),
        ("image_encoder.layers.", "vision", "encoder"),
        ("video_tower.layers.", "vision", None),
        ("audio_tower.layers.", "audio", None),
        ("speech_encoder.layers.", "audio", "encoder"),
        ("mtp.layers.", "mtp", None),
        ("model.mtp_layers.", "mtp", None),
        ("draft_model.layers.", "draft", None),
        ("talker.model.layers.", "talker", None),
        ("talker.code_predictor.model.layers.", "talker", None),
        ("t2u_model.model.encoder.layers.", "t2u", "encoder"),
        ("depth_decoder.model.layers.", "depth_decoder", "decoder"),
        ("qformer.encoder.layer.", "qformer", "encoder"),
        ("action_expert.layers.", "action", None),
        ("model.dit.layers.", "action", None),
        ("multi_modal_projector.layers.", "projector", None),
        ("model.aligner.layers.", "projector", None),
        ("codec.layers.", "codec", None),
        ("vqmodel.encoder.layers.", "codec", "encoder"),
    ],
)
def test_prefixes(prefix: str, tower: str, side: Side | None) -> None:
    role = role_of(prefix.split("."))
    assert role == Role(tower, side)
    assert bool(OTHER_STACKS.search(prefix)) == (tower != TEXT)


@pytest.mark.parametrize(
    ("path", "tower", "side"),
    [
        ((), "text", None),
        (("text_config",), "text", None),
        (("llm_config",), "text", None),
        (("vision_config",), "vision", None),
        (("thinker_config", "vision_config"), "vision", None),
        (("audio_encoder_config",), "audio", "encoder"),
        (("text_config", "encoder"), "text", "encoder"),
        (("decoder",), "text", "decoder"),
        (("qformer_config",), "qformer", None),
    ],
)
def test_paths_in_a_config(path: tuple[str, ...], tower: str, side: Side | None) -> None:
    assert role_of(path) == Role(tower, side)


def test_the_first_row_decides() -> None:
    """A projector of images is a projector, the image part of a talker a talker."""
    assert role_of(["image_projector", "layers"]).tower == "projector"
    assert role_of(["talker", "vision", "layers"]).tower == "talker"
    assert role_of(["vision", "talker", "layers"]).tower == "talker"


@pytest.mark.parametrize(
    ("parts", "side"),
    [
        (["encoder"], "encoder"),
        (["decoder"], "decoder"),
        (["encoder_layers"], "encoder"),
        (["num_decoder_layers"], "decoder"),
        (["num_sparse_encoder_layers"], "encoder"),
        (["encoder", "decoder"], "encoder"),
        (["x", "text_decoder", "encoder"], "decoder"),
        (["encoder_decoder"], "encoder"),
        (["decoderlayers"], None),
        (["autoencoder"], None),
        (["encoders"], None),
        (["Encoder"], None),
        (["en", "coder"], None),
        (["num_hidden_layers"], None),
        ([], None),
    ],
)
def test_sides(parts: list[str], side: Side | None) -> None:
    assert side_of(parts) == side


@pytest.mark.parametrize(
    ("role", "name"),
    [
        (Role("text", None), "text"),
        (Role("text", "encoder"), "encoder"),
        (Role("text", "decoder"), "decoder"),
        (Role("vision", "encoder"), "vision"),
        (Role("depth_decoder", "decoder"), "depth_decoder"),
        (Role("audio", None), "audio"),
    ],
)
def test_names_of_stacks(role: Role, name: str) -> None:
    assert role.name == name


PLAIN = st.lists(st.sampled_from(["model", "layers", "language_model", "text", "mlp", "self_attn", "h", "blocks", "weight"]), max_size=5)


@given(PLAIN, st.sampled_from(TOWERS), st.data())
def test_a_word_of_a_tower_counts_wherever_it_stands(parts: list[str], row: tuple[str, str], data: st.DataObject) -> None:
    """Beside parts that mark nothing, and with whatever is joined to it by an underscore."""
    tower, words = row
    word = data.draw(st.sampled_from(words.replace(r"\b", "").split("|")))
    assert role_of(parts) == Role(TEXT, None)
    at = data.draw(st.integers(0, len(parts)))
    assert role_of([*parts[:at], word, *parts[at:]]).tower == tower


@given(PLAIN, st.sampled_from(["encoder", "decoder"]), st.integers(0, 5))
def test_a_prefix_before_it_changes_no_role(parts: list[str], side: str, at: int) -> None:
    assert role_of([*parts[:at], side, *parts[at:]]) == Role(TEXT, "encoder" if side == "encoder" else "decoder")


def test_every_tower_has_one_row() -> None:
    names = [name for name, _ in TOWERS]
    assert len(names) == len(set(names)) and TEXT not in names and not {"encoder", "decoder"} & set(names)
