from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from layercut.errors import CheckpointError
from layercut.header import encode_header
from layercut.caches import cache_folder
from layercut.source import resolve

COMMIT = "a" * 40
NEWER = "b" * 40


def weights(*names: str) -> bytes:
    return encode_header([(name, "F32", (2,)) for name in names], {"format": "pt"}) + bytes(8 * len(names))


def index(weight_map: dict[str, str]) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors.index.json": index({"a": "model-1.safetensors", "b": "model-2.safetensors"}),
    "model-1.safetensors": weights("a"),
    "model-2.safetensors": weights("b"),
    "tokenizer.json": b"{}",
    "odd [name].txt": b"brackets are no pattern",
    "odd n.txt": b"not this one by mistake",
    "sub/notes.md": b"notes",
    "pytorch_model.bin": b"x" * 1000,
    "original/consolidated.00.pth": b"x" * 1000,
    ".gitattributes": b"",
}
DENIED = {name for name in MODEL if name.startswith(("pytorch", "original", ".git"))}
GOES_ALONG = ["odd [name].txt", "odd n.txt", "sub/notes.md", "tokenizer.json"]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def refusal(reference: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve(reference)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- folders and files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", {"config.json": b"{}", "model.safetensors": weights("a")})


def test_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(folder)).folder == folder
    monkeypatch.chdir(folder.parent)
    for reference in ("model", "./model", "model/"):
        checkpoint = resolve(reference)
        assert (checkpoint.folder, checkpoint.reference, checkpoint.revision) == (folder, reference, None)


def test_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/model").folder == folder


@pytest.mark.parametrize("reference", ["./none", "../none", "/none", "~/none", "~nobody-here/x", "a/b/c", ".\\none", "C:\\x", "none/"])
def test_what_looks_like_a_path_is_one(reference: str) -> None:
    assert refusal(reference) == f"{reference}: no such folder"


def test_no_reference() -> None:
    hint = "; give a folder, a .gguf file, or a Hub id such as org/name"
    assert refusal("") == "'' names no model" + hint
    assert refusal("a\0b") == r"'a\x00b' names no model" + hint
    assert refusal("gpt2@") == "gpt2@: no revision after '@'"


def test_a_name_that_is_too_long() -> None:
    assert refusal("x" * 5000).endswith(": cannot be read: File name too long")


def test_folder_without_config(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)).startswith(f"no config.json in {tmp_path}; ")


def test_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    expected = f"{tmp_path}/model.safetensors: a file, not a folder; give the folder that holds config.json, or a .gguf file"
    assert refusal(f"{tmp_path}/model.safetensors") == expected


def test_missing_gguf() -> None:
    assert refusal("./none.gguf") == "./none.gguf: no such file"
    assert refusal("org/name.GGUF") == "org/name.GGUF: no such file"


def test_gguf_is_converted_into_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    asked: list[tuple[Path, Path]] = []

    def convert(path: Path, cache: Path) -> Path:
        asked.append((path, cache))
        return folder

    monkeypatch.setattr("layercut.gguf.convert", convert)
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "mine"))
    checkpoint = resolve(str(file))
    assert (checkpoint.reference, checkpoint.folder) == (str(file), folder)
    resolve(str(file), cache=tmp_path / "other")
    assert asked == [(file, tmp_path / "mine"), (file, tmp_path / "other")]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("LAYERCUT_CACHE", "~/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/home/me/own")
    monkeypatch.delenv("LAYERCUT_CACHE")
    assert cache_folder() == Path("/xdg/layercut")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/me/.cache/layercut")


def test_a_folder_takes_no_heavy_module(folder: Path) -> None:
    code = "import sys; from layercut.source import resolve; resolve(sys.argv[1]); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "transformers", "numpy", "datasets", "safetensors", "huggingface_hub", "gguf"} & set(loaded) == set()


