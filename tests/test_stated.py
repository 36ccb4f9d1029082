from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut.stated import Licence, Stated, is_repo, is_web, pinned_link, read_stated, split_card


def card(metadata: str, body: str = "# A model\n") -> str:
    return f"---\n{metadata}---\n{body}"


def test_what_a_card_states() -> None:
    text = card(
        "license: apache-2.0\nlanguage: [en, de]\ndatasets:\n- allenai/c4\n- wikitext\npipeline_tag: text-generation\nbase_model: a/b\n"
    )
    assert read_stated(text) == Stated(Licence(("apache-2.0",)), ("en", "de"), ("allenai/c4", "wikitext"), "text-generation")


def test_a_licence_with_a_name_of_its_own() -> None:
    text = card("license: other\nlicense_name: Gemma terms\nlicense_link: https://ai.google.dev/gemma/terms\n")
    licence = read_stated(text).licence
    assert licence == Licence(("other",), "Gemma terms", "https://ai.google.dev/gemma/terms")
    assert str(licence) == "states other (Gemma terms)"
    assert str(Licence(("mit", "apache-2.0"))) == "states mit, apache-2.0" and str(Licence()) == "states no licence"


def test_norwegian_is_a_language() -> None:
    assert read_stated(card("language: no\n")).languages == ("no",)
    assert read_stated(card("language: [nb, no, nn, no]\n")).languages == ("nb", "no", "nn")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# A model without metadata\n",
        "---\nlicense: mit\n",
        "--- license: mit ---\n",
        "text before\n---\nlicense: mit\n---\n",
        card("- a list\n"),
        card("license: [\n"),
        card("a: &a [*a]\n"),
        card("license: {mit: 1}\n"),
        card("license: 7\nlanguage: {}\ndatasets: null\npipeline_tag: [text-generation]\n"),
        card('license: "mit\\nbase_model: x"\n'),
        card("license: <script>\nlanguage: '](x)'\ndatasets: ../../etc\npipeline_tag: 'a b'\n"),
        card("license_name: \"a\\x1b[0m\"\nlicense_link: 'javascript:alert(1)'\n"),
        card("license: " + "a" * 100 + "\n"),
    ],
)
def test_what_is_of_another_form_counts_for_nothing(text: str) -> None:
    assert read_stated(text) == Stated()


def test_metadata_and_body() -> None:
    assert split_card(card("a: 1\n", "# Body\n")) == ({"a": 1}, "# Body\n")
    assert split_card("\ufeff---\r\na: 1\r\n---\r\nBody") == ({"a": 1}, "Body")
    assert split_card(card("a: [\n", "Body")) == ({}, "Body"), "what cannot be read does not become text"
    assert split_card("no metadata") == ({}, "no metadata")


def test_long_lists_are_cut() -> None:
    assert len(read_stated(card(f"datasets: [{', '.join(f'd{number}' for number in range(2000))}]\n")).datasets) == 500


@pytest.mark.parametrize("name", ["gpt2", "org/name", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b.c_d", "_/x"[2:], "a/_b"])
def test_repositories(name: str) -> None:
    assert is_repo(name)


@pytest.mark.parametrize(
    "name",
    ["", "/a", "a/", "a/b/c", "./a", "../a", "a b", "a--b", "a..b", "-a/b", "a.git", "a\n", "a/b\n", "~/a", "a@main", "ä/b", "x" * 97],
)
def test_names_that_no_repository_has(name: str) -> None:
    assert not is_repo(name)


@pytest.mark.parametrize("link", ["https://a.org/x?y=1#z", "http://a.org"])
def test_web_addresses(link: str) -> None:
    assert is_web(link)


@pytest.mark.parametrize(
    "link",
    [
        "LICENSE",
        "javascript:x",
        "https://",
        "https://user:secret@a.org",
        "https://a.org/ x",
        "https://a.org/<b>",
        "https://[a",
        "ftp://a.org",
    ],
)
def test_no_web_addresses(link: str) -> None:
    assert not is_web(link)


def test_a_link_to_a_file_is_kept_where_the_file_goes_along() -> None:
    assert pinned_link("LICENSE", "a/b", "c0", {"LICENSE": 1}) == "LICENSE"
    assert pinned_link("LICENSE.md", "a/b", "c0", {}) == "https://huggingface.co/a/b/blob/c0/LICENSE.md"
    assert pinned_link("LICENSE.md", None, None, {}) is None
    assert pinned_link("https://a.org/l", None, None, {}) == "https://a.org/l"
    assert pinned_link(None, "a/b", "c0", {}) is None


@given(st.text(max_size=200))
def test_any_text_can_be_read(text: str) -> None:
    for whole in (text, card(text + "\n"), card(f"license: {text}\nlanguage: [{text}]\nlicense_link: {text}\n")):
        stated = read_stated(whole)
        for value in (*stated.licence.ids, *stated.languages, *stated.datasets, stated.licence.name or "", stated.licence.link or ""):
            assert value.isprintable()
            assert value == stated.licence.name or not set(value) & set("<>`")
