"""Which schedule is picked, what is said of it, and that both give the same numbers through every door."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layercut
from layercut import memory, schedules
from layercut.calibration import TextCalibration
from layercut.checkpoint import open_checkpoint
from layercut.cli import main
from layercut.engine import Running, measure
from layercut.errors import CalibrationError
from layercut.loading import settled_dtype
from layercut.memory import Room
from layercut.metrics import Angular, Cosine
from layercut.resident import Resident
from layercut.schedules import fits, loaded_size, pick_schedule
from layercut.streaming import Source, Streamed

Tiny = Callable[..., Path]
CPU = torch.device("cpu")


def source(folder: Path) -> Source:
    return Source("m", open_checkpoint(folder), 6, "model.layers.")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how much memory is free."""

    def give(size: int) -> None:
        monkeypatch.setattr(memory, "free_memory", lambda: {"memory": size})

    return give


def test_what_fits_is_resident(tiny: Tiny, free: Callable[[int], None]) -> None:
    free(10**9)
    schedule, reason = pick_schedule([source(tiny())], CPU, None)
    assert isinstance(schedule, Resident)
    assert reason == "resident: 255.6 kB of weights in float32"


def test_what_does_not_fit_is_streamed(tiny: Tiny, free: Callable[[int], None]) -> None:
    free(300_000)
    schedule, reason = pick_schedule([source(tiny())], CPU, None)
    assert isinstance(schedule, Streamed)
    expected = "streamed layer by layer: 255.6 kB of weights in float32 and what running them takes are more than the memory that is free"
    assert reason == expected


def test_a_narrow_dtype_may_fit(tiny: Tiny, free: Callable[[int], None]) -> None:
    free(300_000)
    assert isinstance(pick_schedule([source(tiny())], CPU, "bfloat16").schedule, Resident)


def test_several_processes_share_what_is_free(tiny: Tiny, free: Callable[[int], None]) -> None:
    free(500_000)
    assert isinstance(pick_schedule([source(tiny())], CPU, None).schedule, Resident)
    assert isinstance(pick_schedule([source(tiny())], CPU, None, sharers=2).schedule, Streamed)


def test_all_models_count(tiny: Tiny, free: Callable[[int], None]) -> None:
    free(500_000)
    both = [source(tiny()), source(tiny(seed=1))._replace(alias="n")]
    assert isinstance(pick_schedule(both, CPU, None).schedule, Streamed)


def test_too_little_even_for_a_layer(tiny: Tiny) -> None:
    with pytest.raises(
        CalibrationError, match=r"^a layer of model 'm' takes [0-9.]+ kB .* 0 bytes are left \(1.0 MB as asked\); give more"
    ):
        pick_schedule([source(tiny())], CPU, None, 10**6)


def test_a_quantised_model_is_never_streamed_unasked(tiny: Tiny, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    free(1000)
    loaded: list[Path] = []
    monkeypatch.setattr(schedules, "load_backbone", lambda folder, *rest: loaded.append(folder) or torch.nn.Identity())
    monkeypatch.setattr(schedules, "Runner", lambda *rest: rest)
    monkeypatch.setattr(schedules, "Resident", lambda runners, device: ("resident", device))
    one = source(tiny())
    one.checkpoint.config["quantization_config"] = {"quant_method": "fp8"}
    assert pick_schedule([one], CPU, None).schedule == ("resident", CPU)
    assert loaded == [one.checkpoint.folder]


def test_settled_dtype(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny(dtype="bfloat16"))
    elsewhere = torch.device("cuda")
    assert settled_dtype(checkpoint, CPU) == torch.float32
    assert settled_dtype(checkpoint, CPU, "float16") == torch.float16
    assert settled_dtype(checkpoint, elsewhere) == torch.bfloat16
    checkpoint.config["dtype"] = "float16"
    assert settled_dtype(checkpoint, elsewhere) == torch.float16
    del checkpoint.config["dtype"]
    assert settled_dtype(checkpoint, elsewhere) == torch.bfloat16


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "t.txt").write_text("\n\n".join(f"text number {number} of some length" for number in range(10)), encoding="utf-8")
    return tmp_path / "t.txt"


def test_measure_gives_the_same_either_way(tiny: Tiny, free: Callable[[int], None], text: Path) -> None:
    def measured(size: int) -> Any:
        free(size)
        calibration = TextCalibration(path=str(text), max_length=20, batch_size=3)
        return measure(Running({"m": open_checkpoint(tiny())}, {"m": 6}, progress=False), [Angular(), Cosine()], calibration)

    whole, streamed = measured(10**9), measured(300_000)
    assert streamed.tables == whole.tables and (streamed.samples, streamed.tokens) == (whole.samples, whole.tokens)
    assert whole.details.pop("schedule").startswith("resident: ") and streamed.details.pop("schedule").startswith(
        "streamed layer by layer: "
    )
    assert streamed.details == whole.details


def recipe(tmp_path: Path, model: Path, text: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(
        f"model: {model}\ncalibration: {{source: text, path: {text}, max_length: 20}}\n"
        f"steps: [{{prune: {{layers: 2}}}}]\noutput: {tmp_path}/out\n",
        encoding="utf-8",
    )
    return path


def test_memory_of_the_python_api(tiny: Tiny, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    monkeypatch.setattr(schedules, "room_of", lambda memory=None, free=None: asked.append(memory) or memory_room(memory))
    layercut.plan_recipe(recipe(tmp_path, tiny(), text), memory=10**9, progress=False)
    assert asked == [None, 10**9]


def memory_room(size: int | None) -> memory.Room:
    return memory.Room(size or 10**9, "asked", asked=size is not None)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_memory_of_the_command_line(tiny: Tiny, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, str(recipe(tmp_path, tiny(), text)), "--memory", "1MB", "-q"]) == 1
    assert "give more with --memory" in capsys.readouterr().err
    assert main([command, str(recipe(tmp_path, tiny(), text)), "--memory", "8 parsecs", "-q"]) == 2
    assert "Invalid value for '--memory': expected a size such as 5GB, 500MB or 5GiB" in capsys.readouterr().err


def test_what_fits(tiny: Callable[..., Path]) -> None:
    """The weights in the dtype that they are run in, and a fifth more; what cannot be streamed is held unless the user set a limit."""
    cpu, model = CPU, open_checkpoint(tiny("llama", dtype="bfloat16"))
    stored = sum(tensor.nbytes for tensor in model.tensors.values())
    assert loaded_size([model], cpu, None) == 2 * stored and loaded_size([model, model], cpu, "bfloat16") == 2 * stored
    enough = int(1.2 * 2 * stored) + 1
    assert fits([model], cpu, None, Room(enough, "")) and not fits([model], cpu, None, Room(enough - 2, ""))
    assert fits([model], cpu, "bfloat16", Room(enough - 2, "")) and not fits([model, model], cpu, None, Room(enough, ""))
    model.config["quantization_config"] = {"quant_method": "gptq"}
    assert fits([model], cpu, None, Room(0, "free")) and not fits([model], cpu, None, Room(0, "asked", asked=True))
