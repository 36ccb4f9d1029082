"""The card of an output: README.md as it is published, from the report alone. Names and texts of others are never Markdown in it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from layercut.cardmetadata import base_models, is_pruned
from layercut.disclosure import disclosed, pinned, repo_of
from layercut.display import amount, change, columns, picture, priced, size
from layercut.errors import printable
from layercut.heatmap import bounds, cells, draw
from layercut.plan import Table
from layercut.report import HEATMAP, REPORT, Report
from layercut.stack import models_of

# Entries of a list of a card; all of them stand in layercut.json.
LONGEST = 40
LIBRARIES = ("torch", "transformers", "safetensors")
# The last line of a card: it tells one that nobody has edited from one that somebody has.
MARK = re.compile(r"<!-- made by layercut, sha256 of all above: ([0-9a-f]{64}) -->\n\Z")


class Card(NamedTuple):
    """What is published beside the model."""

    text: str
    """README.md."""
    heatmap: bytes | None
    """layercut.png, when distances were measured."""


def make_card(report: Report, metadata: Mapping[str, Any], repo: str, branch: str = "main") -> Card:
    """The card of an output that is published in `repo`."""
    report = disclosed(report)
    table = _table(report)
    heatmap = None if table is None else draw(table, report.seams)
    parts = [
        f"# {repo.rpartition('/')[2]}",
        _summary(report),
        *_inexact(report),
        *_usage(metadata, repo, branch),
        *_layers(report),
        *_seams(report),
        *_evaluation(report),
        *([] if table is None or heatmap is None else _distances(report, table)),
        *_reproduction(report, repo),
        *_rest(report),
    ]
    head = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=False, width=10**6)
    text = f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n\n"
    return Card(f"{text}<!-- made by layercut, sha256 of all above: {_digest(text)} -->\n", heatmap)


def untouched(text: str) -> bool:
    """Whether a card is as layercut made it: one that somebody has edited is not to be lost."""
    found = MARK.search(text)
    return found is not None and found.group(1) == _digest(text[: found.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# Texts of others


def code(text: object, longest: int = 300) -> str:
    """A text as Markdown that shows it and does nothing else."""
    line = " ".join(printable(str(text)).split())
    line = line if len(line) <= longest else f"{line[:longest]}…"
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if not line or "`" in (line[0], line[-1]) else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def fenced(text: str, kind: str = "text") -> str:
    """Lines as they are, in a block that nothing in them can end."""
    body = printable(text).rstrip("\n")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", body)), default=0))
    return f"{fence}{kind}\n{body}\n{fence}"


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar would end a cell even within code."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def _model(report: Report, alias: str) -> str:
    """A source as a link to the commit that was used; a folder of the maker's machine by its stand-in."""
    source = report.sources[alias]
    repo = repo_of(source)
    if repo is None:
        return code(source.reference)
    return f"[{code(repo)}](https://huggingface.co/{repo}/tree/{source.revision})"


# Parts


def _summary(report: Report) -> str:
    used = list(dict.fromkeys(model for layer in report.layers for model in models_of(layer)))
    depth = len(report.layers)
    if is_pruned(report):
        what = f"{depth} of the {report.sources[used[0]].depth} layers of {_model(report, used[0])}"
    elif len(used) == 1:
        what = f"A stack of {depth} layers, made of the {report.sources[used[0]].depth} layers of {_model(report, used[0])}"
    else:
        what = f"A stack of {depth} layers of {', '.join(_model(report, alias) for alias in used[:LONGEST])}"
    folds = [fold for layer in report.layers for fold in layer.folds]
    trained = "Nothing was trained after it"
    if folds:
        maps, are = ("A linear map", "is") if len(folds) == 1 else (f"{len(folds)} linear maps", "are")
        trained = (
            f"{maps} for layers that were left out, fitted on {folds[0].tokens} tokens, {are} part of its weights; nothing was trained"
        )
    made = f"{what}, put together by layercut {code(report.version)}. {trained}."
    sizes = (
        f"Parameters: {change(report.parameters.before, report.parameters.after, amount)}. "
        f"Weights: {change(report.weight_bytes.before, report.weight_bytes.after, size)}."
    )
    local = [alias for alias, source in report.sources.items() if repo_of(source) is None]
    if not local:
        return f"{made}\n\n{sizes}"
    known = "; ".join(f"{_model(report, alias)}: structure digest {code(report.sources[alias].digest)}" for alias in local[:LONGEST])
    return f"{made}\n\n{sizes}\n\nNot every source is on the Hub. {known}."


