"""Hostile input through the command line: one clear line, exit status 1, nothing written, no wait without end, little memory."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import write_safetensors
from pydantic import ValidationError

from layercut.cli import main
from layercut.header import MAX_HEADER, encode_header
from layercut.plan import Candidate, Part, Table, TensorMade
from layercut.stack import Scaling, Share

INDEX = "model.safetensors.index.json"
SECONDS = 10
"""Seconds of a processor that a command may take, however busy the machine is."""
HANGS = 120
"""Seconds of the clock after which a command counts as waiting without end."""
MEMORY = 200
"""Megabytes that a process may take for a bomb, the 45 of Python with layercut included."""


class Hung(BaseException):
    """The command does not come back."""


class Bench:
    """A source of two shards, a recipe, and a place for the output, in a folder of their own."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source
        self.out, self.recipe, self.plan = folder / "out", folder / "r.yaml", folder / "plan.json"
        self.recipe.write_text(f"model: {source}\nsteps:\n  - prune: {{at: 1}}\n", encoding="utf-8")
        (source / "tokenizer.json").write_text("{}")
        (folder / "elsewhere").mkdir()

    def run(self, *arguments: str) -> int:
        with within(HANGS):
            return main(list(arguments) or ["run", str(self.recipe), "-q", "--out", str(self.out)])

    def state(self) -> dict[str, tuple[int, int, int]]:
        """Everything below the folder, without opening it: a pipe would wait."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            seen = path.lstat()
            found[str(path)] = (seen.st_mode, seen.st_size, seen.st_mtime_ns if path.is_file() else 0)
        return found


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hung

    before, started = signal.signal(signal.SIGALRM, stop), time.process_time()
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - started < SECONDS


@pytest.fixture
def bench(tmp_path: Path, byte_checkpoint: Callable[..., Path]) -> Bench:
    return Bench(tmp_path, byte_checkpoint("source", shards=2))


def one_line(capsys: pytest.CaptureFixture[str], message: str) -> str:
    """stderr is one line that prints, says what it should, and is no novel; stdout holds nothing that works on a terminal."""
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.endswith("\n") and shown.err.count("\n") == 1, shown.err
    assert shown.err[:-1].isprintable(), shown.err
    assert len(shown.err) < 5000
    assert message in shown.err + shown.out, shown.err + shown.out
    assert all(line.isprintable() for line in shown.out.split("\n"))
    return shown.out


def refused(bench: Bench, capsys: pytest.CaptureFixture[str], message: str, *arguments: str) -> str:
    before = bench.state()
    assert bench.run(*arguments) == 1
    assert bench.state() == before
    return one_line(capsys, message)


# Headers


def entry(**values: object) -> bytes:
    """The JSON of a header with one tensor `a` of two bytes, with values replaced."""
    return json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], **values}}).encode()


def weights(text: bytes, data: bytes = b"ab", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TWO = '{"a":{"dtype":"U8","shape":[2],"data_offsets":[%s]},"b":{"dtype":"U8","shape":[2],"data_offsets":[%s]}}'
HEADERS: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "file is 0 bytes, too short for safetensors"),
    "no length": (b"1234567", "file is 7 bytes, too short"),
    "length 0": (weights(b"", b""), "header does not start with '{'"),
    "length of all ones": (b"\xff" * 8 + b"{}", "header length 18446744073709551615 is over the 25000000"),
    "25 MB are claimed": (weights(b"{}", b"", MAX_HEADER), "truncated"),
    "a byte more is claimed": (weights(b"{}", b"", MAX_HEADER + 1), "header length 25000001 is over"),
    "pickle": (b"\x80\x02cposix\nsystem\nq\x00X\x02\x00\x00\x00idq\x01\x85R.", "is over the 25000000 that layercut reads"),
    "not UTF-8": (weights(b'{"\xff\xfe":1}'), "header is not UTF-8 (byte 10)"),
    "BOM": (weights(b"\xef\xbb\xbf{}"), "header does not start with '{'"),
    "UTF-16": (weights("{}".encode("utf-16-le")), "not JSON: NUL at byte 9"),
    "NUL at the end": (weights(b"{}\0\0"), "not JSON: NUL at byte 10"),
    "list": (weights(b"[]"), "header does not start with '{'"),
    "key twice": (weights(TWO.replace('"b"', '"a"').encode() % (b"0,2", b"2,4"), b"abcd"), "key 'a' stands 2 times"),
    "NaN": (weights(b'{"a":NaN}'), "NaN is not JSON"),
    "Infinity": (weights(b'{"a":Infinity}'), "Infinity is not JSON"),
    "1e999": (weights(b'{"a":1e999}'), "number out of range: 1e999"),
    "half a surrogate": (weights(b'{"\\udc00":1}'), "half of a surrogate pair"),
    "nested": (weights(b'{"a":' + b"[" * 50_000), "JSON is nested too deeply"),
    "4,000 digits": (weights(entry(data_offsets=[0, 10**3999])), "tensor 'a': data_offsets overflow int64"),
    "10,000 digits": (weights(b'{"a":' + b"9" * 10_000 + b"}"), "not JSON: Exceeds the limit"),
    "negative offset": (weights(entry(data_offsets=[-2, 0])), "data_offsets is not a pair of whole numbers from 0"),
    "offset that is a float": (weights(entry(data_offsets=[0, 2.0])), "data_offsets is not a pair"),
    "offset that is a bool": (weights(entry(data_offsets=[0, True])), "data_offsets is not a pair"),
    "offset that is text": (weights(entry(data_offsets=["0", "2"])), "data_offsets is not a pair"),
    "offsets backwards": (weights(entry(data_offsets=[2, 0])), "data_offsets begin at 2, after their end 0"),
    "offsets beyond the file": (weights(entry(shape=[2**40], data_offsets=[0, 2**40])), "truncated"),
    "overlap": (weights((TWO % ("0,2", "1,3")).encode(), b"abc"), "overlaps the tensor before it by 1 bytes"),
    "the same bytes twice": (weights((TWO % ("0,2", "0,2")).encode()), "overlaps the tensor before it by 2 bytes"),
    "hole": (weights((TWO % ("0,2", "3,5")).encode(), b"abcde"), "leaves a hole of 1 bytes"),
    "bytes of nobody": (weights(entry(), b"abc"), "1 bytes belong to no tensor"),
    "negative shape": (weights(entry(shape=[-1, -2])), "shape is not a list of whole numbers"),
    "shape that is a bool": (weights(entry(shape=[True, 2])), "shape is not a list"),
    "shape that is a float": (weights(entry(shape=[2.0])), "shape is not a list"),
    "shape that wraps around": (weights(entry(shape=[2**32, 2**32 + 1])), "overflows int64"),
    "shape that wraps to 0": (weights(entry(shape=[2**32, 2**32], data_offsets=[0, 0]), b""), "overflows int64"),
    "shape of another dtype": (weights(entry(dtype="F32")), "data_offsets span 2 bytes, F32 of shape [2] takes 8"),
    "unknown dtype": (weights(entry(dtype="F7")), "unknown dtype 'F7'"),
    "dtype that is a list": (weights(entry(dtype=["U8"])), "unknown dtype ['U8']"),
    "another key": (weights(entry(strides=[1])), "unknown key 'strides'"),
    "entry that is a list": (weights(b'{"a":[1]}'), "entry is not an object"),
    "metadata that is a number": (weights(b'{"__metadata__":{"n":1}}'), "__metadata__ 'n' is not a string"),
    "name that writes on the terminal": (weights(entry().replace(b'"a"', b'"\\u001b[2J"')), r"the name of tensor '\x1b[2J' does not print"),
    "name with a newline": (weights(entry().replace(b'"a"', b'"a\\nerror: b"')), r"the name of tensor 'a\nerror: b' does not print"),
    "name of 100 kB": (weights(b'{"' + b"n" * 100_000 + b'":1}'), "tensor 'nnn"),
    "no tensors": (weights(b"{}", b""), "the weight files hold no tensors"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    data, message = HEADERS[name]
    for path in bench.source.glob("model*"):
        path.unlink()
    (bench.source / "model.safetensors").write_bytes(data)
    refused(bench, capsys, message)


# The index


def index(**weight_map: Any) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


OUTSIDE = "which is not a plain path inside the folder"
INDICES: Mapping[str, tuple[bytes, str]] = {
    "list": (b"[]", "no weight_map"),
    "empty file": (b"", "not JSON"),
    "weight_map is a list": (b'{"weight_map":["a"]}', "no weight_map"),
    "weight_map is empty": (b'{"weight_map":{}}', "no weight_map"),
    "file is a number": (index(a=1), "weight_map of tensor 'a' is not a file name"),
    "up": (index(a="../elsewhere/x.safetensors"), OUTSIDE),
    "up inside": (index(a="b/../../x.safetensors"), OUTSIDE),
    "absolute": (index(a="/etc/x.safetensors"), OUTSIDE),
    "backslash": (index(a="..\\x.safetensors"), OUTSIDE),
    "drive": (index(a="C:x.safetensors"), OUTSIDE),
    "NUL": (index(a="x\0.safetensors"), OUTSIDE),
    "newline": (index(a="x\n.safetensors"), OUTSIDE),
    "empty name": (index(a=""), OUTSIDE),
    "config.json": (index(a="config.json"), "weight_map names 'config.json', which is not a .safetensors file"),
    "a pickle": (index(a="pytorch_model.bin"), "which is not a .safetensors file"),
    "the index itself": (index(a=INDEX), "which is not a .safetensors file"),
    "two spellings of one file": (index(a="A.safetensors", b="a.safetensors"), "are one file on many systems"),
    "a file that is not there": (index(a="gone.safetensors"), "missing shard gone.safetensors"),
    "name too long for the disk": (index(a="n" * 5000 + ".safetensors"), "missing shard nnn"),
    "a tensor that is not there": (index(a="model-00001-of-00002.safetensors"), "but it is in no weight file"),
    "key twice": (b'{"weight_map":{"a":"x","a":"y"}}', "key 'a' stands 2 times"),
    "nested": (b'{"weight_map":' + b'{"a":' * 50_000, "JSON is nested too deeply"),
    "half a surrogate": (b'{"weight_map":{"\\ud800":"x"}}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices(name: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    data, message = INDICES[name]
    (bench.source / INDEX).write_bytes(data)
    refused(bench, capsys, message)


# config.json


def config(**values: Any) -> bytes:
    return json.dumps({"model_type": "llama", "num_hidden_layers": 6, **values}).encode()


NONE = "no layers found: numbered tensors are model.layers.* (6); depth keys are none"
CONFIGS: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"),
    "list": (b"[1]", "not a JSON object"),
    "text": (b'"x"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "not UTF-8": (b'{"a":"\xff"}', "not UTF-8 (byte 6)"),
    "UTF-16": ('{"num_hidden_layers": 6}'.encode("utf-16"), "not UTF-8"),
    "BOM": (b"\xef\xbb\xbf{}", "BOM"),
    "key twice": (b'{"num_hidden_layers":6,"num_hidden_layers":6}', "key 'num_hidden_layers' stands 2 times"),
    "NaN": (b'{"a":NaN}', "NaN is not JSON"),
    "1e999": (b'{"a":1e999}', "number out of range"),
    "10,000 digits": (b'{"num_hidden_layers":' + b"9" * 10_000 + b"}", "not JSON: Exceeds the limit"),
    "half a surrogate": (b'{"a":"\\ud800"}', "half of a surrogate pair"),
    "nested": (b'{"a":' + b"[" * 50_000, "JSON is nested too deeply"),
    "nested a little": (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64"),
    "key that writes on the terminal": (config(**{"a\x1b[2J_config": {"num_hidden_layers": 7}}), r"key 'a\x1b[2J_config' does not print"),
    "no depth": (b"{}", NONE),
    "depth is a bool": (config(num_hidden_layers=True), NONE),
    "depth is negative": (config(num_hidden_layers=-1), NONE),
    "depth is text": (config(num_hidden_layers="6"), NONE),
    "depth is a float": (config(num_hidden_layers=6.0), NONE),
    "depth is a list": (config(num_hidden_layers=[6]), NONE),
    "depth is 10**30": (config(num_hidden_layers=10**30), f"num_hidden_layers is {10**30}, and there are 15 tensors"),
    "depth of another tower": (config(vision_config={"depth": 10**9}), f"vision_config.depth is {10**9}, and there are 15 tensors"),
    "kinds that are objects": (
        config(model_type="gemma3n_text", num_kv_shared_layers=2, layer_types=[{}] * 6),
        "of a kind that model type gemma3n_text does not take",
    ),
    "a pattern that is a number by halves": (
        config(model_type="exaone4", sliding_window=8, sliding_window_pattern={"a": 1}),
        "layer_types follows from other values, and one is of a kind that model type exaone4 does not take",
    ),
    "a period without end": (
        config(model_type="jamba", attn_layer_period=10**18, attn_layer_offset=4, expert_layer_period=2, expert_layer_offset=1),
        "cannot describe the new order of layers",
    ),
    "depth of other tensors": (config(num_hidden_layers=7), "depth keys are num_hidden_layers = 7"),
    "fewer than no extra layers": (config(num_hidden_layers=8, num_nextn_predict_layers=-2), "depth keys are num_hidden_layers = 8"),
    "extra layers are a bool": (config(num_hidden_layers=5, num_nextn_predict_layers=True), "holds 6 layers, but num_hidden_layers is 5"),
    "other weights": (config(transformers_weights="/etc/passwd"), "transformers_weights names '/etc/passwd'"),
    "other weights in a list": (config(transformers_weights=[1]), "transformers_weights names [1]"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    data, message = CONFIGS[name]
    (bench.source / "config.json").write_bytes(data)
    refused(bench, capsys, message)


# Files that are none


def replaced(name: str) -> Callable[[Bench], Path]:
    """The path of a file of the source, which is gone."""

    def remove(bench: Bench) -> Path:
        path = bench.source / name
        path.unlink(missing_ok=True)
        return path

    return remove


def pipe(path: Path, bench: Bench) -> None:
    os.mkfifo(path)


def folder(path: Path, bench: Bench) -> None:
    path.mkdir()


def device(path: Path, bench: Bench) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path, bench: Bench) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def out(path: Path, bench: Bench) -> None:
    target = bench.folder / "elsewhere" / path.name
    target.write_text("{}")
    path.symlink_to(target)


def circle(path: Path, bench: Bench) -> None:
    path.symlink_to(path.name)


def dangling(path: Path, bench: Bench) -> None:
    path.symlink_to("gone")


SHARD, CONFIG, TEXT = "model-00001-of-00002.safetensors", "config.json", "tokenizer.json"
KINDS: Sequence[tuple[str, Callable[[Path, Bench], None], str]] = (
    (SHARD, pipe, "not a regular file"),
    (SHARD, folder, "not a regular file"),
    (SHARD, device, "link out of the folder, to '/dev/zero'"),
    (SHARD, listening, "not a regular file"),
    (SHARD, out, "link out of the folder"),
    (SHARD, circle, "missing shard"),
    (SHARD, dangling, "missing shard"),
    (CONFIG, pipe, "no config.json"),
    (CONFIG, folder, "no config.json"),
    (CONFIG, device, "no config.json"),
    (CONFIG, out, "link out of the folder"),
    (CONFIG, circle, "config.json"),
    (CONFIG, dangling, "no config.json"),
    (INDEX, pipe, "unsupported weights format"),
    (INDEX, folder, "unsupported weights format"),
    (INDEX, device, "unsupported weights format"),
    (INDEX, out, "link out of the folder"),
    (INDEX, circle, "model.safetensors.index.json"),
    (TEXT, device, "link out of the folder, to '/dev/zero'"),
    (TEXT, out, "link out of the folder"),
    (TEXT, circle, "Too many levels of symbolic links"),
    (TEXT, dangling, "link to nothing"),
)


@pytest.mark.parametrize(("name", "make", "message"), KINDS, ids=[f"{name}-{make.__name__}" for name, make, _ in KINDS])
def test_files_that_are_none(
    name: str, make: Callable[[Path, Bench], None], message: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    make(replaced(name)(bench), bench)
    refused(bench, capsys, message)


@pytest.mark.parametrize("make", [pipe, listening])
def test_companions_that_are_no_files_stay_behind(
    make: Callable[[Path, Bench], None], bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    make(replaced("tokenizer.json")(bench), bench)
    assert bench.run() == 0
    assert bench.run("plan", str(bench.recipe)) == 0
    assert re.search("tokenizer.json +not a regular file", capsys.readouterr().out)
    assert not (bench.out / "tokenizer.json").exists()


def test_companions_with_odd_names_stay_behind(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (b"a\nb.txt", b"\x1b[2J.txt", b"\xff.txt", b"a\x7f.txt", "a\u202eb.txt".encode()):
        Path(os.fsdecode(os.fsencode(bench.source) + b"/" + name)).write_text("x")
    assert bench.run() == 0
    assert bench.run("plan", str(bench.recipe)) == 0
    shown = capsys.readouterr().out
    assert shown.count("its name holds characters that do not print") == 5
    assert all(line.isprintable() for line in shown.split("\n"))
    assert sorted(path.name for path in bench.out.iterdir()) == ["config.json", "layercut.json", "model.safetensors", "tokenizer.json"]


def test_names_that_differ_in_case_only(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """On many systems the second would replace the first, and with it the config that was checked."""
    for name in ("Config.json", "TOKENIZER.json", "notes.txt", "Notes.txt"):
        (bench.source / name).write_text("{}")
    assert bench.run() == 0
    assert bench.run("plan", str(bench.recipe)) == 0
    shown = capsys.readouterr().out
    assert "its name differs from config.json only in case" in shown
    written = sorted(path.name for path in bench.out.iterdir())
    assert written == ["Notes.txt", "TOKENIZER.json", "config.json", "layercut.json", "model.safetensors"]


# Recipes


RECIPES: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "expected a mapping"),
    "list": (b"- model: m\n", "expected a mapping"),
    "not UTF-8": (b"model: \xff\n", "not UTF-8 text (byte 7)"),
    "NUL": (b"model: a\0b\n", "not valid YAML"),
    "control character": (b"model: a\x1b[2Jb\n", "not valid YAML"),
    "tag that builds an object": (b"model: !!python/object/apply:os.system [touch ran]\n", "model: expected text"),
    "tag that names a module": (b"model: !!python/name:os.system ''\n", "model: expected some text"),
    "alias of nothing": (b"model: *a\n", "found undefined alias"),
    "alias that holds itself": (b"model: &a [*a]\n", "an alias that contains itself"),
    "alias bomb": (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (i, i, b",".join([b"*%c" % (i - 1)] * 9)) for i in range(98, 108)),
        "aliases expand to more than 500,000 values",
    ),
    "merge bomb": (
        b"a: &a {" + b",".join(b"k%d: 1" % i for i in range(1000)) + b"}\nmodel: {<<: [" + b",".join([b"*a"] * 5000) + b"]}\n",
        "aliases expand to more than 500,000 values",
    ),
    "nested": (b"model: " + b"[" * 100_000, "nested too deeply"),
    "nested mappings": (b"model: " + b"{a: " * 100_000, "nested too deeply"),
    "several documents": (b"model: a\n---\nmodel: b\n", "several recipes in one file"),
    "merge of text": (b"<<: text\n", "'<<' takes a mapping"),
    "list as a key": (b"[a, b]: c\n", "a key must be text"),
    "key twice": (b"model: a\nmodel: b\n", "key 'model' stands twice"),
    "key that writes on the terminal": (b'"a\\e[2J": 1\n', r"unknown key 'a\x1b[2J'"),
    "model with a NUL": (b'model: "a\\0b"\n', r"'a\x00b' names no model"),
    "model with a newline": (b'model: "a\\nb"\n', r"a\nb"),
    "model of 100 kB": (b"model: " + b"m" * 100_000 + b"\n", "File name too long"),
    "model of another home": (b"model: ~nobody-of-this-name/x\n", "no such folder"),
    "a million layers": (
        b"model: {source}\nsteps: [duplicate: {at: 0-5, times: 1000}, duplicate: {at: 0-5999, times: 1000}]\n",
        "layers are too many",
    ),
    "10**50 layers": (b"model: {source}\nsteps: [prune: {layers: 1%s}]\n" % (b"0" * 50), "layers"),
    "times 10**9": (b"model: {source}\nsteps: [duplicate: {at: 1, times: 1000000000}]\n", "expected at most 1000"),
    "infinite factor": (b"model: {source}\nparameters: {scale: .inf}\n", "expected a factor"),
    "factor that is no number": (b"model: {source}\nparameters: {scale: .nan}\n", "expected a factor"),
    "percent of a huge number": (b"model: {source}\nsteps: [prune: {layers: %s%%}]\n" % (b"9" * 90), "layers"),
    "layer of 100 digits": (b"model: {source}\nsteps: [prune: {at: %s}]\n" % (b"9" * 100), "does not exist"),
    "range of 100 digits": (b'model: {source}\nsteps: [prune: {at: "1-%s"}]\n' % (b"9" * 100), "expected a layer such as 3"),
    "output with a NUL": (b'model: {source}\nsteps: [prune: {at: 1}]\noutput: "a\\0b"\n', r"'a\x00b'"),
    "output with a name too long": (b"model: {source}\nsteps: [prune: {at: 1}]\noutput: %s\n" % (b"n" * 5000), "File name too long"),
    "output is a number": (b"model: {source}\nsteps: [prune: {at: 1}]\noutput: 5\n", "'output' is a folder"),
    "output is the source": (b"model: {source}\nsteps: [prune: {at: 1}]\noutput: {source}/x\n", "lie in each other"),
    "shards of a byte": (b"model: {source}\nsteps: [prune: {at: 1}]\noutput: {path: x, max_shard_size: 0}\n", "at least one byte"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench.folder)
    data, message = RECIPES[name]
    bench.recipe.write_bytes(data.replace(b"{source}", os.fsencode(bench.source)))
    refused(bench, capsys, message, "run", str(bench.recipe), "-q", *([] if name.startswith(("output", "shards")) else ["--out", "x"]))


@pytest.mark.parametrize("make", [pipe, folder, listening, circle, dangling])
def test_recipes_that_are_no_files(make: Callable[[Path, Bench], None], bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.recipe.unlink()
    make(bench.recipe, bench)
    refused(bench, capsys, "r.yaml: ")


def test_a_recipe_without_end(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    refused(bench, capsys, "/dev/zero: not a regular file", "run", "/dev/zero", "--out", str(bench.out))


# Plans


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set one value of a document."""

    def apply(data: dict[str, Any]) -> None:
        node: Any = data
        *parents, last = path.split(".")
        for part in parents:
            node = node[int(part) if part.isdigit() else part]
        node[int(last) if last.isdigit() else last] = value

    return apply


