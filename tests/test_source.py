from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import failure
from hub import Hub

from layercut.caches import cache_folder, hub_cache
from layercut.checkpoint import Checkpoint
from layercut.errors import CheckpointError
from layercut.header import encode_header
from layercut.hubmodel import UNASKED
from layercut.source import find_local, resolve, resolve_commit


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
    return failure(CheckpointError, lambda: resolve(reference))


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


@pytest.mark.parametrize(
    "reference", ["./none", "../none", "/none", "~/none", "~nobody-here/x", "a/b/c", ".\\none", "C:\\x", "C:/x", "none/"]
)
def test_what_looks_like_a_path_is_one(reference: str) -> None:
    assert refusal(reference) == f"{reference}: no such folder"


def test_a_folder_of_much_the_same_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert refusal("./modell") == "./modell: no such folder; did you mean 'model'?"
    assert refusal(f"{folder}s") == f"{folder}s: no such folder; did you mean 'model'?"
    assert refusal("Model2").endswith("and HF_HUB_OFFLINE forbids to ask the Hub; did you mean 'model'?")


@pytest.mark.parametrize("end", ["", "/", "/tree/main", "?x=1"])
def test_an_address_is_no_model(end: str) -> None:
    address = f"https://huggingface.co/org/name{end}"
    assert refusal(address) == f"{address}: an address, not a model; write the Hub id alone: org/name"


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
    assert asked == [(file, tmp_path / "mine")]


def test_a_folder_takes_no_heavy_module(folder: Path) -> None:
    code = "import sys; from layercut.source import resolve; resolve(sys.argv[1]); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "transformers", "numpy", "datasets", "safetensors", "huggingface_hub", "gguf"} & set(loaded) == set()


