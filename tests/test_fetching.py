from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import tiny_model, write_safetensors
from hub import CANARY, SIGNATURE, Hub, loopback

from layercut.api import outstanding, plan_recipe, run_recipe
from layercut.caches import cache_folder, hub_cache
from layercut.checkpoint import open_checkpoint
from layercut.cli import main
from layercut.contents import NotCheckedError, check_contents
from layercut.errors import CheckpointError
from layercut.executor import execute
from layercut.fetching import check_here, fetch, fetch_whole
from layercut.mirror import Mirror
from layercut.report import read_report
from layercut.source import resolve
from layercut.verify import verify

SIZE = 100_000
"""Bytes of a tensor."""
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8}
FORBIDDEN = "HF_HUB_OFFLINE forbids to ask the Hub: unset it, or leave out --offline"


def sharded(folder: Path, shards: list[list[int]], size: int = SIZE) -> Path:
    """A model whose files hold these layers, two tensors of each; the ends are in the first and the last."""
    folder.mkdir()
    chance = random.Random(1)
    homes: dict[str, str] = {}
    for number, layers in enumerate(shards):
        names = [f"model.layers.{layer}.{rest}.weight" for layer in layers for rest in ("self_attn.o_proj", "mlp.down_proj")]
        names = ["model.embed_tokens.weight"] * (number == 0) + names
        names += ["model.norm.weight", "lm_head.weight"] * (number == len(shards) - 1)
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, {name: ("U8", (size,), chance.randbytes(size)) for name in names})
        homes |= dict.fromkeys(names, file)
    config = CONFIG | {"num_hidden_layers": sum(map(len, shards))}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    (folder / "tokenizer.json").write_text("{}" * 20_000)
    (folder / "generation_config.json").write_text("{}")
    return folder


FOUR = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


@pytest.fixture
def four(hub: Hub, tmp_path: Path) -> Hub:
    """A Hub that holds org/name, a model of 16 layers in four files."""
    hub.add("org/name", sharded(tmp_path / "four", FOUR))
    return hub


def recipe(tmp_path: Path, steps: str, model: str = "org/name") -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {model}\nsteps: {steps}\noutput: {tmp_path / 'out'}\n")
    return path


def shard(number: int) -> str:
    return f"model-{number:05}-of-00004.safetensors"


