from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import failure
from hypothesis import given
from hypothesis import strategies as st

from layercut.checkpoint import Checkpoint, Tensor, open_checkpoint, weight_files
from layercut.companions import left_out_reason
from layercut.errors import CheckpointError
from layercut.header import encode_header

CONFIG = '{"model_type": "llama",\n "n": 1}'


def shard(path: Path, names: list[str], metadata: dict[str, str] | None = None) -> int:
    """A safetensors file of F32 tensors of shape (2,). Returns where the weights start."""
    head = encode_header([(name, "F32", (2,)) for name in names], {"format": "pt"} if metadata is None else metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + bytes(8 * len(names)))
    return len(head)


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    folder = tmp_path / "single"
    shard(folder / "model.safetensors", ["b", "a"])
    (folder / "config.json").write_text(CONFIG)
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    for number, names in enumerate((["x", "y"], ["z"], ["w"]), 1):
        shard(folder / f"model-0000{number}-of-00003.safetensors", names)
    weight_map = {"w": 3, "x": 1, "y": 1, "z": 2}
    index(folder, {name: f"model-0000{number}-of-00003.safetensors" for name, number in weight_map.items()})
    (folder / "config.json").write_text(CONFIG)
    return folder


def refusal(folder: Path, where: str = "") -> str:
    """The message, after the place: `where` inside the folder."""
    text = failure(CheckpointError, lambda: open_checkpoint(folder))
    place = f"{folder}/{where}: " if where else f"{folder}: "
    assert text.startswith(place), text
    return text.removeprefix(place)


def test_one_file(single: Path) -> None:
    checkpoint = open_checkpoint(single)
    start = checkpoint.files["model.safetensors"].data_start
    assert checkpoint.folder == single and checkpoint.reference == str(single) and checkpoint.revision is None
    assert checkpoint.config_text == CONFIG and checkpoint.config == {"model_type": "llama", "n": 1}
    assert list(checkpoint.tensors.values()) == [
        Tensor("b", "F32", (2,), "model.safetensors", start, start + 8),
        Tensor("a", "F32", (2,), "model.safetensors", start + 8, start + 16),
    ]
    assert checkpoint.tensors["a"].nbytes == 8
    assert checkpoint.files["model.safetensors"].size == (single / "model.safetensors").stat().st_size
    assert (checkpoint.parameters, checkpoint.metadata) == (4, {"format": "pt"})
    assert (checkpoint.companions, checkpoint.left_out) == ((), ())


def test_shards_in_order_of_name(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded, reference="org/name", revision="abc")
    assert list(checkpoint.tensors) == ["x", "y", "z", "w"]
    assert [file.split("-")[1] for file in checkpoint.files] == ["00001", "00002", "00003"]
    assert (checkpoint.reference, checkpoint.revision) == ("org/name", "abc")


def test_relative_folder_becomes_absolute(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(single.parent)
    assert open_checkpoint(Path("single")).folder == single


def test_twenty_thousand_tensors(tmp_path: Path) -> None:
    weight_map = {}
    for number in range(20):
        names = [f"model.layers.{number}.experts.{expert}.weight" for expert in range(1000)]
        shard(tmp_path / f"model-{number:02}.safetensors", names)
        weight_map |= dict.fromkeys(names, f"model-{number:02}.safetensors")
    index(tmp_path, weight_map)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.tensors) == 20_000 and checkpoint.parameters == 40_000
    assert {name: tensor.file for name, tensor in checkpoint.tensors.items()} == weight_map


# ---- digest


def test_digest_is_of_structure_not_of_place_time_or_values(sharded: Path, tmp_path: Path) -> None:
    digest = open_checkpoint(sharded).digest
    moved = tmp_path / "moved"
    sharded.rename(moved)
    first = moved / "model-00001-of-00003.safetensors"
    os.utime(first, (1, 1))
    first.write_bytes(first.read_bytes()[:-16] + b"other values 123")
    (moved / "README.md").write_text("more")
    assert open_checkpoint(moved).digest == digest
    assert len(digest) == 64


