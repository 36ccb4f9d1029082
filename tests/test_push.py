from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tensors, failure, write_checkpoint
from hub import CANARY, SIGNATURE, Hub, User, hasty, loopback
from huggingface_hub import ModelCard, snapshot_download

import layercut
from layercut.api import push_model, run_recipe
from layercut.card import untouched
from layercut.cli import main
from layercut.errors import LayercutError, UploadError
from layercut.hubwriter import HubWriter
from layercut.push import Outcome
from layercut.report import REPORT, file_digest, read_report
from layercut.stated import CARD
from layercut.upload import Upload

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 6, "vocab_size": 8}
STATED = "---\nlicense: {}\nlanguage: en\n---\n# The source\n"
CUT = "steps: [{prune: {at: [2, 3]}}]\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with two models, the client of this process connected to it, and nobody waiting between two tries."""
    with loopback() as running:
        running.connect(monkeypatch, tmp_path / "client", CANARY)
        hasty(monkeypatch)
        monkeypatch.chdir(tmp_path)
        for name, licence in (("a", "apache-2.0"), ("b", "mit")):
            folder = write_checkpoint(tmp_path / "models" / name, byte_tensors(6, name), CONFIG, shards=2)
            (folder / CARD).write_text(STATED.format(licence), encoding="utf-8")
            running.add(f"org/{name}", folder)
        yield running


@pytest.fixture
def made(hub: Hub, tmp_path: Path) -> Callable[..., Path]:
    """Runs a recipe and gives its output."""

    def make(text: str = f"model: org/a\n{CUT}", out: str = "out") -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        run_recipe(path, out=tmp_path / out, progress=False)
        return tmp_path / out

    return make


def push(folder: Path, repo: str = "me/cut", **choices: object) -> Outcome:
    return push_model(folder, Upload.model_validate({"repo": repo, **choices}), progress=False)


def commits(hub: Hub, repo: str = "me/cut", revision: str = "main") -> list[str]:
    return [commit.title for commit in hub.repos[repo].history(revision)]


def refused(folder: Path, repo: str = "me/cut", **choices: object) -> str:
    """The one line that is said."""
    return failure(LayercutError, lambda: push(folder, repo, **choices))


def sent(hub: Hub) -> list[str]:
    """Contents that were stored."""
    return [request.path for request in hub.log if request.method == "PUT"]


def test_from_the_hub_and_back(hub: Hub, made: Callable[..., Path], tmp_path: Path) -> None:
    """A recipe whose model is a Hub id, published, pulled by id: the same files."""
    folder = made()
    outcome = push(folder)
    report = read_report(folder)
    assert outcome.created and report.published == outcome.published
    assert outcome.published.url == f"{hub.endpoint}/me/cut/commit/{outcome.published.commit}"
    pulled = Path(snapshot_download("me/cut"))
    again = read_report(pulled)
    assert again == report.model_copy(update={"published": None})
    for name, file in again.files.items():
        if file.sha256 is not None and name != CARD:
            assert file_digest(pulled / name) == file, name
        elif name != CARD:
            assert (pulled / name).read_bytes() == (folder / name).read_bytes(), name
    assert {path.name for path in pulled.iterdir()} == {*again.files, REPORT, CARD, ".gitattributes"}
    assert main(["verify", str(pulled), "--no-load"]) == 0


def test_one_commit_shows_everything(hub: Hub, made: Callable[..., Path]) -> None:
    """Before it no revision holds anything of the model."""
    push(made())
    first, *before = hub.repos["me/cut"].history("main")
    assert first.title == "4 layers, from 6 of org/a: [0, 2) + [4, 6)"
    assert first.message == f"layercut {read_report(Path('out')).version}, plan {read_report(Path('out')).plan}"
    assert all(set(commit.files) <= {".gitattributes"} for commit in before)


