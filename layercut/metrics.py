"""Metrics: every metric by its name, and how a recipe spells one.

A new metric is one subclass of `TokenMetric` or `SampleMetric`, in `tokenwise` or `samplewise`: recipe field, JSON schema,
page and `METRICS` follow from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from layercut.errors import LayercutError, did_you_mean
from layercut.metric import Metric, SampleMetric, TokenMetric
from layercut.samplewise import CKA, Linear, Procrustes
from layercut.tokenwise import Angular, Cosine, Euclidean, RelativeMagnitude
from layercut.yamltext import YamlText

__all__ = [
    "CKA",
    "METRICS",
    "Angular",
    "Cosine",
    "Euclidean",
    "Linear",
    "Metric",
    "MetricSpec",
    "Procrustes",
    "RelativeMagnitude",
    "SampleMetric",
    "TokenMetric",
    "parse_metric",
]

METRICS: Mapping[str, type[Metric]] = {
    metric.model_fields["name"].default: metric for kind in (TokenMetric, SampleMetric) for metric in kind.__subclasses__()
}
"""Every metric by its name, in the order in which they are listed."""


OTHER_NAMES = dict.fromkeys(("bi", "bi_score", "block_influence"), "the BI score is 'cosine'")
"""What to write for names that papers and other tools use."""


def _as_mapping(value: object) -> object:
    """`angular` becomes `{name: angular}`; an unknown name stops here, with the known ones."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping):
        name = value.get("name")
        if name is None:
            raise PydanticCustomError("metric_name", "a metric needs a name, one of: {known}", {"known": ", ".join(METRICS)})
        if not isinstance(name, str) or name not in METRICS:
            plain, colon, token = str(name).partition(":")
            hint = f"write {{name: {plain}, token: {token}}}" if colon and plain in METRICS else OTHER_NAMES.get(str(name))
            hint = hint or did_you_mean(str(name), METRICS)
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


def parse_metric(text: str) -> Metric:
    """A metric as it is spelled on the command line: `angular`, `angular:all`, or as in a recipe, `{name: angular, token: all}`.

    Raises LayercutError in one line.
    """
    if text.lstrip().startswith("{"):
        data = YamlText(text, "--metric").data
    else:
        name, colon, token = text.partition(":")
        data = {"name": name, **({"token": int(token) if re.fullmatch("-?[0-9]{1,6}", token) else token} if colon else {})}
    adapter: TypeAdapter[Metric] = TypeAdapter(MetricSpec)
    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        raise LayercutError(error.errors()[0]["msg"], where=f"--metric {text}") from None
