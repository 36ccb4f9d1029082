"""The analysis: distances of models as a document, tables, pictures and a page, and the folder that holds them. Measures nothing itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple

from layercut.accounts import text_name
from layercut.architecture import Member
from layercut.blockscores import BlockScore, best_blocks, csv_text, markdown, normalised, triangle
from layercut.copying import explained, sync
from layercut.errors import OutputError, printable
from layercut.heatmap import draw, draw_blocks
from layercut.lineplot import draw_layers
from layercut.page import make_page
from layercut.plan import Measurement
from layercut.record import Record
from layercut.staging import Place, check_place, check_vacant, publish, recover, resumable, staged, throw_away
from layercut.version import __version__

FORMAT: Final = "layercut-analysis/1"
PAGE = "index.html"


class AnalysedModel(Record):
    """A model whose distances were measured."""

    reference: str
    """The model as it was named."""
    revision: str | None
    """Commit of a Hub model, else null."""
    depth: int
    """Number of layers L; there are L + 1 boundaries."""
    digest: str
    """sha256 over the structure of the checkpoint, as in a plan."""


class Ranking(Record):
    """The block of least distance of every size, in one model and under one metric."""

    model: str
    metric: str
    blocks: tuple[BlockScore, ...]


class Analysis(Record):
    """Distances between all boundaries of one or more models, and what follows for cuts."""

    format: Literal["layercut-analysis/1"] = FORMAT
    version: str = __version__
    """Version of layercut that made the analysis."""
    models: dict[str, AnalysedModel]
    """By the names that the tables use."""
    rankings: tuple[Ranking, ...]
    measurement: Measurement
    """All tables: mean and standard error of every metric for every pair of boundaries."""

    def to_json(self) -> str:
        """The analysis as JSON text."""
        return self.model_dump_json(indent=1) + "\n"

    @property
    def about(self) -> str:
        """What was measured on, in one line."""
        used, details = self.measurement, self.measurement.details
        parts = [f"{used.samples} samples with {used.tokens} tokens of {text_name(details)}"]
        dtypes = details.get("dtype")
        if isinstance(dtypes, Mapping):
            parts.append("measured in " + " and ".join(sorted({str(dtype) for dtype in dtypes.values()})))
        return ", ".join([*parts, f"layercut {self.version}"])


def make_analysis(members: Mapping[str, Member], measurement: Measurement) -> Analysis:
    """The analysis of what was measured on these models."""
    models = {
        alias: AnalysedModel(
            reference=printable(checkpoint.reference), revision=checkpoint.revision, depth=stack.depth, digest=checkpoint.digest
        )
        for alias, (checkpoint, stack) in members.items()
    }
    rankings = tuple(Ranking(model=t.a, metric=t.metric, blocks=best_blocks(t)) for t in measurement.tables if t.a == t.b)
    return Analysis(models=models, rankings=rankings, measurement=measurement)


class File(NamedTuple):
    """A file of an analysis: its name, which is never made of anything but letters, digits, dashes and a suffix, and its content."""

    name: str
    content: bytes


def files(analysis: Analysis) -> Iterator[File]:
    """Everything that is written: the JSON document, tables as Markdown and CSV, pictures, and the page."""
    yield File("analysis.json", analysis.to_json().encode())
    scored = [(ranking.model, ranking.metric, block) for ranking in analysis.rankings for block in ranking.blocks]
    yield File("blocks.csv", csv_text(scored).encode())
    yield File("blocks.md", _markdown(analysis).encode())
    yield from _pictures(analysis)
    title = "Distances of " + ", ".join(model.reference for model in analysis.models.values())
    yield File(PAGE, make_page(title, analysis.about, analysis.measurement.tables).encode())


def _markdown(analysis: Analysis) -> str:
    """The tables of all metrics. Names of others stand in code spans, in which nothing works."""
    parts = ["# Blocks by distance\n", f"{_code(analysis.about)}\n"]
    for ranking in analysis.rankings:
        model = f" of {_code(ranking.model)}" if len(analysis.models) > 1 else ""
        parts += [f"## {_code(ranking.metric)}{model}\n", markdown(ranking.blocks)]
    return "\n".join(parts)


def _code(text: str) -> str:
    line = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{ticks} {line} {ticks}" if "`" in line else f"`{line}`"


def _pictures(analysis: Analysis) -> Iterator[File]:
    """A map of blocks, raw and normalised, and a line for single layers; between two models a map of boundaries."""
    for table, name in zip(analysis.measurement.tables, _names(analysis), strict=True):
        if table.a != table.b:
            yield from _file(f"{name}-boundaries.png", draw(table, []))
            continue
        rows, model = triangle(table.mean), analysis.models[table.a].reference
        yield from _file(f"{name}-blocks.png", draw_blocks(rows, model, table.metric))
        yield from _file(f"{name}-blocks-normalised.png", draw_blocks(normalised(rows), model, f"{table.metric}, each row from 0 to 1"))
        singles = [[matrix[layer][layer + 1] for layer in range(len(matrix) - 1)] for matrix in (table.mean, table.stderr)]
        yield File(f"{name}-layers.png", draw_layers(singles[0], singles[1], model, f"{table.metric} of single layers", table.metric))


def _file(name: str, content: bytes | None) -> Iterator[File]:
    if content is not None:
        yield File(name, content)


def _names(analysis: Analysis) -> list[str]:
    """The first part of the names of the pictures of every table, each another one."""
    found: list[str] = []
    for table in analysis.measurement.tables:
        parts = [table.metric] if len(analysis.models) == 1 else [table.metric, *dict.fromkeys((table.a, table.b))]
        plain = "-".join(_plain(part) for part in parts)
        number = 1
        while (name := plain if number == 1 else f"{plain}-{number}") in found:
            number += 1
        found.append(name)
    return found


def _plain(text: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "-", text).strip("-")[-60:].strip("-") or "x"


class Folder:
    """The folder of an analysis. It is complete or not there, and nothing that stood there is lost unless `overwrite` says so."""

    def __init__(self, shown: Path, overwrite: bool) -> None:
        self._place = Place(shown, Path(os.path.realpath(shown)))
        self._overwrite = overwrite

    def check(self, members: Mapping[str, Member]) -> None:
        """Raise OutputError, before the long work, when it cannot be written."""
        try:
            check_place(self._place, {alias: member.checkpoint for alias, member in members.items()})
            check_vacant(self._place, self._overwrite)
            if resumable(self._place):
                message = f"a stopped run waits to be finished in {self._place.staging}"
                raise OutputError(message, hint="choose another folder, or finish that run first")
        except OSError as error:
            raise explained(error, error.filename or self._place.shown) from error

    def write(self, analysis: Analysis, members: Mapping[str, Member]) -> None:
        """Write all files beside the folder, then give them its name at once."""
        content = self._place.content
        try:
            with staged(self._place):
                recover(self._place)
                self.check(members)
                throw_away(self._place)
                content.mkdir()
                for name, data in files(analysis):
                    with (content / name).open("xb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                sync(content)
                publish(self._place, self._overwrite)
        except OSError as error:
            raise explained(error, error.filename or self._place.shown) from error
