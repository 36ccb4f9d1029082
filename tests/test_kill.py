"""A run that is killed, or whose machine loses power, at any moment: no half folder has the final name, and the same command goes on."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import byte_tensors, write_checkpoint
from test_executor import STAGING, made_of, plan_for, stable, tree, with_made

from layercut import executor, writer
from layercut.copying import SourceFiles
from layercut.errors import OutputError
from layercut.executor import KEPT, execute
from layercut.header import encode_header
from layercut.journal import read_journal
from layercut.staging import SLACK

LAYERS = [("source", index) for index in (0, 1, 4, 5)]
HANGS = 300
"""Seconds after which something counts as hanging, on a busy machine too."""

# A process that is asked, a line of JSON at a time, to run a plan in a child and to kill the child. Forking costs no start of Python.
ZYGOTE = """
import fcntl, gc, json, mmap, os, random, select, signal, sys, tempfile, threading, time
from pathlib import Path
from layercut import copying, executor, writer
from layercut.errors import LayercutError
from layercut.plan import Plan

steps, copied, direct, synced, names = 0, 0, 0, {}, {}
shared = mmap.mmap(-1, 8)  # how many bytes the child has copied
warm = False

def crash(ask):
    chance = random.Random(ask["at"])
    root = Path(ask["output"]).parent
    if ask["crash"] != "kill":
        for place, folders, files in os.walk(root / ".out.layercut-partial", topdown=False):
            for name in folders + files:
                path = Path(place, name)
                seen = os.lstat(path)
                if (seen.st_ino, name) not in names.get(os.stat(place).st_ino, ()):
                    path.rmdir() if path.is_dir() and not any(path.iterdir()) else path.is_dir() or path.unlink()
                elif path.is_file():
                    os.truncate(path, chance.randint(synced.get(seen.st_ino, 0), seen.st_size))
                    if ask["crash"] == "zeros":
                        os.truncate(path, seen.st_size)
    os.kill(os.getpid(), signal.SIGKILL)

def durable(folder):
    names[os.stat(folder).st_ino] = {(entry.inode(), entry.name) for entry in os.scandir(folder)}

