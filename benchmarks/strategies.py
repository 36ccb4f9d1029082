"""Measures what every strategy of `prune` costs a real model: perplexity on held-out text when 3, 6 and 9 layers go.

    python benchmarks/strategies.py [--model DIR] [--counts 3 6 9] [--samples 8] [--length 64] [--judged 32] [--build DIR] [--report FILE]

Layers are chosen on `samples` windows of the built-in text. `best` compares the choices of the others on as many windows of its held-out
part, and what is done where no strategy is named on half of them; all are judged on `judged` other windows, which nothing was chosen on.
Status 1 when `best` is worse than one of its candidates on the text that it compares them on, or when `evolve` ends worse than it began.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before torch is there

import torch  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the files beside this one, and layercut as it stands in this checkout

from engine import smollm2  # noqa: E402

from layercut.architecture import find_stack  # noqa: E402
from layercut.calibration import BuiltinCalibration  # noqa: E402
from layercut.checkpoint import open_checkpoint  # noqa: E402
from layercut.engine import Running, measure  # noqa: E402
from layercut.losses import Meter  # noqa: E402
from layercut.metrics import Angular  # noqa: E402
from layercut.seams import Prices  # noqa: E402
from layercut.searches import ALL, QUICK, QUICK_SHARE, Best, find  # noqa: E402
from layercut.stack import Block, LayerRef, Stack  # noqa: E402
from layercut.strategies import Task  # noqa: E402
from layercut.trials import Attempt, Found, Loss  # noqa: E402

METRIC = Angular(token="all")
NONE = "none named"
ALIAS = "model"


class Outcome(NamedTuple):
    """What a strategy chose, and what the model is without it."""

    name: str
    blocks: tuple[Block, ...]
    loss: Loss
    """On text that nothing was chosen on."""
    compared: Loss
    """On the text that `best` compares on."""
    tried: tuple[Attempt, ...]


class Bench:
    """A model, measured once."""

    def __init__(self, folder: Path, samples: int, length: int, judged: int) -> None:
        checkpoint = open_checkpoint(folder)
        place = find_stack(checkpoint)
        running = Running({ALIAS: checkpoint}, {ALIAS: place.depth}, {ALIAS: place.prefix})
        text = BuiltinCalibration(samples=samples, max_length=length)
        self.stack: Stack = tuple(LayerRef(model=ALIAS, index=index) for index in range(place.depth))
        self.samples = samples
        self.losses = Meter(running, text)
        self._judge = Meter(running, text.model_copy(update={"samples": samples + judged}))
        self.prices = Prices(measure(running, [METRIC], text), METRIC.label, running.depths)

    def fits(self, stack: Stack) -> bool:
        """As `searches.Means`: a llama without some layers is a llama."""
        return True

    def build(self, blocks: Sequence[Block]) -> Stack:
        """The stack without some blocks."""
        gone = {position for block in blocks for position in range(block.start, block.stop)}
        return tuple(layer for position, layer in enumerate(self.stack) if position not in gone)

    def judged(self, stacks: Sequence[Stack]) -> list[Loss]:
        """Losses on the held-out windows that `best` does not compare on."""
        found = self._judge.losses(stacks, "held out")
        return [Loss(loss.sums[self.samples :], loss.counts[self.samples :]) for loss in found]

    def outcomes(self, count: int) -> list[Outcome]:
        """What every strategy chooses, then `best` of them, and what is taken where none is named."""
        task = Task(self.stack, count, self.build, False, frozenset())
        names = [name for name in ALL if name != "best"]
        found: dict[str, Found] = {}
        for name in (*names, "best", NONE):
            by = Best(names) if name == "best" else Best(QUICK, QUICK_SHARE) if name == NONE else ALL[name]
            chosen = find(by, task, self)
            assert chosen is not None
            found[name] = chosen
        stacks = [self.build(one.blocks) for one in found.values()]
        losses, compared = self.judged(stacks), self.losses.losses(stacks, "held out")
        return [
            Outcome(name, one.blocks, loss, other, one.attempts)
            for (name, one), loss, other in zip(found.items(), losses, compared, strict=True)
        ]


def sound(outcomes: Sequence[Outcome]) -> bool:
    """Whether best is the best of its candidates, and evolution no worse than its start."""
    *others, best, _ = outcomes
    tried = next(outcome for outcome in others if outcome.name == "evolve").tried
    return best.compared.mean <= min(one.compared.mean for one in others) and tried[-1].loss.mean <= tried[0].loss.mean


def named(blocks: Sequence[Block]) -> str:
    """Blocks as layers, both ends included."""
    return " ".join(str(block.start) if block.stop == block.start + 1 else f"{block.start}-{block.stop - 1}" for block in blocks)


def page(base: Loss, found: dict[int, list[Outcome]], samples: int, length: int, seconds: float) -> str:
    """The report."""
    lines = [
        "# Strategies",
        "",
        "SmolLM2-135M-Instruct without layers that each [strategy](../docs/strategies.md) chose: perplexity on held-out text, and how many",
        f"times that of the whole model, {base.perplexity:.2f}, it is. Layers were chosen on {samples} windows of {length} tokens",
        f"(distances: {METRIC.label}); `best` compared its candidates on {samples} others, and of {', '.join(QUICK)} the best",
        f"on {math.ceil(QUICK_SHARE * samples)} of them is taken where no strategy is named; all are judged on {len(base.counts)} more. So",
        "little text gives numbers that another text would move: what they show is how far the strategies are apart.",
        f"It took {seconds / 60:.0f} minutes of processor time.",
    ]
    for count, outcomes in found.items():
        lines += ["", f"## {count} layers", "", "| strategy | layers that go | perplexity | ratio |", "| --- | --- | ---: | ---: |"]
        least = min(outcome.loss.mean for outcome in outcomes)
        for outcome in outcomes:
            ratio = math.exp(outcome.loss.mean - base.mean)
            mark = "**" if outcome.loss.mean == least else ""
            name = outcome.name if outcome.name == NONE else f"`{outcome.name}`"
            lines.append(f"| {name} | {named(outcome.blocks)} | {mark}{outcome.loss.perplexity:,.1f}{mark} | {mark}{ratio:,.2f}{mark} |")
    return "\n".join(lines) + "\n"


def parser_of(about: str | None, samples: int, length: int, judged: int) -> argparse.ArgumentParser:
    """The options of a benchmark that chooses on `samples` texts of `length` tokens and judges on `judged` others, with these defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 6, 9])
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--length", type=int, default=length)
    parser.add_argument("--judged", type=int, default=judged)
    parser.add_argument("--build", type=Path, default=HERE.parent / "build" / "engine", help="folder for the model")
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    return parser


def main(given: Sequence[str] | None = None) -> int:
    arguments = parser_of(__doc__, samples=8, length=64, judged=32).parse_args(given)
    torch.set_num_threads(1)
    began = time.process_time()
    bench = Bench(arguments.model or smollm2(arguments.build), arguments.samples, arguments.length, arguments.judged)
    found = {count: bench.outcomes(count) for count in arguments.counts}
    (base,) = bench.judged([bench.stack])
    text = page(base, found, arguments.samples, arguments.length, time.process_time() - began)
    print(text)
    if arguments.report is not None:
        arguments.report.write_text(text, encoding="utf-8")
    return 0 if all(map(sound, found.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
