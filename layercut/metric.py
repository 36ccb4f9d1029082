"""A metric: what all of them share. Formulas stand in `tokenwise` and `samplewise`, the list of all in `metrics`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeAlias

from pydantic import Field

from layercut.record import Record
from layercut.tokens import Token

Tensor: TypeAlias = Any
"""A `torch.Tensor`. Its methods do the arithmetic, so that recipes can name metrics without torch."""


class Metric(Record):
    """How far apart two boundary states are, and the tokens that this is taken over."""

    name: str
    """Name of the metric."""
    token: Token = "last"
    """Tokens that count: last, all, completion, skip-first-K, or one by its index."""

    directed: ClassVar[bool] = False
    """Whether the state that is given and the one that is expected play different parts; within a model the earlier one is given."""
    sizes_may_differ: ClassVar[bool] = False
    """Whether it compares states of different hidden sizes."""

    @property
    def label(self) -> str:
        """Name, tokens and what is set otherwise, for example `angular[last]`: the key of a table."""
        parts = [str(self.token)]
        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            if key not in ("name", "token") and value != field.default:
                parts.append(key if value is True else f"{key}={str(value).lower()}")
        return f"{self.name}[{', '.join(parts)}]"


class Inner:
    """Inner products of the B boundary states of each token, and what follows from them; each is worked out once.

    `gram` is float64 of shape (tokens, B, B). States of 32 bits and fewer differ by 6e-8 of their length at least, or not at
    all; its square is above what float64 loses in a difference of inner products.
    """

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram

    @cached_property
    def squares(self) -> Tensor:
        """Squared lengths, (tokens, B)."""
        return self.gram.diagonal(dim1=1, dim2=2)

    @cached_property
    def cosines(self) -> Tensor:
        """Cosines (tokens, B, B), clamped to [-1, 1].

        A state of length zero has no direction: its cosine is 1 with another zero state (they are equal), 0 with all others.
        """
        zero = self.squares == 0
        # The square root of a square is exact, so that equal states are at cosine 1.
        scale = (self.squares.unsqueeze(2) * self.squares.unsqueeze(1)).sqrt_()
        if not zero.any():
            return (self.gram / scale).clamp_(-1.0, 1.0)
        found = self.gram / scale.masked_fill_(scale == 0, 1.0)
        found.masked_fill_(zero.unsqueeze(2) & zero.unsqueeze(1), 1.0)
        return found.clamp_(-1.0, 1.0)

    @cached_property
    def gaps(self) -> Tensor:
        """Euclidean distances, (tokens, B, B)."""
        return (self.squares.unsqueeze(2) + self.squares.unsqueeze(1) - 2 * self.gram).clamp_(min=0).sqrt_()


class TokenMetric(Metric):
    """A metric that each token has by itself; the result is the mean."""

    @abstractmethod
    def distances(self, inner: Inner) -> Tensor:
        """Distances (tokens, B, B): entry [t, i, j] is that from boundary i to boundary j. What is not finite stays so."""


class Scores(NamedTuple):
    """One number for each pair of boundaries, and its standard error with the sample as the unit: both (B, B), float64."""

    value: Tensor
    stderr: Tensor


class SampleMetric(Metric):
    """A metric of many tokens together: it compares two clouds of states. The tokens are drawn from all, by a seed."""

    token: Token = "skip-first-1"
    draw: int = Field(default=1024, ge=16, le=16384, strict=True)
    """Tokens that are drawn for it from all that count, at most. The work grows with its square, in part with its third power."""
    normalised: bool = True
    """Make each state a unit vector first, as the norm in front of the next layer does. Else a few tokens of huge states decide."""

    sizes_may_differ: ClassVar[bool] = True
    least_samples: ClassVar[int] = 1
    """Samples that the tokens must come from at least."""
    least_tokens: ClassVar[int] = 4
    """Tokens that must be there at least."""

    @abstractmethod
    def compare(self, states: Iterable[Tensor], owners: Tensor, wanted: Tensor) -> Scores:
        """Scores of the pairs (i, j) of B boundaries that `wanted` (B, B; bool) names, and 0 for all others.

        `states` are (n, d) each, of any dtype, d may differ between models; `owners` (n,) is the number of each token's sample,
        ascending. Each state is read once.
        """

    def _vectors(self, states: Iterable[Tensor]) -> Iterator[Tensor]:
        """The states in float64, of length 1 if they are normalised; zero stays zero."""
        for state in states:
            exact = state.double()
            length = exact.norm(dim=1, keepdim=True) if self.normalised else None
            yield exact if length is None else exact / length.masked_fill(length == 0, 1.0)
