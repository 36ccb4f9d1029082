"""Pickled weights: value by value against transformers, and everything that a pickle must not do."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import failure

from layercut import pickled
from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.cli import main
from layercut.errors import CheckpointError
from layercut.pickled import DTYPES, holds_pickled, open_pickled
from layercut.report import read_report
from layercut.source import resolve


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """State dict of a model as transformers 4 saved it: tied weights under both names."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        assert state["lm_head.weight"].data_ptr() == model.get_input_embeddings().weight.data_ptr()
    return state


def pickle_model(source: Path, folder: Path, state: dict[str, Any], shards: int = 1, **how: Any) -> Path:
    """The model of `source` with its weights in `pytorch_model.bin` instead."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", **how)
        return folder
    names = list(state)
    weight_map = {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: state[name] for name in part}, folder / file, **how)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def save(folder: Path, state: Any, config: str = "{}", **how: Any) -> Path:
    """A folder with nothing but a config and one pickled file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config, encoding="utf-8")
    torch.save(state, folder / "pytorch_model.bin", **how)
    return folder


def opened(folder: Path, cache: Path) -> Checkpoint:
    return open_pickled(folder, cache, reference="the model")


def values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for name in checkpoint.files:
        found |= load_file(checkpoint.folder / name)
    return found


def refusal(folder: Path, cache: Path) -> str:
    text = failure(CheckpointError, lambda: opened(folder, cache))
    assert "\x1b" not in text
    kept = cache / "pickled"
    assert not kept.exists() or [found.name for found in kept.iterdir() if found.name != "known"] == [], "something was left behind"
    return text.replace(f"{folder}/", "").replace(f"{folder}: ", "")


# The whole way


@pytest.mark.parametrize("how", ["one file", "two shards", "before torch 1.6"])
def test_a_cut_of_pickled_weights_is_the_model_with_layers_removed(
    tiny: Callable[..., Path], tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    source = tiny("llama", layers=6)
    form = {"_use_new_zipfile_serialization": False} if how == "before torch 1.6" else {}
    folder = pickle_model(source, tmp_path / "model", state_of(source), 2 if how == "two shards" else 1, **form)
    (folder / "training_args.bin").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {folder}\nsteps:\n- prune: {{at: [1, 4]}}\n", encoding="utf-8")
    assert main(["run", str(recipe), "--out", str(tmp_path / "out"), "--quiet"]) == 0, capsys.readouterr().err
    assert "converting model to safetensors once, into " in capsys.readouterr().err
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    model.model.layers = torch.nn.ModuleList([model.model.layers[index] for index in (0, 2, 3, 5)])
    model.config.num_hidden_layers = 4
    cut, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(3, 27)[None]
    with torch.inference_mode():
        assert torch.equal(cut.eval()(ids).logits, model(ids, use_cache=False).logits)
    report = read_report(tmp_path / "out")
    assert [item.what for item in report.left_out if "layers" not in item.what] == ["training_args.bin"]
    carried = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert carried == sorted({path.name for path in source.iterdir()} | {"layercut.json"})


def test_tied_weights_are_stored_once(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny("llama", layers=6, tie_word_embeddings=True)
    state = state_of(source)
    checkpoint = opened(pickle_model(source, tmp_path / "model", state), tmp_path)
    assert dict(checkpoint.left_out) == {"lm_head.weight": "the same matrix as model.embed_tokens.weight, to which it is tied"}
    found = values(checkpoint)
    assert found.keys() == state.keys() - {"lm_head.weight"} == open_checkpoint(source).tensors.keys()
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert checkpoint.config_text == (source / "config.json").read_text(encoding="utf-8")
    again = opened(tmp_path / "model", tmp_path)
    assert (again.folder, again.left_out) == (checkpoint.folder, checkpoint.left_out)


@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        ('{"tie_word_embeddings": false}', []),
        ('{"tie_word_embeddings": true}', ["encoder.embed.weight", "lm_head.weight"]),
        ('{"tie_word_embeddings": true, "text_config": {"tie_word_embeddings": false}}', []),
        ('{"text_config": {"tie_word_embeddings": true}}', ["encoder.embed.weight", "lm_head.weight"]),
        ('{"model_type": "gpt2"}', ["encoder.embed.weight", "lm_head.weight"]),  # its class says true
        ('{"model_type": "llama"}', []),  # its class says false
        ('{"model_type": "nobody knows"}', []),
    ],
)
def test_another_name_goes_only_where_loaders_tie(tmp_path: Path, config: str, left_out: list[str]) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    state = {"lm_head.weight": matrix, "encoder.embed.weight": matrix, "shared.weight": matrix, "decoder.embed_tokens.bias": matrix[0]}
    checkpoint = opened(save(tmp_path / "model", state, config), tmp_path)
    assert [name for name, _ in checkpoint.left_out] == left_out
    assert values(checkpoint).keys() == state.keys() - set(left_out)


