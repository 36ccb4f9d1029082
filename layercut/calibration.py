"""Calibration settings: what a recipe says of the text that distances are measured on. Reads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, StrictBool, Tag, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from layercut.errors import CalibrationError, did_you_mean
from layercut.record import Record


def _check_bos(value: object) -> object:
    """One message instead of one for each kind of value."""
    if not isinstance(value, bool) and value != "auto":
        raise PydanticCustomError("bos", "bos must be auto, true or false")
    return value


class Auto(Record):
    """As many samples as make the choice sure: text is taken in looks, each as long as all before it."""

    least: int = Field(8, ge=2)
    """Samples at the first look."""
    most: int = Field(128, ge=2)
    """Samples after which the choice is made, settled or not."""


def _as_samples(value: object) -> object:
    """`auto` stands for its defaults; one message instead of one for each kind of value."""
    if value == "auto":
        return Auto()
    if isinstance(value, bool) or not isinstance(value, int | Auto | Mapping):
        raise PydanticCustomError("samples", "samples must be a number, auto, or a mapping of least and most")
    if isinstance(value, int) and value < 1:
        raise PydanticKnownError("greater_than_equal", {"ge": 1})
    return value


def _kind(value: object) -> str:
    return "auto" if isinstance(value, Auto | Mapping) else "number"


class CalibrationBase(Record):
    """How text becomes samples, wherever it comes from."""

    samples: Annotated[
        Annotated[Annotated[int, Tag("number")] | Annotated[Auto, Tag("auto")], Discriminator(_kind)],
        BeforeValidator(_as_samples, json_schema_input_type=Annotated[int, Field(ge=1)] | Literal["auto"] | Auto),
    ] = 128
    """Token sequences that are used at most. `auto` takes text until the choice is settled, and says how sure it is: 8 to 128 samples, or
    `{least: 16, most: 512}`."""
    max_length: int = Field(512, ge=2)
    """Tokens of a sample at most, a BOS token included."""
    min_length: int = Field(1, ge=1)
    """Tokens of a sample at least, a BOS token included; shorter documents are skipped."""
    packed: bool = False
    """Join all documents, with the tokenizer's EOS token between them, and cut the whole into samples of `max_length` tokens. Otherwise a
    document is a sample of its own, cut off at `max_length`."""
    seed: int | None = None
    """Shuffles the samples, through a buffer of 1,024 so that nothing is read to its end; without it they come in the order of the text."""
    batch_size: int = Field(8, ge=1)
    """Samples that run through the model at once; changes speed and memory, not results."""
    bos: Annotated[Literal["auto"] | StrictBool, BeforeValidator(_check_bos)] = "auto"
    """Whether each sample starts with the BOS token: auto does what the tokenizer does by default, and in conversations what its chat
    template does."""

    @property
    def most(self) -> int:
        """Samples at most."""
        return self.samples.most if isinstance(self.samples, Auto) else self.samples


class BuiltinSource(Record):
    """English prose that comes with layercut: 150 kB of State of the Union addresses (CC0), and 50 kB held out for perplexity."""

    source: Literal["builtin"] = "builtin"
    """The text that comes with layercut."""

    @property
    def title(self) -> str:
        """What the source is called in messages."""
        return "builtin"


class Columned(Record):
    """A source of rows: what a document is made of."""

    column: str | None = None
    """Column that holds the text, or the conversation: a list of `{role, content}`, or of ShareGPT's `{from, value}`. Without it `text`, or
    else `messages` or `conversations`, whichever the first row has."""
    prompt: str | None = None
    """Column that holds what the user says, where each row is one question and its answer."""
    completion: str | None = None
    """Column that holds what the assistant says then."""

    @model_validator(mode="after")
    def _one_form(self) -> Columned:
        if (self.prompt is None) != (self.completion is None):
            given, other = ("prompt", "completion") if self.completion is None else ("completion", "prompt")
            raise PydanticCustomError("pair", f"'{given}' goes with '{other}'", {"at": given})
        if self.prompt is not None and self.column is not None:
            raise PydanticCustomError("both", "takes 'column', or 'prompt' and 'completion', not both", {"at": "column"})
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are named: none, one with documents, or one with prompts and one with completions."""
        if self.prompt is not None and self.completion is not None:
            return (self.prompt, self.completion)
        return () if self.column is None else (self.column,)


