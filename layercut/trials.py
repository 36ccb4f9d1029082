"""Trials: stacks that are run on text, and what each of them loses. Knows what is asked, not how it is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from layercut.stack import Block, Fold, Stack

Part = Literal["calibration", "held out"]
"""Text that a stack is chosen on, or other text of the same source, which none was chosen on."""


class Gap(NamedTuple):
    """A difference of two losses, in nats a token, and its standard error."""

    mean: float
    stderr: float


class Loss(NamedTuple):
    """What a stack loses on a text: the negative log-likelihood of the tokens that it predicts, which is all of a sample but its first."""

    sums: tuple[float, ...]
    """Of every sample, summed over its tokens, in nats."""
    counts: tuple[int, ...]
    """Tokens of every sample that are predicted."""

    @property
    def mean(self) -> float:
        """Nats a token; every token weighs the same."""
        return math.fsum(self.sums) / sum(self.counts)

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return math.exp(self.mean) if self.mean < 700 else math.inf

    def over(self, base: Loss) -> Gap:
        """How much more this is than another loss on the same samples. The samples are paired, so what they have in common cancels out."""
        tokens, samples = sum(self.counts), sum(count > 0 for count in self.counts)
        differences = [mine - its for mine, its in zip(self.sums, base.sums, strict=True)]
        mean = math.fsum(differences) / tokens
        if samples < 2:
            return Gap(mean, 0.0)
        spread = math.fsum((one - mean * count) ** 2 for one, count in zip(differences, self.counts, strict=True))
        return Gap(mean, math.sqrt(spread * samples / (samples - 1)) / tokens)


class Losses(Protocol):
    """The models of a recipe, ready to be run as any stack of their layers."""

    def losses(self, stacks: Sequence[Stack], part: Part = "calibration", share: float = 1.0) -> list[Loss]:
        """The loss of every stack on a part of the text, or on a share of its samples, the first ones; one sample at least.

        What was asked before costs nothing. Raises LayercutError when a loss is not finite: it is never read as cheap.
        """

    def check_foldable(self, stack: Stack) -> None:
        """Raise RefusedError when a map can be folded into no layer of the stack, before anything is measured for long."""

    def fit(self, given: Stack, wanted: Stack, ridge: float) -> Fold:
        """The map that, folded into the last layer of `given`, makes the state behind it most like the one behind `wanted`.

        Both stacks begin at the embeddings. Raises RefusedError when no map can be folded into that layer.
        """

    def about(self) -> dict[str, Any]:
        """What was measured on, and how."""

    def release(self) -> None:
        """Give the memory of the models back until they are needed again."""


class Attempt(NamedTuple):
    """A choice of layers that was tried."""

    name: str
    blocks: tuple[Block, ...]
    loss: Loss
    part: Part = "calibration"


class Found(NamedTuple):
    """What a strategy chose, and what it tried on the way."""

    blocks: tuple[Block, ...]
    attempts: tuple[Attempt, ...] = ()
    share: float = 1.0
    """Share of the samples of the text that it was tried on."""
