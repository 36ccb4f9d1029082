"""Cuts, repeats and stacks tiny models of every type by layercut's own commands, and compares what comes out with the oracle."""

from __future__ import annotations

import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import zoo

from layercut.api import run_recipe
from layercut.errors import LayercutError
from layercut.recipe import Recipe

TOLERANCE = 2e-4
"""Largest difference of logits that fp32 arithmetic explains."""
EXACT, REFUSED, WRONG = "exact", "refused", "wrong"
BLOCK = (2, 3)
USED = (
    "causal:llama", "causal:qwen2", "causal:qwen3", "causal:mistral", "causal:gpt2", "causal:gemma3_text", "causal:gemma2", "causal:gemma",
    "causal:phi3", "causal:phi", "causal:opt", "causal:gpt_neox", "causal:gpt_neo", "causal:gptj", "causal:bloom", "causal:falcon",
    "causal:mixtral", "causal:qwen2_moe", "causal:qwen3_moe", "causal:qwen3_next", "causal:gpt_oss", "causal:deepseek_v2",
    "causal:deepseek_v3", "causal:glm4_moe", "causal:glm4", "causal:cohere", "causal:cohere2", "causal:starcoder2", "causal:stablelm",
    "causal:olmo2", "causal:olmo3", "causal:granite", "causal:granitemoehybrid", "causal:smollm3", "causal:lfm2", "causal:mamba",
    "causal:falcon_h1", "causal:jamba", "causal:nemotron_h", "causal:minimax_m2", "causal:llama4_text", "causal:qwen3_5_text",
    "causal:gemma4_text", "masked:bert", "masked:roberta", "masked:distilbert", "masked:xlm-roberta", "masked:albert",
    "masked:deberta-v2", "masked:electra", "masked:modernbert", "masked:mpnet", "seq2seq:t5", "seq2seq:bart", "seq2seq:marian",
    "image:gemma3", "image:llava", "image:qwen2_5_vl", "image:qwen3_vl", "image:mllama",
)  # fmt: skip
"""The 60 that people use most, by our own judgement: they are tested in every run."""


class Outcome(NamedTuple):
    """What became of one stack, or of one change of it: the verdict, and for refusals and faults why."""

    stack: str
    verdict: str
    why: str = ""
    change: str = ""


class Examined(NamedTuple):
    """A type that could be run, with its outcomes; or the reason why it could not."""

    outcomes: tuple[Outcome, ...] = ()
    reason: str = ""


