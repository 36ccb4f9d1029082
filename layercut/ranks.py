"""Ranks: processes that torchrun or `accelerate launch` started together. They share the samples; the first plans, writes and prints.

Nothing is waited for without an eye on the others: each rank gives signs of life, and says when it fails.
"""

from __future__ import annotations

import io
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from layercut.errors import LayercutError, printable

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")

PATIENCE = 60.0
"""Seconds without a sign of life after which a rank counts as dead; LAYERCUT_PATIENCE overrides it."""
PULSE = 1.0
"""Seconds between signs of life."""
PIECE = 8 << 20
"""Bytes that go through the store at a time."""
POLL = 0.05
"""Seconds between two looks at what is waited for."""
GRACE = 5.0
"""Seconds that others which live have to see that the main rank failed, at most, before it is gone."""
TERMINATED = 3.0
"""Seconds that a rank which its launcher ends waits for the main rank to say so."""
FAILED, CLOSED, ALIVE, LEFT, DONE = "failed", "closed", "alive", "left", "done"
AGAIN = "run all ranks again"
PLACES = {
    "rank": ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "world": ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "local_rank": ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "local_world": ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
}
"""What launchers call the numbers of a place: torchrun, then the kinds of MPI, as accelerate reads them. The first that is set counts."""


class SilentError(LayercutError):
    """A failure that another rank prints."""


class DoneError(LayercutError):
    """The main rank finished without what this one waits for: it had no need of the others."""


@contextmanager
def _reaching() -> Iterator[None]:
    """One line when a connection breaks: what the store runs in is gone."""
    try:
        yield
    except LayercutError:
        raise
    except Exception:
        raise LayercutError("the process that all ranks meet at is gone", hint=AGAIN) from None


