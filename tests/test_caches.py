from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from layercut.caches import OFFLINE, cache_folder, hub_cache, is_offline


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process in which nobody has imported the client yet, and with none of its variables."""
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)
    for name in (*OFFLINE, "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "LAYERCUT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    return monkeypatch


def test_cache_folder(fresh: pytest.MonkeyPatch) -> None:
    assert cache_folder() == Path("/home/me/.cache/layercut")
    fresh.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/layercut")
    fresh.setenv("LAYERCUT_CACHE", "~/own")
    assert cache_folder() == Path("/home/me/own")


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "/home/me/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/huggingface/hub"),
        ({"HF_HOME": "$HOME/hf"}, "/home/me/hf/hub"),
        ({"HF_HOME": "~/hf", "XDG_CACHE_HOME": "/xdg"}, "/home/me/hf/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/hf"}, "/old"),
        ({"HF_HUB_CACHE": "~/new", "HUGGINGFACE_HUB_CACHE": "/old"}, "/home/me/new"),
    ],
)
def test_hub_cache_is_where_the_client_looks(fresh: pytest.MonkeyPatch, variables: dict[str, str], folder: str) -> None:
    import os
    import subprocess

    for name, value in variables.items():
        fresh.setenv(name, value)
    assert hub_cache() == Path(folder)
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == Path(folder)


def test_hub_cache_of_a_client_that_was_imported(fresh: pytest.MonkeyPatch) -> None:
    fresh.setitem(sys.modules, "huggingface_hub.constants", SimpleNamespace(HF_HUB_CACHE="/set/earlier"))  # type: ignore[arg-type]
    fresh.setenv("HF_HUB_CACHE", "/set/later")
    assert hub_cache() == Path("/set/earlier")


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("YES", True), ("on", True), ("0", False), ("", False)])
def test_offline(fresh: pytest.MonkeyPatch, name: str, value: str, offline: bool) -> None:
    assert not is_offline()
    fresh.setenv(name, value)
    assert is_offline() == offline


def test_offline_when_the_client_was_imported(fresh: pytest.MonkeyPatch) -> None:
    fresh.setitem(sys.modules, "huggingface_hub.constants", SimpleNamespace(HF_HUB_OFFLINE=True))  # type: ignore[arg-type]
    assert is_offline()


def test_the_folders_are_those_that_are_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder that something is kept in is in the table, with what goes by itself; and the numbers are those of the code."""
    import re

    import torch

    from layercut import gguf, measurements, mirror
    from layercut.pickled import open_pickled
    from layercut.plan import Measurement

    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text('{"num_hidden_layers": 1}', encoding="utf-8")
    torch.save({"model.layers.0.w": torch.zeros(2)}, source / "pytorch_model.bin")
    open_pickled(source, cache_folder(), reference="model", revision=None)
    measurements.Measurements(cache_folder()).keep("key", Measurement(tables=(), samples=1, tokens=1, details={}))
    mirror.Mirror("org/name", "a" * 40).keep_listing({})
    made: list[Path] = []
    monkeypatch.setattr(gguf, "converted", lambda root, *_: made.append(root) or root)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    gguf.convert(tmp_path / "x.gguf", cache_folder())
    kept = sorted({path.name for path in [*cache_folder().iterdir(), *made]})
    text = (Path(__file__).parent.parent / "docs" / "hub.md").read_text(encoding="utf-8")
    table = text.partition("## Caches")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"`([a-z]+)/`", table)) == kept == ["gguf", "hub", "measurements", "pickled"]
    assert "beyond 256 MiB" in table and measurements.MAX_BYTES == 256 << 20
