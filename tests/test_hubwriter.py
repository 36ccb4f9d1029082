from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import CANARY, Hub, hasty, loopback

from layercut.errors import UploadError
from layercut.hubwriter import TRIES, HubWriter, Rights
from layercut.upload import Upload


@pytest.fixture
def waited() -> list[float]:
    return []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waited: list[float]) -> Iterator[Hub]:
    with loopback() as running:
        running.connect(monkeypatch, tmp_path, CANARY)
        hasty(monkeypatch)
        monkeypatch.setattr("time.sleep", waited.append)
        yield running


def writer(repo: str = "me/x", **choices: Any) -> HubWriter:
    return HubWriter(Upload(repo=repo, **choices), progress=False)


def token(monkeypatch: pytest.MonkeyPatch, orgs: list[dict[str, Any]], **access: Any) -> None:
    """What the Hub says about the token."""
    me = {"name": "me", "orgs": orgs, "auth": {"accessToken": access}}
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: me)


def test_rights(hub: Hub) -> None:
    hub.add("me/there", {})
    assert writer("me/new").check() == Rights("me/new", "me", False)
    assert writer("there").check() == Rights("me/there", "me", True)
    assert {request.method for request in hub.log} == {"GET"}, "nothing is made or changed"


@pytest.mark.parametrize(
    ("role", "said"), [("admin", None), ("write", None), ("contributor", None), ("read", "me/x may not make"), (None, None)]
)
def test_roles_in_an_organisation(hub: Hub, monkeypatch: pytest.MonkeyPatch, role: str | None, said: str | None) -> None:
    token(monkeypatch, [{"name": "org", "roleInOrg": role}], role="write")
    if said is None:
        assert writer("org/x").check().repo == "org/x"
        return
    with pytest.raises(UploadError) as caught:
        writer("org/x").check()
    assert str(caught.value) == "org/x: me may not make repositories in org; ask one of its admins for the right to write"


@pytest.mark.parametrize(
    ("scoped", "may"),
    [
        ([{"entity": {"type": "user", "name": "me"}, "permissions": ["repo.content.read", "repo.write"]}], True),
        ([{"entity": {"type": "user", "name": "me"}, "permissions": ["repo.content.read"]}], False),
        ([{"entity": {"type": "org", "name": "org"}, "permissions": ["repo.write"]}], False),
        ([], False),
        (None, True),
    ],
)
def test_fine_grained_tokens(hub: Hub, monkeypatch: pytest.MonkeyPatch, scoped: list[dict[str, Any]] | None, may: bool) -> None:
    token(monkeypatch, [], role="fineGrained", fineGrained={"scoped": scoped})
    if may:
        assert not writer("me/x").check().exists
        return
    with pytest.raises(UploadError, match="me/x: the token may not make repositories in me; give it the right to write there"):
        writer("me/x").check()


def test_files_and_heads(hub: Hub) -> None:
    hub.add("me/x", {"a.txt": b"abc", "b.safetensors": b"x" * 50})
    there = writer()
    head = there.head()
    assert head is not None and there.head("main") == head and there.head("none") is None
    files = there.files(head)
    assert (files["a.txt"].size, files["a.txt"].sha1, files["a.txt"].sha256) == (3, "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f", None)
    assert files["b.safetensors"].size == 50 and files["b.safetensors"].sha256 is not None
    assert there.read("a.txt", head) == b"abc"


def test_what_passes_is_tried_again(hub: Hub, waited: list[float]) -> None:
    hub.fail("status", "GET .*/whoami", status=503, times=2)
    assert writer().check().user == "me"
    assert waited == [0.5, 1.0]


def test_the_hub_says_how_long_to_wait(hub: Hub, waited: list[float]) -> None:
    hub.fail("status", "GET .*/whoami", status=429, headers={"Retry-After": "7"})
    assert writer().check().user == "me"
    assert waited == [7.0]


def test_what_takes_too_long_is_said(hub: Hub, waited: list[float]) -> None:
    hub.fail("status", "GET .*/whoami", status=429, headers={"Retry-After": "3600"})
    with pytest.raises(UploadError, match=r"me/x: the Hub asks for fewer requests \(429\); wait some minutes; run the same command again"):
        writer().check()
    assert waited == []


def test_tries_are_bounded(hub: Hub, waited: list[float]) -> None:
    hub.fail("status", "GET .*/whoami", status=500, times=-1)
    with pytest.raises(UploadError, match="me/x: the Hub answers 500; it may be down; run the same command again to go on"):
        writer().check()
    assert len(waited) == TRIES - 1 and len([request for request in hub.log if "whoami" in request.path]) == TRIES


def test_what_does_not_pass_is_not_tried_again(hub: Hub, waited: list[float]) -> None:
    hub.fail("status", "GET .*/whoami", status=403, times=-1)
    with pytest.raises(UploadError, match=r"me/x: the token may not do this \(403\)"):
        writer().check()
    assert waited == []


def test_what_the_hub_says_is_shown_without_the_token(hub: Hub) -> None:
    hub.fail("status", "GET .*/whoami", status=403, headers={"X-Error-Message": f"ask Bob about {CANARY}"})
    with pytest.raises(UploadError) as caught:
        writer().check()
    assert "(403) (ask Bob about …" in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UploadError, match="me/x: the Hub cannot be reached; check the network; run the same command again to go on"):
        writer().check()


def test_metadata_that_the_hub_refuses(hub: Hub) -> None:
    def refuse() -> None:
        raise ValueError('Invalid metadata in README.md.\n- "license" must be one of [apache-2.0]')

    with pytest.raises(UploadError) as caught:
        writer().ask(refuse)
    assert str(caught.value) == (
        'me/x: the Hub refuses the card: Invalid metadata in README.md. - "license" must be one of [apache-2.0]; '
        "correct the metadata at the top of README.md"
    )


def test_a_gitignore_of_the_repository_keeps_nothing_out_unseen(hub: Hub) -> None:
    from huggingface_hub import CommitOperationAdd

    hub.add("me/x", {})
    addition = CommitOperationAdd(path_in_repo="model.safetensors", path_or_fileobj=b"x")
    addition._upload_mode, addition._should_ignore, addition._remote_oid = "regular", True, None
    with pytest.raises(UploadError, match=r"me/x: the \.gitignore of the repository keeps model\.safetensors out; remove it there"):
        writer().store([addition])
