"""Ranks: places, shares, what goes between processes, and what happens when one of them fails, hangs or is killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from layercut import ranks as module
from layercut.errors import LayercutError
from layercut.ranks import ALONE, DoneError, Ranks, Seat, SilentError, joined

ROOT = Path(__file__).resolve().parent.parent
HANGS = 300
"""Seconds after which something counts as hanging, on a busy machine too."""
LAUNCHED = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


class Group:
    """Ranks in threads of this process, around one store."""

    def __init__(self, world: int, patience: float = module.PATIENCE) -> None:
        self.store = HashStore()
        self.ranks = [Ranks(Seat(rank, world, rank, world), self.store, patience) for rank in range(world)]
        self.stop = threading.Event()

    def alive(self, *numbers: int) -> None:
        for number in numbers:
            threading.Thread(target=self.ranks[number].beat, args=(self.stop,), daemon=True).start()

    def all(self, work: Callable[[Ranks], Any]) -> list[Any]:
        futures: list[Future[Any]] = [Future() for _ in self.ranks]

        def run(rank: Ranks, future: Future[Any]) -> None:
            try:
                future.set_result(work(rank))
            except BaseException as error:
                future.set_exception(error)

        for rank, future in zip(self.ranks, futures, strict=True):
            threading.Thread(target=run, args=(rank, future), daemon=True).start()
        return [future.result(timeout=HANGS) for future in futures]


class Clock:
    """Time in the place of that of a rank: it passes when somebody sleeps, and something may happen then."""

    def __init__(self, happens: Callable[[float], object] = lambda now: None) -> None:
        self.now, self.happens = 0.0, happens

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.happens(self.now)


@pytest.fixture
def group() -> Iterator[Callable[..., Group]]:
    made: list[Group] = []

    def make(world: int, **options: Any) -> Group:
        made.append(Group(world, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop.set()


# Places and shares


def test_a_launched_process_knows_its_place() -> None:
    assert Seat.launched(LAUNCHED) == Seat(1, 3, 0, 2)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_process_that_no_launcher_started_is_alone(missing: str) -> None:
    assert Seat.launched({**LAUNCHED, missing: ""}) == Seat(0, 1, 0, 1)


def test_local_places_are_the_global_ones_when_nothing_is_said() -> None:
    assert Seat.launched({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}) == Seat(1, 2, 1, 2)


def test_alone_nothing_is_joined() -> None:
    with joined({}) as ranks:
        assert ranks is ALONE and ranks.main
        assert list(ranks.share("abc")) == ["a", "b", "c"]
        assert ranks.hand_out("x", "text") == "text"
        ((state, counts),) = ranks.collect({"a": torch.ones(2)}, {"samples": 3})
    assert torch.equal(state["a"], torch.ones(2)) and counts == {"samples": 3}


@given(st.lists(st.integers(), max_size=20), st.integers(1, 6))
def test_shares_are_all_there_is_and_differ_by_one_at_most(items: list[int], world: int) -> None:
    group = Group(world)
    shares = [list(rank.share(items)) for rank in group.ranks]
    assert sorted(item for share in shares for item in share) == sorted(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    "names",
    [
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ],
)
def test_a_place_under_mpi(names: tuple[str, ...]) -> None:
    """With `--cpu` and a host file `accelerate launch` starts mpirun, which has names of its own."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    place = dict(zip(names, ("2", "4", "0", "2"), strict=True))
    assert Seat.launched({**place, **meeting}) == Seat(2, 4, 0, 2)
    assert Seat.launched(place) == Seat()
    assert Seat.launched({**place, **LAUNCHED}) == Seat(1, 3, 0, 2)


# Between ranks


