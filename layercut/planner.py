"""The planner: from a recipe to a complete plan. Decides everything; measures only through the function it is given."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial

from layercut.architecture import Member
from layercut.boundaries import choose_boundaries
from layercut.calibration import Auto
from layercut.chattemplates import TEMPLATES, template_text
from layercut.checkpoint import CONFIG
from layercut.choices import Evidence, Measure, Run, StepSite
from layercut.compatibility import check_together
from layercut.ends import Ends, find_ends
from layercut.errors import LayercutError, RecipeError, RefusedError, did_you_mean
from layercut.fits import path_of
from layercut.layout import Cast, Layout, Layouter
from layercut.operations import apply_all
from layercut.plan import Actions, Companion, Edit, LeftOut, Measurement, Plan, Seam, Source
from layercut.quantization import is_quantized
from layercut.recipe import DTYPES, Recipe
from layercut.scalings import factors
from layercut.settling import Contest, Question, Way
from layercut.shards import Grid
from layercut.sharing import Sharing
from layercut.stack import Stack, joints, models_of
from layercut.start import Resolve, end_scalings, find_windows, givers, open_members, placed, reachable_depth, stack_of
from layercut.surgery import Surgery, operate
from layercut.version import __version__

# Files that make up a tokenizer: they travel together.
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "sentencepiece*.model",
    "tekken.json", "chat_template.*", "additional_chat_templates/*",
)  # fmt: skip
CHAT_TEMPLATE = "chat_template.jinja"


def build_plan(recipe: Recipe, *, resolve: Resolve, measure: Measure, sharing: Sharing | None = None, run: Run | None = None) -> Plan:
    """Resolve every choice that the recipe leaves open, and lay out the result down to byte ranges. Writes nothing.

    `resolve` opens the models that the recipe names; `measure` is called at most once, and only when something is `auto`; `sharing`
    tells whether the output can share blocks with files, and moves nothing but the bounds of its own; `run` readies models for losses.
    Raises RecipeError with its place when the recipe cannot be done, RefusedError when the result would compute something else.
    """
    members = open_members(recipe, resolve)
    giving = givers(recipe, members)
    donor = recipe.base_model or next(iter(giving))
    tokenizer = _tokenizer(recipe, donor)
    notes = (*recipe.notes, *_together(recipe, members, donor, giving, tokenizer))
    evidence = _evidence(recipe, giving, measure, run)
    stack = _stack(recipe, evidence)
    used = {alias: members[alias] for alias in giving if any(alias in models_of(layer) for layer in stack)}
    if recipe.base_model is None and donor not in used:  # no layer of the first model was kept
        donor = next(iter(used))
        tokenizer = _tokenizer(recipe, donor)
    ends = find_ends({**used, donor: members[donor]}, donor, stack[0].model, stack[-1].model)
    surgery = _surgery(recipe, donor, {**used, donor: members[donor]}, stack, ends)
    layout, shared = _lay_out(recipe, used, stack, ends, sharing)
    sources = {**used, donor: members[donor], tokenizer: members[tokenizer]}
    companions = tuple(_companions(sources, donor, tokenizer, surgery.texts))
    return Plan(
        version=__version__,
        recipe=recipe.described(),
        output=recipe.output.path if recipe.output else None,
        sources={alias: _source(member) for alias, member in sources.items()},
        donor=donor,
        seams=_seams(stack, evidence),
        choices=tuple(evidence.choices),
        edits=surgery.edits,
        left_out=(*layout.left_out, *_left_out(sources, used, donor, tokenizer, companions, {*surgery.texts} - {*_texts(recipe)})),
        notes=(*notes, *ends.notes, *surgery.notes, *layout.notes, *evidence.notes, *shared),
        measurement=evidence.measurement,
        maps={fold.sha256: str(path_of(fold.sha256).absolute()) for layer in stack for fold in layer.folds},
        actions=Actions(
            layers=stack,
            config=surgery.text,
            files=layout.files,
            index=layout.index_text,
            companions=companions,
            texts=dict(surgery.texts),
        ),
    )


def _together(recipe: Recipe, members: Mapping[str, Member], donor: str, giving: Iterable[str], tokenizer: str) -> Iterator[str]:
    """Notes on models that are stacked though they differ; an error names the place of the model that does not fit."""
    for alias in giving:
        with placed(recipe, alias):
            yield from check_together(members, donor, (alias,), tokenizer, inexact=recipe.allow == "inexact")


def _evidence(recipe: Recipe, giving: Mapping[str, Member], measure: Measure, run: Run | None) -> Evidence:
    """What decides with this recipe. Raises RecipeError where it asks for losses that cannot be had."""
    barred = _barred(recipe, giving)
    for at, step in enumerate(recipe.steps):
        if barred is not None and step.operation.runs:  # type: ignore[attr-defined]
            message = f"{barred.message} (steps.{at}.{step.name})"  # type: ignore[attr-defined]
            raise RecipeError(message, where=barred.where, hint=barred.hint)
    question = Question(_what_decides(recipe), partial(_contests, recipe, giving))
    why = None if barred is None else barred.message
    return Evidence(recipe, giving, measure, question, run, partial(_writable, recipe, giving), why)


def _writable(recipe: Recipe, members: Mapping[str, Member], stack: Stack) -> bool:
    """Whether the config of the first model of the stack can be made to describe it."""
    donor = stack[0].model
    try:
        operate(members[donor].checkpoint.config_text, donor, members, stack, (), inexact=recipe.allow == "inexact")
    except RefusedError:
        return False
    return True


def _barred(recipe: Recipe, members: Mapping[str, Member]) -> RecipeError | None:
    """Why nothing can be chosen by loss: no rule says how much text settles it, and ends are run as their model has them."""
    if isinstance(recipe.calibration.samples, Auto):
        message = "samples: auto cannot tell whether a choice by loss is settled"
        return RecipeError(message, where=recipe.where("calibration", "samples"), hint="give a number of samples")
    scalings = [groups for groups in end_scalings(recipe) if groups]
    for checkpoint, stack in members.values() if scalings else ():
        for name in checkpoint.tensors:
            if stack.place(name) is None and any(factors(groups, name) for groups in scalings):
                message = f"{name} is outside the layers and scaled: what stacks lose with that is not known"
                hint = "choose by distance, or scale tensors of layers only"
                return RecipeError(message, where=recipe.where("parameters"), hint=hint)
    return None


def _lay_out(recipe: Recipe, used: Mapping[str, Member], stack: Stack, ends: Ends, sharing: Sharing | None) -> tuple[Layout, list[str]]:
    """The files of the output, and a note when their bounds are there for the speed of copying."""
    grids, shared = dict.fromkeys(used, Grid.direct()), None
    for alias, (checkpoint, _) in used.items():
        filesystem = sharing([checkpoint.folder / name for name in checkpoint.files]) if sharing is not None else None
        if filesystem is not None:
            grids[alias], shared = Grid.shared(filesystem.block), filesystem
    layout = Layouter(used, stack, _cast(recipe), grids).lay_out(ends, recipe.shard_size, end_scalings(recipe))
    padded = any(file.header_size is not None for file in layout.files)
    return layout, [f"laid out for block sharing ({shared})" if shared is not None else "laid out for direct writes"] if padded else []


def _what_decides(recipe: Recipe) -> str:
    """All of a recipe that what is chosen may depend on, as text."""
    later = ("output", "upload", "evaluate")
    return json.dumps({key: value for key, value in recipe.described().items() if key not in later}, sort_keys=True)


def _contests(recipe: Recipe, members: Mapping[str, Member], measurement: Measurement) -> list[Contest]:
    """What the recipe leaves open, decided on a measurement of part of the text. What cannot be done on it is one more choice."""
    evidence = Evidence(recipe, members, lambda *_, **__: measurement)
    try:
        _stack(recipe, evidence)
    except LayercutError as error:
        return [*evidence.contests, Contest("recipe", evidence.prices(None).metric, Way(str(error)), None)]
    return evidence.contests


def _stack(recipe: Recipe, evidence: Evidence) -> Stack:
    """The stack that the recipe describes, every `auto` decided.

    What is compared by loss though nobody asked for that must not spoil what works by distance: then the choice is made by distance.
    """
    try:
        stack = _decided(recipe, evidence)
        if not evidence.compared or evidence.writable(stack):
            return stack
        why = "no config can describe what was chosen by loss"
    except (RecipeError, RefusedError) as error:
        if not evidence.compared:
            raise
        why = f"what was chosen by loss does not go with the other steps ({error.message})"
    evidence.go_by_distance(why)
    return _decided(recipe, evidence)


def _decided(recipe: Recipe, evidence: Evidence) -> Stack:
    """The starting stack, after all steps."""
    sites = [StepSite(evidence, ("steps", number, step.name)) for number, step in enumerate(recipe.steps)]  # type: ignore[attr-defined]
    steps = [(step.operation, site) for step, site in zip(recipe.steps, sites, strict=True)]  # type: ignore[attr-defined]
    return apply_all(_start(recipe, evidence), steps)


def _start(recipe: Recipe, evidence: Evidence) -> Stack:
    """The stack that the steps begin with."""
    if recipe.slices is None:
        if recipe.depth is not None:
            hint = "to remove layers of a model use steps: [{prune: {layers: N}}]"
            raise RecipeError("'depth' goes with 'slices'", where=recipe.where("depth", key=True), hint=hint)
        alias, member = next(iter(evidence.members.items()))
        return stack_of(recipe, [(alias, 0, member.stack.depth)])
    windows = find_windows(recipe, evidence.members)
    depth = reachable_depth(recipe, windows, evidence.members)
    if all(window.start is not None and window.stop is not None for window in windows):
        return stack_of(recipe, [(window.model, window.start or 0, window.stop or 0) for window in windows])
    bounds = choose_boundaries(windows, depth, evidence.prices(None))
    if bounds is None:
        raise RecipeError(f"depth {depth} cannot be reached under the constraints of the slices", where=recipe.where("slices"))
    stack = stack_of(recipe, [(window.model, start, stop) for window, (start, stop) in zip(windows, bounds, strict=True)])
    evidence.note("slices", None, stack, ())
    return stack


def _cast(recipe: Recipe) -> Cast:
    return Cast(*(None if name is None else DTYPES[name] for name in (recipe.dtype, recipe.out_dtype)))


def _surgery(recipe: Recipe, donor: str, members: Mapping[str, Member], stack: Stack, ends: Ends) -> Surgery:
    """The config text of the donor, made to describe the stack, its ends and its dtype; and all other files that are written from text."""
    config = members[donor].checkpoint.config
    edits = list(ends.edits)
    dtype = recipe.out_dtype or recipe.dtype
    if dtype is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        edits += [
            Edit(key=key, before=config.get(key), after=dtype, reason="dtype of the recipe") for key in keys if config.get(key) != dtype
        ]
    packed = [member.checkpoint.folder for member in members.values() if is_quantized(*member)]
    if dtype is not None and packed:
        raise RefusedError("a quantised checkpoint cannot be cast", where=packed[0], hint="leave out dtype")
    surgery = operate(members[donor].checkpoint.config_text, donor, members, stack, tuple(edits), inexact=recipe.allow == "inexact")
    return surgery._replace(texts={**surgery.texts, **_texts(recipe)})


def _texts(recipe: Recipe) -> dict[str, str]:
    """Files that are written from text: the chat template, by its name or as it stands."""
    if recipe.chat_template is None:
        return {}
    text = template_text(recipe.chat_template)
    if text is None:
        hint = did_you_mean(recipe.chat_template, TEMPLATES) or f"known are {', '.join(TEMPLATES)}; or write its text"
        raise RecipeError(f"unknown chat template '{recipe.chat_template}'", where=recipe.where("chat_template"), hint=hint)
    return {CHAT_TEMPLATE: text}


def _tokenizer(recipe: Recipe, donor: str) -> str:
    """Alias of the model whose tokenizer files are carried over."""
    return donor if recipe.tokenizer_source in (None, "base", "union") else str(recipe.tokenizer_source)


def _companions(members: Mapping[str, Member], donor: str, tokenizer: str, texts: Mapping[str, str]) -> list[Companion]:
    """Files that go along: the donor's, but the tokenizer files of the model that the recipe names."""
    found: dict[str, Companion] = {}
    for alias in (donor, tokenizer):
        for name, size in members[alias].checkpoint.companions:
            if (alias == tokenizer if _tokenizer_file(name) else alias == donor) and name not in texts:
                found[name] = Companion(name=name, model=alias, size=size)
    return [found[name] for name in sorted(found)]