# ---- the Hub: the real client in a process of its own, before a cache on disk or a server on this machine


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as reading a model takes. `repos` are by name; `log` is what was asked."""

    repos: ClassVar[dict[str, dict[str, bytes]]] = {}
    log: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.log.append(path)
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo, (verb, revision, *rest) = "/".join(parts[:2]), [*parts[2:], "", ""][: max(len(parts) - 2, 2)]
        files = self.repos.get(repo)
        if repo == "org/broken":
            return self.reply(500, b"", {})
        if repo == "org/gated":
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        if files is None:
            return self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("", "main", "v1", COMMIT):
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if verb == "resolve":
            data = files["/".join(rest).replace("%20", " ").replace("%5B", "[").replace("%5D", "]")]
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self.reply(200, data if body else b"", headers, len(data))
        if verb == "tree":
            return self.reply(200, json.dumps([entry(name, data) for name, data in files.items()]).encode(), {})
        info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        return self.reply(200, json.dumps(info).encode(), {})

    def reply(self, status: int, data: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@pytest.fixture
def hub() -> Iterator[str]:
    """Address of a Hub that holds org/name."""
    Hub.repos, Hub.log = {"org/name": MODEL}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


CODE = """
import json, sys
from layercut.errors import CheckpointError
from layercut.source import resolve
try:
    found = resolve(sys.argv[1])
    along = [name for name, _ in found.companions]
    print(json.dumps([str(found.folder), found.reference, found.revision, along, dict(found.left_out), list(found.tensors)]))
except CheckpointError as error:
    print(json.dumps(str(error)))
print(*{"torch", "transformers", "numpy", "datasets"} & set(sys.modules))
"""


def ask(reference: str, cache: Path, endpoint: str = "", light: bool = True) -> Any:
    """`resolve` with the client's settings read afresh; without an endpoint the Hub is switched off. `light`: nothing heavy is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"} if endpoint else {"HF_HUB_OFFLINE": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env = kept | settings | {"HF_HUB_CACHE": str(cache), "HF_HOME": str(cache.parent / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE, reference], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    answer, heavy = done.stdout.splitlines()
    assert heavy == "" or not light
    return json.loads(answer)


