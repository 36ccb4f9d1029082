"""Memory: what is free, what a model takes, and how sizes are written."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest
from conftest import write_checkpoint

from layercut.checkpoint import open_checkpoint
from layercut.memory import SHARE, Room, free_memory, give_back, room_of, shown, whole_size


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{value}\n", encoding="utf-8")


def own(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cgroup"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_asked_for_holds_for_the_whole_process() -> None:
    room = room_of(10**12)
    assert room.asked and room.reason == "1.0 TB as asked"
    assert abs(10**12 - psutil.Process().memory_info().rss - room.size) < 10**8


def test_less_than_the_process_takes_leaves_nothing() -> None:
    assert room_of(1) == Room(0, "1 bytes as asked", asked=True)


def test_without_a_wish_a_share_of_what_is_least_free() -> None:
    assert room_of(free={"memory": 8 * 10**9, "the cgroup": 2 * 10**9}) == Room(int(SHARE * 2 * 10**9), "2.0 GB free in the cgroup")


def test_the_machine_says_what_is_free(tmp_path: Path) -> None:
    found = free_memory(tmp_path, tmp_path / "none")
    assert list(found) == ["memory"] and 0 < found["memory"] <= psutil.virtual_memory().total


def test_the_cgroup_of_the_process_limits_it(tmp_path: Path) -> None:
    group(tmp_path / "fs", memory_max="max", memory_current=10**9)
    group(tmp_path / "fs" / "a", memory_max=4 * 10**9, memory_current=3 * 10**9, memory_stat="anon 5\ninactive_file 500000000")
    group(tmp_path / "fs" / "a" / "b", memory_max="max", memory_current=10)
    found = free_memory(tmp_path / "fs", own(tmp_path, "0::/a/b\n"))
    assert found["the cgroup"] == 1_500_000_000


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    group(tmp_path / "fs" / "a", memory_max=4000, memory_current=1000)
    group(tmp_path / "fs" / "a" / "b", memory_max=1500, memory_current=600)
    assert free_memory(tmp_path / "fs", own(tmp_path, "0::/a/b\n"))["the cgroup"] == 900


def test_version_1(tmp_path: Path) -> None:
    folder = tmp_path / "fs" / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("7000\n")
    (folder / "memory.usage_in_bytes").write_text("2000\n")
    (folder / "memory.stat").write_text("total_inactive_file 100\n")
    lines = "12:cpu,cpuacct:/other\n5:memory:/job\n0::/\n"
    assert free_memory(tmp_path / "fs", own(tmp_path, lines))["the cgroup"] == 5100


def test_no_limit_of_version_1_is_a_huge_number(tmp_path: Path) -> None:
    folder = tmp_path / "fs" / "memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (folder / "memory.usage_in_bytes").write_text("2000\n")
    assert "the cgroup" not in free_memory(tmp_path / "fs", own(tmp_path, "5:memory:/\n"))


@pytest.mark.parametrize("text", ["", "nonsense\n", "0::/../../etc\n", "5:memory\n"])
def test_odd_groups_are_no_limit(tmp_path: Path, text: str) -> None:
    (tmp_path / "fs").mkdir()
    assert list(free_memory(tmp_path / "fs", own(tmp_path, text))) == ["memory"]


def test_weights_in_another_dtype(tmp_path: Path) -> None:
    tensors = {"a": ("BF16", (4, 2), bytes(16)), "b": ("F32", (3,), bytes(12)), "c": ("I64", (2,), bytes(16))}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", tensors, {}))
    assert whole_size(checkpoint, None) == 44
    assert whole_size(checkpoint, 4) == 8 * 4 + 3 * 4 + 16
    assert whole_size(checkpoint, 2) == 8 * 2 + 3 * 2 + 16


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (1_550_000, "1.6 MB"), (8 * 10**9, "8.0 GB"), (3 * 10**12, "3.0 TB")],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert shown(size) == text
    assert re.fullmatch(r"[0-9.]+ (bytes|kB|MB|GB|TB)", text)


def test_freed_memory_goes_back() -> None:
    """Blocks too small to be mapped on their own, with one in use at the end: the system would not see them again otherwise."""
    blocks = [b"x" * 100_000 for _ in range(2000)]
    last = bytes(100_000)
    full = psutil.Process().memory_info().rss
    del blocks
    give_back()
    assert psutil.Process().memory_info().rss < full - 150_000_000
    assert last == bytes(100_000)
