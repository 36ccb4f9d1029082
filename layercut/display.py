"""What people read in the terminal: plans, reports and checkpoints as plain text. Computes nothing that decides."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from layercut.accounts import account_lines, account_rows
from layercut.analysis import Analysis
from layercut.architecture import LayerStack, Member, find_stacks
from layercut.checkpoint import Checkpoint
from layercut.layout import layer_tensors
from layercut.plan import Choice, Plan, Seam
from layercut.report import Report
from layercut.stack import LayerRef, Run, runs
from layercut.surgery import dependents, refused_cuts

BAR = 40
"""Cells of the longest bar in a picture of a stack."""


def size(count: int) -> str:
    """Bytes in decimal units, as the Hub writes them."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def amount(count: int) -> str:
    """A number of parameters, for example `134.5 M`."""
    return _scaled(count, ("", "k", "M", "B", "T"))


def _scaled(count: float, units: Sequence[str]) -> str:
    step = 0
    while count >= 999.5 and step + 1 < len(units):
        count, step = count / 1000, step + 1
    return (f"{count:.0f} {units[step]}" if step == 0 else f"{count:.4g} {units[step]}").strip()


def columns(rows: Iterable[Sequence[str]], indent: str = "  ") -> Iterator[str]:
    """Rows of text with aligned columns."""
    table = [tuple(row) for row in rows]
    widths = [max(len(row[place]) for row in table if place < len(row)) for place in range(max(map(len, table), default=0))]
    for row in table:
        yield (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))).rstrip()


def change(before: int, after: int, unit: Any) -> str:
    """A number before and after, with the difference in percent."""
    return (
        f"{unit(before)} -> {unit(after)} ({round(100 * (after / before - 1), 1) + 0.0:+.1f} %)"
        if before
        else f"{unit(before)} -> {unit(after)}"
    )


def priced(mean: float, stderr: float) -> str:
    """A distance with its standard error, where there is one: a single sample has none."""
    return f"{mean:.4f} ± {stderr:.4f}" if stderr else f"{mean:.4f}"


def seam_line(seam: Seam, several: bool) -> str:
    """One seam with its distances: `13 -> 19, angular[last] 0.161 ± 0.004`."""
    ends = [f"{model}:" if several else "" for model in (seam.from_model, seam.to_model)]
    prices = "".join(f", {label} {priced(price.mean, price.stderr)}" for label, price in seam.distances.items())
    return f"{ends[0]}{seam.from_boundary} -> {ends[1]}{seam.to_boundary}{prices}"


def picture(layers: Sequence[LayerRef], seams: Sequence[Seam]) -> Iterator[str]:
    """The stack from its first layer to its last: a bar for each slice, a line for each seam."""
    several = len({layer.model for layer in layers}) > 1
    marks = {seam.at: seam for seam in seams}
    slices = list(_slices(layers))
    longest = max(piece.stop - piece.start for piece, _ in slices)
    width = max(len(f"{piece}") for piece, _ in slices)
    at = 0
    for piece, inner in slices:
        if at in marks:
            yield f"  {'':{width}}  ~ seam {seam_line(marks[at], several)}"
        bar = "#" * max(1, round(len(inner) * min(BAR, longest) / longest))
        yield f"  {piece!s:{width}}  {bar} {len(inner)} layer{'s' * (len(inner) > 1)}{f' of {piece.model}' * several}{_arithmetic(inner)}"
        at += len(inner)
    if at in marks:
        yield f"  {'':{width}}  ~ seam {seam_line(marks[at], several)}"


def _slices(layers: Sequence[LayerRef]) -> Iterator[tuple[Run, Sequence[LayerRef]]]:
    """Every slice with its layers: one, where it is made of several."""
    at = 0
    for piece in runs(layers):
        length = 1 if layers[at].span > 1 else piece.stop - piece.start
        yield piece, layers[at : at + length]
        at += length


def _arithmetic(layers: Sequence[LayerRef]) -> str:
    """What is done to the layers of a slice beyond copying, in words."""
    first = layers[0]
    words = []
    for fold in first.folds:
        words.append(f"with a map for the layers that were removed behind it folded into {fold.module}")
    if first.shares:
        words.append("average of " + ", ".join(f"{share.weight:.3g} x {share.model}:{share.index}" for share in first.shares))
    if any(layer.identity for layer in layers):
        words.append("adds nothing: its outputs are zeroed")
    elif scaled := sum(bool(layer.scalings) for layer in layers):
        words.append("tensors scaled" if scaled == len(layers) else f"tensors of {scaled} scaled")
    return "".join(f", {word}" for word in words)


