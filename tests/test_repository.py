"""The repository as a whole: order of modules, what an import costs, public names, versions, sizes, and the ways in."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import layercut

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "layercut"


def module_name(path: Path) -> str:
    """The name of a module below the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def file_of(name: str) -> Path:
    """The file of a module."""
    path = PACKAGE / Path(*name.split(".")).with_suffix(".py")
    return path if path.exists() else PACKAGE / name / "__init__.py"


MODULES = sorted(module_name(path) for path in PACKAGE.rglob("*.py"))
HEAVY = ("accelerate", "datasets", "numpy", "pandas", "pyarrow", "torch", "transformers")

# The order of the modules: each imports only from lines above its own.
LEVELS: tuple[tuple[str, ...], ...] = (
    (
        "axes", "caches", "canvas", "chattemplates", "errors", "hands", "jsontext", "record", "sharing", "sizes",
        "standins", "towers", "version", "ways",
    ),
    ("declarations", "exceptions", "ggufmetadata", "hubfaults", "implied", "smallfile"),
    ("calibration", "conversations", "conversions", "copying", "header", "mixing", "stack", "tokens", "yamltext"),
    ("companions", "fits", "metric", "rows"),
    ("documents", "mirror", "samplewise", "tokenwise"),
    ("hubreader", "metrics", "sampling"),
    ("checkpoint", "dialect", "faults", "plan", "routes", "scalings", "selectors", "stated", "strategies", "trials"),
    ("accounts", "anatomy", "chats", "healing", "searches"),
    (
        "architecture", "blockscores", "gguf", "measurements", "memory", "mergekit", "naming", "operations", "pickled", "rules",
        "seams", "settling", "shards", "spill", "upload",
    ),
    ("boundaries", "ends", "gallery", "heatmap", "hubmodel", "hubwriter", "page", "quantization", "recipe", "weights"),
    ("lineplot", "moves", "patterns", "source", "views"),
    ("amends", "homes", "strangers", "tables"),
    ("surgery",),
    ("compatibility", "fetching", "inmemory", "layout", "start"),
    ("choices",),
    ("planner",),
    ("loading",),
    ("draw", "encoding", "folding", "runner", "staged", "sums", "targets"),
    ("reading", "skeleton"),
    ("accumulators", "arguments", "players"),
    ("resident",),
    ("crossings",),
    ("relay", "streaming"),
    ("ranks", "schedules"),
    ("engine", "fitting", "perplexity"),
    ("losses",),
    ("gathering",),
    ("arithmetic", "report", "staging"),
    ("analysis",),
    ("disclosure", "display", "journal"),
    ("cardmetadata", "origins", "vetting", "writer"),
    ("card", "contents", "executor"),
    ("short_transformers.dist", "short_transformers.utils", "verify"),
    ("push", "short_transformers.measuring"),
    ("short_transformers.short_transformer",),
    ("api", "short_transformers"),
    ("cli",),
    ("__init__", "__main__"),
)  # fmt: skip
# Modules that import torch when they are imported; the others reach for them inside functions.
MEASURING = (
    "accumulators", "arguments", "crossings", "draw", "encoding", "engine", "fitting", "folding", "loading", "losses", "perplexity",
    "players", "reading", "relay", "resident", "runner", "schedules", "skeleton", "spill", "staged", "standins", "streaming", "sums",
    "targets", "weights",
)  # fmt: skip
# Tests of the whole, which have no module of their own.
OF_THE_WHOLE = (
    "bad_files",
    "bad_input",
    "backbones",
    "benchmarks",
    "cases",
    "docs",
    "end_to_end",
    "every_architecture",
    "every_measurement",
    "families",
    "frankenmerge",
    "fuzz",
    "hostile",
    "hub",
    "kill",
    "looks",
    "mtp",
    "repository",
    "spellings",
)

PUBLIC = [
    "Analysis", "CalibrationError", "CheckpointError", "LayercutError", "OutputError", "Plan", "Recipe", "RecipeError", "RefusedError",
    "Report", "UploadError", "__version__", "analyze", "load_recipe", "plan_recipe", "push_model", "read_report", "run_recipe",
]  # fmt: skip