def output_files(folder: Path) -> dict[str, bytes]:
    """All of an output but its report, which holds clocks."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "layercut.json"}


def local_output(tmp_path: Path, steps: str) -> dict[str, bytes]:
    """What the same recipe makes of the folder that the repository was made from."""
    run_recipe(recipe(tmp_path, steps, str(tmp_path / "four")), out=tmp_path / "local", progress=False)
    return output_files(tmp_path / "local")


def sound(hub: Hub, name: str = "org/name") -> None:
    """Nothing in either cache differs from what the repository holds."""
    true = hub.repos[name].files()
    for snapshot in hub_cache().glob("models--*/snapshots/*"):
        for path in (path for path in snapshot.rglob("*") if path.is_file()):
            assert path.read_bytes() == true[path.relative_to(snapshot).as_posix()], path
    for folder in (cache_folder() / "hub").glob("models--*/snapshots/*"):
        mirror = Mirror.at(folder)
        assert mirror is not None
        for name, file in (mirror.listing() or {}).items():
            for begin, end in mirror.present(name, file):
                assert (folder / name).read_bytes()[begin:end] == true[name][begin:end], name


# how much is fetched


def test_planning_fetches_headers_only(four: Hub, tmp_path: Path) -> None:
    plan = plan_recipe(recipe(tmp_path, "[{prune: {at: ['4-11']}}]"), progress=False)
    weights = sum(len(data) for name, data in four.repos["org/name"].files().items() if name.endswith(".safetensors"))
    assert weights > 3_000_000 and four.sent() < 200_000
    assert four.fetched().keys() == {"config.json", "generation_config.json", "model.safetensors.index.json", *map(shard, range(1, 5))}
    commit = four.repos["org/name"].branches["main"]
    assert (plan.sources["org/name"].revision, plan.sources["org/name"].reference) == (commit, "org/name")
    expected = f"org/name@{commit[:12]}: 2 of 4 weight files (1.9 MB), 1 other file (40.0 kB)"
    assert outstanding(plan) == [expected]


def test_files_of_layers_that_go_are_not_fetched(four: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = "[{prune: {at: ['4-11']}}]"
    plan = plan_recipe(recipe(tmp_path, steps), progress=False)
    four.log.clear()
    capsys.readouterr()
    report = run_recipe(plan, progress=False)
    sizes = {name: len(data) for name, data in four.repos["org/name"].files().items()}
    assert four.fetched() == {name: sizes[name] for name in ("tokenizer.json", shard(1), shard(4))}
    commit = four.repos["org/name"].branches["main"]
    told = f"fetching org/name@{commit[:12]}: 2 of 4 weight files (1.9 MB), 1 other file (40.0 kB)\n"
    assert capsys.readouterr().err == told
    assert report.sources["org/name"].revision == commit
    assert output_files(tmp_path / "out") == local_output(tmp_path, steps)
    assert {path.name for path in (hub_cache() / "models--org--name" / "snapshots" / commit).iterdir()} >= {shard(1), shard(4)}
    sound(four)


def test_of_a_mostly_dropped_file_only_the_ranges(hub: Hub, tmp_path: Path) -> None:
    """One file of 40 layers, of which four are kept."""
    hub.add("org/name", sharded(tmp_path / "four", [list(range(40))]))
    steps = "[{keep: {at: [0, 17, 18, 39]}}]"
    plan = plan_recipe(recipe(tmp_path, steps), progress=False)
    weights = hub.sent()
    run_recipe(plan, progress=False)
    name = "model-00001-of-00001.safetensors"
    needed = (4 * 2 + 3) * SIZE
    whole = len(hub.repos["org/name"].files()[name])
    assert needed < 0.14 * whole
    assert needed <= hub.sent(name) <= 1.2 * needed
    assert weights < 200_000
    assert output_files(tmp_path / "out") == local_output(tmp_path, steps)
    path = Path(plan.sources["org/name"].folder) / name
    assert path.stat().st_size == whole and path.stat().st_blocks * 512 < 1.3 * needed, "the rest is holes"
    sound(hub)
    found = verify(tmp_path / "out", load=False)
    assert found.ok and found.checks[-1].detail == "11 tensors are byte for byte those of the sources"


def test_another_cut_fetches_what_it_lacks(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/name", sharded(tmp_path / "four", [list(range(40))]))
    run_recipe(recipe(tmp_path, "[{keep: {at: [0, 17, 39]}}]"), progress=False)
    hub.log.clear()
    run_recipe(recipe(tmp_path, "[{keep: {at: [0, 17, 18, 39]}}]"), out=tmp_path / "second", progress=False)
    assert hub.fetched() == {"model-00001-of-00001.safetensors": 2 * SIZE}
    hub.log.clear()
    run_recipe(recipe(tmp_path, "[{keep: {at: ['0-38']}}]"), out=tmp_path / "third", progress=False)
    assert hub.fetched()["model-00001-of-00001.safetensors"] == len((tmp_path / "four" / "model-00001-of-00001.safetensors").read_bytes())
    assert open_checkpoint(tmp_path / "third").parameters == (39 * 2 + 3) * SIZE
    sound(hub)


def test_server_without_ranges_sends_whole_files(hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    hub.add("org/name", sharded(tmp_path / "four", [list(range(40))]))
    steps = "[{keep: {at: [0, 17, 39]}}]"
    run_recipe(recipe(tmp_path, steps), progress=False)
    assert output_files(tmp_path / "out") == local_output(tmp_path, steps)
    sound(hub)


def test_a_plan_runs_on_another_machine(four: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folders are not there; the branch has moved on, and the plan still gets its commit."""
    steps = "[{prune: {at: ['4-11']}}]"
    text = plan_recipe(recipe(tmp_path, steps), progress=False).to_json()
    four.repos["org/name"].commit({"config.json": b"{}", shard(1): b"another"}, "newer")
    four.connect(monkeypatch, tmp_path / "other machine é")
    (tmp_path / "plan.json").write_text(text.replace(str(tmp_path / "client"), "/of/another/machine"))
    run_recipe(tmp_path / "plan.json", progress=False)
    assert output_files(tmp_path / "out") == local_output(tmp_path, steps)


