"""The resident schedule on real tiny models: every metric against plain double-precision loops over true boundary states.

The true states come without hooks: `output_hidden_states` of each sample alone and unpadded, with the final norm taken out.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from torch import nn

from layercut.accumulators import Accumulators
from layercut.errors import CheckpointError
from layercut.loading import load_backbone
from layercut.metrics import CKA, Angular, Cosine, Euclidean, Linear, Metric, Procrustes, RelativeMagnitude, SampleMetric
from layercut.plan import Table
from layercut.resident import Resident, padded
from layercut.runner import Runner
from layercut.tokens import Sample

torch.set_num_threads(1)

CPU = torch.device("cpu")
SINGLE: tuple[Metric, ...] = (
    Angular(), Angular(token="all"), Cosine(), RelativeMagnitude(), Euclidean(), Euclidean(normalised=True), Euclidean(token=1),
    Cosine(token="skip-first-4"),
)  # fmt: skip
MANY: tuple[SampleMetric, ...] = (Linear(draw=512), Linear(draw=512, normalised=False), Procrustes(draw=512), CKA(draw=512))

Tiny = Callable[..., Path]


def samples_of(lengths: Sequence[int], vocabulary: int = 120) -> list[Sample]:
    random = np.random.default_rng(0)
    return [Sample(number, random.integers(3, vocabulary, length).tolist()) for number, length in enumerate(lengths)]


SAMPLES = samples_of([17, 5, 33, 9, 21, 12])


def resident(folder: Path, depth: int = 6, dtype: str = "float32") -> Resident:
    return Resident([Runner("m", load_backbone(folder, CPU, dtype), depth)], CPU)


def run(schedule: Resident, metrics: Sequence[Metric], samples: Sequence[Sample], size: int = 4) -> dict[str, Table]:
    total = Accumulators(schedule.models, metrics)
    schedule.run([list(samples[start : start + size]) for start in range(0, len(samples), size)], total)
    return {table.metric: table for table in total.tables()}


def truth(folder: Path, samples: Sequence[Sample], dtype: str = "float32") -> list[list[Any]]:
    """True boundary states, [sample][boundary] of (tokens, d) in float64."""
    model = load_backbone(folder, CPU, dtype)
    setattr(model, "ln_f" if hasattr(model, "ln_f") else "norm", nn.Identity())
    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor([sample.ids]), output_hidden_states=True) for sample in samples if sample.ids]
    return [[state[0].double().numpy() for state in output.hidden_states] for output in outputs]


def distance(metric: Metric, x: list[float], y: list[float]) -> float:
    dot, long_x, long_y = math.fsum(a * b for a, b in zip(x, y, strict=True)), math.hypot(*x), math.hypot(*y)
    cosine = max(-1.0, min(1.0, dot / long_x / long_y))
    if isinstance(metric, Angular | Cosine):
        return math.acos(cosine) / math.pi if isinstance(metric, Angular) else 1 - cosine
    if isinstance(metric, Euclidean) and metric.normalised:
        return math.dist([a / long_x for a in x], [b / long_y for b in y])
    return math.dist(x, y) / (long_y if isinstance(metric, RelativeMagnitude) else 1)


def places(metric: Metric, length: int) -> Sequence[int]:
    if isinstance(metric.token, int):
        return [metric.token]
    return {"last": [length - 1], "all": range(length), "skip-first-4": range(4, length)}[metric.token]


def single(metric: Metric, true: Sequence[Sequence[Any]], i: int, j: int) -> float:
    found = [
        distance(metric, sample[i][place].tolist(), sample[j][place].tolist())
        for sample in true
        for place in places(metric, len(sample[0]))
    ]
    return math.fsum(found) / len(found)


def many(metric: SampleMetric, true: Sequence[Sequence[Any]], i: int, j: int) -> float:
    """The three formulas for one pair, with d x d matrices, over all tokens but the first of each sample."""
    x, y = (np.concatenate([sample[b][1:] for sample in true]) for b in (i, j))
    if metric.normalised:
        x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    if isinstance(metric, Linear):
        owner = np.concatenate([[number] * (len(sample[0]) - 1) for number, sample in enumerate(true)])
        fit = owner % 4 != 1
        x, y = x - x[fit].mean(0), y - y[fit].mean(0)
        a = (x[fit] * y[fit]).sum() / (x[fit] ** 2).sum()
        ridge = metric.ridge * (x[fit] ** 2).sum() / fit.sum()
        b = np.linalg.solve(x[fit].T @ x[fit] + ridge * np.eye(x.shape[1]), x[fit].T @ (y - a * x)[fit])
        return float(((y - a * x - x @ b)[~fit] ** 2).sum() / (y[~fit] ** 2).sum())
    x, y = x - x.mean(0), y - y.mean(0)
    if isinstance(metric, Procrustes):
        return float(1 - np.linalg.svd(x.T @ y, compute_uv=False).sum() ** 2 / (x**2).sum() / (y**2).sum())
    n = len(x)

    def centred(z: Any) -> Any:
        k = z @ z.T
        np.fill_diagonal(k, 0)
        row = k.sum(0) / (n - 2)
        k = k - row[:, None] - row[None, :] + k.sum() / (n - 1) / (n - 2)
        np.fill_diagonal(k, 0)
        return k

    k, other = centred(x), centred(y)
    return float(1 - (k * other).sum() / math.sqrt((k * k).sum() * (other * other).sum()))


def worst(table: Table, expected: Callable[[int, int], float]) -> float:
    depth = len(table.mean)
    return max(abs(table.mean[i][j] - expected(i, j)) for i in range(depth) for j in range(i, depth))


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("qwen3", "float32"), ("gpt2", "float32"), ("llama", "bfloat16")])
def test_every_metric_equals_plain_loops(kind: str, dtype: str, tiny: Tiny) -> None:
    folder = tiny(kind)
    # Rounding to bf16 inside the model depends on the batch, so there each sample runs alone; else batches are padded.
    tables = run(resident(folder, dtype=dtype), [*SINGLE, *MANY], SAMPLES, size=4 if dtype == "float32" else 1)
    true = truth(folder, SAMPLES, dtype)
    assert len(tables) == len(SINGLE) + len(MANY)
    for metric in SINGLE:
        assert worst(tables[metric.label], lambda i, j, metric=metric: single(metric, true, i, j)) < 1e-5
    for metric in MANY:
        assert worst(tables[metric.label], lambda i, j, metric=metric: many(metric, true, i, j)) < 1e-5
        assert 1e-3 < tables[metric.label].mean[0][6] < 1.5


def quiet_layers(folder: Path, target: Path, layers: Sequence[int], by: float) -> Path:
    """The model with layers whose outputs are multiplied."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    for layer in layers:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{name}.weight"] *= by
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def test_layers_that_do_nothing_score_zero(tiny: Tiny, tmp_path: Path) -> None:
    folder = quiet_layers(tiny("llama"), tmp_path / "m", (2, 3, 5), 0.0)
    for dtype in ("float32", "bfloat16"):
        for label, table in run(resident(folder, dtype=dtype), [*SINGLE, *MANY], SAMPLES).items():
            for i, j in ((2, 3), (3, 4), (2, 4), (5, 6)):
                assert table.mean[i][j] == pytest.approx(0, abs=1e-7), label
                assert table.stderr[i][j] == pytest.approx(0, abs=1e-7), label
            assert min(table.mean[i][i + 1] for i in (0, 1, 4)) > 1e-3, label