def _left_out(
    sources: Mapping[str, Member],
    used: Collection[str],
    donor: str,
    tokenizer: str,
    companions: Sequence[Companion],
    edited: Collection[str],
) -> Iterator[LeftOut]:
    """What does not reach the output of all that stands outside the weights that are read; `edited` files of the donor do."""
    taken = {*((companion.model, companion.name) for companion in companions), *((donor, name) for name in edited)}
    for alias, (checkpoint, _) in sources.items():
        found = list(checkpoint.left_out)
        if alias not in used:
            found.append((f"all weights ({len(checkpoint.tensors)} tensors)", "no layer of this model is in the stack"))
        if alias != donor:
            found.append((CONFIG, f"it comes from '{donor}'"))
        for name, _ in checkpoint.companions:
            giver = tokenizer if _tokenizer_file(name) else donor
            if (alias, name) not in taken:
                found.append((name, "the recipe writes its own" if alias == giver else f"such files come from '{giver}'"))
        yield from (LeftOut(model=alias, what=what, reason=reason) for what, reason in found)


def _tokenizer_file(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in TOKENIZER)


def _source(member: Member) -> Source:
    checkpoint = member.checkpoint
    return Source(
        reference=checkpoint.reference,
        folder=str(checkpoint.folder),
        revision=checkpoint.revision,
        depth=member.stack.depth,
        parameters=checkpoint.parameters,
        digest=checkpoint.digest,
        files={file.name: file.size for file in checkpoint.files.values()},
    )


def _seams(stack: Stack, evidence: Evidence) -> tuple[Seam, ...]:
    """The seams of the final stack, with every distance that was measured."""
    measured = [evidence.prices(metric) for metric in evidence.recipe.all_metrics] if evidence.measurement is not None else []
    return tuple(
        Seam(
            at=joint.at,
            from_model=joint.source.model,
            from_boundary=joint.source.number,
            to_model=joint.target.model,
            to_boundary=joint.target.number,
            distances={prices.metric: prices.distance(joint.source, joint.target) for prices in measured},
        )
        for joint in joints(stack, evidence.depths)
    )