@pytest.mark.parametrize("name", ["with spaces", "a+b", "at@main", "ünï-層", "org/name", "org/name@main", "#x"])
def test_odd_names_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A folder is a folder, relative too, whatever its name, also when the Hub must not be asked."""
    write(tmp_path / name, {"config.json": b"{}", "model.safetensors": weights("a")})
    monkeypatch.chdir(tmp_path)
    for reference in (name, f"./{name}", str(tmp_path / name)):
        assert resolve(reference).folder == tmp_path / name


# ---- the Hub: the real client before a server on this machine


@pytest.fixture
def model(hub: Hub) -> Hub:
    """A Hub that holds org/name."""
    hub.add("org/name", MODEL)
    return hub


def names_along(checkpoint: Checkpoint) -> list[str]:
    return [name for name, _ in checkpoint.companions]


def test_only_what_describes_the_model_is_fetched(model: Hub) -> None:
    checkpoint = resolve("org/name")
    commit = model.repos["org/name"].branches["main"]
    assert checkpoint.folder == cache_folder() / "hub" / "models--org--name" / "snapshots" / commit
    assert (checkpoint.reference, checkpoint.revision) == ("org/name", commit)
    assert (names_along(checkpoint), list(checkpoint.tensors)) == (GOES_ALONG, ["a", "b"])
    assert set(dict(checkpoint.left_out)) == DENIED
    assert dict(checkpoint.left_out)["pytorch_model.bin"] == "weights of the uncut model, in another format or copy"
    small = {"config.json", "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"}
    assert model.fetched() == {name: len(MODEL[name]) for name in small}


def test_whole(model: Hub) -> None:
    checkpoint = resolve("org/name", whole=True)
    assert checkpoint.folder == hub_cache() / "models--org--name" / "snapshots" / str(checkpoint.revision)
    assert (names_along(checkpoint), set(dict(checkpoint.left_out))) == (GOES_ALONG, DENIED)
    fetched = {name: data for name, data in MODEL.items() if name not in DENIED}
    assert model.fetched() == {name: len(data) for name, data in fetched.items()}
    assert {name: (checkpoint.folder / name).read_bytes() for name in fetched} == fetched


def test_what_is_here_is_not_fetched_again(model: Hub) -> None:
    first = resolve("org/name")
    model.log.clear()
    assert resolve("org/name") == first
    assert [request.path for request in model.log] == ["/api/models/org/name/revision/main"], "the branch is asked for its commit"
    assert resolve(f"org/name@{first.revision}").folder == first.folder
    assert len(model.log) == 1, "a commit asks for nothing"


def test_a_file_that_goes_along_is_fetched_when_it_is_asked_for(model: Hub) -> None:
    checkpoint = resolve("org/name")
    assert not (checkpoint.folder / "tokenizer.json").exists()
    assert checkpoint.path("tokenizer.json").read_bytes() == b"{}"
    assert checkpoint.path("sub/notes.md").read_bytes() == b"notes"
    assert checkpoint.path("none") == checkpoint.folder / "none"


@pytest.mark.parametrize("revision", ["main", "v1", "feature/x", "refs/pr/1", "commit"])
def test_revision(model: Hub, revision: str) -> None:
    """The commit is that of the branch, tag, or pull request; main has moved on."""
    repo = model.repos["org/name"]
    old = repo.branches["main"]
    repo.tag("v1")
    repo.branch("feature/x")
    repo.pull_request("please")
    newest = repo.commit({"config.json": b'{"model_type": "gpt2"}'}, "newer")
    checkpoint = resolve(f"org/name@{old if revision == 'commit' else revision}")
    assert checkpoint.revision == (newest if revision == "main" else old)
    assert checkpoint.config == {"model_type": "gpt2" if revision == "main" else "llama"}


def test_a_plan_gets_the_commit_that_it_names(model: Hub) -> None:
    old = resolve("org/name")
    model.repos["org/name"].commit({"config.json": b"{}", "model-1.safetensors": weights("a", "c")}, "newer")
    assert resolve_commit("org/name", str(old.revision)).folder == old.folder
    assert resolve("org/name").revision != old.revision


def test_renamed(model: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    model.rename("org/name", "new/name")
    assert list(resolve("org/name", whole=True).tensors) == ["a", "b"]
    assert "org/name: the repository is called new/name now\n" in capsys.readouterr().err


def test_one_file_of_weights(hub: Hub) -> None:
    hub.add("gpt2", {"config.json": b"{}", "model.safetensors": weights("a"), "other.safetensors": weights("b")})
    checkpoint = resolve("gpt2")
    assert (names_along(checkpoint), list(checkpoint.tensors)) == ([], ["a"])
    assert "other.safetensors" in dict(checkpoint.left_out)


def test_a_folder_of_the_cache_is_not_a_model(model: Hub) -> None:
    """Its weight files have all their size, and little of their bytes."""
    checkpoint = resolve("org/name")
    hint = f"; name the model: org/name@{checkpoint.revision}"
    expected = f"{checkpoint.folder}: a folder of layercut's own cache, in which only parts of the weights may be{hint}"
    assert refusal(str(checkpoint.folder)) == expected


def test_nothing_heavy_is_imported(model: Hub, tmp_path: Path) -> None:
    code = "import sys; from layercut.source import resolve; print(resolve('org/name').revision); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=model.env(tmp_path / "x"), capture_output=True, text=True, check=True)
    commit, modules = done.stdout.splitlines()
    assert commit == model.repos["org/name"].branches["main"]
    assert {"torch", "transformers", "numpy", "datasets"} & set(modules.split()) == set()


# pickled weights


def pickled(**tensors: int) -> bytes:
    """A file of torch.save."""
    import io

    import torch

    file = io.BytesIO()
    torch.save({name: torch.zeros(size) for name, size in tensors.items()}, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def pickled_model() -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "llama"}',
        "pytorch_model.bin.index.json": index({"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}),
        "pytorch_model-1.bin": pickled(a=4),
        "pytorch_model-2.bin": pickled(b=4),
        "pytorch_model-3.bin": b"in no index",
        "tokenizer.json": b"{}",
        "training_args.bin": b"evil",
    }


def test_repository_of_pickled_weights(hub: Hub, pickled_model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of its index are downloaded and converted; offline, what was made is found again."""
    hub.add("org/name", pickled_model)
    checkpoint = resolve("org/name")
    assert checkpoint.folder.parent.name == "pickled"
    assert (checkpoint.revision, names_along(checkpoint)) == (hub.repos["org/name"].branches["main"], ["tokenizer.json"])
    assert dict(checkpoint.left_out) == {
        ".gitattributes": "version control or cache, not the model",
        "pytorch_model-3.bin": "weights of the uncut model, in another format or copy",
        "training_args.bin": "pickle of a training run: runs code when it is read",
    }
    assert set(hub.fetched()) == set(pickled_model) - {"pytorch_model-3.bin", "training_args.bin"}
    hub.offline(monkeypatch)
    hub.log.clear()
    assert resolve("org/name") == checkpoint
    assert hub.log == []


