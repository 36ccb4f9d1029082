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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
LAUNCHED = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


class Group:
    """Ranks in threads of this process, around one store."""

    def __init__(self, world: int, patience: float = 5.0) -> None:
        self.store = HashStore()
        self.ranks = [Ranks(Seat(rank, world, rank, world), self.store, patience) for rank in range(world)]
        self.stop = threading.Event()

    def alive(self, *numbers: int) -> None:
        for number in numbers:
            threading.Thread(target=self.ranks[number].beat, args=(self.stop,), daemon=True).start()

    def all(self, work: Callable[[Ranks], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            return [future.result(timeout=20) for future in [pool.submit(work, rank) for rank in self.ranks]]


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
        time.sleep(0.2 * (2 - number))
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
            time.sleep(0.3)
            left.append(0)
        rank.part()
        left.append(rank.seat.rank)

    made.all(work)
    assert left == [0, 1, 0]


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


def test_a_rank_without_a_sign_of_life_is_not_waited_for(group: Callable[..., Group]) -> None:
    made = group(2, patience=0.3)
    made.alive(0)
    began = time.monotonic()
    message = "rank 1 of 2 has given no sign of life for 0.3 seconds; it was killed or hangs: see its output, and run all ranks again"
    with pytest.raises(LayercutError, match=f"^{re.escape(message)}$"):
        made.ranks[0].collect({}, {})
    assert time.monotonic() - began < 3


def test_a_rank_that_lives_is_waited_for_beyond_the_patience(group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PULSE", 0.05)
    made = group(2, patience=0.4)
    made.alive(0, 1)

    def work(rank: Ranks) -> Any:
        if not rank.main:
            time.sleep(1.2)
        return rank.collect({}, {"samples": 1})

    main, _ = made.all(work)
    assert len(main) == 2


class Gone:
    """A store whose process has died."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("Broken pipe")


def test_a_store_that_is_gone_is_said_in_one_line() -> None:
    rank = Ranks(Seat(1, 2), Gone())
    with pytest.raises(LayercutError, match=r"^the process that all ranks meet at is gone; run all ranks again$"):
        rank.hand_out("measurement")
    assert rank.fail("x") is False


def test_ranks_that_do_not_find_each_other() -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LAYERCUT_PATIENCE": "1"}
    with pytest.raises(LayercutError, match=r"^rank 1 of 2 does not find the others: "), joined(place):
        pass


# Processes

SCRIPT = """
import os, sys, time
import torch
if sys.argv[1] == "group":
    torch.distributed.init_process_group("gloo")
from layercut.errors import LayercutError
from layercut.ranks import SilentError, joined
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


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(kind: str, world: int = 2, **more: str) -> list[subprocess.Popen[str]]:
    """A process for each rank, without a launcher."""
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT), **more}
    places: list[Mapping[str, str]] = [os.environ | common | {"RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in range(world)]
    command = [sys.executable, "-c", SCRIPT, kind]
    return [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(place)) for place in places]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status and output of each. None may hang."""
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def when_joined(process: subprocess.Popen[str], number: int) -> None:
    assert process.stdout is not None and process.stdout.readline() == "joined\n"
    process.send_signal(number)


def test_processes_work_together() -> None:
    assert ended(start("work")) == [(0, "joined\n2.0\n"), (0, "joined\n2.0\n")]


def test_ranks_meet_beside_a_process_group_that_is_there_already() -> None:
    """As in a script that made an `Accelerator` first: both meet at the same port, and neither is in the way of the other."""
    assert ended(start("group")) == [(0, "joined\n2.0\ngroup of 2\n")] * 2


def test_a_rank_that_raises_is_heard_once() -> None:
    main, other = ended(start("raise"))
    assert main == (1, "joined\nerror: rank 1 failed: m: the weights are damaged\n")
    assert other == (1, "joined\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_rank_or_one_that_hangs_ends_the_others(number: int) -> None:
    processes = start("sleep", LAYERCUT_PATIENCE="4")
    when_joined(processes[1], number)
    assert processes[0].stdout is not None
    output, _ = processes[0].communicate(timeout=60)
    processes[1].kill()
    processes[1].communicate(timeout=20)
    assert processes[0].returncode == 1
    hint = "it was killed or hangs: see its output, and run all ranks again"
    assert output == f"joined\nerror: rank 1 of 2 has given no sign of life for 4 seconds; {hint}\n"


def test_a_killed_main_rank_ends_the_others() -> None:
    processes = start("sleep", LAYERCUT_PATIENCE="3")
    when_joined(processes[1], 0)
    when_joined(processes[0], signal.SIGKILL)
    processes[0].communicate(timeout=20)
    processes[1].send_signal(signal.SIGTERM)  # as a launcher does
    output, _ = processes[1].communicate(timeout=60)
    assert processes[1].returncode == 1
    assert output == "error: the launcher ended this run: another rank died, or it was told to stop; what it prints says which\n"