@pytest.mark.parametrize("change", ["config", "rename", "tensor", "metadata"])
def test_digest_tells_structures_apart(single: Path, change: str) -> None:
    digest = open_checkpoint(single).digest
    if change == "config":
        (single / "config.json").write_text(CONFIG + " ")
    elif change == "rename":
        (single / "model.safetensors").rename(single / "m.safetensors")
        index(single, {"a": "m.safetensors", "b": "m.safetensors"})
    elif change == "tensor":
        shard(single / "model.safetensors", ["a", "b"])
    else:
        shard(single / "model.safetensors", ["b", "a"], {"format": "np"})
    assert open_checkpoint(single).digest != digest


# ---- config.json


def test_no_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == "no such folder"
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file") == "not a folder"


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == f"no config.json in {tmp_path}; name the folder that holds the model"


@pytest.mark.parametrize("below", ["model", "snapshots/0123abc"])
def test_no_config_but_in_a_folder_below(below: str, tmp_path: Path) -> None:
    (tmp_path / below).mkdir(parents=True)
    (tmp_path / below / "config.json").touch()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == f"no config.json in {tmp_path}; name the folder that holds the model, such as {tmp_path / below}"


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    assert refusal(tmp_path) == "an adapter, not a model; merge it into its base model first"


def test_no_config_but_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == f"no config.json in {tmp_path}; for a GGUF model name the file itself: {tmp_path / 'm.gguf'}"


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (b"[1]", "config.json", "not a JSON object"),
        (b'{"a": 1,\n "b" 2}', "config.json:2:6", "not JSON: Expecting ':' delimiter"),
        (b'{"a": 1, "a": 1}', "config.json", "key 'a' stands 2 times"),
        (b'{"a": NaN}', "config.json", "NaN is not JSON"),
        (b'{"a": "\xe9"}', "config.json", "not UTF-8 (byte 7)"),
        (b"\xef\xbb\xbf{}", "config.json:1:1", "not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig)"),
        (b'{"a": ' + b"[" * 100_000, "config.json", "JSON is nested too deeply"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "config.json", "nested deeper than 64"),
        (b"", "config.json:1:1", "not JSON: Expecting value"),
    ],
)
def test_bad_config(single: Path, text: bytes, place: str, message: str) -> None:
    (single / "config.json").write_bytes(text)
    assert refusal(single, place) == message


def test_config_text_is_kept_as_it_stands(single: Path) -> None:
    text = '{"a": 1.50,\r\n "e": "\\u00e9é", "time_step_limit": [0.0, Infinity]}\n'
    (single / "config.json").write_bytes(text.encode())
    checkpoint = open_checkpoint(single)
    assert checkpoint.config_text == text
    assert checkpoint.config == {"a": 1.5, "e": "éé", "time_step_limit": [0.0, float("inf")]}


def test_config_that_names_other_weights(single: Path) -> None:
    (single / "config.json").write_text('{"transformers_weights": "x.safetensors"}')
    message = "transformers_weights names 'x.safetensors' as the weights; layercut reads model.safetensors.index.json or "
    assert refusal(single, "config.json") == message + "model.safetensors: rename the file and drop the key"


def test_unreadable_config(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path, mode: str) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", deny)
    assert refusal(single, "config.json") == "cannot be read: Permission denied"


# ---- which files are the weights


