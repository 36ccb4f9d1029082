"""The recipe: what the user wants, validated and frozen. Says nothing about any real checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from layercut import mergekit
from layercut.calibration import BuiltinCalibration, Calibration, Single
from layercut.declarations import NOTHING, Architecture
from layercut.errors import RecipeError
from layercut.faults import fault_lines
from layercut.metrics import Angular, Metric, MetricSpec
from layercut.operations import OPERATIONS, Operation
from layercut.scalings import Parameters
from layercut.selectors import Selectors
from layercut.sizes import Size
from layercut.stack import Record
from layercut.upload import Upload, as_upload
from layercut.yamltext import Key, PlainData, YamlText


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
# Dtypes that weights can be cast to, and their names in safetensors headers.
DTYPES: Mapping[str, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
DEFAULT_SHARD = 5 * 10**9
Dtype = Literal["float16", "bfloat16", "float32", "float64"]


class Source(Record):
    """One entry of a slice's `sources`."""

    model: Name | None = None
    """The model, or an alias from `models`; the recipe's `model` if not set."""
    layer_range: Range
    """Half-open range [a, b): layers a to b - 1, from 0. `auto` leaves a boundary to the planner; `end` is the depth of the model."""
    parameters: Parameters | None = None
    """Factors for the tensors of this slice."""


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
    parameters: Parameters | None = None
    """Factors for the tensors of this slice."""
    least: Annotated[int, Field(ge=1, strict=True)] | None = Field(default=None, alias="min")
    """Layers that a slice with an `auto` boundary has at least."""
    most: Annotated[int, Field(ge=1, strict=True)] | None = Field(default=None, alias="max")
    """Layers that a slice with an `auto` boundary has at most."""
    protect: Selectors | None = None
    """Layers of the model that a slice with an `auto` boundary must hold."""
    overlap: Annotated[int, Field(ge=0, strict=True)] | None = None
    """Layers of the slice before it that this slice begins with again, when its start is `auto`."""

    @model_validator(mode="before")
    @classmethod
    def _one_form(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not {*data} <= {field.alias or name for name, field in cls.model_fields.items()}:
            return data  # an unknown key is the mistake
        if isinstance(data, Mapping) and ("sources" in data) == ("layer_range" in data):
            raise ValueError("a slice takes either 'layer_range' or 'sources'")
        if isinstance(data, Mapping) and "sources" in data and "model" in data:
            raise ValueError("with 'sources' the model belongs into the source: {model, layer_range}")
        return data

    @model_validator(mode="after")
    def _constraints(self) -> Slice:
        if self.least is not None and self.most is not None and self.least > self.most:
            raise PydanticCustomError("bounds", f"min {self.least} is more than max {self.most}", {"at": "min"})
        if self.overlap is not None and self.source.layer_range[0] != "auto":
            raise PydanticCustomError("overlap", "'overlap' goes with a start that is auto", {"at": "overlap"})
        return self

    @property
    def source(self) -> Source:
        """The slice in one form, whichever was written."""
        if self.sources is not None:
            return self.sources[0]
        assert self.layer_range is not None
        return Source(model=self.model, layer_range=self.layer_range)  # its parameters are the slice's own

    @property
    def path(self) -> tuple[Key, ...]:
        """Where below the slice its model and range are written."""
        return () if self.sources is None else ("sources", 0)


class StepBase(Record):
    """One step: a mapping with the operation as its only key."""

    @model_validator(mode="before")
    @classmethod
    def _one_operation(cls, data: Any) -> Any:
        known = [name for name in data if name in OPERATIONS] if isinstance(data, Mapping) else []
        stray = next((name for kind in known for name in data if name in OPERATIONS[kind].model_fields), None)
        if len(known) == 1 and stray is not None:
            raise PydanticCustomError(
                "beside",
                "'{at}' stands beside '{kind}', not below it; indent it further, or write {kind}: {{at}: …}",
                {"at": stray, "kind": known[0]},
            )
        if isinstance(data, Mapping) and len(data) > 1 and len(known) == len(data):
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
    max_shard_size: Size = DEFAULT_SHARD
    """Largest size of one weight file, for example `5GB`; a larger tensor gets a file of its own."""


class Evaluate(Record):
    """What is measured on the source and on the result."""

    perplexity: Single | None = None
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
    calibration: Calibration = BuiltinCalibration.model_construct()
    """Text on which distances are measured when something is `auto`."""
    metric: MetricSpec | None = None
    """The metric that choices by distance go by, when there is only one."""
    metrics: Annotated[tuple[MetricSpec, ...], Field(min_length=1)] | None = None
    """Metrics that are measured and reported; choices by distance go by the first."""
    parameters: Parameters | None = None
    """Factors for the tensors of all slices, or of the model."""
    base_model: Name | None = None
    """The model that config and companion files come from; the model of the first slice if not set."""
    tokenizer_source: Name | None = None
    """The model whose tokenizer files are carried over; `base` (the default) is the one that the config comes from."""
    chat_template: Name | None = None
    """A chat template to write instead of the model's: its text (Jinja), or alpaca, chatml, exaone, llama3 or mistral."""
    dtype: Dtype | None = None
    """Dtype that floating-point weights are cast to; theirs if not set."""
    out_dtype: Dtype | None = None
    """Dtype that they are written in, when arithmetic is done in another one."""
    allow: Literal["inexact"] | None = None
    """`inexact` writes stacks that would load but compute something else than their layers did, and says so in plan and report."""
    stack: Name | dict[str, Name] | None = None
    """Which stack of layers is meant where a model has several: `text`, `encoder`, `decoder`, `vision`, `audio`, or a prefix of tensors;
    for several models, a mapping from their aliases. The language stack if not set, and of an encoder-decoder the decoder."""
    architecture: Architecture = NOTHING
    """What layercut cannot know of an architecture that is not in its tables: which values and tensors follow the layers."""
    output: Annotated[Output, BeforeValidator(_as_output, json_schema_input_type=Name | Output)] | None = None
    """Folder to write, or a mapping with more settings."""
    evaluate: Evaluate | None = None
    """What is measured on the source and on the result after writing."""
    upload: Annotated[Upload, BeforeValidator(as_upload, json_schema_input_type=str | Upload)] | None = None
    """Repository on the Hub that the result is published in after writing, or a mapping with more settings."""

    _text: YamlText | None = PrivateAttr(default=None)
    _read: mergekit.Translation | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.model is None and self.slices is None:
            raise ValueError("needs 'model' or 'slices'")
        if self.metric is not None and self.metrics is not None:
            raise PydanticCustomError("both", "takes 'metric' or 'metrics', not both", {"at": "metrics"})
        return self

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings of the reader of the file."""
        return () if self._read is None else self._read.notes

    def stack_of(self, alias: str) -> str | None:
        """The stack that is meant of a model, by its alias."""
        return self.stack.get(alias) if isinstance(self.stack, dict) else self.stack

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        """Metrics to measure, the deciding one first, each once."""
        listed: list[Metric] = [self.metric] if self.metric is not None else list(self.metrics or (Angular(),))
        listed += [metric for step in self.steps if (metric := getattr(step.operation, "metric", None)) is not None]  # type: ignore[attr-defined]
        return tuple({metric.label: metric for metric in listed}.values())

    @property
    def shard_size(self) -> int:
        """Largest size of one weight file, in bytes."""
        return DEFAULT_SHARD if self.output is None else self.output.max_shard_size

    def where(self, *path: Key, key: bool = False) -> str:
        """`file:line:column` of a value (or of its key); a dotted path when the recipe was not read from text."""
        if self._text is None or self._read is None:
            return ".".join(map(str, path)) or "recipe"
        return self._text.where(self._read.origin(path), key=key)

    @classmethod
    def schema_document(cls) -> dict[str, Any]:
        """The JSON Schema of recipes."""
        head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "layercut recipe"}
        return {**head, **{key: value for key, value in cls.model_json_schema(by_alias=True).items() if key != "title"}}

    def described(self) -> dict[str, Any]:
        """The recipe as plain JSON data, unset keys left out."""
        return self.model_dump(mode="json", exclude_unset=True, by_alias=True)


def load_recipe(recipe: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a file, or the same as data. `overrides` are `KEY=VALUE` as for `--set`. Raises RecipeError, one line a fault."""
    text = PlainData(recipe) if isinstance(recipe, Mapping) else YamlText.read(Path(recipe))
    for assignment in overrides:
        text.override(assignment)
    return parse_recipe(text)


def parse_recipe(text: YamlText) -> Recipe:
    """Validate the data of a YAML text, in mergekit's dialect when it is such a file. Raises RecipeError with file, line and column."""
    foreign = mergekit.recognised(text.data)
    if text.duplicates and not foreign:
        where, key = text.duplicates[0]
        raise RecipeError(f"key '{key}' stands twice in one mapping", where=where)
    read = mergekit.translate(text) if foreign else mergekit.Translation(text.data, ())
    try:
        recipe = Recipe.model_validate(read.data)
    except ValidationError as error:
        raise RecipeError("\n".join(fault_lines(error, text, Recipe, read.origin))) from None
    recipe._text, recipe._read = text, read
    return recipe
