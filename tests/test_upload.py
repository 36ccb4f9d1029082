from __future__ import annotations

import pytest

from layercut.errors import RecipeError
from layercut.recipe import Recipe, parse_recipe
from layercut.upload import Upload
from layercut.yamltext import YamlText


def recipe(upload: str) -> Recipe:
    return parse_recipe(YamlText(f"model: m\nupload: {upload}\n", "r.yaml"))


def uploaded(upload: str) -> Upload:
    found = recipe(upload).upload
    assert found is not None
    return found


def test_a_repository_alone() -> None:
    assert uploaded("user/name") == Upload(repo="user/name")
    assert (uploaded("name").target, uploaded("name").private, uploaded("name").create_pr) == ("main", None, False)
    assert recipe("null").upload is None


def test_everything_that_can_be_said() -> None:
    text = (
        "{repo: user/name, private: true, branch: 24-layers, message: ' Six layers fewer ', license: other, license_name: Mine, "
        "license_link: LICENSE, replace: true}"
    )
    found = uploaded(text)
    assert (found.target, found.private, found.message, found.replace) == ("24-layers", True, "Six layers fewer", True)
    assert recipe(text).described()["upload"]["branch"] == "24-layers"
    assert Recipe.model_validate(recipe(text).described()).upload == found


@pytest.mark.parametrize(
    ("upload", "said"),
    [
        ("7", "r.yaml:2:9: 'upload' is a repository such as user/name, or a mapping with a repo"),
        ("{}", "r.yaml:2:9: 'repo' is missing"),
        ("a/b/c", "expected a repository of the Hub such as user/name, or name for one of your own"),
        ("./name", "expected a repository of the Hub such as user/name, or name for one of your own"),
        ("{repo: a/b, privat: true}", "r.yaml:2:21: unknown key 'privat'; did you mean 'private'?"),
        ("{repo: a/b, branch: refs/pr/1}", "expected the name of a branch, such as main or 24-layers"),
        ("{repo: a/b, branch: a..b}", "expected the name of a branch, such as main or 24-layers"),
        ("{repo: a/b, branch: -x}", "expected the name of a branch, such as main or 24-layers"),
        ("{repo: a/b, branch: a.lock}", "expected the name of a branch, such as main or 24-layers"),
        ("{repo: a/b, branch: x, create_pr: true}", "a pull request goes to main: leave out branch, or create_pr"),
        ("{repo: a/b, license_name: x}", "license_name and license_link go with license: other"),
        ("{repo: a/b, license: other}", "license: other needs a license_name"),
        ('{repo: a/b, message: "a\\nb"}', "expected one line of text"),
        ("{repo: a/b, message: ' '}", "expected one line of text"),
    ],
)
def test_faults(upload: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(upload)
    assert said in str(caught.value), str(caught.value)
    assert str(caught.value).startswith("r.yaml:2:")


@pytest.mark.parametrize("branch", ["main", "24-layers", "feature/x", "v1.0", "a_b+c"])
def test_branches(branch: str) -> None:
    assert Upload(repo="a/b", branch=branch).target == branch