def test_the_main_rank_collects_in_the_order_of_ranks(group: Callable[..., Group]) -> None:
    made = group(3)
    made.alive(0, 1, 2)

    def work(rank: Ranks) -> Any:
        number = rank.seat.rank
        time.sleep(0.05 * (2 - number))
        # The shapes differ, and the last rank saw nothing.
        return rank.collect(
            {"sum": torch.full((number, 2), float(number), dtype=torch.float64), "none": torch.zeros(0)}, {"samples": number}
        )

    main, *others = made.all(work)
    assert others == [[], []]
    assert [counts for _, counts in main] == [{"samples": 0}, {"samples": 1}, {"samples": 2}]
    assert [state["sum"].tolist() for state, _ in main] == [[], [[1.0, 1.0]], [[2.0, 2.0], [2.0, 2.0]]]
    assert all(state["sum"].dtype == torch.float64 and state["none"].shape == (0,) for state, _ in main)


def test_what_is_larger_than_a_piece_arrives(group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 1000)
    made = group(2)
    made.alive(0, 1)
    big = torch.arange(5000, dtype=torch.int64)
    main, _ = made.all(lambda rank: rank.collect({"big": big * rank.seat.rank}, {}))
    assert torch.equal(main[1][0]["big"], big)
    assert made.all(lambda rank: rank.hand_out("text", "ä" * 3000 if rank.main else None)) == ["ä" * 3000] * 2
    assert made.all(lambda rank: rank.hand_out("text", "again" if rank.main else None)) == ["again"] * 2


def test_nobody_leaves_before_the_main_rank(group: Callable[..., Group]) -> None:
    made = group(2)
    made.alive(0, 1)
    left: list[int] = []

    def work(rank: Ranks) -> None:
        if rank.main:
            time.sleep(0.2)
            left.append(0)
        else:
            rank.leave = lambda leave=rank.leave: left.append(1) or leave()  # type: ignore[assignment,method-assign,misc]
        rank.part()
        left.append(2 + rank.seat.rank)

    made.all(work)
    assert left[:2] == [0, 1] and sorted(left[2:]) == [2, 3]


def test_a_main_rank_that_needs_nobody_lets_the_others_go(group: Callable[..., Group]) -> None:
    made = group(2)
    made.alive(0, 1)

    def work(rank: Ranks) -> str:
        if not rank.main:
            with pytest.raises(DoneError):
                rank.hand_out("measurement")
        rank.part()
        return "left"

    assert made.all(work) == ["left", "left"]


