"""One repository on the Hub, as it is read: its commit, its files, and bytes of them. What may pass is tried again, errors are one line."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from layercut.caches import is_offline
from layercut.hubfaults import DamagedError, NoRangesError, UnreachableError, explained, tries_for, wait_for
from layercut.mirror import COMMIT, Listed, Mirror, Span, checked_listing

T = TypeVar("T")

BLOCK = 1 << 22
PATIENCE = 30.0
"""Seconds of silence after which a connection is given up."""


class HubReader:
    """A repository by its name. `reference` is how the user named it, for errors."""

    def __init__(self, reference: str, repo: str, *, progress: bool = True) -> None:
        self.reference, self.repo, self.progress = reference, repo, progress

    def is_name(self) -> bool:
        """Whether a repository could have this name."""
        try:
            _client().validate_repo_id(self.repo)
        except ValueError:
            return False
        return True

    def find(self, revision: str) -> tuple[str, str]:
        """The commit of a branch, a tag, a pull request (`refs/pr/N`) or a shortened commit, and the name of the repository by now."""
        from huggingface_hub import HfApi

        info = self.ask(lambda: HfApi().model_info(self.repo, revision=revision, timeout=PATIENCE), revision)
        if not COMMIT.fullmatch(str(info.sha)):
            raise UnreachableError(f"the Hub gives no commit for {revision!r}", where=self.reference, hint="check HF_ENDPOINT")
        return str(info.sha), str(info.id)

    def listing(self, commit: str) -> dict[str, Listed]:
        """Size and digest of every file."""
        from huggingface_hub import HfApi

        def look() -> dict[str, Listed]:
            entries: list[Any] = [e for e in HfApi().list_repo_tree(self.repo, recursive=True, revision=commit) if hasattr(e, "blob_id")]
            return checked_listing((e.path, e.size, e.blob_id if e.lfs is None else e.lfs.sha256) for e in entries)

        return self.ask(look, commit)

    def download(self, mirror: Mirror, files: Mapping[str, Listed]) -> None:
        """Put whole files into the Hub cache. A file that is not what the Hub lists is removed and fetched again."""
        from huggingface_hub import snapshot_download

        left = {name: file for name, file in files.items() if not mirror.is_whole(name, file.size)}

        def fetch() -> None:
            for name, file in left.items():
                if os.path.lexists(mirror.snapshot / name) and not mirror.is_whole(name, file.size):
                    _discard(mirror.snapshot / name)  # the client would take it for the file
            wanted = [glob.escape(name) for name in left]
            try:
                snapshot_download(self.repo, revision=mirror.commit, allow_patterns=wanted, etag_timeout=PATIENCE)
            finally:  # some files may be there, though others failed
                arrived = [name for name in left if os.path.exists(mirror.snapshot / name)]  # noqa: PTH110 - never raises
                for name in arrived:
                    _check(mirror.snapshot / name, name, left[name])
                    del left[name]
            if left:
                raise DamagedError(f"{min(left)} was not downloaded")

        if left:
            self.ask(fetch, mirror.commit, lambda: -len(left))

    def read(self, mirror: Mirror, name: str, file: Listed, span: Span, advance: Callable[[int], object] | None = None) -> None:
        """Put some bytes of a file into the mirror. Raises NoRangesError where only the whole file can be had."""
        position = span.begin
        with mirror.writing(name, file) as opened:

            def fetch() -> None:
                nonlocal position
                opened.seek(position)
                with contextlib.closing(self._pieces(mirror.commit, name, file, Span(position, span.end))) as pieces:
                    for piece in pieces:
                        opened.write(piece)
                        position += len(piece)
                        if advance is not None:
                            advance(len(piece))
                if position < span.end:
                    raise DamagedError(f"{name} ends {span.end - position} bytes early")

            try:
                self.ask(fetch, mirror.commit, lambda: position)
            finally:
                if position > span.begin:
                    mirror.keep(name, file, opened, Span(span.begin, position))

    def ask(self, call: Callable[[], T], revision: str | None = None, reached: Callable[[], int] = lambda: 0) -> T:
        """Call the client. What may pass is tried again, as often as it gets on; the rest is a CheckpointError."""
        if is_offline():
            raise UnreachableError("HF_HUB_OFFLINE forbids to ask the Hub", where=self.reference, hint="unset it, or leave out --offline")
        tries, before = 0, reached()
        while True:
            try:
                with quiet_client(self.progress):
                    return call()
            except NoRangesError:
                raise
            except Exception as error:
                tries = 1 if reached() > before else tries + 1
                before = reached()
                pause = wait_for(error, tries)
                if tries >= tries_for(error) or pause is None:
                    raise explained(error, self.reference, self.repo, revision) from None  # what the client says may hold secrets
            time.sleep(pause)

    def _pieces(self, commit: str, name: str, file: Listed, span: Span) -> Generator[bytes, None, None]:
        """The bytes of a span as they arrive, no more than that."""
        from huggingface_hub import hf_hub_url

        client = _client()
        headers = {**client.build_hf_headers(), "Range": f"bytes={span.begin}-{span.end - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(self.repo, name, revision=commit)
        with client.get_session().stream("GET", url, headers=headers, timeout=PATIENCE, follow_redirects=True) as response:
            if response.status_code >= 400:
                response.read()
            client.hf_raise_for_status(response)
            _check_answer(response, name, file, span)
            left = span.end - span.begin
            for piece in response.iter_bytes():
                yield piece[:left]
                left -= len(piece[:left])
                if not left:
                    return


def _check_answer(response: Any, name: str, file: Listed, span: Span) -> None:
    """It is the file that was listed, and the span that was asked for."""
    for step in (*response.history, response):
        etag = step.headers.get("X-Linked-Etag")
        if file.large and etag is not None and etag.removeprefix("W/").strip('"') != file.digest:
            raise DamagedError(f"{name} is another file than the Hub lists")
    if response.status_code == 206:
        if response.headers.get("Content-Range", "").partition("/")[0] != f"bytes {span.begin}-{span.end - 1}":
            raise DamagedError(f"{name}: the answer is of other bytes than those that were asked for")
        if response.headers["Content-Range"].partition("/")[2] not in ("*", str(file.size)):
            raise DamagedError(f"{name} has another size than the Hub lists")
    elif span.begin:
        raise NoRangesError


def _check(path: Path, name: str, file: Listed) -> None:
    """A file that was downloaded has the size and the digest that the Hub lists. If not, it is removed."""
    size = path.stat().st_size
    digest = hashlib.sha256() if file.large else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    if size != file.size or digest.hexdigest() != file.digest:
        _discard(path)
        raise DamagedError(f"{name} arrived damaged")


def _discard(path: Path) -> None:
    """Remove a file of the Hub cache: the link and what it leads to."""
    if os.path.lexists(path):
        target = Path(os.path.realpath(path))
        path.unlink()
        target.unlink(missing_ok=True)


@contextlib.contextmanager
def quiet_client(progress: bool) -> Iterator[None]:
    """No chatter of the client, which may hold signed addresses; its progress bars as the user wants them; all as before afterwards."""
    client = _client()
    verbosity, hide = client.logging.get_verbosity(), not (progress and sys.stderr.isatty()) and not client.are_progress_bars_disabled()
    client.logging.set_verbosity_error()
    if hide:
        client.disable_progress_bars()
    try:
        yield
    finally:
        client.logging.set_verbosity(verbosity)
        if hide:
            client.enable_progress_bars()


def _client() -> Any:
    """Tools of huggingface_hub that its documentation names and its types do not export."""
    import huggingface_hub.utils

    return huggingface_hub.utils
