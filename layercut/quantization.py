"""Quantisation configs: the names of layers in them follow a new stack. Moves no weights, and knows no scheme.

Every scheme stores what belongs to a weight under the name of its layer, so the bytes move with the layer. The config names layers too:
in lists (`modules_to_not_convert`, `ignore`), in keys (`config_for_layers`, `quantized_layers`), exactly, as globs, or as regexes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from layercut.architecture import NUMBER, LayerStack, Member, config_node
from layercut.checkpoint import Checkpoint, read_text
from layercut.errors import CheckpointError, RefusedError
from layercut.header import parse_json, quoted
from layercut.jsontext import replace
from layercut.naming import MARKERS, Naming, Spot, is_pattern, is_regex
from layercut.plan import Edit
from layercut.stack import LayerRef

ROOTS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json that say how a model is quantised: transformers, old compressed-tensors, MLX."""
SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files beside config.json that say it again, for other readers."""

# Where transformers lets a pattern of its own end: "mlp.gate" does not mean "mlp.gate_proj".
BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"
# A group of a regex without groups in it, its body, and whether it is repeated.
GROUP = re.compile(r"\((?:\?(?:P<\w+>|[:=!>]|<[=!]|[a-zA-Z-]+:?))?([^()]*)\)([*+{]?)")
MOST_REPEATS = 8
"""Repetitions one behind the other in a regex that is tried; honest ones have up to seven."""


class Followed(NamedTuple):
    """What has to change for a new stack: values of config.json, whole texts of other files by name, and what the reader should know."""

    edits: tuple[Edit, ...] = ()
    texts: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()


class _Follower:
    """Rewrites values of one model's quantisation config for a new stack."""

    def __init__(self, donor: str, members: Mapping[str, Member], order: Sequence[LayerRef]) -> None:
        self.donor, self.order = donor, order
        self.naming = {alias: _naming(member) for alias, member in members.items()}
        self.notes: list[str] = []

    def follow(self, value: Any, others: Mapping[str, Any], where: str) -> Any:
        """`value` with all names of layers in it as the new stack has them; `others` are the same values of the other models."""
        if isinstance(value, dict):
            return self._follow_keys(value, {a: v for a, v in others.items() if isinstance(v, dict)}, where)
        if isinstance(value, list):
            return self._follow_items(value, {a: v for a, v in others.items() if isinstance(v, list)}, where)
        if isinstance(value, str) and (spot := self._spot(self.donor, value)) is not None:
            positions = self._positions(self.donor, spot)
            if len(positions) != 1:
                raise RefusedError(f"{where} is {quoted(value)}, and that layer stands {len(positions)} times in the new stack")
            return _renamed(value, spot, positions[0])
        return value

    def _follow_items(self, value: list[Any], others: Mapping[str, list[Any]], where: str) -> list[Any]:
        found: list[Any] = []
        for number, item in enumerate(value):
            if isinstance(item, str):
                found += self._follow_name(item, where)
            else:
                same = {alias: other[number] for alias, other in others.items() if len(other) == len(value)}
                found.append(self.follow(item, same, where))
        found += [name for alias, other in others.items() for item in other for name, _ in self._of_other(alias, item)]
        return found

    def _follow_keys(self, value: dict[str, Any], others: Mapping[str, dict[str, Any]], where: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, item in value.items():
            names = self._follow_name(key, where)
            if names == [key]:
                found[key] = self.follow(item, {a: other[key] for a, other in others.items() if key in other}, f"{where}.{key}")
                continue
            spot = self._spot(self.donor, key)
            positions = [None] * len(names) if spot is None else self._positions(self.donor, spot)
            for name, at in zip(names, positions, strict=True):
                found.setdefault(name, self._pinned(item, spot, at))  # of two entries that fit, readers take the first
        for alias, other in others.items():
            for key, item in other.items():
                spot = self._spot(alias, key)
                for name, at in self._of_other(alias, key):
                    found.setdefault(name, self._pinned(item, spot, at))
        return found

    def _of_other(self, alias: str, name: Any) -> list[tuple[str, int]]:
        """What the name of a layer of another model becomes, and at which positions."""
        spot = self._spot(alias, name) if isinstance(name, str) else None
        return [] if spot is None else [(_renamed(name, spot, at), at) for at in self._positions(alias, spot)]

    def _follow_name(self, name: str, where: str) -> list[str]:
        """What one name or pattern of the donor becomes."""
        spot = self._spot(self.donor, name)
        if spot is not None:
            return [_renamed(name, spot, at) for at in self._positions(self.donor, spot)]
        if re.match(rf"{NUMBER}(\.|$)", name):
            note = f"{where} names {quoted(name)}, which may mean a layer by its number alone: left as it is"
            self.notes += [note] if note not in self.notes else []
        if not is_pattern(name) or not re.search(r"[0-9?]|\\d", name):
            return [name]
        return self._follow_pattern(name, where)

    def _follow_pattern(self, pattern: str, where: str) -> list[str]:
        """The pattern as it is when it means the same layers in the new stack, else the exact names that it matched."""
        own = self.naming[self.donor]
        matches = _matcher(pattern, where)
        if matches is None:
            raise RefusedError(
                f"{where} holds {quoted(pattern)}, which is no regex that can be tried", hint="replace it by the names that it means"
            )
        for prefixes in own.prefixes:
            moved = [
                (own.named(prefixes, module, layer.index), own.named(prefixes, module, at))
                for at, layer in enumerate(self.order)
                for module in self.naming[layer.model].modules.get(layer.index, ())
            ]
            hits = [new for old, new in moved if matches(old)]
            if hits or any(matches(new) for _, new in moved):
                if all(matches(old) == matches(new) for old, new in moved):
                    return [pattern]
                return [_exact(pattern, name, where) for name in _outermost([*filter(matches, own.outside), *hits])]
        elsewhere = any(map(matches, own.outside))
        ever = any(matches(own.named(p, m, i)) for p in own.prefixes for i, modules in own.modules.items() for m in modules)
        if not ever and not elsewhere and own.touches(pattern):
            message = f"{where} holds {quoted(pattern)}, which speaks of layers by number and matches no module of the file"
            raise RefusedError(message, hint="replace it by the names that it means")
        return [pattern] if elsewhere or not ever else []

    def _spot(self, alias: str, name: str) -> Spot | None:
        return self.naming[alias].spot(name)

    def _positions(self, alias: str, spot: Spot) -> list[int]:
        return [at for at, layer in enumerate(self.order) if (layer.model, layer.index) == (alias, spot.layer)]

    def _pinned(self, value: Any, spot: Spot | None, at: int | None) -> Any:
        """A value that belongs to one layer, once that layer stands at position `at`."""
        if spot is None or at is None:
            return value
        if isinstance(value, dict):
            return {self._pinned(key, spot, at): self._pinned(item, spot, at) for key, item in value.items()}
        if isinstance(value, list):
            return [self._pinned(item, spot, at) for item in value]
        inner = self._spot(self.donor, value) if isinstance(value, str) else None
        return _renamed(value, inner, at) if inner is not None and inner.layer == spot.layer else value


def follow(donor: str, members: Mapping[str, Member], order: Sequence[LayerRef]) -> Followed:
    """Make every name of a layer in the donor's quantisation config, and in the files that repeat it, follow the stack `order`.

    Exact names and patterns with one literal index are renamed, repeated, or dropped with their layer. Other patterns that would
    mean other layers are replaced by the names that they matched. Raises RefusedError when that cannot be done, and when a model that
    gives layers is quantised in another way than the donor.
    """
    follower = _Follower(donor, members, order)
    used = [alias for alias in members if alias != donor and any(layer.model == alias for layer in order)]
    said = {alias: configs(members[alias].checkpoint.config, members[alias].stack) for alias in (donor, *used)}
    plain = {alias: {path[-1]: stripped(v, members[alias]) for path, v in found.items()} for alias, found in said.items()}
    for alias in used:
        if plain[alias] != plain[donor]:
            raise RefusedError(f"'{donor}' and '{alias}' are quantised in different ways: one config cannot describe both")
    edits: list[Edit] = []
    for path, value in said[donor].items():
        others = {alias: found for alias in used for place, found in said[alias].items() if place[-1] == path[-1]}
        edits += _edits(path, value, follower.follow(value, others, ".".join(path)))
    texts: dict[str, str] = {}
    for name in _side_files(members[donor].checkpoint):
        text, value = _read(members[donor].checkpoint, name)
        others = {alias: _read(members[alias].checkpoint, name)[1] for alias in used if name in _side_files(members[alias].checkpoint)}
        after = follower.follow(value, others, name)
        changes = list(_edits((), value, after))
        if changes:
            whole = not changes[0].key  # the names stand at the top of the file
            texts[name] = json.dumps(after, indent=2) + "\n" if whole else replace(text, {_path(edit): edit.after for edit in changes})
            follower.notes.append(f"{name}: {', '.join(edit.key for edit in changes) or 'its keys'} follow the layers")
    return Followed(tuple(edits), texts, tuple(follower.notes))


def configs(config: Mapping[str, Any], stack: LayerStack) -> dict[tuple[str, ...], Any]:
    """What config.json says of quantisation, by its path: at the root, and in the node of the stack."""
    nodes = dict.fromkeys([(), stack.node])
    return {(*node, key): config_node(config, node)[key] for node in nodes for key in ROOTS if config_node(config, node).get(key)}


def is_quantized(checkpoint: Checkpoint, stack: LayerStack) -> bool:
    """Whether config.json, or a file beside it, says that the weights are quantised."""
    return bool(configs(checkpoint.config, stack)) or bool(_side_files(checkpoint))


def mentions(config: Mapping[str, Any], stack: LayerStack) -> list[tuple[str, Any]]:
    """Dotted path and value of everything in the quantisation config that names layers."""
    naming = Naming(stack)

    def walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and not any(naming.spot(key) for key in value):
            for key, item in value.items():
                yield from walk(item, (*path, key))
        elif _strip(value, naming) != value:
            yield ".".join(path), value

    return [found for path, value in configs(config, stack).items() for found in walk(value, path)]


def stripped(value: Any, member: Member) -> Any:
    """A value without what it says of single layers: equal in models that are quantised in one way."""
    return _strip(value, _naming(member))


def _naming(member: Member) -> Naming:
    return Naming(member.stack, member.checkpoint.tensors)


def _strip(value: Any, naming: Naming) -> Any:
    if isinstance(value, dict):
        return {key: _strip(item, naming) for key, item in value.items() if naming.spot(key) is None}
    if isinstance(value, list):
        return [_strip(item, naming) for item in value if not isinstance(item, str) or naming.spot(item) is None]
    return None if isinstance(value, str) and naming.spot(value) is not None else value


def _side_files(checkpoint: Checkpoint) -> list[str]:
    present = {name for name, _ in checkpoint.companions}
    return [name for name in SIDE_FILES if name in present]


def _read(checkpoint: Checkpoint, name: str) -> tuple[str, dict[str, Any]]:
    path = checkpoint.path(name)
    text = read_text(path, checkpoint.folder)
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object", where=path)
    return text, value


def _edits(path: tuple[str, ...], before: Any, after: Any) -> Iterator[Edit]:
    """The smallest values that changed. A dict with dots in its keys changes as a whole: an edit names its value by a dotted path."""
    if before == after and list(before if isinstance(before, dict) else ()) == list(after if isinstance(after, dict) else ()):
        return
    same_keys = isinstance(before, dict) and isinstance(after, dict) and list(before) == list(after)
    if same_keys and not any("." in key for key in before):
        for key, value in before.items():
            yield from _edits((*path, key), value, after[key])
    else:
        yield Edit(key=".".join(path), before=before, after=after, reason="names of layers")


def _path(edit: Edit) -> tuple[str, ...]:
    return tuple(edit.key.split("."))


def _renamed(name: str, spot: Spot, at: int) -> str:
    return f"{name[: spot.start]}{at // spot.stride}{name[spot.stop :]}"


def _matcher(pattern: str, where: str) -> Callable[[str], bool] | None:
    """Whether a name is meant by a pattern, as the readers of such patterns decide it; None for a regex that is none, or has no end."""
    regex = is_regex(pattern)
    if not regex and ".*" not in pattern:
        return lambda name: fnmatchcase(name, pattern)
    bare = pattern[3 if pattern.startswith("re:") else 2 :] if pattern.startswith(MARKERS) else pattern
    if len(bare) > 1000 or _is_endless(bare):
        return None
    if bare == pattern and not where.endswith(".dynamic"):
        bare = f"(?:{bare}){BOUNDARY}"
    try:
        compiled = re.compile(bare)
    except (re.error, RecursionError, OverflowError):
        return None if regex else lambda name: fnmatchcase(name, pattern)
    return lambda name: compiled.match(name) is not None


def _is_endless(regex: str) -> bool:
    """Whether it may take for ever to find that a regex does not match: something repeated has a choice in it, or too much repeats."""
    text = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", regex, flags=re.DOTALL).replace("\0", "x")
    while (group := GROUP.search(text)) is not None:
        if group[2] and re.search(r"[*+?{|\0]", group[1]):
            return True
        text = f"{text[: group.start()]}x{chr(0) * _repeats(group[1])}{text[group.end(1) + 1 :]}"
    return _repeats(text) > MOST_REPEATS


def _repeats(text: str) -> int:
    """Repetitions one behind the other, in the choice that has most of them; NUL stands for those of a group."""
    return max(len(re.findall(r"[*+{\0]", choice)) for choice in text.split("|"))


def _exact(pattern: str, name: str, where: str) -> str:
    """A module's name in place of a pattern that matched it, as the reader of that pattern wants it."""
    if where.endswith(".dynamic"):  # GPTQModel reads every key as a regex
        marker = pattern[:2] if pattern.startswith(MARKERS) else ""
        return f"{marker}^{re.escape(name)}$"
    return name


def _outermost(names: Iterable[str]) -> list[str]:
    """Names of which none is only the parent of another: where a module and its parts matched, the parts are what is quantised."""
    found = list(dict.fromkeys(names))
    parents = {".".join(name.split(".")[:count]) for name in found for count in range(1, name.count(".") + 1)}
    return [name for name in found if name not in parents]
