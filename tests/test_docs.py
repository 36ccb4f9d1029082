"""The pages and the recipes: what they show runs, and what is generated is current."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import types
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import yaml
from conftest import byte_tensors, chat_tokenizer, script, write_checkpoint
from test_gallery import Losing, measuring

from layercut.checkpoint import open_checkpoint
from layercut.cli import cli, main
from layercut.metrics import METRICS
from layercut.operations import OPERATIONS
from layercut.planner import build_plan
from layercut.recipe import Recipe, load_recipe, parse_recipe
from layercut.report import read_report
from layercut.yamltext import YamlText

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))  # those of published models are planned and executed in test_gallery.py
Capture = pytest.CaptureFixture[str]
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FAST = ("calibration={source: builtin, samples: 2, max_length: 24}", "evaluate=null")

# What each recipe makes of a model: its layers when they are named, else how many there are.
RESULTS: dict[str, list[int] | int] = {
    "attenuated-repeats": [*range(18), *range(12, 30)],
    "auto-slices": 24,
    "average-layers": 28,
    "blocks-protected": 24,
    "chat": 24,
    "deepest": [*range(23), 29],
    "depth-up-scale": 40,
    "drop-block-static": [*range(18), *range(24, 30)],
    "duplicate-block": [*range(18), *range(12, 30)],
    "expand": 37,
    "keep-and-prune": [layer for layer in range(24) if layer not in (4, 8, 12, 16, 20)],
    "llama-3-8b": 24,
    "own-text": 23,
    "prune-one-by-one": 24,
    "quickstart": 24,
    "reorder": [*range(12), 13, 12, 15, 14, 17, 16, 19, 18, *range(20, 30)],
    "repeat-chosen": 36,
    "up-scale-overlap": 40,
    "zero-attention": [*range(30)],
}
# Planned and executed in test_gallery.py: what they make depends on a size or on a distance, or they need another depth.
ELSEWHERE = ("budget-distance", "budget-parameters", "budget-size", "heal-fold", "search-by-loss", "two-models")


def generator() -> types.ModuleType:
    return script("generate")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, language: str | None = None) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language in (None, match[1]):
            yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])


YAML = [block for page in PAGES for block in blocks(page, "yaml")]
SHELL = [block for page in PAGES for block in blocks(page, "sh")]


def commands(block: Block) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in block.text.splitlines() if line.strip()]


# Generated pages


def test_generated_pages_are_current(capsys: Capture) -> None:
    assert generator().main(["--check"]) == 0, capsys.readouterr().err


def test_generator_writes_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    module = generator()
    monkeypatch.setattr(module, "DOCS", tmp_path)
    monkeypatch.setattr(module, "PAGES", {name: cache(page) for name, page in module.PAGES.items()})  # what is in them is not the point
    assert module.main(["--check"]) == 1
    assert (
        capsys.readouterr().err
        == "out of date: docs/recipe.md, docs/metrics.md, docs/cli.md, docs/modules.md, docs/recipe.schema.json; run: make docs\n"
    )
    assert list(tmp_path.iterdir()) == []
    assert module.main([]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cli.md", "metrics.md", "modules.md", "recipe.md", "recipe.schema.json"]
    assert module.main(["--check"]) == 0
    (tmp_path / "cli.md").write_text("older")
    assert module.main(["--check"]) == 1
    assert capsys.readouterr().err == "out of date: docs/cli.md; run: make docs\n"


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"type": "string"}, "text"),
        ({"type": "string", "pattern": "^a$"}, "text matching `^a$`"),
        ({"type": "integer", "minimum": 1}, "whole number from 1"),
        ({"type": "integer", "minimum": 1, "maximum": 9}, "whole number 1 to 9"),
        ({"type": "number", "maximum": 2}, "number up to 2"),
        ({"type": "boolean"}, "true or false"),
        ({"const": "auto"}, "`auto`"),
        ({"enum": ["auto", "end"]}, "`auto` or `end`"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text"),
        ({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}, "whole number, or a list of such"),
        ({"type": "array", "prefixItems": [{"const": "a"}, {"const": "a"}]}, "[a, b], each `a`"),
        ({"type": "array", "prefixItems": [{"const": "a"}, {"const": "b"}]}, "[`a`, `b`]"),
        ({"type": "array", "items": {"$ref": "#/$defs/Slice"}}, "list of [mapping](#slices)"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "mapping of names to text"),
    ],
)
def test_types_in_words(node: dict[str, Any], words: str) -> None:
    assert generator().kind(node, {"Slice": "slices[]"}) == words


def test_reference_names_everything() -> None:
    reference = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    for name, operation in OPERATIONS.items():
        assert f"### `steps[].{name}`\n\n{(operation.__doc__ or '').partition(chr(10))[0]}" in reference
        assert re.search(rf"^  - {name}: ", reference, re.MULTILINE), f"docs/generate.py has no example of {name}"
    keys = re.findall(r"^\| `(\w+)` \|", reference, re.MULTILINE)
    assert set(Recipe.model_fields) <= set(keys)
    metrics = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert re.findall(r"^## `(\w+)`$", metrics, re.MULTILINE) == list(METRICS)
    command_line = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^## `layercut (\w+)`$", command_line, re.MULTILINE) == list(cli.commands)


def test_schema_command_prints_the_committed_schema(capsys: Capture) -> None:
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8")


# Recipes


def test_every_recipe_is_listed() -> None:
    names = [path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in RECIPES]
    assert names == sorted([*RESULTS, *ELSEWHERE])
    gallery = re.findall(r"^\| \[([\w-]+)\]\(recipes/([\w/-]+)\.yaml\)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in gallery] == [path for _, path in gallery]
    assert sorted(path for _, path in gallery) == names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_head(path: Path) -> None:
    """A reader learns from the head alone: what it does, what it needs, the command, what to expect."""
    lines = path.read_text(encoding="utf-8").splitlines()
    schema = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", lines[0])
    assert schema is not None
    assert (path.parent / schema[1]).resolve() == ROOT / "docs" / "recipe.schema.json"
    assert lines[1] == "#" and lines[2].startswith("# ")
    head = lines[: lines.index("")]
    assert all(line.startswith("#") for line in head)
    assert [line.split(":")[0] for line in head if re.match(r"# [A-Z]\w+:  ", line)] == ["# Needs", "# Run", "# Expect"]
    assert f"# Run:     layercut run {path.relative_to(ROOT).as_posix()}" in head


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads((ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_schema_accepts_recipe(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "data",
    [
        {"model": "m", "outptu": "x"},
        {"model": "m", "steps": [{"prune": {"layer": 6}}]},
        {"model": "m", "slices": [{"layer_range": [0, "middle"]}]},
        {"model": "m", "metric": "euklid"},
        {"model": "m", "calibration": {"source": "hub"}},
    ],
)
def test_schema_and_parser_refuse_the_same(data: dict[str, Any], validator: jsonschema.Draft202012Validator) -> None:
    assert not validator.is_valid(data)
    with pytest.raises(Exception, match=r"^recipe\.yaml:"):
        parse_recipe(YamlText(json.dumps(data), "recipe.yaml"))


def leaves(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*path, str(key)))
    else:
        yield ".".join(path), data


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem in RESULTS], ids=lambda path: path.stem)
def test_recipe_runs(path: Path, tiny: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    """Every recipe, on a tiny model of the depth that it is written for."""
    model = tiny("llama", layers=32 if path.stem == "llama-3-8b" else 30, max_position_embeddings=64)
    places = [place for place, value in leaves(yaml.safe_load(path.read_text(encoding="utf-8"))) if place.split(".")[-1] == "model"]
    fast = FAST
    if path.stem == "chat":
        model = Path(shutil.copytree(model, tmp_path / "chat"))
        chat_tokenizer().save_pretrained(model)
        talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
        (tmp_path / "chats.jsonl").write_text(2 * (json.dumps({"messages": talk}) + "\n"))
        fast = (f"calibration.path={tmp_path / 'chats.jsonl'}", "calibration.max_length=64", "evaluate=null")
    sets = [f"--set={assignment}" for assignment in (*fast, *(f"{place}={model}" for place in places))]
    assert main(["run", str(path), "--quiet", "--out", str(tmp_path / "out"), *sets]) == 0, capsys.readouterr().err
    order = [layer.index for layer in read_report(tmp_path / "out").layers]
    expected = RESULTS[path.stem]
    assert (order if isinstance(expected, list) else len(order)) == expected
    depth = len(order)
    head = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert re.search(rf"\b{depth}( layers|\b)", head), f"the head of {path.name} does not say that {depth} layers come out"


# Pages


def test_blocks_are_found() -> None:
    assert {block.language for page in PAGES for block in blocks(page)} == {"yaml", "sh", "text", "python"}
    assert len(YAML) >= 8 and len(SHELL) >= 8


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_block_is_a_recipe(block: Block, validator: jsonschema.Draft202012Validator, tmp_path: Path) -> None:
    """Fragments get what they leave out, a model; and every block plans on one of 30 layers."""
    data = yaml.safe_load(block.text) or {}
    text = block.text if {"model", "slices"} & set(data) else f"{block.text}\nmodel: org/name\n"
    recipe = parse_recipe(YamlText(text, str(block)))
    validator.validate(yaml.safe_load(text))
    close = measuring(lambda a, i, b, j: abs(i - j) / 100)
    near = Losing(lambda gone: 3 + len(gone) / 100)
    zeros = {name: ("F32", (2, 8), bytes(64)) for name in byte_tensors(30)}
    model = write_checkpoint(tmp_path / "model", zeros, {"model_type": "llama", "num_hidden_layers": 30, "vocab_size": 2})
    for number, step in enumerate(data.get("steps", [])):  # the lines of an example are alternatives: each is planned by itself
        single = parse_recipe(YamlText(json.dumps({"model": "org/name", "steps": [step]}), f"{block} step {number}"))
        assert build_plan(single, resolve=lambda _: open_checkpoint(model), measure=close, run=near).actions.layers
    if "steps" not in data:
        assert build_plan(recipe, resolve=lambda _: open_checkpoint(model), measure=close, run=near).actions.layers


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_block_is_understood(block: Block) -> None:
    """Every line is a make target that exists, or a layercut command whose arguments parse."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for program, name, *arguments in commands(block):
        if program == "make":
            assert [name, *arguments] == [name] and name in targets
            continue
        assert program in ("layercut", ".demo/bin/layercut")
        command = cli.commands[name]
        command.make_context(f"layercut {name}", arguments, **cli.context_settings)