def test_the_card(hub: Hub, made: Callable[..., Path]) -> None:
    folder = made()
    push(folder)
    text = hub.repos["me/cut"].files("main")[CARD].decode()
    assert untouched(text)
    assert ModelCard(text).data.to_dict() == {
        "license": "apache-2.0", "language": ["en"], "library_name": "transformers", "pipeline_tag": "text-generation",
        "base_model": "org/a", "tags": ["layercut", "depth-pruning"],
    }  # fmt: skip
    assert (folder / CARD).read_text(encoding="utf-8") == STATED.format("apache-2.0"), "the folder keeps the card of the source"
    assert any(request.path == "/api/validate-yaml" for request in hub.log)


def test_a_name_that_is_no_repository(tmp_path: Path) -> None:
    with pytest.raises(UploadError) as caught:
        push_model(tmp_path, "a/b/c")
    assert str(caught.value) == "a/b/c: expected a repository of the Hub such as user/name, or name for one of your own"


def test_nothing_changed_makes_no_commit(hub: Hub, made: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = made()
    first = push(folder)
    hub.log.clear()
    second = push(folder)
    assert (second.sent, second.removed, second.published) == ((), (), first.published)
    assert len(commits(hub)) == 2 and sent(hub) == []
    assert main(["push", str(folder), "me/cut"]) == 0
    assert capsys.readouterr().out == f"nothing to publish: {first.published.url} is this output already\n"


def test_another_output_takes_its_place(hub: Hub, made: Callable[..., Path], tmp_path: Path) -> None:
    """Files of the earlier one that are not of the later go in the same commit; what others added and no loader reads stays."""
    push(made(f"model: org/a\n{CUT}output: {{path: x, max_shard_size: 300B}}\n"))
    hub.repos["me/cut"].commit({"docs/plot.png": b"x", "LICENSE": b"y"}, "by hand")
    before = hub.repos["me/cut"].files("main")
    shards = {name for name in before if name.startswith("model-")}
    assert len(shards) > 2
    outcome = push(made("model: org/a\nsteps: [{prune: {at: 1}}]\n", "other"))
    after = hub.repos["me/cut"].files("main")
    assert set(outcome.removed) == {*shards, "model.safetensors.index.json"} and not shards & set(after)
    assert {"docs/plot.png", "LICENSE", "model.safetensors", "config.json"} <= set(after)
    assert json.loads(after["config.json"])["num_hidden_layers"] == 5
    assert len(commits(hub)) == 4


def test_private_and_public(hub: Hub, made: Callable[..., Path]) -> None:
    folder = made()
    push(folder, private=True)
    assert hub.repos["me/cut"].private
    push(folder)
    assert hub.repos["me/cut"].private, "an existing one stays as it is"
    assert refused(folder, private=False) == (
        "me/cut: the repository is private, and would have to be public; change it in its settings on the Hub, or say private: true"
    )
    push(folder, "me/open", private=False)
    assert "is public, and would have to be private" in refused(folder, "me/open", private=True)


def test_a_branch(hub: Hub, made: Callable[..., Path]) -> None:
    folder = made()
    outcome = push(folder, branch="24-layers")
    assert outcome.published.revision == "24-layers"
    assert set(hub.repos["me/cut"].files("main")) == {".gitattributes"}
    assert "model.safetensors" in hub.repos["me/cut"].files("24-layers")
    assert push(folder, branch="24-layers").sent == ()
    assert "revision='24-layers'" in hub.repos["me/cut"].files("24-layers")[CARD].decode()


def test_a_pull_request(hub: Hub, made: Callable[..., Path]) -> None:
    """It changes nothing else, and a second call opens no second one."""
    hub.users[CANARY] = User("me")
    hub.add("org/target", {})
    folder = made()
    outcome = push(folder, "org/target", create_pr=True)
    assert outcome.published.revision == "refs/pr/1" and outcome.published.url == f"{hub.endpoint}/org/target/discussions/1"
    assert set(hub.repos["org/target"].files("main")) == {".gitattributes"}
    assert "model.safetensors" in hub.repos["org/target"].files("refs/pr/1")
    again = push(folder, "org/target", create_pr=True)
    assert (again.sent, again.published) == ((), outcome.published)
    assert list(hub.repos["org/target"].pulls) == [1]
    assert "there is nothing to open a pull request in" in refused(folder, "me/none", create_pr=True)


def test_a_name_alone_is_one_of_the_user(hub: Hub, made: Callable[..., Path]) -> None:
    assert push(made(), "cut").published.repo == "me/cut"


# What must not be lost


def test_a_repository_of_others_is_left_alone(hub: Hub, made: Callable[..., Path]) -> None:
    hub.add("me/cut", {"config.json": b"{}", "model.safetensors": b"x" * 99, "notes.md": b"#"})
    folder = made()
    assert refused(folder) == (
        "me/cut: the repository holds 'config.json' and 1 more, which layercut did not publish; "
        "choose another repository, or say replace: true (push --replace), which removes them in the same commit"
    )
    assert commits(hub)[0] == "files"
    outcome = push(folder, replace=True)
    assert outcome.removed == ("notes.md",)
    assert set(hub.repos["me/cut"].files("main")) == {*read_report(folder).files, REPORT, CARD, ".gitattributes"}


def test_a_card_that_somebody_wrote_is_not_replaced(hub: Hub, made: Callable[..., Path]) -> None:
    folder = made()
    push(folder)
    edited = hub.repos["me/cut"].files("main")[CARD] + b"\nMy words.\n"
    hub.repos["me/cut"].commit({CARD: edited}, "by hand")
    hint = "save it as README.md in the folder to keep it, or say replace: true (push --replace)"
    assert refused(folder) == f"me/cut: its README.md was written by somebody; {hint}"
    (folder / CARD).write_bytes(edited)
    assert push(folder).sent == ()
    (folder / CARD).write_bytes(edited + b"More.\n")
    assert push(folder).sent == (CARD,) and hub.repos["me/cut"].files("main")[CARD].endswith(b"More.\n")


def test_a_card_of_nothing_but_metadata_is_replaced(hub: Hub, made: Callable[..., Path]) -> None:
    """So the Hub makes it, when a licence is chosen for a new repository."""
    hub.add("me/cut", {CARD: b"---\nlicense: mit\n---\n"})
    push(made())
    assert untouched(hub.repos["me/cut"].files("main")[CARD].decode())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), "files: config.json has 2 bytes, the report says"),
        (lambda folder: (folder / "extra.bin").write_bytes(b"x"), "no other files: 'extra.bin' is not of this output"),
        (lambda folder: flip(folder / "model.safetensors"), "contents: 'lm_head.weight' is not 'lm_head.weight' of 'org/a'"),
        (lambda folder: (folder / REPORT).unlink(), "is missing; only folders that layercut wrote have one"),
    ],
)
def test_an_edited_folder_is_not_published(hub: Hub, made: Callable[..., Path], spoil: Callable[[Path], object], said: str) -> None:
    folder = made()
    spoil(folder)
    hub.log.clear()
    assert said in refused(folder)
    assert "me/cut" not in hub.repos and not any(request.method in ("POST", "PUT") for request in hub.log)


