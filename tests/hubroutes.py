"""What the loopback Hub answers: the endpoints that huggingface_hub asks to read, upload, branch, tag and open pull requests."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote

from hubstore import Blob, Commit, RefusedError, Repository

if TYPE_CHECKING:
    from hub import Hub, User

DATE = "2024-01-02T03:04:05.000Z"


class Reply(NamedTuple):
    """An answer."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = {}
    ranged: bool = False
    """Whether a part of the body may be asked for."""


class Ask(NamedTuple):
    """A request, with the repository that it is about."""

    hub: Hub
    method: str
    query: dict[str, str]
    body: bytes
    user: User | None
    repo: Repository | None

    @property
    def there(self) -> Repository:
        assert self.repo is not None
        return self.repo

    @property
    def data(self) -> Any:
        return json.loads(self.body or b"{}")

    def may_read(self) -> Repository:
        """The repository's files, if the user may see them. Raises RefusedError."""
        if self.there.gated and not self.owner and (self.user is None or self.user.name not in self.there.approved):
            raise RefusedError(401 if self.user is None else 403, "GatedRepo", f"Access to model {self.there.name} is restricted.")
        return self.there

    @property
    def owner(self) -> bool:
        return self.user is not None and self.user.owns(self.there.name)

    def may_write(self, pull_request: bool = False) -> Repository:
        """The repository, if the user may write to it, or only open pull requests. Raises RefusedError."""
        if self.user is None:
            raise RefusedError(401, "", "Invalid username or password.")
        if not (self.user.writes and (self.owner or (pull_request and not self.there.private))):
            raise RefusedError(403, "", "You don't have the required permissions: a write token is needed")
        return self.there


def as_json(data: object, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})


def answer(hub: Hub, method: str, path: str, query: dict[str, str], body: bytes, token: str | None, cdn: bool) -> Reply:
    """The answer to a request. Raises RefusedError."""
    if cdn:
        return stored(hub, method, path, body)
    if token is not None and token not in hub.users:
        raise RefusedError(401, "", "Invalid credentials in Authorization header")
    user = hub.users.get(token or "")
    for verb, pattern, action in ROUTES:
        found = re.fullmatch(pattern, path)
        if found is None or method not in verb.split():
            continue
        values = {name: None if value is None else unquote(value) for name, value in found.groupdict().items()}
        name = values.pop("repo", None)
        repo = None
        if name is not None:
            if name in hub.moved:
                return Reply(307, b"", {"Location": path.replace(name, hub.moved[name], 1) + _asked(query)})
            repo = _visible(hub, name, user)
        return action(Ask(hub, method, query, body, user, repo), **values)
    raise RefusedError(404, "", f"the loopback Hub has no {method} {path}")


def _asked(query: dict[str, str]) -> str:
    return "?" + "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items()) if query else ""


def _visible(hub: Hub, name: str, user: User | None) -> Repository:
    repo = hub.repos.get(name)
    if repo is None or (repo.private and not (user is not None and user.owns(name))):
        raise RefusedError(401 if user is None else 404, "RepoNotFound", "Repository not found")
    return repo


# Users and repositories


def whoami(ask: Ask) -> Reply:
    if ask.user is None:
        raise RefusedError(401, "", "Invalid username or password.")
    organizations = [{"name": name, "roleInOrg": "write"} for name in ask.user.organizations]
    role = "write" if ask.user.writes else "read"
    access = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return as_json({"type": "user", "name": ask.user.name, "orgs": organizations, "auth": access})


def create(ask: Ask) -> Reply:
    if ask.user is None:
        raise RefusedError(401, "", "Invalid username or password.")
    name = f"{ask.data.get('organization') or ask.user.name}/{ask.data['name']}"
    if not (ask.user.writes and ask.user.owns(name)):
        raise RefusedError(403, "", f"You don't have the rights to create a model under this namespace: {name}")
    where = {"url": f"{ask.hub.endpoint}/{name}", "name": name}
    if name in ask.hub.repos:
        return as_json({"error": "You already created this model repo", **where}, 409, {"X-Error-Message": "You already created this repo"})
    private = ask.data.get("private") is True or ask.data.get("visibility") == "private"
    ask.hub.repos[name] = Repository(name, private=private)
    return as_json({**where, "id": name, "private": private})


def delete(ask: Ask) -> Reply:
    name = f"{ask.data.get('organization') or (ask.user.name if ask.user else '')}/{ask.data['name']}"
    ask._replace(repo=_visible(ask.hub, name, ask.user)).may_write()
    del ask.hub.repos[name]
    return Reply(200)


def move(ask: Ask) -> Reply:
    ask._replace(repo=_visible(ask.hub, ask.data["fromRepo"], ask.user)).may_write()
    ask.hub.rename(ask.data["fromRepo"], ask.data["toRepo"])
    return Reply(200)


