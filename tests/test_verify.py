"""verify.py: a good output passes every check, and each kind of damage fails the check that is meant for it."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import byte_tensors, write_checkpoint, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_executor import plan_for

from layercut import verify as module
from layercut.api import run_recipe
from layercut.cli import main
from layercut.contents import expected
from layercut.executor import execute
from layercut.header import encode_header, read_header
from layercut.plan import TensorMade
from layercut.report import file_digest, make_report, read_report, write_report
from layercut.verify import Check, Verification, verify

LAYERS = [("source", index) for index in (0, 1, 4, 4)]


@pytest.fixture
def output(byte_checkpoint, tmp_path, monkeypatch):
    """Four layers in two shards, with a tokenizer file. The source is where the report says: `source`, from the current directory."""
    monkeypatch.chdir(tmp_path)
    source = byte_checkpoint("source", layers=6)
    (source / "tokenizer.json").write_text("{}")
    execute(plan_for({"source": source}, LAYERS, shards=2), tmp_path / "out", progress=False)
    return tmp_path / "out"


def failed(folder, load=False):
    """Name and detail of the checks that fail."""
    return {check.name: check.detail for check in verify(folder, load=load).checks if not check.ok}


def rewrite(folder, change):
    """Change the report in place."""
    data = json.loads((folder / "layercut.json").read_text())
    change(data)
    (folder / "layercut.json").write_text(json.dumps(data))


def fresh(code, folder, cwd=None):
    """Run code in a process of its own, with the folder as argument."""
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", code, folder], env=environment, cwd=cwd, capture_output=True, text=True, check=True)


# Without loading


def test_a_good_output(output):
    found = verify(output, load=False)
    digest = read_report(output).plan
    assert found == Verification(
        folder=str(output),
        checks=(
            Check(name="checkpoint", ok=True, detail="11 tensors in 2 weight files"),
            Check(name="report", ok=True, detail=f"plan {digest}"),
            Check(name="files", ok=True, detail="5 files are as the report says"),
            Check(name="no other files", ok=True, detail="there are no others"),
            Check(name="layers", ok=True, detail="4 layers, as num_hidden_layers and the report say"),
            Check(name="contents", ok=True, detail="11 tensors are byte for byte those of the sources"),
        ),
    )
    assert found.ok


def test_a_folder_without_a_report(output):
    (output / "layercut.json").unlink()
    found = verify(output, load=False)
    assert [(check.name, check.ok, check.detail) for check in found.checks] == [
        ("checkpoint", True, "11 tensors in 2 weight files"),
        ("report", True, "there is no layercut.json: the folder is checked on its own"),
        ("layers", True, "4 layers, as num_hidden_layers says"),
    ]


def test_a_folder_that_is_not_there(tmp_path):
    assert failed(tmp_path / "gone", load=True) == {"checkpoint": f"{tmp_path}/gone: no such folder"}


def test_one_failed_check_fails_the_whole():
    good, bad = Check(name="a", ok=True, detail=""), Check(name="b", ok=False, detail="")
    assert not Verification(folder="x", checks=(good, bad, good)).ok
    assert Verification(folder="x", checks=(good, good)).ok


def test_a_truncated_shard(output):
    path = output / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    found = failed(output)
    assert list(found) == ["checkpoint"]
    assert "truncated" in found["checkpoint"]


def test_a_missing_shard(output):
    (output / "model-00002-of-00002.safetensors").unlink()
    assert failed(output) == {"checkpoint": f"{output}: missing shard model-00002-of-00002.safetensors; download the model again"}


def test_a_report_that_cannot_be_read(output):
    (output / "layercut.json").write_text("{")
    found = failed(output)
    assert list(found) == ["report"]
    assert found["report"].startswith(f"{output}/layercut.json: is not a report that this version can read: ")


def test_a_report_that_is_a_dangling_link(output):
    (output / "layercut.json").unlink()
    (output / "layercut.json").symlink_to(output / "gone")
    assert failed(output) == {"report": f"{output}/layercut.json: is missing; only folders that layercut wrote have one"}


def test_another_header(output):
    path = output / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"px"'))
    assert failed(output) == {"files": "model-00001-of-00002.safetensors has another header than the report says"}


def test_another_size(output):
    (output / "tokenizer.json").write_text('{"a": 1}')
    assert failed(output) == {"files": "tokenizer.json has 8 bytes, the report says 2"}


def test_another_content(output):
    (output / "tokenizer.json").write_text("[]")
    assert failed(output) == {"files": "tokenizer.json has another content than the report says"}


def test_another_config(output):
    text = (output / "config.json").read_text()
    (output / "config.json").write_text(text.replace("llama", "lama2"))
    assert failed(output) == {"files": "config.json has another content than the report says"}


def test_a_missing_file(output):
    (output / "tokenizer.json").unlink()
    assert failed(output) == {"files": "'tokenizer.json' of the report is not there"}


def test_a_weight_file_that_the_index_no_longer_names(output):
    data = {name: (dtype, shape, raw) for name, (dtype, shape, raw) in byte_tensors(4).items()}
    for path in output.glob("*.safetensors*"):
        path.unlink()
    write_safetensors(output / "model.safetensors", data)
    assert failed(output) == {
        "files": "'model-00001-of-00002.safetensors' of the report is not there",
        "no other files": "'model.safetensors' is not of this output",
        "contents": "'model.embed_tokens.weight' is not 'model.embed_tokens.weight' of 'source': they differ from byte 0 on"
        " (11 tensors differ)",
    }


def test_a_report_cannot_ask_for_files_elsewhere(output):
    (output.parent / "secret").write_text("mine")
    file = {"bytes": 4, "header_sha256": None, "sha256": "0" * 64}
    rewrite(output, lambda data: data["files"].update({"../secret": file}))
    assert failed(output) == {"files": "'../secret' of the report is not there"}


@pytest.mark.parametrize("name", ["model-00003-of-00003.safetensors", "pytorch_model.bin", "generation_config.json", "sub/extra.py"])
def test_a_stale_file(output, name):
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("stale")
    assert failed(output) == {"no other files": f"{name!r} is not of this output"}


def test_several_stale_files(output):
    for name in ("b.json", "a.json", "c.json"):
        (output / name).write_text("stale")
    assert failed(output) == {"no other files": "'a.json' is not of this output (and 2 more)"}


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", ".git/config", ".cache/huggingface/x", ".layercut.json.layercut-partial"])
def test_files_that_may_come_later(output, name):
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_text("later")
    assert failed(output) == {}


def test_a_card_that_is_rewritten(byte_checkpoint, tmp_path):
    source = byte_checkpoint("source")
    (source / "README.md").write_text("the model")
    execute(plan_for({"source": source}, LAYERS), tmp_path / "out", progress=False)
    (tmp_path / "out" / "README.md").write_text("the cut model")
    assert failed(tmp_path / "out") == {}


@pytest.mark.parametrize("become", [Path.unlink, lambda path: (path.unlink(), path.mkdir())])
def test_a_card_that_is_gone(byte_checkpoint, tmp_path, become):
    source = byte_checkpoint("source")
    (source / "README.md").write_text("the model")
    execute(plan_for({"source": source}, LAYERS), tmp_path / "out", progress=False)
    become(tmp_path / "out" / "README.md")
    assert failed(tmp_path / "out") == {"files": "'README.md' of the report is not there"}


def test_a_stale_depth(output):
    path = output / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 6'))
    found = failed(output)
    assert list(found) == ["files", "layers", "contents"]
    seen = "numbered tensors are model.layers.* (4); depth keys are num_hidden_layers = 6"
    assert found["layers"].startswith(f"{path}: no layers found: {seen}")


def test_a_depth_without_end_is_not_loaded(output):
    """transformers would make the layers one by one before it looks into the file."""
    path = output / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 1000000000'))
    found = failed(output, load=True)
    assert found["load"] == found["layers"] == f"{path}: num_hidden_layers is 1000000000, and there are 11 tensors"


def test_a_report_of_another_depth(output):
    report = read_report(output)
    write_report(output, report.model_copy(update={"layers": report.layers[:3]}))
    assert failed(output) == {
        "layers": "num_hidden_layers is 4, the report lists 3 layers",
        "contents": "the report lists 3 layers, config.json states 4",
    }


def test_layers_with_a_hole(tmp_path):
    tensors = {name: value for name, value in byte_tensors(4).items() if ".layers.2." not in name}
    write_checkpoint(tmp_path / "out", tensors, {"num_hidden_layers": 4})
    assert list(failed(tmp_path / "out")) == ["layers"]


def test_a_tensor_that_is_lost_from_one_copy_of_a_layer(output):
    tensors = byte_tensors(4)
    del tensors["model.layers.3.mlp.down_proj.weight"]
    for path in output.glob("*.safetensors*"):
        path.unlink()
    write_safetensors(output / "model.safetensors", tensors)
    details = failed(output)
    assert details["layers"] == "layers 2 and 3 are both layer 4 of source, but only one has 'mlp.down_proj.weight'"


def test_no_torch_without_load(output):
    code = (
        "import sys; from pathlib import Path; from layercut.verify import verify\n"
        "print(verify(Path(sys.argv[1]), load=False).ok, sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    assert fresh(code, output).stdout == "True []\n"


# Contents


def entries(folder):
    """Every tensor of a folder with its file and place."""
    return [(path, entry) for path in sorted(folder.glob("*.safetensors")) for entry in read_header(path).tensors]


def overwrite(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def place(folder, name):
    """File, first byte and bytes of a tensor."""
    [(path, entry)] = [(path, entry) for path, entry in entries(folder) if entry.name == name]
    return path, entry.begin, path.read_bytes()[entry.begin : entry.end]


def test_a_flip_in_any_tensor_is_found(output):
    for path, entry in entries(output):
        for position in (entry.begin, entry.end - 1):
            before = path.read_bytes()[position]
            for bit in (0, 7):
                overwrite(path, position, bytes([before ^ 1 << bit]))
                layer = re.sub(r"layers\.(\d)", lambda match: f"layers.{LAYERS[int(match[1])][1]}", entry.name)
                said = f"{entry.name!r} is not {layer!r} of 'source': they differ from byte {position - entry.begin} on"
                assert failed(output) == {"contents": said}
            overwrite(path, position, bytes([before]))
    assert failed(output) == {}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_of_a_weight_byte_is_found(output, data):
    path, entry = data.draw(st.sampled_from(entries(output)))
    position, change = data.draw(st.integers(entry.begin, entry.end - 1)), data.draw(st.integers(1, 255))
    before = path.read_bytes()[position]
    overwrite(path, position, bytes([before ^ change]))
    assert list(failed(output)) == ["contents"]
    overwrite(path, position, bytes([before]))


def test_swapped_layers_are_found(output):
    """The same headers, the same bytes, in another order."""
    one, other = (place(output, f"model.layers.{layer}.mlp.down_proj.weight") for layer in (0, 2))
    overwrite(one[0], one[1], other[2])
    overwrite(other[0], other[1], one[2])
    said = "'model.layers.0.mlp.down_proj.weight' is not 'model.layers.0.mlp.down_proj.weight' of 'source': "
    assert failed(output) == {"contents": said + "they differ from byte 7 on (2 tensors differ)"}


def test_layers_that_are_swapped_in_the_report_are_found(output):
    rewrite(output, lambda data: data["layers"].reverse())
    found = failed(output)
    assert list(found) == ["contents"]
    assert found["contents"].endswith("they differ from byte 7 on (8 tensors differ)")


def test_contents_are_left_out_on_request(output):
    path, begin, _ = place(output, "model.norm.weight")
    overwrite(path, begin, b"x")
    assert [check.name for check in verify(output, load=False, contents=False).checks if not check.ok] == []


def contents(folder):
    """The contents check: whether it passes, and what it says."""
    [check] = [check for check in verify(folder, load=False).checks if check.name == "contents"]
    return check.ok, check.detail


def test_a_source_that_is_gone(output, tmp_path):
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    assert contents(output) == (True, "not checked: source 'source' ('source') is gone")
    assert verify(output, load=False).ok


def test_a_source_of_another_structure(output, tmp_path):
    config = tmp_path / "source" / "config.json"
    config.write_text(config.read_text() + " ")
    assert contents(output) == (True, "not checked: source 'source' ('source') is no longer what it was: config or structure are others")


def test_a_source_that_is_damaged(output, tmp_path):
    os.truncate(tmp_path / "source" / "model.safetensors", 100)
    ok, said = contents(output)
    assert ok and said.startswith("not checked: source 'source' ('source') cannot be opened: file is 100 bytes, ")


def test_a_source_whose_values_were_changed(output, tmp_path):
    """Digests are of structure: which of the two was changed nobody can know, but that they differ."""
    path, begin, _ = place(tmp_path / "source", "model.layers.4.mlp.down_proj.weight")
    overwrite(path, begin, b"x")
    ok, said = contents(output)
    assert not ok and said.startswith("'model.layers.2.mlp.down_proj.weight' is not 'model.layers.4.mlp.down_proj.weight' of 'source'")


def test_a_source_in_the_hub_cache(tmp_path, byte_checkpoint, monkeypatch):
    """Found by its commit, and not asked for anywhere else; `models` names it by an alias."""
    commit = "0" * 40
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / commit
    byte_checkpoint("source").rename(tmp_path / "source")
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "source").rename(snapshot)
    plan = plan_for({"m": snapshot}, [("m", 0), ("m", 5)])
    source = plan.sources["m"].model_copy(update={"reference": "org/name@main", "revision": commit})
    execute(plan.model_copy(update={"sources": {"m": source}}), tmp_path / "out", progress=False)
    assert contents(tmp_path / "out") == (True, "not checked: source 'm' ('org/name@main') is not in the local Hub cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert contents(tmp_path / "out") == (True, "7 tensors are byte for byte those of the sources")


def test_layers_and_ends_of_two_models(byte_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        byte_checkpoint(name)
    recipe = "models: {one: a, two: b}\nslices: [{model: one, layer_range: [0, 3]}, {model: two, layer_range: [2, 6]}]\nbase_model: two\n"
    (tmp_path / "r.yaml").write_text(recipe)
    run_recipe(tmp_path / "r.yaml", out=tmp_path / "out", progress=False)
    assert contents(tmp_path / "out") == (True, "17 tensors are byte for byte those of the sources")
    path, begin, _ = place(tmp_path / "out", "lm_head.weight")
    overwrite(path, begin, b"x")
    assert contents(tmp_path / "out") == (False, "'lm_head.weight' is not 'lm_head.weight' of 'two': they differ from byte 0 on")
    (tmp_path / "b").rename(tmp_path / "c")
    assert contents(tmp_path / "out") == (True, "not checked: source 'two' ('b') is gone")


RECIPES = {
    "scale": ("steps: [scale: {tensors: '*down*', by: 0.5, at: 1}]", 1),
    "zero": ("steps: [zero: {tensors: '*o_proj*', at: [1, 2]}]", 2),
    "merge": ("steps: [merge: {at: 1-3}]", 2),
    "cast": ("dtype: bfloat16\nsteps: [prune: {at: 1}]", 13),
    "parameters": ("parameters: {scale: [{filter: down_proj, value: [1, 0.25]}]}", 5),
}


@pytest.mark.parametrize("name", RECIPES)
def test_computed_tensors_are_computed_again(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {key: struct.pack("<64f", *(number / 7 for number in range(start, start + 64))) for start, key in enumerate(byte_tensors(6))}
    write_checkpoint(tmp_path / "m", {key: ("F32", (8, 8), data) for key, data in values.items()}, {"num_hidden_layers": 6})
    (tmp_path / "r.yaml").write_text(f"model: m\n{RECIPES[name][0]}\n")
    run_recipe(tmp_path / "r.yaml", out=tmp_path / "out", progress=False)
    ok, said = contents(tmp_path / "out")
    assert ok and said.endswith(f" tensors are byte for byte those of the sources, {RECIPES[name][1]} of them computed again")
    report = read_report(tmp_path / "out")
    made = [e.name for e in expected(report).entries if isinstance(e, TensorMade)]
    assert len(made) == RECIPES[name][1]
    path, begin, data = place(tmp_path / "out", made[-1])
    overwrite(path, begin + 5, bytes([data[5] ^ 1]))
    assert contents(tmp_path / "out") == (False, f"{made[-1]!r} is not what its sources give: they differ from byte 5 on")


def test_a_recipe_of_another_dtype(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "m", {f"model.layers.{n}.w": ("F32", (2,), bytes(8)) for n in range(3)}, {"num_hidden_layers": 3})
    (tmp_path / "r.yaml").write_text("model: m\nsteps: [prune: {at: 1}]\n")
    run_recipe(tmp_path / "r.yaml", out=tmp_path / "out", progress=False)
    rewrite(tmp_path / "out", lambda data: data["recipe"].update(dtype="float16"))
    assert contents(tmp_path / "out") == (False, "'model.layers.0.w' is F32 [2], and should be F16 [2]")


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Half a gigabyte in one tensor, as a hole."""
    size = 1 << 29
    for folder, layers in (("m", 2), ("out", 1)):
        names = [f"model.layers.{n}.w" for n in range(layers)]
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
        head = encode_header([(name, "U8", (size if name.endswith(".0.w") else 1,)) for name in names], {"format": "pt"})
        (tmp_path / folder / "model.safetensors").write_bytes(head)
        os.truncate(tmp_path / folder / "model.safetensors", len(head) + size + layers - 1)
    plan = plan_for({"m": tmp_path / "m"}, [("m", 0)])
    files = {"config.json": file_digest(tmp_path / "out" / "config.json")}
    write_report(tmp_path / "out", make_report(plan, files=files, parameters=size, timings={}))
    code = (
        "import re, resource, sys; from pathlib import Path; from layercut.verify import verify\n"
        "[check] = [check for check in verify(Path(sys.argv[1]), load=False).checks if check.name == 'contents']\n"
        "status = Path('/proc/self/status')\n"
        "peak = int(re.search('VmHWM:\\\\s+([0-9]+)', status.read_text())[1]) if status.exists() else 0\n"
        "print(check.ok, check.detail); print(peak >> 10)"
    )
    said, peak = fresh(code, tmp_path / "out", cwd=tmp_path).stdout.splitlines()
    assert said == "True 1 tensors are byte for byte those of the sources"
    assert int(peak) < 100