def watch(ask):
    real = {name: getattr(os, name) for name in ("write", "pwrite", "copy_file_range", "fsync")}
    for place, folders, files in os.walk(Path(ask["output"]).parent):
        durable(place)
        for name in files:
            seen = os.stat(os.path.join(place, name))
            synced[seen.st_ino] = seen.st_size

    def step():
        global steps
        steps += 1
        if steps == ask["at"]:
            crash(ask)

    def sync(descriptor):
        step()
        seen = os.fstat(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            durable(path)
        else:
            synced[seen.st_ino] = seen.st_size

    def stepping(name):
        def call(*args, **kwargs):
            step()
            return real[name](*args, **kwargs)
        return call

    busy = []
    def hook(event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")
        if (writes or changes) and not busy:
            if steps + 1 == ask["at"]:
                busy.append(True)  # what the crash itself does is not a step
            step()

    for name in ("write", "pwrite", "copy_file_range"):
        setattr(os, name, stepping(name))
    os.fsync = sync
    sys.addaudithook(hook)

def slow(seconds):
    real, write, counting = os.copy_file_range, os.pwrite, threading.Lock()
    def count(done, straight):
        global copied, direct
        with counting:
            copied += done
            shared[:] = copied.to_bytes(8, "big")
            direct += done * straight
        return done
    def copy(source, target, many, **offsets):
        time.sleep(seconds)
        return count(real(source, target, min(many, 1 << 20), **offsets), False)
    def pwrite(target, data, offset):
        if not fcntl.fcntl(target, fcntl.F_GETFL) & os.O_DIRECT:
            return write(target, data, offset)
        time.sleep(seconds)
        return count(write(target, data[: 1 << 20], offset), True)
    os.copy_file_range, os.pwrite = copy, pwrite

def child(ask, answers):
    code, said = 0, ""
    writer.MARK, writer.PAUSE = ask["mark"], 0
    if ask["hands"] > 1:
        writer.SMALL, os.cpu_count = 0, lambda: ask["hands"]
    if ask["slow"]:
        slow(ask["slow"])
    if ask["at"] is not None:
        watch(ask)
    try:
        plan = Plan.from_json(Path(ask["plan"]).read_text())
        executor.execute(plan, Path(ask["output"]), overwrite=ask["overwrite"], durable=ask["durable"], progress=False)
    except LayercutError as error:
        code, said = 1, str(error)
    answers.write(json.dumps({"code": code, "said": said, "copied": copied, "direct": direct, "steps": steps}))
    answers.flush()

for line in sys.stdin:
    ask = json.loads(line)
    if not warm:  # what is made at its first use is not made again by every child
        with tempfile.TemporaryDirectory() as place:
            executor.execute(Plan.from_json(Path(ask["plan"]).read_text()), Path(place, "out"), progress=False)
        gc.freeze()
        warm = True
    reading, writing = os.pipe()
    shared[:] = bytes(8)
    pid = os.fork()
    if not pid:
        os.close(reading)
        child(ask, os.fdopen(writing, "w"))
        os._exit(0)
    os.close(writing)
    if ask["copied"] is not None:
        while int.from_bytes(shared[:], "big") < ask["copied"] and not select.select([reading], [], [], 0)[0]:
            time.sleep(0.0002)
        time.sleep(ask["pause"])
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reading) as answers:
        text = answers.read()
    os.waitpid(pid, 0)
    print(text or "null", flush=True)
"""


@pytest.fixture(scope="module")
def zygote():
    environment = {**os.environ, "PYTHONPATH": str(Path(executor.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(plan, output, *, copied=None, pause=0.0, at=None, crash="kill", overwrite=False, mark=100, slow=0.0, hands=1, durable=True):
        """What a run says at its end, or None when it was killed: when it had `copied` bytes and some time later, or before change `at`."""
        question = {"plan": str(plan), "output": str(output), "copied": copied, "pause": pause, "at": at, "crash": crash}
        how = {"overwrite": overwrite, "mark": mark, "slow": slow, "hands": hands, "durable": durable}
        process.stdin.write(json.dumps(question | how) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    assert process.wait(HANGS) == 0


@pytest.fixture
def source(byte_checkpoint):
    folder = byte_checkpoint("source", layers=6, shards=2)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_bytes(b"")
    return folder


@pytest.fixture
def plan(source):
    return plan_for({"source": source}, LAYERS, shards=3)


@pytest.fixture
def work(plan, tmp_path):
    """A file of the plan, and a folder of its own for the output, so that nothing else lies beside it."""
    (tmp_path / "plan.json").write_text(plan.to_json())
    execute(plan, tmp_path / "clean", progress=False)
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


# At every single change of the disk

NEVER = 10**9  # counts changes, puts nothing on the disk for good (which takes long), and ends undisturbed


@pytest.mark.parametrize("crashes", [("kill",), ("truncate", "zeros")])
def test_a_crash_before_any_change(zygote, work, tmp_path, crashes):
    """A kill, or a power cut that loses what was not put on the disk, or leaves zeros there: first in the run, then in the next."""
    clean, chance = stable(tmp_path / "clean"), random.Random(len(crashes))
    run, out, at, resumed = tmp_path / "plan.json", work / "out", 0, 0
    while True:
        at += 1
        first = zygote(run, out, at=at, crash=crashes[at % len(crashes)])
        if first is None and not out.exists():
            second = zygote(run, out, at=chance.randint(1, 150), crash=chance.choice(crashes))
            resumed += second is None
        if out.exists():
            assert stable(out) == clean
        if not out.exists() or read_journal(work / STAGING / "journal").identity is not None:
            assert zygote(run, out, at=NEVER)["code"] == 0, at
        else:  # killed when all was done
            assert zygote(run, out, at=NEVER)["said"] == f"{out}/ is not empty; choose another folder or pass --overwrite"
        assert stable(out) == clean, at
        assert {path.name for path in work.rglob("*")} - {"out", STAGING, "lock"} == {path.name for path in out.rglob("*")}
        if first is not None:
            break
        shutil.rmtree(work)
        work.mkdir()
    assert first["steps"] == at - 1 > 100
    assert resumed > 20


def test_a_kill_before_any_change_of_an_overwrite(zygote, work, tmp_path):
    """The older folder is there, or beside it, or the new one is complete."""
    clean = stable(tmp_path / "clean")
    write_checkpoint(tmp_path / "older", byte_tensors(3, "older"), {"num_hidden_layers": 3}, shards=4)
    older, between, at = tree(tmp_path / "older"), 0, 0
    run, out, aside = tmp_path / "plan.json", work / "out", work / ".out.layercut-old"
    while True:
        at += 1
        shutil.copytree(tmp_path / "older", out)
        done = zygote(run, out, at=at, overwrite=True)
        if not out.exists():
            between += 1
            assert tree(aside) == older
        else:
            assert tree(out) == older or stable(out) == clean
        assert zygote(run, out, at=NEVER, overwrite=True)["code"] == 0, at
        assert stable(out) == clean
        assert [path.name for path in work.iterdir()] == ["out"]
        if done is not None:
            break
        shutil.rmtree(out)
    assert between == 1
    assert done["steps"] > 100


# At moments that nothing announces


MB = 1 << 20


@pytest.fixture
def large(tmp_path):
    """60 MB in four shards, and a plan of four shards that takes them apart: layers in reverse, and a tensor that is zero."""
    chance, size = random.Random(0), 5 * MB
    tensors = {"model.embed_tokens.weight": ("BF16", (2, size // 4), chance.randbytes(size))}
    tensors |= {f"model.layers.{layer}.w": ("BF16", (size // 2,), chance.randbytes(size)) for layer in range(11)}
    folder = write_checkpoint(tmp_path / "source", tensors, {"num_hidden_layers": 11}, shards=4)
    (folder / "tokenizer.json").write_text("{}")
    plan = plan_for({"source": folder}, [("source", layer) for layer in reversed(range(11))], shards=4)
    plan = with_made(plan, lambda tensor: made_of(tensor, weights=()) if tensor.name == "model.layers.3.w" else None)
    (tmp_path / "plan.json").write_text(plan.to_json())
    execute(plan, tmp_path / "clean", progress=False)
    (tmp_path / "work").mkdir()
    return plan


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def watched(out: Path, clean: Path):
    """Looks at the output as often as it can; gives a list of what was seen there that is not complete."""
    sizes = {name: (clean / name).stat().st_size for name in names_in(clean)}
    wrong, stop = [], threading.Event()

    def look():
        while not stop.wait(0.0005):
            try:
                seen = out.stat().st_ino
                found = {entry.name: entry.stat().st_size for entry in os.scandir(out)}
                if out.stat().st_ino != seen:
                    continue  # put away meanwhile
            except FileNotFoundError:
                continue
            report = found.pop("layercut.json", None)
            if report is None or found != {name: size for name, size in sizes.items() if name != "layercut.json"}:
                wrong.append(found)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield wrong
    finally:
        stop.set()
        thread.join()


def in_step(plan):
    """The same with padded headers: the first bytes of every file stand in their block as in their source, and can be written directly."""
    files = []
    for file in plan.actions.files:
        needed = len(encode_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in file.tensors], file.metadata))
        files.append(file.model_copy(update={"header_size": needed + (file.tensors[0].begin - needed) % 4096}))
    return plan.model_copy(update={"actions": plan.actions.model_copy(update={"files": tuple(files)})})


@pytest.mark.parametrize(("hands", "durable", "direct"), [(1, True, True), (3, True, False), (3, False, False)])
def test_kills_at_forty_moments(zygote, large, tmp_path, hands, durable, direct):
    if direct:
        (tmp_path / "plan.json").write_text(in_step(large).to_json())
        shutil.rmtree(tmp_path / "clean")
        execute(in_step(large), tmp_path / "clean", progress=False)
    run, out, work, clean = tmp_path / "plan.json", tmp_path / "work" / "out", tmp_path / "work", stable(tmp_path / "clean")
    how = {"mark": 2 * MB, "slow": 0.004 * hands, "hands": hands, "durable": durable}
    before = tree(tmp_path / "source")

    def put_away():
        out.rename(tmp_path / "trash")  # at once, or the watcher would see it go
        shutil.rmtree(tmp_path / "trash")

    first = zygote(run, out, **how)
    if direct and first["direct"] == 0:
        pytest.skip("the file system knows no direct writes")
    whole = first["copied"]
    assert whole == 55 * MB + 2
    put_away()
    chance, kills, saved = random.Random(7), 0, 0
    with watched(out, tmp_path / "clean") as wrong:
        while kills < 40:
            for share in (1, 0.5, 0.5):  # of the run, and of those that go on
                # Work, not seconds, says when: a run is as often killed early and late, and before and after all copies, on any machine.
                copied = min(whole, int(chance.uniform(-0.1, 1.1) * share * whole))
                killed = zygote(run, out, copied=copied, pause=chance.uniform(0, 0.02), **how) is None
                kills += killed
                if not killed or out.exists():
                    break
                assert {path.name for path in work.iterdir()} <= {STAGING}
            if not out.exists():
                done = zygote(run, out, **how)
                assert done["code"] == 0
                saved += whole - done["copied"]
            assert stable(out) == clean
            assert {path.name for path in work.iterdir()} <= {"out", STAGING}
            put_away()
            shutil.rmtree(work / STAGING, ignore_errors=True)
    assert wrong == []
    assert tree(tmp_path / "source") == before
    assert saved > 3 * whole  # of the last of some fifteen runs


# How far a run goes on


def reads(monkeypatch):
    """The ranges that are copied from now on: (file, begin, end)."""
    real, found = SourceFiles.copy, []

    def copy(self, part, *rest):
        found.append((part.path.name, part.begin, part.end))
        real(self, part, *rest)

    monkeypatch.setattr(SourceFiles, "copy", copy)
    return found


def stopped(monkeypatch, after, error=None):
    """The next run is stopped before a copy, when `after` copies are done."""
    real, calls = SourceFiles.copy, []

    def copy(self, *args):
        if len(calls) == after:
            raise error or KeyboardInterrupt
        calls.append(args)
        real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(SourceFiles, "copy", copy)
        yield


stopped = contextmanager(stopped)


def test_a_run_goes_on_in_the_middle_of_a_file(tmp_path, monkeypatch):
    """One file of one range of 1000 bytes behind a header of 128 bytes, recorded at 300, 600 and 900; stopped at 900."""
    data = random.Random(0).randbytes(1000)
    folder = write_checkpoint(tmp_path / "source", {"model.layers.0.w": ("U8", (1000,), data)}, {"num_hidden_layers": 1})
    plan = plan_for({"source": folder}, [("source", 0)])
    execute(plan, tmp_path / "clean", progress=False)
    monkeypatch.setattr(writer, "MARK", 300)
    monkeypatch.setattr(writer, "PAUSE", 0)
    begin = plan.actions.files[0].tensors[0].begin
    header = (tmp_path / "clean" / "model.safetensors").stat().st_size - 1000
    assert header < 300
    with stopped(monkeypatch, 3), pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", progress=False)
    half = tmp_path / STAGING / "content" / "model.safetensors"
    assert half.stat().st_size == 900
    with half.open("ab") as file:
        file.write(b"never put on the disk")
    found = reads(monkeypatch)
    execute(plan, tmp_path / "out", progress=False)
    assert found == [("model.safetensors", begin + 900 - header, begin + 1000)]
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")


@pytest.mark.parametrize("damage", ["shorter", "header", "link", "gone"])
def test_half_a_file_that_is_not_what_was_recorded_is_written_again(tmp_path, monkeypatch, damage):
    data = random.Random(0).randbytes(1000)
    folder = write_checkpoint(tmp_path / "source", {"model.layers.0.w": ("U8", (1000,), data)}, {"num_hidden_layers": 1})
    plan = plan_for({"source": folder}, [("source", 0)])
    monkeypatch.setattr(writer, "MARK", 300)
    monkeypatch.setattr(writer, "PAUSE", 0)
    with stopped(monkeypatch, 3), pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", progress=False)
    half = tmp_path / STAGING / "content" / "model.safetensors"
    if damage == "shorter":
        os.truncate(half, 899)
    elif damage == "header":
        half.write_bytes(half.read_bytes().replace(b"pt", b"px", 1))
    else:
        half.rename(tmp_path / "elsewhere")
        if damage == "link":
            half.symlink_to(tmp_path / "elsewhere")
    found = reads(monkeypatch)
    execute(plan, tmp_path / "out", progress=False)
    assert len(found) == 4 and found[-1][2] - found[0][1] == 1000
    assert (tmp_path / "out" / "model.safetensors").read_bytes().endswith(data)
    assert damage != "link" or (tmp_path / "elsewhere").stat().st_size == 900


@pytest.mark.parametrize("factor", [None, 2.0])
def test_arithmetic_goes_on_in_the_middle_of_a_tensor(tmp_path, monkeypatch, factor):
    """Marks fall between and inside the elements of tensors of 4 bytes; the bytes are those of the whole."""
    tensors = {f"model.layers.{layer}.w": ("F32", (250,), random.Random(layer).randbytes(1000)) for layer in range(2)}
    tensors = {name: (dtype, shape, bytes(byte & 0x3F for byte in data)) for name, (dtype, shape, data) in tensors.items()}
    folder = write_checkpoint(tmp_path / "source", tensors, {"num_hidden_layers": 2})
    plan = plan_for({"source": folder}, [("source", 0), ("source", 1)])
    how = {"weights": ()} if factor is None else {"factors": (factor,), "dtype": "BF16"}
    plan = with_made(plan, lambda tensor: made_of(tensor, **how))
    execute(plan, tmp_path / "clean", progress=False)
    monkeypatch.setattr(writer, "MARK", 301)
    monkeypatch.setattr(writer, "PAUSE", 0)
    real, calls = writer.write_made, []

    def write_made(made, *rest):
        calls.append(made.nbytes)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(made, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_made", write_made)
        with pytest.raises(KeyboardInterrupt):
            execute(plan, tmp_path / "out", progress=False)
    kept = read_journal(tmp_path / STAGING / "journal").entries["model.safetensors"].size
    assert kept == (tmp_path / STAGING / "content" / "model.safetensors").stat().st_size
    sizes = []
    monkeypatch.setattr(writer, "write_made", lambda made, *rest: sizes.append(made.nbytes) or real(made, *rest))
    execute(plan, tmp_path / "out", progress=False)
    assert sum(sizes) == (tmp_path / "out" / "model.safetensors").stat().st_size - kept > 0
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")


def test_files_that_are_there_are_not_copied_again(plan, tmp_path, monkeypatch):
    execute(plan, tmp_path / "clean", progress=False)
    whole = reads(monkeypatch)
    execute(plan, tmp_path / "other", progress=False)
    monkeypatch.undo()
    for after in range(len(whole)):
        with stopped(monkeypatch, after), pytest.raises(KeyboardInterrupt):
            execute(plan, tmp_path / "out", progress=False)
        done = [name for name, entry in read_journal(tmp_path / STAGING / "journal").entries.items() if entry.digest is not None]
        (tmp_path / STAGING / "content" / "stray.bin").write_bytes(b"x")
        (tmp_path / STAGING / "content" / "stray").mkdir()
        found = reads(monkeypatch)
        execute(plan, tmp_path / "out", progress=False)
        monkeypatch.undo()
        assert found == whole[len(whole) - len(found) :]
        assert len(found) >= len(whole) - after and ("model-00002-of-00003.safetensors" not in done or len(found) < len(whole) - 2)
        assert stable(tmp_path / "out") == stable(tmp_path / "clean")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model-00001-of-00003.safetensors", "templates/chat.jinja"])
@pytest.mark.parametrize("damage", ["other", "shorter", "gone", "pipe"])
def test_a_file_that_is_not_what_was_recorded_is_written_again(plan, tmp_path, monkeypatch, name, damage):
    real = executor.write_report
    monkeypatch.setattr(executor, "write_report", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", progress=False)
    monkeypatch.setattr(executor, "write_report", real)
    path = tmp_path / STAGING / "content" / name
    data = path.read_bytes()
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    elif damage != "gone":
        path.write_bytes(data[:-1] if damage == "shorter" else bytes(byte ^ 1 for byte in data))
    found = reads(monkeypatch)
    execute(plan, tmp_path / "out", progress=False)
    copied = {file for file, _, _ in found}
    whole = {"tokenizer.json": {"tokenizer.json"}, "config.json": set(), "templates/chat.jinja": {"chat.jinja"}}
    assert copied == whole.get(name, {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)})
    if name.startswith("model") and damage == "other":
        assert len(found) == 2  # of three files, one
    execute(plan, tmp_path / "clean", progress=False)
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")


def test_half_of_a_file_that_is_written_again_does_not_pass_for_the_whole(plan, tmp_path, monkeypatch):
    """Its line in the journal is taken back first: a crash may leave it at its full length."""
    name = "model-00001-of-00003.safetensors"
    with stopped(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", progress=False)
    path = tmp_path / STAGING / "content" / name
    whole = path.stat().st_size
    os.truncate(path, 10)
    with stopped(monkeypatch, 0), pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", progress=False)
    os.truncate(path, whole)
    execute(plan, tmp_path / "out", progress=False)
    execute(plan, tmp_path / "clean", progress=False)
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")


def test_the_progress_bar_counts_what_is_there(plan, tmp_path, monkeypatch):
    with stopped(monkeypatch, 4), pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", progress=False)
    totals = []

    @contextmanager
    def meter(total, progress):
        moves = []
        yield moves.append
        totals.append((total, sum(moves)))

    monkeypatch.setattr(executor, "_meter", meter)
    report = execute(plan, tmp_path / "out")
    assert totals == [(sum(file.bytes for file in report.files.values()),) * 2]


def test_what_is_kept_needs_no_space_again(large, tmp_path, monkeypatch):
    out = tmp_path / "work" / "out"
    with stopped(monkeypatch, 7), pytest.raises(KeyboardInterrupt):
        execute(large, out, progress=False)
    entries = read_journal(tmp_path / "work" / STAGING / "journal").entries
    kept = sum(entry.size for entry in entries.values())
    assert kept > 15 * MB
    half = max((tmp_path / "work" / STAGING / "content").glob("*.safetensors"))
    with half.open("rb") as file:
        os.fsync(file.fileno())  # blocks are counted in another way before they have their place
    freed = 0 if half.name in entries else half.stat().st_blocks * 512
    total = sum(path.stat().st_size for path in (tmp_path / "clean").iterdir() if path.name != "layercut.json")
    before = tree(tmp_path)
    for short in (1, 0):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, s=short: type("Usage", (), {"free": total - kept - freed + SLACK - s}))
        if short:
            with pytest.raises(OutputError) as caught:
                execute(large, out, progress=False)
            assert str(caught.value).startswith("needs ") and KEPT not in str(caught.value)
            assert tree(tmp_path) == before  # it can still be gone on from
        else:
            execute(large, out, progress=False)
    assert stable(out) == stable(tmp_path / "clean")


# What is never mixed


def interrupted(plan, out, monkeypatch):
    with stopped(monkeypatch, 4), pytest.raises(KeyboardInterrupt):
        execute(plan, out, progress=False)


def thrown_away(tmp_path, why):
    return f"{tmp_path}/{STAGING}: what an earlier run wrote is thrown away: {why}\n"


def test_another_plan_begins_anew(plan, source, tmp_path, monkeypatch, capsys):
    interrupted(plan, tmp_path / "out", monkeypatch)
    other = plan_for({"source": source}, LAYERS[:3], shards=3)
    found = reads(monkeypatch)
    execute(other, tmp_path / "out", progress=False)
    again = list(found)
    assert capsys.readouterr().err == thrown_away(tmp_path, "it is of another plan")
    execute(other, tmp_path / "clean", progress=False)
    assert found[len(again) :] == again
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("key", ["layercut", "format"])
def test_another_version_begins_anew(plan, tmp_path, monkeypatch, capsys, key):
    interrupted(plan, tmp_path / "out", monkeypatch)
    journal = tmp_path / STAGING / "journal"
    first, rest = journal.read_text().split("\n", 1)
    journal.write_text(json.dumps(json.loads(first) | {key: "other"}) + "\n" + rest)
    execute(plan, tmp_path / "out", progress=False)
    assert capsys.readouterr().err == thrown_away(tmp_path, "it is of another version of layercut")


@pytest.mark.parametrize("text", [None, "", "{", "[]\n", '{"format": 1}\n', "x" * 1000 + "\n"])
def test_a_journal_that_cannot_be_read_begins_anew(plan, tmp_path, monkeypatch, capsys, text):
    interrupted(plan, tmp_path / "out", monkeypatch)
    journal = tmp_path / STAGING / "journal"
    journal.unlink() if text is None else journal.write_text(text)
    execute(plan, tmp_path / "out", progress=False)
    assert capsys.readouterr().err == thrown_away(tmp_path, "it has no journal that this version can read")
    execute(plan, tmp_path / "clean", progress=False)
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")


def test_sources_with_other_values_begin_anew(plan, source, tmp_path, monkeypatch, capsys):
    """The plan is the same, for it knows the structure of the sources only: names, shapes, sizes."""
    interrupted(plan, tmp_path / "out", monkeypatch)
    path = source / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes().replace(b"source:0", b"SOURCE:0"))
    execute(plan, tmp_path / "out", progress=False)
    assert capsys.readouterr().err == thrown_away(tmp_path, "its sources have changed since")
    execute(plan, tmp_path / "clean", progress=False)
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")


def test_sources_that_change_places_begin_anew(tmp_path, monkeypatch, capsys):
    """Two fine-tunes of one model have the same structure, so that the plans are the same but for the folders."""
    for name in "ab":
        write_checkpoint(
            tmp_path / name,
            {k: (d, s, data[::-1]) if name == "b" else (d, s, data) for k, (d, s, data) in byte_tensors(6).items()},
            {"num_hidden_layers": 6},
        )
    layers = [("x", 0), ("y", 1), ("x", 2), ("y", 3)]
    one = plan_for({"x": tmp_path / "a", "y": tmp_path / "b"}, layers, shards=3)
    two = plan_for({"x": tmp_path / "b", "y": tmp_path / "a"}, layers, shards=3)
    assert one.digest == two.digest
    interrupted(one, tmp_path / "out", monkeypatch)
    execute(two, tmp_path / "out", progress=False)
    assert capsys.readouterr().err == thrown_away(tmp_path, "its sources have changed since")
    execute(two, tmp_path / "clean", progress=False)
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")


def test_a_source_that_changes_while_a_run_goes_on(plan, source, tmp_path, monkeypatch):
    """What was copied before is of the old bytes: nothing of it is of use, and nothing stays."""
    interrupted(plan, tmp_path / "out", monkeypatch)
    real, path = SourceFiles.copy, source / "model-00001-of-00002.safetensors"

    def copy(self, part, *rest):
        if part.path != path:
            os.utime(path, ns=(1, 1))  # before this run has opened it, if it needs it at all
        real(self, part, *rest)

    monkeypatch.setattr(SourceFiles, "copy", copy)
    with pytest.raises(executor.CheckpointError) as caught:
        execute(plan, tmp_path / "out", progress=False)
    assert str(caught.value) == f"{path}: was changed while it was copied; run again when nothing writes to it"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_restart_begins_anew_without_a_note(plan, tmp_path, monkeypatch, capsys):
    whole = reads(monkeypatch)
    execute(plan, tmp_path / "clean", progress=False)
    monkeypatch.undo()
    interrupted(plan, tmp_path / "out", monkeypatch)
    found = reads(monkeypatch)
    execute(plan, tmp_path / "out", restart=True, progress=False)
    assert found == whole
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")
    assert capsys.readouterr() == ("", "")


def test_content_that_is_a_link_is_not_followed(plan, tmp_path, monkeypatch):
    interrupted(plan, tmp_path / "out", monkeypatch)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "mine").write_text("mine")
    content = tmp_path / STAGING / "content"
    shutil.rmtree(content)
    content.symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match=rf"^{content} is in the way; remove it$"):
        execute(plan, tmp_path / "out", progress=False)
    assert (tmp_path / "victim" / "mine").read_text() == "mine"


# Errors


def test_a_source_that_vanishes_and_comes_back(plan, source, tmp_path, monkeypatch):
    path = source / "model-00002-of-00002.safetensors"
    real = writer.new_file

    def new_file(target, shown, durable):
        if target.name == "model-00001-of-00003.safetensors":
            path.rename(tmp_path / "away")
        return real(target, shown, durable)

    monkeypatch.setattr(writer, "new_file", new_file)
    with pytest.raises(executor.CheckpointError) as caught:
        execute(plan, tmp_path / "out", progress=False)
    assert str(caught.value) == f"{path}: cannot be read: No such file or directory; {KEPT}"
    monkeypatch.undo()
    (tmp_path / "away").rename(path)
    found = reads(monkeypatch)
    execute(plan, tmp_path / "out", progress=False)
    assert found
    execute(plan, tmp_path / "clean", progress=False)
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("shard", [1, 2, 3])
@pytest.mark.parametrize("call", ["copy", "fsync"])
def test_an_error_of_the_disk_at_any_shard(plan, source, tmp_path, monkeypatch, code, shard, call):
    execute(plan, tmp_path / "earlier", progress=False)
    before = tree(tmp_path)
    name = f"model-0000{shard}-of-00003.safetensors"
    real = {"copy": os.copy_file_range, "fsync": os.fsync}[call]

    def fails(*args, **kwargs):
        target = args[1] if call == "copy" else args[0]
        if str(Path(f"/proc/self/fd/{target}").readlink()).endswith(f"content/{name}"):
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "copy_file_range" if call == "copy" else "fsync", fails)
    with pytest.raises(OutputError) as caught:
        execute(plan, tmp_path / "out", progress=False)
    assert str(caught.value).startswith(f"{tmp_path}/out/{name}: cannot be written: {os.strerror(code)}")
    assert str(caught.value).endswith(f"; {KEPT}") and "\n" not in str(caught.value)
    assert {path: what for path, what in tree(tmp_path).items() if not path.startswith(STAGING)} == before
    monkeypatch.undo()
    execute(plan, tmp_path / "out", progress=False)
    assert stable(tmp_path / "out") == stable(tmp_path / "earlier")
    assert not (tmp_path / STAGING).exists()


@pytest.mark.parametrize("at", range(1, 8))
def test_a_journal_that_cannot_be_written(plan, tmp_path, monkeypatch, at):
    """Half a line of it is all that gets to the disk."""
    execute(plan, tmp_path / "clean", progress=False)
    real, calls = os.write, []

    def write(descriptor, data):
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).endswith("/journal"):
            calls.append(data)
            if len(calls) == at:
                real(descriptor, bytes(data)[:20])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        execute(plan, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    execute(plan, tmp_path / "out", progress=False)
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of about 100 MB."""
    if os.geteuid() or shutil.which("mkfs.ext4") is None or shutil.which("mount") is None:
        pytest.skip("needs root, mkfs.ext4 and mount")
    image, point = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(128 * MB)
    point.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, point], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    yield point
    subprocess.run(["umount", point], check=True)


