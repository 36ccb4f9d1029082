"""Checks an output folder: against its own report, its sources, and transformers. Every failure is a failed check, never a traceback."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.architecture import check_depths, find_stack
from layercut.checkpoint import CONFIG, INDEX, Checkpoint, open_checkpoint
from layercut.companions import HALF, SCAFFOLD, left_out_reason
from layercut.contents import DiffersError, NotCheckedError, check_contents, recipe_of
from layercut.errors import LayercutError, printable
from layercut.header import quoted
from layercut.homes import is_shared
from layercut.report import HEATMAP, REPORT, Report, WrittenFile, file_digest, read_report
from layercut.stack import LayerRef, Record
from layercut.stated import CARD

if TYPE_CHECKING:
    import torch

# Two ways to compute the same logits differ by rounding: 2**-8 is one step of bfloat16, taken a few times.
ROUNDING = 0.02
PROMPT = 12
NEW_TOKENS = 8


class Check(Record):
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    """What was found, in one line."""


class Verification(Record):
    """All checks of a folder, in the order in which they were made."""

    folder: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)


class _FailedError(Exception):
    """A check does not hold, for the reason given."""


def verify(folder: Path, *, load: bool = True, contents: bool = True, progress: bool = False) -> Verification:
    """Check the folder. Without `load` transformers is not asked, and without `contents` too only headers and small files are read.

    A folder without layercut.json is checked on its own: that it opens, that its layers fit its config, that it loads. With
    `progress`, a bar goes to stderr when that is a terminal.
    """
    checks: list[Check] = []

    def run(name: str, check: Callable[[], str]) -> None:
        try:
            checks.append(Check(name=name, ok=True, detail=check()))
        except NotCheckedError as error:
            checks.append(Check(name=name, ok=True, detail=f"not checked: {error}"))
        except (_FailedError, DiffersError) as error:
            checks.append(Check(name=name, ok=False, detail=str(error)))
        except Exception as error:
            checks.append(Check(name=name, ok=False, detail=_line(error)))

    try:
        checkpoint = open_checkpoint(folder)
    except LayercutError as error:
        return Verification(folder=str(folder), checks=(Check(name="checkpoint", ok=False, detail=str(error)),))
    found = f"{len(checkpoint.tensors)} tensors in {len(checkpoint.files)} weight file{'s' * (len(checkpoint.files) != 1)}"
    checks.append(Check(name="checkpoint", ok=True, detail=found))
    report: Report | None = None
    if os.path.lexists(folder / REPORT):
        try:
            report = read_report(folder)
            checks.append(Check(name="report", ok=True, detail=f"plan {report.plan}"))
        except LayercutError as error:
            checks.append(Check(name="report", ok=False, detail=str(error)))
    else:
        checks.append(Check(name="report", ok=True, detail=f"there is no {REPORT}: the folder is checked on its own"))
    if report is not None:
        files = report.files
        run("files", lambda: _files(checkpoint, files))
        run("no other files", lambda: _no_others(checkpoint, files))
    run("layers", lambda: _layers(checkpoint, report))
    if report is not None and contents:
        written = report
        run("contents", lambda: check_contents(checkpoint, written, progress=progress))
    if load:
        _loaded(checkpoint, run)
    return Verification(folder=str(folder), checks=tuple(checks))


def _files(checkpoint: Checkpoint, expected: Mapping[str, WrittenFile]) -> str:
    """Every file of the report is there: weights by size and header, the others by size and content."""
    for name, file in expected.items():
        if name == CARD and CARD in dict(checkpoint.companions):  # it may be rewritten after the cut
            continue
        if file.header_sha256 is not None:
            weights = checkpoint.files.get(name)
            found = None if weights is None else WrittenFile(bytes=weights.size, header_sha256=weights.digest)
        else:
            known = name in (CONFIG, INDEX) or name in dict(checkpoint.companions)
            found = file_digest(checkpoint.folder / name) if known and (checkpoint.folder / name).is_file() else None
        if found is None:
            raise _FailedError(f"{quoted(name)} of the report is not there")
        if found.bytes != file.bytes:
            raise _FailedError(f"{name} has {found.bytes} bytes, the report says {file.bytes}")
        if found != file:
            what = "another header" if file.header_sha256 is not None else "another content"
            raise _FailedError(f"{name} has {what} than the report says")
    return f"{len(expected)} files are as the report says"


def _no_others(checkpoint: Checkpoint, expected: Mapping[str, WrittenFile]) -> str:
    """Nothing lies in the folder that a loader could take for a part of the model."""
    others: list[str] = []
    for parent, _, names in os.walk(checkpoint.folder):
        for name in names:
            relative = (Path(parent) / name).relative_to(checkpoint.folder).as_posix()
            if relative not in expected and relative not in (REPORT, HEATMAP, CARD) and left_out_reason(relative) not in (SCAFFOLD, HALF):
                others.append(relative)
    if others:
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        raise _FailedError(f"{quoted(min(others))} is not of this output{more}")
    return "there are no others"


def _layers(checkpoint: Checkpoint, report: Report | None) -> str:
    """Tensor names count the layers from 0 without a hole, config.json states that count, and so does the report.

    Output layers that come from one source layer must have tensors of the same names.
    """
    recipe = None if report is None else recipe_of(report)
    layers = None if report is None else report.layers
    alias = layers[-1].model if layers else ""
    stack = find_stack(checkpoint) if recipe is None else find_stack(checkpoint, recipe.stack_of(alias), recipe.architecture)
    if layers is None:
        return f"{stack.depth} layers, as {stack.depth_key} says"
    if stack.depth != len(layers):
        raise _FailedError(f"{stack.depth_key} is {stack.depth}, the report lists {len(layers)} layers")
    names: dict[int, set[str]] = {index: set() for index in range(stack.depth + stack.extra)}
    for name in checkpoint.tensors:
        place = stack.place(name)
        if place is not None and not is_shared(place.rest):
            names[place.layer].add(place.rest)
    first: dict[LayerRef, int] = {}
    for index, layer in enumerate(layers):
        twin = first.setdefault(layer, index)
        if names[index] != names[twin]:
            odd = min(names[index] ^ names[twin])
            raise _FailedError(f"layers {twin} and {index} are both layer {layer.index} of {layer.model}, but only one has {quoted(odd)}")
    return f"{stack.depth} layers, as {stack.depth_key} and the report say"


def _loaded(checkpoint: Checkpoint, run: Callable[[str, Callable[[], str]], None]) -> None:
    """What transformers makes of the folder: keys, logits, and generation with and without a cache."""
    model: Any = None

    def load() -> str:
        nonlocal model
        check_depths(checkpoint)
        loaded, info = _load(checkpoint.folder)
        problems = [f"{kind} {quoted(str(min(map(str, keys))))}" for kind, keys in _key_problems(info) if keys]
        if problems:
            raise _FailedError("transformers finds " + ", ".join(problems))
        model = loaded
        return f"{type(model).__name__} takes every tensor and misses none"

    run("load", load)
    if model is not None:
        run("forward", lambda: _forward(model))
        if model.can_generate():
            run("generate", lambda: _generate(model))


def _key_problems(info: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    for kind in ("missing", "unexpected", "mismatched"):
        yield f"{kind} tensors, such as", list(info.get(f"{kind}_keys") or ())
    yield "errors, such as", list(info.get("error_msgs") or ())


def _load(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    """The model and its loading info. No code of the checkpoint is run, and no pickle read."""
    import transformers

    from layercut.loading import own_code, quiet

    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise own_code(error, folder) or error from None
    # The class that the checkpoint names knows exactly its keys; a head that it lacks would be reported as missing.
    named = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    factory: Any = transformers.AutoModel
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        factory = named
    elif type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        factory = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": "auto", "output_loading_info": True}
    if factory is not named:
        options["trust_remote_code"] = False
    with quiet():
        model, info = factory.from_pretrained(folder, **options)
    return model.eval(), info


def _prompt(model: Any) -> torch.Tensor:
    """Token ids, shape (1, PROMPT): fixed, spread over the vocabulary."""
    import torch

    size = model.config.get_text_config().vocab_size
    return torch.tensor([[(3 + 7919 * position) % size for position in range(PROMPT)]], device=model.device)


def _forward(model: Any) -> str:
    import torch

    with torch.inference_mode():
        output = model(_prompt(model))
    values = output["logits"] if "logits" in output else output["last_hidden_state"]
    if not torch.isfinite(values).all():
        raise _FailedError("outputs are not finite")
    return f"outputs of shape {tuple(values.shape)} are finite"


def _generate(model: Any) -> str:
    """Greedy tokens with the cache are those without: a cache laid out for other layers would tell."""
    import torch
    import transformers

    from layercut.loading import quiet

    prompt = _prompt(model)
    # The checkpoint's own settings (sampling, penalties, end tokens) would blur what is compared.
    settings: Any = transformers.GenerationConfig
    model.generation_config = settings(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    with torch.inference_mode(), quiet():
        ids = [
            model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=use_cache)[0, PROMPT:].tolist()
            for use_cache in (True, False)
        ]
        if ids[0] == ids[1]:
            return f"{NEW_TOKENS} greedy tokens are the same with and without cache"
        at = next(position for position, (a, b) in enumerate(zip(*ids, strict=True)) if a != b)
        before = torch.tensor([prompt[0].tolist() + ids[1][:at]], device=prompt.device)
        logits = model(before, use_cache=False)["logits"][0, -1].float()
    if float(abs(logits[ids[0][at]] - logits[ids[1][at]])) > ROUNDING * float(logits.abs().max()):
        raise _FailedError(f"greedy token {at} is {ids[0][at]} with cache and {ids[1][at]} without")
    return f"greedy tokens with and without cache are the same up to token {at}, where two tie within rounding"


def _line(error: Exception) -> str:
    """An error as one line of sensible length."""
    text = str(error) if isinstance(error, LayercutError) else f"{type(error).__name__}: {error}"
    return printable(" ".join(text.split()))[:300]