def flip(path: Path) -> None:
    """Change one bit of the last tensor."""
    data = bytearray(path.read_bytes())
    at = data.index(b"a:head;")
    data[at] ^= 1
    path.write_bytes(data)


def test_what_cannot_be_compared_is_not_published(hub: Hub, made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(f"model: {tmp_path}/models/a\n{CUT}")
    (tmp_path / "models" / "a").rename(tmp_path / "gone")
    assert "its weights cannot be compared with their sources" in refused(folder)


# Licences


def test_licences_that_differ_are_asked_about_before_anything_is_written(hub: Hub, tmp_path: Path) -> None:
    text = "slices:\n- {model: org/a, layer_range: [0, 4]}\n- {model: org/b, layer_range: [3, 6]}\noutput: out\nupload: "
    (tmp_path / "r.yaml").write_text(text + "me/cut\n", encoding="utf-8")
    with pytest.raises(LayercutError, match=r"differ in their licences: 'org/a' states apache-2\.0, 'org/b' states mit"):
        run_recipe(tmp_path / "r.yaml", progress=False)
    assert not (tmp_path / "out").exists() and "me/cut" not in hub.repos
    (tmp_path / "r.yaml").write_text(text + "{repo: me/cut, license: cc-by-4.0}\n", encoding="utf-8")
    run_recipe(tmp_path / "r.yaml", progress=False)
    data = ModelCard(hub.repos["me/cut"].files("main")[CARD].decode()).data.to_dict()
    assert (data["license"], data["base_model"], data["base_model_relation"]) == ("cc-by-4.0", ["org/a", "org/b"], "merge")


# Rights, before the long work


@pytest.mark.parametrize(
    ("user", "repo", "said"),
    [
        (User("me", writes=False), "me/cut", "me/cut: the token of me may only read; use one that may write"),
        (User("me"), "else/cut", "else/cut: no such repository, and me is not of else; your token writes to me;"),
        (User("me"), "org/a", "org/a: the token may not do this (403)"),
        (
            User("me", organizations=("org",)),
            "org/a",
            "org/a: the repository holds 'config.json' and 3 more, which layercut did not publish",
        ),
    ],
)
def test_rights_are_checked_first(hub: Hub, tmp_path: Path, user: User, repo: str, said: str) -> None:
    hub.users[CANARY] = user
    (tmp_path / "r.yaml").write_text(f"model: org/b\n{CUT}output: out\nupload: {repo}\n", encoding="utf-8")
    with pytest.raises(UploadError) as caught:
        run_recipe(tmp_path / "r.yaml", progress=False)
    assert str(caught.value).startswith(said)
    assert not (tmp_path / "out").exists()
    assert not any("org/b" in request.path for request in hub.log), "the model was not even looked at"


def test_no_token_and_a_wrong_one(hub: Hub, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = made()
    monkeypatch.setenv("HF_TOKEN", "hf_wrongWRONGwrong")
    assert refused(folder).startswith("me/cut: the Hub does not accept the token (401); log in again with: hf auth login")
    hub.connect(monkeypatch, tmp_path / "client")
    assert refused(folder).startswith("me/cut: no token for the Hub; log in with: hf auth login")
    hub.offline(monkeypatch)
    assert refused(folder).startswith("me/cut: HF_HUB_OFFLINE forbids to ask the Hub")


def test_a_renamed_repository(hub: Hub, made: Callable[..., Path]) -> None:
    folder = made()
    push(folder)
    hub.rename("me/cut", "me/new")
    assert refused(folder) == "me/cut: the repository is called me/new now; use that name"


# Runs


def test_a_run_publishes(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(f"model: org/a\n{CUT}output: out\nupload: {{repo: me/cut, message: Six fewer}}\n", encoding="utf-8")
    assert main(["run", "r.yaml", "-q"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["published", read_report(Path("out")).published.url]  # type: ignore[union-attr]
    assert commits(hub)[0] == "Six fewer"
    told = json.loads(hub.repos["me/cut"].files("main")[REPORT])
    assert told["published"] is None and "upload" not in told["recipe"]


def test_a_run_goes_on_with_the_upload_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model: org/a\n{CUT}output: out\nupload: me/cut\n", encoding="utf-8")
    fault = hub.fail("status", "POST .*/commit/main", status=500, times=-1)
    with pytest.raises(UploadError, match="me/cut: the Hub answers 500; it may be down; run the same command again to go on"):
        run_recipe(tmp_path / "r.yaml", progress=False)
    assert set(hub.repos["me/cut"].files("main")) == {".gitattributes"}
    written = (tmp_path / "out" / "model.safetensors").stat()
    assert len(sent(hub)) == 1
    fault.times = 0
    hub.log.clear()
    report = run_recipe(tmp_path / "r.yaml", progress=False)
    assert report.published is not None and "model.safetensors" in hub.repos["me/cut"].files("main")
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino == written.st_ino, "nothing was written again"
    assert sent(hub) == [], "and nothing stored again"
    assert run_recipe(tmp_path / "r.yaml", progress=False) == report, "and once more: nothing to do"
    assert main(["run", "r.yaml", "-q"]) == 0
    assert len(commits(hub)) == 2


# Faults


@pytest.mark.parametrize(
    ("match", "status", "said"),
    [
        ("POST .*/commit/", 412, "me/cut: was changed by somebody else meanwhile (412)"),
        ("POST .*/commit/", 409, "me/cut: was changed by somebody else meanwhile (409)"),
        ("POST .*/commit/", 403, "me/cut: the token may not do this (403)"),
        ("POST .*/repos/create", 403, "me/cut: the token may not do this (403)"),
        ("POST .*/preupload/", 413, "me/cut: the Hub takes no files that large (413)"),
        ("GET .*/whoami", 429, "me/cut: the Hub asks for fewer requests (429)"),
        ("GET .*/whoami", 503, "me/cut: the Hub answers 503"),
    ],
)
def test_every_error_is_one_line(hub: Hub, made: Callable[..., Path], match: str, status: int, said: str) -> None:
    folder = made()
    hub.fail("status", match, status=status, times=-1)
    assert refused(folder).startswith(said)
    assert "me/cut" not in hub.repos or set(hub.repos["me/cut"].files("main")) == {".gitattributes"}
    hub.calm()
    push(folder)
    assert len(commits(hub)) == 2


@pytest.mark.parametrize("step", ["head", "store", "commit", "files"])
@pytest.mark.parametrize("create_pr", [False, True])
def test_a_repository_that_disappears_meanwhile(
    hub: Hub, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, step: str, create_pr: bool
) -> None:
    """Whatever the next request is, the line is the same, and the next call makes the repository anew."""
    folder = made()
    hub.add("me/cut", {})
    method = getattr(HubWriter, step)
    gone: list[Any] = []

    def late(self: HubWriter, *arguments: Any) -> Any:
        if not gone:
            gone.append(hub.repos.pop("me/cut"))
        return method(self, *arguments)

    monkeypatch.setattr(HubWriter, step, late)
    choices = {"create_pr": True} if create_pr else {}
    assert refused(folder, **choices) == (
        f"me/cut: was deleted since it was checked (404), or hidden; see {hub.endpoint}/me/cut; run the same command again to go on"
    )
    assert gone and "me/cut" not in hub.repos
    assert push(folder).created and "model.safetensors" in hub.repos["me/cut"].files("main")


def test_a_namespace_that_does_not_exist(hub: Hub, made: Callable[..., Path]) -> None:
    """One that the token is not of is refused before anything is asked for; one that is gone by then, when the repository is made."""
    folder = made()
    assert refused(folder, "nobody/cut") == (
        "nobody/cut: no such repository, and me is not of nobody; "
        "your token writes to me; check the name, or log in as another user: hf auth login"
    )
    hub.users[CANARY] = User("me", organizations=("gone",))
    hub.fail("status", "POST .*/repos/create", status=404, times=-1)
    hub.log.clear()
    assert refused(folder, "gone/cut") == (
        "gone/cut: the Hub knows no user or organisation gone (404) (injected); check the name, or make the organisation first"
    )
    assert sent(hub) == [] and "gone/cut" not in hub.repos
    assert len([request for request in hub.log if request.path == "/api/repos/create"]) == 1, "it is not asked again"
    hub.calm()
    assert push(folder, "gone/cut").created


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: Hub, made: Callable[..., Path]) -> None:
    hub.fail("silent", "POST .*/commit/main", times=1)
    outcome = push(made())
    assert len(commits(hub)) == 2 and outcome.published.commit == hub.repos["me/cut"].resolve("main").id
    assert "model.safetensors" in outcome.sent


def test_somebody_who_commits_in_between(hub: Hub, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit names its parent, so what came in between is not overwritten unseen."""
    folder, commit = made(), HubWriter.commit

    def late(self: HubWriter, *arguments: object) -> object:
        hub.repos["me/cut"].commit({"vocab.txt": b"x"}, "in between")
        return commit(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(HubWriter, "commit", late)
    assert "was changed by somebody else meanwhile (412)" in refused(folder)
    assert commits(hub)[0] == "in between"
    assert "holds 'vocab.txt', which layercut did not publish" in refused(folder)


@pytest.mark.parametrize("seed", range(15))
def test_storms(hub: Hub, made: Callable[..., Path], seed: int) -> None:
    """Random faults: it arrives whole, or not at all and the next call goes on; never half of it."""
    folder = made()
    hub.storm(seed, rate=0.15 + 0.05 * (seed % 5))
    for _ in range(random.Random(seed).randint(5, 8)):
        try:
            push(folder)
            break
        except UploadError as error:
            assert "\n" not in str(error) and CANARY not in str(error) and SIGNATURE not in str(error)
            if "me/cut" in hub.repos:
                there = set(hub.repos["me/cut"].files("main")) - {".gitattributes"}
                assert there in (set(), {*read_report(folder).files, REPORT, CARD})
    hub.calm()
    push(folder)
    assert len(commits(hub)) == 2
    files = hub.repos["me/cut"].files("main")
    assert all(files[name] == (folder / name).read_bytes() for name in read_report(folder).files if name != CARD)


# Secrets


def test_the_token_is_nowhere(hub: Hub, made: Callable[..., Path], tmp_path: Path) -> None:
    """Not in what is printed, written or published, whether it works or fails; nor are the signed addresses of contents."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: org/a\n{CUT}output: out\nupload: me/cut\n", encoding="utf-8")
    environment = hub.env(tmp_path / "elsewhere", CANARY, PYTHONPATH=str(Path(layercut.__file__).parent.parent))
    said = ""
    for fault in (("status", "PUT ", 500), ("status", "POST .*/commit/", 403), None):
        hub.calm()
        if fault is not None:
            headers = {"X-Error-Message": f"no, {CANARY}"}
            hub.fail(fault[0], fault[1], status=fault[2], times=-1, headers=headers)
        code = "import sys, time; time.sleep = print; from layercut.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "run", str(recipe)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == (0 if fault is None else 1), done.stderr
        said += done.stdout + done.stderr
    texts = [path.read_bytes() for path in (tmp_path / "out").iterdir()] + list(hub.repos["me/cut"].files("main").values())
    for secret in (CANARY, SIGNATURE):
        assert secret not in said
        assert all(secret.encode() not in text for text in texts)
    assert hub.leaks() == []


def test_the_place_on_this_machine_is_not_published(hub: Hub, made: Callable[..., Path], tmp_path: Path) -> None:
    push(made(f"model: {tmp_path}/models/a\n{CUT}output: {tmp_path}/out\n"))
    files = hub.repos["me/cut"].files("main")
    assert all(str(tmp_path).encode() not in data for name, data in files.items() if name in (REPORT, CARD))
    assert "base_model" not in ModelCard(files[CARD].decode()).data.to_dict()


# The command


def test_the_command(hub: Hub, made: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = made()
    assert main(["push", str(folder), "me/cut", "--private", "--message", "Hello", "-q"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"published {hub.endpoint}/me/cut/commit/") and "  sent     " in out
    assert hub.repos["me/cut"].private and commits(hub)[0] == "Hello"
    assert main(["push", str(folder), "me/two", "--json", "-q"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["published"]["repo"] == "me/two" and told["created"] is True and CARD in told["sent"]
    assert main(["push", str(folder), "a b"]) == 2
    assert "repo: expected a repository of the Hub such as user/name" in capsys.readouterr().err
    assert main(["push", str(folder), "me/x", "--create-pr", "--branch", "y"]) == 2
    assert "a pull request goes to main" in capsys.readouterr().err


def test_by_xet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hubxet", reason="the loopback Hub without its content-addressed storage")
    with loopback(xet=tmp_path / "cas") as hub:
        folder = write_checkpoint(tmp_path / "models" / "a", byte_tensors(6, "a"), CONFIG)
        hub.connect(monkeypatch, tmp_path / "client", CANARY)
        (tmp_path / "r.yaml").write_text(f"model: {folder}\n{CUT}output: {tmp_path}/out\n", encoding="utf-8")
        run_recipe(tmp_path / "r.yaml", progress=False)
        assert push(tmp_path / "out").created
        assert push(tmp_path / "out").sent == ()
        assert hub.repos["me/cut"].files("main")["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