def test_tensors_that_share_memory_stand_under_each_name(tmp_path: Path) -> None:
    """A layer that is taken alone needs its own: only embeddings and heads are left to the loader."""
    shared, parameter = torch.arange(12.0).reshape(3, 4), torch.nn.Parameter(torch.ones(2))
    state = OrderedDict(
        {
            "embed_tokens.weight": torch.zeros(2, 2),
            "layers.0.w": shared,
            "layers.1.w": shared,
            "layers.2.w": shared.t(),
            "layers.3.w": shared[1:],
            "layers.4.w": shared[0].expand(2, 4),
            "layers.5.w": parameter,
        }
    )
    checkpoint = opened(save(tmp_path / "model", state, '{"tie_word_embeddings": true}'), tmp_path)
    assert checkpoint.left_out == ()
    found = values(checkpoint)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("legacy", [False, True])
def test_every_dtype_keeps_its_bytes(tmp_path: Path, legacy: bool) -> None:
    dtypes = {name: getattr(torch, name) for name in DTYPES}
    if legacy:  # that format never knew the later ones
        dtypes = {name: dtype for name, dtype in dtypes.items() if not name.startswith(("float8", "uint16", "uint32", "uint64"))}
    data = torch.arange(48, dtype=torch.uint8)
    state = {name: data.clone().view(dtype) if name != "bool" else (data > 9) for name, dtype in dtypes.items()}
    state |= {"scalar": torch.tensor(7), "empty": torch.zeros(0, 3), "odd": data[1:4], "conjugate": torch.tensor([1 + 2j]).conj()}
    checkpoint = opened(save(tmp_path / "model", state, _use_new_zipfile_serialization=not legacy), tmp_path)
    found = values(checkpoint)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        plain = value.resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), plain), name
    for name, tensor in checkpoint.tensors.items():
        assert tensor.begin % max(1, state[name].element_size()) == 0, f"{name} is not aligned"


