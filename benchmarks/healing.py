"""Measures what healing gives a real model: perplexity on held-out text of cuts with and without folded maps.

    python benchmarks/healing.py [--model DIR] [--counts 3 6 9] [--samples 24] [--length 256] [--judged 24] [--ridges 1e-3 1e-2 0.1]
        [--build DIR] [--report FILE]

Layers are chosen by distance, and maps fitted, on `samples` windows of the built-in text. Whether a map is taken is decided on as many
windows of its held-out part; all are judged on the `judged` windows that follow those, which nothing was chosen on. Status 1 when a
healed cut loses more than the plain one on the text that maps are taken on.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the files beside this one, and layercut as it stands in this checkout

import torch  # noqa: E402
from engine import smollm2  # noqa: E402
from strategies import METRIC, Bench, named, parser_of  # noqa: E402 - first: it keeps torch to one thread

from layercut.healing import RIDGE, Healed, heal  # noqa: E402
from layercut.searches import ALL, find  # noqa: E402
from layercut.stack import Block  # noqa: E402
from layercut.strategies import Task  # noqa: E402
from layercut.trials import Loss  # noqa: E402

STRATEGIES = ("block", "rank", "deepest")


class Outcome(NamedTuple):
    """A cut, and what healing made of it."""

    name: str
    blocks: tuple[Block, ...]
    cut: Loss
    """On text that nothing was chosen on, as `healed`."""
    healed: Loss
    found: Healed

    @property
    def sound(self) -> bool:
        """Whether healing did no harm where it was decided."""
        losses = [attempt.loss.mean for attempt in self.found.attempts if not attempt.name.endswith("not taken")]
        return losses[-1] <= losses[0]


def outcome(bench: Bench, name: str, blocks: tuple[Block, ...], ridge: float = RIDGE) -> Outcome:
    """One cut, healed."""
    found = heal(bench.stack, blocks, ridge, bench.losses)
    cut, healed = bench.judged([bench.build(blocks), found.stack])
    return Outcome(name, blocks, cut, healed, found)


def outcomes(bench: Bench, count: int) -> list[Outcome]:
    """What every strategy chooses, each cut once, healed."""
    task = Task(bench.stack, count, bench.build, False, frozenset({0}))
    chosen: dict[tuple[Block, ...], str] = {}
    for name in STRATEGIES:
        found = find(ALL[name], task, bench)
        assert found is not None
        chosen[found.blocks] = f"{chosen[found.blocks]}, {name}" if found.blocks in chosen else name
    return [outcome(bench, name, blocks) for blocks, name in chosen.items()]


def row(one: Outcome, base: Loss) -> str:
    """A line of a table: perplexities, and how much of the loss that the cut costs came back."""
    back = (one.cut.mean - one.healed.mean) / (one.cut.mean - base.mean)
    maps = f"{len(one.found.taken)} of {len(one.blocks)}"
    return f"| {named(one.blocks)} | {one.cut.perplexity:,.1f} | {one.healed.perplexity:,.1f} | {back:.0%} | {maps} |"


def page(base: Loss, found: dict[int, list[Outcome]], ridges: dict[float, Outcome], about: str) -> str:
    """The report."""
    lines = [
        "# Healing",
        "",
        "SmolLM2-135M-Instruct without layers, with and without [folded maps](../docs/healing.md): perplexity on held-out text, where the",
        f"whole model has {base.perplexity:.2f}. {about}",
        "",
        "| strategy | layers that go | the cut | healed | of the loss, back | maps taken |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for rows in found.values():
        lines += [f"| `{one.name.replace(', ', '`, `')}` {row(one, base)}" for one in rows]
    if ridges:
        lines += ["", "## Ridge", "", "| ridge | layers that go | the cut | healed | of the loss, back | maps taken |"]
        lines += ["| ---: | --- | ---: | ---: | ---: | ---: |", *(f"| {ridge:g} {row(one, base)}" for ridge, one in ridges.items())]
    return "\n".join(lines) + "\n"


def main(given: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, samples=24, length=256, judged=24)
    parser.add_argument("--ridges", type=float, nargs="*", default=[1e-3, 1e-2, 1.0], help="tried on the block of the second count")
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    began = time.process_time()
    bench = Bench(arguments.model or smollm2(arguments.build), arguments.samples, arguments.length, arguments.judged)
    found = {count: outcomes(bench, count) for count in arguments.counts}
    block = found[arguments.counts[len(arguments.counts) // 2]][0].blocks
    ridges = {ridge: outcome(bench, "", block, ridge) for ridge in arguments.ridges}
    (base,) = bench.judged([bench.stack])
    about = (
        f"Layers were chosen (distances: {METRIC.label})\nand maps fitted on {arguments.samples} windows of {arguments.length} tokens, "
        f"taken on {arguments.samples} others, and judged on {len(base.counts)} more.\n"
        f"{date.today().isoformat()}; {os.cpu_count()} CPUs, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, one thread.\nIt took {(time.process_time() - began) / 60:.0f} minutes of processor time."
    )
    text = page(base, found, ridges, about)
    print(text)
    if arguments.report is not None:
        arguments.report.write_text(text, encoding="utf-8")
    return 0 if all(one.sound for rows in (*found.values(), list(ridges.values())) for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