def test_repository_of_one_pickled_file(hub: Hub) -> None:
    hub.add("org/name", {"config.json": b"{}", "pytorch_model.bin": pickled(a=4, b=2)})
    assert list(resolve("org/name").tensors) == ["a", "b"]


def test_repository_that_lacks_a_pickled_shard(hub: Hub, pickled_model: dict[str, bytes]) -> None:
    hub.add("org/name", {name: data for name, data in pickled_model.items() if name != "pytorch_model-2.bin"})
    assert refusal("org/name") == "org/name: the repository lacks 'pytorch_model-2.bin', which its index names"


# a cache, offline or without a network


FORBIDDEN = "HF_HUB_OFFLINE forbids to ask the Hub: unset it, or leave out --offline"
UNKNOWN = (
    "no such folder, and not in the local Hub cache, and HF_HUB_OFFLINE forbids to ask the Hub; "
    "unset it to download the model, or leave out --offline, or give a folder"
)


def unplug(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is gone, and nobody said so."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}")


def download(hub: Hub, *patterns: str, revision: str = "main") -> Path:
    """What another program left in the Hub cache."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download("org/name", revision=revision, allow_patterns=list(patterns) or None))


def test_complete_cache_needs_no_network(model: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = download(model)
    model.offline(monkeypatch)
    model.log.clear()
    for whole in (False, True):
        checkpoint = resolve("org/name", whole=whole)
        assert (checkpoint.folder, checkpoint.revision, names_along(checkpoint)) == (snapshot, snapshot.name, GOES_ALONG)
        assert set(dict(checkpoint.left_out)) == DENIED
    assert model.log == []


def test_the_network_may_be_gone(model: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = download(model)
    capsys.readouterr()
    unplug(monkeypatch)
    assert resolve("org/name").folder == snapshot
    expected = f"org/name: the Hub cannot be reached; the commit in the local cache is taken, {snapshot.name}\n"
    assert capsys.readouterr().err == expected


def test_cache_of_transformers_lacks_what_it_does_not_read(model: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config and weights, no tokenizer: offline the rest is listed as left out, with the network it goes along."""
    download(model, "config.json", "model*.safetensors", "*.index.json")
    assert names_along(resolve("org/name")) == GOES_ALONG
    model.offline(monkeypatch)
    checkpoint = resolve("org/name")
    assert (names_along(checkpoint), list(checkpoint.tensors)) == ([], ["a", "b"])
    assert {name for name, reason in checkpoint.left_out if reason == UNASKED} == set(GOES_ALONG)