@pytest.mark.parametrize(
    ("files", "found", "hint"),
    [
        (["pytorch_model.bin"], "pytorch_model.bin", "convert it once"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "pytorch_model-00001-of-00002.bin", "convert it once"),
        (["model.pt"], "model.pt", "convert it once"),
        (["tf_model.h5"], "tf_model.h5", "convert it once"),
        (["flax_model.msgpack"], "flax_model.msgpack", "convert it once"),
        (["consolidated.safetensors"], "consolidated.safetensors", "convert it once"),
        (["weights.safetensors"], "weights.safetensors", "rename it to model.safetensors if it holds the whole model"),
        (["q4.gguf"], "q4.gguf", "name the file itself: {folder}/q4.gguf"),
    ],
)
def test_other_formats(tmp_path: Path, files: list[str], found: str, hint: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    for file in files:
        (tmp_path / file).touch()
    text = refusal(tmp_path)
    expected = f"unsupported weights format: found {found}; layercut reads safetensors: model.safetensors, or the files of "
    assert text.startswith(expected + "model.safetensors.index.json; " + hint.format(folder=tmp_path))


def test_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    shard(tmp_path / "adapter_model.safetensors", ["a"])
    assert refusal(tmp_path).endswith("; this is an adapter: merge it into its base model first")


def test_adapter_beside_the_model(single: Path) -> None:
    """transformers.from_pretrained applies it, so the model that is measured would not be the model that is cut."""
    (single / "adapter_config.json").write_text("{}")
    message = "an adapter lies beside the model, and loaders apply it without asking; "
    assert refusal(single) == message + "merge it into the model, or move adapter_config.json away"


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == f"no weights in {tmp_path}; expected model.safetensors or model.safetensors.index.json"


def test_a_stale_index(single: Path) -> None:
    """transformers reads the one file, readers that go by the index read the shards."""
    shard(single / "model-1.safetensors", ["a", "b"])
    index(single, {"a": "model-1.safetensors", "b": "model-1.safetensors"})
    message = "both model.safetensors and an index of other files: loaders disagree on which are the weights; move one of them away"
    assert refusal(single) == message


def test_an_index_of_the_one_file(single: Path) -> None:
    index(single, {"a": "model.safetensors", "b": "model.safetensors"})
    assert list(open_checkpoint(single).tensors) == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("[]", "", "no weight_map, or an empty one"),
        ("{}", "", "no weight_map, or an empty one"),
        ('{"weight_map": {}}', "", "no weight_map, or an empty one"),
        ('{"weight_map": {"a": 1}}', "", "weight_map of tensor 'a' is not a file name"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "", "key 'a' stands 2 times"),
        ('{"weight_map"}', ":1:14", "not JSON: Expecting ':' delimiter"),
    ],
)
def test_bad_index(single: Path, text: str, place: str, message: str) -> None:
    (single / "model.safetensors.index.json").write_text(text)
    assert refusal(single, "model.safetensors.index.json" + place) == message


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a\\b", "a\0b", "", ".", "./a", "a//b", "a/", "C:x", ".."])
def test_index_must_stay_inside(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        weight_files(json.dumps({"weight_map": {"t": name}}), Path("index"))
    assert str(caught.value) == f"index: weight_map names {name!r}, which is not a plain path inside the folder"


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_accepted_names_stay_inside(name: str) -> None:
    try:
        weight_files(json.dumps({"weight_map": {"t": name}}), Path("index"))
    except CheckpointError:
        return
    assert os.path.normpath(os.path.join("/root", name)) == f"/root/{name}"  # noqa: PTH118 - lexical on purpose


def test_shards_in_a_folder_below(single: Path) -> None:
    (single / "model.safetensors").unlink()
    shard(single / "original" / "m.safetensors", ["a"])
    index(single, {"a": "original/m.safetensors"})
    checkpoint = open_checkpoint(single)
    assert (checkpoint.tensors["a"].file, checkpoint.companions, checkpoint.left_out) == ("original/m.safetensors", (), ())


def test_missing_shards(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert refusal(sharded) == "missing shard model-00002-of-00003.safetensors; download the model again"
    (sharded / "model-00003-of-00003.safetensors").unlink()
    assert refusal(sharded) == "missing shard model-00002-of-00003.safetensors (and 1 more); download the model again"


def test_a_shard_name_longer_than_the_disk_allows(sharded: Path) -> None:
    index(sharded, {"x": "n" * 300 + ".safetensors"})
    assert refusal(sharded).startswith("missing shard nnn")


def test_indexed_tensor_elsewhere(sharded: Path) -> None:
    shard(sharded / "model-00001-of-00003.safetensors", ["x"])
    message = "tensor 'y' should be in model-00001-of-00003.safetensors, but it is in no weight file; download the model again"
    assert refusal(sharded, "model.safetensors.index.json") == message
    shard(sharded / "model-00002-of-00003.safetensors", ["z", "y"])
    assert ", but it is in model-00002-of-00003.safetensors; " in refusal(sharded, "model.safetensors.index.json")


def test_tensors_that_the_index_forgot_belong_to_the_model(sharded: Path) -> None:
    """transformers takes every tensor of a shard that the index names."""
    shard(sharded / "model-00002-of-00003.safetensors", ["z", "forgotten"])
    assert list(open_checkpoint(sharded).tensors) == ["x", "y", "z", "forgotten", "w"]


def test_transformers_loads_tensors_that_the_index_forgot(tmp_path: Path) -> None:
    """The reason for the rule above, kept true by this test."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "num_hidden_layers": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "m.safetensors")
    index(tmp_path, {"lm_head.weight": "m.safetensors"})
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert set(open_checkpoint(tmp_path).tensors) == set(model.state_dict())


def test_a_name_in_two_shards(sharded: Path) -> None:
    shard(sharded / "model-00002-of-00003.safetensors", ["z", "x"])
    message = "tensor 'x' stands in model-00001-of-00003.safetensors and in model-00002-of-00003.safetensors; "
    assert refusal(sharded) == message + "loaders disagree on which counts: save the model again"


def test_no_tensors(single: Path) -> None:
    shard(single / "model.safetensors", [])
    assert refusal(single) == "the weight files hold no tensors"


def test_metadata_of_shards_is_joined(sharded: Path) -> None:
    shard(sharded / "model-00002-of-00003.safetensors", ["z"], {"format": "np", "by": "x"})
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.metadata == {"format": "pt", "by": "x"}
    what = "model-00002-of-00003.safetensors: metadata format"
    assert checkpoint.left_out == ((what, "another weight file has another value"),)


def test_a_shard_that_is_a_folder(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "m.safetensors").mkdir()
    index(single, {"a": "m.safetensors"})
    assert refusal(single, "m.safetensors") == "not a regular file"


# ---- links


def test_links_inside_are_followed(single: Path) -> None:
    (single / "model.safetensors").rename(single / "real.safetensors")
    (single / "model.safetensors").symlink_to("real.safetensors")
    assert list(open_checkpoint(single).tensors) == ["b", "a"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "extra.txt", "folder"])
def test_links_out_are_refused(single: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "elsewhere" / name
    target.parent.mkdir()
    if name == "folder":
        target.mkdir()
    elif (single / name).exists():
        (single / name).rename(target)
    else:
        target.touch()
    (single / name).symlink_to(target)
    assert refusal(single, name) == f"link out of the folder, to '{target}'; put the file itself there"


def test_index_through_a_linked_folder(single: Path, tmp_path: Path) -> None:
    (single / "model.safetensors").unlink()
    shard(tmp_path / "elsewhere" / "m.safetensors", ["a"])
    (single / "sub").symlink_to(tmp_path / "elsewhere")
    index(single, {"a": "sub/m.safetensors"})
    assert refusal(single, "sub/m.safetensors").startswith("link out of the folder, to ")


def test_link_to_nothing_and_link_in_a_circle(single: Path) -> None:
    (single / "gone.txt").symlink_to("nowhere")
    assert refusal(single, "gone.txt") == "link to nothing; download the model again, or remove the link"
    (single / "gone.txt").unlink()
    (single / "gone.txt").symlink_to("gone.txt")
    assert refusal(single, "gone.txt") == "cannot be read: Too many levels of symbolic links"


def test_linked_folder_inside_is_left_out(single: Path) -> None:
    (single / "loop").symlink_to(".")
    assert open_checkpoint(single).left_out == (("loop/", "link to a folder"),)


def hub_snapshot(root: Path, shared: bool = False) -> Path:
    """A cache as huggingface_hub lays it out; with `shared`, the blob of the weights is a link to the store of the whole cache."""
    repo = root / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "c0").write_text(CONFIG)
    (repo / "blobs" / "t0").write_text("template")
    shard(repo / "blobs" / "w0", ["a"])
    if shared:
        store = root / "blobs" / "ab" / "abcd"
        store.parent.mkdir(parents=True)
        (repo / "blobs" / "w0").rename(store)
        (repo / "blobs" / "w0").symlink_to("../../blobs/ab/abcd")
    for name, blob in {"config.json": "c0", "model.safetensors": "w0", "chat_template.jinja": "t0"}.items():
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_hub_cache(tmp_path: Path, shared: bool) -> None:
    snapshot = hub_snapshot(tmp_path, shared)
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.folder == snapshot
    assert checkpoint.companions == (("chat_template.jinja", 8),)
    assert checkpoint.files["model.safetensors"].size == (snapshot / "model.safetensors").stat().st_size


def test_hub_cache_reached_through_a_link(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path / "disk")
    (tmp_path / "here").symlink_to(snapshot)
    assert list(open_checkpoint(tmp_path / "here").tensors) == ["a"]


def test_hub_cache_is_no_way_out(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    (tmp_path / "token").write_text("hf_secret")
    (snapshot / "notes.txt").symlink_to("../../../token")
    assert refusal(snapshot, "notes.txt").startswith("link out of the folder, to ")


# ---- companions


def companions(checkpoint: Checkpoint) -> list[str]:
    return [name for name, _ in checkpoint.companions]


def test_companions_are_sorted_with_sizes(single: Path) -> None:
    (single / "tokenizer.json").write_text("{}")
    (single / "LICENSE").write_text("free")
    (single / "1_Pooling").mkdir()
    (single / "1_Pooling" / "config.json").write_text("{ }")
    shard(single / "2_Dense" / "model.safetensors", ["linear.weight"])
    (single / "empty").mkdir()
    size = (single / "2_Dense" / "model.safetensors").stat().st_size
    expected = (("1_Pooling/config.json", 3), ("2_Dense/model.safetensors", size), ("LICENSE", 4), ("tokenizer.json", 2))
    assert open_checkpoint(single).companions == expected


def test_left_out_with_reasons(single: Path) -> None:
    for name in ("original/params.json", "onnx/model.onnx", ".git/config", ".cache/x", "__pycache__/m.pyc", "deep/__pycache__/m.pyc"):
        (single / name).parent.mkdir(parents=True, exist_ok=True)
        (single / name).touch()
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin", "layercut.json", ".gitattributes", ".DS_Store"):
        (single / name).touch()
    shard(single / "lora" / "adapter_model.safetensors", ["a"])
    (single / "lora" / "adapter_config.json").touch()
    (single / "lora" / "README.md").touch()
    os.mkfifo(single / "pipe")
    uncut, scaffold = "weights of the uncut model, in another format or copy", "version control or cache, not the model"
    checkpoint = open_checkpoint(single)
    assert companions(checkpoint) == ["lora/README.md"]
    assert checkpoint.left_out == (
        (".DS_Store", scaffold),
        (".cache/", scaffold),
        (".git/", scaffold),
        (".gitattributes", scaffold),
        ("__pycache__/", scaffold),
        ("deep/__pycache__/", scaffold),
        ("layercut.json", "report of an earlier cut"),
        ("lora/adapter_config.json", "adapter of the uncut model"),
        ("lora/adapter_model.safetensors", uncut),
        ("onnx/", uncut),
        ("original/", uncut),
        ("pipe", "not a regular file"),
        ("pytorch_model.bin", uncut),
        ("pytorch_model.bin.index.json", "index of weights that are left out"),
        ("training_args.bin", "pickle of a training run: runs code when it is read"),
    )


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer.model", "vocab.bin", "modeling_x.py", "README.md", "data/original/x.txt", "generation_config.json",
     "additional_chat_templates/a.jinja", "quantize_config.json", "mergekit_config.yml", "1_Dense/model.safetensors", "sub/config.json"],
)  # fmt: skip
def test_goes_along(name: str) -> None:
    assert left_out_reason(name) is None


@pytest.mark.parametrize(
    "name",
    ["model.Q4_K_M.GGUF", "rust_model.ot", "model.fp16.safetensors", "consolidated.00.pth", "onnx/decoder.onnx_data", "x.onnx",
     "tf_model.h5", "checkpoint-500/config.json", "openvino_model.xml", "sub/.git/config", "optimizer.pt", "rng.pkl", "model.bin",
     "a/1_Dense/model.safetensors", ".layercut.json.layercut-partial"],
)  # fmt: skip
def test_stays_behind(name: str) -> None:
    assert left_out_reason(name)


@pytest.mark.parametrize("name", [b"\xff.txt", b"a\nb.txt"])
def test_names_that_cannot_be_printed_are_left_out(single: Path, name: bytes) -> None:
    (single / os.fsdecode(name)).touch()
    checkpoint = open_checkpoint(single)
    assert companions(checkpoint) == []
    ((what, reason),) = checkpoint.left_out
    assert what.isprintable() and reason == "its name holds characters that do not print"


def test_a_folder_that_cannot_be_listed(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(single)
    assert str(caught.value) == f"{single}: cannot be read: Permission denied"


def test_opening_writes_nothing(sharded: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(sharded.rglob("*"))}
    open_checkpoint(sharded)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(sharded.rglob("*"))} == before