class Import(NamedTuple):
    """One import statement of a module."""

    line: int
    target: str
    inside: bool
    """Whether it stands in a function, or is for type checkers only."""


def imports(name: str) -> Iterator[Import]:
    """Everything that a module imports: `layercut.x` as `layercut.x`, other packages by their first name."""

    def walk(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(child.lineno, alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}:{child.lineno}: a relative import"
                whole = child.module == "layercut"
                names = [alias.name for alias in child.names if (PACKAGE / f"{alias.name}.py").exists()] if whole else []
                targets = [f"layercut.{inner}" for inner in names] or [child.module or ""]
                yield from (Import(child.lineno, target, inside) for target in targets)
            else:
                typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, inside or typing or isinstance(child, ast.FunctionDef | ast.Lambda))

    yield from walk(ast.parse(file_of(name).read_text(encoding="utf-8")), False)


def level(name: str) -> int:
    return next(number for number, names in enumerate(LEVELS) if name in names)


def test_every_module_has_its_place() -> None:
    placed = [name for names in LEVELS for name in names]
    assert sorted(placed) == MODULES
    assert all(list(names) == sorted(names) for names in LEVELS)
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert folders == {".", "short_transformers"}, "the package is flat, but for the names of another one"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    for found in imports(name):
        if found.target.split(".")[0] == "layercut":
            inner = found.target.partition(".")[2] or "__init__"
            assert level(inner) < level(name), f"layercut/{name}.py:{found.line}: {name} stands before {inner}"


@pytest.mark.parametrize("name", MODULES)
def test_heavy_packages_are_imported_where_something_is_measured(name: str) -> None:
    for found in imports(name):
        if name in MEASURING or found.inside:
            continue
        package, _, inner = found.target.partition(".")
        assert package not in (*HEAVY, "gguf", "huggingface_hub"), f"layercut/{name}.py:{found.line}: import {package} inside the function"
        assert inner not in MEASURING, f"layercut/{name}.py:{found.line}: import {inner} inside the function"


def fresh(code: str, *arguments: str, folder: Path | None = None) -> Any:
    """What a fresh process prints last, as JSON."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOADED = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def test_static_recipe_runs_without_torch(byte_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """From the command line to the finished folder."""
    model = byte_checkpoint(layers=6, shards=2)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\nsteps:\n- prune: {{at: '2-3'}}\n- duplicate: {{at: 0}}\n", encoding="utf-8")
    for arguments in (["run", str(recipe), "--out", "out"], ["plan", str(recipe)], ["inspect", "out"], ["verify", "out", "--no-load"]):
        code = f"import sys; from layercut.cli import main; assert main(sys.argv[1:]) == 0; {LOADED}"
        loaded = fresh(code, *arguments, folder=tmp_path)
        assert "layercut" in loaded
        assert set(loaded) & {*HEAVY, "gguf", "huggingface_hub", "safetensors"} == set(), arguments[0]
    assert [layer.index for layer in layercut.read_report(tmp_path / "out").layers] == [0, 0, 1, 4, 5]


def test_import_does_no_work() -> None:
    """No file written, no process started, nothing asked of the network, no environment changed, and little time."""
    code = f"""
