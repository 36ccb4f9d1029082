"""Writes the reference pages and recipe.schema.json from the code. With --check it only compares."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from layercut.cli import cli
from layercut.metrics import METRICS
from layercut.operations import OPERATIONS
from layercut.recipe import Recipe
from layercut.searches import ALL

DOCS = Path(__file__).resolve().parent
COMMAND = "make docs"
NOTE = f"<!-- Written by docs/generate.py from the code. Change the code, then run: {COMMAND} -->"
WIDTH = 100

# Texts of a pattern, in words: the first sample that a pattern takes.
WORDS = {"3-5": '`"a-b"`', "25%": "percentage"}


class Section(NamedTuple):
    """A mapping of the recipe: its name in the schema, where it stands, and which mapping holds it."""

    name: str
    place: str
    parent: str


def sections(schema: Mapping[str, Any]) -> list[Section]:
    """Every mapping once, at its shallowest place, each followed by those that stand in it."""
    found: dict[str, Section] = {}
    queue: list[tuple[str, str, Mapping[str, Any]]] = [("", "", schema)]
    while queue:
        parent, place, node = queue.pop(0)
        for key, value in node.get("properties", {}).items():
            for name, inner in references(value, f"{place}.{key}" if place else key):
                if name not in found:
                    found[name] = Section(name, inner, parent)
                    queue.append((name, inner, schema["$defs"][name]))

    def below(parent: str) -> Iterator[Section]:
        for section in found.values():
            if section.parent == parent:
                yield section
                yield from below(section.name)

    return list(below(""))


def references(node: Mapping[str, Any], place: str) -> Iterator[tuple[str, str]]:
    """The mappings that a value may hold, with the place of each."""
    if "$ref" in node:
        yield node["$ref"].rpartition("/")[2], place
    tags = node.get("discriminator", {})
    for tag, target in tags.get("mapping", {}).items():
        yield target.rpartition("/")[2], f"{place}: {{{tags['propertyName']}: {tag}}}"
    for part in [] if tags else [*node.get("anyOf", ()), *node.get("oneOf", ())]:
        yield from references(part, place)
    for part in [*node.get("prefixItems", ()), *([node["items"]] if "items" in node else ())]:
        yield from references(part, f"{place}[]")


def anchor(place: str) -> str:
    """The anchor that Markdown makes of a heading `place`."""
    return "".join(letter for letter in place.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


def kind(node: Mapping[str, Any], places: Mapping[str, str]) -> str:
    """A type in words."""
    if "$ref" in node:
        place = places[node["$ref"].rpartition("/")[2]]
        return f"[mapping](#{anchor(place)})"
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return " or ".join(f"`{value}`" for value in node["enum"])
    choices = [part for part in node.get("anyOf", node.get("oneOf", ())) if part.get("type") != "null"]
    if choices:
        words = list(dict.fromkeys(kind(part, places) for part in choices))
        single = " or ".join(words[:-1])
        return f"{single}, or a list of such" if words[-1] == f"list of {single}" else " or ".join(words)
    if node["type"] == "array":
        fixed = [kind(part, places) for part in node.get("prefixItems", ())]
        if len(fixed) == 2:
            return f"[a, b], each {fixed[0]}" if fixed[0] == fixed[1] else f"[{', '.join(fixed)}]"
        return f"list of {fixed[0] if fixed else kind(node['items'], places)}"
    if node["type"] == "object":
        return f"mapping of names to {kind(node['additionalProperties'], places)}"
    if node["type"] == "string":
        taken = (words for sample, words in WORDS.items() if re.search(node.get("pattern", ""), sample))
        return next(taken, f"text matching `{node['pattern']}`") if "pattern" in node else "text"
    names = {"integer": "whole number", "number": "number", "boolean": "true or false"}
    bounds = [f"{node['minimum']}" if "minimum" in node else "", f"{node['maximum']}" if "maximum" in node else ""]
    spans = {(True, True): " {} to {}", (True, False): " from {}", (False, True): " up to {1}"}
    return names[node["type"]] + spans.get((bool(bounds[0]), bool(bounds[1])), "").format(*bounds)


def flow(value: Any) -> str:
    """A default as one would write it in a recipe."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def table(node: Mapping[str, Any], places: Mapping[str, str]) -> list[str]:
    """The keys of a mapping."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, value in node["properties"].items():
        needed = key in node.get("required", ())
        default = "**required**" if needed else "not set" if value.get("default") is None else f"`{flow(value['default'])}`"
        meaning = value.get("description", "Says which." if "const" in value else "").replace("\n", " ")
        cells = (f"`{key}`", kind(value, places), default, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def recipe_page() -> str:
    """The reference of recipes."""
    schema = Recipe.schema_document()
    found = sections(schema)
    places = {section.name: section.place for section in found}
    lines = [
        NOTE, "", "# Recipe reference", "", schema["description"], "",
        "Unknown keys are errors, with a suggestion. Editors check recipes as they are written when the first line is", "",
        "```yaml", "# yaml-language-server: $schema=PATH/TO/docs/recipe.schema.json", "```", "",
        "Layers count from 0. `layer_range` is half-open, as in mergekit; a range in `at` is written with a dash, and inclusive.", "",
        *table(schema, places),
    ]  # fmt: skip
    for section in found:
        node = schema["$defs"][section.name]
        lines += ["", f"{'#' * (2 + (section.parent != ''))} `{section.place}`", "", node.get("description", ""), ""]
        lines += table(node, places)
        operation = section.place.removeprefix("steps[].")
        if section.parent == "Step" and operation in OPERATIONS:
            lines += ["", "```yaml", "steps:", *(f"  {line}" for line in OPERATIONS[operation].examples), "```"]
    lines += [
        "",
        "## Strategies",
        "",
        "How a step chooses layers when only a number, or another budget, is given. [strategies.md](strategies.md) says what each costs,",
        "and when to take which.",
        "",
        "| name | chooses |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {' '.join(inspect.cleandoc(type(strategy).__doc__ or '').split())} |" for name, strategy in ALL.items()]
    return "\n".join(lines) + "\n"


TOKENS = (
    "## Tokens", "",
    "`token` says which tokens of a sample count. Pads never do; a BOS token does.", "",
    "| token | counts |", "|---|---|",
    "| `last` | the last one: it alone has seen the whole sample |",
    "| `all` | all of them |",
    "| `skip-first-4` | all but the first 4: the first tokens of a sample may be attention sinks, many times as long as others |",
    "| `completion` | what the assistant says in a [conversation](calibration.md#conversations), and the token that ends its turn |",
    "| `7`, `-2` | one by its index, negative from the end; every sample must have it |", "",
    "Means are over tokens, so that long samples weigh more. A sample without such a token is left out.", "",
    "`linear`, `procrustes` and `cka` are no means: they compare many tokens at once, of all samples. `draw` of the tokens that count are",
    "taken at random; which ones depends on the text alone, not on batches, devices or schedule. Their states are made unit vectors first:",
    "in layers 3 to 8 of SmolLM2-135M one token in a hundred, first tokens left out, has a state up to ten times as long as the others,",
    "and would hold 40 % of what is to be explained. `normalised: false` takes the states as they are.",
)  # fmt: skip


def metrics_page() -> str:
    """The reference of metrics."""
    lines = [
        NOTE, "", "# Metrics", "",
        "A metric says how far apart two boundary states are. Boundary state `h_i` enters layer `i`; `h_L` leaves the last layer,",
        "before the final norm. Removing layers `[s, s+n)` hands `h_s` to a layer that expects `h_{s+n}`, and repeating them does the",
        "opposite: both cost the distance between the two. All metrics come from one pass over the calibration text, in float64, with",
        "the standard error over samples.", "",
        "Choices by distance go by the first of `metrics`; the others are shown. A step may name its own.", "",
        "```yaml", "metrics: [angular, {name: cosine, token: last}, {name: euclidean, token: skip-first-1}]", "```", "",
        *TOKENS,
    ]  # fmt: skip
    for name, metric in METRICS.items():
        token = f"Tokens, unless the recipe says otherwise: `{metric.model_fields['token'].default}`."
        lines += ["", f"## `{name}`", "", inspect.cleandoc(metric.__doc__ or ""), "", token]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """The help of every command."""
    lines = [
        NOTE, "", "# Command line", "",
        "Results go to stdout, progress and notes to stderr. Exit status: 0 done, 1 the input is at fault (one line says how),",
        "2 wrong usage, 3 a bug in layercut (with a text to report), 130 interrupted.", "",
        *_help("layercut", cli),
    ]  # fmt: skip
    for name, command in cli.commands.items():
        lines += ["", f"## `layercut {name}`", "", *_help(f"layercut {name}", command)]
    return "\n".join(lines) + "\n"


def _help(name: str, command: click.Command) -> list[str]:
    context = click.Context(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH, help_option_names=["-h", "--help"])
    return ["```text", *(line.rstrip() for line in command.get_help(context).splitlines()), "```"]


def schema_document() -> str:
    """What `layercut schema` prints."""
    return json.dumps(Recipe.schema_document(), indent=2, ensure_ascii=False) + "\n"


def modules_page() -> str:
    """Every module in the order of the imports, with the first line of its docstring."""
    package = DOCS.parent / "layercut"
    paths = {_module(path.relative_to(package)): path for path in sorted(package.rglob("*.py"))}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    uses = {name: [other for other in trees if other != name and _imports(tree, other)] for name, tree in trees.items()}
    levels: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in levels:
            levels[name] = 1 + max((level(other) for other in uses[name]), default=0)
        return levels[name]

    lines = [
        NOTE,
        "",
        "# Modules",
        "",
        "A module imports from lower levels only; what is heavy it imports inside functions, which does not count here.",
        "",
    ]
    lines += ["| level | module | what it is |", "|---:|---|---|"]
    for name in sorted(trees, key=lambda name: (level(name), name)):
        first = (ast.get_docstring(trees[name]) or "").partition("\n")[0].replace("|", "\\|")
        lines.append(f"| {level(name)} | [{name}](../{paths[name].relative_to(DOCS.parent).as_posix()}) | {first} |")
    return "\n".join(lines) + "\n"


def _module(path: Path) -> str:
    """The name of a module, below the package."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module, name: str) -> bool:
    """Whether a module imports another of the package when it is imported itself."""
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return any(
        node.module == f"layercut.{name}" or (node.module == "layercut" and name in [alias.name for alias in node.names]) for node in found
    )


PAGES = {
    "recipe.md": recipe_page, "metrics.md": metrics_page, "cli.md": cli_page, "modules.md": modules_page,
    "recipe.schema.json": schema_document,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Write the pages, or with --check say which are out of date."""
    stale = []
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(f"docs/{name}")
            if "--check" not in arguments:
                path.write_text(text, encoding="utf-8")
    if "--check" in arguments and stale:
        print(f"out of date: {', '.join(stale)}; run: {COMMAND}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
