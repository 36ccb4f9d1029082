"""Healing: after a cut, maps that make up for what is missing, each kept only where held-out text says that it helps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from layercut.stack import Block, Distance, Mending, Stack
from layercut.trials import Attempt, Loss, Losses, Misses

RIDGE = 0.1
"""How strongly a map is held to the plain cut, where a recipe does not say: on little text less does worse, on much it hardly matters."""


class Tried(NamedTuple):
    """A map that was fitted for a block."""

    block: Block
    misses: Misses
    """How far the state is from the one that is expected."""
    losses: tuple[Loss, Loss] | None
    """Of the stack without the map and with it; None when it was not run, as the map does not bring the state nearer."""

    @property
    def taken(self) -> bool:
        """Whether it helps."""
        return self.losses is not None and self.losses[1].below(self.losses[0])

    @property
    def mending(self) -> Mending:
        """What the plan keeps of it."""
        cut, healed = (Distance(mean=one.mean, stderr=one.stderr) for one in self.misses)
        error = self.misses.healed.over(self.misses.cut).stderr
        return Mending(block=f"[{self.block.start}, {self.block.stop})", cut=cut, healed=healed, stderr=error, taken=self.taken)

    @property
    def why(self) -> str:
        """Why it is not taken, with the numbers."""
        without, healed = self.losses or self.misses
        what = (
            "held-out text loses {} nats a token with it and {} without it"
            if self.losses
            else "the state is off by {} with it and {} without it on held-out text"
        )
        means = (f"{one.mean:.4f} ± {one.stderr:.4f}" for one in (healed, without))
        return f"{what.format(*means)}, a difference of {healed.over(without).mean:+.4f} ± {healed.over(without).stderr:.4f}"


class Healed(NamedTuple):
    """A stack after a cut, and what was tried for it."""

    stack: Stack
    attempts: tuple[Attempt, ...]
    """First the cut alone, then, with those that were taken before it, each map that brings the state nearer to what is expected."""
    maps: tuple[Tried, ...]

    @property
    def taken(self) -> tuple[Block, ...]:
        """Blocks whose map is folded in."""
        return tuple(one.block for one in self.maps if one.taken)


def without(stack: Stack, blocks: Sequence[Block]) -> Stack:
    """The stack with blocks of positions removed."""
    gone = {position for block in blocks for position in range(block.start, block.stop)}
    return tuple(layer for position, layer in enumerate(stack) if position not in gone)


def heal(stack: Stack, blocks: Sequence[Block], ridge: float, losses: Losses) -> Healed:
    """Remove disjoint blocks, given in order, and fold a map for each into the layer before it.

    From the first block on, each map leads from the state in the cut stack, with the maps that were taken before, to the state that the
    whole stack has behind the block: so it makes up for what those before it left as well. No block may begin at 0. A map is taken when,
    on held-out text, it brings the state nearer to that one and lowers the loss, both by more than the standard error.
    """
    best = without(stack, blocks)
    (least,) = losses.losses([best], "held out")
    attempts, maps, gone = [Attempt("the cut", tuple(blocks), least, "held out")], list[Tried](), 0
    for block in blocks:
        at = block.start - gone - 1
        gone += block.stop - block.start
        given, wanted = best[: at + 1], stack[: block.stop]
        fold = losses.fit(given, wanted, ridge)
        misses = losses.misses(given, wanted, fold)
        pair = None
        if misses.healed.below(misses.cut):
            healed = best[at].model_copy(update={"folds": (*best[at].folds, fold)})
            tried = (*best[:at], healed, *best[at + 1 :])
            (loss,) = losses.losses([tried], "held out")
            pair = least, loss
        maps.append(Tried(block, misses, pair))
        if pair is not None:
            name = f"map for [{block.start}, {block.stop}){'' if maps[-1].taken else ', not taken'}"
            attempts.append(Attempt(name, tuple(blocks), loss, "held out"))
        if maps[-1].taken:
            best, least = tried, loss
    return Healed(best, tuple(attempts), tuple(maps))