def test_what_the_main_rank_hands_out_last_is_not_missed(group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets a text and is done between two looks of another rank: first at the text, then at whether there is an end."""
    made = group(2)
    made.alive(0, 1)
    main, other = made.ranks

    class Slow:
        """Between the look at a text that is not there and whatever is asked next, the main rank does all it has to."""

        def check(self, keys: list[str]) -> bool:
            there = bool(made.store.check(keys))
            if keys == ["plan/1"] and not there:
                main.hand_out("plan", "text")
                made.store.set("done", "")
            return there

        def get(self, key: str) -> bytes:
            return bytes(made.store.get(key))

    monkeypatch.setattr(other, "_store", Slow())
    assert other.hand_out("plan") == "text"


# Failure


def test_the_main_rank_repeats_what_another_one_says(group: Callable[..., Group]) -> None:
    made = group(2)
    made.alive(0, 1)

    def work(rank: Ranks) -> Any:
        if not rank.main:
            return rank.fail("m: not finite\x1b")
        with pytest.raises(LayercutError, match=r"^rank 1 failed: m: not finite\\x1b$"):
            rank.collect({}, {})
        rank.fail("as above")
        rank.close()
        return None

    assert made.all(work) == [None, True]


def test_the_others_are_silent_when_the_main_rank_fails(group: Callable[..., Group]) -> None:
    made = group(2)
    made.alive(0, 1)
    made.ranks[0].fail("no such column")
    with pytest.raises(SilentError, match=r"^no such column$"):
        made.ranks[1].hand_out("measurement")


def test_a_share_ends_when_another_rank_failed(group: Callable[..., Group]) -> None:
    made = group(2)
    made.alive(0, 1)
    items = made.ranks[0].share(range(100))
    assert next(items) == 0
    made.store.set("failed/1", "broken")
    with pytest.raises(LayercutError, match="rank 1 failed: broken"):
        next(items)


def test_a_rank_without_a_sign_of_life_is_not_waited_for(group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    message = "rank 1 of 2 has given no sign of life for 60 seconds; it was killed or hangs: see its output, and run all ranks again"
    with pytest.raises(LayercutError, match=f"^{re.escape(message)}$"):
        group(2).ranks[0].collect({}, {})
    assert 60 < clock.now < 60 + 2 * module.POLL


def test_a_rank_that_lives_is_waited_for_beyond_the_patience(group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its signs come 59 seconds apart. After five minutes it has something to say, and then none comes any more."""
    made = group(2)

    def happens(now: float) -> None:
        made.store.set("alive/1", str(min(now, 300) // 59))
        if now > 300 and not made.store.check(["state/1/1"]):
            made.ranks[1].collect({}, {"samples": 7})

    clock = Clock(happens)
    monkeypatch.setattr(module, "time", clock)
    assert [counts for _, counts in made.ranks[0].collect({}, {"samples": 1})] == [{"samples": 1}, {"samples": 7}]
    assert 300 < clock.now < 301
    with pytest.raises(LayercutError, match="rank 1 of 2 has given no sign of life"):
        made.ranks[0].collect({}, {})
    assert 355 < clock.now < 362


def test_signs_of_life_come_at_once_and_then_every_pulse(group: Callable[..., Group]) -> None:
    rank, waits, seen = group(2).ranks[1], [], []

    class Stop:
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            seen.append(rank._peek("alive/1"))
            return len(waits) == 4

    rank.beat(Stop())  # type: ignore[arg-type]
    assert waits == [0, module.PULSE, module.PULSE, module.PULSE]
    assert seen == [None, b"1", b"2", b"3"]


@pytest.mark.parametrize(
    ("others", "until"), [({1: 0.2, 2: 0.4}, 0.4), ({1: 0.2, 2: None}, module.GRACE), ({}, module.GRACE)], ids=["all", "one", "none"]
)
def test_a_main_rank_that_failed_stays_until_the_others_know(
    group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch, others: dict[int, float | None], until: float
) -> None:
    """They may be in the middle of something. Who lives and does not answer is not waited for longer than GRACE."""
    made, signs = group(3), count()

    def happens(now: float) -> None:
        for rank in made.ranks[1:]:
            made.store.set(f"alive/{rank.seat.rank}", str(next(signs)))
            leaves = others.get(rank.seat.rank)
            if leaves is not None and now >= leaves:
                rank.leave()

    clock = Clock(happens)
    monkeypatch.setattr(module, "time", clock)
    made.ranks[0].close()
    assert until <= clock.now < until + 2 * module.POLL
    assert made.store.check(["closed"])


def test_a_main_rank_that_failed_waits_for_no_dead_one(group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch) -> None:
    made, clock = group(3), Clock()
    monkeypatch.setattr(module, "time", clock)
    with pytest.raises(LayercutError, match="rank 1 of 3 has given no sign of life"):
        made.ranks[0].collect({}, {})
    made.ranks[2].leave()
    began = clock.now
    made.ranks[0].close()
    assert clock.now == began


class Gone:
    """A store whose process has died."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("Broken pipe")


def test_a_store_that_is_gone_is_said_in_one_line() -> None:
    """Whatever it is that a rank asks or says."""
    rank = Ranks(Seat(1, 2), Gone())
    for asks in (
        lambda: rank.hand_out("measurement"),
        lambda: rank.collect({}, {}),
        lambda: list(rank.share(range(4))),
        rank.part,
        lambda: Ranks(Seat(0, 2), Gone()).hand_out("measurement", "text"),
    ):
        with pytest.raises(LayercutError, match=r"^the process that all ranks meet at is gone; run all ranks again$"):
            asks()
    assert rank.fail("x") is False
    rank.leave()
    Ranks(Seat(0, 2), Gone()).close()


def test_ranks_that_do_not_find_each_other() -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "LAYERCUT_PATIENCE": "1"}
    with (
        reserved_port() as port,
        pytest.raises(LayercutError, match=r"^rank 1 of 2 does not find the others: "),
        joined({**place, "MASTER_PORT": str(port)}),
    ):
        pass


# Processes

SCRIPT = """
import os, sys, time
import torch
from layercut.errors import LayercutError
from layercut.ranks import SilentError, joined
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[1] == "group":
    torch.distributed.init_process_group("gloo")
try:
    with joined() as ranks:
        print("joined", flush=True)
        if ranks.seat.rank == 1 and sys.argv[1] == "raise":
            raise LayercutError("the weights are damaged", where="m")
        if ranks.seat.rank == 1 and sys.argv[1] == "sleep":
            try:
                time.sleep(60)
            except Exception:  # what ends a run must not be taken for a failure of what it interrupted
                raise LayercutError("taken for an error") from None
        found = ranks.collect({"x": torch.full((2,), float(ranks.seat.rank))}, {"samples": ranks.seat.rank})
        print(ranks.hand_out("sum", str(sum(float(s["x"].sum()) for s, _ in found)) if ranks.main else None), flush=True)
    if sys.argv[1] == "group":
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        print("group of", int(total), flush=True)
        torch.distributed.destroy_process_group()
except SilentError:
    sys.exit(1)
except LayercutError as error:
    print("error:", error, flush=True)
    sys.exit(1)
"""


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that no other process is given: somebody may listen there, but nobody does yet."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


Start = Callable[..., list["subprocess.Popen[str]"]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process for each rank, without a launcher. They set out to meet together, however long their imports took."""
    with ExitStack() as stack:

        def make(kind: str, world: int = 2, **more: str) -> list[subprocess.Popen[str]]:
            port = stack.enter_context(reserved_port())
            common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), **more}
            common = {**os.environ, **common, "OMP_NUM_THREADS": "1"}
            pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            made = []
            for rank in range(world):
                process = subprocess.Popen([sys.executable, "-c", SCRIPT, kind], env=common | {"RANK": str(rank)}, text=True, **pipes)
                stack.callback(process.communicate)
                stack.callback(process.kill)
                made.append(process)
            for process in made:
                says(process, "ready\n")
            for process in made:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            return made

        yield make


def says(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == line


def ended(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """Exit status of each, and what it says from now on. None may hang."""
    outputs = [process.communicate(timeout=HANGS)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_processes_work_together(start: Start) -> None:
    assert ended(*start("work")) == [(0, "joined\n2.0\n"), (0, "joined\n2.0\n")]


def test_ranks_meet_beside_a_process_group_that_is_there_already(start: Start) -> None:
    """As in a script that made an `Accelerator` first: both meet at the same port, and neither is in the way of the other."""
    assert ended(*start("group")) == [(0, "joined\n2.0\ngroup of 2\n")] * 2


def test_a_rank_that_raises_is_heard_once(start: Start) -> None:
    main, other = ended(*start("raise"))
    assert main == (1, "joined\nerror: rank 1 failed: m: the weights are damaged\n")
    assert other == (1, "joined\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_rank_or_one_that_hangs_ends_the_others(start: Start, number: int) -> None:
    main, other = start("sleep", LAYERCUT_PATIENCE="4")
    says(other, "joined\n")
    other.send_signal(number)
    hint = "it was killed or hangs: see its output, and run all ranks again"
    assert ended(main) == [(1, f"joined\nerror: rank 1 of 2 has given no sign of life for 4 seconds; {hint}\n")]


def test_a_killed_main_rank_ends_the_others(start: Start) -> None:
    main, other = start("sleep")
    says(other, "joined\n")
    says(main, "joined\n")
    main.kill()
    main.wait(HANGS)
    other.terminate()  # as a launcher does
    said = "error: the launcher ended this run: another rank died, or it was told to stop; what it prints says which\n"
    assert ended(other) == [(1, said)]