def test_a_real_disk_that_fills_up(large, small_disk, tmp_path, monkeypatch):
    filler, out = small_disk / "filler", small_disk / "out"
    (small_disk / "earlier").write_text("mine")
    real, calls = SourceFiles.copy, []

    def copy(self, *args):
        calls.append(args)
        if len(calls) == 4:  # somebody else takes the space that was there when it was checked
            with filler.open("wb") as file:
                with pytest.raises(OSError, match="No space left"):
                    while True:
                        file.write(bytes(MB))
                file.truncate(filler.stat().st_size - 8 * MB)
        real(self, *args)

    monkeypatch.setattr(SourceFiles, "copy", copy)
    before = tree(tmp_path / "source")
    with pytest.raises(OutputError) as caught:
        execute(large, out, progress=False)
    text = str(caught.value)
    assert text.startswith(f"{out}/model-0000") and "cannot be written: No space left on device" in text and text.endswith(f"; {KEPT}")
    assert not out.exists()
    assert tree(tmp_path / "source") == before
    monkeypatch.undo()
    with pytest.raises(OutputError, match=r"^needs .* free on .*; free some space or choose another folder$"):
        execute(large, out, progress=False)
    filler.unlink()
    found = reads(monkeypatch)
    execute(large, out, progress=False)
    assert sum(end - begin for _, begin, end in found) < 50 * MB
    assert stable(out) == stable(tmp_path / "clean")
    assert sorted(path.name for path in small_disk.iterdir()) == ["earlier", "lost+found", "out"]


