from __future__ import annotations

import errno
from collections.abc import Mapping

import httpx2
import pytest
from hub import CANARY, SIGNATURE
from huggingface_hub import errors

from layercut.errors import CheckpointError
from layercut.hubfaults import (
    TRIES,
    UNCONNECTED,
    DamagedError,
    UnreachableError,
    explained,
    scrubbed,
    tries_for,
    wait_for,
)

URL = f"https://cdn.example/org/name/file?X-Amz-Signature={SIGNATURE}"
LOG_IN = "hf auth login"


def refused(status: int, headers: Mapping[str, str] | None = None, kind: type[errors.HfHubHTTPError] = errors.HfHubHTTPError) -> Exception:
    """As the client raises it."""
    response = httpx2.Response(status, headers=dict(headers or {}), request=httpx2.Request("GET", URL))
    return kind(f"{status} Client Error for url {URL}", response=response)


def caused(outer: Exception, cause: Exception) -> Exception:
    outer.__cause__ = cause
    return outer


ERRORS: dict[str, Exception] = {
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "denied": PermissionError(errno.EACCES, "Permission denied", "/cache/x"),
    "timeout": httpx2.ReadTimeout("slow"),
    "no connection": httpx2.ConnectError("[Errno -2] Name or service not known"),
    "cut": httpx2.RemoteProtocolError(f"peer closed connection to {URL}"),
    "reset": ConnectionResetError("reset"),
    "xet": errors.XetDownloadError("CAS\nsays no"),
    "short": OSError("Consistency check failed: file should be of size 5 but has size 3 (x).\nThis is usually due to network issues"),
    "damaged": DamagedError("x arrived damaged"),
    "behind another": caused(errors.LocalEntryNotFoundError("x"), refused(503)),
    "no network behind another": caused(errors.LocalEntryNotFoundError("x"), httpx2.ConnectError("x")),
    "unknown": ValueError(f"odd {URL} and {CANARY}"),
}
AGAIN = "; what arrived is kept: run the same command again"
UNREACHABLE = "the Hub cannot be reached; check the network, or give a folder"


@pytest.mark.parametrize(
    ("name", "tries", "message"),
    [
        ("full", 1, "no room on the disk for the download; free some, or set HF_HOME and LAYERCUT_CACHE to folders on a larger disk"),
        ("denied", 1, "the download failed: [Errno 13] Permission denied: '/cache/x'"),
        ("timeout", TRIES, UNREACHABLE),
        ("no connection", UNCONNECTED, UNREACHABLE),
        ("cut", TRIES, UNREACHABLE),
        ("reset", TRIES, UNREACHABLE),
        ("xet", TRIES, f"the download fails again and again: CAS says no{AGAIN}"),
        (
            "short",
            TRIES,
            "the download fails again and again: Consistency check failed: file should be of size 5 but has size 3 (x). "
            f"This is usually due to network issues{AGAIN}",
        ),
        ("damaged", TRIES, f"the download fails again and again: x arrived damaged{AGAIN}"),
        ("behind another", TRIES, "the Hub answers 503; try again later"),
        ("no network behind another", UNCONNECTED, UNREACHABLE),
        ("unknown", 1, "the download failed: odd https://cdn.example/org/name/file and …"),
    ],
)
def test_errors_of_the_client(name: str, tries: int, message: str) -> None:
    assert tries_for(ERRORS[name]) == tries
    assert str(explained(ERRORS[name], "org/name", "org/name", None)) == f"org/name: {message}"


@pytest.mark.parametrize(
    ("status", "token", "tries", "message"),
    [
        (401, None, 1, f"the Hub does not accept the token (401); log in with: {LOG_IN}, or unset HF_TOKEN"),
        (403, None, 1, f"the Hub refuses access (403); log in with: {LOG_IN}"),
        (404, None, 1, "the Hub knows no such address (404); check HF_ENDPOINT, if it is set"),
        (408, None, TRIES, "the Hub answers 408; try again later"),
        (409, None, 1, "the Hub answers 409; try again later"),
        (412, None, 1, "the Hub answers 412; try again later"),
        (416, None, 1, "the Hub answers 416; try again later"),
        (429, None, TRIES, f"the Hub asks for fewer requests (429); run again in some minutes, or log in for a higher limit: {LOG_IN}"),
        (429, CANARY, TRIES, "the Hub asks for fewer requests (429); run again in some minutes"),
        (500, None, TRIES, "the Hub answers 500; try again later"),
        (502, None, TRIES, "the Hub answers 502; try again later"),
        (503, None, TRIES, "the Hub answers 503; try again later"),
        (504, None, TRIES, "the Hub answers 504; try again later"),
    ],
)
def test_statuses(monkeypatch: pytest.MonkeyPatch, status: int, token: str | None, tries: int, message: str) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    assert tries_for(refused(status)) == tries
    assert str(explained(refused(status), "org/name", "org/name", None)) == f"org/name: {message}"