def cuts(depth: int) -> dict[str, tuple[int, ...]]:
    """The places where every stack is cut, by name."""
    places = {"first": 0, "second": 1, "middle": depth // 2, "last but one": depth - 2, "last": depth - 1}
    return {**{name: (place,) for name, place in places.items()}, "a block": BLOCK}


def chosen() -> list[str]:
    """`task:type` of what this run tests: those used most and a tenth of the others, or all with LAYERCUT_ARCHITECTURES=all."""
    everything = [f"{task}:{kind}" for kind, task in zoo.pairs()]
    wanted = os.environ.get("LAYERCUT_ARCHITECTURES", "0")
    if wanted == "all":
        return everything
    return [name for name in everything if name in USED or zlib.crc32(name.encode()) % 10 == int(wanted) % 10]


class Source(NamedTuple):
    """A tiny checkpoint on disk and the model that transformers makes of it."""

    folder: Path
    kind: str
    task: str
    model: Any


def saved(kind: str, task: str, folder: Path, seed: int = 0) -> Source:
    """A tiny checkpoint of a type, saved and loaded again by transformers. Raises Unrunnable where transformers cannot run it."""
    if kind in zoo.UNRUNNABLE:
        raise Unrunnable(zoo.UNRUNNABLE[kind])
    package = zoo.lacking(kind)
    if package is not None:
        raise Unrunnable(f"a tower of it needs the package {package}")
    zoo.tiny_model(kind, task, seed).save_pretrained(folder)
    loaded = oracle.load(folder)
    if loaded.problems:
        raise Unrunnable(f"what transformers saves it does not load: {loaded.problems[0]}")
    if oracle.difference(oracle.logits(loaded.model), oracle.logits(oracle.load(folder).model)) > TOLERANCE:
        raise Unrunnable("transformers loads it with weights that are not in the file")
    return Source(folder, kind, task, loaded.model)


class Unrunnable(Exception):
    """Why a type cannot be run here."""


def examine(kind: str, task: str, scratch: Path) -> Examined:
    """Cut a type at five places and once a block, each stack on its own."""
    try:
        source = saved(kind, task, scratch / "source")
    except Unrunnable as reason:
        return Examined(reason=str(reason))
    return Examined(tuple(_cuts(source, scratch)))


def _cuts(source: Source, scratch: Path) -> Iterator[Outcome]:
    depth = zoo.depth_of(source.kind)
    generates = oracle.caches(source.model)
    for stack, lists in oracle.stacks(source.model, depth).items():
        for name, layers in cuts(depth).items():
            with oracle.skipped(source.model, lists, layers):
                wanted = oracle.logits(source.model)
            steps = [{"prune": {"at": list(layers)}}]
            verdict, why = _judge({"model": str(source.folder), "steps": steps, **_picked(stack)}, source, wanted, scratch, generates)
            yield Outcome(stack, verdict, why, name)


def repeat(source: Source, scratch: Path) -> Iterator[Outcome]:
    """Repeat a block of each stack."""
    for stack, lists in oracle.stacks(source.model, zoo.depth_of(source.kind)).items():
        with oracle.again(source.model, lists, BLOCK):
            wanted = oracle.logits(source.model)
        steps = [{"duplicate": {"at": list(BLOCK)}}]
        verdict, why = _judge({"model": str(source.folder), "steps": steps, **_picked(stack)}, source, wanted, scratch)
        yield Outcome(stack, verdict, why, "repeat")


def stack_two(source: Source, other: Source, scratch: Path) -> Iterator[Outcome]:
    """A model with a block of another one behind its own."""
    depth, first, last = zoo.depth_of(source.kind), BLOCK[0], BLOCK[-1] + 1
    for stack, lists in oracle.stacks(source.model, depth).items():
        with oracle.again(source.model, lists, BLOCK, other.model):
            wanted = oracle.logits(source.model)
        ranges = ((source, 0, last), (other, first, last), (source, last, depth))
        slices = [{"model": str(model.folder), "layer_range": [start, stop]} for model, start, stop in ranges]
        verdict, why = _judge({"slices": slices, **_picked(stack)}, source, wanted, scratch)
        yield Outcome(stack, verdict, why, "stack")


def _picked(stack: str) -> dict[str, str]:
    return {"stack": stack} if stack else {}


def _judge(recipe: dict[str, Any], source: Source, wanted: Any, scratch: Path, generates: bool = False) -> tuple[str, str]:
    """Run a recipe, load what it wrote, and compare."""
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        run_recipe(Recipe.model_validate({**recipe, "output": str(out)}), progress=False)
    except LayercutError as error:
        return REFUSED, plain(str(error), source.folder)
    try:
        loaded = oracle.load(out)
        off = oracle.difference(oracle.logits(loaded.model), wanted)
        same = not generates or oracle.generated(loaded.model, True).ids == oracle.generated(loaded.model, False).ids
    except Exception as error:  # whatever transformers raises, the model cannot be used
        return WRONG, f"{type(error).__name__}: {error}"
    if loaded.problems:
        return WRONG, f"{len(loaded.problems)} tensors: {loaded.problems[0]}"
    if not off <= TOLERANCE:
        return WRONG, f"logits are off by {off:.2g}"
    if not same:
        return WRONG, "what it generates depends on the cache"
    return EXACT, ""


def plain(message: str, folder: Path) -> str:
    """A refusal without the place of the checkpoint, which differs from run to run."""
    text = message.replace(f"{folder}/", "").replace(str(folder), "")
    return re.sub(r"^(model|slices\S*|steps\S*|recipe): ", "", text)


def row(examined: Examined) -> str:
    """The outcome of a type in words, as the pages in docs/ say it."""
    if examined.reason:
        return f"not run: {examined.reason}"
    stacks = list(dict.fromkeys(outcome.stack for outcome in examined.outcomes))
    told = {stack: _told([outcome for outcome in examined.outcomes if outcome.stack == stack]) for stack in stacks}
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    return "; ".join(f"{stack}: {text}" for stack, text in told.items())


def _told(outcomes: Sequence[Outcome]) -> str:
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.verdict != EXACT:
            reason = f"{outcome.verdict}: {outcome.why.removeprefix(': ')}" if outcome.why else outcome.verdict
            reasons.setdefault(reason, []).append(outcome.change)
    if not reasons:
        return EXACT
    if len(reasons) == 1 and len(next(iter(reasons.values()))) == len(outcomes):
        return next(iter(reasons))
    kept = [outcome.change for outcome in outcomes if outcome.verdict == EXACT]
    return "; ".join([f"exact: {', '.join(kept)}"] * bool(kept) + [f"{', '.join(places)} {reason}" for reason, places in reasons.items()])
