"""Names that speak of layers: which layer a module name, or a pattern of such names, means, and what it is called at another index."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from layercut.anatomy import NUMBER, LayerStack, numbered_prefixes
from layercut.towers import OTHER_STACKS

MARKERS = ("re:", "+:", "-:")
"""Before a regex: compressed-tensors, and GPTQModel, where `-:` excludes."""
# Components that stand before the layers in one loader and not in another.
WRAPPERS = ("model", "language_model", "text_model", "llm", "transformer", "backbone")
PREFIXES = ("model.", "", "model.language_model.", "language_model.model.")

Names = Sequence[str]


class Module(NamedTuple):
    """A module of a layer: the number of the list that it stands in, and its name below the index."""

    number: int
    rest: str


class Spot(NamedTuple):
    """Where a name says which layer it means: a span of its text, the layer, and how many layers one step of the number is."""

    start: int
    stop: int
    layer: int
    stride: int = 1


class Listed(NamedTuple):
    """A numbered list that holds layers, or parts of them: its entry j belongs to layer `j * stride`."""

    prefix: str
    stride: int
    parts: frozenset[str]
    """Components before its own name."""
    own: str
    """Its own name."""
    spot: re.Pattern[str]

    @classmethod
    def of(cls, prefix: str, stride: int) -> Listed:
        *before, own = prefix.rstrip(".").split(".")
        return cls(prefix, stride, frozenset(before), own, re.compile(rf"(?<![A-Za-z0-9_]){re.escape(own)}\\?\.({NUMBER})(?=\\?\.|\$|$)"))


class Naming:
    """How names speak of the layers of one model."""

    def __init__(self, stack: LayerStack, tensors: Collection[str] = ()) -> None:
        self.stack, self.tensors = stack, tensors
        lists = ((stack.prefix, 1), *((sibling.prefix, sibling.stride) for sibling in stack.siblings if not sibling.bare))
        self.lists = [Listed.of(prefix, stride) for prefix, stride in lists if prefix and not stack.shared]

    def spot(self, text: str) -> Spot | None:
        """The layer that a name means, when one literal index says it. None for other names, and for patterns that may mean several."""
        if is_regex(text) and re.search(r"[|(?{]", text):
            return None
        for listed in self.lists:
            found = [match for match in listed.spot.finditer(text) if self._is_ours(listed, text[: match.start()])]
            if not found or (len(found) > 1 and is_pattern(text)):
                continue
            first = found[0]
            if text.startswith(MARKERS) and re.match(r"\.[*+]", text[first.end() :]):  # "layers.1.*" means layer 10 too
                return None
            return Spot(first.start(1), first.end(1), int(first[1]) * listed.stride, listed.stride)
        return None

    def touches(self, text: str) -> bool:
        """Whether a pattern has digits where a layer index would stand."""
        text = re.sub(r"(\[0-9\]|\\d)[+*]", "", text)  # any number
        return any(re.search(rf"(?<![A-Za-z0-9_]){re.escape(listed.own)}\\?\.[(\[]*(\?:)?[0-9\[]", text) for listed in self.lists)

    def _is_ours(self, listed: Listed, head: str) -> bool:
        """Whether what stands before the name of a list leads to this stack, under the names of the file or of a loader."""
        for marker in MARKERS:
            head = head.removeprefix(marker)
        parts = [part for part in head.removeprefix("^").replace("\\.", ".").split(".") if part]
        if any(re.search(r"[*?\[\]+]", part) for part in parts):
            return not self._has_twin(listed.own) and not OTHER_STACKS.search(head)
        return all(part in listed.parts or part in WRAPPERS for part in parts)

    def _has_twin(self, own: str) -> bool:
        """Whether a list of another stack of the file is called the same, so that a wildcard before the name means both."""
        return any(prefix not in self.stack.prefixes and f".{prefix}".endswith(f".{own}.") for prefix in self._numbered)

    @cached_property
    def _numbered(self) -> Names:
        return list(numbered_prefixes(self.tensors))

    @cached_property
    def modules(self) -> Mapping[int, Sequence[Module]]:
        """The modules of each layer, the empty name for the layer itself, or for its part of a list."""
        found: dict[int, dict[Module, None]] = {}
        numbers = {listed.prefix: number for number, listed in enumerate(self.lists)}
        for name in self.tensors:
            place = self.stack.place(name)
            if place is not None and place.prefix in numbers:
                number = numbers[place.prefix]
                of_layer = found.setdefault(place.layer, {})
                of_layer.update(dict.fromkeys(Module(number, rest) for rest in ("", *ancestors(place.rest))))
        return {index: list(modules) for index, modules in found.items()}

    @cached_property
    def outside(self) -> Names:
        """Names of the modules outside the stack."""
        names = (name for name in self.tensors if self.stack.place(name) is None)
        return list(dict.fromkeys(module for name in names for module in ancestors(name)))

    @cached_property
    def prefixes(self) -> Sequence[Names]:
        """Prefixes that the lists of the stack may have: those of the file first, then those of loaders."""
        own = tuple(listed.prefix for listed in self.lists)
        return list(dict.fromkeys([own, *(tuple(f"{prefix}{_bare(name)}" for name in own) for prefix in PREFIXES)]))

    def named(self, prefixes: Names, module: Module, index: int) -> str:
        """What a module of a layer is called once the layer has this index."""
        tail = f".{module.rest}" if module.rest else ""
        return f"{prefixes[module.number]}{index // self.lists[module.number].stride}{tail}"


def _bare(prefix: str) -> str:
    """A prefix without the components that loaders put before it."""
    parts = prefix.split(".")
    while len(parts) > 2 and parts[0] in WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def is_regex(text: str) -> bool:
    return text.startswith(MARKERS) or bool(re.search(r"[\\^$()|+{}]", text))


def is_pattern(text: str) -> bool:
    return is_regex(text) or bool(re.search(r"[*?\[]", text))


def ancestors(name: str) -> Iterator[str]:
    """The modules that a tensor is part of, the outermost first: `a.b.weight.absmax` is part of a and a.b."""
    parts = name.split(".")[:-1]
    if "weight" in parts:
        parts = parts[: parts.index("weight")]
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])
