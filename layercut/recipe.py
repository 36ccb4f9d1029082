"""The recipe: what the user wants, validated and frozen. Says nothing about any real checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PrivateAttr, ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

from layercut.calibration import BuiltinCalibration, Calibration
from layercut.errors import RecipeError, did_you_mean
from layercut.metrics import Angular, Metric, MetricSpec
from layercut.operations import OPERATIONS, Operation
from layercut.stack import Record
from layercut.yamltext import Key, YamlText


def _check_bound(value: object) -> object:
    """One message instead of one for each kind of value."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and value not in ("auto", "end"):
        raise ValueError("expected a boundary: a whole number, auto or end")
    if whole and value < 0:  # type: ignore[operator]
        raise ValueError("a boundary counts from 0; for the last layers write [a, end]")
    return value


def _check_pair(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("layer_range takes two boundaries [a, b): layers a to b - 1")
    return value


def _check_range(bounds: tuple[int | str, int | str]) -> tuple[int | str, int | str]:
    start, stop = bounds
    if start == "end" or stop == 0 or (isinstance(start, int) and isinstance(stop, int) and stop <= start):
        hint = ""
        if isinstance(start, int) and isinstance(stop, int):
            low, high = sorted((start, stop))
            hint = f"; did you mean [{low}, {high + (low == high)}]?"
        raise ValueError(f"layer_range [{start}, {stop}] is empty: [a, b) holds layers a to b - 1{hint}")
    return bounds


Bound = Annotated[Annotated[int, Field(ge=0)] | Literal["auto", "end"], BeforeValidator(_check_bound)]
Range = Annotated[tuple[Bound, Bound], BeforeValidator(_check_pair), AfterValidator(_check_range)]
Name = Annotated[str, Field(min_length=1)]
SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int) -> int:
    """Bytes of a size such as `5GB` (decimal, as on the Hub), `5GiB`, or a plain number."""
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)", str(text))
    if match is None or match[2].upper() not in SIZES:
        raise ValueError("expected a size such as 5GB, 500MB or 5GiB")
    size = int(Fraction(match[1]) * SIZES[match[2].upper()])
    if size < 1:
        raise ValueError("a size must be at least one byte")
    return size


Size = Annotated[int, BeforeValidator(parse_size)]


class Source(Record):
    """One entry of a slice's `sources`."""

    model: Name | None = None
    """The model, or an alias from `models`; the recipe's `model` if not set."""
    layer_range: Range
    """Half-open range [a, b): layers a to b - 1, from 0. `auto` leaves a boundary to the planner; `end` is the depth of the model."""