def cached(cache: Path, files: dict[str, bytes], listing: dict[str, bytes] | None = None) -> Path:
    """A cache as huggingface_hub lays it out, with main at COMMIT; `listing` are the files that the cache notes of the commit."""
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    for name, data in files.items():
        blob = repo / "blobs" / hashlib.sha1(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    if listing is not None:
        note = {name: {"size": len(data), "blob_id": hashlib.sha1(data).hexdigest()} for name, data in listing.items()}
        (repo / "trees").mkdir()
        (repo / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": note}))
    return snapshot


def without(*prefixes: str) -> dict[str, bytes]:
    return {name: data for name, data in MODEL.items() if not name.startswith(prefixes)}


def test_download_takes_what_is_needed_and_no_more(tmp_path: Path, hub: str) -> None:
    folder, reference, revision, along, left_out, tensors = ask("org/name", tmp_path / "hub", hub)
    assert folder == str(tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT)
    assert (reference, revision, along, tensors) == ("org/name", COMMIT, GOES_ALONG, ["a", "b"])
    assert set(left_out) == DENIED and left_out["pytorch_model.bin"] == "weights of the uncut model, in another format or copy"
    fetched = {path.split("/", 5)[5].replace("%20", " ").replace("%5B", "[").replace("%5D", "]") for path in Hub.log if "/resolve/" in path}
    assert fetched == set(MODEL) - DENIED


def test_the_second_time_nothing_is_asked(tmp_path: Path, hub: str) -> None:
    first = ask("org/name", tmp_path / "hub", hub)
    Hub.log.clear()
    assert ask("org/name", tmp_path / "hub", hub) == first
    assert Hub.log == []
    assert ask("org/name", tmp_path / "hub") == first


def test_one_file_of_weights(tmp_path: Path, hub: str) -> None:
    Hub.repos["org/name"] = {"config.json": b"{}", "model.safetensors": weights("a"), "other.safetensors": weights("b")}
    _, _, _, along, left_out, tensors = ask("org/name", tmp_path / "hub", hub)
    assert (along, set(left_out), tensors) == ([], {"other.safetensors"}, ["a"])


def pickled(**tensors: int) -> bytes:
    """A file of torch.save."""
    import io

    import torch

    file = io.BytesIO()
    torch.save({name: torch.zeros(size) for name, size in tensors.items()}, file)
    return file.getvalue()


PICKLED_MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "pytorch_model.bin.index.json": index({"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}),
    "pytorch_model-1.bin": pickled(a=4),
    "pytorch_model-2.bin": pickled(b=4),
    "pytorch_model-3.bin": b"in no index",
    "tokenizer.json": b"{}",
    "training_args.bin": b"evil",
}


def test_repository_of_pickled_weights(tmp_path: Path, hub: str) -> None:
    """The files of its index are downloaded and converted; the next time neither the Hub nor torch is asked."""
    Hub.repos["org/name"] = PICKLED_MODEL
    first = ask("org/name", tmp_path / "hub", hub, light=False)
    folder, reference, revision, along, left_out, tensors = first
    assert "/pickled/" in folder and (reference, revision, along, tensors) == ("org/name", COMMIT, ["tokenizer.json"], ["a", "b"])
    assert left_out == {
        "pytorch_model-3.bin": "weights of the uncut model, in another format or copy",
        "training_args.bin": "pickle of a training run: runs code when it is read",
    }
    fetched = {path.split("/", 5)[5] for path in Hub.log if "/resolve/" in path}
    assert fetched == set(PICKLED_MODEL) - {"pytorch_model-3.bin", "training_args.bin"}
    Hub.log.clear()
    assert ask("org/name", tmp_path / "hub", hub) == first == ask("org/name", tmp_path / "hub")
    assert Hub.log == []


def test_repository_of_one_pickled_file(tmp_path: Path, hub: str) -> None:
    Hub.repos["org/name"] = {"config.json": b"{}", "pytorch_model.bin": pickled(a=4, b=2)}
    assert ask("org/name", tmp_path / "hub", hub, light=False)[5] == ["a", "b"]


def test_repository_that_lacks_a_pickled_shard(tmp_path: Path, hub: str) -> None:
    Hub.repos["org/name"] = {name: data for name, data in PICKLED_MODEL.items() if name != "pytorch_model-2.bin"}
    expected = "org/name: the repository lacks 'pytorch_model-2.bin', which its index names"
    assert ask("org/name", tmp_path / "hub", hub) == expected


def test_cache_of_pickled_weights_needs_no_network(tmp_path: Path) -> None:
    cached(tmp_path / "hub", PICKLED_MODEL)
    assert ask("org/name", tmp_path / "hub", light=False)[5] == ["a", "b"]


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_revision(tmp_path: Path, hub: str, revision: str) -> None:
    _, reference, commit, *_ = ask(f"org/name@{revision}", tmp_path / "hub", hub)
    assert (reference, commit) == (f"org/name@{revision}", COMMIT)
    assert ask(f"org/name@{revision}", tmp_path / "hub")[2] == COMMIT


def test_complete_cache_needs_no_network(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "hub", {name: data for name, data in MODEL.items() if name not in DENIED}, MODEL)
    folder, _, revision, along, left_out, tensors = ask("org/name", tmp_path / "hub")
    assert (folder, revision, along, set(left_out), tensors) == (str(snapshot), COMMIT, GOES_ALONG, DENIED, ["a", "b"])


def test_partial_cache_is_filled(tmp_path: Path, hub: str) -> None:
    """As transformers leaves it: config and weights, no tokenizer, no listing."""
    cached(tmp_path / "hub", without("tokenizer", "odd", "sub", *DENIED))
    _, _, _, along, left_out, _ = ask("org/name", tmp_path / "hub", hub)
    assert (along, set(left_out)) == (GOES_ALONG, DENIED)


def test_partial_cache_without_the_hub_says_what_is_missing(tmp_path: Path) -> None:
    cached(tmp_path / "hub", without("tokenizer", *DENIED), MODEL)
    _, _, _, along, left_out, tensors = ask("org/name", tmp_path / "hub")
    assert (along, tensors) == (GOES_ALONG[:-1], ["a", "b"])
    assert left_out["tokenizer.json"] == "not in the local cache, and the Hub could not be asked"
    assert set(left_out) == DENIED | {"tokenizer.json"}


def test_partial_cache_without_listing(tmp_path: Path) -> None:
    cached(tmp_path / "hub", without("tokenizer", *DENIED))
    left_out = ask("org/name", tmp_path / "hub", "http://127.0.0.1:9")[4]
    assert left_out == {"files of the repository": "not in the local cache, and the Hub could not be asked"}


OFFLINE = "no such folder, and not in the local Hub cache, and HF_HUB_OFFLINE forbids to ask the Hub; "
OFFLINE += "unset HF_HUB_OFFLINE to download it, or give a folder"
UNREACHABLE = "no such folder, and not in the local Hub cache, and the Hub cannot be reached; check the network, or give a folder"


def test_cache_that_lacks_weights(tmp_path: Path) -> None:
    cached(tmp_path / "hub", without("model-2"), MODEL)
    assert ask("org/name", tmp_path / "hub") == f"org/name: {OFFLINE}"


@pytest.mark.parametrize("reference", ["org/name", "gpt2", "org/name@v1", f"org/name@{NEWER}"])
def test_offline(tmp_path: Path, reference: str) -> None:
    assert ask(reference, tmp_path / "hub") == f"{reference}: {OFFLINE}"


def test_no_network(tmp_path: Path) -> None:
    assert ask("org/name", tmp_path / "hub", "http://127.0.0.1:9") == f"org/name: {UNREACHABLE}"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("org/none", "no such folder, and no such model on the Hub, or a private one; check the name; for a private model: hf auth login"),
        ("org/gated", "a gated model; ask for access at https://huggingface.co/org/gated, then: hf auth login"),
        ("org/name@no", "no revision 'no'; give a branch, a tag, or a commit"),
        ("org/na..me", "no such folder, and not a Hub id; a Hub id looks like org/name"),
        ("a b", "no such folder, and not a Hub id; a Hub id looks like org/name"),
    ],
)
def test_hub_says_no(tmp_path: Path, hub: str, reference: str, message: str) -> None:
    assert ask(reference, tmp_path / "hub", hub) == f"{reference}: {message}"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b""}, "org/name: no config.json in the repository; is it a transformers model?"),
        ({"config.json": b"{}", "x.txt": b""}, "no weights in org/name; expected model.safetensors or model.safetensors.index.json"),
        (
            {"config.json": b"{}", "tf_model.h5": b"", "sub/model.safetensors": b""},
            "org/name: unsupported weights format: found tf_model.h5; layercut reads safetensors: model.safetensors, or the files "
            "of model.safetensors.index.json; convert it once with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)",
        ),
        (
            MODEL | {"adapter_config.json": b"{}"},
            "org/name: an adapter lies beside the model, and loaders apply it without asking; "
            "merge it into the model, or move adapter_config.json away",
        ),
        (
            without("model-2"),
            "org/name: the repository lacks 'model-2.safetensors', which its index names",
        ),
        (
            MODEL | {"model.safetensors": weights("a", "b")},
            "org/name: both model.safetensors and an index of other files: loaders disagree on which are the weights; "
            "move one of them away",
        ),
    ],
)
def test_repository_that_cannot_be_cut(tmp_path: Path, hub: str, files: dict[str, bytes], message: str) -> None:
    Hub.repos["org/name"] = files
    assert ask("org/name", tmp_path / "hub", hub) == message
    assert not any("safetensors/" in path or path.endswith(".safetensors") for path in Hub.log), "weights were fetched for nothing"