def test_cache_without_listing(model: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an older client leaves it."""
    snapshot = download(model, "config.json", "model*.safetensors", "*.index.json")
    (snapshot.parent.parent / "trees" / f"{snapshot.name}.json").unlink()
    model.offline(monkeypatch)
    assert dict(resolve("org/name").left_out) == {"files of the repository": UNASKED}


def test_offline_names_the_files_that_are_missing(model: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    download(model, "config.json", "model-1.safetensors")
    model.offline(monkeypatch)
    assert refusal("org/name") == f"org/name: not in the local cache: model.safetensors.index.json; {FORBIDDEN}"


def test_offline_names_all_weights_that_are_missing(model: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    download(model, "config.json", "*.index.json")
    model.offline(monkeypatch)
    assert refusal("org/name") == f"org/name: not in the local cache: model-1.safetensors, model-2.safetensors; {FORBIDDEN}"
    with pytest.raises(CheckpointError) as caught:
        resolve("org/name", whole=True)
    assert str(caught.value) == f"org/name: not in the local cache: model-1.safetensors, model-2.safetensors; {FORBIDDEN}"


def test_headers_are_enough_to_plan_offline(model: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = resolve("org/name")
    model.offline(monkeypatch)
    offline = resolve("org/name")
    assert (offline.tensors, offline.digest) == (online.tensors, online.digest)


@pytest.mark.parametrize("reference", ["org/name", "gpt2", "org/name@v1", f"org/name@{'b' * 40}"])
def test_offline_and_not_here(model: Hub, monkeypatch: pytest.MonkeyPatch, reference: str) -> None:
    model.offline(monkeypatch)
    assert refusal(reference) == f"{reference}: {UNKNOWN}"
    assert model.log == []


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    unplug(monkeypatch)
    why = "no such folder, and not in the local Hub cache, and the Hub cannot be reached; check the network, or give a folder"
    assert refusal("org/name") == f"org/name: {why}"


def test_find_local_asks_nobody(model: Hub) -> None:
    checkpoint = resolve("org/name")
    model.log.clear()
    assert find_local("org/name@main", str(checkpoint.revision)).digest == checkpoint.digest
    with pytest.raises(CheckpointError, match="not in the local Hub cache"):
        find_local("org/name", "b" * 40)
    assert model.log == []


# what cannot be cut


def without(*prefixes: str) -> dict[str, bytes]:
    return {name: data for name, data in MODEL.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("org/none", "no such folder, and no such model on the Hub, or a private one; check the name; for a private model: hf auth login"),
        ("org/name@no", "no revision 'no'; give a branch, a tag, a commit, or refs/pr/N"),
        ("org/na..me", "no such folder, and not a Hub id; a Hub id looks like org/name"),
        ("a b", "no such folder, and not a Hub id; a Hub id looks like org/name"),
        ("models/a+b", "no such folder, and not a Hub id; a Hub id looks like org/name"),
        ("modèles/層", "no such folder, and not a Hub id; a Hub id looks like org/name"),
    ],
)
def test_hub_says_no(model: Hub, reference: str, message: str) -> None:
    assert refusal(reference) == f"{reference}: {message}"


def test_gated(model: Hub) -> None:
    model.add("org/gated", MODEL, gated=True)
    assert refusal("org/gated") == (
        f"org/gated: a gated model, and no token; ask for access at {model.endpoint}/org/gated, then: hf auth login"
    )


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
        (without("model-2"), "org/name: the repository lacks 'model-2.safetensors', which its index names"),
        (
            MODEL | {"model.safetensors": weights("a", "b")},
            "org/name: both model.safetensors and an index of other files: loaders disagree on which are the weights; "
            "move one of them away",
        ),
    ],
)
def test_repository_that_cannot_be_cut(hub: Hub, files: dict[str, bytes], message: str) -> None:
    hub.add("org/name", files)
    assert refusal("org/name") == message
    assert not any(name.endswith(".safetensors") for name in hub.fetched()), "weights were fetched for nothing"


def test_index_of_a_repository_must_stay_inside(hub: Hub) -> None:
    hub.add("org/name", MODEL | {"model.safetensors.index.json": index({"a": "../../../x"})})
    assert refusal("org/name").endswith("weight_map names '../../../x', which is not a plain path inside the folder")


def test_header_that_is_none(hub: Hub) -> None:
    """What it says of its length is not believed: no more than the start is fetched."""
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": (1 << 40).to_bytes(8, "little") + bytes(200_000)})
    assert "header" in refusal("org/name")
    assert hub.sent("model.safetensors") == 1 << 15
    hub.add("org/short", {"config.json": b"{}", "model.safetensors": b"1234"})
    assert "model.safetensors: " in refusal("org/short")


def test_long_header(hub: Hub) -> None:
    names = [f"tensor.{number:06}" for number in range(2000)]
    data = weights(*names)
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": data + b""})
    assert list(resolve("org/name").tensors) == names
    assert hub.sent("model.safetensors") == 8 + int.from_bytes(data[:8], "little") < len(data)


def test_server_without_ranges(hub: Hub) -> None:
    """The start of a file can still be had alone, a rest only with the file."""
    hub.ranges = False
    data = weights(*(f"tensor.{number:06}" for number in range(2000)))
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": data})
    assert len(resolve("org/name").tensors) == 2000


def test_a_listing_of_nonsense(model: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import hubroutes

    true = hubroutes._entry
    monkeypatch.setattr(hubroutes, "_entry", lambda name, blob: true(name, blob) | ({"size": -1} if name == "tokenizer.json" else {}))
    assert refusal("org/name").startswith("org/name: the Hub lists 'tokenizer.json' with the size -1 and the digest ")


def test_config_that_is_too_long(model: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layercut.hubmodel.MAX_JSON", 10)
    assert refusal("org/name") == "org/name: config.json is 23 bytes, over the 10 that layercut reads"
    assert model.fetched() == {}
