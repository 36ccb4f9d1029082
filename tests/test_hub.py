"""The loopback Hub itself: what the real client reads, writes and raises before it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import CANARY, Hub, User, loopback
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 100, "sub dir/notes é+#.txt": b"notes", "refs.txt": b""}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that holds me/name, with this process's client before it, logged in as `me`."""
    with loopback() as running:
        running.add("me/name", FILES)
        running.users["hf_other"] = User("other")
        running.users["hf_reader"] = User("me", writes=False)
        running.connect(monkeypatch, tmp_path / "client", CANARY)
        yield running


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint)


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


# reading


def test_snapshot_is_what_the_repository_holds(hub: Hub) -> None:
    folder = Path(snapshot_download("me/name"))
    for name, data in hub.repos["me/name"].files().items():
        assert (folder / name).read_bytes() == data
    assert folder.name == hub.repos["me/name"].branches["main"]
    assert hub.fetched() == {name: len(data) for name, data in hub.repos["me/name"].files().items() if data}
    assert hub.leaks() == []
    assert {request.token for request in hub.log if not request.cdn and "me/name" in request.path} == {CANARY}


def test_the_same_for_a_process_of_its_own(hub: Hub, tmp_path: Path) -> None:
    code = "import sys; from huggingface_hub import snapshot_download; print(snapshot_download('me/name'))"
    env = hub.env(tmp_path / "other", CANARY)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "other" / "hf" / "hub" / "models--me--name")


def test_info_tree_paths_refs_and_commits(hub: Hub, api: HfApi) -> None:
    repo = hub.repos["me/name"]
    info = api.model_info("me/name", files_metadata=True)
    assert (info.sha, info.private, info.gated) == (repo.branches["main"], False, False)
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    assert sizes == {name: len(data) for name, data in repo.files().items()}
    tree = {entry.path: entry for entry in api.list_repo_tree("me/name", recursive=True)}
    large = tree["model.safetensors"]
    assert large.lfs is not None and (large.lfs.size, large.lfs.sha256) == (25600, repo.resolve("main").files["model.safetensors"].sha256)
    assert "sub dir" in tree and tree["config.json"].lfs is None
    assert [entry.path for entry in api.list_repo_tree("me/name", "sub dir")] == ["sub dir/notes é+#.txt"]
    assert [entry.path for entry in api.get_paths_info("me/name", ["config.json", "none"])] == ["config.json"]
    assert [branch.name for branch in api.list_repo_refs("me/name").branches] == ["main"]
    assert [commit.title for commit in api.list_repo_commits("me/name")] == ["files", "initial commit"]
    assert api.whoami()["name"] == "me"


def test_ranges(hub: Hub) -> None:
    files = HfFileSystem(endpoint=hub.endpoint)
    with files.open("me/name/model.safetensors", cache_type="none") as file:
        file.seek(1000)
        assert file.read(300) == FILES["model.safetensors"][1000:1300]
    assert hub.sent("model.safetensors") == 300
    assert hub.leaks() == []


def test_renamed(hub: Hub, api: HfApi) -> None:
    hub.rename("me/name", "me/new")
    assert api.model_info("me/name").id == "me/new"
    assert Path(hf_hub_download("me/name", "config.json")).read_bytes() == b"{}"