@pytest.mark.parametrize(
    ("kind", "token", "message"),
    [
        (
            errors.GatedRepoError,
            None,
            "a gated model, and no token; ask for access at https://hub.example/org/name, then: hf auth login",
        ),
        (
            errors.GatedRepoError,
            CANARY,
            "a gated model, and your token was not granted access; "
            "ask for access at https://hub.example/org/name, or log in as another user: hf auth login",
        ),
        (
            errors.RepositoryNotFoundError,
            None,
            "no such folder, and no such model on the Hub, or a private one; check the name; for a private model: hf auth login",
        ),
        (
            errors.RepositoryNotFoundError,
            CANARY,
            "no such folder, and no such model on the Hub, or a private one that your token does not see; "
            "check the name, and the user: hf auth whoami",
        ),
        (errors.RevisionNotFoundError, None, "no revision 'v9'; give a branch, a tag, a commit, or refs/pr/N"),
        (errors.RemoteEntryNotFoundError, None, "the Hub lists a file that it does not have; tell the owner of the repository"),
    ],
)
def test_errors_with_a_name(monkeypatch: pytest.MonkeyPatch, kind: type[errors.HfHubHTTPError], token: str | None, message: str) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")
    error = refused(404, kind=kind)
    assert tries_for(error) == 1
    for one in (error, caused(errors.LocalEntryNotFoundError("x"), error)):
        assert str(explained(one, "org/name@v9", "org/name", "v9")) == f"org/name@v9: {message}"


def test_our_own_errors_stay() -> None:
    own = CheckpointError("odd", hint="do this")
    assert str(explained(own, "org/name", "org/name", None)) == "org/name: odd; do this"
    placed = UnreachableError("odd", where="there")
    assert explained(placed, "org/name", "org/name", None) is placed


@pytest.mark.parametrize(
    ("headers", "waits"),
    [
        ({}, [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]),
        ({"Retry-After": "7"}, [7.0] * 6),
        ({"Retry-After": "60"}, [60.0] * 6),
        ({"Retry-After": "61"}, [None] * 6),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]),
        ({"RateLimit": '"api";r=0;t=55'}, [55.0] * 6),
        ({"RateLimit": '"api";r=3;t=55'}, [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]),
        ({"RateLimit": '"api";r=0;t=300'}, [None] * 6),
    ],
)
def test_how_long_to_wait(headers: dict[str, str], waits: list[float | None]) -> None:
    error = refused(429, headers)
    assert [wait_for(error, tries) for tries in range(1, 7)] == waits


def test_a_wait_that_is_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: CANARY)
    expected = "org/name: the Hub asks for fewer requests (429); run again in 3600 seconds"
    assert str(explained(refused(429, {"Retry-After": "3600"}), "org/name", "org/name", None)) == expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("nothing to hide", "nothing to hide"),
        (URL, "https://cdn.example/org/name/file"),
        (f"for url '{URL}' (Request", "for url 'https://cdn.example/org/name/file' (Request"),
        ("http://me:secret@proxy:8080/x failed", "http://proxy:8080/x failed"),
        (f"token={CANARY};", "token=…;"),
        ("Authorization: Bearer eyJhbGciOi", "Authorization: Bearer …"),
        ("half_done and hf_hub are words", "half_done and hf_hub are words"),
    ],
)
def test_secrets_are_not_shown(text: str, shown: str) -> None:
    assert scrubbed(text) == shown


def test_an_error_that_goes_round_in_circles() -> None:
    one, other = ValueError("a"), ValueError("b")
    one.__cause__, other.__cause__ = other, one
    assert tries_for(one) == 1
