"""Folders that were made once: when they are made, when they are found again, and when they are not trusted."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

import pytest

from layercut.conversions import announce, content, converted
from layercut.errors import CheckpointError


class Maker:
    """Writes the names and bytes of its files into a folder, and counts how often."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files, self.calls = files, 0

    def __call__(self, staging: Path, folder: Path) -> Path:
        self.calls += 1
        assert staging.parent == folder.parent and not folder.exists()
        target = staging / "done"
        target.mkdir()
        for name, path in self.files.items():
            (target / name).write_bytes(path.read_bytes())
        return target


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    source = tmp_path / "source"
    source.mkdir()
    found = {name: source / name for name in ("a", "b")}
    for name, path in found.items():
        path.write_text(name, encoding="utf-8")
    return found


def test_made_once_and_found_again(tmp_path: Path, files: dict[str, Path]) -> None:
    make = Maker(files)
    root = tmp_path / "cache"
    folder = converted(root, "model", files, make, tmp_path)
    assert folder == root / f"model-{content(files)[:16]}"
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert sorted(path.name for path in root.iterdir()) == sorted(["known", folder.name]), "no staging is left"
    assert converted(root, "model", files, make, tmp_path) == folder
    assert make.calls == 1


def test_what_a_killed_conversion_left_goes_and_what_another_makes_stays(tmp_path: Path, files: dict[str, Path]) -> None:
    root = tmp_path / "cache"
    for name in (".converting-killed", ".converting-other", "kept"):
        (root / name).mkdir(parents=True)
        (root / name / "model.safetensors").write_bytes(b"half")
    other = os.open(root / ".converting-other", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)  # as a process does that is at work
    folder = converted(root, "model", files, Maker(files), tmp_path)
    assert sorted(path.name for path in root.iterdir()) == sorted([".converting-other", "kept", "known", folder.name])
    os.close(other)
    files["a"].write_text("c", encoding="utf-8")
    again = converted(root, "model", files, Maker(files), tmp_path)
    assert sorted(path.name for path in root.iterdir()) == sorted(["kept", "known", folder.name, again.name])


def test_a_long_title_is_cut(tmp_path: Path, files: dict[str, Path]) -> None:
    assert converted(tmp_path / "cache", "x" * 300, files, Maker(files), tmp_path).name == f"{'x' * 100}-{content(files)[:16]}"


def test_content_is_of_names_and_bytes(files: dict[str, Path]) -> None:
    one = {"a": files["a"]}
    assert content(one) == content({"z": files["a"]}) == hashlib.sha256(b"a").hexdigest(), "of one file, its own"
    assert (
        len({content(files), content({"a": files["b"], "b": files["a"]}), content({"a": files["a"], "c": files["b"]}), content(one)}) == 4
    )
    assert content(files) == content(dict(reversed(files.items())))


def test_a_note_cannot_lead_elsewhere(tmp_path: Path, files: dict[str, Path]) -> None:
    make, root = Maker(files), tmp_path / "cache"
    folder = converted(root, "model", files, make, tmp_path)
    (note,) = (root / "known").iterdir()
    for text in ("../source", "", "gone", str(tmp_path / "source")):
        note.write_text(text, encoding="utf-8")
        assert converted(root, "model", files, make, tmp_path) == folder
        assert note.read_text(encoding="utf-8") == folder.name
    assert make.calls == 1


def test_files_that_change_meanwhile(tmp_path: Path, files: dict[str, Path]) -> None:
    make, root = Maker(files), tmp_path / "cache"

    def change(staging: Path, folder: Path) -> Path:
        target = make(staging, folder)
        files["a"].write_text("another", encoding="utf-8")
        return target

    with pytest.raises(CheckpointError) as caught:
        converted(root, "model", files, change, tmp_path / "source")
    assert str(caught.value) == f"{tmp_path}/source: changed while it was read"
    assert list(root.iterdir()) == []


def test_what_goes_wrong_leaves_nothing(tmp_path: Path, files: dict[str, Path]) -> None:
    root = tmp_path / "cache"

    def fail(staging: Path, folder: Path) -> Path:
        (staging / "half").write_text("x", encoding="utf-8")
        raise OSError(28, "No space left on device", str(folder))

    with pytest.raises(CheckpointError, match="cannot be converted: No space left on device"):
        converted(root, "model", files, fail, tmp_path)
    assert list(root.iterdir()) == []
    with pytest.raises(CheckpointError, match="cannot be converted: No such file or directory"):
        converted(root, "model", {"c": tmp_path / "none"}, fail, tmp_path)


def test_the_user_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    announce("m.gguf", Path("/cache/m-0"))
    assert capsys.readouterr() == ("", f"converting m.gguf to safetensors once, into {Path('/cache/m-0')}\n")