def plan_text(plan: Plan) -> str:
    """A plan, for a person to check before it is run."""
    donor = plan.sources[plan.donor]
    layers = plan.actions.layers
    lines = [f"{', '.join(source.reference for source in plan.sources.values())}: {donor.depth} -> {len(layers)} layers", ""]
    lines += ["the new stack, first layer on top (half-open ranges, from 0)", *picture(layers, plan.seams), ""]
    for choice in plan.choices:
        lines += _choice_lines(choice)
    rows = [(f"config.json {edit.key}", f"{_short(edit.before)} -> {_short(edit.after)}") for edit in plan.edits]
    written = sum(math.prod(tensor.shape) for file in plan.actions.files for tensor in file.tensors)
    rows.append(("parameters", change(donor.parameters, written, amount)))
    rows.append(("weights", f"{size(plan.weight_bytes)} in {len(plan.actions.files)} file{'s' * (len(plan.actions.files) > 1)}"))
    carried = plan.actions.companions
    rows.append(("carried over", f"{len(carried)} file{'s' * (len(carried) != 1)}, {size(sum(file.size for file in carried))}"))
    rows.append(("disk needed", size(plan.disk_bytes)))
    rows.append(("output", plan.output or "not set: give --out"))
    rows += [] if plan.measurement is None else account_rows(plan.measurement)
    lines += columns(rows)
    if plan.left_out:
        lines += ["", "left out"]
        several = len(plan.sources) > 1
        lines += columns((f"{part.model}: {part.what}" if several else part.what, part.reason) for part in plan.left_out)
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _choice_lines(choice: Choice) -> list[str]:
    if choice.trials:
        return _trial_lines(choice)
    lines = [f"{choice.where}: {choice.chosen}, total seam distance {choice.cost:.4f} ({choice.metric})"]
    best = sorted(choice.candidates, key=lambda candidate: (candidate.cost, candidate.start))[:4]
    if len(best) > 1:
        others = ", ".join(f"[{other.start}, {other.stop}) {priced(other.cost, other.stderr)}" for other in best[1:])
        lines.append(f"  next best: {others}")
    return [*lines, ""]


SHOWN = 40
"""Trials of a choice that are shown; of more the ones of least loss. The plan as JSON has all."""


def _trial_lines(choice: Choice) -> list[str]:
    """A choice by loss, and what was tried for it."""
    trials = choice.trials
    if len(trials) > SHOWN:
        trials = tuple(sorted(trials, key=lambda trial: trial.loss)[:SHOWN])
    rows = [
        (trial.name, f"{trial.loss:.4f}", f"{trial.increase:+.2%}", f"± {trial.stderr:.2%}", trial.chosen, f"{trial.text} text")
        for trial in trials
    ]
    maps = [
        (
            f"state behind {one.block}",
            f"off by {priced(one.cut.mean, one.cut.stderr)}",
            f"with its map {priced(one.healed.mean, one.healed.stderr)}",
        )
        for one in choice.maps
    ]
    return [f"{choice.where}: {choice.chosen}, loss {choice.cost:.4f} nats a token", *columns(rows), *columns(maps), ""]


def report_text(report: Report, folder: Path) -> str:
    """What was done, as a table."""
    source = report.sources[report.donor]
    several = len(report.sources) > 1
    rows = [("layers", f"{source.depth} -> {len(report.layers)}")]
    for alias, ranges in report.kept.items():
        rows.append((f"kept{f' of {alias}' * several}", " + ".join(ranges)))
    rows += [
        (f"changed{f' of {piece.model}' * several}", f"{piece}{words}")
        for piece, inner in _slices(report.layers)
        if (words := _arithmetic(inner))
    ]
    rows += [("seam", seam_line(seam, several)) for seam in report.seams]
    rows += [] if report.measurement is None else account_rows(report.measurement)
    rows.append(("parameters", change(report.parameters.before, report.parameters.after, amount)))
    rows.append(("weights", change(report.weight_bytes.before, report.weight_bytes.after, size)))
    try:
        rows += list(_evaluation_rows(report.evaluation or {}))
    except (AttributeError, KeyError, TypeError, ValueError):
        rows.append(("evaluation", "in a form that this version does not know"))
    rows.append(("model", str(folder)))
    if report.published is not None:
        rows.append(("published", report.published.url))
    return "\n".join([report.sources[report.donor].reference, *columns(rows)])


