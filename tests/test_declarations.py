"""Declarations: what a recipe says of an architecture means the values and tensors that it names, and no others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from layercut.declarations import NOTHING, Architecture
from layercut.errors import RecipeError
from layercut.recipe import load_recipe
from layercut.record import field_docs

WORDS = ("depth_keys", "lists", "indices", "numbers", "counts", "prefixes", "tables", "ignore")


@pytest.mark.parametrize(
    ("names", "node", "keys"),
    [
        ((), (), []),
        (("loops",), (), ["loops"]),
        (("loops",), ("text_config",), ["loops"]),
        (("text_config.loops",), ("text_config",), ["loops"]),
        (("text_config.loops",), (), []),
        (("text_config.loops",), ("vision_config",), []),
        (("text_config.loops",), ("text_config", "deep_config"), []),
        (("text_config.deep_config.loops",), ("text_config", "deep_config"), ["loops"]),
        (("text_config.deep_config.loops",), ("text_config",), []),
        (("text_configs.loops",), ("text_config",), []),
        (("b", "text_config.a", "c"), ("text_config",), ["b", "a", "c"]),
    ],
)
def test_keys_of_a_node(names: tuple[str, ...], node: tuple[str, ...], keys: list[str]) -> None:
    assert list(Architecture.keys(names, node)) == keys


@pytest.mark.parametrize(
    ("names", "path", "meant"),
    [
        (("loops",), ("loops",), True),
        (("loops",), ("text_config", "loops"), True),
        (("text_config.loops",), ("text_config", "loops"), True),
        (("text_config.loops",), ("loops",), False),
        (("text_config.loops",), ("vision_config", "loops"), False),
        (("text_config",), ("text_config", "loops"), False),
        (("loop",), ("loops",), False),
        ((), ("loops",), False),
    ],
)
def test_values_by_their_path(names: tuple[str, ...], path: tuple[str, ...], meant: bool) -> None:
    assert NOTHING.names(names, path) is meant


@pytest.mark.parametrize(
    ("ignore", "tensor", "ignored"),
    [
        (("model.gains",), "model.gains", True),
        (("model.gains",), "model.gains.0.w", True),
        (("model.gains",), "model.gains.", True),
        (("model.gains.",), "model.gains.0.w", True),
        (("model.gains.",), "model.gains", False),
        (("model.gains",), "model.gains2.0.w", False),
        (("model.gains",), "other.model.gains.0.w", False),
        (("model.gains.0",), "model.gains.01.w", False),
        (("a", "model.gains"), "model.gains", True),
        ((), "model.gains", False),
    ],
)
def test_tensors_that_are_ignored(ignore: tuple[str, ...], tensor: str, ignored: bool) -> None:
    assert Architecture(ignore=ignore).ignores(tensor) is ignored


PARTS = st.lists(st.text("abc_", min_size=1, max_size=4), min_size=1, max_size=4)


@given(PARTS, PARTS)
def test_a_dotted_name_means_one_node(path: list[str], other: list[str]) -> None:
    """The key of its own node, and of no other; both ways of asking agree."""
    *node, key = path
    dotted = ".".join(path)
    assert list(Architecture.keys([dotted], node)) == [key]
    assert NOTHING.names([dotted], path)
    if len(path) > 1 and other != node:
        assert list(Architecture.keys([dotted], other)) == []
        assert not NOTHING.names([dotted], [*other, key])


@given(PARTS, st.text("abc_.0123", max_size=8))
def test_what_is_ignored_stands_below_its_name(prefix: list[str], rest: str) -> None:
    name = ".".join(prefix)
    declared = Architecture(ignore=(name,))
    assert declared.ignores(name) and declared.ignores(f"{name}.{rest}") and not declared.ignores(f"x{name}.{rest}")
    assert Architecture(ignore=(f"{name}.",)).ignores(f"{name}.{rest}")
    assert not NOTHING.ignores(name)


def test_nothing_is_declared_by_default() -> None:
    assert Architecture() == NOTHING and set(NOTHING.model_dump().values()) == {()}
    assert tuple(Architecture.model_fields) == WORDS
    docs = field_docs(Architecture)
    assert tuple(docs) == WORDS and all(text.endswith(".") for text in docs.values())


@pytest.mark.parametrize("word", WORDS)
def test_empty_names_are_none(word: str) -> None:
    with pytest.raises(ValidationError, match="at least 1 character"):
        Architecture.model_validate({word: [""]})


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        NOTHING.lists = ("x",)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{list: [x]}", "recipe.yaml:2:16: unknown key 'list'; did you mean 'lists'?"),
        ("{lists: x}", "recipe.yaml:2:23: architecture.lists: expected a list, found 'x'"),
        ("{lists: ['']}", "recipe.yaml:2:24: architecture.lists.0: expected some text, found ''"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(tmp_path_factory: pytest.TempPathFactory, text: str, message: str) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(f"model: ./m\narchitecture: {text}\nsteps: [{{prune: {{at: 1}}}}]\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).removeprefix(f"{path.parent}/") == message
