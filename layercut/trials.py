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

    def below(self, base: Loss) -> bool:
        """Whether this is less than another on the same samples, by more than the standard error of the difference."""
        gap = self.over(base)
        return gap.mean < -gap.stderr

    @property
    def stderr(self) -> float:
        """Standard error of the mean, over samples."""
        return self.over(self._replace(sums=(0.0,) * len(self.sums))).stderr


class Misses(NamedTuple):
    """How far the state at a seam is from the one that is expected there, in both by sample and token as in a loss.

    Of a token it is `|x - x_e|^2 / |x_e|^2`: the squared distance in units of the squared length of the state that is expected.
    """

    cut: Loss
    """Without the map."""
    healed: Loss
    """With it."""


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

    def misses(self, given: Stack, wanted: Stack, fold: Fold) -> Misses:
        """How far the state behind `given` is from the one behind `wanted`, without and with a map that was fitted for it.

        On the held-out text, on which no map was fitted.
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
