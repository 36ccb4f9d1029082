"""Where a result is published, and how: the `upload` of a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from layercut.record import Record
from layercut.stated import is_repo

# A branch of git without what only git itself would write.
_BRANCH = re.compile(r"(?!refs/)(?![-/.])(?!.*(?:\.\.|//|@\{|\.lock(?:/|\Z)))[A-Za-z0-9._/+@-]{1,200}(?<![/.])", re.ASCII)


def _check_repo(name: str) -> str:
    if not is_repo(name):
        raise ValueError("expected a repository of the Hub such as user/name, or name for one of your own")
    return name


def _check_branch(name: str) -> str:
    if not _BRANCH.fullmatch(name):
        raise ValueError("expected the name of a branch, such as main or 24-layers")
    return name


def _check_line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("expected one line of text")
    return text.strip()


Repo = Annotated[str, AfterValidator(_check_repo)]
Branch = Annotated[str, AfterValidator(_check_branch)]
Line = Annotated[str, Field(max_length=200), AfterValidator(_check_line)]


class Upload(Record):
    """Where the result is published."""

    repo: Repo
    """Repository on the Hub, such as `user/name`; a name without a user is one of your own. It is made when it is not there."""
    private: bool | None = None
    """Whether the repository is private; when not set, a new one is what your account makes of it, and an existing one stays as it is."""
    branch: Branch | None = None
    """Branch to publish on, made when it is not there; `main` if not set."""
    create_pr: bool = False
    """Open a pull request instead of changing the repository."""
    message: Line | None = None
    """Message of the commit; made from the plan if not set."""
    license: Line | None = None
    """Licence that the card states; that of the source if not set. Needed when sources differ in theirs."""
    license_name: Line | None = None
    """Name of the licence, when `license` is `other`."""
    license_link: Line | None = None
    """Web address of the licence, or a file of the output, when `license` is `other`."""
    replace: bool = False
    """Remove what stands in the repository and is not of layercut, in the same commit; otherwise it is refused."""

    @model_validator(mode="after")
    def _consistent(self) -> Upload:
        if self.create_pr and self.branch not in (None, "main"):
            raise ValueError("a pull request goes to main: leave out branch, or create_pr")
        if self.license is None and (self.license_name or self.license_link):
            raise ValueError("license_name and license_link go with license: other")
        if self.license == "other" and self.license_name is None:
            raise ValueError("license: other needs a license_name")
        return self

    @property
    def target(self) -> str:
        """The branch that is published on."""
        return self.branch or "main"


def as_upload(value: Any) -> Any:
    """A repository alone stands for a mapping with nothing else in it."""
    if not isinstance(value, str | Mapping | Upload):
        raise ValueError("'upload' is a repository such as user/name, or a mapping with a repo")
    return {"repo": value} if isinstance(value, str) else value
