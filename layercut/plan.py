"""The plan: what will be done, down to every byte range, and why. Frozen records with a JSON form; decides nothing."""

from __future__ import annotations

import hashlib
import json
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, FiniteFloat, ValidationError

from layercut.errors import LayercutError
from layercut.header import ITEM_BITS, MAX_ELEMENTS
from layercut.stack import Digest, Distance, LayerRef, Mending, Record

__all__ = [
    "FORMAT",
    "Actions",
    "Band",
    "Candidate",
    "Choice",
    "Companion",
    "Distance",
    "Edit",
    "Gather",
    "Grown",
    "LayerRef",
    "LeftOut",
    "Map",
    "Measurement",
    "Mending",
    "OutputFile",
    "Part",
    "Plan",
    "Record",
    "Seam",
    "Source",
    "Strip",
    "Table",
    "TensorCopy",
    "TensorMade",
    "Trial",
]

FORMAT: Literal["layercut-plan/1"] = "layercut-plan/1"
MAX_PLAN = 200_000_000
"""Bytes of a plan that are read at most: one of 200,000 tensors takes half of that."""
MAX_LAYERS = 1_000_000
"""A layer index in the name of a tensor has six digits at most."""


def _countable(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What `read_header` takes for a shape: a product of any such numbers is quickly had."""
    elements = 1
    for length in shape:
        elements *= length
        if not 0 <= length < MAX_ELEMENTS or elements >= MAX_ELEMENTS:
            raise ValueError("a shape holds whole numbers from 0, and fewer than 2**63 elements")
    return shape


Shape = Annotated[tuple[int, ...], AfterValidator(_countable)]
Position = Annotated[int, Field(ge=0, lt=MAX_ELEMENTS)]


class Source(Record):
    """A source checkpoint, as it was found when the plan was made."""

    reference: str
    """The model as the recipe names it."""
    folder: str
    """The local folder that holds it (absolute)."""
    revision: str | None
    """Commit of a Hub model, else null."""
    depth: Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
    """Number of layers L of the stack that is edited."""
    parameters: int
    """Number of elements in all tensors that are read from it."""
    digest: str
    """sha256 over config.json and over name, size and header of every weight file: tells another structure apart, not other values."""
    files: dict[str, int]
    """Size in bytes of every weight file."""


class Seam(Record):
    """A place where boundary state `h_from` of one model is handed to a layer that expects `h_to` of another (or the same)."""

    at: int
    """Output layer index before which the seam lies; 0 is before the first layer, depth is after the last."""
    from_model: str
    from_boundary: int
    to_model: str
    to_boundary: int
    distances: dict[str, Distance] = {}
    """Distance by metric label; empty when nothing was measured."""


class Candidate(Record):
    """One way in which an `auto` could have been resolved."""

    start: int
    """First position of the block, or the boundary, in the stack as the step saw it."""
    stop: int
    """One past the last position of the block."""
    cost: FiniteFloat
    """Total seam distance of the whole stack after this choice."""
    stderr: FiniteFloat
    """Standard error of `cost`, seams taken as independent."""


class Trial(Record):
    """A stack that was run on text before a choice was made."""

    name: str
    """What was tried: a layer, a round of a search, a strategy, or a number of layers."""
    chosen: str
    """The positions that it chooses, in the stack as the step saw it: half-open, from 0."""
    loss: FiniteFloat
    """Negative log-likelihood of the text, in nats a token."""
    increase: FiniteFloat
    """By how much of the loss of the stack as the step saw it this is more: 0.05 is 5 %."""
    stderr: FiniteFloat
    """Standard error of `increase`, from samples that are compared one by one."""
    text: Literal["calibration", "held out"]
    """Whether the text is the one that layers were chosen on, or other text."""


class Choice(Record):
    """A decision that the recipe left to the planner, with the evidence for it."""

    where: str
    """Place in the recipe, for example `steps.0.prune`."""
    metric: str
    """Label of the metric that decided, or `loss`."""
    chosen: str
    """What was chosen, in words: half-open, from 0."""
    cost: FiniteFloat
    """Total seam distance of the stack that was chosen; its loss in nats a token, where that decided."""
    candidates: tuple[Candidate, ...] = ()
    """All candidates of a one-block choice, in order of position; empty for a choice of several boundaries."""
    trials: tuple[Trial, ...] = ()
    """Stacks that were run, first the one that the step saw, then in the order in which they were tried; empty where distance decided."""
    maps: tuple[Mending, ...] = ()
    """Maps that were fitted to make up for a cut, in order of position."""
    run_on: dict[str, Any] = {}
    """The text of the trials, settings and versions."""


class Table(Record):
    """Distances between all boundaries of two models: `mean[i][j]` is the distance from boundary i of `a` to j of `b`."""

    metric: str
    """Metric label, for example `angular[last]`."""
    a: str
    b: str
    mean: tuple[tuple[FiniteFloat, ...], ...]
    stderr: tuple[tuple[FiniteFloat, ...], ...]


class Measurement(Record):
    """What the engine measured on the calibration text."""

    tables: tuple[Table, ...]
    samples: int
    """Token sequences that were used."""
    tokens: int
    """Tokens that were used; pads never count."""
    details: dict[str, Any]
    """Data source, settings, BOS policy, dtype, device, documents read and skipped, versions."""

    def table(self, metric: str, a: str, b: str) -> Table:
        """The table of `metric` between models `a` and `b`. Raises KeyError when it was not measured."""
        for table in self.tables:
            if (table.metric, table.a, table.b) == (metric, a, b):
                return table
        raise KeyError(f"{metric} between {a} and {b}")


class Edit(Record):
    """One changed value of config.json."""

    key: str
    """Dotted path of the value."""
    before: Any
    after: Any
    reason: str


class TensorCopy(Record):
    """One tensor of the output and the byte range of a source file that it is copied from."""

    name: str
    dtype: str
    shape: Shape
    model: str
    """Alias of the source."""
    file: str
    """Weight file inside the source folder."""
    begin: Position
    """First byte in that file (absolute, the header included)."""
    end: Position

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Part(Record):
    """A byte range that goes into an average, and its weight."""

    model: str
    file: str
    begin: Position
    end: Position
    dtype: str
    weight: FiniteFloat


class Strip(Record):
    """The same columns of every row of a table: `width` bytes at `begin`, and again every `stride` bytes."""

    model: str
    file: str
    begin: Position
    stride: Position
    width: Position


class Gather(Record):
    """A tensor whose rows are strips of the rows of other tensors, side by side."""

    dtype: str
    rows: Annotated[int, Field(ge=1, lt=MAX_ELEMENTS)]
    strips: Annotated[tuple[Strip, ...], Field(min_length=1)]
    at: Position = 0
    """Byte of the gathered tensor at which this piece of it begins."""

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return sum(strip.width for strip in self.strips)


class Band(Record):
    """A factor for the first columns of every row: elements before `stop` of each `row`."""

    by: FiniteFloat
    row: Annotated[int, Field(ge=1, lt=MAX_ELEMENTS)]
    stop: Position
    at: Position = 0
    """Element of the tensor at which this piece of it begins."""


class Grown(Record):
    """The first part `q` is moved along the second `k` until exp(q . k) is larger by `by`: what `cast` is given is the new `q`."""

    by: Annotated[FiniteFloat, Field(gt=0)]
    at: Position = 0
    """Element of the tensor at which this piece of it begins; the parts are whole in every piece."""


class Map(Record):
    """A linear map T that a tensor is multiplied by: `T' W` where the outputs of W are its rows, and `W T` where they are columns."""

    sha256: Digest
    """Of the file that holds the map (`Plan.maps` says where)."""
    size: Annotated[int, Field(ge=1, lt=1 << 20)]
    """The map has size x size elements."""
    columns: bool
    """Whether outputs are the last dimension of the tensor: in a bias they are."""


class TensorMade(Record):
    """One tensor of the output that is computed: `cast(sum of weight * part) * factors`, one factor after the other, then `amend`.

    Without parts it is zero, or what `gather` says. The cast is to `compute` (or, when null, to the dtype of the first part); an
    average is taken in float32, each product is rounded in the dtype of the computation, and the result is cast to `dtype`. Maps come
    after the factors, computed by `folding`; each is rounded in the dtype of the computation, and the last one to `dtype` only.
    """

    name: str
    dtype: str
    shape: Shape
    parts: tuple[Part, ...]
    factors: tuple[FiniteFloat, ...] = ()
    compute: str | None = None
    gather: Gather | None = None
    """Strips of other tensors, in place of parts."""
    amend: Band | Grown | None = None
    """What makes up for the new place of a layer whose arithmetic depends on it, beyond plain factors."""
    maps: tuple[Map, ...] = ()

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BITS[self.dtype] // 8


class OutputFile(Record):
    """One safetensors file of the output: its tensors in the order of their bytes, without holes."""

    name: str
    metadata: dict[str, str]
    """The `__metadata__` of the header."""
    tensors: tuple[TensorCopy | TensorMade, ...]
    header_size: int | None = None
    """Bytes before the first weight byte, where they are more than needed so that blocks stand as in the source; null: as few as needed."""


class Companion(Record):
    """A file that is carried over byte for byte."""

    name: str
    model: str
    size: int


class LeftOut(Record):
    """Something of a source that does not reach the output, and why."""

    model: str
    what: str
    """A tensor name, a file, or a layer."""
    reason: str


class Actions(Record):
    """Everything that execution needs, and nothing else: two plans with equal actions write equal folders."""

    layers: tuple[LayerRef, ...]
    """The output stack, first layer first."""
    config: str
    """Text of the output's config.json."""
    files: tuple[OutputFile, ...]
    index: str | None
    """Text of model.safetensors.index.json; null when there is one file."""
    companions: tuple[Companion, ...]
    texts: dict[str, str] = {}
    """Other files that are written from text, by name; they stand in for companions of the same name."""


class Plan(Record):
    """What will be done, with the evidence. Executing it takes no decision."""

    format: Literal["layercut-plan/1"] = FORMAT
    version: str
    """Version of layercut that made the plan."""
    recipe: dict[str, Any]
    """The recipe as it was understood, overrides applied."""
    output: str | None
    """Output folder that the recipe names."""
    sources: dict[str, Source]
    donor: str
    """Alias of the source that config and companion files come from."""
    seams: tuple[Seam, ...]
    choices: tuple[Choice, ...]
    edits: tuple[Edit, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()
    """Warnings for the reader."""
    measurement: Measurement | None
    maps: dict[Digest, str] = {}
    """Where the files of the maps lie that are folded into layers (absolute), by their sha256."""
    actions: Actions

    @property
    def digest(self) -> str:
        """sha256 of the actions and of what the sources were: equal digests write equal folders."""
        parts = [self.actions.model_dump(mode="json"), {name: source.digest for name, source in sorted(self.sources.items())}]
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(t.nbytes for file in self.actions.files for t in file.tensors)

    @property
    def disk_bytes(self) -> int:
        """Bytes that the output takes, headers and the report aside; where blocks are shared with the sources, fewer are new."""
        return self.weight_bytes + sum(companion.size for companion in self.actions.companions)

    def to_json(self) -> str:
        """The plan as JSON text that `Plan.from_json` and `layercut run` read back."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: Path | str = "plan") -> Plan:
        """Read a plan back. Raises LayercutError when the text is not a plan that this version can run."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "plan"
            hint = "make the plan again with: layercut plan RECIPE -o FILE"
            raise LayercutError(f"{place}: {first['msg']}", where=where, hint=hint) from None