def test_what_lies_beside_the_weights_goes_along(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", {"a": torch.zeros(2)})
    for name in ("tokenizer.json", "sub/notes.md", "optimizer.pt", "tf_model.h5"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    checkpoint = opened(folder, tmp_path)
    assert checkpoint.companions == (("sub/notes.md", 12), ("tokenizer.json", 14))
    assert (checkpoint.folder / "sub" / "notes.md").read_text(encoding="utf-8") == "sub/notes.md"
    uncut = "weights of the uncut model, in another format or copy"
    assert checkpoint.left_out == (("optimizer.pt", uncut), ("tf_model.h5", uncut))
    assert (checkpoint.reference, checkpoint.revision) == ("the model", None)


# The cache


def test_the_second_time_nothing_is_read(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model", {"a": torch.zeros(2)})
    first = opened(folder, tmp_path)
    assert capfd.readouterr() == ("", f"converting model to safetensors once, into {first.folder}\n")
    monkeypatch.setattr("layercut.conversions.content", lambda _: pytest.fail("the files were read"))
    assert opened(folder, tmp_path) == first
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json", "tokenizer.json"])
def test_a_change_of_any_file_is_seen(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "model", {"a": torch.zeros(2)})
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    before = opened(folder, tmp_path)
    if name == "pytorch_model.bin":
        torch.save({"a": torch.ones(2)}, folder / name)
    else:
        (folder / name).write_text('{"x": 1}', encoding="utf-8")
    after = opened(folder, tmp_path)
    assert after.folder != before.folder
    assert (after.folder / name).exists() or name == "pytorch_model.bin"
    assert values(after)["a"].tolist() == ([1, 1] if name == "pytorch_model.bin" else [0, 0])


def test_a_moved_folder_is_not_converted_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "a" / "model", {"a": torch.zeros(2)})
    first = opened(folder, tmp_path)
    shutil.copytree(folder, tmp_path / "b" / "model")
    capfd.readouterr()
    assert opened(tmp_path / "b" / "model", tmp_path).folder == first.folder
    assert capfd.readouterr().err == ""


def test_safetensors_win(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = save(tmp_path / "model", {"a": torch.zeros(2)})
    save_file({"b": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    checkpoint = resolve(str(folder))
    assert (checkpoint.folder, list(checkpoint.tensors)) == (folder, ["b"])
    assert not (tmp_path / "cache").exists()


def test_which_folders_are_pickled() -> None:
    assert holds_pickled(["config.json", "pytorch_model.bin"])
    assert holds_pickled(["config.json", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"])
    assert not holds_pickled(["config.json", "pytorch_model.bin", "model.safetensors"])
    assert not holds_pickled(["config.json", "pytorch_model.bin", "model.safetensors.index.json"])
    assert not holds_pickled(["pytorch_model.bin"])
    assert not holds_pickled(["config.json", "consolidated.00.pth"])


# Hostile and damaged


class Evil:
    """Touches a file when it is unpickled freely."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_that_a_pickle_asks_for_is_run(tmp_path: Path, legacy: bool, capfd: pytest.CaptureFixture[str]) -> None:
    canary = tmp_path / "canary"
    folder = save(tmp_path / "model", {"a": torch.zeros(3), "b": Evil(canary)}, _use_new_zipfile_serialization=not legacy)
    expected = (
        "pytorch_model.bin: refused: the pickle asks for posix.system, and might run code; nothing of it was run; "
        "ask the author for safetensors"
    )
    assert refusal(folder, tmp_path / "cache") == expected
    assert not canary.exists()
    assert capfd.readouterr() == ("", "")
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert canary.exists(), "the canary itself works"


def test_a_bare_pickle_is_not_even_opened(tmp_path: Path) -> None:
    folder, canary = save(tmp_path / "model", {}), tmp_path / "canary"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(canary)))
    assert refusal(folder, tmp_path / "cache") == "pytorch_model.bin: not a file of torch.save; download it again"
    assert not canary.exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.zeros(2)], "holds a list, not a state dict; save model.state_dict() itself"),
        ({}, "holds a dict, not a state dict; save model.state_dict() itself"),
        ({"state_dict": {"a": torch.zeros(2)}}, "entry 'state_dict' is a dict, not a tensor; save model.state_dict() itself"),
        ({"a": torch.zeros(2), "step": 7}, "entry 'step' is a int, not a tensor"),
        ({3: torch.zeros(2)}, "3 is no name of a tensor"),
        ({"a\n": torch.zeros(2)}, r"'a\n' is no name of a tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "tensor 'a' is strided complex128 on cpu, which safetensors does not hold"),
        ({"a": torch.zeros(2, device="meta")}, "tensor 'a' is strided float32 on meta, which safetensors does not hold"),
        (
            {"a": torch.zeros(1).expand(10**12)},
            "tensor 'a' stands for 1000000000000 values, more than the file holds; save it with .contiguous()",
        ),
    ],
)
def test_what_is_no_state_dict_of_tensors(tmp_path: Path, state: Any, message: str) -> None:
    assert refusal(save(tmp_path / "model", state), tmp_path / "cache") == f"pytorch_model.bin: {message}"


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    text = refusal(save(tmp_path / "model", torch.nn.Linear(2, 2)), tmp_path / "cache")
    assert text.startswith("pytorch_model.bin: refused: the pickle asks for torch.nn.modules.linear.Linear, and might run code")


def test_sparse_is_refused(tmp_path: Path) -> None:
    text = refusal(save(tmp_path / "model", {"a": torch.eye(2).to_sparse()}), tmp_path / "cache")
    assert text == "pytorch_model.bin: tensor 'a' is sparse_coo float32 on cpu, which safetensors does not hold"


def test_damaged_files(tmp_path: Path) -> None:
    folder, cache = save(tmp_path / "model", {"a": torch.zeros(1000)}), tmp_path / "cache"
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    assert refusal(folder, cache) == "pytorch_model.bin: damaged: File is not a zip file; download it again"
    path.write_bytes(b"")
    assert refusal(folder, cache) == "pytorch_model.bin: not a file of torch.save; download it again"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    hint = "this is a Git LFS pointer: fetch the file itself with git lfs pull"
    assert refusal(folder, cache) == f"pytorch_model.bin: not a file of torch.save; {hint}"
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:2000])
    assert refusal(folder, cache).startswith("pytorch_model.bin: torch cannot read it: ")


def test_a_packed_zip_is_refused(tmp_path: Path) -> None:
    """torch.save stores; what is packed may grow without bound."""
    folder = save(tmp_path / "model", {"a": torch.zeros(1000)})
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in entries.items():
            new.writestr(name, data)
    text = refusal(folder, tmp_path / "cache")
    assert text.startswith("pytorch_model.bin: entry '") and text.endswith("is packed or too long; torch.save writes no such file")


def test_a_storage_that_is_longer_than_its_bytes(tmp_path: Path) -> None:
    """The pickle says how long a storage is; the bytes that are there decide."""
    folder = save(tmp_path / "model", {"a": torch.zeros(1000, dtype=torch.uint8)})
    path = folder / "pytorch_model.bin"
    raw, number = path.read_bytes(), b"M\xe8\x03"  # BININT2 1000
    assert raw.count(number) == 2, "storage and shape"
    path.write_bytes(raw.replace(number, b"M" + struct.pack("<H", 60000)))
    assert refusal(folder, tmp_path / "cache").startswith("pytorch_model.bin: ")


# Indexes


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    state = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}
    source, cache = save(tmp_path / "source", {}), tmp_path / "cache"
    (source / "pytorch_model.bin").unlink()

    folder = pickle_model(source, tmp_path / "lost shard", state, 2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError) as caught:
        opened(folder, cache)
    assert str(caught.value) == f"{folder}: missing shard pytorch_model-00002-of-00002.bin; download the model again"

    folder = pickle_model(source, tmp_path / "lost tensor", state, 2)
    torch.save({"b": state["b"]}, folder / "pytorch_model-00002-of-00002.bin")
    assert refusal(folder, cache) == "pytorch_model-00002-of-00002.bin: the index puts tensor 'c' here, but it is not here"

    folder = pickle_model(source, tmp_path / "twice", state, 2)
    torch.save(state, folder / "pytorch_model-00002-of-00002.bin")
    assert refusal(folder, cache) == "tensor 'a' stands in two shards; save the model again"

    folder = pickle_model(source, tmp_path / "both", state, 2)
    torch.save(state, folder / "pytorch_model.bin")
    message = "both pytorch_model.bin and an index of other files: loaders disagree on which are the weights; move one of them away"
    assert refusal(folder, cache) == message


def test_nothing_leads_out_of_the_folder(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", {"a": torch.zeros(2)})
    (folder / "pytorch_model.bin").rename(tmp_path / "elsewhere.bin")
    (folder / "pytorch_model.bin").symlink_to(tmp_path / "elsewhere.bin")
    assert "link out of the folder" in refusal(folder, tmp_path / "cache")
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../elsewhere.bin"}}', encoding="utf-8")
    expected = "weight_map names '../elsewhere.bin', which is not a plain path inside the folder"
    assert refusal(folder, tmp_path / "cache") == f"pytorch_model.bin.index.json: {expected}"


def test_an_adapter_beside_pickled_weights(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", {"a": torch.zeros(2)})
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "an adapter lies beside the model" in refusal(folder, tmp_path / "cache")


def test_an_old_torch_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model", {"a": torch.zeros(2)})
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.9.1+cpu")
    expected = "torch 2.9.1+cpu does not keep pickled weights from running code; pip install 'torch>=2.10'"
    assert refusal(folder, tmp_path / "cache") == expected


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model", {"a": torch.zeros(2)})
    size = (folder / "pytorch_model.bin").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 7, 3))  # type: ignore[attr-defined]
    expected = (
        f"converting takes {size} bytes in {tmp_path}/cache/pickled, where 3 are free; set LAYERCUT_CACHE to a folder on a larger disk"
    )
    assert refusal(folder, tmp_path / "cache") == expected


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model", {"a": torch.zeros(2)})

    def interrupt(path: Path, *rest: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("layercut.pickled._write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            opened(folder, tmp_path / "cache")
    assert list((tmp_path / "cache" / "pickled").iterdir()) == []
    assert list(opened(folder, tmp_path / "cache").tensors) == ["a"]


def test_a_file_that_becomes_shorter_while_it_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies behind the new end is a bad address, or ends the process without a word."""
    folder = save(tmp_path / "model", {"a": torch.zeros(1 << 20), "b": torch.ones(1 << 20)})
    real = pickled._entries

    def shortened(path: Path, expected: frozenset[str] | None) -> list[pickled.Entry]:
        entries = real(path, expected)
        asked.append(path)
        if len(asked) == 2:  # the first time, only names are looked at
            os.truncate(path, 1 << 16)
        return entries

    asked: list[Path] = []
    monkeypatch.setattr(pickled, "_entries", shortened)
    expected = "pytorch_model.bin: became shorter while it was read; run again when nothing writes to it"
    assert refusal(folder, tmp_path / "cache") == expected


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """200 MB of weights in one file: they are mapped, and none of them stays in private memory."""
    import subprocess
    import sys

    folder = save(tmp_path / "model", {f"layers.{number}.w": torch.full((5_000_000,), float(number)) for number in range(10)})
    code = (
        "import pathlib, sys, torch\n"
        "from layercut.pickled import open_pickled\n"
        "def anonymous():\n"
        "    return sum(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon'))\n"
        "import layercut.pickled as module\n"
        "write, peak = module._write, []\n"
        "def measured(*given):\n"
        "    write(*given); peak.append(anonymous())\n"
        "module._write = measured\n"
        "start = anonymous()\n"
        "open_pickled(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), reference='m')\n"
        "print(max(peak) - start)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000, f"{done.stdout} kB of private memory"