def test_index_of_a_repository_must_stay_inside(tmp_path: Path, hub: str) -> None:
    Hub.repos["org/name"] = MODEL | {"model.safetensors.index.json": index({"a": "../../../x"})}
    answer = ask("org/name", tmp_path / "hub", hub)
    assert answer.endswith("weight_map names '../../../x', which is not a plain path inside the folder")


def raised(name: str) -> Exception:
    """The client's own exceptions, made as it makes them."""
    import httpx2
    from huggingface_hub import errors

    request = httpx2.Request("GET", "https://huggingface.co")
    made: dict[str, Exception] = {
        "full": OSError(errno.ENOSPC, "No space left on device"),
        "denied": PermissionError(errno.EACCES, "Permission denied"),
        "timeout": httpx2.ReadTimeout("slow"),
        "reset": ConnectionResetError("reset"),
        "xet": errors.XetDownloadError("CAS\nsays no"),
    }
    for status in (401, 403, 429, 503):
        made[str(status)] = errors.HfHubHTTPError("no", response=httpx2.Response(status, request=request))
    return made[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("full", "no room on the disk for the download; free some, or set HF_HOME to a folder on a larger disk"),
        ("denied", "the download failed: [Errno 13] Permission denied"),
        ("timeout", UNREACHABLE),
        ("reset", UNREACHABLE),
        ("xet", "the download failed: CAS says no"),
        ("401", "the Hub refuses access (401); log in with: hf auth login"),
        ("403", "the Hub refuses access (403); log in with: hf auth login"),
        ("429", "the Hub answers 429; try again later"),
        ("503", "the Hub answers 503; try again later"),
    ],
)
def test_other_failures(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise raised(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert refusal("org/name") == f"org/name: {message}"
