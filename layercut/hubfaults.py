"""What went wrong with a request to the Hub: whether it may pass, how long to wait, and the one line that the user should read."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import Any

from layercut.errors import CheckpointError

LONGEST_WAIT = 60.0
"""Seconds that a request is put off at most; when the Hub asks for more, the user is told."""
TRIES, UNCONNECTED = 8, 3
"""Times that a request is made at most: of a server that answers, and where there is no connection at all."""
PASSING = (408, 429, 500, 502, 503, 504)
NETWORK = ("TimeoutException", "NetworkError", "ProtocolError", "ProxyError")
"""Exceptions of httpx (which huggingface_hub brings under this or another name) that stand for a broken connection."""
SECRETS = (
    (re.compile(r"(https?://)[^\s/@'\"]+@"), r"\1"),
    (re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\")]*"), r"\1"),
    (re.compile(r"\bhf_\w{6,}|(?<=Bearer )\S+"), "…"),
)
"""What must not be shown: passwords of proxies, signatures of addresses, tokens."""


class UnreachableError(CheckpointError):
    """The Hub does not answer, or may not be asked."""


class DamagedError(OSError):
    """What arrived is not what the Hub announced."""


class NoRangesError(Exception):
    """The server sends whole files only."""


def scrubbed(text: str) -> str:
    """The text without what must not be shown."""
    for pattern, other in SECRETS:
        text = pattern.sub(other, text)
    return text


def tries_for(error: BaseException) -> int:
    """Times that a request is made at most without getting on: once, unless the same may work the next time."""
    status = _status(error)
    if status is not None:
        return TRIES if status in PASSING else 1
    if any(_kinds(one) & {"ConnectError"} or isinstance(one, ConnectionRefusedError) for one in _chain(error)):
        return UNCONNECTED
    return TRIES if any(_is_network(one) or _is_damage(one) for one in _chain(error)) else 1


def may_pass(error: BaseException) -> bool:
    """Whether the same request may work the next time."""
    return tries_for(error) > 1


def wait_for(error: BaseException, tries: int) -> float | None:
    """Seconds until the next try: twice as long each time, or what the Hub asks for; None when that is too long."""
    asked = _asked(error)
    if asked is None:
        return min(8.0, 0.5 * 2.0 ** (tries - 1))
    return asked if asked <= LONGEST_WAIT else None


def explained(error: BaseException, reference: str, repo: str, revision: str | None) -> CheckpointError:
    """What the user should know and do. The order goes from the narrow class to the wide one."""
    from huggingface_hub import constants, errors

    if isinstance(error, CheckpointError):
        return error if error.where is not None else type(error)(error.message, where=reference, hint=error.hint)
    if isinstance(error, errors.HFValidationError):
        return CheckpointError("no such folder, and not a Hub id", where=reference, hint="a Hub id looks like org/name")
    found = next((one for one in _chain(error) if isinstance(one, errors.HfHubHTTPError)), None)
    if isinstance(found, errors.GatedRepoError):
        return _gated(reference, f"{constants.ENDPOINT}/{repo}")
    if isinstance(found, errors.RevisionNotFoundError):
        return CheckpointError(f"no revision {revision!r}", where=reference, hint="give a branch, a tag, a commit, or refs/pr/N")
    if isinstance(found, errors.EntryNotFoundError):
        return CheckpointError("the Hub lists a file that it does not have", where=reference, hint="tell the owner of the repository")
    if isinstance(found, errors.RepositoryNotFoundError):
        return _not_found(reference)
    if found is not None:
        return _refused(found, reference)
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some, or set HF_HOME and LAYERCUT_CACHE to folders on a larger disk"
            return CheckpointError("no room on the disk for the download", where=reference, hint=hint)
        if _is_damage(one):
            hint = "what arrived is kept: run the same command again"
            return CheckpointError(f"the download fails again and again: {_line(one)}", where=reference, hint=hint)
    if any(_is_network(one) for one in _chain(error)) or isinstance(error, errors.LocalEntryNotFoundError):
        return UnreachableError("the Hub cannot be reached", where=reference, hint="check the network, or give a folder")
    return CheckpointError(f"the download failed: {_line(error)}", where=reference)


def _gated(reference: str, page: str) -> CheckpointError:
    if _token() is None:
        return CheckpointError("a gated model, and no token", where=reference, hint=f"ask for access at {page}, then: hf auth login")
    message = "a gated model, and your token was not granted access"
    return CheckpointError(message, where=reference, hint=f"ask for access at {page}, or log in as another user: hf auth login")


def _not_found(reference: str) -> CheckpointError:
    if _token() is None:
        message = "no such folder, and no such model on the Hub, or a private one"
        return CheckpointError(message, where=reference, hint="check the name; for a private model: hf auth login")
    message = "no such folder, and no such model on the Hub, or a private one that your token does not see"
    return CheckpointError(message, where=reference, hint="check the name, and the user: hf auth whoami")


def _refused(error: Any, reference: str) -> CheckpointError:
    """The line for a status that the client has no name for."""
    status = error.response.status_code
    if status == 401:
        return CheckpointError(
            "the Hub does not accept the token (401)", where=reference, hint="log in with: hf auth login, or unset HF_TOKEN"
        )
    if status == 403:
        return CheckpointError("the Hub refuses access (403)", where=reference, hint="log in with: hf auth login")
    if status == 429:
        asked = _asked(error)
        when = "some minutes" if asked is None else f"{asked:.0f} seconds"
        hint = f"run again in {when}" + ("" if _token() else ", or log in for a higher limit: hf auth login")
        return UnreachableError("the Hub asks for fewer requests (429)", where=reference, hint=hint)
    if status == 404:
        return CheckpointError("the Hub knows no such address (404)", where=reference, hint="check HF_ENDPOINT, if it is set")
    return UnreachableError(f"the Hub answers {status}", where=reference, hint="try again later")


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it."""
    one: BaseException | None = error
    for _ in range(10):
        if one is None:
            return
        yield one
        one = one.__cause__ or one.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that led to an error."""
    for one in _chain(error):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _asked(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait: `Retry-After`, or the reset of a used-up rate limit."""
    for one in _chain(error):
        headers = getattr(getattr(one, "response", None), "headers", None) or {}
        seconds = headers.get("Retry-After", "")
        limit = re.search(r"r=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
        if seconds.isdigit() or limit is not None:
            return float(seconds if seconds.isdigit() or limit is None else limit[1])
    return None


def _is_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or not _kinds(error).isdisjoint(NETWORK)


def _kinds(error: BaseException) -> set[str]:
    """Names of the classes of an error of httpx."""
    return {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("httpx")}


def _is_damage(error: BaseException) -> bool:
    """Fewer or other bytes than were announced: our own check, or one of the client's."""
    return isinstance(error, DamagedError) or type(error).__name__.startswith("Xet") or "Consistency check failed" in str(error)


def _line(error: BaseException) -> str:
    return scrubbed(" ".join(str(error).split()))[:300] or type(error).__name__
