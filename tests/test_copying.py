"""copying.py: every way of copying gives the same bytes, and what goes wrong is said or falls back."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercut import copying
from layercut.copying import Range, SourceFiles, coalesce, copy_range, explained, new_file, sync, write_bytes
from layercut.errors import CheckpointError, OutputError
from layercut.ways import BUFFER, UNSUPPORTED, by_copy_file_range, write_at

CONTENT = random.Random(0).randbytes(3 * BUFFER + 17)
BLOCK = os.statvfs(tempfile.gettempdir()).f_bsize
WAYS = ("copy_file_range", "sendfile", "pread")


def only(monkeypatch, way):
    """Leave one way of copying; those for whole blocks are not asked, and the ones before it fail as on a system without them."""
    monkeypatch.setattr(copying, "WHOLE", ())

    def absent(*args, **kwargs):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    for earlier in WAYS[: WAYS.index(way)]:
        monkeypatch.setattr(os, earlier, absent, raising=False)


@pytest.fixture
def pair(tmp_path):
    """Descriptors of a source with CONTENT and of a target full of dots."""
    (tmp_path / "source").write_bytes(CONTENT)
    (tmp_path / "target").write_bytes(b"." * len(CONTENT))
    with ExitStack() as stack:
        source = os.open(tmp_path / "source", os.O_RDONLY)
        target = os.open(tmp_path / "target", os.O_RDWR)
        stack.callback(os.close, source)
        stack.callback(os.close, target)
        yield source, target


def content(descriptor):
    return os.pread(descriptor, 2 * len(CONTENT), 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("begin", "at", "length"), [(0, 0, len(CONTENT)), (5, 11, 2 * BUFFER + 3), (BUFFER - 1, 0, 2), (7, 3, 0), (len(CONTENT) - 1, 9, 1)]
)
def test_every_way_copies_the_range_and_nothing_else(pair, monkeypatch, way, begin, at, length):
    only(monkeypatch, way)
    source, target = pair
    steps = []
    copy_range(source, target, begin, at, length, steps.append)
    expected = bytearray(b"." * len(CONTENT))
    expected[at : at + length] = CONTENT[begin : begin + length]
    assert content(target) == bytes(expected)
    assert content(source) == CONTENT
    assert sum(steps) == length


@pytest.mark.parametrize(
    ("begin", "at", "length", "durable", "expected"),
    [
        (0, 0, 2 << 20, True, ["clone", "direct", "direct"]),
        (0, 0, 2 << 20, False, ["clone", "kernel"]),
        (8, 0, 2 << 20, True, ["direct", "direct"]),
        (8, 0, 2 << 20, False, ["kernel"]),
        (0, 4, (1 << 20) + BLOCK, True, ["kernel", "direct", "kernel"]),
        (0, 0, (1 << 20) - 1, True, ["clone", "kernel"]),
        (8, 0, (1 << 20) - 1, True, ["kernel"]),
        (4, 4, 2 * BLOCK, True, ["kernel", "clone", "kernel"]),
    ],
)
def test_who_is_asked_for_what(pair, monkeypatch, begin, at, length, durable, expected):
    """A filesystem that shares nothing, and a disk that takes one MiB at a time from anywhere."""
    asked = []

    def clone(*step):
        asked.append("clone")
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def direct(source, target, source_offset, target_offset, count):
        asked.append("direct")
        assert target_offset % BLOCK == count % BLOCK == 0
        return by_copy_file_range(source, target, source_offset, target_offset, min(count, 1 << 20))

    def kernel(*step):
        asked.append("kernel")
        return by_copy_file_range(*step)

    monkeypatch.setattr(copying, "by_clone", clone)
    monkeypatch.setattr(copying, "WHOLE", (clone, direct))
    monkeypatch.setattr(copying, "ANY", (kernel,))
    source, target = pair
    copy_range(source, target, begin, at, length, durable=durable)
    assert asked == expected
    assert content(target) == (b"." * at + CONTENT[begin : begin + length] + b"." * len(CONTENT))[: max(len(CONTENT), at + length)]


def test_kernel_copy_is_asked_first_and_nothing_else(pair, monkeypatch):
    def never(*args):
        raise AssertionError("copied through memory")

    monkeypatch.setattr(os, "sendfile", never)
    monkeypatch.setattr(os, "pread", never)
    copy_range(*pair, 0, 0, 1000)


def test_short_copies_go_on(pair, monkeypatch):
    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, **at: real(a, b, min(count, 1000), **at))
    source, target = pair
    steps = []
    copy_range(source, target, 10, 20, 4500, steps.append)
    assert steps == [1000, 1000, 1000, 1000, 500]
    assert content(target)[20:4520] == CONTENT[10:4510]


def test_a_step_is_bounded(pair, monkeypatch):
    monkeypatch.setattr(copying, "STEP", 4096)
    steps = []
    copy_range(*pair, 1, 0, 10000, steps.append)
    assert steps == [4096, 4096, 1808]
    steps.clear()
    monkeypatch.setattr(copying, "STEP", 2 * BLOCK + 1)
    monkeypatch.setattr(copying, "WHOLE", (by_copy_file_range,))
    copy_range(*pair, 0, 0, 5 * BLOCK + 7, steps.append)
    assert steps == [2 * BLOCK, 2 * BLOCK, BLOCK, 7]


@pytest.mark.parametrize("way", WAYS)
def test_the_disk_begins_before_everything_is_copied(pair, monkeypatch, way):
    only(monkeypatch, way)
    monkeypatch.setattr(copying, "STEP", 4096)
    asked, steps = [], []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: asked.append((len(steps), *args)))
    copy_range(*pair, 1, 70, 10000, steps.append)
    advice = os.POSIX_FADV_DONTNEED
    assert asked == [(0, pair[1], 70, 4096, advice), (1, pair[1], 4166, 4096, advice), (2, pair[1], 8262, 1808, advice)]


def test_advice_that_is_refused_or_unknown(pair, monkeypatch):
    def refused(*args):
        raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))

    monkeypatch.setattr(os, "posix_fadvise", refused)
    copy_range(*pair, 0, 0, 5000)
    monkeypatch.delattr(os, "posix_fadvise")
    copy_range(*pair, 5000, 5000, 5000)
    assert content(pair[1])[:10001] == CONTENT[:10000] + b"."


@pytest.mark.parametrize(
    ("begin", "at", "length", "expected"),
    [
        (0, 0, 3 * BLOCK, [3 * BLOCK]),
        (0, BLOCK, 2 * BLOCK + 1, [2 * BLOCK, 1]),
        (100, BLOCK + 100, 3 * BLOCK, [BLOCK - 100, 2 * BLOCK, 100]),
        (2 * BLOCK - 1, BLOCK - 1, BLOCK + 1, [1, BLOCK]),
        (100, 100, BLOCK - 100, [BLOCK - 100]),
        (100, 100, 5, [5]),
        (BLOCK, 0, 5, [5]),
        (BLOCK - 2, BLOCK - 2, 5, [2, 3]),
        (7, 7, 0, []),
        (100, 101, 3 * BLOCK, [BLOCK - 101, 2 * BLOCK, 101]),
        (0, 8, 3 * BLOCK, [BLOCK - 8, 2 * BLOCK, 8]),
    ],
)
def test_whole_blocks_of_the_target_are_asked_for_on_their_own(pair, monkeypatch, begin, at, length, expected):
    monkeypatch.setattr(copying, "WHOLE", (by_copy_file_range,))
    source, target = pair
    steps = []
    copy_range(source, target, begin, at, length, steps.append)
    assert steps == expected
    assert content(target)[at : at + length] == CONTENT[begin : begin + length]
    assert content(target)[at + length :] == b"." * (len(CONTENT) - at - length)


def test_blocks_are_those_of_the_target(pair, monkeypatch):
    real = os.fstatvfs
    source, target = pair
    asked, steps = [], []

    class Found:
        f_bsize = 1000

    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: asked.append(descriptor) or Found)
    monkeypatch.setattr(copying, "WHOLE", (by_copy_file_range,))
    copy_range(source, target, 300, 5300, 2500, steps.append)
    assert (asked, steps) == ([target], [700, 1000, 800])
    assert real(target).f_bsize != 1000


def test_a_filesystem_without_blocks(pair, monkeypatch):
    class Found:
        f_bsize = 0

    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: Found)
    source, target = pair
    copy_range(source, target, 0, 0, 5000)
    assert content(target)[:5001] == CONTENT[:5000] + b"."


def test_memory_is_bounded_by_the_buffer(pair, monkeypatch):
    only(monkeypatch, "pread")
    real, asked = os.pread, []
    monkeypatch.setattr(os, "pread", lambda descriptor, count, at: asked.append(count) or real(descriptor, count, at))
    copy_range(*pair, 0, 0, len(CONTENT))
    assert asked == [BUFFER, BUFFER, BUFFER, 17]


def test_short_writes_go_on(pair, monkeypatch):
    only(monkeypatch, "pread")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: real(descriptor, data[:100], at))
    source, target = pair
    copy_range(source, target, 1, 2, 1234)
    assert content(target)[2:1236] == CONTENT[1:1235]


@pytest.mark.parametrize("code", sorted(UNSUPPORTED))
def test_what_the_kernel_cannot_do_falls_back_half_way(pair, monkeypatch, code):
    real, calls = os.copy_file_range, []

    def once(source, target, count, **at):
        calls.append(count)
        if len(calls) > 1:
            raise OSError(code, os.strerror(code))
        return real(source, target, 333, **at)

    monkeypatch.setattr(os, "copy_file_range", once)
    source, target = pair
    copy_range(source, target, 3, 4, 5000)
    assert calls == [5000, 4667]
    assert content(target)[4:5004] == CONTENT[3:5003]


def test_systems_without_kernel_copies(pair, monkeypatch):
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.delattr(os, "sendfile")
    source, target = pair
    copy_range(source, target, 0, 0, len(CONTENT))
    assert content(target) == CONTENT


def test_a_kernel_copy_that_gives_nothing_is_not_the_end(pair, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", lambda *args, **at: 0)
    monkeypatch.setattr(os, "sendfile", lambda *args: 0)
    source, target = pair
    copy_range(source, target, 0, 0, 100)
    assert content(target)[:100] == CONTENT[:100]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("way", WAYS)
def test_real_failures_are_raised_as_they_are(pair, monkeypatch, way, code):
    only(monkeypatch, way)

    def broken(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, way, broken)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        copy_range(*pair, 0, 0, 100)
    assert caught.value.errno == code


def test_unsupported_at_the_last_resort_is_raised(pair, monkeypatch):
    only(monkeypatch, "pread")
    with pytest.raises(OSError) as caught:
        copy_range(pair[0], pair[0], 0, 0, 100)
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("way", WAYS)
def test_a_source_that_ends_early(pair, monkeypatch, way):
    only(monkeypatch, way)
    with pytest.raises(CheckpointError) as caught:
        copy_range(*pair, len(CONTENT) - 10, 0, 25)
    assert str(caught.value) == f"ended early: 15 bytes are missing from byte {len(CONTENT)} on"


def test_across_file_systems(tmp_path):
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryFile(dir=shared) as source, tempfile.TemporaryFile(dir=tmp_path) as target:
        source.write(CONTENT)
        source.flush()
        copy_range(source.fileno(), target.fileno(), 1, 0, len(CONTENT) - 1)
        assert content(target.fileno()) == CONTENT[1:]


A, B = Path("a"), Path("b")


@pytest.mark.parametrize(
    ("ranges", "joined"),
    [
        ([], []),
        ([(A, 0, 4)], [(A, 0, 4)]),
        ([(A, 0, 4), (A, 4, 9), (A, 9, 9), (A, 9, 12)], [(A, 0, 12)]),
        ([(A, 0, 4), (A, 5, 9)], [(A, 0, 4), (A, 5, 9)]),
        ([(A, 4, 9), (A, 0, 4)], [(A, 4, 9), (A, 0, 4)]),
        ([(A, 0, 4), (B, 4, 9)], [(A, 0, 4), (B, 4, 9)]),
        ([(A, 0, 4), (A, 0, 4)], [(A, 0, 4), (A, 0, 4)]),
    ],
)
def test_coalesce(ranges, joined):
    assert list(coalesce(Range(*part) for part in ranges)) == joined


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 200)), max_size=12), st.sampled_from(WAYS))
def test_coalesced_copies_concatenate_the_ranges(cuts, way):
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        only(monkeypatch, way)
        path = Path(folder, "source")
        path.write_bytes(CONTENT[:700])
        ranges = [Range(path, begin, begin + length) for begin, length in cuts]
        target = os.open(Path(folder, "target"), os.O_RDWR | os.O_CREAT)
        stack.callback(os.close, target)
        opened, position = SourceFiles(stack), 0
        for part in coalesce(ranges):
            opened.copy(part, target, position)
            position += part.end - part.begin
        assert content(target) == b"".join(CONTENT[part.begin : part.end] for part in ranges)


def test_source_files_are_opened_once_and_closed(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(CONTENT[:100])
    real, opened = os.open, []
    with ExitStack() as stack, (tmp_path / "target").open("wb") as target:
        monkeypatch.setattr(os, "open", lambda path, *args: opened.append(path) or real(path, *args))
        files = SourceFiles(stack)
        for at in (0, 50, 25):
            files.copy(Range(tmp_path / "source", at, at + 25), target.fileno(), at)
        descriptor = files._open[tmp_path / "source"][0]
        assert os.fstat(descriptor).st_size == 100
        files.check_unchanged()
    assert opened == [tmp_path / "source"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_source_files_name_the_file_that_ends_early(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(b"12345")
    with ExitStack() as stack, (tmp_path / "target").open("wb") as target, pytest.raises(CheckpointError) as caught:
        SourceFiles(stack).copy(Range(path, 2, 9), target.fileno(), 0)
    assert str(caught.value) == f"{path}: ended early: 4 bytes are missing from byte 5 on; plan again"


def test_source_files_name_the_file_that_is_gone(tmp_path):
    with ExitStack() as stack, pytest.raises(CheckpointError) as caught:
        SourceFiles(stack).copy(Range(tmp_path / "gone", 0, 1), 1, 0)
    assert str(caught.value) == f"{tmp_path / 'gone'}: cannot be read: No such file or directory"


def test_source_files_name_the_file_that_fails(tmp_path, monkeypatch):
    path = tmp_path / "source"
    path.write_bytes(b"12345")

    def broken(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "copy_file_range", broken)
    with ExitStack() as stack, (tmp_path / "target").open("wb") as target, pytest.raises(OSError) as caught:
        SourceFiles(stack).copy(Range(path, 0, 5), target.fileno(), 0)
    assert str(caught.value) == f"[Errno {errno.EIO}] Input/output error (copying from {path})"


@pytest.mark.parametrize(
    ("begin", "end"), [(0, len(CONTENT)), (5, 5 + BUFFER), (BUFFER - 1, BUFFER + 1), (7, 7), (len(CONTENT) - 1, len(CONTENT))]
)
def test_source_files_read_a_range(tmp_path, begin, end):
    (tmp_path / "source").write_bytes(CONTENT)
    with ExitStack() as stack:
        data = SourceFiles(stack).read(Range(tmp_path / "source", begin, end))
    assert data == CONTENT[begin:end]
    data[:1] = b"x"  # may be written to
    assert (tmp_path / "source").read_bytes() == CONTENT


def test_short_reads_go_on(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(CONTENT)
    real, asked = os.pread, []
    monkeypatch.setattr(os, "pread", lambda descriptor, count, at: asked.append((count, at)) or real(descriptor, min(count, 100), at))
    with ExitStack() as stack:
        assert SourceFiles(stack).read(Range(tmp_path / "source", 3, 253)) == CONTENT[3:253]
    assert asked == [(250, 3), (150, 103), (50, 203)]


def test_reading_and_copying_share_what_is_open(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(b"12345")
    with ExitStack() as stack, (tmp_path / "target").open("wb") as target:
        files = SourceFiles(stack)
        files.copy(Range(path, 0, 5), target.fileno(), 0)
        path.rename(tmp_path / "elsewhere")
        assert files.read(Range(path, 1, 3)) == b"23"
        os.utime(tmp_path / "elsewhere", ns=(1, 1))
        with pytest.raises(CheckpointError, match="was changed while it was copied"):
            files.check_unchanged()


def test_reading_names_the_file_that_ends_early(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(b"12345")
    with ExitStack() as stack, pytest.raises(CheckpointError) as caught:
        SourceFiles(stack).read(Range(path, 2, 9))
    assert str(caught.value) == f"{path}: ended early: 4 bytes are missing from byte 5 on; plan again"


def test_reading_names_the_file_that_fails(tmp_path, monkeypatch):
    path = tmp_path / "source"
    path.write_bytes(b"12345")

    def broken(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", broken)
    with ExitStack() as stack, pytest.raises(CheckpointError) as caught:
        SourceFiles(stack).read(Range(path, 0, 5))
    assert str(caught.value) == f"{path}: cannot be read: Input/output error"


@pytest.mark.parametrize("write", [lambda path: path.write_bytes(b"1234567"), lambda path: os.utime(path, ns=(1, 1))])
def test_source_files_tell_a_change(tmp_path, write):
    path = tmp_path / "source"
    path.write_bytes(b"12345")
    with ExitStack() as stack, (tmp_path / "target").open("wb") as target:
        files = SourceFiles(stack)
        files.copy(Range(path, 0, 5), target.fileno(), 0)
        write(path)
        with pytest.raises(CheckpointError) as caught:
            files.check_unchanged()
    assert str(caught.value) == f"{path}: was changed while it was copied; run again when nothing writes to it"


def test_new_file_has_the_same_mode_whatever_the_umask(tmp_path):
    for number, mask in enumerate((0o000, 0o077, 0o777)):
        (tmp_path / str(number)).mkdir()
        before = os.umask(mask)
        try:
            with new_file(tmp_path / str(number) / "file", Path("shown")) as target:
                write_bytes(target, b"abc")
        finally:
            os.umask(before)
        path = tmp_path / str(number) / "file"
        assert path.stat().st_mode & 0o777 == 0o644
        assert path.read_bytes() == b"abc"


def test_new_file_makes_folders(tmp_path):
    with new_file(tmp_path / "a" / "b" / "file", Path("shown")) as target:
        write_bytes(target, b"abc")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"abc"


def test_new_file_replaces_nothing_and_follows_nothing(tmp_path):
    (tmp_path / "there").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("there", "link"):
        with pytest.raises(OutputError) as caught, new_file(tmp_path / name, Path("out") / name):
            raise AssertionError("opened")
        assert str(caught.value) == f"out/{name}: cannot be written: File exists"
    assert (tmp_path / "there").read_bytes() == b"mine"
    assert not (tmp_path / "elsewhere").exists()


def test_new_file_is_on_the_disk_before_it_is_left(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with new_file(tmp_path / "file", Path("shown")) as target:
        assert synced == []
    assert synced == [target]


def test_a_disk_that_fills_up_at_fsync(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError) as caught, new_file(tmp_path / "file", Path("out/file")):
        pass
    assert str(caught.value) == "out/file: cannot be written: No space left on device; free some space and run again"


def test_write_bytes_goes_on_after_short_writes(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    with (tmp_path / "file").open("wb") as target:
        write_bytes(target.fileno(), b"0123456789")
        write_bytes(target.fileno(), b"")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_write_at_goes_on_after_short_writes_and_moves_nothing(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: real(descriptor, data[:3], at))
    with (tmp_path / "file").open("wb") as target:
        write_at(target.fileno(), bytearray(b"0123456789"), 4)
        write_at(target.fileno(), b"", 100)
        write_bytes(target.fileno(), b"ab")
    assert (tmp_path / "file").read_bytes() == b"ab\0\0" + b"0123456789"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSPC, "x: cannot be written: No space left on device; free some space and run again"),
        (errno.EDQUOT, "x: cannot be written: Disk quota exceeded; free some space and run again"),
        (errno.EROFS, "x: cannot be written: Read-only file system"),
        (errno.EACCES, "x: cannot be written: Permission denied"),
        (errno.EIO, "x: cannot be written: Input/output error"),
    ],
)
def test_explained(code, text):
    assert str(explained(OSError(code, os.strerror(code)), "x")) == text


def test_sync_puts_the_folder_on_the_disk_and_closes_it(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((descriptor, os.fstat(descriptor).st_ino)))
    sync(tmp_path)
    [(descriptor, inode)] = synced
    assert inode == tmp_path.stat().st_ino
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