TENSOR = "actions.files.0.tensors.0"
MADE = {"name": "x", "dtype": "F32", "shape": [2], "parts": []}
PLANS: Mapping[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "file outside": (change("actions.files.0.name", "../x.safetensors"), "not a plain name inside the output folder"),
    "absolute file": (change("actions.files.0.name", "/tmp/x.safetensors"), "not a plain name inside"),
    "file with a newline": (change("actions.files.0.name", "a\n.safetensors"), "not a plain name inside"),
    "file that is a pickle": (change("actions.files.0.name", "pytorch_model.bin"), "not a .safetensors file"),
    "companion outside": (change("actions.companions.0.name", "../../etc/passwd"), "not a plain name inside"),
    "companion that is not there": (change("actions.companions.0.name", "id_rsa"), "which is no file of"),
    "companion of nobody": (change("actions.companions.0.model", "x"), "which is no file of 'x'"),
    "text outside": (change("actions.texts", {"../x": "y"}), "not a plain name inside"),
    "text that is weights": (change("actions.texts", {"x.safetensors": "y"}), "which no checkpoint carries"),
    "range in the header": (change(f"{TENSOR}.begin", 0), "which are not weights"),
    "range beyond the file": (change(f"{TENSOR}.end", 10**9), "which are not weights"),
    "range beyond all files": (change(f"{TENSOR}.end", 10**30), "less than 9223372036854775808"),
    "negative range": (change(f"{TENSOR}.begin", -1), "greater than or equal to 0"),
    "range that is a float": (change(f"{TENSOR}.begin", 1.5), "valid integer"),
    "range of another file": (change(f"{TENSOR}.file", "/etc/passwd"), "which is no weight file"),
    "range of nobody": (change(f"{TENSOR}.model", "x"), "which is no weight file of 'x'"),
    "unknown dtype": (change(f"{TENSOR}.dtype", "F7"), "dtype 'F7'"),
    "another shape": (change(f"{TENSOR}.shape", [7]), "bytes for tensor"),
    "negative shape": (change(f"{TENSOR}.shape", [-8, -8]), "a shape holds whole numbers from 0"),
    "endless shape": (change(f"{TENSOR}.shape", [2**62] * 100_000), "a shape holds whole numbers from 0, and fewer than 2**63 elements"),
    "unknown field": (change("actions.hook", "os.system"), "Extra inputs are not permitted"),
    "another format": (change("format", "layercut-plan/9"), "layercut-plan/1"),
    "NaN as a weight": (change("actions.layers.0.shares", [{"model": "m", "index": 0, "weight": float("nan")}]), "finite number"),
    "infinity as a factor": (change("actions.layers.0.scalings", [[{"tensors": "*", "by": float("inf")}]]), "finite number"),
    "NaN as a factor": (change(TENSOR, MADE | {"factors": [float("nan")]}), "actions.files.0.tensors.0"),
    "NaN as a distance": (change("seams.0.distances", {"m": {"mean": float("nan"), "stderr": 0}}), "finite number"),
    "layer that is not there": (change("actions.layers.0.index", 10**12), "which is not there"),
    "negative layer": (change("actions.layers.0.index", -1), "which is not there"),
    "layer that stands for none": (change("actions.layers.0.span", 0), "stand for 0 layers"),
    "layer that stands for many": (change("actions.layers.0.span", 10**12), "which is not there"),
    "source of endless depth": (change("sources.{source}.depth", 10**12), "depth: Input should be less than"),
    "source that is elsewhere": (change("sources.{source}.folder", "/proc/self"), "no config.json"),
    "source with a NUL": (change("sources.{source}.folder", "a\0b"), "no such folder"),
    "source of other sizes": (change("sources.{source}.files", {}), "source changed since the plan was made"),
    "donor of nobody": (change("donor", "x"), "names the donor 'x'"),
    "header of 1 TB": (change("actions.files.0.header_size", 10**12), "is over the 25000000"),
    "negative header": (change("actions.files.0.header_size", -8), "cannot be padded"),
    "index of other tensors": (change("actions.index", '{"weight_map":{"a":"b"}}'), "does not list its tensors"),
    "config that is a list": (change("actions.config", "[]"), "config.json is not a JSON object"),
    "config with half a surrogate": (change("actions.config", '{"a": "\ud800"}'), "unexpected end of hex escape"),
    "recipe that is none": (change("recipe", {"evaluate": {"perplexity": 7}}), "plan holds a recipe that this version cannot read"),
    "many weight files": (change("actions.files", []), "plan writes no weights"),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    apply, message = PLANS[name]
    assert bench.run("plan", str(bench.recipe), "-o", str(bench.plan)) == 0
    text = bench.plan.read_text()
    if "source" in name:  # the alias is the folder
        text = text.replace(json.dumps(str(bench.source)) + ": {", '"{source}": {')
    data = json.loads(text)
    apply(data)
    bench.plan.write_text(json.dumps(data).replace('"{source}": {', json.dumps(str(bench.source)) + ": {"))
    capsys.readouterr()
    refused(bench, capsys, message, "run", str(bench.plan), "-q", "--out", str(bench.out))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_in_no_record(number: float) -> None:
    part = {"model": "m", "file": "f", "begin": 0, "end": 4, "dtype": "F32"}
    for kind, data in (
        (TensorMade, MADE | {"factors": [number]}),
        (Part, part | {"weight": number}),
        (Share, {"model": "m", "index": 0, "weight": number}),
        (Scaling, {"tensors": "*", "by": number}),
        (Candidate, {"start": 0, "stop": 1, "cost": number, "stderr": 0}),
        (Table, {"metric": "m", "a": "m", "b": "m", "mean": [[number]], "stderr": [[0]]}),
    ):
        with pytest.raises(ValidationError, match="Input should be a finite number"):
            kind.model_validate(data)


TEXTS = {
    "nested": ('{"format":"layercut-plan/1","recipe":' + "[" * 100_000, "recursion limit exceeded"),
    "cut short": ('{"format":"layercut-plan/1"', "EOF while parsing"),
    "nothing else": ('{"format":"layercut-plan/1"}', "Field required"),
    "10,000 digits": ('{"format":"layercut-plan/1","donor":' + "9" * 10_000 + "}", "number out of range"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_plans_that_are_none(name: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = TEXTS[name]
    bench.plan.write_text(text)
    refused(bench, capsys, message, "run", str(bench.plan), "-q", "--out", str(bench.out))


# Reports


FILE = {"bytes": 4, "header_sha256": None, "sha256": "0" * 64}
REPORTS: Mapping[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "file outside": (change("files", {"../elsewhere/x": FILE}), "'../elsewhere/x' of the report is not there"),
    "absolute file": (change("files", {"/etc/passwd": FILE}), "'/etc/passwd' of the report is not there"),
    "file that writes on the terminal": (change("files", {"a\x1b[2J\n": FILE}), r"'a\x1b[2J\n' of the report is not there"),
    "file with a NUL": (change("files", {"a\0b": FILE}), r"'a\x00b' of the report is not there"),
    "unknown field": (change("hook", 1), "Extra inputs are not permitted"),
    "another format": (change("format", "layercut-report/9"), "layercut-report/1"),
    "layer that is not there": (change("layers.0.index", 10**12), "layer 1000000000000 of"),
    "negative layer": (change("layers.0.index", -1), "layer -1 of"),
    "layer of nobody": (change("layers.0.model", "x\n"), r"layer 0 of 'x\n' is no layer of a source of it"),
    "share of nobody": (
        change("layers.0.shares", [{"model": "x", "index": 0, "weight": 1}]),
        "layer 0 of 'x' is no layer of a source of it",
    ),
    "NaN as a weight": (change("layers.0.shares", [{"model": "x", "index": 0, "weight": float("nan")}]), "finite number"),
    "infinity as a factor": (change("layers.0.scalings", [[{"tensors": "*", "by": float("inf")}]]), "finite number"),
    "a layer more": (lambda data: data["layers"].append(data["layers"][0]), "the report lists 6 layers"),
    "a hundred thousand layers": (lambda data: data["layers"].extend(data["layers"][:1] * 100_000), "the report lists 100005 layers"),
    "donor of nobody": (change("donor", "x"), "the donor 'x' is no source of it"),
    "recipe that is none": (change("recipe", {"dtype": 7}), "recipe"),
    "no layers": (change("layers", []), "the report lists 0 layers"),
}


@pytest.fixture
def cut(bench: Bench, capsys: pytest.CaptureFixture[str]) -> Bench:
    assert bench.run() == 0
    capsys.readouterr()
    return bench


@pytest.mark.parametrize("name", REPORTS)
def test_reports(name: str, cut: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    apply, message = REPORTS[name]
    path = cut.out / "layercut.json"
    data = json.loads(path.read_text())
    apply(data)
    path.write_text(json.dumps(data))
    shown = refused(cut, capsys, message, "verify", str(cut.out), "--no-load")
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("make", "message"),
    [(pipe, "not a regular file"), (folder, "Is a directory"), (device, "link out of the folder"), (out, "link out of the folder"),
     (circle, "Too many levels"), (dangling, "is missing"), (listening, "not a regular file")],
)  # fmt: skip
def test_reports_that_are_no_files(
    make: Callable[[Path, Bench], None], message: str, cut: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cut.out / "layercut.json"
    path.unlink()
    make(path, cut)
    refused(cut, capsys, message, "verify", str(cut.out), "--no-load")


@pytest.mark.parametrize(
    "reference", ["/dev/zero", "../elsewhere", "~nobody-of-this-name", "a\0b", "", "no-such-model", "https://x/y", "a\x1b[2J"]
)
def test_a_report_names_any_source(reference: str, cut: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is asked of the network, nothing is written, and what cannot be compared is said not to have been."""
    path = cut.out / "layercut.json"
    data = json.loads(path.read_text())
    next(iter(data["sources"].values()))["reference"] = reference
    path.write_text(json.dumps(data))
    before = cut.state()
    assert cut.run("verify", str(cut.out), "--no-load") == 0
    assert cut.state() == before
    shown = capsys.readouterr().out
    assert "ok  contents" in shown and "not checked: " in shown
    assert all(line.isprintable() for line in shown.split("\n"))


def test_inspect_shows_nothing_that_works_on_a_terminal(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    (bench.source / "config.json").write_bytes(config(model_type="ll\x1b[2Jama\nfake line", layer_types=["\x9b2J"] * 6))
    for arguments in ([], ["--json"]):
        assert bench.run("inspect", str(bench.source), *arguments) == 0
        shown = capsys.readouterr().out
        assert all(line.isprintable() for line in shown.split("\n")) and "\nfake" not in shown
    assert json.loads(shown)["model_type"] == "ll\x1b[2Jama\nfake line"


# Bombs: files that are long, or whose content is


def sparse(path: Path, start: bytes, size: int) -> None:
    path.write_bytes(start)
    os.truncate(path, size)


def bombs(folder: Path) -> Iterator[tuple[str, list[str], str]]:
    """Name, command, and what it says. Every folder is a checkpoint but for one file."""

    def source(name: str, **files: bytes | tuple[bytes, int]) -> list[str]:
        place = folder / name
        place.mkdir()
        (place / "config.json").write_bytes(config())
        write_safetensors(place / "model.safetensors", {f"model.layers.{n}.w": ("U8", (1,), b"x") for n in range(6)})
        for file, data in files.items():
            path = place / {"config": "config.json", "weights": "model.safetensors", "index": INDEX, "report": "layercut.json"}[file]
            if isinstance(data, bytes):
                path.write_bytes(data)
            else:
                sparse(path, *data)
        return ["verify", str(place), "--no-load"]

    whole = MAX_HEADER + 8
    head = struct.pack("<Q", MAX_HEADER)
    yield "brackets in a header", source("h1", weights=head + b'{"a":' + b"[" * (MAX_HEADER - 5)), "JSON holds more than 1000000 values"
    yield "a header that is a hole", source("h2", weights=(head + b'{"a', whole)), "not JSON: NUL at byte 11"
    yield "empty objects in a header", source("h3", weights=weights(b'{"a":[' + b"{}," * 490_000)), "not JSON"
    yield "a name of 4 million escapes", source("h4", weights=weights(b'{"' + b"\\u0001" * 4_100_000 + b'":1}')), "entry is not an object"
    many = b",".join(b'"%s%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % (b"x" * 110, n) for n in range(124_000))
    yield "25 MB of tensors", source("h5", weights=weights(b"{" + many + b',"a":1}')), "tensor 'a': entry is not an object"
    yield "small objects in a config", source("c1", config=b'{"a":[' + b'{"":0},' * 490_000 + b"0]}"), "no layers found"
    yield "lists in a config", source("c2", config=b"[" + b"[[]]," * 320_000 + b"0]"), "not a JSON object"
    yield "a config of 1 GB", source("c3", config=(b'{"a":' + b"[" * 99, 1 << 30)), "is longer than the 16000000 bytes"
    yield "brackets in a config", source("c4", config=b'{"a":' + b"[" * 15_000_000), "JSON holds more than 1000000 values"
    yield "an index of 1 TB", source("i1", index=(b"{", 1 << 40)), "is longer than the 50000000 bytes"
    yield "brackets in an index", source("i2", index=b'{"weight_map":' + b"{" * 49_000_000), "JSON holds more than 1000000 values"
    yield "a report of 1 TB", source("r1", report=(b"{", 1 << 40)), "is longer than the 50000000 bytes"
    yield "brackets in a report", source("r2", report=b'{"format":' + b"[" * 10_000_000), "recursion limit exceeded"
    for number, (name, text, said) in enumerate((
        ("lists in a recipe", b"model: [" + b"[]," * 150_000 + b"]", "model: expected text"),
        ("a recipe of 1 MB", b"model: " + b"m" * 1_000_000, "is longer than the 500000 bytes"),
        ("a million slices", b"slices: [" + b"{layer_range: [0, 6]}," * 20_000 + b"]", "which model?"),
        ("steps by the thousand", b"model: x\nsteps: [" + b"{prune: {at: 1}}," * 25_000 + b"]", "no such folder"),
        ("brackets in a plan", b'{"format":"layercut-plan/1","recipe":' + b"[" * 10_000_000, "recursion limit exceeded"),
    )):  # fmt: skip
        path = folder / f"{number}.yaml"
        path.write_bytes(text)
        yield name, ["run", str(path), "-q", "--out", str(folder / "out")], said
    path = folder / "1TB.yaml"
    sparse(path, b'{"format":"layercut-plan/1"', 1 << 40)
    yield "a plan of 1 TB", ["run", str(path), "--out", str(folder / "out")], "is longer than the 200000000 bytes"


CHILD = """
import contextlib, io, json, pathlib, re, resource, sys, time
from layercut.cli import main
def highest():
    # Megabytes. Where there is /proc not by getrusage: Linux counts the process that started this one.
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\\s+([0-9]+) kB", status.read_text())[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20
for line in sys.stdin:
    shown, start = io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
        status = main(json.loads(line))
    print(json.dumps([status, shown.getvalue(), highest(), time.process_time() - start]), flush=True)
"""


def test_bombs(tmp_path: Path) -> None:
    """One process takes them all: its peak may not pass the limit at any of them."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        for name, arguments, said in bombs(tmp_path):
            with within(HANGS):
                child.stdin.write(json.dumps(arguments) + "\n")
                child.stdin.flush()
                status, shown, peak, seconds = json.loads(child.stdout.readline())
            assert status == 1, (name, shown[-2000:])
            assert said in shown and "Traceback" not in shown, (name, shown[:500])
            assert peak < MEMORY, f"{name} takes {peak} MB"
            assert seconds < SECONDS, f"{name} takes {seconds} s"
        child.stdin.close()
    assert not (tmp_path / "out").exists()


def test_the_table_is_long() -> None:
    assert sum(map(len, (HEADERS, INDICES, CONFIGS, KINDS, RECIPES, PLANS, TEXTS, REPORTS))) > 200
    assert encode_header([], {}) == weights(b"{}      ", b"")
