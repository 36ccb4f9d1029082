"""The streamed schedule gives the numbers of the resident one, to the last bit, and so do two processes; each weight is read once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from families import COMMON, KINDS, configs, save

from layercut import streaming
from layercut.accumulators import Accumulators
from layercut.architecture import find_stack
from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.errors import CalibrationError, CheckpointError, LayercutError, OutputError, RefusedError
from layercut.loading import load_backbone, quiet
from layercut.memory import Room
from layercut.metrics import CKA, Angular, Cosine, Linear, Metric
from layercut.plan import Plan, Table
from layercut.resident import Resident
from layercut.runner import Runner
from layercut.streaming import Source, Streamed
from layercut.tokens import Sample

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
PLENTY, NOTHING = Room(10**12, "plenty"), Room(0, "nothing")
METRICS: tuple[Metric, ...] = (Angular(), Angular(token="all"), Cosine(), Linear(), CKA())


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    made: dict[tuple[str, torch.dtype], Checkpoint] = {}

    def make(kind: str, dtype: torch.dtype = torch.float32) -> Checkpoint:
        if (kind, dtype) not in made:
            made[kind, dtype] = save(tmp_path_factory.mktemp(kind), configs()[kind], dtype)
        return made[kind, dtype]

    return make


def batches(*lengths: tuple[int, ...]) -> list[list[Sample]]:
    generator = torch.Generator().manual_seed(1)
    number = iter(range(100))
    return [[Sample(next(number), torch.randint(3, 98, (length,), generator=generator).tolist()) for length in batch] for batch in lengths]


PADDED = batches((12, 9), (12, 12), (5, 12))
UNPADDED = batches((12, 12), (12, 12), (9, 9))


class Result(NamedTuple):
    tables: tuple[Table, ...]
    streamed: Streamed | None


def source(checkpoint: Checkpoint, alias: str = "m") -> Source:
    return Source(alias, checkpoint, find_stack(checkpoint).depth, find_stack(checkpoint).prefix)


def resident(checkpoint: Checkpoint, work: list[list[Sample]], dtype: torch.dtype, metrics: tuple[Metric, ...] = METRICS) -> Result:
    one = source(checkpoint)
    with quiet():
        backbone = load_backbone(checkpoint.folder, CPU, str(dtype).removeprefix("torch."))
        schedule = Resident([Runner(one.alias, backbone, one.depth, one.prefix)], CPU)
        accumulators = Accumulators(schedule.models, metrics)
        schedule.run(work, accumulators)
    return Result(accumulators.tables(), None)


def streamed(
    folder: Path,
    checkpoints: list[Checkpoint],
    work: list[list[Sample]],
    dtype: torch.dtype = torch.float32,
    room: Room = PLENTY,
    metrics: tuple[Metric, ...] = METRICS,
) -> Result:
    sources = [source(checkpoint, f"m{number}" if number else "m") for number, checkpoint in enumerate(checkpoints)]
    schedule = Streamed(sources, CPU, {one.alias: dtype for one in sources}, room, room, folder / "spill", progress=False)
    accumulators = Accumulators(schedule.models, metrics)
    schedule.run(work, accumulators)
    return Result(accumulators.tables(), schedule)


def near(found: tuple[Table, ...], expected: tuple[Table, ...], tolerance: float) -> None:
    for table, twin in zip(found, expected, strict=True):
        assert (table.metric, table.a, table.b) == (twin.metric, twin.a, twin.b)
        for part in ("mean", "stderr"):
            pair = [torch.tensor(getattr(one, part), dtype=torch.float64) for one in (table, twin)]
            torch.testing.assert_close(*pair, rtol=0, atol=tolerance)


# The same numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_is_resident_to_the_last_bit(family: Callable[..., Checkpoint], tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Without room for the states of a whole batch, samples are handed over one by one, and added up in that order."""
    checkpoint = family(kind, dtype)
    for work in (PADDED, UNPADDED):
        whole = resident(checkpoint, work, dtype)
        for room in (PLENTY, NOTHING):
            found = streamed(tmp_path, [checkpoint], work, dtype, room)
            near(found.tables, whole.tables, 0 if room is PLENTY else 1e-12)
            assert found.streamed is not None and (found.streamed.spilled > 0) == (room is NOTHING)
    assert all(max(max(row) for row in table.mean) > 0 for table in whole.tables)


