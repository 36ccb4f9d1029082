"""Metrics: how far apart two boundary states of one token are. Formulas only; knows neither models nor text.

A new metric is one subclass of `Metric` in this module: recipe field, JSON schema and `METRICS` follow from it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler, StrictInt
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from layercut.errors import did_you_mean
from layercut.record import Record

Tensor: TypeAlias = Any
"""A `torch.Tensor`. Its methods do the arithmetic, so that this module need not import torch."""


def _check_token(value: object) -> object:
    """One message instead of one for each kind of value."""
    if value not in ("last", "all") and (isinstance(value, bool) or not isinstance(value, int)):
        raise PydanticCustomError("token", "token must be last, all or the index of a token")
    return value


Token: TypeAlias = Annotated[Literal["last", "all"] | StrictInt, BeforeValidator(_check_token)]
"""The tokens of a sample that a metric is averaged over."""


class Metric(Record):
    """A distance between boundary states of the same token, and the tokens that it is averaged over."""

    name: str
    """Name of the metric."""
    token: Token = "last"
    """Tokens that count: the last one, all, or one by its index. Pads never count; a BOS token does; negative counts from the end."""

    @property
    def label(self) -> str:
        """Name and tokens, for example `angular[last]`: the key of a table."""
        return f"{self.name}[{self.token}]"

    @abstractmethod
    def distances(self, gram: Tensor) -> Tensor:
        """Distances between all pairs of boundary states, for each token by itself.

        `gram` is float64 of shape (tokens, B, B): inner products of the raw boundary states of each token. The result has
        the same shape; entry [t, i, j] is the distance from boundary i to boundary j. What is not finite in `gram` is not
        finite in the result.
        """


def cosines(gram: Tensor) -> Tensor:
    """Cosines (tokens, B, B) from inner products, clamped to [-1, 1].

    A state of norm zero has no direction: its cosine is 1 with another zero state (they are equal) and 0 with all others.
    """
    squares = gram.diagonal(dim1=1, dim2=2)
    scale = (squares.unsqueeze(2) * squares.unsqueeze(1)).sqrt()
    zero = squares == 0
    both = zero.unsqueeze(2) & zero.unsqueeze(1)
    return (gram / scale.masked_fill(scale == 0, 1.0)).masked_fill(both, 1.0).clamp(-1.0, 1.0)


class Angular(Metric):
    """Angular distance, `(1/pi) arccos(x_i . x_j / (|x_i| |x_j|))`, by default of the last token.

    Range 0 (same direction) to 1 (opposite). Small means that the layers between i and j turn the state little, so they can
    go. Gromov et al., arXiv 2403.17887, eq. 6-7: last token, mean over samples. In float64 the rounding floor near 0 is
    about 5e-9.

    Other tools: short-transformers takes arccos in the dtype of the model (0.0075 for 0.0032 in bf16), counts pads, and picks
    blocks from the row of another size; PruneMe quantises to 4 bits, takes the metric in bf16, and scores the last block
    after the final norm; ShortGPT's repository does not clamp and turns NaN into 0.5.
    """

    name: Literal["angular"] = "angular"

    def distances(self, gram: Tensor) -> Tensor:
        return cosines(gram).arccos() / math.pi


class Cosine(Metric):
    """Cosine distance, `1 - x_i . x_j / (|x_i| |x_j|)`, by default the mean over all tokens.

    Range 0 (same direction) to 2 (opposite). Between neighbours, i and i + 1, it is the Block Influence (BI) of layer i:
    ShortGPT, arXiv 2403.03853, eq. 1. Small means that the layers between i and j can go.

    Other tools: ShortGPT's repository, LLM-Streamline and EvoPress score the last layer after the final norm (0.679 for
    0.378 on SmolLM2-135M); optipfair scores a layer 0.0, the least important, when anything fails, and averages batches, not
    tokens.
    """

    name: Literal["cosine"] = "cosine"
    token: Token = "all"
    """Tokens that count: the last one, all, or one by its index. Pads never count; a BOS token does; negative counts from the end."""

    def distances(self, gram: Tensor) -> Tensor:
        return 1.0 - cosines(gram)


METRICS: Mapping[str, type[Metric]] = {metric.model_fields["name"].default: metric for metric in Metric.__subclasses__()}
"""Every metric by its name, in the order in which they are listed."""


def _as_mapping(value: object) -> object:
    """`angular` becomes `{name: angular}`; an unknown name stops here, with the known ones."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping):
        name = value.get("name")
        if name is None:
            raise PydanticCustomError("metric_name", "a metric needs a name, one of: {known}", {"known": ", ".join(METRICS)})
        if not isinstance(name, str) or name not in METRICS:
            hint = did_you_mean(str(name), METRICS)
            context = {"name": str(name), "hint": f"; {hint}" if hint else "", "known": ", ".join(METRICS)}
            raise PydanticCustomError("metric_name", "unknown metric '{name}'{hint} (known: {known})", context)
    elif not isinstance(value, Metric):
        raise PydanticCustomError("metric_type", "a metric is a name or a mapping with a name and a token")
    return value


class _MetricField:
    """Tells pydantic how a recipe spells a metric."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {name: handler.generate_schema(metric) for name, metric in METRICS.items()}
        union = core_schema.tagged_union_schema(choices, discriminator="name")
        return core_schema.no_info_before_validator_function(_as_mapping, union)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "enum": list(METRICS)}, handler(schema)]}


MetricSpec: TypeAlias = Annotated[Metric, _MetricField()]
"""A recipe field: `angular` or `{name: angular, token: all}`; gives a `Metric`."""
