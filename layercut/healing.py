"""Healing: after a cut, maps that make up for what is missing, each kept only where the loss on held-out text falls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from layercut.stack import Block, Stack
from layercut.trials import Attempt, Losses

RIDGE = 0.01
"""How strongly a map is held to the plain cut, where a recipe does not say: any value from 1e-6 to 0.1 does nearly as well."""


class Healed(NamedTuple):
    """A stack after a cut, and what was tried for it."""

    stack: Stack
    attempts: tuple[Attempt, ...]
    """First the cut alone, then each map with those that were taken before it."""
    taken: tuple[Block, ...]
    """Blocks whose map is folded in."""


def without(stack: Stack, blocks: Sequence[Block]) -> Stack:
    """The stack with blocks of positions removed."""
    gone = {position for block in blocks for position in range(block.start, block.stop)}
    return tuple(layer for position, layer in enumerate(stack) if position not in gone)


def heal(stack: Stack, blocks: Sequence[Block], ridge: float, losses: Losses) -> Healed:
    """Remove disjoint blocks, given in order, and fold a map for each into the layer before it.

    From the first block on, each map leads from the state in the cut stack, with the maps that were taken before, to the state that the
    whole stack has behind the block: so it makes up for what those before it left as well. No block may begin at 0.
    """
    best = without(stack, blocks)
    (least,) = losses.losses([best], "held out")
    attempts, taken, gone = [Attempt("the cut", tuple(blocks), least, "held out")], list[Block](), 0
    for block in blocks:
        at = block.start - gone - 1
        gone += block.stop - block.start
        fold = losses.fit(best[: at + 1], stack[: block.stop], ridge)
        healed = best[at].model_copy(update={"folds": (*best[at].folds, fold)})
        tried = (*best[:at], healed, *best[at + 1 :])
        (loss,) = losses.losses([tried], "held out")
        better = loss.mean < least.mean
        words = f"map for [{block.start}, {block.stop}): {fold.explained:.0%} of the way{'' if better else ', not taken'}"
        attempts.append(Attempt(words, tuple(blocks), loss, "held out"))
        if better:
            best, least = tried, loss
            taken.append(block)
    return Healed(best, tuple(attempts), tuple(taken))