def test_bfloat16_weights_are_widened(family: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """Of a 16-bit checkpoint the arithmetic is float32 on a CPU, as in memory."""
    checkpoint = family("llama", torch.bfloat16)
    assert streamed(tmp_path, [checkpoint], PADDED).tables == resident(checkpoint, PADDED, torch.float32).tables


def test_two_models(family: Callable[..., Checkpoint], tmp_path: Path) -> None:
    first, second = family("llama"), family("qwen3")
    found = streamed(tmp_path, [first, second], PADDED, metrics=(Cosine(),))
    assert [(table.a, table.b) for table in found.tables] == [("m", "m"), ("m", "m1"), ("m1", "m1")]
    for checkpoint, table in ((first, found.tables[0]), (second, found.tables[2])):
        own = resident(checkpoint, PADDED, torch.float32, (Cosine(),)).tables[0]
        torch.testing.assert_close(torch.tensor(table.mean), torch.tensor(own.mean), rtol=0, atol=1e-12)


def test_no_batch_at_all(family: Callable[..., Checkpoint], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"^no sample has a token"):
        streamed(tmp_path, [family("llama")], [], metrics=(Cosine(),))


# Reading


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("room", [PLENTY, NOTHING], ids=["ahead", "in turn"])
def test_each_weight_is_read_once(family: Callable[..., Checkpoint], tmp_path: Path, kind: str, room: Room) -> None:
    checkpoint = family(kind)
    expected = dict.fromkeys((str(checkpoint.folder / name) for name in checkpoint.files), 0)
    for name, tensor in checkpoint.tensors.items():
        if name != "lm_head.weight":
            expected[str(checkpoint.folder / tensor.file)] += tensor.nbytes
    found = streamed(tmp_path, [checkpoint], PADDED, room=room).streamed
    assert found is not None and found.read == expected
    assert len(checkpoint.files) > 2


def test_one_layer_is_in_memory_at_a_time(family: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[list[int]] = []

    class Watched(streaming.Skeleton):
        def output(self, call: Any, layer: Any, state: torch.Tensor) -> torch.Tensor:
            loaded.append([at for at, one in enumerate(self.layers) if all(not part.is_meta for part in one.parameters())])
            assert all(part.is_meta for part in self.model.parameters())
            return super().output(call, layer, state)

    monkeypatch.setattr(streaming, "Skeleton", Watched)
    streamed(tmp_path, [family("llama")], PADDED)
    assert loaded == [[0]] * 3 + [[1]] * 3 + [[2]] * 3 + [[3]] * 3


def test_nothing_stays_on_disk(family: Callable[..., Checkpoint], tmp_path: Path) -> None:
    streamed(tmp_path, [family("llama")], PADDED, room=NOTHING)
    assert list((tmp_path / "spill").iterdir()) == []


# What cannot be done


def test_no_room_on_the_disk(family: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage(1000))
    with pytest.raises(
        OutputError, match=r"spill: states take \d+ bytes on disk, where 1000 are free; use fewer samples or tokens, or set"
    ):
        streamed(tmp_path, [family("llama")], PADDED, room=NOTHING)


def test_less_memory_than_a_layer_takes(family: Callable[..., Checkpoint], tmp_path: Path) -> None:
    room = Room(10_000, "1.0 GB as asked", asked=True)
    message = (
        r"^a layer of model 'm' takes 7\d\.\d kB with what loading it takes, and 10\.0 kB are left \(1\.0 GB as asked\); "
        r"give more with --memory$"
    )
    with pytest.raises(CalibrationError, match=message):
        streamed(tmp_path, [family("llama")], PADDED, room=room)


def test_state_that_layers_pass_on_beside_the_stream_is_refused(tmp_path: Path) -> None:
    config = transformers.RwkvConfig(vocab_size=128, hidden_size=32, num_hidden_layers=4, attention_hidden_size=32)
    checkpoint = save(tmp_path / "rwkv", config)
    message = (
        r"rwkv: this model cannot be streamed layer by layer: layer 1 is given more of what layers before it made than the state; hold it"
    )
    with pytest.raises(RefusedError, match=message):
        streamed(tmp_path, [checkpoint], PADDED)


def test_a_quantised_model_is_refused(family: Callable[..., Checkpoint], tmp_path: Path) -> None:
    whole = family("llama")
    folder = tmp_path / "q"
    folder.mkdir()
    for path in whole.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match=r"a quantised model cannot be streamed layer by layer; hold it in memory"):
        streamed(tmp_path, [open_checkpoint(folder)], PADDED)


def test_weights_that_layers_share_are_not_streamed(tmp_path: Path) -> None:
    """Zamba's file holds the weights of its attention once, with the first layer that has any."""
    kinds = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
    sizes = {**COMMON, "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4, "num_key_value_heads": 4}
    checkpoint = save(tmp_path / "zamba", transformers.ZambaConfig(**{**sizes, "layers_block_type": kinds}))
    with pytest.raises(RefusedError, match=r"cannot be streamed layer by layer: layer 3 shares weights with another one; hold it in"):
        streamed(tmp_path, [checkpoint], PADDED)


def falcon_h1() -> Any:
    sizes = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
    return transformers.FalconH1Config(**COMMON, **sizes, ssm_multipliers=[0.5, 0.25, 2.0, 1.5, 0.75])


def test_values_that_the_model_computes_for_its_layers_are_there(tmp_path: Path) -> None:
    """In no file, and no layer computes them itself: multipliers of Falcon-H1, which the model puts into each."""
    checkpoint = save(tmp_path / "falcon", falcon_h1())
    whole = resident(checkpoint, PADDED, torch.float32)
    near(streamed(tmp_path, [checkpoint], PADDED).tables, whole.tables, 1e-9)


def test_values_that_nobody_computes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(tmp_path / "falcon", falcon_h1())
    kind = transformers.models.falcon_h1.modeling_falcon_h1.FalconH1Model
    plain = transformers.PreTrainedModel._init_weights
    monkeypatch.setattr(kind, "_init_weights", plain)
    with pytest.raises(RefusedError, match=r"cannot be streamed layer by layer: mamba\.mup_vector of layer 0 is in no file; hold it in"):
        streamed(tmp_path, [checkpoint], PADDED)


def test_a_missing_weight(tmp_path: Path) -> None:
    config = configs()["llama"]
    checkpoint = save(tmp_path / "m", config)
    checkpoint.tensors.pop("model.layers.2.mlp.up_proj.weight")  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"m: weights are missing: layers\.2\.mlp\.up_proj\.weight; if it loads as a whole, hold"):
        streamed(tmp_path, [checkpoint], PADDED)


def test_a_state_that_is_not_finite_names_its_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with quiet(), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(configs()["llama"])
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
        model.save_pretrained(tmp_path / "m")
    with pytest.raises(LayercutError, match=r"^the output of layer 2 of model 'm' is not finite on sample 0 "):
        streamed(tmp_path, [open_checkpoint(tmp_path / "m")], PADDED, metrics=(Cosine(),))


def test_samples_are_checked_before_anything_is_read(family: Callable[..., Checkpoint], tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match=r"^model 'm' has 256 positions, but sample 0 has 300 tokens; set max_length to 256 or less$"
    ):
        streamed(tmp_path, [family("llama")], [[Sample(0, [5] * 300)]])


# Two processes

RECIPE = """
model: {model}
metrics: [angular, {{name: angular, token: all}}, cosine, linear, cka]
calibration: {{source: text, path: {text}, samples: {samples}, max_length: 24, batch_size: 2}}
steps: [{{prune: {{layers: 1}}}}]
output: {out}
"""
ACCELERATE = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--main_process_port", "0", "-m", "layercut",
)  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "layercut")


