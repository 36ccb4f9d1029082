"""Publishes an output: everything is looked at first, then contents are stored, then one commit makes all of it visible at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from layercut.card import make_card, untouched
from layercut.cardmetadata import card_metadata, choose_licence
from layercut.checkpoint import CONFIG, open_checkpoint
from layercut.contents import DiffersError, NotCheckedError, check_contents
from layercut.disclosure import disclosed, repo_of
from layercut.display import size
from layercut.errors import UploadError
from layercut.header import parse_json, quoted
from layercut.hubwriter import AGAIN, HubWriter, RemoteFile, Rights, Sent
from layercut.origins import carried, stated_by
from layercut.report import HEATMAP, MAX_REPORT, REPORT, Published, Report, ReportSource, read_report
from layercut.smallfile import read_small
from layercut.stated import CARD, MAX_CARD, split_card
from layercut.upload import Upload
from layercut.verify import verify

# Of files that others put into the repository, those that no loader reads.
KEPT = (".gitattributes", "license*", "licence*", "notice*", "*.md", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp")
ATTEMPTS = 3
"""Times that a commit is sent whose answer was lost."""
MESSAGE = 150
"""Characters of the first line of a message that was made."""


class Outcome(NamedTuple):
    """What came of it."""

    published: Published
    sent: tuple[str, ...]
    """Files that the commit adds or changes; empty when the repository held this output already."""
    bytes: int
    """Size of these files."""
    removed: tuple[str, ...]
    """Files that the commit removes."""
    created: bool
    """Whether the repository was made."""


class Item(NamedTuple):
    """A file to publish."""

    content: Path | bytes
    size: int


class _Difference(NamedTuple):
    """What a commit has to do."""

    changed: tuple[str, ...]
    removed: tuple[str, ...]


class Push:
    """One output on its way. The methods are called in their order."""

    def __init__(self, upload: Upload, *, progress: bool = True) -> None:
        self.upload, self.progress = upload, progress
        self.repository = HubWriter(upload, progress=progress)
        self.rights: Rights | None = None
        self._digests: dict[tuple[str, str], str] = {}

    def check_rights(self) -> Rights:
        """Whether the result may be published, before the long work. Raises UploadError."""
        self.rights = self.repository.check()
        if self.rights.exists and not self.upload.replace:
            head = self.repository.head()
            if head is not None:
                self._check_owned(self._remote(head))
        return self.rights

    def publish(self, folder: Path) -> Outcome:
        """Publish a folder that layercut wrote. Raises LayercutError; then the repository is as it was before, or made and empty."""
        rights = self.rights or self.check_rights()
        report = read_report(folder)
        items = self._items(folder, report)
        seen = _seen(items)
        check_folder(folder, report, progress=self.progress)
        head = self.repository.head() if rights.exists else None
        if head is None and rights.exists:  # the branch is not there: it begins as a copy of main
            head = self.repository.head("main")
        difference = self._difference(items, head)
        if head is not None and not any(difference) and (self.upload.create_pr or self.repository.head() is not None):
            return self._nothing(Sent(head, self.repository.url(head), self.upload.target))
        if self.upload.create_pr:
            proposed = self._proposed(items, rights.user)
            if proposed is not None:
                return self._nothing(proposed)
        if _seen(items) != seen:
            raise UploadError("was changed while it was checked", where=folder, hint=AGAIN)
        if not rights.exists:
            self.repository.create()
        if not self.upload.create_pr and self.repository.head() is None:
            self.repository.create_branch()
        sent = self._send(items, report, seen, folder)
        size_sent = sum(items[name].size for name in difference.changed)
        return Outcome(_published(self.repository.repo, sent), difference.changed, size_sent, difference.removed, not rights.exists)

    # What is to be there

    def _items(self, folder: Path, report: Report) -> dict[str, Item]:
        """Every file to publish, by its path in the repository."""
        found = {name: Item(folder / name, file.bytes) for name, file in report.files.items() if name != CARD}
        own = carried(folder, report)
        stated = stated_by(report.sources, {} if own is None else {report.donor: own})
        card = make_card(report, self._metadata(folder, report, stated), self.repository.repo, self.upload.target)
        text = _own_card(folder, own) or card.text
        written = {REPORT: disclosed(report).to_json().encode(), CARD: text.encode()}
        if card.heatmap is not None:
            written[HEATMAP] = card.heatmap
        return found | {name: Item(content, len(content)) for name, content in written.items()}

    def _metadata(self, folder: Path, report: Report, stated: Mapping[str, Any]) -> dict[str, Any]:
        licence = choose_licence(report.sources, report.files, stated, self.upload)
        config = parse_json(read_small(folder / CONFIG, MAX_REPORT).decode(), folder / CONFIG, infinity=True)
        named = config.get("architectures") if isinstance(config, dict) else None
        return card_metadata(report, stated, licence, named if isinstance(named, list) else ())

    # What is there

    def _remote(self, commit: str) -> _Remote:
        return _Remote(self.repository, commit)

    def _difference(self, items: Mapping[str, Item], head: str | None) -> _Difference:
        """What separates a commit from the items. Raises UploadError for what must not be lost."""
        if head is None:
            return _Difference(tuple(sorted(items)), ())
        remote = self._remote(head)
        if not self.upload.replace:
            self._check_owned(remote)
            self._check_card(remote, items[CARD])
        changed = [name for name, item in sorted(items.items()) if not self._same(name, item, remote.files.get(name))]
        others = remote.files.keys() - items.keys() - {".gitattributes"}
        stale = others if self.upload.replace else others & remote.ours
        return _Difference(tuple(changed), tuple(sorted(stale)))

    def _check_owned(self, remote: _Remote) -> None:
        """Everything in the repository is of an output of layercut, or nothing that a loader reads."""
        foreign = sorted(name for name in remote.files if name not in remote.ours and not _kept(name))
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            message = f"the repository holds {quoted(foreign[0])}{more}, which layercut did not publish"
            hint = "choose another repository, or say replace: true (push --replace), which removes them in the same commit"
            raise UploadError(message, where=self.repository.repo, hint=hint)

    def _check_card(self, remote: _Remote, mine: Item) -> None:
        """A card that somebody wrote is not replaced by one that was made."""
        found = remote.files.get(CARD)
        if found is None or self._same(CARD, mine, found) or not isinstance(mine.content, bytes) or not untouched(mine.content.decode()):
            return
        text = self.repository.read(CARD, remote.commit).decode("utf-8", "replace") if found.size <= 4 * MAX_CARD else "too long"
        if not untouched(text) and split_card(text).body.strip():
            hint = f"save it as {CARD} in the folder to keep it, or say replace: true (push --replace)"
            raise UploadError(f"its {CARD} was written by somebody", where=self.repository.repo, hint=hint)

    def _proposed(self, items: Mapping[str, Item], user: str) -> Sent | None:
        """An open pull request of the user that holds just this output."""
        for revision, url in self.repository.proposals(user):
            files = self.repository.files(revision)
            if all(self._same(name, item, files.get(name)) for name, item in items.items()):
                return Sent(self.repository.head(revision) or "", url, revision)
        return None

    # What is done

    def _send(self, items: Mapping[str, Item], report: Report, seen: Sequence[object], folder: Path) -> Sent:
        """Store the contents, then make the commit. One whose answer was lost is looked for before it is made again."""
        from huggingface_hub import CommitOperationDelete

        error: UploadError | None = None
        for _ in range(ATTEMPTS):
            head = self.repository.head("main" if self.upload.create_pr else None)
            if head is None:
                raise UploadError("the branch is gone", where=self.repository.repo, hint=AGAIN)
            difference = self._difference(items, head)
            if not any(difference):
                return Sent(head, self.repository.url(head), self.upload.target)
            additions = _additions(items, difference.changed)
            self.repository.store(additions)
            # Contents that the client has read are not read again; an older one has always read them.
            stored = [add for add in additions if getattr(add.upload_info, "is_hashed", True)]
            self._digests |= {(add.path_in_repo, "sha256"): add.upload_info.sha256.hex() for add in stored}
            if _seen(items) != seen:
                raise UploadError("was changed while it was sent; nothing was published", where=folder, hint=AGAIN)
            operations = [*additions, *(CommitOperationDelete(path_in_repo=name) for name in difference.removed)]
            try:
                sent = self.repository.commit(operations, head, *_message(report, self.upload))
            except UploadError as failed:
                error = failed
                proposed = self._proposed(items, self.rights.user) if self.upload.create_pr and self.rights is not None else None
                if proposed is not None:
                    return proposed
                if not self.repository.passing(failed):
                    raise
                continue
            self._look_again(items, sent)
            return sent
        assert error is not None
        raise error

    def _look_again(self, items: Mapping[str, Item], sent: Sent) -> None:
        """What the commit holds is what was sent."""
        files = self.repository.files(sent.commit)
        odd = next((name for name, item in sorted(items.items()) if not self._same(name, item, files.get(name))), None)
        if odd is not None:
            raise UploadError(f"the commit {sent.commit} holds another {odd} than was sent", where=self.repository.repo, hint=AGAIN)

    def _nothing(self, there: Sent) -> Outcome:
        return Outcome(_published(self.repository.repo, there), (), 0, (), False)

    def _same(self, name: str, item: Item, found: RemoteFile | None) -> bool:
        """Whether the repository holds just this file. A file of another size is not read, and none is read twice."""
        if found is None or found.size != item.size:
            return False
        kind = "sha1" if found.sha256 is None else "sha256"
        if (name, kind) not in self._digests:
            self._digests[name, kind] = _digest(kind, item)
        return self._digests[name, kind] == (found.sha256 or found.sha1)


class _Remote:
    """The repository at a commit: its files, and which of them layercut put there."""

    def __init__(self, repository: HubWriter, commit: str) -> None:
        self.commit, self.files = commit, repository.files(commit)
        self.ours = {CARD, HEATMAP, REPORT} | _listed(repository, self.files, commit)


def _listed(repository: HubWriter, files: Mapping[str, RemoteFile], commit: str) -> set[str]:
    """Files that the report in the repository lists; none when there is no report."""
    report = files.get(REPORT)
    if report is None or report.size > MAX_REPORT:
        return set()
    try:
        return set(json.loads(repository.read(REPORT, commit))["files"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()


def check_licence(sources: Mapping[str, ReportSource], upload: Upload) -> None:
    """Whether the licence of the result is known, before the long work. Raises LayercutError."""
    if upload.license is None:
        choose_licence(sources, {}, stated_by(sources, {}), upload)


def check_folder(folder: Path, report: Report, *, progress: bool = False) -> None:
    """The folder is what its report says, down to every byte of its sources. Raises UploadError, naming what differs."""
    hint = "only what layercut wrote is published as its own: make it again with layercut run"
    for check in verify(folder, load=False, contents=False).checks:
        if not check.ok:
            raise UploadError(f"{check.name}: {check.detail}", where=folder, hint=hint)
    try:
        check_contents(open_checkpoint(folder), report, progress=progress)
    except DiffersError as error:
        raise UploadError(f"contents: {error}", where=folder, hint=hint) from None
    except NotCheckedError as error:
        message = f"its weights cannot be compared with their sources: {error}"
        raise UploadError(message, where=folder, hint="put the source back, or make the output again") from None


def outcome_text(outcome: Outcome) -> str:
    """What came of it, in lines for a person."""
    where = outcome.published
    if not outcome.sent and not outcome.removed:
        return f"nothing to publish: {where.url} is this output already"
    lines = [f"published {where.url}", f"  sent     {len(outcome.sent)} file{'s' * (len(outcome.sent) != 1)}, {size(outcome.bytes)}"]
    if outcome.removed:
        shown = ", ".join(outcome.removed[:3]) + (f" and {len(outcome.removed) - 3} more" if len(outcome.removed) > 3 else "")
        lines.append(f"  removed  {shown}")
    return "\n".join(lines)


def _own_card(folder: Path, carried_card: str | None) -> str | None:
    """The card that the user wrote into the folder, to be published as it stands: not the donor's, and not one that was made."""
    path = folder / CARD
    if carried_card is not None or not path.is_file():
        return None
    try:
        text = read_small(path, 4 * MAX_CARD, UploadError).decode()
    except UnicodeDecodeError:
        raise UploadError("is no UTF-8 text", where=path) from None
    return None if untouched(text) else text