class TextSource(Columned):
    """Local files: .txt (one running text), .jsonl, .csv and .parquet (one document a row)."""

    source: Literal["text"] = "text"
    """Local files."""
    path: str = Field(min_length=1)
    """A file, or a pattern such as `texts/*.jsonl`; files are read in the order of their names."""

    @property
    def title(self) -> str:
        """What the source is called in messages."""
        return self.path


class HubSource(Columned):
    """A dataset of the Hugging Face Hub."""

    source: Literal["hub"] = "hub"
    """A dataset of the Hugging Face Hub."""
    dataset: str = Field(min_length=1)
    """Name of the dataset, for example `allenai/c4`."""
    name: str | None = None
    """Configuration of the dataset, for example `en`."""
    split: str = "train"
    """Split that is read, for example `validation`."""
    revision: str | None = None
    """Branch, tag or commit of the dataset."""
    streaming: bool = True
    """Read rows as they are needed instead of downloading the split first."""

    @property
    def title(self) -> str:
        """What the source is called in messages."""
        return self.dataset


class BuiltinCalibration(BuiltinSource, CalibrationBase):
    """English prose that comes with layercut: 150 kB of State of the Union addresses (CC0), and 50 kB held out for perplexity."""


class TextCalibration(TextSource, CalibrationBase):
    """Local files: .txt (one running text), .jsonl, .csv and .parquet (one document a row)."""


class HubCalibration(HubSource, CalibrationBase):
    """A dataset of the Hugging Face Hub."""


class Weighted(Record):
    """A part of a mix."""

    weight: float = Field(1, gt=0, allow_inf_nan=False)
    """Share of the samples, in proportion to the weights of the other parts."""


class BuiltinPart(BuiltinSource, Weighted):
    """The text that comes with layercut, as a part of a mix."""


class TextPart(TextSource, Weighted):
    """Local files, as a part of a mix."""


class HubPart(HubSource, Weighted):
    """A dataset of the Hugging Face Hub, as a part of a mix."""


class MixCalibration(CalibrationBase):
    """Several sources, each with its share of the samples. Of a source that ends too soon there are fewer, and no others instead."""

    source: Literal["mix"] = "mix"
    """Several sources."""
    of: tuple[Annotated[BuiltinPart | TextPart | HubPart, Field(discriminator="source")], ...] = Field(min_length=1)
    """The sources, with their weights."""


Source: TypeAlias = BuiltinSource | TextSource | HubSource
"""Where documents come from."""
Single: TypeAlias = Annotated[BuiltinCalibration | TextCalibration | HubCalibration, Field(discriminator="source")]
"""The settings of one source."""
Calibration: TypeAlias = Annotated[BuiltinCalibration | TextCalibration | HubCalibration | MixCalibration, Field(discriminator="source")]
"""The `calibration:` mapping of a recipe."""


def sources(calibration: Calibration) -> Sequence[Source]:
    """The sources of a calibration, one or more."""
    return calibration.of if isinstance(calibration, MixCalibration) else (calibration,)


def described(source: Source) -> dict[str, Any]:
    """What a source is, as plain JSON data, without what all sources of a recipe have in common."""
    return {key: value for key, value in source.model_dump(mode="json").items() if key not in CalibrationBase.model_fields}


def changed(calibration: Calibration, text: Mapping[str, Any]) -> Calibration:
    """The calibration with other settings; a path makes it one of local files."""
    if not text:
        return calibration
    data = calibration.model_dump()
    if "path" in text:
        data = {"source": "text", **{name: data[name] for name in CalibrationBase.model_fields if name in data}}
    adapter: TypeAdapter[Calibration] = TypeAdapter(Calibration)
    try:
        return adapter.validate_python(data | dict(text))
    except ValidationError as error:
        first = error.errors()[0]
        key, known = str(first["loc"][-1]), sorted(data.keys() | {"path", "column"})
        if key not in known:
            hint = did_you_mean(key, known) or f"known are {', '.join(known)}"
            raise CalibrationError(f"unknown key '{key}' of text", hint=hint) from None
        raise CalibrationError(f"{key}: {first['msg']}", where=f"{data['source']} text") from None