def test_a_commit_that_is_gone(four: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_recipe(recipe(tmp_path, "[{prune: {at: ['4-11']}}]"), progress=False)
    commit = str(plan.sources["org/name"].revision)
    del four.repos["org/name"].commits[commit]
    four.connect(monkeypatch, tmp_path / "other")
    with pytest.raises(CheckpointError) as caught:
        fetch(plan, progress=False)
    assert str(caught.value) == f"org/name@{commit}: no revision '{commit}'; give a branch, a tag, a commit, or refs/pr/N"


def test_a_commit_that_is_another(four: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_recipe(recipe(tmp_path, "[{prune: {at: ['4-11']}}]"), progress=False)
    source = plan.sources["org/name"].model_copy(update={"digest": "0" * 64, "folder": "/nowhere"})
    with pytest.raises(CheckpointError, match="the commit on the Hub is not what the plan was made of; plan again"):
        fetch(plan.model_copy(update={"sources": {"org/name": source}}), progress=False)


@pytest.mark.parametrize("steps", ["[{prune: {at: ['4-11']}}]", "[{keep: {at: [0, 5]}}]"])
def test_by_xet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: str) -> None:
    """Whole files come from its storage, parts over HTTP."""
    from huggingface_hub import HfApi

    sharded(tmp_path / "four", FOUR)
    with loopback(tmp_path / "storage") as hub:
        hub.connect(monkeypatch, tmp_path / "client", CANARY)
        HfApi().create_repo("me/name")
        HfApi().upload_folder(repo_id="me/name", folder_path=tmp_path / "four")
        hub.log.clear()
        run_recipe(recipe(tmp_path, steps, "me/name"), progress=False)
        weights = {name: sent for name, sent in hub.fetched().items() if name.endswith(".safetensors")}
        assert output_files(tmp_path / "out") == local_output(tmp_path, steps)
        sound(hub, "me/name")
        ranges = 7 * SIZE if "keep" in steps else 0
        assert ranges < sum(weights.values()) <= 4 * (1 << 15) + ranges, "headers, two layers and both ends; or headers alone"


# holes


def test_holes_are_never_copied(four: Hub, tmp_path: Path) -> None:
    plan = plan_recipe(recipe(tmp_path, "[{prune: {at: ['4-11']}}]"), progress=False)
    expected = f"org/name: not all that the plan reads is here: {shard(1)}, {shard(4)}; run the same command again, to fetch it"
    with pytest.raises(CheckpointError) as caught:
        execute(plan, tmp_path / "out", progress=False)
    assert str(caught.value) == expected
    with pytest.raises(CheckpointError) as caught:
        check_here(plan)
    assert str(caught.value) == expected
    assert not (tmp_path / "out").exists()


def test_verify_says_what_is_not_here(four: Hub, tmp_path: Path) -> None:
    run_recipe(recipe(tmp_path, "[{prune: {at: ['4-11']}}]"), progress=False)
    mirror = Mirror("org/name", four.repos["org/name"].branches["main"])
    (mirror.snapshot / shard(4)).unlink()
    with pytest.raises(NotCheckedError) as caught:
        check_contents(open_checkpoint(tmp_path / "out"), read_report(tmp_path / "out"))
    assert str(caught.value) == "source 'org/name' ('org/name') is not in the local Hub cache"
    resolve("org/name")
    with pytest.raises(NotCheckedError) as caught:
        check_contents(open_checkpoint(tmp_path / "out"), read_report(tmp_path / "out"))
    assert str(caught.value) == f"of source 'org/name' ('org/name') not all is in the local cache: {shard(4)}"


def test_no_room(four: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    plan = plan_recipe(recipe(tmp_path, "[{prune: {at: ['4-11']}}]"), progress=False)
    four.log.clear()
    monkeypatch.setattr("layercut.fetching.shutil", SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=1000)))
    with pytest.raises(CheckpointError) as caught:
        fetch(plan, progress=False)
    said = f"org/name: the download takes 1.9 MB in {hub_cache()}, where 1.0 kB are free; set HF_HOME to a folder on a larger disk"
    assert str(caught.value) == said
    assert four.fetched() == {}


