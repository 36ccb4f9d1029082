"""A Hub on this machine for the tests: the real client reads and writes it; bytes are counted and faults injected.

    with loopback() as hub:
        hub.add("org/name", {"config.json": b"{}"})
        hub.connect(monkeypatch, tmp_path)          # the client of this process, or
        subprocess.run(..., env=hub.env(tmp_path))  # of another

Large files are served from a second address, as the Hub's are from its CDN: by a signed URL, which the token must never reach.
"""

from __future__ import annotations

import http.server
import json
import os
import random
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
from hubroutes import Reply, answer
from hubstore import RefusedError, Repository

CANARY = "hf_canaryCANARYcanaryCANARYcanaryCAN"
"""A token that must never be seen in what layercut writes."""
SIGNATURE = "s1gnaturecanary"
"""Part of every address of the CDN: who has it can read the file."""
PIECE = 1 << 14


def hasty(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits between two tries; gives the list of the seconds that they would have."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


@dataclass(frozen=True)
class User:
    """Who a token belongs to."""

    name: str
    writes: bool = True
    organizations: tuple[str, ...] = ()

    def owns(self, repo: str) -> bool:
        return repo.partition("/")[0] in (self.name, *self.organizations)


@dataclass
class Fault:
    """Something that goes wrong with the requests that match, `times` times (-1: always).

    kind: `status` answers with `status` and `headers`; `cut` ends the connection after `at` bytes of the body; `slow` sends the body in
    pieces, `at` seconds apart; `short` leaves out the last `at` bytes and says so in Content-Length; `garble` changes the byte at `at`;
    `silent` answers nothing and ends the connection.
    """

    kind: str
    match: str = ""
    """Searched in "METHOD /path file"."""
    times: int = 1
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    at: float = 0


class Request(NamedTuple):
    """A request that was answered."""

    method: str
    path: str
    file: str
    """The file of the repository that it is about, or an empty string."""
    status: int
    sent: int
    """Bytes of the body."""
    token: str | None
    range: str | None
    cdn: bool


class Hub:
    """The state of the server: repositories, users, faults, and what was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.moved: dict[str, str] = {}
        """New names by old ones."""
        self.users: dict[str, User] = {CANARY: User("me")}
        self.faults: list[Fault] = []
        self._log: list[Request] = []
        self._busy = 0
        self._idle = threading.Condition()
        self.endpoint = self.cdn = ""
        self.ranges = True
        """Whether Range is honoured; otherwise the whole file is sent with 200."""
        self.xet: Path | None = None
        """Folder of the content-addressed storage, in Xet mode."""
        self.lock = threading.RLock()
        self._storm: tuple[random.Random, float, re.Pattern[str]] | None = None
        self._hit: dict[str, int] = {}

    # repositories

    def add(self, name: str, files: Mapping[str, bytes] | Path, *, private: bool = False, gated: bool = False) -> Repository:
        """A repository with the files, or with those of a folder."""
        if isinstance(files, Path):
            folder = files
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        self.repos[name] = Repository(name, files, private=private, gated=gated)
        return self.repos[name]

    def rename(self, old: str, new: str) -> None:
        """Give a repository another name; the old one is redirected."""
        self.repos[new] = self.repos.pop(old)
        self.repos[new].name, self.moved[old] = new, new

    # counting

    @property
    def log(self) -> list[Request]:
        """What was asked so far. Answers that are still on their way are waited for: the client may have them before they are noted."""
        with self._idle:
            assert self._idle.wait_for(lambda: not self._busy, timeout=60), "an answer does not end"
        return self._log

    @contextmanager
    def busy(self) -> Iterator[None]:
        """An answer is on its way."""
        with self._idle:
            self._busy += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def sent(self, file: str = "") -> int:
        """Bytes of bodies that were sent: of a file, or of all answers."""
        return sum(request.sent for request in self.log if not file or request.file == file)

    def fetched(self) -> dict[str, int]:
        """Bytes that were sent of every file of which there were any."""
        names = sorted({request.file for request in self.log if request.file and request.sent})
        return {name: self.sent(name) for name in names}

    def leaks(self) -> list[Request]:
        """Requests that took a token to the CDN."""
        return [request for request in self.log if request.cdn and request.token is not None]

    # faults

    def fail(self, kind: str, match: str = "", **values: Any) -> Fault:
        """Inject a fault."""
        self.faults.append(Fault(kind, match, **values))
        return self.faults[-1]

    def storm(self, seed: int, rate: float = 0.3, match: str = "") -> None:
        """Random faults: errors, silence, cut connections; never three in a row for one path, so that patience gets through."""
        self._storm, self._hit = (random.Random(seed), rate, re.compile(match)), {}

    def calm(self) -> None:
        """No more faults."""
        self._storm = None
        self.faults.clear()

    def fault(self, what: str, path: str) -> Fault | None:
        """What goes wrong with a request."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.match, what):
                    fault.times -= 1
                    return fault
            if self._storm is None or not self._storm[2].search(what):
                return None
            chance, rate, _ = self._storm
            if self._hit.get(path, 0) >= 2 or chance.random() >= rate:
                self._hit[path] = 0
                return None
            self._hit[path] = self._hit.get(path, 0) + 1
            kind = chance.choice(["status", "status", "silent", "cut", "cut"])
            return Fault(kind, status=chance.choice([500, 502, 503, 504, 429]), headers={"Retry-After": "0"}, at=chance.randrange(5000))

    # clients

    def env(self, cache: Path, token: str | None = None, **others: str) -> dict[str, str]:
        """Environment of a process whose client asks this Hub, with its caches under `cache`. Xet only in Xet mode."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_", "HUGGING"))}
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        settings |= {"HF_HUB_DISABLE_XET": "0" if self.xet else "1", "LAYERCUT_CACHE": str(cache / "layercut")}
        return kept | settings | ({} if token is None else {"HF_TOKEN": token}) | others

    def connect(self, monkeypatch: pytest.MonkeyPatch, cache: Path, token: str | None = None) -> None:
        """Point the client of this process here, with its caches under `cache`: it read its settings when it was imported."""
        from huggingface_hub import constants, hf_api

        for name, value in self.env(cache, token).items():
            if os.environ.get(name) != value:
                monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
            if token is None or name != "HF_TOKEN":
                monkeypatch.delenv(name, raising=False)
        home = cache / "hf"
        values = {"ENDPOINT": self.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"}
        values |= {"HF_HUB_CACHE": str(home / "hub"), "HF_HOME": str(home), "HF_TOKEN_PATH": str(home / "token")}
        values |= {"HF_XET_CACHE": str(home / "xet"), "HF_STORED_TOKENS_PATH": str(home / "stored_tokens")}
        switches = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": self.xet is None, "HF_HUB_DISABLE_PROGRESS_BARS": True}
        for name, value in {**values, **switches}.items():
            if hasattr(constants, name):
                monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.endpoint)

    def offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As with HF_HUB_OFFLINE=1, for the client of this process."""
        from huggingface_hub import constants

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@contextmanager
def loopback(xet: Path | None = None) -> Iterator[Hub]:
    """A Hub that runs until the context ends; with a folder `xet` it stores large files there, by Xet."""
    hub = Hub()
    hub.xet = xet
    servers = []
    for cdn in (False, True):
        server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub, "cdn": cdn}))
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # one that finds no place is asked again a second later

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    """Reads a request, lets `answer` decide, and sends what it says, through the faults."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    cdn: bool

    def handle_any(self) -> None:
        with self.hub.busy():
            self._handle()

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        body = self._body()
        bearer = self.headers.get("Authorization")
        token = None if bearer is None else bearer.removeprefix("Bearer ")
        file = query.get("file", "") if self.cdn else unquote(parts.path.partition("/resolve/")[2].partition("/")[2])
        fault = self.hub.fault(f"{self.command} {unquote(parts.path)} {file}", parts.path)
        if fault is not None and fault.kind == "silent":
            self._hang_up()
            return self._note(0, 0, file, token)
        if fault is not None and fault.kind == "status":
            reply = Reply(fault.status, b"injected", dict(fault.headers))
        else:
            try:
                with self.hub.lock:
                    reply = answer(self.hub, self.command, parts.path, query, body, token, self.cdn)
            except RefusedError as error:
                headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
                text = json.dumps({"error": error.message}).encode()
                reply = Reply(error.status, text, {name: value for name, value in headers.items() if value})
        if reply.ranged and reply.status == 200:
            reply = self._part(reply)
        self._send(reply, fault, file, token)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _part(self, reply: Reply) -> Reply:
        """The range that was asked for."""
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if found is None or not self.hub.ranges:
            return reply
        size = len(reply.body)
        first, last = found[1], found[2]
        begin = max(0, size - int(last)) if not first else int(first)
        end = size if not (first and last) else min(size, int(last) + 1)
        if begin >= end:
            return Reply(416, b"", {"Content-Range": f"bytes */{size}"})
        return reply._replace(
            status=206, body=reply.body[begin:end], headers={**reply.headers, "Content-Range": f"bytes {begin}-{end - 1}/{size}"}
        )

    def _send(self, reply: Reply, fault: Fault | None, file: str, token: str | None) -> None:
        body = reply.body
        if fault is not None and fault.kind == "short":
            body = body[: max(0, len(body) - int(fault.at))]
        if fault is not None and fault.kind == "garble" and body:
            at = int(fault.at) % len(body)
            body = body[:at] + bytes([body[at] ^ 255]) + body[at + 1 :]
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.flush()
        if self.command == "HEAD":
            return self._note(reply.status, 0, file, token)
        sent = 0
        try:
            if fault is not None and fault.kind == "cut" and body:
                sent = min(int(fault.at), len(body) - 1)
                self.wfile.write(body[:sent])
                self._hang_up()
            else:
                pause = fault.at if fault is not None and fault.kind == "slow" else 0
                for begin in range(0, len(body), PIECE):
                    sleep(pause)
                    self.wfile.write(body[begin : begin + PIECE])
                    sent += len(body[begin : begin + PIECE])
        finally:
            self._note(reply.status, sent, file, token)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def _note(self, status: int, sent: int, file: str, token: str | None) -> None:
        with self.hub.lock:
            self.hub._log.append(Request(self.command, self.path, file, status, sent, token, self.headers.get("Range"), self.cdn))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


def cdn_url(hub: Hub, repo: str, name: str, sha256: str) -> str:
    """Where a large file can be fetched without a token."""
    return f"{hub.cdn}/{quote(repo)}/{sha256}?file={quote(name, safe='')}&Signature={SIGNATURE}"