def test_layers_that_do_next_to_nothing(tiny: Tiny, tmp_path: Path) -> None:
    # States that differ by a millionth: in float32 arithmetic the angle would be lost (arccos(1 - 6e-8) / pi = 1.1e-4)
    folder = quiet_layers(tiny("llama"), tmp_path / "m", (2, 5), 1e-6)
    tables = run(resident(folder), SINGLE, SAMPLES)
    true = truth(folder, SAMPLES)
    for metric in SINGLE:
        for i in (2, 5):
            expected = single(metric, true, i, i + 1)
            found = tables[metric.label].mean[i][i + 1]
            assert found == pytest.approx(expected, abs=2e-8), metric.label
            assert not isinstance(metric, Angular | Euclidean) or 1e-8 < found < 1e-4, metric.label


def test_an_empty_sample_is_a_row_of_pads(tiny: Tiny) -> None:
    for kind in ("llama", "gpt2"):
        schedule = resident(tiny(kind))
        metrics = [metric for metric in (*SINGLE, *MANY) if not isinstance(metric.token, int)]
        plain = run(schedule, metrics, SAMPLES, size=6)
        with_empty = run(schedule, metrics, [*SAMPLES, Sample(6, [])], size=7)
        assert {label: table.mean for label, table in plain.items()} == {
            label: tuple(pytest.approx(row, abs=1e-6) for row in table.mean) for label, table in with_empty.items()
        }


@pytest.mark.parametrize("metric", [Angular(), Euclidean(), Linear(), Procrustes(), CKA()], ids=lambda metric: metric.name)
def test_nan_in_the_weights_stops_the_run(metric: Metric, tiny: Tiny, tmp_path: Path) -> None:
    folder = quiet_layers(tiny("llama"), tmp_path / "bad", (3,), math.nan)
    with pytest.raises(CheckpointError) as caught:
        run(resident(folder), [metric], SAMPLES)
    message = f"the output of layer 3 of model 'm' is not finite on sample 0 (metric {metric.label}); the weights are damaged"
    assert str(caught.value) == message


def test_padded() -> None:
    ids, mask = padded([Sample(0, [5, 6, 7]), Sample(1, []), Sample(2, [8])])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]


def test_memory_does_not_grow_with_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1}
    schedule = resident(tiny_model(tmp_path / "m", "llama", layers=4, tokenizer=False, **sizes), depth=4)
    used: list[int] = []
    inner = Accumulators.add

    def add(self: Accumulators, *args: Any) -> None:
        inner(self, *args)
        used.append(int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096)

    monkeypatch.setattr(Accumulators, "add", add)
    peaks = []
    for count in (32, 512):  # keeping the states of 512 samples would take 512 * 128 * 5 * 256 * 4 bytes = 335 MB
        used.clear()
        run(schedule, [Angular(), Cosine(), Euclidean(), Linear(draw=512), CKA()], samples_of([128] * count), size=8)
        assert len(used) == count / 8
        peaks.append(max(used))
    assert peaks[1] - peaks[0] < 50_000_000