def _evaluation_rows(evaluation: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "perplexity" in evaluation:
        before, after = evaluation["perplexity"]["before"], evaluation["perplexity"]["after"]
        text = f"{before['source']} text, {before['windows']} windows of {before['max_length']} tokens"
        yield "perplexity", f"{before['value']:.2f} -> {after['value']:.2f} ({text})"
    if "generate" in evaluation:
        yield "prompt", evaluation["generate"]["prompt"]
        yield "before", " ".join(evaluation["generate"]["before"].split())
        yield "after", " ".join(evaluation["generate"]["after"].split())


def analysis_text(analysis: Analysis) -> str:
    """The nearest block of each size under every metric, model by model."""
    lines = []
    for alias, model in analysis.models.items():
        rankings = [ranking for ranking in analysis.rankings if ranking.model == alias]
        rows = [("block size", *(ranking.metric for ranking in rankings))]
        for blocks in zip(*(ranking.blocks for ranking in rankings), strict=True):
            rows.append((str(blocks[0].size), *(f"{block.removed:7} {priced(block.score, block.stderr)}" for block in blocks)))
        lines += [
            f"{model.reference}: {model.depth} layers, {analysis.about}",
            *(f"  {line}" for line in account_lines(analysis.measurement.details)),
            "nearest block of each size (layers from 0, both ends included)",
        ]
        lines += [*columns(rows), ""]
    settling = analysis.measurement.details.get("settling")
    if isinstance(settling, list):
        lines += ["how sure that is", *(f"  {text}" for text in settling), ""]
    return "\n".join(lines[:-1])


def inspect_data(checkpoint: Checkpoint, stack: LayerStack) -> dict[str, Any]:
    """What a checkpoint is, as plain data: layers, sizes, dtypes, what in its config depends on the layers."""
    layers = layer_tensors(checkpoint, stack)
    kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, tensors in layers.items():
        kinds[tuple((t.name[len(stack.prefix) + len(str(index)) :], t.dtype, t.shape) for t in sorted(tensors))].append(index)
    dtypes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype] += tensor.nbytes
    layer_bytes = [sum(tensor.nbytes for tensor in tensors) for tensors in layers.values()]
    return {
        "model": checkpoint.reference,
        "folder": str(checkpoint.folder),
        "revision": checkpoint.revision,
        "model_type": checkpoint.config.get("model_type"),
        "layers": stack.depth,
        "extra_layers": stack.extra,
        "prefix": stack.prefix,
        "stack": stack.name,
        "stacks": [{"name": one.name, "prefix": one.prefix, "layers": one.depth} for one in find_stacks(checkpoint)],
        "kinds": [{"layers": found, "tensors": len(kind), "bytes": layer_bytes[found[0]]} for kind, found in kinds.items()],
        "parameters": checkpoint.parameters,
        "tensors": len(checkpoint.tensors),
        "bytes": sum(dtypes.values()),
        "layer_bytes": sum(layer_bytes),
        "dtypes": dict(sorted(dtypes.items())),
        "files": {file.name: file.size for file in checkpoint.files.values()},
        "depends_on_layers": [value._asdict() for value in dependents(Member(checkpoint, stack))],
        "refused_cuts": [{"layers": found, "reason": reason} for reason, found in refused_cuts(Member(checkpoint, stack)).items()],
        "carried_over": [name for name, _ in checkpoint.companions],
        "left_out": [{"what": what, "reason": reason} for what, reason in checkpoint.left_out],
        "digest": checkpoint.digest,
    }


def inspect_text(data: dict[str, Any]) -> str:
    """The same for a person."""
    rows = [("type", " ".join(str(data["model_type"]).split())), ("folder", data["folder"])]
    if data["revision"]:
        rows.append(("revision", data["revision"]))
    shared = not any(kind["tensors"] for kind in data["kinds"])
    names = f"they share what stands under {data['prefix']}*" if shared else f"{data['prefix']}0 to {data['layers'] - 1}"
    rows.append(("layers", f"{data['layers']} ({names})"))
    if len(data["stacks"]) > 1:
        rows.append(("stack", f"{data['stack']}, of " + ", ".join(f"{one['name']} ({one['prefix']}*)" for one in data["stacks"])))
    for kind in () if shared else data["kinds"]:
        name = "all layers" if len(data["kinds"]) == 1 else f"layers {_ranges(kind['layers'])}"
        rows.append(("", f"{name}: {kind['tensors']} tensors, {size(kind['bytes'])} each"))
    rows.append(("parameters", f"{amount(data['parameters'])} in {data['tensors']} tensors"))
    share = 100 * data["layer_bytes"] / data["bytes"] if data["bytes"] else 0
    rows.append(
        ("weights", f"{size(data['bytes'])} in {len(data['files'])} file{'s' * (len(data['files']) > 1)}, {share:.0f} % of it in layers")
    )
    rows.append(("dtypes", ", ".join(f"{dtype} {size(count)}" for dtype, count in data["dtypes"].items())))
    rows += [(f"config {value['key']}", f"{_short(value['value'])} ({value['reason']})") for value in data["depends_on_layers"]]
    rows += [("no cut of", f"layers {_ranges(cut['layers'])}: {cut['reason']}") for cut in data["refused_cuts"]]
    rows.append(("carried over", ", ".join(data["carried_over"]) or "nothing"))
    rows += [("left out", f"{part['what']}: {part['reason']}") for part in data["left_out"]]
    return "\n".join([data["model"], *columns(rows)])


def _ranges(indices: Sequence[int]) -> str:
    return ", ".join(
        str(piece.start) if piece.stop - piece.start == 1 else f"{piece.start}-{piece.stop - 1}"
        for piece in runs([LayerRef(model="", index=index) for index in indices])
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(value)} entries)" if isinstance(value, list | dict) else f"{text[:57]}..."
