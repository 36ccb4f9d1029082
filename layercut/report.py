"""The report: what was done, as facts. It names no folder of this machine, so equal runs write equal reports but for the clock."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError, model_validator

from layercut.companions import reject_escape
from layercut.copying import explained
from layercut.errors import CheckpointError
from layercut.header import quoted
from layercut.plan import Choice, Edit, LeftOut, Measurement, Plan, Seam
from layercut.smallfile import read_small
from layercut.stack import LayerRef, Record, runs

FORMAT: Final = "layercut-report/1"
REPORT = "layercut.json"
HEATMAP = "layercut.png"
"""The distances as a picture, beside a published report."""
MAX_REPORT = 50_000_000

# Keys that hold clocks and versions of this machine: the only ones in which two reports of equal plans differ.
VOLATILE = ("environment", "timings")


class ReportSource(Record):
    """A source checkpoint, without its place on this machine."""

    reference: str
    """The model as the recipe names it."""
    revision: str | None
    """Commit of a Hub model, else null."""
    digest: str
    """Structure digest, as in the plan."""
    depth: int
    """Number of layers of the stack that was edited."""
    parameters: int
    """Number of elements in all tensors that were read from it."""


class Change(Record):
    """A number before and after. Before is the donor's, also where layers of other sources went into the output."""

    before: int
    after: int


class WrittenFile(Record):
    """One file of the output."""

    bytes: int
    header_sha256: str | None = None
    """sha256 of the safetensors header, its 8-byte length included; null for other files."""
    sha256: str | None = None
    """sha256 of the whole file; null for weight files, whose bytes are copied or computed from those of the sources."""


class Published(Record):
    """Where the output was published."""

    repo: str
    revision: str
    """The branch, or `refs/pr/N`."""
    commit: str
    url: str
    """Address of the commit, or of the pull request."""