def _kept(name: str) -> bool:
    return name == ".gitattributes" or any(fnmatchcase(name.lower().rpartition("/")[2], pattern) for pattern in KEPT[1:])


def _digest(kind: str, item: Item) -> str:
    """sha256 of the content, or sha1 of it as git takes it."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {item.size}\0".encode(), usedforsecurity=False)
    if isinstance(item.content, bytes):
        digest.update(item.content)
        return digest.hexdigest()
    with item.content.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _published(repo: str, sent: Sent) -> Published:
    return Published(repo=repo, revision=sent.revision, commit=sent.commit, url=sent.url)


def _seen(items: Mapping[str, Item]) -> list[tuple[str, int, int, int]]:
    """What tells whether a file was written to since."""
    found = []
    for name, item in items.items():
        if isinstance(item.content, Path):
            try:
                state = item.content.stat()
            except OSError as error:
                raise UploadError(f"cannot be read: {error.strerror}", where=item.content) from None
            found.append((name, state.st_size, state.st_mtime_ns, state.st_ino))
    return found


def _additions(items: Mapping[str, Item], names: Sequence[str]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd

    found = []
    for name in names:
        content = items[name].content
        path = content if isinstance(content, bytes) else os.path.realpath(content)
        found.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path))
    return found


def _message(report: Report, upload: Upload) -> tuple[str, str]:
    """First line and description of the commit, made from the plan."""
    told = disclosed(report)
    donor = told.sources[told.donor]
    name = repo_of(donor) or donor.reference
    kept = " + ".join(ranges for alias in told.kept for ranges in told.kept[alias])
    made = f"{len(told.layers)} layers, from {donor.depth} of {name}: {kept}"
    made = made if len(made) <= MESSAGE else f"{made[: MESSAGE - 1]}…"
    return upload.message or " ".join(made.split()), f"layercut {told.version}, plan {told.plan}"
