"""Config surgery: what in config.json depends on the layers, and how each value follows a new stack."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from layercut.amends import hindrance
from layercut.anatomy import MTP_KEYS, Member, config_node
from layercut.architecture import FALLBACK
from layercut.checkpoint import read_text
from layercut.errors import CheckpointError, RefusedError
from layercut.exceptions import Case, objection, objections, remarks
from layercut.header import parse_json
from layercut.implied import implied_values
from layercut.jsontext import replace
from layercut.moves import AROUND, GENERATING, GENERATION, IN_NODE, Moves, Remap
from layercut.patterns import PATTERNS, SCALARS
from layercut.plan import Edit
from layercut.quantization import follow, mentions
from layercut.rules import LIST_OF_PERIOD, SWITCH, Rule
from layercut.stack import LayerRef
from layercut.strangers import check_strangers
from layercut.views import View

GENERATION_CONFIG = "generation_config.json"
INEXACT = "to write it all the same, say 'allow: inexact' in the recipe"
Path = tuple[str, ...]


class Surgery(NamedTuple):
    """The edited text, and what was changed."""

    text: str
    edits: tuple[Edit, ...]
    texts: Mapping[str, str] = {}
    """Other files that say the same again, by name."""
    notes: tuple[str, ...] = ()


def operate(
    text: str,
    donor: str,
    members: Mapping[str, Member],
    order: Sequence[LayerRef],
    more: tuple[Edit, ...] = (),
    *,
    inexact: bool = False,
) -> Surgery:
    """Make the config text of `donor` describe the stack `order`.

    Every depth-dependent value follows its rule; every other byte stays. Raises RefusedError when the new stack cannot be
    described (a period that is broken, a prefix that is no prefix), when a value looks depth-dependent and has no rule, or when the
    stack would load but compute something else; with `inexact`, the last is a note.
    """
    stack = members[donor].stack
    if [(layer.model, layer.index) for layer in order] == [(donor, index) for index in range(stack.depth)]:
        return Surgery(_replaced(text, more), more)
    notes = _objections(donor, members, order, inexact)
    surgeon = _Surgeon(donor, members, order)
    edits = surgeon.edits()
    quantization = follow(donor, members, order)
    generation = surgeon.generation()
    edits = [*edits, *quantization.edits, *more]
    texts = {**quantization.texts, **({} if generation is None else {GENERATION_CONFIG: generation})}
    return Surgery(_replaced(text, edits), tuple(edits), texts, (*notes, *surgeon.notes, *quantization.notes))


def _replaced(text: str, edits: Sequence[Edit]) -> str:
    return replace(text, {tuple(edit.key.split(".")): edit.after for edit in edits})


def _objections(donor: str, members: Mapping[str, Member], order: Sequence[LayerRef], inexact: bool) -> list[str]:
    """Notes on what the stack computes. Raises RefusedError for what would load but compute something else."""
    view = View(members[donor])
    names = members[donor].checkpoint.tensors
    case = Case(
        view.kind, view.node, [layer.index for layer in order], view.stack.depth, view.stack.name, names, members[donor].checkpoint.config,
    )  # fmt: skip
    hindered = hindrance(members, order)
    found = [*objections(case), *([] if hindered is None else [objection(view.kind, hindered)])]
    for one in found:
        if not inexact or one.fatal:
            raise RefusedError(one.text, hint=None if one.fatal else INEXACT)
    return [*(f"inexact: {one.text}" for one in found), *remarks(case)]


class _Surgeon:
    """Finds the edits of one config for one new stack."""

    def __init__(self, donor: str, members: Mapping[str, Member], order: Sequence[LayerRef]) -> None:
        self.donor, self.members, self.order = donor, members, order
        self.views = {alias: View(member) for alias, member in members.items()}
        self.view = self.views[donor]
        self.stack = members[donor].stack
        self.moves = Moves(donor, self.stack.depth, tuple(order))
        self.notes: list[str] = []

    def edits(self) -> list[Edit]:
        """Every edit: the depth, values of single layers, values that name layers, what the class derives, and the prediction layers."""
        check_strangers(self.members[self.donor], self.view)
        found = self._depth()
        claimed: set[str] = set()
        for pattern in PATTERNS:
            if pattern.applies(self.view.node, self.stack) and pattern.decode(self.view.node, self.stack.depth) is not None:
                claimed.update(pattern.keys)
                found += self._follow_pattern(pattern)
        for scalar in SCALARS:
            if scalar.applies(self.view.node, self.stack) and len(self.order) != self.stack.depth:
                after = scalar.follow(self.view.node, self.stack.depth, len(self.order))
                claimed.add(scalar.key)
                found.append(self._edit((scalar.key,), after, scalar.reason))
        for path in self.view.paths():
            if path[0] not in claimed and path[0] not in self.view.implied:
                found += self._follow(path)
        found += self._written_out(found, claimed)
        found += self._around()
        if self.stack.extra:
            why = "multi-token-prediction layers are left out"
            found += [self._edit((name,), 0, why) for name in MTP_KEYS if self.view.written.get(name)]
        return found

    def _depth(self) -> list[Edit]:
        edits = []
        for key in (self.stack.depth_key, *self.stack.aliases):
            if key.form != "length" and (key.depth != len(self.order) or key.form == "absent"):
                before = None if key.form == "absent" else key.spelled(key.depth)
                edits.append(Edit(key=str(key), before=before, after=key.spelled(len(self.order)), reason="depth"))
        other = FALLBACK.get(self.stack.depth_key.key)
        if self.stack.name == "encoder" and other is not None and self.view.written.get(other) is None:
            why = "depth of the decoder, which was read from that of the encoder"
            edits.append(Edit(key=self.view.dotted((other,)), before=None, after=self.stack.depth, reason=why))
        return edits

    def _edit(self, path: Path, after: Any, reason: str) -> Edit:
        before: Any = self.view.written
        for part in path:
            before = before.get(part) if isinstance(before, Mapping) else None
        return Edit(key=self.view.dotted(path), before=before, after=after, reason=reason)

    def _follow_pattern(self, pattern: Any) -> list[Edit]:
        entries = []
        for layer in self.order:
            view = self.views[layer.model]
            decoded = pattern.decode(view.node, view.stack.depth)
            if decoded is None:
                raise self._one_sided(pattern.keys[0], layer.model)
            entries.append(decoded[layer.index])
        changes = pattern.encode(entries, self.view.node)
        if changes is None:
            values = ", ".join(f"{key} = {self.view.node[key]}" for key in pattern.keys if key in self.view.node)
            raise self._broken(f"{self.view.dotted(())}{'.' if self.stack.node else ''}{values}", pattern.reason)
        return [self._edit((key,), after, pattern.reason) for key, after in changes.items() if self.view.written.get(key) != after]

    def _follow(self, path: Path) -> list[Edit]:
        """The edit that makes the value at `path` follow the new stack; none when it stays as it is."""
        value = self.view.value(path)
        remap = IN_NODE.get(path[-1])
        if remap is not None and len(path) == 1:
            return self._remapped(remap, self.stack.node, path[-1], value)
        rule = self.view.rule(path)
        if rule is None:
            return []
        after = rule.encode(self._gathered(rule, path), value)
        if after is None:
            return self._gives_way(path, value, rule)
        return [] if after == value else [self._edit(path, after, rule.reason)]

    def _gathered(self, rule: Rule, path: Path) -> list[Any]:
        """What the layers of the new stack had of the value at a path."""
        entries = []
        for layer in self.order:
            decoded = self.views[layer.model].entries(rule, path)
            if decoded is None:
                raise self._one_sided(".".join(path), layer.model)
            entries.append(decoded[layer.index])
        if not self.stack.extra:  # else the multi-token-prediction layers are left out, and with them what is said of them
            entries += (self.view.entries(rule, path) or [])[self.stack.depth :]
        return entries

    def _gives_way(self, path: Path, value: Any, rule: Rule) -> list[Edit]:
        """A value that cannot say the new order: no matter where the class reads a list instead, or does not read it at all."""
        name = path[-1]
        if isinstance(self.view.node.get(LIST_OF_PERIOD.get(name, "")), list) or not self.view.node.get(SWITCH.get(name, name)):
            return []
        raise self._broken(f"{self.view.dotted(path)} = {value}", rule.reason)

    def _written_out(self, edits: Sequence[Edit], claimed: set[str]) -> list[Edit]:
        """Values that the class would make otherwise for the new stack than its layers had."""
        node = copy.deepcopy(dict(self.view.written))
        for edit in edits:
            *inner, last = edit.key.split(".")[len(self.stack.node) :]
            holder = node
            for part in inner:
                holder = holder[part]
            holder[last] = edit.after
        found: list[Edit] = []
        for key, value in self.view.implied.items():
            rule = self.view.rule((key,))
            if key in claimed or rule is None:
                continue
            after = rule.encode(self._gathered(rule, (key,)), value)
            if after is None:
                raise self._broken(f"{self.view.dotted((key,))} = {value}, which the class takes for granted,", rule.reason)
            if implied_values(node, self.view.kind, len(self.order)).get(key) != after:
                found.append(self._edit((key,), after, f"{rule.reason}, written out"))
                node[key] = after
        return found

    def _remapped(self, remap: Remap, node: Path, key: str, value: Any) -> list[Edit]:
        after = remap.follow(value, self.moves)
        if after is None or after == value:
            return []
        return [Edit(key=".".join((*node, key)), before=value, after=after, reason=remap.reason)]

    def _around(self) -> list[Edit]:
        """Values around the node of the stack that name its layers."""
        found: list[Edit] = []
        for length in range(len(self.stack.node)):
            node = self.stack.node[:length]
            values = config_node(self.view.config, node)
            for key, remap in AROUND.get(self.stack.name, {}).items():
                if key in values:
                    found += self._remapped(remap, node, key, values[key])
        return found

    def generation(self) -> str | None:
        """The text of generation_config.json with its layers as they stand now, or None when it names none."""
        checkpoint = self.members[self.donor].checkpoint
        if self.stack.name not in GENERATING or GENERATION_CONFIG not in {name for name, _ in checkpoint.companions}:
            return None
        path = checkpoint.path(GENERATION_CONFIG)
        text = read_text(path, checkpoint.folder)
        try:
            values = parse_json(text, path)
        except CheckpointError:  # no reader of such a file finds layers in it
            return None
        if not isinstance(values, dict):
            return None
        changes: dict[Path, Any] = {}
        for key, remap in GENERATION.items():
            after = remap.follow(values[key], self.moves) if key in values else None
            if after is not None and after != values[key]:
                changes[(key,)] = after
                self.notes.append(f"{GENERATION_CONFIG}: {key} follows the layers")
        return replace(text, changes) if changes else None

    def _one_sided(self, key: str, model: str) -> RefusedError:
        return RefusedError(f"config.json: {key} is set in '{self.donor}' but not in '{model}': one config cannot describe both")

    @staticmethod
    def _broken(values: str, reason: str) -> RefusedError:
        message = f"config.json: {values} ({reason}) cannot describe the new order of layers"
        return RefusedError(message, hint="choose layers that keep the pattern")


def refused_cuts(member: Member) -> dict[str, list[int]]:
    """The layers that cannot be cut each on its own, by the reason."""
    found: dict[str, list[int]] = {}
    for gone in range(member.stack.depth if member.stack.depth > 1 else 0):
        order = [LayerRef(model="", index=index) for index in range(member.stack.depth) if index != gone]
        try:
            operate(member.checkpoint.config_text, "", {"": member}, order)
        except RefusedError as error:
            found.setdefault(error.message, []).append(gone)
    return found


FORMS = {
    "number": "depth", "absent": "depth, the default of the class", "length": "its length is the depth",
    "pairs": "depth, of which attention and MLP are counted apart",
}  # fmt: skip


class Dependent(NamedTuple):
    """A value of config.json that depends on the layers, and how."""

    key: str
    value: Any
    reason: str


def dependents(member: Member) -> list[Dependent]:
    """Every value of a config that `operate` would make follow a new stack, the depth first."""
    view, stack = View(member), member.stack
    found = [Dependent(str(key), key.spelled(key.depth), FORMS[key.form]) for key in (stack.depth_key, *stack.aliases)]
    claimed: set[str] = set()
    for pattern in PATTERNS:
        if pattern.applies(view.node, stack) and pattern.decode(view.node, stack.depth) is not None:
            claimed.update(pattern.keys)
            found += [Dependent(view.dotted((key,)), view.node[key], pattern.reason) for key in pattern.keys if key in view.node]
    for scalar in SCALARS:
        if scalar.applies(view.node, stack):
            found.append(Dependent(view.dotted((scalar.key,)), view.node.get(scalar.key), scalar.reason))
    for path in view.paths():
        rule = IN_NODE.get(path[-1]) or view.rule(path)
        if rule is not None and path[0] not in claimed:
            end = ", made by the class" if path[0] in view.implied else ""
            found.append(Dependent(view.dotted(path), view.value(path), f"{rule.reason}{end}"))
    for length in range(len(stack.node)):
        values = config_node(view.config, stack.node[:length])
        found += [
            Dependent(".".join((*stack.node[:length], key)), values[key], remap.reason)
            for key, remap in AROUND.get(stack.name, {}).items()
            if key in values
        ]
    return [*found, *(Dependent(key, value, "names of layers") for key, value in mentions(view.config, stack))]