# Two runs, and how people stop one

COMMAND = """
import os, sys, time
from pathlib import Path
from layercut.copying import SourceFiles
real, held, file = SourceFiles.copy, *sys.argv[1:3]
def copy(self, part, target, *rest):
    if os.readlink(f"/proc/self/fd/{target}").endswith(file):
        Path(held).touch()
        while os.path.exists(held):
            time.sleep(0.005)
    real(self, part, target, *rest)
SourceFiles.copy = copy
del sys.argv[1:3]
from layercut.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def command(source, tmp_path):
    """Starts `layercut run` on a recipe. It stops before it copies to the file `at`, and goes on when `held` is removed."""
    (tmp_path / "recipe.yaml").write_text(
        f"model: {source}\nsteps: [{{prune: {{at: '2-3'}}}}]\noutput: {{path: {tmp_path}/out, max_shard_size: 200}}\n"
    )
    started = []

    def start(*arguments, at="no file"):
        environment = {**os.environ, "PYTHONPATH": str(Path(executor.__file__).parents[1])}
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, tmp_path / "held", at, "run", tmp_path / "recipe.yaml", "-q", *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background of a script ignores it
        )  # fmt: skip
        started.append(process)
        if at != "no file":
            wait_for(tmp_path / "held", process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(path, process):
    end = time.monotonic() + HANGS
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, path
        time.sleep(0.005)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_goes_on(command, source, tmp_path, how):
    before = tree(source)
    first = command(at="model-00002-of-00004.safetensors")
    first.send_signal(how)
    said = first.communicate(timeout=HANGS)
    assert first.returncode == 130
    assert (said[0], said[1].strip()) == ("", f"interrupted; {KEPT}")
    assert not (tmp_path / "out").exists()
    assert tree(source) == before
    kept = (tmp_path / STAGING / "content" / "model-00001-of-00004.safetensors").stat().st_mtime_ns
    second = command()
    assert second.wait(HANGS) == 0 and second.stderr.read() == ""
    assert (tmp_path / "out" / "model-00001-of-00004.safetensors").stat().st_mtime_ns == kept
    third = command("--out", str(tmp_path / "clean"))
    assert third.wait(HANGS) == 0
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")
    assert not (tmp_path / STAGING).exists()


def test_a_command_that_restarts(command, tmp_path):
    first = command(at="model-00002-of-00004.safetensors")
    first.kill()
    first.communicate()
    kept = (tmp_path / STAGING / "content" / "model-00001-of-00004.safetensors").stat().st_mtime_ns
    second = command("--restart")
    assert second.wait(HANGS) == 0 and second.stderr.read() == ""
    assert (tmp_path / "out" / "model-00001-of-00004.safetensors").stat().st_mtime_ns > kept


def test_of_two_commands_one_wins(command, tmp_path):
    first = command(at="model-00001-of-00004.safetensors")
    second = command()
    message = f"error: another layercut is writing {tmp_path}/out; wait for it or choose another folder\n"
    assert second.communicate(timeout=HANGS) == ("", message)
    assert second.returncode == 1
    (tmp_path / "held").unlink()
    assert first.wait(HANGS) == 0
    third = command("--out", str(tmp_path / "clean"))
    assert third.wait(HANGS) == 0
    assert stable(tmp_path / "out") == stable(tmp_path / "clean")
    assert not (tmp_path / STAGING).exists()


def test_a_command_that_was_killed_after_the_rename_is_done(command, plan, source, tmp_path, monkeypatch):
    """It has its name, the journal is still there: the same command tidies up and reports, and only for this plan."""
    real = executor.publish

    def publish(place, overwrite):
        real(place, overwrite)
        shutil.copytree(place.staging, tmp_path / "copy")

    monkeypatch.setattr(executor, "publish", publish)
    report = execute(plan, tmp_path / "out", progress=False)
    before = tree(tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(writer, "Writer", None)
    for allowed in ({}, {"overwrite": True}):
        shutil.copytree(tmp_path / "copy", tmp_path / STAGING)
        assert execute(plan, tmp_path / "out", progress=False, **allowed) == report
        assert tree(tmp_path / "out") == before and not (tmp_path / STAGING).exists()
    other = plan_for({"source": source}, LAYERS[:2], shards=3)
    for run in (
        lambda: execute(other, tmp_path / "out", progress=False),
        lambda: execute(plan, tmp_path / "out", restart=True, progress=False),
    ):
        shutil.copytree(tmp_path / "copy", tmp_path / STAGING, dirs_exist_ok=True)
        with pytest.raises(OutputError, match=r"/ is not empty; choose another folder or pass --overwrite$"):
            run()
        assert tree(tmp_path / "out") == before


def test_a_report_of_somebody_else_is_not_taken_for_ours(plan, tmp_path, monkeypatch):
    interrupted(plan, tmp_path / "out", monkeypatch)
    shutil.rmtree(tmp_path / STAGING / "content")
    with (tmp_path / STAGING / "journal").open("a") as journal:
        journal.write(json.dumps({"file": "layercut.json", "bytes": 2, "sha256": "0" * 64}) + "\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "layercut.json").write_text("{}")
    with pytest.raises(OutputError, match="is not empty"):
        execute(plan, tmp_path / "out", progress=False)
