"""sharing.py: which files can share blocks is found, and on such a filesystem a cut takes almost no room."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layercut import copying, run_recipe, sharing
from layercut.checkpoint import open_checkpoint
from layercut.errors import LayercutError, OutputError
from layercut.executor import execute
from layercut.plan import OutputFile, Plan, TensorCopy
from layercut.planner import build_plan
from layercut.recipe import load_recipe
from layercut.shards import Grid
from layercut.sharing import Filesystem, Mount, mount_of, read_mounts, sharing_filesystem, whole_blocks
from layercut.source import resolve
from layercut.verify import verify
from layercut.ways import by_direct_write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from synthetic import llama, write
from volumes import NoVolumeError, used, volume

CUT = "steps: [{prune: {at: '20-25'}}]"
DOUBLE = "steps: [{duplicate: {at: '8-23'}}]"
REPEAT = "steps: [{duplicate: {at: [3, 17, 30]}}, {prune: {at: [0, 9]}}]"
TABLE = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 8:2 / /data rw,noatime shared:5 master:1 - xfs /dev/sdb1 rw,attr2
31 22 8:3 / /data/in\\040ner\\134\\011 rw - btrfs /dev/sdc1 rw,subvol=/
32 22 8:4 / /dat rw - bcachefs /dev/sdd1 rw
33 30 0:40 / /over rw - tmpfs none rw
34 30 8:2 /sub /over rw - xfs /dev/sdb1 rw
"""


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a mount table in the place of the system's."""

    def write_table(text: str) -> None:
        (tmp_path / "mountinfo").write_text(text)
        monkeypatch.setattr(sharing, "MOUNTS", tmp_path / "mountinfo")

    return write_table


def recipe_in(folder: Path, source: Path, steps: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"model: {source}\n{steps}\n")
    return path


def only(folder: Path, kind: str, device: str = "8:9") -> str:
    """A table in which `folder` is a mount point of its own."""
    return f"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n40 22 {device} / {folder} rw - {kind} /dev/sde1 rw\n"


def test_the_mount_table_is_read(table: Callable[[str], None]) -> None:
    table(TABLE)
    assert read_mounts() == (
        Mount("8:1", "/", "ext4"),
        Mount("8:2", "/data", "xfs"),
        Mount("8:3", "/data/in ner\\\t", "btrfs"),
        Mount("8:4", "/dat", "bcachefs"),
        Mount("0:40", "/over", "tmpfs"),
        Mount("8:2", "/over", "xfs"),
    )


@pytest.mark.parametrize(
    ("path", "device"),
    [
        ("/", "8:1"), ("/home/x", "8:1"), ("/data", "8:2"), ("/data/x", "8:2"), ("/database", "8:1"), ("/dat/x", "8:4"),
        ("/data/in ner\\\t/x", "8:3"), ("/data/in ner", "8:2"), ("/over/x", "8:2"),
    ],
)  # fmt: skip
def test_the_deepest_and_last_mount_holds_a_path(table: Callable[[str], None], path: str, device: str) -> None:
    table(TABLE)
    mount = mount_of(path, read_mounts())
    assert mount is not None
    assert mount.device == device


def test_no_mount_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sharing, "MOUNTS", tmp_path / "absent")
    assert read_mounts() == ()
    assert mount_of("/x", ()) is None
    assert sharing_filesystem(tmp_path / "out", [tmp_path / "source"]) is None


@pytest.mark.parametrize("kind", ["ext4", "overlay", "tmpfs", "nfs4", "zfs", "fuse.sshfs"])
def test_other_filesystems_share_nothing(table: Callable[[str], None], tmp_path: Path, kind: str) -> None:
    table(only(tmp_path, kind))
    assert sharing_filesystem(tmp_path / "out", [tmp_path / "source"]) is None


@pytest.mark.parametrize(("kind", "name"), [("btrfs", "Btrfs"), ("bcachefs", "bcachefs")])
def test_filesystem_and_block_are_found(table: Callable[[str], None], tmp_path: Path, kind: str, name: str) -> None:
    table(only(tmp_path, kind))
    found = sharing_filesystem(tmp_path / "not" / "yet" / "out", [tmp_path / "a" / "x", tmp_path / "b" / "x"])
    assert found == Filesystem(name, os.statvfs(tmp_path).f_bsize)
    assert str(Filesystem("XFS", 4096)) == "XFS, 4096"