def launch(recipe: Path, *arguments: str, launcher: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    root = str(Path(streaming.__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *launcher, arguments[0], str(recipe), "-q", *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def recipe_for(tmp_path: Path, checkpoint: Checkpoint, samples: int) -> Path:
    words = ("the stream of states goes on and on", "a b c", "layers that change little may go", "seven words of a text that ends here")
    (tmp_path / "t.txt").write_text("\n\n".join(f"{word} {number}" for number in range(8) for word in words), encoding="utf-8")
    path = tmp_path / "r.yaml"
    text = RECIPE.format(model=checkpoint.folder, text=tmp_path / "t.txt", samples=samples, out=tmp_path / "out")
    path.write_text(text, encoding="utf-8")
    return path


def close(one: Plan, other: Plan) -> None:
    assert one.measurement is not None and other.measurement is not None
    assert (one.measurement.samples, one.measurement.tokens) == (other.measurement.samples, other.measurement.tokens)
    near(one.measurement.tables, other.measurement.tables, 1e-9)


@pytest.mark.parametrize(("kind", "samples"), [("llama", 9), ("mixtral", 2)])
def test_two_processes_are_one(family: Callable[..., Checkpoint], tmp_path: Path, kind: str, samples: int) -> None:
    """Nine samples in batches of two are uneven shares; of one batch the second process has none."""
    import layercut

    recipe = recipe_for(tmp_path, family(kind), samples)
    alone = layercut.plan_recipe(recipe, progress=False)
    done = launch(recipe, "plan", "-o", str(tmp_path / "p.json"), launcher=ACCELERATE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 -> 3 layers") == 1
    made = Plan.from_json((tmp_path / "p.json").read_text(encoding="utf-8"))
    close(made, alone)
    assert made.measurement is not None and made.measurement.details["ranks"] == 2
    assert [choice.chosen for choice in made.choices] == [choice.chosen for choice in alone.choices]


def test_one_process_writes(family: Callable[..., Checkpoint], tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, family("llama"), 8)
    done = launch(recipe, "run", "--memory", "20GB", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("layers      4 -> 3") == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 3