import os, sys, time
events, before = [], dict(os.environ)
def hook(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event.startswith(("socket", "subprocess", "os.mkdir", "os.rename", "os.remove", "shutil")):
        events.append(event)
sys.addaudithook(hook)
sys.dont_write_bytecode = True
start = time.process_time()
import layercut, layercut.cli
assert time.process_time() - start < 5, "the import takes too long"
assert events == [], events
assert dict(os.environ) == before
{LOADED}
"""
    assert set(fresh(code)) & {*HEAVY, "gguf", "huggingface_hub", "safetensors"} == set()


def test_public_names() -> None:
    assert sorted(layercut.__all__) == PUBLIC
    assert all(getattr(layercut, name) is not None for name in PUBLIC)
    assert (PACKAGE / "py.typed").exists()


# Versions and requirements


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_versions_agree() -> None:
    path = project()["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{layercut.__version__}"' in (ROOT / path).read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](?: - \d{4}-\d\d-\d\d)?$", changelog, re.MULTILINE)
    assert sections[0] == "Unreleased"
    released = sections[1:]
    assert released == sorted(released, key=lambda version: [int(part) for part in version.split(".")], reverse=True)
    unreleased = changelog.partition("## [Unreleased]")[2].partition("\n## ")[0]
    assert layercut.__version__ in released or f"Work towards {layercut.__version__}" in unreleased


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def requirements() -> list[Requirement]:
    table = project()["project"]
    return [Requirement(line) for part in (table["dependencies"], *table["optional-dependencies"].values()) for line in part]


def test_constraints_are_plain_pins() -> None:
    for pin in pins():
        assert pin.url is None and [spec.operator for spec in pin.specifier] == ["=="], pin
        assert "+" not in str(pin.specifier), f"{pin}: a version that only one index has"
    names = [canonicalize_name(pin.name) for pin in pins()]
    assert names == sorted(names)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_constraints_pin_every_requirement(python: str, platform: str) -> None:
    here = {"python_version": python, "python_full_version": f"{python}.7", "sys_platform": platform, "platform_machine": "x86_64"}
    for needed in requirements():
        name = canonicalize_name(needed.name)
        found = [pin for pin in pins() if canonicalize_name(pin.name) == name and (pin.marker is None or pin.marker.evaluate(here))]
        assert len(found) == 1, f"{needed} on Python {python}: {found}"
        version = str(found[0].specifier).removeprefix("==")
        assert needed.specifier.contains(version), f"{needed} and {found[0]}"


# Sizes


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_functions_stay_small(name: str) -> None:
    text = file_of(name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    tree = ast.parse(text)
    assert name == "__main__" or ast.get_docstring(tree), "a file says what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 45, f"{name}.{node.name} has more than 45 lines"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_test_file_has_a_subject() -> None:
    subjects = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    assert subjects - set(OF_THE_WHOLE) <= set(MODULES)
    assert set(OF_THE_WHOLE) <= subjects


# The ways in


def makefile(*arguments: str) -> str:
    make = shutil.which("make")
    assert make is not None
    done = subprocess.run([make, "--dry-run", "--always-make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_test_checks_and_tests() -> None:
    plan = makefile("test")
    order = ["-m venv .venv", "'.[dev]'", "ruff check", "ruff format --check", "mypy", "docs/generate.py --check", "-m pytest"]
    places = [plan.index(part) for part in order]
    assert places == sorted(places)
    assert "--constraint constraints.txt" in plan


def test_make_demo_runs_the_quickstart_offline() -> None:
    plan = makefile("demo")
    order = ["-m venv .demo", "'.[demo]'", ".demo/smollm2-135m.gguf", "HF_HUB_OFFLINE=1", ".demo/bin/layercut run recipes/quickstart.yaml"]
    places = [plan.index(part) for part in order]
    assert places == sorted(places)
    recipe = layercut.load_recipe(ROOT / "recipes" / "quickstart.yaml")
    assert recipe.model == ".demo/smollm2-135m.gguf"
    assert recipe.output is not None and recipe.output.path.startswith(".demo/")


def test_make_fuzz_goes_on_for_a_minute() -> None:
    plan = makefile("fuzz")
    order = ["-m venv .venv", "'.[dev]'", ".venv/bin/python tests/fuzz.py 60"]
    places = [plan.index(part) for part in order]
    assert places == sorted(places)


def test_make_names_the_python_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text(f"#!/bin/sh\nshift\nexec '{sys.executable}' -c \"import sys; sys.version_info = (3, 8); $1\"\n", encoding="utf-8")
    old.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    done = subprocess.run(["make", f"PYTHON={old}", "lint"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"layercut needs Python 3.10 or newer, and {old} is 3.8; name another: make PYTHON=python3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_runs_the_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail" and lines[-1] == "make test"
    assert "Tests: `make test`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_licence_is_the_one_that_is_declared() -> None:
    assert project()["project"]["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").split()[:4] == ["Apache", "License", "Version", "2.0,"]


def test_ignored_files_stay_out() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {"/.venv/", "/.demo/", "__pycache__/"} <= set(ignored)