RUN_BY_PAGE = {
    "README.md": ["plan", "run", "verify"],
    "docs/analyze.md": ["analyze", "analyze", "python"],
    "docs/python.md": ["python"],
    "docs/short-transformers.md": ["python"],
    "docs/quickstart.md": ["inspect", "run", "plan", "run", "run", "verify", "eval", "eval", "python"],
}

SHORT = {"eval": ["--max-length=24"], "analyze": ["--max-length=24", "--samples=16"]}
"""What is added to the commands of a page, so that the tests are quick."""


@pytest.mark.parametrize("page", RUN_BY_PAGE)
def test_page_runs(page: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """The blocks of a page in order, in one folder: recipes become files, commands run, with a tiny model in place of the one named."""
    model = tiny("llama", layers=30, max_position_embeddings=64)
    monkeypatch.chdir(tmp_path)
    ran = []
    for block in blocks(ROOT / page):
        text = block.text.replace(HUB_MODEL, str(model))
        if block.language == "yaml" and (named := re.match(r"# ([\w-]+\.yaml)\n", text)):
            recipe = yaml.safe_load(text) | {"calibration": {"source": "builtin", "samples": 2, "max_length": 24}}
            if "evaluate" in recipe:
                recipe["evaluate"]["perplexity"] = {"source": "builtin", "samples": 2, "max_length": 24}
            Path(named[1]).write_text(yaml.safe_dump(recipe))
        elif block.language == "python":
            exec(compile(text, str(block), "exec"), {})
            ran.append("python")
        elif block.language == "sh":
            for program, *arguments in commands(block._replace(text=text)):
                if program == "layercut":
                    assert main([*arguments, *SHORT.get(arguments[0], [])]) == 0, f"{block}: {arguments}: {capsys.readouterr().err}"
                    ran.append(arguments[0])
    assert ran == RUN_BY_PAGE[page]


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    anchor = generator().anchor
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        name, _, fragment = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in [anchor(heading) for heading in headings], link


def test_every_page_is_in_the_index() -> None:
    pages = {path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".json")} - {"index.md"}
    assert pages <= set(links(ROOT / "docs" / "index.md"))


# The real model


def test_readme_shows_what_the_quickstart_prints(smollm2: Path, tmp_path: Path, capsys: Capture) -> None:
    """Word for word, but for places, and for perplexities, which may differ in the last digits from machine to machine."""
    recipe = ROOT / "recipes" / "quickstart.yaml"
    assert load_recipe(recipe).model == ".demo/smollm2-135m.gguf"
    assert main(["run", str(recipe), "--quiet", f"--set=model={smollm2}", f"--out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out.replace(str(smollm2), ".demo/smollm2-135m.gguf").replace(str(tmp_path / "out"), ".demo/smollm2-24L")
    shown = next(block.text for block in blocks(ROOT / "README.md", "text") if "perplexity" in block.text)
    number = re.compile(r"\d+\.\d+")
    assert number.sub("#", printed) == number.sub("#", shown)
    for now, before in zip(number.findall(printed), number.findall(shown), strict=True):
        assert float(now) == pytest.approx(float(before), rel=0.02, abs=0.0005)