def _inexact(report: Report) -> Iterator[str]:
    if report.recipe.get("allow") == "inexact":
        yield (
            "> **Inexact.** The models were stacked although they differ in what their layers compute (`allow: inexact`). "
            "What differs stands below, under Notes."
        )


def _usage(metadata: Mapping[str, Any], repo: str, branch: str) -> Iterator[str]:
    if metadata.get("pipeline_tag") != "text-generation":
        return
    at = "" if branch == "main" else f", revision={branch!r}"
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}"{at})',
        f'model = AutoModelForCausalLM.from_pretrained("{repo}"{at}, dtype="auto")',
    ]
    yield fenced("\n".join(lines), "python")


def _layers(report: Report) -> Iterator[str]:
    yield "## Layers"
    yield "The stack, first layer on top. Ranges are half-open and count from 0."
    lines = list(picture(report.layers, report.seams))
    more = [f"  … and {len(lines) - 200} lines more"] if len(lines) > 200 else []
    yield fenced("\n".join([*lines[:200], *more]))
    rows = []
    for alias, source in list(report.sources.items())[:LONGEST]:
        kept = " + ".join(report.kept.get(alias, ())) or "none"
        dropped = ", ".join(map(str, report.dropped.get(alias, ()))) or "none"
        rows.append((_model(report, alias), str(source.depth), code(kept), code(dropped)))
    yield _rows(("model", "layers", "taken", "left out"), rows)


def _seams(report: Report) -> Iterator[str]:
    if not report.seams:
        return
    yield "## Seams"
    yield (
        "A seam is where a layer gets another state than the one it was trained on: `h_i` is what enters layer `i`. "
        "Distances are means over the calibration text, with their standard errors."
    )
    labels = list(dict.fromkeys(label for seam in report.seams for label in seam.distances))
    several = len(report.sources) > 1
    rows = []
    for seam in report.seams[:LONGEST]:
        prices = (seam.distances.get(label) for label in labels)
        row = (str(seam.at), _end(seam.from_model, seam.from_boundary, several), _end(seam.to_model, seam.to_boundary, several))
        rows.append((*row, *("" if price is None else priced(price.mean, price.stderr) for price in prices)))
    yield _rows(("before layer", "state given", "state expected", *map(code, labels)), rows)
    yield from _and_more(len(report.seams))


def _end(model: str, boundary: int, several: bool) -> str:
    return f"h_{boundary}" + (f" of {code(model)}" if several else "")


def _and_more(count: int) -> Iterator[str]:
    if count > LONGEST:
        yield f"… and {count - LONGEST} more, in `{REPORT}`."


def _evaluation(report: Report) -> Iterator[str]:
    """What was measured on held-out text. A report may come from anyone: what is of another form is left out."""
    found = report.evaluation or {}
    try:
        before, after = (found["perplexity"][when] for when in ("before", "after"))
        held_out = f"{int(before['windows'])} windows of {int(before['max_length'])} tokens"
        text = f"{code(before['source'])} text, {held_out}, {code(after['dtype'])}"
        row = (f"{float(before['value']):.2f}", f"{float(after['value']):.2f}", text)
    except (KeyError, TypeError, ValueError, OverflowError):
        row = None
    if row is not None:
        yield "## Perplexity"
        yield "On held-out text, lower is better."
        yield _rows(("before", "after", "on"), [row])
    try:
        prompt, *texts = (found["generate"][key] for key in ("prompt", "before", "after"))
    except (KeyError, TypeError, ValueError):
        return
    yield f"Greedy continuations of {code(prompt)}:"
    yield _rows(("before", "after"), [[code(text) for text in texts]])