# what loads a model needs all of it


def test_a_recipe_that_measures_and_evaluates(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/tiny", tiny_model(tmp_path / "four", layers=4))
    path = recipe(tmp_path, "[{prune: {layers: 1, strategy: block}}]", "org/tiny")
    calibration = "calibration: {source: builtin, samples: 2, max_length: 16}\n"
    path.write_text(path.read_text() + calibration + "evaluate: {perplexity: {source: builtin, samples: 1, max_length: 16}}\n")
    report = run_recipe(path, progress=False)
    assert report.evaluation is not None and report.evaluation["perplexity"].keys() == {"before", "after"}
    assert len(report.layers) == 3
    assert {name for name in hub.repos["org/tiny"].files() if name != ".gitattributes"} == set(hub.fetched())


def test_whole(four: Hub) -> None:
    checkpoint = resolve("org/name")
    assert fetch_whole(checkpoint, progress=False) == checkpoint
    true = {name: data for name, data in four.repos["org/name"].files().items() if name != ".gitattributes"}
    assert {path.name: path.read_bytes() for path in checkpoint.folder.iterdir()} == true
    four.log.clear()
    fetch_whole(checkpoint, progress=False)
    assert four.log == []


# offline


def test_offline_with_a_complete_cache(four: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, "[{prune: {at: ['4-11']}}]")
    run_recipe(path, progress=False)
    four.offline(monkeypatch)
    four.log.clear()
    run_recipe(path, out=tmp_path / "again", progress=False)
    assert output_files(tmp_path / "again") == output_files(tmp_path / "out")
    assert four.log == []


def test_offline_says_exactly_what_is_missing(four: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, "[{prune: {at: ['4-11']}}]")
    plan = plan_recipe(path, progress=False)
    four.offline(monkeypatch)
    with pytest.raises(CheckpointError) as caught:
        run_recipe(plan, progress=False)
    missing = f"{shard(1)}, {shard(4)}, tokenizer.json"
    assert str(caught.value) == f"org/name: not in the local cache: {missing}; {FORBIDDEN}"


def test_the_flag_is_for_one_command(four: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe(tmp_path, "[{prune: {at: ['4-11']}}]"))
    for command in (["plan", path], ["run", path], ["inspect", "org/name"], ["eval", "org/name"], ["analyze", "org/name"]):
        assert main([*command, "--offline"]) == 1
        said = capsys.readouterr().err
        assert "org/name: no such folder, and not in the local Hub cache, and HF_HUB_OFFLINE forbids to ask the Hub; " in said
    assert four.log == []
    assert main(["run", path]) == 0
    four.log.clear()
    assert main(["run", path, "--offline", "--overwrite"]) == 0
    assert main(["verify", str(tmp_path / "out"), "--no-load", "--offline"]) == 0
    assert four.log == []


def test_how_layercut_made_it_is_shown(four: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe(recipe(tmp_path, "[{prune: {at: ['4-11']}}]"), progress=False)
    four.add("me/cut", tmp_path / "out")
    capsys.readouterr()
    assert main(["inspect", "me/cut"]) == 0
    assert "made by layercut" in capsys.readouterr().out
    assert "layercut.json" in four.fetched()


# faults


@pytest.mark.parametrize("seed", range(30))
def test_storms(four: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Errors, silence and cut connections at random: the output is that of fair weather, or one line says what is wrong."""
    steps = "[{prune: {at: ['4-11']}}]" if seed % 2 else "[{keep: {at: [0, 5, 15]}}]"
    four.storm(seed, rate=0.25)
    for attempt in range(5):
        try:
            run_recipe(recipe(tmp_path, steps), progress=False)
            break
        except CheckpointError as error:
            assert "\n" not in str(error) and SIGNATURE not in str(error)
            assert not (tmp_path / "out").exists()
            sound(four)
        assert attempt < 4, "the same command goes on until it is through"
    sound(four)
    four.calm()
    assert output_files(tmp_path / "out") == local_output(tmp_path, steps)


def test_resume(four: Hub, tmp_path: Path) -> None:
    plan = plan_recipe(recipe(tmp_path, "[{prune: {at: ['4-11']}}]"), progress=False)
    four.fail("status", f"HEAD .*{shard(4)}", status=500, times=-1)
    with pytest.raises(CheckpointError) as caught:
        run_recipe(plan, progress=False)
    assert str(caught.value) == f"org/name: the Hub answers 500, and not in the local cache: {shard(4)}; try again later"
    assert not (tmp_path / "out").exists()
    four.calm()
    four.log.clear()
    run_recipe(plan, progress=False)
    assert four.fetched().keys() == {shard(4)}


# secrets


def test_the_token_is_nowhere(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Not in what is printed, not in plans, reports, caches and outputs; neither are signed addresses. With and without faults."""
    hub.add("me/private", sharded(tmp_path / "four", FOUR, 2000), private=True)
    path = recipe(tmp_path, "[{prune: {at: ['4-11']}}]", "me/private")
    hub.connect(monkeypatch, tmp_path / "client", CANARY)
    run = ["run", str(path), "--overwrite"]
    hub.storm(3, rate=0.2)
    codes = [main(["plan", str(path), "-o", str(tmp_path / "plan.json")])]
    hub.calm()
    for match in ("/revision/", "HEAD ", "GET /me/private/[0-9a-f]{64} "):
        for kind, status in (("status", 401), ("status", 403), ("status", 500), ("cut", 0)):
            hub.connect(monkeypatch, tmp_path / f"{status} {match[:4].strip()}", CANARY)
            hub.fail(kind, match, status=status, times=-1)
            codes.append(main(run))
            hub.calm()
    assert set(codes) == {0, 1}, "cut heads have no body that could be cut"
    assert main(run) == 0
    assert main(["inspect", "me/private", "--json"]) == 0
    hub.connect(monkeypatch, tmp_path / "client", f"{CANARY}x")
    assert main(["inspect", "me/private"]) == 1
    monkeypatch.setattr("layercut.cli.resolve", lambda *_: 1 / 0)
    monkeypatch.setattr("sys.argv", ["layercut", "inspect", CANARY, f"{hub.cdn}/x?Signature={SIGNATURE}"])
    assert main(["inspect", "me/private"]) == 3, "a bug"
    said = "".join(capfd.readouterr())
    assert "the Hub does not accept the token (401)" in said and "ZeroDivisionError" in said
    for secret in (CANARY, SIGNATURE):
        assert secret not in said
        for found in (found for found in tmp_path.rglob("*") if found.is_file()):
            assert secret.encode() not in found.read_bytes(), found


# paths


def test_windows_path_in_a_mergekit_file(tmp_path: Path) -> None:
    path = tmp_path / "mergekit.yml"
    source = "{model: 'C:\\models\\llama', layer_range: [0, 4]}"
    path.write_text(f"slices:\n  - sources:\n      - {source}\nmerge_method: passthrough\n")
    with pytest.raises(CheckpointError) as caught:
        plan_recipe(path, progress=False)
    assert "C:\\models\\llama: no such folder" in str(caught.value) and "\n" not in str(caught.value)


def test_relative_folders_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for name in ("org", "a b+c@v1", "ünï"):
        sharded(tmp_path / name, [[0, 1, 2, 3]], 100)
        (tmp_path / "r.yaml").write_text(
            f"model: {json.dumps(name, ensure_ascii=False)}\nsteps: [{{prune: {{at: [1]}}}}]\n", encoding="utf-8"
        )
        run_recipe("r.yaml", out=f"{name} out", progress=False)
        assert open_checkpoint(tmp_path / f"{name} out").config["num_hidden_layers"] == 3
        assert verify(Path(f"{name} out"), load=False).ok
