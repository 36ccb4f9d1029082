from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut.companions import SCAFFOLD, UNCUT, files_beside, is_plain, left_out_reason, listed_beside

FILES = {
    "config.json": 2,
    "model.safetensors": 100,
    "tokenizer.json": 7,
    "sub/notes.md": 5,
    "Readme.md": 1,
    "README.md": 3,
    "pytorch_model.bin": 50,
    "onnx/model.onnx": 9,
    ".gitattributes": 4,
}
KNOWN = {"config.json", "model.safetensors"}
TWIN = "its name differs from README.md only in case: they are one file on many systems"


def test_a_listing_is_sorted_out_as_a_folder_is(tmp_path: Path) -> None:
    for name, size in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    along, left_out = listed_beside(FILES.items(), KNOWN)
    assert dict(along) == {"tokenizer.json": 7, "sub/notes.md": 5, "README.md": 3}
    assert dict(left_out) == {"pytorch_model.bin": UNCUT, "onnx/model.onnx": UNCUT, ".gitattributes": SCAFFOLD, "Readme.md": TWIN}
    found, others = files_beside(tmp_path, KNOWN)
    assert dict(found) == dict(along)
    assert {name.replace("onnx/", "onnx/model.onnx"): reason for name, reason in others} == dict(left_out)


def test_names_in_a_listing_that_lead_elsewhere() -> None:
    along, left_out = listed_beside([("../x", 1), ("a\nb", 1), ("ok", 1)], set())
    assert along == [("ok", 1)]
    assert left_out == [("../x", "not a plain name inside a folder"), ("a\\nb", "not a plain name inside a folder")]


@pytest.mark.parametrize("name", ["a", "a/b", "ünï/層", "a b+@#.txt", ".hidden", "..."])
def test_plain(name: str) -> None:
    assert is_plain(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/../b", "/a", "a//b", "a/", "./a", "a\\b", "C:a", "C:/a", "a\0", "a\n", "\x1b[2J", "\u202e"]
)
def test_not_plain(name: str) -> None:
    assert not is_plain(name)


@given(st.text(max_size=20))
def test_plain_names_stay_inside(name: str) -> None:
    if is_plain(name):
        path = Path("/folder") / name
        assert path.is_relative_to("/folder") and str(path) == f"/folder/{name}" and ".." not in path.parts


@pytest.mark.parametrize(
    ("name", "reason"),
    [("1_Dense/model.safetensors", None), ("model-1.safetensors", UNCUT), ("original/params.json", UNCUT), ("x/original/a", None)],
)
def test_left_out_reason(name: str, reason: str | None) -> None:
    assert left_out_reason(name) == reason