def _table(report: Report) -> Table | None:
    """The table that is drawn: of the metric that decided, the one in which most seams stand."""
    if report.measurement is None or not report.measurement.tables:
        return None
    tables = report.measurement.tables
    decided = report.choices[0].metric if report.choices else tables[0].metric
    wanted = [table for table in tables if table.metric == decided] or list(tables)
    return max(wanted, key=lambda table: len(cells(table, report.seams)))


def _distances(report: Report, table: Table) -> Iterator[str]:
    """The picture and what it shows."""
    measured = report.measurement
    assert measured is not None
    low, high = bounds(table)
    yield "## Distances"
    yield f"![Distances between the states at all boundaries, the seams framed]({HEATMAP})"
    models = "" if table.a == table.b == report.donor else f" of {code(table.a)} (down) and {code(table.b)} (across)"
    yield (
        f"{code(table.metric)} between the states at the boundaries{models}, from {low:.4g} (bright) to {high:.4g} (dark), on "
        f"{measured.samples} samples with {measured.tokens} tokens. The frames mark the seams. All tables stand in `{REPORT}`."
    )


def _reproduction(report: Report, repo: str) -> Iterator[str]:
    yield "## Recipe"
    recipe = pinned(report.recipe, report)
    yield fenced(yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=120, allow_unicode=_plain(recipe)), "yaml")
    yield "## How to reproduce it"
    local = "" if all(map(repo_of, report.sources.values())) else " with the models that are not on the Hub where it names them"
    yield f"Save the recipe as `recipe.yaml`{local}, and run:"
    versions = {name: version for name, version in report.environment.items() if name in LIBRARIES}
    pins = [f"{name}=={version.partition('+')[0]}" for name, version in sorted(versions.items()) if re.fullmatch(r"[\w.+!-]+", version)]
    out = "" if "output" in report.recipe else f" --out {repo.rpartition('/')[2]}"
    version = f"=={report.version}" if re.fullmatch(r"[\w.+!-]+", report.version) else ""
    yield fenced(f"pip install {' '.join([f'layercut{version}', *pins])}\nlayercut run recipe.yaml{out}", "sh")
    yield (
        f"Equal weights come from an equal plan: `{REPORT}` then states the plan {code(report.plan)}. "
        f"Made with {', '.join(f'{code(name)} {code(version)}' for name, version in sorted(report.environment.items()))}"
        f"{_absent(versions)}."
    )


def _absent(versions: Mapping[str, str]) -> str:
    absent = [name for name in LIBRARIES if name not in versions]
    return f"; {', '.join(absent)} took no part in it" if absent else ""


def _plain(recipe: Mapping[str, Any]) -> bool:
    """Whether everything in it prints, so that it can stand as it is."""
    return yaml.safe_dump(recipe, allow_unicode=True, width=10**6).replace("\n", "").isprintable()


def _rest(report: Report) -> Iterator[str]:
    left = [(part.model, part.what, part.reason) for part in report.left_out]
    if left:
        yield "## Left out"
        rows = [tuple(" ".join(cell.split())[:200] for cell in row) for row in left[:LONGEST]]
        yield fenced("\n".join(columns(rows if len(report.sources) > 1 else [row[1:] for row in rows], indent="")))
        yield from _and_more(len(left))
    if report.notes:
        yield "## Notes"
        yield fenced("\n".join(" ".join(note.split())[:1000] for note in report.notes[:LONGEST]))
        yield from _and_more(len(report.notes))
    bases = [f"[{code(repo)}](https://huggingface.co/{repo})" for repo in base_models(report)]
    if len(bases) == 1:
        yield f"What its source is for, and where it fails, stands in its card: {bases[0]}."
    elif bases:
        yield f"What its sources are for, and where they fail, stands in their cards: {', '.join(bases[:LONGEST])}."
