"""Resident, streamed and in two processes: the same numbers for every family, with pads and without, in fp32 and bf16."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import families
import pytest
import torch
from families import CELLS, Cell

from layercut.plan import Measurement

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5
ACCELERATE = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("families")
    families.prepare(made)
    return made


@pytest.fixture(scope="module")
def resident(folder: Path) -> dict[Cell, Measurement]:
    return {cell: families.measured(folder, cell, "resident") for cell in CELLS}


class Launched(NamedTuple):
    """What both processes of a launch say, by `cell/way`."""

    main: dict[str, Measurement]
    other: dict[str, Measurement]


@pytest.fixture(scope="module")
def launched(folder: Path) -> Callable[..., Launched]:
    def launch(name: str, launcher: tuple[str, ...], *options: str) -> Launched:
        out = folder / name
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LAYERCUT_CACHE": str(folder / "cache")}
        command = [sys.executable, *launcher, families.__file__, str(folder), str(out), *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return Launched(_read(out), _read(out.with_suffix(".other")))

    return launch


def _read(path: Path) -> dict[str, Measurement]:
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: Measurement.model_validate_json(text) for name, text in rows}


@pytest.fixture(scope="module")
def by_accelerate(launched: Callable[..., Launched]) -> Launched:
    """Two processes that accelerate launched, in both schedules."""
    return launched("accelerate", ACCELERATE, "resident", "streamed")


@pytest.fixture(scope="module")
def by_torchrun(launched: Callable[..., Launched]) -> Launched:
    """Two processes of torchrun, in which an `Accelerator` made a process group of gloo before."""
    return launched("torchrun", TORCHRUN, "resident", "--accelerator")


def off(one: Measurement, other: Measurement) -> float:
    """Largest difference of a mean or a standard error."""
    assert (one.samples, one.tokens) == (other.samples, other.tokens)
    assert [table.metric for table in one.tables] == [table.metric for table in other.tables]
    pairs = [(getattr(a, part), getattr(b, part)) for a, b in zip(one.tables, other.tables, strict=True) for part in ("mean", "stderr")]
    return max(float((torch.tensor(a).double() - torch.tensor(b).double()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_streamed_is_resident(folder: Path, resident: Mapping[Cell, Measurement], cell: Cell) -> None:
    streamed = families.measured(folder, cell, "streamed")
    assert streamed.details["schedule"].startswith("streamed layer by layer")
    assert resident[cell].details["schedule"].startswith("resident")
    assert off(streamed, resident[cell]) < TOLERANCE


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_two_processes_of_accelerate_are_one(by_accelerate: Launched, resident: Mapping[Cell, Measurement], cell: Cell) -> None:
    for way in families.WAYS:
        found = by_accelerate.main[f"{cell.name}/{way}"]
        assert found.details["schedule"].startswith(way) and found.details["ranks"] == 2
        assert found.details["dtype"] == {"m": cell.dtype}
        assert off(found, resident[cell]) < TOLERANCE


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_two_processes_with_a_group_of_gloo_are_one(by_torchrun: Launched, resident: Mapping[Cell, Measurement], cell: Cell) -> None:
    found = by_torchrun.main[f"{cell.name}/resident"]
    assert found.details["ranks"] == 2
    assert off(found, resident[cell]) < TOLERANCE


def test_every_rank_is_given_the_same(by_accelerate: Launched, by_torchrun: Launched) -> None:
    assert by_accelerate.main == by_accelerate.other and len(by_accelerate.main) == 2 * len(CELLS)
    assert by_torchrun.main == by_torchrun.other and len(by_torchrun.main) == len(CELLS)


def test_the_cells_differ(resident: Mapping[Cell, Measurement]) -> None:
    """What is compared above is not one number over and over: dtypes, batches and families all show."""
    assert {measurement.samples for measurement in resident.values()} == {11}
    for name, texts in families.TEXTS.items():
        lengths = sorted(map(len, texts))  # a token a byte
        assert {measurement.tokens for cell, measurement in resident.items() if cell.text == name} == {sum(lengths)}
        assert any(one != other for one, other in zip(lengths[::2], lengths[1::2], strict=False)) == (name == "padded")
    means = [measurement.tables[1].mean for measurement in resident.values()]
    assert len(set(means)) == len(CELLS)
    for kind in families.FAMILIES:
        for text in families.TEXTS:
            exact, narrow = (resident[Cell(kind, text, dtype)] for dtype in families.DTYPES)
            assert off(exact, narrow) > 1e-7
    assert all(min(mean[at][at + 1] for at in range(4)) > 1e-4 for mean in means)
