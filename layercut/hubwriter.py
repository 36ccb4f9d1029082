"""One repository on the Hub, as it is written to: rights, files, one commit. Every error of the client becomes one line without secrets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from layercut.caches import is_offline
from layercut.errors import UploadError
from layercut.hubfaults import may_pass, scrubbed, wait_for
from layercut.hubreader import quiet_client
from layercut.upload import Upload

T = TypeVar("T")

TRIES = 5
"""Times that a request is made at most."""
TOKENS = "https://huggingface.co/settings/tokens"
WRITERS = ("admin", "write", "contributor")
"""Roles in an organisation that make repositories."""
AGAIN = "run the same command again to go on"


class RemoteFile(NamedTuple):
    """A file of the repository."""

    size: int
    sha1: str
    """Of git: over a head and the content. Of an LFS file it says nothing about the content."""
    sha256: str | None
    """Of the content of an LFS file; None for a file of git."""


class Rights(NamedTuple):
    """What was found out before anything is done."""

    repo: str
    """With its namespace."""
    user: str
    exists: bool


class Sent(NamedTuple):
    """A commit."""

    commit: str
    url: str
    """Of the commit, or of the pull request."""
    revision: str
    """The branch, or `refs/pr/N`."""


class _PassingError(UploadError):
    """The Hub or the way to it is at fault, and may not be the next time."""


class HubWriter:
    """The repository that an upload names."""

    def __init__(self, upload: Upload, *, progress: bool = True) -> None:
        from huggingface_hub import HfApi, get_token

        self.upload, self.repo, self.branch = upload, upload.repo, upload.target
        self._progress, self._token = progress, get_token()
        self._seen = False
        """Whether the repository was there already."""
        self._api = HfApi(token=self._token)

    # Before anything is done

    def check(self) -> Rights:
        """Whether this token may publish there. Asks, changes nothing, and raises UploadError when it may not."""
        if is_offline():
            raise self._error("HF_HUB_OFFLINE forbids to ask the Hub", "unset it, or leave out --offline, to publish")
        if self._token is None:
            raise self._error("no token for the Hub", f"log in with: hf auth login, or set HF_TOKEN (one that may write: {TOKENS})")
        me = self.ask(self._api.whoami)
        user = str(me["name"])
        access = (me.get("auth") or {}).get("accessToken") or {}
        if access.get("role") == "read":
            raise self._error(f"the token of {user} may only read", f"use one that may write: {TOKENS}")
        if "/" not in self.repo:
            self.repo = f"{user}/{self.repo}"
        info = self._info()
        self._seen = info is not None
        if info is None:
            self._check_namespace(me, access)
        else:
            self._check_existing(info)
        return Rights(self.repo, user, info is not None)

    def _info(self) -> Any:
        """What the Hub says of the repository; None when it is not there (or not to be seen)."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        def look() -> Any:
            try:
                return self._api.repo_info(self.repo)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None

        return self.ask(look)

    def _check_namespace(self, me: Mapping[str, Any], access: Mapping[str, Any]) -> None:
        """A repository that is not there must be one that the token may make."""
        if self.upload.create_pr:
            raise self._error("no such repository, or a private one: there is nothing to open a pull request in", "leave out create_pr")
        owner = self.repo.partition("/")[0]
        roles = {str(org.get("name")): org.get("roleInOrg") for org in me.get("orgs") or ()}
        known = [str(me["name"]), *roles]
        if owner not in known:
            hint = f"your token writes to {', '.join(known)}; check the name, or log in as another user: hf auth login"
            raise self._error(f"no such repository, and {me['name']} is not of {owner}", hint)
        if roles.get(owner) not in (None, *WRITERS):
            raise self._error(f"{me['name']} may not make repositories in {owner}", "ask one of its admins for the right to write")
        scopes = (access.get("fineGrained") or {}).get("scoped")
        if access.get("role") == "fineGrained" and scopes is not None:
            rights = [right for scope in scopes if (scope.get("entity") or {}).get("name") == owner for right in scope["permissions"]]
            if "repo.write" not in rights:
                raise self._error(f"the token may not make repositories in {owner}", f"give it the right to write there: {TOKENS}")

    def _check_existing(self, info: Any) -> None:
        if info.id != self.repo:
            raise self._error(f"the repository is called {info.id} now", "use that name")
        if self.upload.private is not None and bool(info.private) != self.upload.private:
            is_now, wanted = ("private", "public") if info.private else ("public", "private")
            hint = f"change it in its settings on the Hub, or say private: {str(bool(info.private)).lower()}"
            raise self._error(f"the repository is {is_now}, and would have to be {wanted}", hint)
        if not self.upload.create_pr:  # anybody may propose a change
            self.ask(lambda: self._api.auth_check(self.repo, write=True))

    # What is there

    def head(self, revision: str | None = None) -> str | None:
        """The commit of a revision, of the branch if not given; None when it is not there."""
        from huggingface_hub.errors import RevisionNotFoundError

        def look() -> str | None:
            try:
                return str(self._api.repo_info(self.repo, revision=revision or self.branch).sha)
            except RevisionNotFoundError:
                return None

        return self.ask(look)

    def files(self, revision: str) -> dict[str, RemoteFile]:
        """Every file at a revision, by path."""

        def look() -> dict[str, RemoteFile]:
            listed: list[Any] = [e for e in self._api.list_repo_tree(self.repo, revision=revision, recursive=True) if hasattr(e, "blob_id")]
            return {e.path: RemoteFile(e.size, e.blob_id, None if e.lfs is None else e.lfs.sha256) for e in listed}

        return self.ask(look)

    def read(self, path: str, commit: str) -> bytes:
        """A small file at a commit."""
        return self.ask(lambda: Path(self._api.hf_hub_download(self.repo, path, revision=commit)).read_bytes())

    def proposals(self, author: str) -> list[tuple[str, str]]:
        """Open pull requests of a user, newest first: (`refs/pr/N`, its address)."""

        def look() -> list[tuple[str, str]]:
            listed = self._api.get_repo_discussions(self.repo, author=author, discussion_type="pull_request", discussion_status="open")
            return [(f"refs/pr/{found.num}", found.url) for found in listed]

        return self.ask(look)

    # What is done

    def create(self) -> None:
        """Make the repository, which is then empty; one that is there by now is no error."""
        self.ask(lambda: self._api.create_repo(self.repo, private=self.upload.private, exist_ok=True))
        self._seen = True

    def create_branch(self) -> None:
        """Make the branch, which begins as a copy of main."""
        self.ask(lambda: self._api.create_branch(self.repo, branch=self.branch, exist_ok=True))

    def store(self, additions: Sequence[Any]) -> None:
        """Send the contents of large files. No revision shows them before a commit names them; what the Hub has is not sent again."""
        self.ask(
            lambda: self._api.preupload_lfs_files(
                self.repo, additions, revision=self.branch, create_pr=self.upload.create_pr, free_memory=False
            )
        )
        ignored = [addition.path_in_repo for addition in additions if addition._should_ignore]
        if ignored:
            raise self._error(f"the .gitignore of the repository keeps {ignored[0]} out", "remove it there")

    def commit(self, operations: Sequence[Any], parent: str, message: str, description: str) -> Sent:
        """Everything in one commit on `parent`. Tried once: whether one that failed was made is for the caller to find out."""
        made = self.ask(
            lambda: self._api.create_commit(
                self.repo,
                operations,
                commit_message=message,
                commit_description=description,
                revision=self.branch,
                create_pr=self.upload.create_pr,
                parent_commit=parent,
            ),
            tries=1,
        )
        if self.upload.create_pr and made.pr_url:
            return Sent(made.oid, made.pr_url, str(made.pr_revision))
        return Sent(made.oid, self.url(made.oid), self.branch)

    def url(self, commit: str) -> str:
        """The address of a commit."""
        return f"{self._api.endpoint}/{self.repo}/commit/{commit}"

    # Errors

    def ask(self, call: Callable[[], T], tries: int = TRIES) -> T:
        """Call the client; what may pass is tried again, and whatever it raises becomes an UploadError."""
        for number in range(1, tries + 1):
            try:
                with quiet_client(self._progress):
                    return call()
            except UploadError:
                raise
            except Exception as error:
                told = self._explained(error)
                wait = wait_for(error, number) if isinstance(told, _PassingError) else None
                if wait is None or number == tries:
                    raise told from None  # what the client says may quote a request
                time.sleep(wait)
        raise AssertionError("unreachable")

    def passing(self, error: UploadError) -> bool:
        """Whether a request may have been carried out although it failed, or may work the next time."""
        return isinstance(error, _PassingError)

    def _error(self, message: str, hint: str | None, kind: type[UploadError] = UploadError) -> UploadError:
        return kind(scrubbed(message).replace(self._token or "\0", "…"), where=self.repo, hint=hint)

    def _explained(self, error: Exception) -> UploadError:
        """What the user should know and do. The order goes from the narrow class to the wide one."""
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            return self._error("a gated repository", f"ask for access at {self._api.endpoint}/{self.repo}")
        if isinstance(error, errors.RevisionNotFoundError):
            return self._error(f"no branch {self.branch}", None)
        if isinstance(error, errors.HfHubHTTPError):
            return self._refused(error)
        if isinstance(error, errors.HFValidationError):
            return self._error("not a name for a repository", "a name looks like user/name")
        if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0].startswith("httpx"):
            return self._error("the Hub cannot be reached", f"check the network; {AGAIN}", _PassingError)
        line = scrubbed(" ".join(str(error).split()))[:300] or type(error).__name__
        if isinstance(error, ValueError) and line.startswith("Invalid metadata in README.md"):
            return self._error(f"the Hub refuses the card: {line}", "correct the metadata at the top of README.md")
        passing = may_pass(error) or isinstance(error, RuntimeError)  # hf_xet knows no finer ones
        return self._error(f"the upload failed: {line}", AGAIN, _PassingError if passing else UploadError)

    def _refused(self, error: Any) -> UploadError:
        from huggingface_hub.errors import RepositoryNotFoundError

        status = error.response.status_code
        said = " ".join((getattr(error, "server_message", None) or "").split())[:200]
        said = f" ({said})" if said else ""
        if status == 401:
            return self._error("the Hub does not accept the token (401)", f"log in again with: hf auth login, or set HF_TOKEN: {TOKENS}")
        if status == 403:
            return self._error(f"the token may not do this (403){said}", f"use one that may write to {self.repo}: {TOKENS}")
        if status == 404 and not self._seen:
            owner = self.repo.partition("/")[0]
            return self._error(
                f"the Hub knows no user or organisation {owner} (404){said}", "check the name, or make the organisation first"
            )
        if status == 404 and isinstance(error, RepositoryNotFoundError):
            return self._error("was deleted since it was checked (404), or hidden", f"see {self._api.endpoint}/{self.repo}; {AGAIN}")
        if status == 404:
            return self._error("no such repository or branch (404), or a private one", "check the name, and the user: hf auth whoami")
        if status in (409, 412):
            return self._error(f"was changed by somebody else meanwhile ({status}){said}", "look at what was changed, and run again")
        if status == 413:
            return self._error(f"the Hub takes no files that large (413){said}", "use a smaller output.max_shard_size")
        if status == 429:
            return self._error("the Hub asks for fewer requests (429)", f"wait some minutes; {AGAIN}", _PassingError)
        if status == 408 or status >= 500:
            return self._error(f"the Hub answers {status}", f"it may be down; {AGAIN}", _PassingError)
        return self._error(f"the Hub refuses ({status}){said}", None)
