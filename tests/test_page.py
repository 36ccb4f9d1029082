from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from layercut.page import make_page
from layercut.plan import Table

HOSTILE = "</script><script>alert(1)</script><!-- @DATA@ @TITLE@ &amp; \u2028 \u202e ' \" \\"
# As it is shown: what works on the direction of text is spelled out.
SHOWN = HOSTILE.replace("\u2028", "\\u2028").replace("\u202e", "\\u202e")


def table(mean: list[list[float]], metric: str = "angular[last]", a: str = "m", b: str = "m") -> Table:
    rows = tuple(map(tuple, mean))
    return Table(metric=metric, a=a, b=b, mean=rows, stderr=rows)


SQUARE = [[0.0, 1.0, 3.0], [1.0, 0.0, 2.0], [3.0, 2.0, 0.0]]


class Reader(HTMLParser):
    """Elements as a browser finds them: scripts with their text, and every attribute."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.scripts: list[str] = []
        self.title = ""
        self.links: list[str] = []
        self.policy = ""
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        found = dict(attrs)
        if tag == "script":
            self.scripts.append("")
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        if self._inside == "title":
            self.title += data


def test_the_page_holds_blocks_by_size() -> None:
    page = Reader(make_page("Distances of m", "on 4 samples", [table(SQUARE)]))
    assert page.title == "Distances of m"
    assert json.loads(page.scripts[0]) == {
        "about": "on 4 samples",
        "views": [{"a": "m", "b": "m", "metric": "angular[last]", "mean": [[1.0, 2.0]], "stderr": [[1.0, 2.0]]}],
    }


def test_between_two_models_the_whole_table_is_there() -> None:
    page = Reader(make_page("t", "", [table(SQUARE, a="one", b="two")]))
    assert json.loads(page.scripts[0])["views"][0]["mean"] == SQUARE


def test_names_of_others_are_text_and_nothing_else() -> None:
    page = Reader(make_page(HOSTILE, HOSTILE, [table(SQUARE, HOSTILE, HOSTILE, HOSTILE)]))
    assert len(page.scripts) == 2, "the data and the program"
    data = json.loads(page.scripts[0])
    assert page.title == SHOWN
    assert data["about"] == SHOWN
    assert data["views"][0] == {"a": SHOWN, "b": SHOWN, "metric": SHOWN, "mean": [[1.0, 2.0]], "stderr": [[1.0, 2.0]]}
    assert not re.search("[<>&]", page.scripts[0])


def test_the_page_asks_nothing_of_the_network() -> None:
    text = make_page("t", "", [table(SQUARE)])
    page = Reader(text)
    assert page.links == []
    assert page.policy.startswith("default-src 'none';")
    assert not re.search(r"https?:|//[a-z]|\bimport\b|fetch\(|XMLHttp|url\(|innerHTML|insertAdjacent|document\.write", text)


def test_the_program_finds_every_element_that_it_names() -> None:
    text = make_page("t", "", [table(SQUARE)])
    ids = set(re.findall(r'id="([\w-]+)"', text))
    assert set(re.findall(r'\bat\("([\w-]+)"\)', text)) <= ids
    assert {"map", "line", "rows", "metrics", "pairs", "scales", "tip"} <= ids


def test_numbers_are_rounded_to_what_a_page_can_show() -> None:
    page = Reader(make_page("t", "", [table([[0.0, 1 / 3, 0.1], [1 / 3, 0.0, 2e-9], [0.1, 2e-9, 0.0]])]))
    assert json.loads(page.scripts[0])["views"][0]["mean"] == [[0.3333333, 2e-9]]


def test_the_same_tables_give_the_same_page() -> None:
    assert make_page("t", "a", [table(SQUARE)]) == make_page("t", "a", [table(SQUARE)])
