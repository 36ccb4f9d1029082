"""Measures `samples: auto`: how often it chooses the block that 512 samples choose, with how much of the text, and what it says when not.

    python benchmarks/settling.py [--model DIR] [--samples 512] [--length 56] [--seeds 20] [--most 128] [--build DIR]
                                  [--report FILE]

The model runs once over all samples; what every sample adds is kept. Each seed then shuffles the samples, and `samples: auto` looks at them
as it would at a text in that order: for every block size and metric, by the functions that the engine uses. Status 1 when a choice that was
called settled is another than that of all samples more often than promised.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before torch is there

import torch  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the files beside this one, and layercut as it stands in this checkout

from engine import prepare, smollm2  # noqa: E402

from layercut.accumulators import Accumulators  # noqa: E402
from layercut.loading import load_backbone, quiet  # noqa: E402
from layercut.metrics import Angular, Cosine, Metric  # noqa: E402
from layercut.plan import Measurement, Table  # noqa: E402
from layercut.resident import Resident  # noqa: E402
from layercut.runner import Runner  # noqa: E402
from layercut.settling import LEVEL, Contest, Kept, Way, judge, look_sizes  # noqa: E402
from layercut.stack import Boundary  # noqa: E402

METRICS: tuple[Metric, ...] = (Angular(), Cosine())
SIZES = range(1, 11)
LEAST = 8


class Outcome(NamedTuple):
    """What one order of the samples led to, for one block size."""

    start: int
    """First layer of the block that was chosen."""
    samples: int
    settled: bool
    text: str


def gather(folder: Path, count: int, length: int) -> dict[str, Kept]:
    """What every sample adds, by metric."""
    setting = prepare(folder, count, length, 8)
    backbone = load_backbone(folder, torch.device("cpu"), "float32")
    schedule = Resident([Runner("model", backbone, backbone.config.num_hidden_layers)], torch.device("cpu"))
    accumulators = Accumulators(schedule.models, METRICS, keep=True)
    with quiet():
        schedule.run(setting.batches, accumulators)
    return accumulators.kept()


def means(kept: Kept) -> list[list[float]]:
    """The mean distances between all boundaries."""
    found: list[list[float]] = (kept.sums.sum(0) / kept.counts.sum()).tolist()
    return found


def contest(mean: Sequence[Sequence[float]], label: str, size: int) -> Contest:
    """The nearest block of a size against all others, as a recipe `prune: {layers: size}` has it."""
    depth = len(mean) - 1
    ways = [
        Way(f"[{start}, {start + size})", ((Boundary("model", start), Boundary("model", start + size)),))
        for start in range(depth - size + 1)
    ]
    at = min(range(len(ways)), key=lambda start: (mean[start][start + size], start))
    return Contest("prune", label, ways[at], (*ways[:at], *ways[at + 1 :]))


def start_of(way: Way) -> int:
    """First layer of a block."""
    return way.seams[0][0].number


def auto(kept: Kept, label: str, size: int, most: int) -> Outcome:
    """What `samples: auto` does with samples in this order."""
    looks = look_sizes(LEAST, most)
    for samples in looks:
        part = Kept(kept.sums[:samples], kept.counts[:samples])
        mean = means(part)
        found = contest(mean, label, size)
        table = Table(metric=label, a="model", b="model", mean=tuple(map(tuple, mean)), stderr=tuple(map(tuple, mean)))
        measured = Measurement(tables=(table,), samples=samples, tokens=samples, details={})
        (verdict,) = judge(lambda _, found=found: [found], measured, {label: part}, {"model": 0}, len(looks))  # type: ignore[misc]
        if verdict.settled:
            break
    return Outcome(start_of(found.chosen), samples, verdict.settled, verdict.text)


def rows(kept: Mapping[str, Kept], seeds: int, most: int) -> Iterable[tuple[str, int, int, list[Outcome]]]:
    """For every metric and block size the block of all samples, and the outcome of every seed."""
    for label, whole in kept.items():
        mean = means(whole)
        for size in SIZES:
            outcomes = []
            for seed in range(seeds):
                order = list(range(len(whole.counts)))
                Random(seed).shuffle(order)
                outcomes.append(auto(Kept(whole.sums[order], whole.counts[order]), label, size, most))
            yield label, size, start_of(contest(mean, label, size).chosen), outcomes


def page(found: Sequence[tuple[str, int, int, list[Outcome]]], count: int, length: int, most: int, seconds: float) -> tuple[str, bool]:
    """The report, and whether the promise holds: settled choices are wrong in at most `LEVEL` of the seeds."""
    lines = [
        "# samples: auto",
        "",
        f"SmolLM2-135M-Instruct, {count} samples of {length} tokens of the built-in text, in {len(found[0][3])} seeded orders, and",
        f"`samples: auto` with {LEAST} to {most} of them. *same*: seeds that chose the block that all {count} samples choose. *settled*:",
        "seeds that called the choice settled, and how many of those were of another block. *told*: of the seeds that chose another",
        "block, those that said that it is not settled and named the block of all samples among those that more text may lead to.",
        f"*text*: mean share of the {count} samples. It took {seconds:.0f} s of processor time for the one pass.",
        "",
        "| metric | layers | block | same | settled | of them wrong | another block | told | text |",
        "| --- | ---: | :---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    wrong_in_all = settled_in_all = untold_in_all = 0
    for label, size, start, outcomes in found:
        block = f"[{start}, {start + size})"
        settled = [outcome for outcome in outcomes if outcome.settled]
        wrong = sum(outcome.start != start for outcome in settled)
        missed = [outcome for outcome in outcomes if outcome.start != start]
        told = sum(not outcome.settled and block in outcome.text for outcome in missed)
        share = sum(outcome.samples for outcome in outcomes) / len(outcomes) / count
        wrong_in_all, settled_in_all, untold_in_all = (
            wrong_in_all + wrong,
            settled_in_all + len(settled),
            untold_in_all + len(missed) - told,
        )
        lines.append(
            f"| {label} | {size} | {block} | {len(outcomes) - len(missed)} of {len(outcomes)} | {len(settled)} | {wrong} | {len(missed)} |"
            f" {told} | {share:.1%} |"
        )
    lines += [
        "",
        f"{settled_in_all} choices were called settled, {wrong_in_all} of them wrongly (promised: at most {LEVEL:.0%}).",
        f"{untold_in_all} choices of another block were made without saying so. No run took more than {most / count:.1%} of the text.",
    ]
    return "\n".join(lines) + "\n", wrong_in_all <= LEVEL * settled_in_all


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=56)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--most", type=int, default=128)
    parser.add_argument("--build", type=Path, default=HERE.parent / "build" / "engine", help="folder for the model")
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    kept = gather(arguments.model or smollm2(arguments.build), arguments.samples, arguments.length)
    seconds = time.process_time() - began
    count = len(next(iter(kept.values())).counts)
    text, kept_promise = page(list(rows(kept, arguments.seeds, arguments.most)), count, arguments.length, arguments.most, seconds)
    print(text)
    if arguments.report is not None:
        arguments.report.write_text(text, encoding="utf-8")
    return 0 if kept_promise else 1


if __name__ == "__main__":
    sys.exit(main())