def _check_one(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 1:
        raise ValueError("'sources' is a list of exactly one source: {model, layer_range}")
    return value


class Slice(Record):
    """Consecutive layers of one model: `{model, layer_range}`, or mergekit's `{sources: [{model, layer_range}]}`."""

    model: Name | None = None
    """The model, or an alias from `models`; the recipe's `model` if not set."""
    layer_range: Range | None = None
    """Half-open range [a, b): layers a to b - 1, from 0."""
    sources: Annotated[tuple[Source], BeforeValidator(_check_one)] | None = None
    """mergekit's form: a list of exactly one source."""

    @model_validator(mode="before")
    @classmethod
    def _one_form(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and ("sources" in data) == ("layer_range" in data):
            raise ValueError("a slice takes either 'layer_range' or 'sources'")
        if isinstance(data, Mapping) and "sources" in data and "model" in data:
            raise ValueError("with 'sources' the model belongs into the source: {model, layer_range}")
        return data

    @property
    def source(self) -> Source:
        """The slice in one form, whichever was written."""
        if self.sources is not None:
            return self.sources[0]
        assert self.layer_range is not None
        return Source(model=self.model, layer_range=self.layer_range)

    @property
    def path(self) -> tuple[Key, ...]:
        """Where below the slice its model and range are written."""
        return () if self.sources is None else ("sources", 0)


class StepBase(Record):
    """One step: a mapping with the operation as its only key."""

    @model_validator(mode="before")
    @classmethod
    def _one_operation(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and len(data) > 1:
            raise ValueError(f"a step is one operation, found {len(data)} ({', '.join(map(str, data))}): write each as a step of its own")
        if not isinstance(data, Mapping) or not data:
            raise ValueError(f"expected a step such as 'prune: {{layers: 6}}' (operations: {', '.join(OPERATIONS)})")
        return {name: {} if value is None else value for name, value in data.items()}

    @property
    def name(self) -> str:
        """Name of the operation."""
        return next(name for name in OPERATIONS if getattr(self, name) is not None)

    @property
    def operation(self) -> Operation:
        """The operation itself."""
        operation: Operation = getattr(self, self.name)
        return operation


def _step_model() -> type[StepBase]:
    fields: dict[str, Any] = {}
    for name, kind in OPERATIONS.items():
        fields[name] = (Union[kind, None], Field(default=None, description=(kind.__doc__ or "").partition("\n")[0]))  # noqa: UP007
    return create_model("Step", __base__=StepBase, __doc__="One step: a mapping with the operation as its only key.", **fields)


Step = _step_model()


class Output(Record):
    """Where the result goes."""

    path: Name
    """Folder to write, relative to the current directory. It must not hold anything yet."""
    max_shard_size: Size = 5 * 10**9
    """Largest size of one weight file, for example `5GB`; a larger tensor gets a file of its own."""


class Evaluate(Record):
    """What is measured on the source and on the result."""

    perplexity: Calibration | None = None
    """Held-out text on which perplexity is measured; `builtin` is the held-out part of the built-in text."""
    generate: str | None = None
    """A prompt that both models continue greedily, to look at."""
    tokens: int = Field(default=30, ge=1, strict=True)
    """Tokens to generate after the prompt."""


def _as_output(value: Any) -> Any:
    if not isinstance(value, str | Mapping | Output):
        raise ValueError("'output' is a folder, or a mapping with a path")
    return {"path": value} if isinstance(value, str) else value


class Recipe(Record):
    """A recipe. `slices` (or `model`) make the starting stack, `steps` change it in order."""

    model: Name | None = None
    """The model: a Hub id, `id@revision`, a folder, or a .gguf file."""
    models: dict[str, Name] = {}
    """Aliases for models, for use in slices."""
    slices: Annotated[tuple[Slice, ...], Field(min_length=1)] | None = None
    """Slices that make the starting stack, first layers first."""
    merge_method: Literal["passthrough"] | None = None
    """mergekit's word for stacking slices; only `passthrough` moves layers."""
    depth: int | None = Field(default=None, ge=1, strict=True)
    """Layers that the slices must have in all; needed when a boundary is `auto`."""
    steps: tuple[Step, ...] = ()  # type: ignore[valid-type]
    """Operations on the stack, in order; each sees the stack as the earlier ones left it."""
    calibration: Calibration = BuiltinCalibration()
    """Text on which distances are measured when something is `auto`."""
    metric: MetricSpec | None = None
    """The metric that decides, when there is only one."""
    metrics: Annotated[tuple[MetricSpec, ...], Field(min_length=1)] | None = None
    """Metrics that are measured and reported; the first decides."""
    output: Annotated[Output, BeforeValidator(_as_output)] | None = None
    """Folder to write, or a mapping with more settings."""
    evaluate: Evaluate | None = None
    """What is measured on the source and on the result after writing."""

    _text: YamlText | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.model is None and self.slices is None:
            raise ValueError("needs 'model' or 'slices'")
        if self.metric is not None and self.metrics is not None:
            raise PydanticCustomError("both", "takes 'metric' or 'metrics', not both", {"at": "metrics"})
        return self

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        """Metrics to measure, the deciding one first, each once."""
        listed: list[Metric] = [self.metric] if self.metric is not None else list(self.metrics or (Angular(),))
        listed += [metric for step in self.steps if (metric := getattr(step.operation, "metric", None)) is not None]  # type: ignore[attr-defined]
        return tuple({metric.label: metric for metric in listed}.values())

    def where(self, *path: Key, key: bool = False) -> str:
        """`file:line:column` of a value (or of its key); a dotted path when the recipe was not read from text."""
        return self._text.where(path, key=key) if self._text is not None else ".".join(map(str, path)) or "recipe"

    @classmethod
    def schema_document(cls) -> dict[str, Any]:
        """The JSON Schema of recipes."""
        head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "layercut recipe"}
        return {**head, **{key: value for key, value in cls.model_json_schema(by_alias=True).items() if key != "title"}}

    def described(self) -> dict[str, Any]:
        """The recipe as plain JSON data, unset keys left out."""
        return self.model_dump(mode="json", exclude_unset=True, by_alias=True)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe. `overrides` are `KEY=VALUE` as for `--set`. Raises RecipeError, one line for each fault."""
    text = YamlText.read(Path(path))
    for assignment in overrides:
        text.override(assignment)
    return parse_recipe(text)


def parse_recipe(text: YamlText) -> Recipe:
    """Validate the data of a YAML text. Raises RecipeError with file, line and column."""
    if text.duplicates:
        where, key = text.duplicates[0]
        raise RecipeError(f"key '{key}' stands twice in one mapping", where=where)
    try:
        recipe = Recipe.model_validate(text.data)
    except ValidationError as error:
        raise RecipeError("\n".join(dict.fromkeys(_line(fault, text) for fault in _causes(error.errors())))) from None
    recipe._text = text
    return recipe


def _causes(faults: Sequence[ErrorDetails]) -> Iterator[ErrorDetails]:
    """Faults that are mistakes of the writer: a list that lost its faulty entries is not too short, a misspelt key not missing too."""
    misspelt = {fault["loc"][:-1] for fault in faults if fault["type"] == "extra_forbidden"}
    for fault in faults:
        path, kind = fault["loc"], fault["type"]
        caused = kind == "too_short" and any(other["loc"][: len(path)] == path and other is not fault for other in faults)
        if not caused and not (kind == "missing" and path[:-1] in misspelt):
            yield fault


def _line(fault: ErrorDetails, text: YamlText) -> str:
    """One line for a fault that pydantic found: place, what was found, what to do."""
    path, kind, context = fault["loc"], fault["type"], fault.get("ctx", {})
    hint = None
    if kind == "extra_forbidden":
        known = sorted(_known(path[:-1]))
        what = ("operation", "operations") if path[:1] == ("steps",) and len(path) == 3 else ("key", "keys")
        message = f"unknown {what[0]} '{path[-1]}'"
        hint = did_you_mean(str(path[-1]), known) or f"known {what[1]} are {', '.join(known)}"
    elif kind == "missing":
        message = f"'{path[-1]}' is missing"
    elif kind.startswith("union_tag"):
        name = context["discriminator"].strip("'")
        known = sorted(_tags(path, name))
        message = f"'{name}' is missing" if kind == "union_tag_not_found" else f"unknown {name} '{context['tag']}'"
        hint = did_you_mean(context.get("tag", ""), known) or f"known are {', '.join(known)}"
        path = (*path, name)
    elif kind in ("value_error", "assertion_error") or kind not in get_args(ErrorType):
        message = _with_found(str(context.get("error", fault["msg"])), fault.get("input"))
        path = (*path, context["at"]) if "at" in context else path
    else:
        shown = ".".join(str(part) for part in text.present(path))
        message = f"{shown or 'recipe'}: {_expected(fault)}, found {_shown(fault.get('input'))}"
    return str(RecipeError(message, where=text.where(path, key=kind == "extra_forbidden" or "at" in context), hint=hint))


def _with_found(message: str, found: Any) -> str:
    """Add a plain value that the message does not show already."""
    return message if isinstance(found, Mapping | list | tuple) or _shown(found) in message else f"{message}, found {_shown(found)}"


EXPECTED = {
    "int_type": "expected a whole number", "int_parsing": "expected a whole number", "int_from_float": "expected a whole number",
    "string_type": "expected text", "bool_type": "expected true or false", "bool_parsing": "expected true or false",
    "tuple_type": "expected a list", "dict_type": "expected a mapping", "model_type": "expected a mapping",
    "model_attributes_type": "expected a mapping", "float_parsing": "expected a number", "too_short": "expected at least one entry",
    "string_too_short": "expected some text", "greater_than_equal": "expected at least {ge}", "less_than_equal": "expected at most {le}",
}  # fmt: skip


def _expected(fault: ErrorDetails) -> str:
    known = EXPECTED.get(fault["type"])
    text = fault["msg"].replace("Input should be", "expected") if known is None else known.format(**fault.get("ctx", {}))
    return text[0].lower() + text[1:]


def _shown(value: Any) -> str:
    text = "nothing" if value is None else f"'{value}'" if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _known(path: Iterable[Key]) -> set[str]:
    """Keys that are known at a place of the recipe, over all forms that it can take."""
    return {field.alias or name for kind in _kinds(path) for name, field in kind.model_fields.items()}


def _tags(path: Iterable[Key], name: str) -> set[str]:
    """Values of the key that tells the forms apart which a place of the recipe can take."""
    return {str(kind.model_fields[name].default) for kind in _kinds(path) if name in kind.model_fields}


def _kinds(path: Iterable[Key]) -> list[type[BaseModel]]:
    kinds: list[type[BaseModel]] = [Recipe]
    for part in path:
        fields = [kind.model_fields[str(part)].annotation for kind in kinds if isinstance(part, str) and part in kind.model_fields]
        kinds = [model for field in fields for model in _models(field)] or kinds
    return kinds


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models that stand anywhere in an annotation."""
    if get_origin(annotation) is not None:
        for part in get_args(annotation):
            yield from _models(part)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