class Seat(NamedTuple):
    """The place of this process among those that were launched together."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def launched(cls, environment: Mapping[str, str]) -> Seat:
        """As the launcher's environment says; alone when it says nothing, or not where all meet."""
        found = {key: next((environment[name] for name in names if environment.get(name)), "") for key, names in PLACES.items()}
        if not (found["rank"] and found["world"] and environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
            return cls()
        return cls(*(int(found[key] or found[key.removeprefix("local_")]) for key in PLACES))


class Ranks:
    """The processes of a run, seen from one of them. Alone, everything is its own and nothing is waited for."""

    def __init__(self, seat: Seat | None = None, store: Any = None, patience: float = PATIENCE) -> None:
        self.seat = Seat() if seat is None else seat
        self._store, self._patience = store, patience
        self._seen: dict[int, tuple[bytes | None, float]] = {}
        self._asked: dict[str, int] = {}

    @property
    def main(self) -> bool:
        """Whether this rank plans, writes and prints."""
        return self.seat.rank == 0

    def share(self, items: Iterable[Item]) -> Iterator[Item]:
        """This rank's part: every world-th item, from that of its own number. It may be empty. Ends when another rank fails."""
        for item in islice(items, self.seat.rank, None, self.seat.world):
            yield item
            if self.seat.world > 1:
                with _reaching():
                    self._look()

    def collect(self, state: Mapping[str, Tensor], counts: Mapping[str, int]) -> list[tuple[dict[str, Tensor], dict[str, int]]]:
        """What every rank has, in their order, on the main rank; nothing on the others. Raises LayercutError when one of them is gone."""
        if self.seat.world == 1:
            return [(dict(state), dict(counts))]
        key = self._next("state")
        if not self.main:
            self._send(f"{key}/{self.seat.rank}", _packed(state, counts))
            return []
        others = [_unpacked(self._receive(f"{key}/{rank}")) for rank in range(1, self.seat.world)]
        return [(dict(state), dict(counts)), *others]

    def hand_out(self, name: str, data: str | None = None) -> str:
        """The text of that name which the main rank has, on every rank."""
        if self.seat.world > 1:
            key = self._next(name)
            if self.main:
                self._send(key, (data or "").encode())
            else:
                data = self._receive(key).decode()
        assert data is not None
        return data

    def fail(self, message: str, limit: float = math.inf) -> bool:
        """Tell the others why this rank stops. Whether the main rank took note of it, after `limit` seconds at most."""
        try:
            self._store.set(f"{FAILED}/{self.seat.rank}", printable(message))
            if not self.main:
                self._wait(CLOSED, limit=limit, heeding=False)
                self.leave()
        except Exception:  # the store may be gone with the rank that held it
            return False
        return True

    def leave(self) -> None:
        """Say that nothing more is asked of the main rank."""
        with suppress(Exception):  # it may be gone already
            self._store.set(f"{LEFT}/{self.seat.rank}", "")

    @_reaching()
    def part(self) -> None:
        """The end of the work: nobody leaves before the main rank is done, and it leaves last."""
        if self.seat.world > 1:
            if self.main:
                self._store.set(DONE, "")
                for rank in range(1, self.seat.world):
                    self._wait(f"{LEFT}/{rank}")
            else:
                with suppress(DoneError):
                    self._wait(DONE)
                self.leave()

    def close(self) -> None:
        """The main rank has failed, and has taken note of what others said. It stays until those that live have seen that."""
        with suppress(Exception):
            self._store.set(CLOSED, "")
            end = time.monotonic() + GRACE
            while time.monotonic() < end and not all(map(self._gone, range(1, self.seat.world))):
                time.sleep(POLL)

    def _gone(self, rank: int) -> bool:
        """Whether another rank has left, or is silent for too long."""
        return self._peek(f"{LEFT}/{rank}") is not None or self._silence(rank) > self._patience

    def beat(self, stop: threading.Event) -> None:
        """Give signs of life until told to stop."""
        count = 0
        while not stop.wait(PULSE if count else 0):
            count += 1
            try:
                self._store.set(f"{ALIVE}/{self.seat.rank}", str(count))
            except Exception:  # the others notice
                return

    def _next(self, name: str) -> str:
        """A key that all ranks come to when they ask for the same name the same number of times."""
        self._asked[name] = self._asked.get(name, 0) + 1
        return f"{name}/{self._asked[name]}"

    @_reaching()
    def _send(self, key: str, data: bytes) -> None:
        pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)] or [b""]
        for at, piece in enumerate(pieces):
            self._store.set(f"{key}/{at}", piece)
        self._store.set(key, str(len(pieces)))

    @_reaching()
    def _receive(self, key: str) -> bytes:
        pieces = int(self._wait(key))
        data = b"".join(self._store.get(f"{key}/{at}") for at in range(pieces))
        if self.main:
            for at in range(pieces):
                self._store.delete_key(f"{key}/{at}")
        return data

    def _wait(self, key: str, *, limit: float = math.inf, heeding: bool = True) -> bytes:
        """The value of a key, once it is there. Raises LayercutError when a rank that could set it failed, or gives no sign of life."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            found = self._peek(key)
            if found is None:
                try:
                    self._look(heeding)
                except DoneError:
                    found = self._peek(key)  # set, and the end after it, since the peek above
                    if found is None:
                        raise
            if found is not None:
                return found
            time.sleep(POLL)
        raise TimeoutError(key)

    def _look(self, heeding: bool = True) -> None:
        """Raise when another rank has failed or is silent for too long: any on the main rank, the main rank on the others."""
        if not self.main and heeding and self._peek(DONE) is not None:
            raise DoneError("the main rank is done")
        for rank in range(1, self.seat.world) if self.main else (0,):
            failure = self._peek(f"{FAILED}/{rank}") if heeding else None
            if failure is not None:
                raise LayercutError(f"rank {rank} failed: {failure.decode()}") if self.main else SilentError(failure.decode())
            if self._silence(rank) > self._patience and self._peek(f"{LEFT}/{rank}") is None:
                message = f"rank {rank} of {self.seat.world} has given no sign of life for {self._patience:g} seconds"
                raise LayercutError(message, hint=f"it was killed or hangs: see its output, and {AGAIN}")

    def _silence(self, rank: int) -> float:
        """Seconds since another rank was first seen with the sign of life that is its last."""
        now, beat = time.monotonic(), self._peek(f"{ALIVE}/{rank}")
        before, since = self._seen.get(rank, (None, now))
        self._seen[rank] = (beat, since if beat == before else now)
        return now - self._seen[rank][1]

    def _peek(self, key: str) -> bytes | None:
        return bytes(self._store.get(key)) if self._store.check([key]) else None


ALONE = Ranks()


@contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """The ranks that were launched with this process. What fails on one of them ends all, and is printed once.

    Raises LayercutError when they do not find each other.
    """
    seat = Seat.launched(environment)
    if seat.world == 1:
        yield ALONE
        return
    patience = float(environment.get("LAYERCUT_PATIENCE", PATIENCE))
    ranks = Ranks(seat, _meet(seat, patience), patience)
    stop = threading.Event()
    heart = threading.Thread(target=ranks.beat, args=(stop,), daemon=True, name="layercut-alive")
    heart.start()
    ended = threading.Event()
    try:
        with _told_by_launcher(ended):
            with suppress(DoneError):
                yield ranks
            ranks.part()
    except SilentError:
        ranks.leave()
        raise
    except BaseException as error:
        reason = _reason(error, ended)
        heard = ranks.fail(str(reason or type(error).__name__), TERMINATED if ended.is_set() else math.inf)
        if ranks.main:
            ranks.close()
        elif heard and (reason is not None or isinstance(error, KeyboardInterrupt)):
            raise SilentError(str(reason)) from None
        if reason is None or reason is error:
            raise
        raise reason from None
    finally:
        stop.set()


def _reason(error: BaseException, ended: threading.Event) -> LayercutError | None:
    """What to say of an error, if it is for people."""
    if ended.is_set():  # whatever the interrupted code made of it
        return LayercutError("the launcher ended this run: another rank died, or it was told to stop", hint="what it prints says which")
    return error if isinstance(error, LayercutError) else None


def _meet(seat: Seat, patience: float) -> Any:
    """The store that all ranks write to and read from: the launcher's where it keeps one, else one in the main rank."""
    from datetime import timedelta

    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    try:
        store, _, _ = next(rendezvous("env://", seat.rank, seat.world, timeout=timedelta(seconds=patience)))
    except Exception as error:  # whatever the network says
        message = f"rank {seat.rank} of {seat.world} does not find the others: {str(error).splitlines()[0]}"
        raise LayercutError(message, hint="start all ranks with torchrun or accelerate launch") from None
    return PrefixStore("layercut", store)


@contextmanager
def _told_by_launcher(ended: threading.Event) -> Iterator[None]:
    """SIGTERM is how a launcher ends the ranks that are left when one of them died: as Ctrl-C does, which nothing takes for an error."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stopped(number: int, frame: FrameType | None) -> None:
        ended.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stopped)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _packed(state: Mapping[str, Tensor], counts: Mapping[str, int]) -> bytes:
    """Tensors and counts as a safetensors file: no pickle goes between ranks."""
    from safetensors.torch import save

    return save({key: value.contiguous().clone() for key, value in state.items()}, {key: str(value) for key, value in counts.items()})


def _unpacked(data: bytes) -> tuple[dict[str, Tensor], dict[str, int]]:
    import json
    import struct

    from safetensors.torch import load

    (size,) = struct.unpack("<Q", io.BytesIO(data).read(8))
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return load(data), {key: int(value) for key, value in metadata.items()}
