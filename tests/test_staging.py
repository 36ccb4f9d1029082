"""staging.py: an output gets its name when it is complete, one run at a time, and only what can be resumed is left of what failed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import byte_tensors, write_checkpoint

from layercut import staging
from layercut.checkpoint import open_checkpoint
from layercut.errors import OutputError
from layercut.staging import SLACK, Place, check_place, check_space, check_vacant, publish, recover, resumable, staged, throw_away


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "out", tmp_path / "out")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def write(place, text, overwrite=False):
    """A whole run that writes one file."""
    with staged(place):
        recover(place)
        check_vacant(place, overwrite)
        place.content.mkdir()
        (place.content / "file").write_text(text)
        publish(place, overwrite)


def refuse(code):
    def call(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return call


# Names


def test_names_lie_beside_the_output():
    place = Place(Path("out"), Path("/data/out"))
    assert str(place.staging) == "/data/.out.layercut-partial"
    assert str(place.content) == "/data/.out.layercut-partial/content"
    assert str(place.lock) == "/data/.out.layercut-partial/lock"
    assert str(place.journal) == "/data/.out.layercut-partial/journal"
    assert str(place.old) == "/data/.out.layercut-old"
    assert str(place.trash) == "/data/.out.layercut-trash"


# Checks


@pytest.mark.parametrize("overwrite", [False, True])
def test_vacant_places(place, overwrite):
    check_vacant(place, overwrite)
    place.target.mkdir()
    check_vacant(place, overwrite)
    assert names(place.target.parent) == ["out"]


@pytest.mark.parametrize(
    ("make", "overwrite", "message"),
    [
        (lambda path: path.write_text(""), False, "is a file; choose another folder"),
        (lambda path: path.write_text(""), True, "is a file; choose another folder"),
        (lambda path: path.symlink_to("nowhere"), True, "is a file; choose another folder"),
        (lambda path: (path / "x").mkdir(parents=True), False, "/ is not empty; choose another folder or pass --overwrite"),
        (lambda path: (path / "x").mkdir(parents=True), True, None),
    ],
)
def test_taken_places(place, make, overwrite, message):
    make(place.target)
    if message is None:
        check_vacant(place, overwrite)
        return
    with pytest.raises(OutputError) as caught:
        check_vacant(place, overwrite)
    assert str(caught.value) in (f"{place.shown}{message}", f"{place.shown} {message}")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_place_that_may_not_be_looked_into(place, monkeypatch, overwrite):
    place.target.mkdir()
    monkeypatch.setattr(os, "listdir", refuse(errno.EACCES))
    with pytest.raises(OutputError) as caught:
        check_vacant(place, overwrite)
    assert str(caught.value) == f"{place.shown} cannot be looked into: Permission denied; choose another folder"


def test_places_away_from_the_sources(tmp_path):
    folder = write_checkpoint(tmp_path / "models" / "source", byte_tensors(2), {"num_hidden_layers": 2})
    sources = {"m": open_checkpoint(folder)}
    check_place(Place(tmp_path / "out", tmp_path / "out"), sources)
    check_place(Place(tmp_path / "models" / "out", tmp_path / "models" / "out"), sources)
    check_place(Place(tmp_path / "models" / "source-2", tmp_path / "models" / "source-2"), sources)
    for inner in ("models", "models/source", "models/source/out", "models/source/a/b"):
        with pytest.raises(OutputError) as caught:
            check_place(Place(Path(inner), tmp_path / inner), sources)
        assert str(caught.value) == f"{inner} and the source {folder} lie in each other; choose a folder outside the sources"


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught:
        check_place(Place(Path("x/out"), tmp_path / "file" / "x" / "out"), {})
    assert str(caught.value) == f"{tmp_path}/file is a file, x/out cannot lie in it; choose another folder"
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(OutputError) as caught:
        check_place(Place(Path("x/out"), tmp_path / "x" / "out"), {})
    assert str(caught.value) == f"{tmp_path} is not writable; choose another folder"


def test_places_that_are_too_much(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"is the current directory or holds it; choose another folder$"):
        check_place(Place(Path(), tmp_path), {})
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(OutputError, match=r"is a mount point and cannot be put in place at once; choose a folder inside it$"):
        check_place(Place(Path("out"), tmp_path / "out"), {})


@pytest.mark.parametrize(("free", "fits"), [(SLACK + 1000, True), (SLACK + 999, False), (0, False)])
def test_space(place, tmp_path, monkeypatch, free, fits):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=free))
    deep = Place(tmp_path / "a" / "b" / "out", tmp_path / "a" / "b" / "out")
    if fits:
        check_space(deep, 1000)
    else:
        with pytest.raises(OutputError, match=rf"^needs 33\.6 MB, .* free on {tmp_path}; free some space or choose another folder$"):
            check_space(deep, 1000)
    assert asked == [tmp_path]  # the nearest that exists


def test_what_will_be_freed_counts(place, monkeypatch):
    place.content.mkdir(parents=True)
    (place.content / "half").write_bytes(b"x" * (1 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=SLACK))
    check_space(place, 1 << 20)
    with pytest.raises(OutputError):
        check_space(place, 2 << 20)


def test_what_is_kept_does_not_count(place, monkeypatch):
    place.content.mkdir(parents=True)
    (place.content / "whole").write_bytes(b"x" * (1 << 20))
    (place.content / "half").write_bytes(b"x" * (2 << 20))
    place.journal.write_bytes(b"")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=SLACK))
    kept = {"whole": 1 << 20, "half": 1 << 20}
    check_space(place, 1 << 20, kept)  # of `half`, what lies behind the part that is kept
    with pytest.raises(OutputError):
        check_space(place, (1 << 20) + 1, kept)
    check_space(place, 2 << 20, {"half": 1 << 20})


# Staging


def test_a_run_leaves_the_output_and_nothing_else(place, tmp_path):
    with staged(place):
        assert names(tmp_path) == [".out.layercut-partial", ".out.layercut-partial/lock"]
        place.content.mkdir()
        place.journal.write_text("")
        (place.content / "file").write_text("new")
        publish(place, False)
        assert (place.target / "file").read_text() == "new"
    assert names(tmp_path) == ["out", "out/file"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), KeyboardInterrupt(), OutputError("x")])
def test_an_error_leaves_nothing_and_no_parents(tmp_path, error):
    place = Place(Path("out"), tmp_path / "a" / "b" / "out")
    with pytest.raises(type(error)), staged(place):
        (place.content / "deep" / "er").mkdir(parents=True)
        raise error
    assert names(tmp_path) == []


def test_parents_that_were_there_stay(tmp_path):
    (tmp_path / "a").mkdir()
    place = Place(Path("out"), tmp_path / "a" / "b" / "out")
    with pytest.raises(KeyboardInterrupt), staged(place):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["a"]


KEPT = [f".out.layercut-partial{name}" for name in ("", "/content", "/content/half", "/journal", "/lock")]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), KeyboardInterrupt(), OutputError("x"), AssertionError()])
def test_what_has_a_journal_stays_after_an_error(place, tmp_path, error):
    with pytest.raises(type(error)), staged(place):
        place.journal.write_text("")
        place.content.mkdir()
        (place.content / "half").write_text("half")
        assert resumable(place)
        raise error
    assert names(tmp_path) == KEPT
    with staged(place):
        assert names(tmp_path) == KEPT
    assert names(tmp_path) == KEPT


def test_parents_of_what_stays_stay(tmp_path):
    place = Place(Path("out"), tmp_path / "a" / "b" / "out")
    with pytest.raises(KeyboardInterrupt), staged(place):
        place.content.mkdir()
        place.journal.write_text("")
        raise KeyboardInterrupt
    assert [name for name in names(tmp_path) if "partial" not in name] == ["a", "a/b"]
    assert resumable(place)


def test_the_lock_goes_with_the_run_that_held_it(place):
    with pytest.raises(KeyboardInterrupt), staged(place):
        place.content.mkdir()
        place.journal.write_text("")
        raise KeyboardInterrupt
    opened = os.open(place.lock, os.O_RDWR)
    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(OutputError, match=r"^another layercut is writing"), staged(place):
        raise AssertionError("entered")
    assert resumable(place)
    os.close(opened)


@pytest.mark.parametrize("missing", ["journal", "content"])
def test_what_has_no_journal_or_no_content_goes(place, tmp_path, missing):
    with staged(place):
        if missing == "journal":
            (place.content / "deep").mkdir(parents=True)
        else:
            place.journal.write_text("")
        assert not resumable(place)
    assert names(tmp_path) == []


def test_work_is_thrown_away(place, tmp_path):
    with staged(place):
        throw_away(place)
        (place.content / "deep").mkdir(parents=True)
        place.journal.write_text("")
        throw_away(place)
        assert names(tmp_path) == KEPT[:1] + KEPT[-1:]


def test_new_parents_are_put_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(staging, "sync", synced.append)
    with staged(Place(Path("out"), tmp_path / "a" / "b" / "out")):
        assert synced == [tmp_path, tmp_path / "a"]


def test_one_run_at_a_time(place, tmp_path):
    with staged(place):
        place.content.mkdir()
        (place.content / "theirs").write_text("theirs")
        with pytest.raises(OutputError) as caught, staged(place):
            raise AssertionError("entered")
        assert str(caught.value) == f"another layercut is writing {place.shown}; wait for it or choose another folder"
        assert (place.content / "theirs").read_text() == "theirs"
        other = Place(tmp_path / "other", tmp_path / "other")
        write(other, "other")
    write(place, "mine")
    assert names(tmp_path) == ["other", "other/file", "out", "out/file"]


def test_a_lock_that_fails_for_another_reason(place, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), staged(place):
        raise AssertionError("entered")
    assert not place.content.exists()


@pytest.mark.parametrize("call", ["lstat", "unlink"])
def test_no_error_leaves_the_lock_with_this_process(place, tmp_path, monkeypatch, call):
    """A disk that fails when the lock is looked at, or removed: the same process may try again."""
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"), staged(place):
            assert call == "unlink"
    write(place, "new")
    assert names(tmp_path) == ["out", "out/file"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_file_systems_without_locks(place, tmp_path, monkeypatch, code):
    monkeypatch.setattr(fcntl, "flock", refuse(code))
    write(place, "new")
    assert names(tmp_path) == ["out", "out/file"]


@pytest.mark.parametrize("trap", ["link", "file"])
def test_traps_in_the_way(place, tmp_path, trap):
    (tmp_path / "victim").mkdir()
    if trap == "link":
        place.staging.symlink_to(tmp_path / "victim")
    else:
        place.staging.write_text("")
    with pytest.raises(OutputError) as caught, staged(place):
        raise AssertionError("entered")
    assert str(caught.value) == f"{place.staging} is in the way; remove it"
    assert names(tmp_path) == [".out.layercut-partial", "victim"]


def test_a_lock_that_is_a_link_is_not_followed(place, tmp_path):
    place.staging.mkdir()
    place.lock.symlink_to(tmp_path / "victim")
    with pytest.raises(OSError) as caught, staged(place):
        raise AssertionError("entered")
    assert caught.value.errno == errno.ELOOP
    assert not (tmp_path / "victim").exists()


# Publishing


def test_publishing_replaces_only_when_told(place, tmp_path):
    write(place, "first")
    with pytest.raises(OutputError, match="is not empty"):
        write(place, "second")
    assert (place.target / "file").read_text() == "first"
    (place.target / "more").write_text("of the first")
    write(place, "second", overwrite=True)
    assert names(tmp_path) == ["out", "out/file"]
    assert (place.target / "file").read_text() == "second"


def test_a_folder_that_is_filled_meanwhile_stays(place, tmp_path):
    with pytest.raises(OSError, match="not empty"), staged(place):
        place.content.mkdir()
        (place.content / "file").write_text("new")
        place.target.mkdir()
        (place.target / "mine").write_text("mine")
        publish(place, False)
    assert names(tmp_path) == ["out", "out/mine"]


def test_the_first_half_of_an_overwrite_is_undone(place, tmp_path):
    place.old.mkdir()
    (place.old / "file").write_text("older")
    recover(place)
    assert names(tmp_path) == ["out", "out/file"]
    recover(place)
    assert names(tmp_path) == ["out", "out/file"]


def test_the_rest_of_an_overwrite_is_no_reason_to_go_back(place, tmp_path):
    write(place, "new")
    place.old.mkdir()
    recover(place)
    assert (place.target / "file").read_text() == "new"
    write(place, "newer", overwrite=True)
    assert names(tmp_path) == ["out", "out/file"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2])
def test_a_rename_that_fails_brings_the_older_folder_back(place, tmp_path, monkeypatch, error, at):
    write(place, "first")
    real, calls = Path.rename, []

    def rename(self, target):
        calls.append(self)
        if len(calls) == at:
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(type(error)):
        write(place, "second", overwrite=True)
    assert names(tmp_path) == ["out", "out/file"]
    assert (place.target / "file").read_text() == "first"


def test_an_older_folder_that_cannot_be_removed(place, monkeypatch):
    write(place, "first")
    real = shutil.rmtree

    def rmtree(path, ignore_errors=False):
        if path != place.trash:
            real(path, ignore_errors=ignore_errors)
        elif not ignore_errors:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(OutputError) as caught:
        write(place, "second", overwrite=True)
    message = "is complete, but the folder that it replaces could not be removed: Permission denied"
    assert str(caught.value) == f"{place.shown} {message}; remove {place.trash}"
    assert (place.target / "file").read_text() == "second"


def test_half_of_an_older_folder_does_not_come_back(place, tmp_path, monkeypatch):
    """Killed while the older folder is removed, and then the new one is removed by hand."""
    write(place, "first")
    (place.target / "more").write_text("first")
    real = shutil.rmtree

    def killed(path, **how):
        (path / "more").unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **how: killed(path) if path == place.trash else real(path, **how))
        with pytest.raises(KeyboardInterrupt):
            write(place, "second", overwrite=True)
    shutil.rmtree(place.target)
    recover(place)
    assert not place.target.exists()
    write(place, "third")
    assert names(tmp_path) == ["out", "out/file"]
    assert (place.target / "file").read_text() == "third"


def test_the_name_is_put_on_the_disk(place, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(staging, "sync", lambda folder: synced.append((folder, names(place.target))))
    write(place, "new")
    assert synced == [(tmp_path, ["file"])]
