"""journal.py: what it says is true of the disk, and what it cannot say is not believed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layercut import journal as journal_module
from layercut.errors import OutputError
from layercut.hands import together
from layercut.journal import FORMAT, NOTHING, Entry, Expected, Identity, Journal, clear, continued_file, read_journal, survey
from layercut.version import __version__

MINE = Identity("plan", "sources")
FIRST = {"plan": "plan", "sources": "sources", "layercut": __version__, "format": FORMAT}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "staging").mkdir()
    return tmp_path / "staging" / "journal"


def written(path: Path, *records, identity=MINE) -> Path:
    journal = Journal(path, identity, NOTHING)
    for record in records:
        journal.record(*record)
    journal.close()
    return path


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Identities


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (MINE, None),
        (None, "it has no journal that this version can read"),
        (Identity("plan", "sources", "0.0.9"), "it is of another version of layercut"),
        (Identity("plan", "sources", format="layercut-journal/2"), "it is of another version of layercut"),
        (Identity("other", "other", "0.0.9"), "it is of another version of layercut"),
        (Identity("other", "other"), "it is of another plan"),
        (Identity("plan", "other"), "its sources have changed since"),
    ],
)
def test_why_identities_differ(other, why):
    assert MINE.unlike(other) == why
    assert (why is None) == (other == MINE)


# Lines


def test_lines_of_a_journal(path):
    written(path, ("config.json", 12, "d"), ("model.safetensors", 300), ("model.safetensors", 600), ("model.safetensors", 700, "e"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        FIRST,
        {"file": "config.json", "bytes": 12, "sha256": "d"},
        {"file": "model.safetensors", "bytes": 300},
        {"file": "model.safetensors", "bytes": 600},
        {"file": "model.safetensors", "bytes": 700, "sha256": "e"},
    ]
    found = read_journal(path)
    assert found.identity == MINE
    assert found.entries == {"config.json": Entry(12, "d"), "model.safetensors": Entry(700, "e")}
    assert found.end == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_last_line_of_a_file_holds(path):
    assert read_journal(written(path, ("a", 5, "d"), ("a", 0))).entries == {"a": Entry(0)}


def test_a_journal_goes_on_where_it_can_be_read(path):
    written(path, ("a", 1, "d"), ("b", 2))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"file":"c","bytes":3,"sha2')
    found = read_journal(path)
    assert found.entries.keys() == {"a", "b"}
    journal = Journal(path, MINE, found)
    journal.record("d", 4)
    journal.close()
    assert path.read_bytes() == whole + b'{"file":"d","bytes":4}\n'


def test_a_journal_of_another_identity_begins_anew(path):
    written(path, ("a", 1, "d"), identity=Identity("other", "sources"))
    journal = Journal(path, MINE, read_journal(path))
    journal.close()
    assert read_journal(path) == (MINE, {}, path.stat().st_size)


@pytest.mark.parametrize(
    "line",
    [
        "", "{", "null", "[]", "3",
        '"x"', "\0" * 40, '{"file": "c"}', '{"bytes": 3}', '{"file": 3, "bytes": 3}', '{"file": "c", "bytes": -1}',
        '{"file": "c", "bytes": "3"}', '{"file": "c", "bytes": 3.5}', '{"file": "c", "bytes": 3, "sha256": 5}', "[" * 100_000, "\udcff",
    ],
)  # fmt: skip
def test_lines_that_are_not_believed_nor_what_follows(path, line):
    written(path, ("a", 1, "d"))
    end = path.stat().st_size
    path.write_bytes(path.read_bytes() + line.encode(errors="surrogateescape") + b'\n{"file": "z", "bytes": 9}\n')
    assert read_journal(path) == (MINE, {"a": Entry(1, "d")}, end)


@pytest.mark.parametrize(
    "first",
    [{}, {**FIRST, "more": "x"}, {**FIRST, "plan": 3}, {key: value for key, value in FIRST.items() if key != "sources"}, [FIRST]],
)
def test_first_lines_that_are_not_believed(path, first):
    path.write_text(json.dumps(first) + '\n{"file": "a", "bytes": 1}\n')
    assert read_journal(path) == NOTHING


def test_what_is_no_journal(path, tmp_path):
    assert read_journal(path) == NOTHING
    path.write_text("")
    assert read_journal(path) == NOTHING
    path.write_text(json.dumps(FIRST))  # the end of the line is missing
    assert read_journal(path) == NOTHING
    path.unlink()
    written(path.with_name("other"))
    path.symlink_to("other")
    assert read_journal(path) == NOTHING
    with pytest.raises(OSError) as caught:
        Journal(path, MINE, NOTHING)
    assert caught.value.errno == errno.ELOOP
    path.unlink()
    os.mkfifo(path)
    assert read_journal(path) == NOTHING
    path.unlink()
    path.mkdir()
    assert read_journal(path) == NOTHING
    assert read_journal(tmp_path / "nowhere" / "journal") == NOTHING


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(
        st.tuples(st.text(max_size=9).filter(str.isprintable), st.integers(0, 2**63), st.none() | st.just("d")), min_size=1, max_size=6
    ),
    cut=st.floats(0, 1),
)
def test_a_journal_cut_at_any_byte_says_what_stands_before(path, records, cut):
    path.unlink(missing_ok=True)
    data = written(path, *records).read_bytes()
    size = round(cut * len(data))
    path.write_bytes(data[:size])
    lines = data[:size].count(b"\n")
    expected = {name: Entry(count, digest) for name, count, digest in records[: max(0, lines - 1)]}
    found = read_journal(path)
    assert found.identity == (MINE if lines else None)
    assert found.entries == expected
    assert found.end == (data[:size].rfind(b"\n") + 1 if lines else 0)


def test_a_line_is_on_the_disk_when_it_is_recorded(path, tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(descriptor):
        real(descriptor)
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((place, path.read_bytes().count(b"\n")))

    monkeypatch.setattr(os, "fsync", fsync)
    journal = Journal(path, MINE, NOTHING)
    assert synced == [(path, 1), (path.parent, 1), (tmp_path, 1)]
    journal.record("a", 1)
    assert synced[3:] == [(path, 2)]
    journal.close()


def test_a_journal_that_cannot_be_begun_is_closed(path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        Journal(path, MINE, NOTHING)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# What can be kept


@pytest.fixture
def content(tmp_path):
    folder = tmp_path / "content"
    (folder / "deep").mkdir(parents=True)
    (folder / "text").write_bytes(b"text")
    (folder / "empty").write_bytes(b"")
    (folder / "deep" / "weights").write_bytes(b"HEADdata")
    return folder


WEIGHTS = Expected(8, b"HEAD")
EXPECTED = {"text": Expected(4), "empty": Expected(0), "deep/weights": WEIGHTS}
ENTRIES = {"text": Entry(4, digest(b"text")), "empty": Entry(0, digest(b"")), "deep/weights": Entry(8, digest(b"HEAD"))}


def test_what_is_as_it_was_is_kept(content):
    assert survey(content, ENTRIES, EXPECTED) == ENTRIES
    assert survey(content, {**ENTRIES, "stray": Entry(4, "d")}, EXPECTED) == ENTRIES
    assert survey(content, {"text": ENTRIES["text"]}, EXPECTED) == {"text": ENTRIES["text"]}
    assert survey(content, {}, EXPECTED) == {}
    assert survey(content / "nowhere", ENTRIES, EXPECTED) == {}


@pytest.mark.parametrize(
    ("name", "data", "entry", "wanted"),
    [
        ("text", b"texT", None, None),
        ("text", b"tex", None, None),
        ("text", b"text+", None, None),
        ("text", b"text", Entry(5, digest(b"text")), None),
        ("text", b"text", Entry(4, "d"), None),
        ("text", b"text", None, Expected(5)),
        ("text", b"", Entry(0), None),
        ("deep/weights", b"HEAddata", None, None),
        ("deep/weights", b"HEADdat", None, None),
        ("deep/weights", b"HEADdata+", None, None),
        ("deep/weights", b"HEADdata", None, Expected(8, b"HEAT")),
        ("deep/weights", b"HEADdata", Entry(0), None),
        ("deep/weights", b"HEADdata", Entry(9), None),  # more than there is
        ("deep/weights", b"HEADdata++", Entry(9), None),  # more than there will be
        ("deep/weights", b"HEADdata", Entry(3), None),  # half a header
        ("deep/weights", b"HEAddata", Entry(6), None),
        ("deep/weights", b"", Entry(6), None),
    ],
)
def test_what_is_not_as_it_was_is_not_kept(content, name, data, entry, wanted):
    (content / name).write_bytes(data)
    found = survey(content, ENTRIES | {name: entry or ENTRIES[name]}, EXPECTED | {name: wanted or EXPECTED[name]})
    assert found == {other: kept for other, kept in ENTRIES.items() if other != name}


@pytest.mark.parametrize("size", [4, 6, 8])
def test_half_a_file_is_kept_as_far_as_it_was_recorded(content, size):
    (content / "deep" / "weights").write_bytes(b"HEADdata and what no one recorded")
    assert survey(content, {"deep/weights": Entry(size)}, EXPECTED) == {"deep/weights": Entry(size)}
    assert survey(content, {"text": Entry(2)}, EXPECTED) == {"text": Entry(2)}


@pytest.mark.parametrize("how", ["file", "folder", "hidden", "pipe"])
def test_links_and_pipes_are_not_kept(content, tmp_path, how):
    (content / "deep").rename(tmp_path / "elsewhere")
    if how == "folder":
        (content / "deep").symlink_to(tmp_path / "elsewhere")
    elif how == "hidden":
        (content / "deep").symlink_to("other")
        (tmp_path / "elsewhere").rename(content / "other")
    else:
        (content / "deep").mkdir()
        path = content / "deep" / "weights"
        path.symlink_to(tmp_path / "elsewhere" / "weights") if how == "file" else os.mkfifo(path)
    assert survey(content, ENTRIES, EXPECTED).keys() == {"text", "empty"}


@pytest.mark.parametrize("how", ["link", "file"])
def test_content_that_is_no_folder(tmp_path, how):
    content = tmp_path / "content"
    content.symlink_to(tmp_path / "nowhere") if how == "link" else content.write_text("")
    with pytest.raises(OutputError) as caught:
        survey(content, ENTRIES, EXPECTED)
    assert str(caught.value) == f"{content} is in the way; remove it"


def test_what_is_not_kept_goes(content, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "mine").write_text("mine")
    (content / "link").symlink_to(tmp_path / "victim")
    (content / "deep" / "link").symlink_to(tmp_path / "victim" / "mine")
    (content / "other" / "deep").mkdir(parents=True)
    (content / "other" / "deep" / "stray").write_text("")
    clear(content, {"deep/weights", "empty"})
    assert sorted(path.relative_to(content).as_posix() for path in content.rglob("*")) == ["deep", "deep/weights", "empty"]
    assert (tmp_path / "victim" / "mine").read_text() == "mine"
    clear(content, ())
    assert list(content.iterdir()) == []
    clear(content / "nowhere", ())


# Without waiting for the disk


def hasty(path: Path, *records, found=NOTHING) -> list[int]:
    """Records that are not waited for; gives the number of syncs of each."""
    journal, syncs, real = Journal(path, MINE, found, durable=False), [], os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: syncs.append(descriptor) or real(descriptor))
        counts = []
        for record in records:
            journal.record(*record)
            counts.append(len(syncs))
            syncs.clear()
    journal.close()
    return counts


def test_what_is_not_on_the_disk_counts_until_the_machine_starts_again(path, monkeypatch):
    written(path, ("a", 5), ("b", 7, "d"))
    found = read_journal(path)
    assert hasty(path, ("a", 9), ("c", 3, "e"), found=found) == [0, 0]
    assert read_journal(path).entries == {"a": Entry(9), "b": Entry(7, "d"), "c": Entry(3, "e")}
    monkeypatch.setattr(journal_module, "boot_id", lambda: "another")
    after = read_journal(path)
    assert after.entries == {"a": Entry(5), "b": Entry(7, "d")}
    assert after.end == path.stat().st_size  # it is gone on with behind the lines that do not count


def test_taking_back_counts_in_any_case_and_is_on_the_disk(path, monkeypatch):
    written(path, ("a", 5, "d"))
    assert hasty(path, ("a", 0), ("a", 4), found=read_journal(path)) == [1, 0]
    monkeypatch.setattr(journal_module, "boot_id", lambda: "another")
    assert read_journal(path).entries == {"a": Entry(0)}


def test_the_start_of_the_machine_has_a_name():
    boot = journal_module.boot_id()
    assert len(boot) >= 32
    assert (journal_module.boot_id() == boot) == Path("/proc/sys/kernel/random/boot_id").exists()


def test_where_the_system_does_not_name_it_nothing_is_trusted(path, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *args, **how: (_ for _ in ()).throw(FileNotFoundError()))
    assert journal_module.boot_id() != journal_module.boot_id()
    hasty(path, ("a", 9))
    assert read_journal(path).entries == {}


def test_lines_of_several_threads_stay_whole(path):
    journal = Journal(path, MINE, NOTHING, durable=False)
    together([lambda check, name=name: [journal.record(name, size, "d" * 64) for size in range(1, 200)] for name in "abcd"], 4)
    journal.close()
    assert read_journal(path).entries == {name: Entry(199, "d" * 64) for name in "abcd"}
    assert len(path.read_text().splitlines()) == 1 + 4 * 199


# Going on in a file


def test_a_file_that_is_not_waited_for(content, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("waited for the disk"))
    with continued_file(content / "deep" / "weights", Path("shown"), 6, durable=False) as target:
        os.pwrite(target, b"TA", 6)
    assert (content / "deep" / "weights").read_bytes() == b"HEADdaTA"


def test_a_file_goes_on_behind_what_is_kept(content, monkeypatch):
    path = content / "deep" / "weights"
    path.chmod(0o600)
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_bytes()) or real(descriptor))
    with continued_file(path, Path("shown"), 6) as target:
        assert path.read_bytes() == b"HEADda"
        os.pwrite(target, b"TA", 6)
    assert synced == [b"HEADdaTA"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("error", "tail"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device; free some space and run again"),
    ],
)
def test_an_error_names_the_file(content, error, tail):
    with pytest.raises(OutputError) as caught, continued_file(content / "text", Path("shown"), 2):
        raise error
    assert str(caught.value) == f"shown: cannot be written: {tail}"


def test_a_link_is_not_gone_on_with(content, tmp_path):
    (content / "link").symlink_to(content / "text")
    with (
        pytest.raises(OutputError, match=r"^shown: cannot be written: Too many levels"),
        continued_file(content / "link", Path("shown"), 2),
    ):
        raise AssertionError("entered")
    assert (content / "text").read_bytes() == b"text"