class Report(Record):
    """What was done. Written into the output folder as layercut.json."""

    format: Literal["layercut-report/1"] = FORMAT
    version: str
    """Version of layercut that made the plan."""
    plan: str
    """Digest of the plan: equal digests mean equal folders."""
    recipe: dict[str, Any]
    """The recipe as it was understood, overrides applied."""
    sources: dict[str, ReportSource]
    donor: str
    """Alias of the source that config and companion files come from."""
    layers: tuple[LayerRef, ...]
    """The output stack, first layer first."""
    kept: dict[str, tuple[str, ...]]
    """By source: its layers in the output, in output order, as half-open ranges such as `[0, 21)`. A layer with a map stands alone, and an
    average as the layers whose place it takes, with the source that it is named after."""
    dropped: dict[str, tuple[int, ...]]
    """By source: indices of the layers that are nowhere in the output, not even in an average."""
    seams: tuple[Seam, ...]
    choices: tuple[Choice, ...]
    edits: tuple[Edit, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    measurement: Measurement | None
    parameters: Change
    """Number of elements in all tensors: in those that are read from the donor, and in those of the output."""
    weight_bytes: Change
    """Size of all weight files, headers included: those of the donor, and those of the output."""
    files: dict[str, WrittenFile]
    """Every file of the output but this one."""
    evaluation: dict[str, Any] | None = None
    """Results on held-out text, when the recipe asked for them."""
    published: Published | None = None
    """Where it was published last. What is published itself says nothing of it."""
    environment: dict[str, str]
    """Versions of Python, the platform, and the libraries that were loaded."""
    timings: dict[str, float | str]
    """Start (UTC) and seconds."""

    @model_validator(mode="after")
    def _consistent(self) -> Report:
        """Donor and layers are of the sources: a report may come from a file that anyone wrote."""
        if self.donor not in self.sources:
            raise ValueError(f"the donor {quoted(self.donor)} is no source of it")
        for layer in self.layers:
            for model, index in ((layer.model, layer.index), *((share.model, share.index) for share in layer.shares)):
                if model not in self.sources or not 0 <= index < self.sources[model].depth:
                    raise ValueError(f"layer {index} of {quoted(model)} is no layer of a source of it")
        return self

    def with_evaluation(self, evaluation: Mapping[str, Any]) -> Report:
        """The same report with the results of an evaluation."""
        return self.model_copy(update={"evaluation": dict(evaluation)})

    def with_published(self, published: Published) -> Report:
        """The same report, published."""
        return self.model_copy(update={"published": published})

    def to_json(self) -> str:
        """The report as the text of layercut.json."""
        return self.model_dump_json(indent=1) + "\n"


def make_report(plan: Plan, *, files: Mapping[str, WrittenFile], parameters: int, timings: Mapping[str, float | str]) -> Report:
    """The report of an executed plan, from the files that were written and the number of elements found in them."""
    donor = plan.sources[plan.donor]
    layers = plan.actions.layers
    return Report(
        version=plan.version,
        plan=plan.digest,
        recipe=plan.recipe,
        sources=make_sources(plan),
        donor=plan.donor,
        layers=layers,
        kept={alias: layer_ranges(layers, alias) for alias in plan.sources},
        dropped={alias: _dropped(layers, alias, source.depth) for alias, source in plan.sources.items()},
        seams=plan.seams,
        choices=plan.choices,
        edits=plan.edits,
        left_out=plan.left_out,
        notes=plan.notes,
        measurement=plan.measurement,
        parameters=Change(before=donor.parameters, after=parameters),
        weight_bytes=Change(
            before=sum(donor.files.values()),
            after=sum(file.bytes for file in files.values() if file.header_sha256 is not None),
        ),
        files=dict(files),
        environment=_environment(),
        timings=dict(timings),
    )


def make_sources(plan: Plan) -> dict[str, ReportSource]:
    """The sources of a plan, as its report names them."""
    named = {"reference", "revision", "digest", "depth", "parameters"}
    return {alias: ReportSource(**source.model_dump(include=named)) for alias, source in plan.sources.items()}


def layer_ranges(layers: Sequence[LayerRef], alias: str) -> tuple[str, ...]:
    """Layers of one source in output order, consecutive ones joined: `("[0, 24)", "[8, 32)")`."""
    return tuple(str(run) for run in runs(layers) if run.model == alias)


def write_report(folder: Path, report: Report, durable: bool = True) -> None:
    """Write layercut.json into `folder`, replacing an older one at once: a reader sees either all of the old or all of the new.

    Raises OutputError.
    """
    path = folder / REPORT
    passing = folder / f".{REPORT}.layercut-partial"
    try:
        try:
            with passing.open("wb") as file:
                file.write(report.to_json().encode())
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                if durable:
                    os.fsync(file.fileno())
            passing.replace(path)
        except BaseException:
            passing.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise explained(error, path) from error


def read_report(folder: Path | str) -> Report:
    """Read layercut.json of an output folder. Raises CheckpointError when it is missing, damaged or of another version."""
    folder = Path(folder)
    path = folder / REPORT
    try:
        reject_escape(path, folder)
        text = read_small(path, MAX_REPORT)
    except FileNotFoundError:
        raise CheckpointError("is missing", where=path, hint="only folders that layercut wrote have one") from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "report"
        raise CheckpointError(f"is not a report that this version can read: {place}: {first['msg']}", where=path) from None


def file_digest(path: Path) -> WrittenFile:
    """Size and sha256 of a whole file, read a piece at a time."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return WrittenFile(bytes=size, sha256=digest.hexdigest())


def _dropped(layers: Sequence[LayerRef], alias: str, depth: int) -> tuple[int, ...]:
    used = {share.index for layer in layers for share in (layer.shares or (layer,)) if share.model == alias}
    return tuple(index for index in range(depth) if index not in used)


def _environment() -> dict[str, str]:
    """Versions, of libraries only when something else has loaded them: asking must not load them."""
    found = {"python": platform.python_version(), "platform": f"{sys.platform} {platform.machine()}"}
    for name in ("layercut", "safetensors", "torch", "transformers"):
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            found[name] = str(version)
    return found