# With transformers


@pytest.fixture
def cut(tiny, tmp_path):
    """A tiny Llama without its layers 2 and 3."""
    plan = plan_for({"m": tiny("llama")}, [("m", index) for index in (0, 1, 4, 5)])
    execute(plan, tmp_path / "out", progress=False)
    return tmp_path / "out"


def damaged(folder, tensor, data):
    """Overwrite the first bytes of one tensor."""
    path = folder / "model.safetensors"
    [entry] = [entry for entry in read_header(path).tensors if entry.name == tensor]
    with path.open("r+b") as file:
        file.seek(entry.begin)
        file.write(data)


def without(folder, names, extra=None):
    """Write the weights again without some tensors, or with more, and drop the report."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    kept = {e.name: (e.dtype, e.shape, raw[e.begin : e.end]) for e in read_header(path).tensors if e.name not in names}
    write_safetensors(path, {**kept, **(extra or {})})
    (folder / "layercut.json").unlink()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_models_pass(tiny, kind, dtype):
    found = verify(tiny(kind, dtype=dtype))
    assert failed(tiny(kind, dtype=dtype), load=True) == {}
    assert [check.name for check in found.checks] == ["checkpoint", "report", "layers", "load", "forward", "generate"]


def test_a_cut_model_passes(cut):
    found = verify(cut)
    assert [(check.name, check.ok, check.detail) for check in found.checks[-3:]] == [
        ("load", True, "LlamaForCausalLM takes every tensor and misses none"),
        ("forward", True, "outputs of shape (1, 12, 128) are finite"),
        ("generate", True, "8 greedy tokens are the same with and without cache"),
    ]
    assert found.ok


def test_the_cut_model_computes_what_the_source_computes_without_those_layers(cut, tiny):
    import torch
    import transformers

    whole = transformers.AutoModelForCausalLM.from_pretrained(tiny("llama"))
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[index] for index in (0, 1, 4, 5))
    part = transformers.AutoModelForCausalLM.from_pretrained(cut)
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        assert torch.equal(whole(ids, use_cache=False).logits, part(ids, use_cache=False).logits)


@pytest.mark.parametrize("tensor", ["model.layers.2.mlp.down_proj.weight", "lm_head.weight"])
def test_one_weight_that_is_not_finite(cut, tensor):
    damaged(cut, tensor, b"\xff" * 4)
    found = failed(cut, load=True)
    assert found["forward"] == "outputs are not finite"
    assert "files" not in found


def test_a_missing_tensor(cut):
    name = "model.layers.1.self_attn.q_proj.weight"
    without(cut, [name])
    assert failed(cut, load=True) == {"load": f"transformers finds missing tensors, such as {name!r}"}


def test_an_unexpected_tensor(cut):
    without(cut, [], {"model.layers.1.self_attn.q_norm.weight": ("F32", (2,), b"\0" * 8)})
    assert failed(cut, load=True) == {"load": "transformers finds unexpected tensors, such as 'model.layers.1.self_attn.q_norm.weight'"}


def test_a_tensor_of_another_shape(cut):
    name = "model.layers.1.self_attn.q_proj.weight"
    without(cut, [name], {name: ("F32", (2,), b"\0" * 8)})
    found = failed(cut, load=True)
    assert list(found) == ["load"]
    assert "\n" not in found["load"]
    assert len(found["load"]) <= 300


def test_a_config_that_transformers_refuses(cut):
    config = json.loads((cut / "config.json").read_text())
    config["model_type"] = "no_such_model"
    (cut / "config.json").write_text(json.dumps(config))
    (cut / "layercut.json").unlink()
    found = failed(cut, load=True)
    assert list(found) == ["load"]
    assert "no_such_model" in found["load"]


def test_layer_types_of_another_depth(tiny, tmp_path):
    plan = plan_for({"m": tiny("qwen3")}, [("m", 0), ("m", 1)])
    execute(plan, tmp_path / "out", progress=False)  # num_hidden_layers is 2, layer_types still lists 6
    assert list(failed(tmp_path / "out", load=True)) == ["load"]


OWN_CODE = "transformers could read this only with Python code that comes with it, and layercut runs no code of a checkpoint"
HINT = "what loads no model works: recipes without 'auto', verify --no-load"


def test_code_of_the_checkpoint_is_not_run(cut, tmp_path, capsys):
    config = json.loads((cut / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    config.update(model_type="evil", architectures=["Evil"], auto_map=dict.fromkeys(names, "evil.Evil"))
    (cut / "config.json").write_text(json.dumps(config))
    (cut / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (cut / "layercut.json").unlink()
    message = f"{cut}: {OWN_CODE}"
    assert failed(cut, load=True) == {"load": f"{message}; {HINT}"}
    for arguments in (["eval", str(cut), "-q"], ["run", str(tmp_path / "r.yaml"), "-q"], ["verify", str(cut), "--no-load"]):
        (tmp_path / "r.yaml").write_text(f"model: {cut}\nsteps: [prune: {{layers: 1}}]\noutput: {tmp_path}/o\n")
        status, shown = main(arguments), capsys.readouterr()
        assert (status, shown.err) == ((0, "") if "verify" in arguments else (1, f"error: {message}; {HINT}\n"))
        assert "trust" not in shown.err
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_is_not_run(cut, tmp_path, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (cut / name).unlink(missing_ok=True)
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (cut / "tokenizer_config.json").write_text(json.dumps(settings))
    (cut / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert main(["eval", str(cut), "-q"]) == 1
    assert capsys.readouterr().err == f"error: {cut}: {OWN_CODE}; {HINT}\n"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("architectures", "name"),
    [(["LlamaModel"], "LlamaModel"), (None, "LlamaForCausalLM"), (["Trainer"], "LlamaForCausalLM"), (["NoSuchClass"], "LlamaForCausalLM")],
)
def test_the_class_that_is_loaded(cut, architectures, name):
    config = json.loads((cut / "config.json").read_text())
    config["architectures"] = architectures
    (cut / "config.json").write_text(json.dumps(config))
    loads = [check for check in verify(cut).checks if check.name == "load"]
    if name == "LlamaModel":  # a model without a head does not take the tensors of one
        assert [check.detail for check in loads] == ["transformers finds unexpected tensors, such as 'lm_head.weight'"]
    else:
        assert [check.detail for check in loads] == [f"{name} takes every tensor and misses none"]


def test_a_model_without_a_head(tmp_path):
    import transformers
    from conftest import tiny_config

    transformers.LlamaModel(tiny_config("llama", 3)).save_pretrained(tmp_path)
    found = verify(tmp_path)
    assert [(check.name, check.ok) for check in found.checks] == [
        ("checkpoint", True), ("report", True), ("layers", True), ("load", True), ("forward", True)
    ]  # fmt: skip
    assert found.checks[-1].detail == "outputs of shape (1, 12, 32) are finite"


class Reader:
    """A model that always predicts `cached` or `plain` as the next token."""

    def __init__(self, cached, plain, gap=1.0):
        self.tokens, self.gap = {True: cached, False: plain}, gap
        self.config = self
        self.device = "cpu"

    def get_text_config(self):
        import types

        return types.SimpleNamespace(vocab_size=10)

    def generate(self, prompt, use_cache, **_):
        import torch

        return torch.cat([prompt, torch.tensor([self.tokens[use_cache]])], dim=1)

    def __call__(self, ids, use_cache):
        import torch

        logits = torch.zeros(1, ids.shape[1], 10)
        logits[0, -1, 5], logits[0, -1, 6] = 10.0, 10.0 - self.gap
        return {"logits": logits}


def test_generation_that_differs_with_the_cache():
    with pytest.raises(module._FailedError) as caught:
        module._generate(Reader([1, 2, 5, 3], [1, 2, 6, 3]))
    assert str(caught.value) == "greedy token 2 is 5 with cache and 6 without"


def test_generation_that_differs_by_rounding():
    found = module._generate(Reader([1, 2, 5, 3], [1, 2, 6, 8], gap=0.1))
    assert found == "greedy tokens with and without cache are the same up to token 2, where two tie within rounding"


def test_generation_settings_of_the_checkpoint_do_not_count(cut):
    settings = {"do_sample": True, "temperature": 3.0, "eos_token_id": list(range(128)), "max_new_tokens": 1, "repetition_penalty": 9.0}
    (cut / "generation_config.json").write_text(json.dumps(settings))
    assert {check.name: check.detail for check in verify(cut).checks}["generate"] == "8 greedy tokens are the same with and without cache"


def test_transformers_is_quiet_and_then_as_loud_as_before(cut):
    without(cut, ["model.layers.1.self_attn.q_proj.weight"])  # transformers has much to say about it
    code = (
        "import sys; from pathlib import Path; from transformers.utils import logging; from layercut.verify import verify\n"
        "before = logging.get_verbosity(), logging.is_progress_bar_enabled()\n"
        "print(verify(Path(sys.argv[1])).ok, before == (logging.get_verbosity(), logging.is_progress_bar_enabled()))"
    )
    done = fresh(code, cut)
    assert (done.stdout, done.stderr) == ("False True\n", "")


def test_without_torch_the_load_check_fails(cut, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = failed(cut, load=True)
    assert list(found) == ["load"]
    assert found["load"].startswith("ModuleNotFoundError: import of transformers halted")
