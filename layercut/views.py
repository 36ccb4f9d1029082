"""Views: what the config of one model says of the layers of its stack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layercut.anatomy import DEPTH_KEYS, LayerStack, Member, config_node, mtp_layers
from layercut.declarations import Architecture
from layercut.implied import implied_values
from layercut.rules import INDICES, INDICES_FROM_1, LETTERS, LIST, PREFIX, RULES, Rule, Values, whole
from layercut.towers import side_of

Path = tuple[str, ...]
# Keys that speak of one side of an encoder-decoder without saying so.
SIDES = {"attention_window": "encoder"}


class View:
    """What the config of one model says of the layers of its stack: what is written, and what the class makes of what is not."""

    def __init__(self, member: Member) -> None:
        self.config, self.stack = member.checkpoint.config, member.stack
        self.written = config_node(self.config, self.stack.node)
        kind = self.written.get("model_type") or self.config.get("model_type")
        self.kind = kind if isinstance(kind, str) else None
        self.implied = implied_values(self.written, self.kind, self.stack.depth)
        self.node: Mapping[str, Any] = {**self.written, **self.implied}
        self.extra = mtp_layers(self.written)

    def value(self, path: Path) -> Any:
        """The value at a path below the node, or None."""
        value: Any = self.node
        for part in path:
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def dotted(self, path: Path) -> str:
        return ".".join((*self.stack.node, *path))

    def paths(self) -> list[Path]:
        """Paths that a rule may apply to: members of the node, and those of plain dicts in it."""
        found: list[Path] = []
        for key, value in self.node.items():
            found.append((key,))
            nested = isinstance(value, Mapping) and self.rule((key,)) is None and not any(inner in DEPTH_KEYS for inner in value)
            if nested and not isinstance(value.get("model_type"), str):
                found += [(key, inner) for inner in value if self.rule((key, inner)) is not None]
        return found

    def rule(self, path: Path) -> Rule | None:
        """The rule that reads the value at a path, of those that its key or the recipe give it."""
        value, declared = self.value(path), self.stack.declared
        full = (*self.stack.node, *path)
        if declared.names(declared.ignore, full) or self.of_other_side(path[-1]):
            return None
        rules = (*_declared(declared, full), *RULES.get(path[-1], ()))
        return next((rule for rule in rules if decode(rule, value, self.config, self.stack) is not None), None)

    def of_other_side(self, key: str) -> bool:
        """Whether a key speaks of the encoder and this is the decoder, or the other way round."""
        side = SIDES.get(key) or side_of((key,))
        return self.stack.name in ("encoder", "decoder") and side not in (None, self.stack.name)

    def entries(self, rule: Rule, path: Path) -> Values | None:
        return decode(rule, self.value(path), self.config, self.stack)


def _declared(declared: Architecture, path: Path) -> list[Rule]:
    """Rules that a recipe gives to a value."""
    words = (
        (declared.lists, (LIST, LETTERS)),
        (declared.indices, (INDICES,)),
        (declared.numbers, (INDICES_FROM_1,)),
        (declared.counts, (PREFIX,)),
    )
    return [rule for names, rules in words if declared.names(names, path) for rule in rules]


def decode(rule: Rule, value: Any, config: Mapping[str, Any], stack: LayerStack) -> Values | None:
    """What a value says of each layer, or None. It may speak of declared multi-token-prediction layers too, behind the others."""
    found = rule.decode(value, stack.depth)
    extra = mtp_layers(config_node(config, stack.node))
    if found is None and extra:
        found = rule.decode(value, stack.depth + extra)
    if found is None and rule in (INDICES, INDICES_FROM_1) and isinstance(value, list):
        # an index beyond the depth names no layer: classes have such defaults
        found = rule.decode([item for item in value if not whole(item) or item < stack.depth + int(rule is INDICES_FROM_1)], stack.depth)
    return found