def test_every_source_must_lie_there(table: Callable[[str], None], tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere" / "blob")
    table(only(tmp_path / "here", "btrfs"))
    assert sharing_filesystem(tmp_path / "here" / "out", [tmp_path / "here" / "x"]) is not None
    assert sharing_filesystem(tmp_path / "here" / "out", [tmp_path / "here" / "x", tmp_path / "elsewhere" / "x"]) is None
    assert sharing_filesystem(tmp_path / "here" / "out", [tmp_path / "here" / "link"]) is None
    assert sharing_filesystem(tmp_path / "elsewhere" / "out", [tmp_path / "here" / "x"]) is None


def test_another_mount_of_the_same_filesystem_will_do(table: Callable[[str], None], tmp_path: Path) -> None:
    (tmp_path / "bind").mkdir()
    table(only(tmp_path, "btrfs") + f"41 40 8:9 /sub {tmp_path}/bind rw - btrfs /dev/sde1 rw\n")
    assert sharing_filesystem(tmp_path / "bind" / "out", [tmp_path / "x"]) is not None


@pytest.mark.parametrize(("flags", "shares"), [(0x77CCCB, True), (1 << 20, True), (0x77CCCB & ~(1 << 20), False), (0, False)])
def test_an_xfs_says_whether_it_was_made_for_sharing(
    table: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: int, shares: bool
) -> None:
    def ioctl(descriptor: int, number: int, buffer: bytearray) -> int:
        assert (number, len(buffer)) == (0x80705864, 112)
        buffer[92:96] = flags.to_bytes(4, "little")
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    table(only(tmp_path, "xfs"))
    assert (sharing_filesystem(tmp_path / "out", [tmp_path / "x"]) is not None) == shares


def test_what_cannot_be_asked_shares_nothing(table: Callable[[str], None], tmp_path: Path) -> None:
    table(only(tmp_path, "xfs"))  # it is none: the question is answered with an error
    assert sharing_filesystem(tmp_path / "out", [tmp_path / "x"]) is None


# The planner asks for every model


def test_the_plan_says_what_it_was_laid_out_for(tmp_path: Path) -> None:
    source = write(tmp_path / "m", llama(2, 512, 1024, 4096, 512, shards=2))
    asked: list[list[Path]] = []

    def shares(files: object) -> Filesystem:
        asked.append(list(files))  # type: ignore[call-overload]
        return Filesystem("Btrfs", 4096)

    def plan(**more: object) -> Plan:
        recipe = load_recipe(recipe_in(tmp_path, source, "steps: [{duplicate: {at: [0, 1]}}]"))
        return build_plan(recipe, resolve=resolve, measure=None, **more)  # type: ignore[arg-type]

    laid = plan(sharing=shares)
    assert asked == [[source / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]]
    assert laid.notes == ("laid out for block sharing (Btrfs, 4096)",)
    assert any(file.header_size for file in laid.actions.files)
    for plain in (plan(), plan(sharing=lambda files: None)):
        assert plain.notes == ()
        assert {file.header_size for file in plain.actions.files} == {None}
    assert Plan.from_json(laid.to_json()) == laid


def test_elsewhere_long_runs_are_laid_out_for_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 256 MB and more; here of 2 MB, so that little is written. Rows of 520 numbers make layers that are no whole blocks."""
    monkeypatch.setattr(Grid, "direct", lambda: Grid(512, 2 << 20))
    source = write(tmp_path / "m", llama(4, 520, 1040, 4096, 520, shards=2))
    recipe = load_recipe(recipe_in(tmp_path, source, "steps: [{duplicate: {at: [1, 2]}}]"))
    plan = build_plan(recipe, resolve=resolve, measure=None, sharing=lambda files: None)  # type: ignore[arg-type]
    assert plan.notes == ("laid out for direct writes",)
    done: list[int] = []

    def spy(*step: int) -> int:
        done.append(by_direct_write(*step))
        return done[-1]

    monkeypatch.setattr(copying, "WHOLE", (spy,))
    execute(plan, tmp_path / "out", progress=False)
    assert list(digests(tmp_path / "out").items()) == list(expected(plan).items())
    assert sum(done) == 0 or sum(done) > 0.6 * plan.weight_bytes  # none where the file system knows no direct writes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "WHOLE", ())
        execute(plan, tmp_path / "buffered", progress=False)
    both = [sorted(folder.glob("*.safetensors")) for folder in (tmp_path / "out", tmp_path / "buffered")]
    assert [path.read_bytes() for path in both[0]] == [path.read_bytes() for path in both[1]]


def test_small_models_are_laid_out_as_ever(byte_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(recipe_in(tmp_path, byte_checkpoint(), CUT.replace("20-25", "2-3")))
    plans = [
        build_plan(recipe, resolve=resolve, measure=None, sharing=shares)  # type: ignore[arg-type]
        for shares in (None, lambda files: Filesystem("XFS", 4096))
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "a header of 1016 bytes cannot be padded to 0"),
        (-4096, "a header of 1016 bytes cannot be padded to -4096"),
        (1008, "a header of 1016 bytes cannot be padded to 1008"),
        (4097, "a header of 1016 bytes cannot be padded to 4097"),
        (10**18, "a header of 999999999999999992 bytes is over the 25000000 that layercut reads; write more shards"),
    ],
)
def test_a_hostile_header_size_writes_nothing(byte_checkpoint: Callable[..., Path], tmp_path: Path, size: int, message: str) -> None:
    recipe = load_recipe(recipe_in(tmp_path, byte_checkpoint(), CUT.replace("20-25", "2-3")))
    plan = build_plan(recipe, resolve=resolve, measure=None)  # type: ignore[arg-type]
    data = json.loads(plan.to_json())
    data["actions"]["files"][0]["header_size"] = size
    with pytest.raises(LayercutError) as caught:
        execute(Plan.from_json(json.dumps(data)), tmp_path / "out", progress=False)
    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()


# On filesystems that share. 512 MB of weights; rows of 768 make layers of 14,158,848 + 3,072 bytes, which are no whole blocks.


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def point(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mounted filesystem that holds a checkpoint in `source`."""
    try:
        with volume(request.param, tmp_path_factory.mktemp("volume"), 3 << 30) as mounted:
            write(mounted / "source", llama(32, 768, 2048, 16000, 768, shards=3))
            yield mounted
    except NoVolumeError as error:
        pytest.skip(str(error))


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every tensor, read by nobody but this function."""
    found = {}
    for tensor in open_checkpoint(folder).tensors.values():
        with (folder / tensor.file).open("rb") as file:
            file.seek(tensor.begin)
            found[tensor.name] = f"{tensor.dtype} {tensor.shape} {hashlib.sha256(file.read(tensor.nbytes)).hexdigest()}"
    return found


def test_the_filesystem_is_found(point: Path, tmp_path: Path) -> None:
    name = {"xfs": "XFS", "btrfs": "Btrfs"}[point.name]
    weights = sorted((point / "source").glob("*.safetensors"))
    assert sharing_filesystem(point / "new" / "out", weights) == Filesystem(name, 4096)
    assert sharing_filesystem(tmp_path / "out", weights) is None
    if point.name == "btrfs":
        subprocess.run(["btrfs", "subvolume", "create", str(point / "sub")], check=True, capture_output=True)
        assert (point / "sub").stat().st_dev != point.stat().st_dev
        assert sharing_filesystem(point / "sub" / "out", weights) == Filesystem(name, 4096)


def expected(plan: Plan) -> dict[str, str]:
    """sha256 of every tensor that a plan copies, read from its source."""
    found = {}
    for file in plan.actions.files:
        for tensor in file.tensors:
            assert isinstance(tensor, TensorCopy)
            with (Path(plan.sources[tensor.model].folder) / tensor.file).open("rb") as source:
                source.seek(tensor.begin)
                found[tensor.name] = f"{tensor.dtype} {tensor.shape} {hashlib.sha256(source.read(tensor.nbytes)).hexdigest()}"
    return found


@pytest.mark.parametrize("steps", [CUT, DOUBLE, REPEAT])
def test_a_cut_takes_almost_no_room(point: Path, steps: str) -> None:
    recipe = recipe_in(point, point / "source", steps)
    before = used(point)
    report = run_recipe(recipe, out=point / "out", progress=False)
    taken = used(point) - before
    size = report.weight_bytes.after
    assert size > 350_000_000
    assert taken <= 0.05 * size, f"only {1 - taken / size:.1%} of the bytes are shared"
    assert verify(point / "out", load=False).ok
    plain = build_plan(load_recipe(recipe), resolve=resolve, measure=None)  # type: ignore[arg-type]
    assert list(digests(point / "out").items()) == list(expected(plain).items()), "tensors, in their natural order"
    shutil.rmtree(point / "out")


def test_room_is_asked_for_only_where_blocks_are_not_shared(point: Path, tmp_path: Path) -> None:
    recipe = recipe_in(point, point / "source", CUT)
    plain = build_plan(load_recipe(recipe), resolve=resolve, measure=None)  # type: ignore[arg-type]
    with (point / "full").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(point).free - (150 << 20))
    report = run_recipe(recipe, out=point / "out", progress=False)
    assert report.weight_bytes.after > 350_000_000
    alien = plain.model_copy(update={"actions": plain.actions.model_copy(update={"files": shifted(plain)})})
    with pytest.raises(OutputError, match=r"^needs [0-9.]+ MB, [0-9.]+ MB free on "):
        execute(alien, point / "other", progress=False)
    shutil.rmtree(point / "out")
    (point / "full").unlink()


def shifted(plan: Plan) -> tuple[OutputFile, ...]:
    """The same files with headers of another size: nothing is in step with its source."""
    return tuple(file.model_copy(update={"header_size": 64_000 + 8}) for file in plan.actions.files)


@pytest.mark.parametrize(
    ("begin", "end", "at", "bytes_"),
    [(0, 10, 0, 8), (0, 10, 1, 0), (1, 10, 5, 4), (1, 10, 2, 0), (1, 3, 1, 0), (5, 7, 1, 0), (4, 8, 400, 4), (0, 0, 0, 0), (3, 13, 7, 8)],
)
def test_whole_blocks(begin: int, end: int, at: int, bytes_: int) -> None:
    assert whole_blocks(begin, end, at, 4) == bytes_


def test_the_same_cut_elsewhere_holds_the_same_tensors(point: Path, tmp_path: Path) -> None:
    recipe = recipe_in(point, point / "source", CUT)
    reports = [run_recipe(recipe, out=folder / "out", progress=False) for folder in (point, tmp_path)]
    assert reports[0].layers == reports[1].layers
    assert digests(point / "out") == digests(tmp_path / "out")
    for folder in (point, tmp_path):
        shutil.rmtree(folder / "out")


def test_the_plan_decides_not_the_place_where_it_is_run(point: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_in(point, point / "source", "steps: [{keep: {at: '0-3'}}]"))
    for shares in (None, lambda files: Filesystem("XFS", 4096)):
        plan = build_plan(recipe, resolve=resolve, measure=None, sharing=shares)  # type: ignore[arg-type]
        for folder in (point / "out", tmp_path / "out"):
            execute(plan, folder, overwrite=True, progress=False)
        both = [sorted(folder.glob("*.safetensors")) for folder in (point / "out", tmp_path / "out")]
        assert [path.read_bytes() for path in both[0]] == [path.read_bytes() for path in both[1]]
    for folder in (point, tmp_path):
        shutil.rmtree(folder / "out")


def test_an_xfs_made_without_sharing(tmp_path: Path) -> None:
    try:
        with volume("xfs", tmp_path, 512 << 20, "-m", "reflink=0") as mounted:
            assert sharing_filesystem(mounted / "out", [mounted / "x"]) is None
    except NoVolumeError as error:
        pytest.skip(str(error))