def settings(ask: Ask) -> Reply:
    repo = ask.may_write()
    if "visibility" in ask.data or "private" in ask.data:
        repo.private = ask.data.get("private") is True or ask.data.get("visibility") == "private"
    repo.gated = bool(ask.data.get("gated", repo.gated))
    return as_json({"private": repo.private})


def check(ask: Ask, write: str | None = None) -> Reply:
    ask.may_write() if write else ask.may_read()
    return Reply(200, b"OK")


def info(ask: Ask, revision: str | None = None) -> Reply:
    repo = ask.there
    commit = repo.resolve(revision or "main")
    siblings = [{"rfilename": name, **(_described(blob) if "blobs" in ask.query else {})} for name, blob in sorted(commit.files.items())]
    told = {"id": repo.name, "modelId": repo.name, "author": repo.name.partition("/")[0], "sha": commit.id, "private": repo.private}
    told |= {"gated": "manual" if repo.gated else False, "disabled": False, "tags": [], "siblings": siblings, "downloads": 0, "likes": 0}
    return as_json({**told, "lastModified": DATE, "createdAt": DATE})


def _described(blob: Blob) -> dict[str, Any]:
    told: dict[str, Any] = {"size": len(blob.data), "blobId": blob.git}
    if blob.large:
        told["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return told


def _entry(name: str, blob: Blob) -> dict[str, Any]:
    told: dict[str, Any] = {"type": "file", "path": name, "size": len(blob.data), "oid": blob.git}
    if blob.large:
        told["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
        if blob.xet is not None:
            told["xetHash"] = blob.xet
    return told


def tree(ask: Ask, revision: str, below: str | None = None) -> Reply:
    start = f"{below}/" if below else ""
    files = {name: blob for name, blob in ask.there.resolve(revision).files.items() if name.startswith(start)}
    if below and not files:
        raise RefusedError(404, "EntryNotFound", f"{below} does not exist on {revision}")
    found = [_entry(name, blob) for name, blob in sorted(files.items())]
    if ask.query.get("recursive", "").lower() != "true":
        found = [entry for entry in found if "/" not in entry["path"][len(start) :]]
    folders = sorted({name[: name.index("/", len(start))] for name in files if "/" in name[len(start) :]})
    return as_json([*({"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders), *found])


def paths(ask: Ask, revision: str) -> Reply:
    text = ask.body.decode()
    wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
    files = ask.there.resolve(revision).files
    return as_json([_entry(name, files[name]) for name in wanted if name in files])


def refs(ask: Ask) -> Reply:
    repo = ask.there

    def listed(found: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": commit} for name, commit in sorted(found.items())]

    told: dict[str, Any] = {"branches": listed(repo.branches, "refs/heads/"), "converts": [], "tags": listed(repo.tags, "refs/tags/")}
    if "include_prs" in ask.query:
        told["pullRequests"] = listed({str(number): commit for number, commit in repo.pulls.items()}, "refs/pr/")
    return as_json(told)


def commits(ask: Ask, revision: str) -> Reply:
    def told(commit: Commit) -> dict[str, Any]:
        return {"id": commit.id, "title": commit.title, "message": commit.message, "date": DATE, "authors": [{"user": "me"}]}

    return as_json([told(commit) for commit in ask.there.history(revision)])


# Files


def resolve(ask: Ask, revision: str, name: str) -> Reply:
    repo = ask.may_read()
    commit = repo.resolve(revision)
    blob = commit.files.get(name)
    if blob is None:
        raise RefusedError(404, "EntryNotFound", "Entry not found")
    headers = {"X-Repo-Commit": commit.id, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    if not blob.large:
        return Reply(200, blob.data, headers, ranged=True)
    from hub import cdn_url

    headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
    headers["Location"] = cdn_url(ask.hub, repo.name, name, blob.sha256)
    if blob.xet is not None:
        headers["X-Xet-Hash"] = blob.xet
        headers["Link"] = f'<{ask.hub.endpoint}/api/models/{repo.name}/xet-read-token/{commit.id}>; rel="xet-auth"'
    return Reply(302, b"", headers)


def stored(hub: Hub, method: str, path: str, body: bytes) -> Reply:
    """Large file storage: whoever has the address may read, or upload."""
    name, _, oid = path.strip("/").rpartition("/")
    repo = hub.repos.get(name)
    if repo is None:
        raise RefusedError(404)
    if method == "PUT":
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "", "the contents are not what was announced")
        repo.objects[oid] = Blob(body, large=True)
        return Reply(200)
    if oid not in repo.objects:
        raise RefusedError(404)
    return Reply(200, repo.objects[oid].data, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}, ranged=True)


# Uploads


def preupload(ask: Ask, revision: str) -> Reply:
    repo = ask.may_write(pull_request="create_pr" in ask.query or revision.startswith("refs/pr/"))
    present = repo.resolve(revision).files
    ignored = [line.strip() for line in ask.data.get("gitIgnore", "").splitlines() if line.strip() and not line.startswith("#")]
    told = []
    for file in ask.data["files"]:
        name = file["path"]
        large = repo.is_large(name, file["size"], base64.b64decode(file.get("sample", "")))
        one = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": any(fnmatch(name, line) for line in ignored)}
        told.append({**one, "oid": present[name].etag} if name in present else one)
    return as_json({"files": told, "commitOid": repo.resolve(revision).id})


def batch(ask: Ask) -> Reply:
    repo = ask.may_write(pull_request=True)
    told = []
    for item in ask.data["objects"]:
        oid, one = item["oid"], {"oid": item["oid"], "size": item["size"]}
        if oid not in repo.objects:
            upload = {"href": f"{ask.hub.cdn}/{repo.name}/{oid}?upload=1"}
            verify = {"href": f"{ask.hub.endpoint}/{repo.name}.git/info/lfs/objects/verify"}
            one["actions"] = {"upload": upload, "verify": verify}
        told.append(one)
    return as_json({"transfer": "basic", "objects": told})


def verify(ask: Ask) -> Reply:
    found = ask.may_write(pull_request=True).objects.get(ask.data["oid"])
    if found is None or len(found.data) != ask.data["size"]:
        raise RefusedError(404, "", "the object was not uploaded")
    return Reply(200)


def commit(ask: Ask, revision: str) -> Reply:
    asks_for_pull = ask.query.get("create_pr") == "1"
    repo = ask.may_write(pull_request=asks_for_pull or revision.startswith("refs/pr/"))
    lines = [json.loads(line) for line in ask.body.splitlines() if line]
    header = lines[0]["value"]
    changes: dict[str, bytes | Blob | None] = {}
    for line in lines[1:]:
        value, kind = line["value"], line["key"]
        if kind == "file":
            changes[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            changes[value["path"]] = _uploaded(ask.hub, repo, value["oid"])
        elif kind == "deletedFile":
            changes[value["path"]] = None
        elif kind == "deletedFolder":
            changes |= {name: None for name in repo.resolve(revision).files if name.startswith(value["path"])}
    told: dict[str, Any] = {"success": True}
    if asks_for_pull:
        number = repo.pull_request(header["summary"], revision)
        revision = f"refs/pr/{number}"
        told["pullRequestUrl"] = f"{ask.hub.endpoint}/{repo.name}/discussions/{number}"
    made = repo.commit(
        changes, header["summary"], revision=revision, parent=header.get("parentCommit"), message=header.get("description", "")
    )
    return as_json({**told, "commitOid": made, "commitUrl": f"{ask.hub.endpoint}/{repo.name}/commit/{made}"})


def _uploaded(hub: Hub, repo: Repository, oid: str) -> Blob:
    if oid not in repo.objects and hub.xet is not None:
        from hubxet import blob_of

        repo.objects[oid] = blob_of(hub.xet, oid)
    if oid not in repo.objects:
        raise RefusedError(400, "", f"LFS pointer to {oid}, which was not uploaded")
    return repo.objects[oid]


def large_files(ask: Ask) -> Reply:
    repo = ask.may_write()
    names = {blob.sha256: name for name, blob in repo.resolve("main").files.items() if blob.large}
    told = [
        {"fileOid": oid, "filename": names.get(oid, ""), "oid": oid, "pushedAt": DATE, "ref": "main", "size": len(blob.data)}
        for oid, blob in sorted(repo.objects.items())
    ]
    return as_json(told)


def drop_large(ask: Ask) -> Reply:
    for oid in ask.data["deletions"]["sha"]:
        ask.may_write().objects.pop(oid, None)
    return Reply(200)


# Branches, tags, pull requests


def branch(ask: Ask, name: str) -> Reply:
    repo = ask.may_write()
    if ask.method == "POST":
        repo.branch(name, ask.data.get("startingPoint", "main"))
    elif repo.branches.pop(name, None) is None:
        raise RefusedError(404, "RevisionNotFound", f"no branch {name}")
    return Reply(200)


def tag(ask: Ask, name: str) -> Reply:
    repo = ask.may_write()
    if ask.method == "POST":
        repo.tag(ask.data["tag"], name)
    elif repo.tags.pop(name, None) is None:
        raise RefusedError(404, "RevisionNotFound", f"no tag {name}")
    return Reply(200)


def open_discussion(ask: Ask) -> Reply:
    repo = ask.may_write(pull_request=True)
    return as_json({"num": repo.pull_request(ask.data["title"]), "pullRequest": True})


def _discussion(ask: Ask, number: int) -> dict[str, Any]:
    repo = ask.there
    told = {"num": number, "title": repo.titles[number], "author": {"name": "me"}, "createdAt": DATE, "isPullRequest": True}
    return {**told, "status": repo.status.get(number, "draft"), "repo": {"name": repo.name, "type": "model"}, "events": []}


def discussions(ask: Ask) -> Reply:
    told = [_discussion(ask, number) for number in ask.there.pulls]
    return as_json({"discussions": told, "count": len(told), "start": 0})


def discussion(ask: Ask, number: str) -> Reply:
    if int(number) not in ask.there.pulls:
        raise RefusedError(404, "", "no such discussion")
    return as_json({**_discussion(ask, int(number)), "changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": ""})


def merge(ask: Ask, number: str) -> Reply:
    repo = ask.may_write()
    repo.merge(int(number))
    repo.status[int(number)] = "merged"
    return Reply(200)


def status(ask: Ask, number: str) -> Reply:
    ask.may_write(pull_request=True).status[int(number)] = ask.data["status"]
    return as_json({"newStatus": {"id": "1", "type": "status-change", "createdAt": DATE, "data": {"status": ask.data["status"]}}})


def validate(ask: Ask) -> Reply:
    """As far as the Hub's own rules are known: metadata is a mapping, and the licence one that it lists."""
    import yaml
    from huggingface_hub.repocard import RepoCard

    content = ask.data["content"]
    found = re.match(r"^---\r?\n(.*?)\r?\n---", content, re.S)
    if found is None:
        return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    try:
        RepoCard(content, ignore_metadata_errors=False)
        data = yaml.safe_load(found[1])
        problem = None if isinstance(data, dict) else "metadata is no mapping"
    except (ValueError, yaml.YAMLError) as error:
        problem = str(error)
    return as_json({"errors": [] if problem is None else [{"message": problem}], "warnings": []}, 200 if problem is None else 400)


# Xet


def xet_token(ask: Ask, kind: str, revision: str) -> Reply:
    if ask.hub.xet is None:
        raise RefusedError(404, "", "no Xet here")
    if kind == "write":
        ask.may_write(pull_request="create_pr" in ask.query or revision.startswith("refs/pr/"))
    else:
        ask.may_read()
    url = f"local://{ask.hub.xet}"
    return as_json(
        {"casUrl": url, "accessToken": "xet", "exp": 4102444800},
        headers={"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": "4102444800"},
    )


REPO = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
MODEL = r"/api/models/(?P<repo>(?:[\w.-]+/[\w.-]+)|(?:[\w.-]+))"
ROUTES: tuple[tuple[str, str, Callable[..., Reply]], ...] = (
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("DELETE", "/api/repos/delete", delete),
    ("POST", "/api/repos/move", move),
    ("POST", "/api/validate-yaml", validate),
    ("GET", MODEL + "/revision/(?P<revision>.+)", info),
    ("GET", MODEL + "/tree/(?P<revision>refs/pr/[0-9]+|[^/]+)(?:/(?P<below>.+))?", tree),
    ("POST", MODEL + "/paths-info/(?P<revision>.+)", paths),
    ("GET", MODEL + "/refs", refs),
    ("GET", MODEL + "/commits/(?P<revision>.+)", commits),
    ("GET", MODEL + "/auth-check(?P<write>/write)?", check),
    ("PUT", MODEL + "/settings", settings),
    ("GET", MODEL + "/lfs-files", large_files),
    ("POST", MODEL + "/lfs-files/batch", drop_large),
    ("POST", MODEL + "/preupload/(?P<revision>.+)", preupload),
    ("POST", MODEL + "/commit/(?P<revision>.+)", commit),
    ("POST DELETE", MODEL + "/branch/(?P<name>.+)", branch),
    ("POST DELETE", MODEL + "/tag/(?P<name>.+)", tag),
    ("POST", MODEL + "/discussions", open_discussion),
    ("GET", MODEL + "/discussions", discussions),
    ("GET", MODEL + "/discussions/(?P<number>[0-9]+)", discussion),
    ("POST", MODEL + "/discussions/(?P<number>[0-9]+)/merge", merge),
    ("POST", MODEL + "/discussions/(?P<number>[0-9]+)/status", status),
    ("GET", MODEL + "/xet-(?P<kind>read|write)-token/(?P<revision>.+)", xet_token),
    ("GET", MODEL, info),
    ("POST", f"/{REPO}[.]git/info/lfs/objects/batch", batch),
    ("POST", f"/{REPO}[.]git/info/lfs/objects/verify", verify),
    ("GET HEAD", f"/{REPO}/resolve/(?P<revision>refs/pr/[0-9]+|[^/]+)/(?P<name>.+)", resolve),
)
"""Methods, path, and what answers."""
