"""The metadata of a card: what the Hub is told about an output, and nothing that is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layercut.disclosure import repo_of
from layercut.errors import LayercutError
from layercut.header import quoted
from layercut.report import Report, ReportSource
from layercut.stack import models_of
from layercut.stated import Licence, Stated, pinned_link
from layercut.upload import Upload

# Tasks of the Hub that follow from the class of the model alone.
TASKS: Mapping[str, str] = {
    "ForCausalLM": "text-generation", "LMHeadModel": "text-generation", "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification", "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}  # fmt: skip


def card_metadata(report: Report, stated: Mapping[str, Stated], licence: Licence, architectures: Sequence[object] = ()) -> dict[str, Any]:
    """Metadata as the Hub takes it, in the order in which cards have it.

    `stated` is by alias what the cards of the sources state; only what holds for the output is taken over.
    """
    own = [stated.get(alias, Stated()) for alias in report.sources]
    found: dict[str, Any] = {"license": _one_or_all(licence.ids)} if licence.ids else {}
    if licence.ids and licence.name:
        found["license_name"] = licence.name
    if licence.ids and licence.link:
        found["license_link"] = licence.link
    alike = own[0] if own and all((card.languages, card.datasets) == (own[0].languages, own[0].datasets) for card in own) else Stated()
    if alike.languages:
        found["language"] = list(alike.languages)
    found["library_name"] = "transformers"
    task = _task(stated.get(report.donor, Stated()), architectures)
    if task is not None:
        found["pipeline_tag"] = task
    bases = base_models(report)
    if bases:
        found["base_model"] = _one_or_all(bases)
    if bases and is_merge(report):
        found["base_model_relation"] = "merge"
    found["tags"] = tags(report)
    if alike.datasets:
        found["datasets"] = list(alike.datasets)
    return found


def base_models(report: Report) -> tuple[str, ...]:
    """Repositories that layers come from, in the order in which the stack takes them up. Folders of this machine are none."""
    used = dict.fromkeys(model for layer in report.layers for model in models_of(layer))
    repos = (repo_of(report.sources[alias]) for alias in used)
    return tuple(dict.fromkeys(repo for repo in repos if repo is not None))


def is_merge(report: Report) -> bool:
    """Whether layers of several models meet, or a layer stands in the stack more than once or in an average.

    Of the relations that the Hub knows (adapter, finetune, merge, quantized) no other is ever true: a model of which layers were only
    taken away was not trained.
    """
    used = {model for layer in report.layers for model in models_of(layer)}
    taken = [(layer.model, index) for layer in report.layers if not layer.shares for index in range(layer.index, layer.index + layer.span)]
    return len(used) > 1 or len(set(taken)) < len(taken) or any(len(layer.shares) > 1 for layer in report.layers)


def is_pruned(report: Report) -> bool:
    """Whether the output is one model with fewer layers than it had."""
    used = {model for layer in report.layers for model in models_of(layer)}
    return len(used) == 1 and len(report.layers) < report.sources[used.pop()].depth


def tags(report: Report) -> list[str]:
    """`layercut`, and what the output is."""
    return ["layercut", *["depth-pruning"] * is_pruned(report), *["merge"] * is_merge(report)]


def choose_licence(
    sources: Mapping[str, ReportSource], files: Mapping[str, object], stated: Mapping[str, Stated], upload: Upload | None
) -> Licence:
    """The licence that the recipe names, or the one that all sources state. Raises LayercutError when they differ: that is not ours
    to decide.
    """
    if upload is not None and upload.license is not None:
        return Licence((upload.license,), upload.license_name, upload.license_link)
    found: dict[Licence, str] = {}
    for alias, source in sources.items():
        licence = stated.get(alias, Stated()).licence
        if licence.ids:
            licence = licence._replace(link=pinned_link(licence.link, repo_of(source), source.revision, files))
        found.setdefault(licence if licence.ids else Licence(), alias)
    kinds = {(licence.ids, licence.name) for licence in found}
    if len(kinds) > 1:
        said = ", ".join(f"{quoted(alias)} {licence}" for licence, alias in found.items())
        hint = "say which holds for the result: upload: {license: …} in the recipe, or push --license"
        raise LayercutError(f"the sources differ in their licences: {said}", hint=hint)
    return next(iter(found), Licence())


def _task(stated: Stated, architectures: Sequence[object]) -> str | None:
    """The task that the card of the donor states, or else the one of the model's class."""
    if stated.pipeline_tag is not None:
        return stated.pipeline_tag
    name = architectures[0] if architectures else ""
    return next((task for end, task in TASKS.items() if isinstance(name, str) and name.endswith(end)), None)


def _one_or_all(values: Sequence[str]) -> str | list[str]:
    """One value stands alone."""
    return values[0] if len(values) == 1 else list(values)