def test_what_is_refused(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    hub.add("me/secret", FILES, private=True)
    hub.add("other/gated", FILES, gated=True)
    assert api.model_info("me/secret").private
    for token in (False, "hf_other"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("me/secret", token=token)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/none")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/name", revision="none")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/name", "none.json")
    assert api.model_info("other/gated").gated == "manual"
    with pytest.raises(GatedRepoError) as refused:
        hf_hub_download("other/gated", "config.json")
    assert status(refused) == 403
    with pytest.raises(GatedRepoError) as refused:
        hf_hub_download("other/gated", "config.json", token=False)
    assert status(refused) == 401
    hub.repos["other/gated"].approved.add("me")
    assert Path(hf_hub_download("other/gated", "config.json")).read_bytes() == b"{}"
    with pytest.raises(HfHubHTTPError) as unknown:
        api.whoami(token="hf_unknown")
    assert status(unknown) == 401


# writing


def test_upload_folder(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / "up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / name).write_bytes(data)
    assert str(api.create_repo("me/up", private=True)) == f"{hub.endpoint}/me/up"
    done = api.upload_folder(repo_id="me/up", folder_path=tmp_path / "up", commit_message="all of it")
    repo = hub.repos["me/up"]
    assert repo.private and done.oid == repo.branches["main"]
    assert {name: data for name, data in repo.files().items() if name != ".gitattributes"} == FILES
    assert repo.resolve("main").title == "all of it"
    assert [repo.resolve("main").files[name].large for name in ("model.safetensors", "config.json")] == [True, False]
    assert hub.leaks() == []
    before = len(repo.commits), len([request for request in hub.log if request.method == "PUT"])
    assert api.upload_folder(repo_id="me/up", folder_path=tmp_path / "up").oid == done.oid, "nothing changed: no commit"
    assert before == (len(repo.commits), 1)
    assert [file.filename for file in api.list_lfs_files("me/up")] == ["model.safetensors"]


def test_commit_to_a_branch_and_to_a_pull_request(hub: Hub, api: HfApi) -> None:
    repo = hub.repos["me/name"]
    head = repo.branches["main"]
    api.create_branch("me/name", branch="feature/x")
    add = CommitOperationAdd("new.txt", b"new")
    made = api.create_commit("me/name", [add], commit_message="on a branch", revision="feature/x", parent_commit=head)
    assert repo.branches == {"main": head, "feature/x": made.oid}
    operations = [CommitOperationAdd("weights.bin", b"\0" * 100), CommitOperationDelete("config.json"), CommitOperationDelete("sub dir/")]
    pull = api.create_commit("me/name", operations, commit_message="please", create_pr=True)
    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    assert repo.branches["main"] == head
    assert set(repo.files("refs/pr/1")) == {".gitattributes", "model.safetensors", "refs.txt", "weights.bin"}
    assert Path(hf_hub_download("me/name", "weights.bin", revision="refs/pr/1")).read_bytes() == b"\0" * 100
    api.merge_pull_request("me/name", 1)
    assert "weights.bin" in repo.files() and "config.json" not in repo.files()
    other = api.create_pull_request("me/name", title="by hand")
    assert other.git_reference == "refs/pr/2" and other.status == "draft"
    assert [one.num for one in api.get_repo_discussions("me/name")] == [1, 2]
    api.change_discussion_status("me/name", 2, "closed")
    assert api.get_discussion_details("me/name", 2).status == "closed"
    refs = api.list_repo_refs("me/name", include_pull_requests=True)
    assert [one.ref for one in refs.pull_requests or ()] == ["refs/pr/1", "refs/pr/2"]


def test_tags_settings_move_and_delete(hub: Hub, api: HfApi) -> None:
    api.create_tag("me/name", tag="v1")
    assert api.model_info("me/name", revision="v1").sha == hub.repos["me/name"].branches["main"]
    api.delete_tag("me/name", tag="v1")
    api.delete_branch("me/name", branch="gone") if "gone" in hub.repos["me/name"].branches else None
    api.update_repo_settings("me/name", private=True)
    assert hub.repos["me/name"].private
    api.move_repo("me/name", "me/moved")
    assert api.repo_exists("me/moved")
    api.delete_repo("me/moved")
    assert hub.repos == {}


def test_who_may_write(hub: Hub, api: HfApi) -> None:
    add = CommitOperationAdd("new.txt", b"new")
    api.auth_check("me/name", write=True)
    for token in ("hf_other", "hf_reader"):
        with pytest.raises(HfHubHTTPError) as refused:
            api.auth_check("me/name", write=True, token=token)
        assert status(refused) == 403
        with pytest.raises(HfHubHTTPError) as refused:
            api.create_commit("me/name", [add], commit_message="no", token=token)
        assert status(refused) == 403
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_repo("someone/new")
    assert status(refused) == 403
    assert api.create_commit("me/name", [add], commit_message="may I", token="hf_other", create_pr=True).pr_num == 1


def test_conflicts(hub: Hub, api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError) as conflict:
        api.create_repo("me/name")
    assert status(conflict) == 409
    assert str(api.create_repo("me/name", exist_ok=True)) == f"{hub.endpoint}/me/name"
    api.create_branch("me/name", branch="b")
    with pytest.raises(HfHubHTTPError) as conflict:
        api.create_branch("me/name", branch="b")
    assert status(conflict) == 409
    old = hub.repos["me/name"].branches["main"]
    hub.repos["me/name"].commit({"x": b"x"}, "someone was quicker")
    with pytest.raises(HfHubHTTPError) as conflict:
        api.create_commit("me/name", [CommitOperationAdd("y", b"y")], commit_message="y", parent_commit=old)
    assert status(conflict) == 412


# faults


def test_faults(hub: Hub, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail("status", "/api/models/me/name", status=429, headers={"Retry-After": "7"})
    with pytest.raises(HfHubHTTPError) as limited:
        api.model_info("me/name")
    assert (status(limited), limited.value.response.headers["Retry-After"]) == (429, "7")
    assert api.model_info("me/name").id == "me/name", "once"
    hub.fail("cut", "GET .* model.safetensors", at=9000)
    assert Path(hf_hub_download("me/name", "model.safetensors")).read_bytes() == FILES["model.safetensors"]
    assert hub.sent("model.safetensors") == 9000 + 25600
    hub.fail("silent", "config.json", times=-1)
    with pytest.raises(Exception, match="disconnected"):
        hf_hub_download("me/name", "config.json")
    hub.calm()
    hub.fail("short", "GET .*config.json", at=1)
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download("me/name", "config.json")
    hub.fail("garble", "GET .*config.json", at=0)
    assert Path(hf_hub_download("me/name", "config.json")).read_bytes() == bytes([ord("{") ^ 255]) + b"}"


def test_storms_are_the_same_for_the_same_seed(hub: Hub) -> None:
    def kinds(seed: int) -> list[str | None]:
        hub.storm(seed, rate=0.5)
        found = [hub.fault("GET /x", "/x") for _ in range(40)]
        return [None if fault is None else f"{fault.kind} {fault.status} {fault.at}" for fault in found]

    first = kinds(1)
    assert first == kinds(1) != kinds(2)
    faults = "".join("." if one is None else "x" for one in first)
    assert "x" in faults and "xxx" not in faults


# Xet


@pytest.fixture
def xet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that stores large files by Xet, with this process's client before it."""
    with loopback(tmp_path / "storage") as running:
        running.connect(monkeypatch, tmp_path / "client", CANARY)
        yield running


def test_upload_and_download_by_xet(xet: Hub, tmp_path: Path) -> None:
    api = HfApi(endpoint=xet.endpoint)
    for name, data in FILES.items():
        (tmp_path / "up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / name).write_bytes(data)
    api.create_repo("me/up")
    pull = api.upload_folder(repo_id="me/up", folder_path=tmp_path / "up", create_pr=True)
    assert pull.pr_revision == "refs/pr/1"
    api.merge_pull_request("me/up", 1)
    repo = xet.repos["me/up"]
    assert {name: data for name, data in repo.files().items() if name != ".gitattributes"} == FILES
    blob = repo.resolve("main").files["model.safetensors"]
    assert blob.xet is not None and [entry.xet_hash for entry in api.get_paths_info("me/up", ["model.safetensors"])] == [blob.xet]
    assert Path(hf_hub_download("me/up", "model.safetensors")).read_bytes() == FILES["model.safetensors"]
    assert xet.sent("model.safetensors") == 0, "not from the CDN"
    with HfFileSystem(endpoint=xet.endpoint).open("me/up/model.safetensors", cache_type="none") as file:
        file.seek(1000)
        assert file.read(300) == FILES["model.safetensors"][1000:1300], "ranges come over HTTP"
    assert [request for request in xet.log if request.method == "PUT"] == [] == xet.leaks()


def test_what_was_not_uploaded_by_xet(xet: Hub) -> None:
    xet.add("me/name", {})
    add = CommitOperationAdd("w.bin", b"\0" * 100)
    add._is_uploaded, add._upload_mode, add._should_ignore = True, "lfs", False
    with pytest.raises(HfHubHTTPError, match="was not uploaded"):
        HfApi(endpoint=xet.endpoint).create_commit("me/name", [add], commit_message="nothing behind it")
