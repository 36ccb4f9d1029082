"""The starter recipes: found in a checkout and in an installed package, planned at the depth of the models that they name, and executed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import yaml
from conftest import write_checkpoint

from layercut.architecture import Member
from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.cli import main
from layercut.errors import LayercutError, RefusedError
from layercut.executor import execute
from layercut.gallery import Starter, gallery_folder, starter, starters
from layercut.header import encode_header
from layercut.metrics import Metric
from layercut.plan import Measurement, Plan, Table, TensorMade
from layercut.planner import build_plan
from layercut.recipe import Recipe, load_recipe, parse_recipe
from layercut.report import read_report
from layercut.stack import Fold
from layercut.trials import Loss, Misses
from layercut.yamltext import YamlText

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
Capture = pytest.CaptureFixture[str]
Distance = Callable[[str, int, str, int], float]
SMOLLM2, DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct", ".demo/smollm2-135m.gguf"
XWIN, EURYALE = "Xwin-LM/Xwin-LM-70B-V0.1", "Sao10K/Euryale-1.3-L2-70B"
MIQU, LZLV = "152334H/miqu-1-70b-sf", "lizpreciatior/lzlv_70b_fp16_hf"
LLAMA_70B, LLAMA_120B, LLAMA_405B = (
    "meta-llama/Meta-Llama-3-70B-Instruct",
    "mlabonne/Meta-Llama-3-120B-Instruct",
    "meta-llama/Meta-Llama-3.1-405B-Instruct",
)
OPENPIPE, HERMES = "OpenPipe/mistral-ft-optimized-1218", "mlabonne/NeuralHermes-2.5-Mistral-7B"


class Model(NamedTuple):
    """What is true of a model that a recipe names, as far as a plan depends on it. Shapes are small but for SmolLM2."""

    depth: int
    dtype: str = "BF16"
    kind: str = "llama"
    tied: bool = False
    hidden: int = 8
    inner: int = 12
    keys: int = 4
    vocabulary: int = 16
    more: Mapping[str, Any] = {}


ROPE_1M = {"rope_theta": 1000000.0, "max_position_embeddings": 32764}
SMALL = Model(30, tied=True, hidden=576, inner=1536, keys=192, vocabulary=49152, more={"rope_theta": 100000})
MISTRAL = Model(32, kind="mistral", more={"rope_theta": 10000.0, "sliding_window": 4096})
QWEN = {"rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 32768}
MODELS: Mapping[str, Model] = {
    SMOLLM2: SMALL,
    DEMO: SMALL,
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.2": Model(32, kind="mistral", more={"rope_theta": 1000000.0, "sliding_window": None}),
    OPENPIPE: MISTRAL,
    HERMES: MISTRAL,
    "01-ai/Yi-6B": Model(32, more={"rope_theta": 5000000.0}),
    XWIN: Model(80, "F16"),
    EURYALE: Model(80, "F16"),
    MIQU: Model(80, "F16", more=ROPE_1M),
    LZLV: Model(80, "F16"),
    LLAMA_70B: Model(80),
    LLAMA_120B: Model(140, "F16"),
    LLAMA_405B: Model(126),
    "meta-llama/Meta-Llama-3-8B": Model(32),
    "meta-llama/Meta-Llama-3-8B-Instruct": Model(32),
    "meta-llama/Llama-2-7b-hf": Model(32, "F16"),
    "meta-llama/Llama-2-13b-hf": Model(40, "F16"),
    "Qwen/Qwen2.5-0.5B": Model(24, kind="qwen2", tied=True, more={**QWEN, "max_window_layers": 24}),
    "Qwen/Qwen2.5-0.5B-Instruct": Model(24, kind="qwen2", tied=True, more={**QWEN, "max_window_layers": 21}),
}

Order = list[tuple[str, int, int]]


def windows(model: str, length: int, stride: int, count: int) -> Order:
    return [(model, at * stride, at * stride + length) for at in range(count)]


def cut(model: str, *ranges: tuple[int, int]) -> Order:
    return [(model, start, stop) for start, stop in ranges]


def expand(model: str, depth: int) -> Order:
    """Every fourth layer once more."""
    blocks = cut(model, *(pair for at in range(4, depth + 1, 4) for pair in ((at - 4, at), (at - 1, at))))
    return blocks + cut(model, (depth - depth % 4, depth)) * (depth % 4 > 0)


# Published stacks, from cards, configs and papers: slices [a, b), and how many layers come out.
PUBLISHED: Mapping[str, tuple[int, Order]] = {
    "solar": (48, cut("mistralai/Mistral-7B-v0.1", (0, 24), (8, 32))),
    "yi-9b": (48, cut("01-ai/Yi-6B", (0, 28), (12, 32))),
    "goliath-120b": (
        137,
        [
            (XWIN, 0, 16), (EURYALE, 8, 24), (XWIN, 17, 32), (EURYALE, 25, 40), (XWIN, 33, 48), (EURYALE, 41, 56), (XWIN, 49, 64),
            (EURYALE, 57, 72), (XWIN, 65, 80),
        ],
    ),
    "llama-3-120b": (140, windows(LLAMA_70B, 20, 10, 7)),
    "llama-3-225b": (260, windows(LLAMA_120B, 20, 10, 13)),
    "bigllama-681b": (210, windows(LLAMA_405B, 42, 21, 5)),
    "venus-103b": (120, windows(LZLV, 40, 20, 3)),
    "miquliz-120b": (
        140,
        [(MIQU, 0, 20), (LZLV, 10, 30), (MIQU, 20, 40), (LZLV, 30, 50), (MIQU, 40, 60), (LZLV, 50, 70), (MIQU, 60, 80)],
    ),
    "neuralpipe-9b": (40, [(OPENPIPE, 0, 32), (HERMES, 24, 32)]),
    "llama-3-12b": (48, cut("meta-llama/Meta-Llama-3-8B-Instruct", (0, 9), (5, 14), (10, 19), (15, 24), (20, 32))),
    "llama-3-6b": (24, cut("meta-llama/Meta-Llama-3-8B-Instruct", (0, 21), (29, 32))),
    "pruneme": (24, cut("mistralai/Mistral-7B-Instruct-v0.2", (0, 21), (29, 32))),
    "shortgpt-7b": (23, cut("meta-llama/Llama-2-7b-hf", (0, 21), (30, 32))),
    "shortgpt-13b": (30, cut("meta-llama/Llama-2-13b-hf", (0, 26), (36, 40))),
    "llama-pro": (40, expand("meta-llama/Llama-2-7b-hf", 32)),
}  # fmt: skip
STATIC: Mapping[str, tuple[int, Order]] = {
    **PUBLISHED,
    "attenuated-repeats": (36, cut(SMOLLM2, (0, 18), (12, 30))),
    "average-layers": (28, cut(SMOLLM2, (0, 13), (14, 17), (18, 30))),
    "drop-block-static": (24, cut(SMOLLM2, (0, 18), (24, 30))),
    "duplicate-block": (36, cut(SMOLLM2, (0, 18), (12, 30))),
    "expand": (37, expand(SMOLLM2, 30)),
    "keep-and-prune": (19, cut(SMOLLM2, (0, 4), (5, 8), (9, 12), (13, 16), (17, 20), (21, 24))),
    "reorder": (30, cut(SMOLLM2, (0, 12), *((n ^ 1, (n ^ 1) + 1) for n in range(12, 20)), (20, 30))),
    "zero-attention": (30, cut(SMOLLM2, (0, 30))),
}
# Recipes with something to choose: the layers that come out, and boundaries that are near each other in the measurement.
CHOSEN: Mapping[str, tuple[int, Mapping[tuple[int, int], float], Order]] = {
    "auto-slices": (24, {(9, 15): 0.01}, cut(SMOLLM2, (0, 9), (15, 30))),
    "blocks-protected": (
        24,
        {(8, 11): 0.01, (20, 23): 0.02, (0, 6): 0.001, (27, 30): 0.001},
        cut(SMOLLM2, (0, 8), (11, 20), (23, 30)),
    ),
    "budget-distance": (28, {(8, 9): 0.06, (20, 21): 0.08, (12, 13): 0.1}, cut(SMOLLM2, (0, 8), (9, 20), (21, 30))),
    "budget-parameters": (23, {(11, 18): 0.01}, cut(SMOLLM2, (0, 11), (18, 30))),
    "budget-size": (20, {(0, 10): 0.001, (12, 22): 0.01}, cut(SMOLLM2, (0, 12), (22, 30))),
    "chat": (24, {(12, 18): 0.01}, cut(SMOLLM2, (0, 12), (18, 30))),
    "deepest": (24, {(3, 9): 0.01}, cut(SMOLLM2, (0, 23), (29, 30))),
    "depth-up-scale": (40, {(9, 19): 0.01}, cut(SMOLLM2, (0, 19), (9, 30))),
    "llama-3-8b": (24, {(20, 28): 0.01}, cut("meta-llama/Meta-Llama-3-8B", (0, 20), (28, 32))),
    "own-text": (23, {(10, 17): 0.01}, cut(SMOLLM2, (0, 10), (17, 30))),
    "prune-one-by-one": (24, {(3, 5): 0.01, (10, 12): 0.02, (20, 22): 0.03}, cut(SMOLLM2, (0, 3), (5, 10), (12, 20), (22, 30))),
    "quickstart": (24, {(13, 19): 0.01}, cut(DEMO, (0, 13), (19, 30))),
    "repeat-chosen": (36, {(14, 20): 0.01, (0, 6): 0.001}, cut(SMOLLM2, (0, 20), (14, 30))),
    "up-scale-overlap": (40, {(12, 22): 0.01, (15, 25): 0.02}, cut(SMOLLM2, (0, 22), (12, 30))),
}
# Recipes that run stacks: the layers that come out, layers without which nothing is lost, and those that stay.
SEARCHED: Mapping[str, tuple[int, frozenset[int], Order]] = {
    "search-by-loss": (24, frozenset({0, 3, 8, 9, 14, 20, 25}), cut(SMOLLM2, (0, 3), (4, 8), (10, 14), (15, 20), (21, 25), (26, 30))),
}
GALLERY = {one.name: one for one in starters()}


def expanded(order: Order) -> list[tuple[str, int]]:
    return [(model, layer) for model, start, stop in order for layer in range(start, stop)]


def config_of(model: Model) -> dict[str, Any]:
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[model.kind]
    dtype = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[model.dtype]
    sizes = {"hidden_size": model.hidden, "num_hidden_layers": model.depth, "num_attention_heads": 2, "vocab_size": model.vocabulary}
    common = {"model_type": model.kind, "architectures": [f"{name}ForCausalLM"], "torch_dtype": dtype, "rms_norm_eps": 1e-5}
    return {**common, **sizes, "tie_word_embeddings": model.tied, **model.more}


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    h, i, k, v = model.hidden, model.inner, model.keys, model.vocabulary
    layer = {
        "input_layernorm.weight": (h,), "self_attn.q_proj.weight": (h, h), "self_attn.k_proj.weight": (k, h),
        "self_attn.v_proj.weight": (k, h), "self_attn.o_proj.weight": (h, h), "post_attention_layernorm.weight": (h,),
        "mlp.gate_proj.weight": (i, h), "mlp.up_proj.weight": (i, h), "mlp.down_proj.weight": (h, i),
    }  # fmt: skip
    layers = {f"model.layers.{n}.{rest}": shape for n in range(model.depth) for rest, shape in layer.items()}
    head = {} if model.tied else {"lm_head.weight": (v, h)}
    return {"model.embed_tokens.weight": (v, h), **layers, "model.norm.weight": (h,), **head}


def width(dtype: str) -> int:
    return {"BF16": 2, "F16": 2, "F32": 4}[dtype]


def hollow(folder: Path, model: Model) -> Checkpoint:
    """A checkpoint that is a header and a hole: planning reads no weights."""
    shapes = shapes_of(model)
    head = encode_header([(name, model.dtype, shape) for name, shape in shapes.items()], {"format": "pt"})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(model), indent=2) + "\n")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(prod(shape) for shape in shapes.values()) * width(model.dtype))
    return open_checkpoint(folder)


def marked(name: str, tensor: str, size: int) -> bytes:
    """Bytes that say where they come from."""
    seed = hashlib.sha256(f"{name}|{tensor}".encode()).digest()
    return (seed * (size // len(seed) + 1))[:size]


def filled(folder: Path, name: str, model: Model) -> Checkpoint:
    """A tiny checkpoint of the same depth whose bytes say where they come from."""
    small = model._replace(hidden=4, inner=6, keys=2, vocabulary=4)
    tensors = {
        tensor: (model.dtype, shape, marked(name, tensor, prod(shape) * width(model.dtype))) for tensor, shape in shapes_of(small).items()
    }
    return open_checkpoint(write_checkpoint(folder, tensors, config_of(small), shards=3))


Resolve = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Resolve:
    """Every model that the gallery names, as a hollow checkpoint, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("hub")
    made: dict[str, Checkpoint] = {}

    def resolve(reference: str) -> Checkpoint:
        if reference not in made:
            made[reference] = hollow(folder / reference.replace("/", "--"), MODELS[reference])
        return made[reference]

    return resolve


@pytest.fixture
def filled_hub(tmp_path: Path) -> Resolve:
    made: dict[str, Checkpoint] = {}

    def resolve(reference: str) -> Checkpoint:
        if reference not in made:
            made[reference] = filled(tmp_path / "hub" / reference.replace("/", "--"), reference, MODELS[reference])
        return made[reference]

    return resolve


def never(*_: Any) -> Measurement:
    raise AssertionError("this recipe measures nothing")


def measuring(distance: Distance) -> Callable[..., Measurement]:
    """A measuring function that answers from a formula, for all pairs of models and all metrics."""

    def measure(members: Mapping[str, Member], metrics: Sequence[Metric], calibration: object) -> Measurement:
        tables = []
        for metric, a, b in product(metrics, members, members):
            rows, columns = (members[name].stack.depth + 1 for name in (a, b))
            mean = tuple(tuple(distance(a, i, b, j) for j in range(columns)) for i in range(rows))
            tables.append(Table(metric=metric.label, a=a, b=b, mean=mean, stderr=tuple((0.0,) * columns for _ in range(rows))))
        return Measurement(tables=tuple(tables), samples=1, tokens=1, details={})

    return measure


class Losing:
    """Losses by which layers are missing, on any text (`trials.Losses`)."""

    def __init__(self, loss_of: Callable[[frozenset[int]], float]) -> None:
        self._loss_of = loss_of

    def __call__(self, members: Mapping[str, Member], calibration: Any) -> Losing:
        self._depth = next(iter(members.values())).stack.depth
        return self

    def losses(self, stacks: Sequence[Any], part: str = "calibration", share: float = 1.0) -> list[Loss]:
        missing = [frozenset(range(self._depth)) - {layer.index for layer in stack} for stack in stacks]
        return [Loss((10 * self._loss_of(gone),) * 2, (10, 10)) for gone in missing]

    def check_foldable(self, stack: Any) -> None:
        pass

    def fit(self, given: Any, wanted: Any, ridge: float) -> Fold:
        """A map that changes nothing, so that it is not taken."""
        return Fold(sha256="0" * 64, size=2, module="mlp.down_proj", tokens=20, ridge=ridge, explained=0)

    def misses(self, given: Any, wanted: Any, fold: Fold) -> Misses:
        return Misses(Loss((5.0, 6.0), (10, 10)), Loss((5.0, 6.0), (10, 10)))

    def about(self) -> dict[str, Any]:
        return {}

    def release(self) -> None:
        pass


def near(pairs: Mapping[tuple[int, int], float]) -> Callable[..., Measurement]:
    """All boundaries are far from each other, but for some pairs."""
    return measuring(lambda a, i, b, j: 0.0 if i == j else pairs.get((min(i, j), max(i, j)), 0.4 + abs(i - j) / 1000))


def path_of(name: str) -> Path:
    return RECIPES / GALLERY[name].group / f"{name}.yaml"


# The gallery


def test_every_recipe_has_a_result() -> None:
    assert sorted(GALLERY) == sorted([*STATIC, *CHOSEN, *SEARCHED, "heal-fold", "two-models"])
    assert sorted(path.stem for path in RECIPES.rglob("*.yaml")) == sorted(GALLERY), "names are unique, folders or not"
    assert {name for name, one in GALLERY.items() if one.group == "published"} == set(PUBLISHED)
    assert {one.group for one in GALLERY.values()} == {"", "published"}


def test_starters_at_the_top_come_first_each_group_by_name() -> None:
    listed = [(one.group, one.name) for one in starters()]
    assert listed == sorted(listed)
    assert listed[0] == ("", "attenuated-repeats")
    assert listed[-1] == ("published", "yi-9b")


@pytest.mark.parametrize("name", sorted(GALLERY))
def test_a_starter_is_its_file_without_what_only_the_repository_has(name: str) -> None:
    text, file = GALLERY[name].text, path_of(name).read_text(encoding="utf-8")
    assert yaml.safe_load(text) == yaml.safe_load(file)
    assert f"# Run:     layercut run {name}.yaml\n" in text
    assert "$schema" not in text
    kept = [line for line in file.splitlines() if not line.startswith(("# yaml-language-server:", "# Run:"))]
    assert [line for line in text.splitlines() if not line.startswith("# Run:")] == kept[kept[0] == "#" :]
    assert 20 < len(GALLERY[name].summary) <= 100 or name == "depth-up-scale"


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("# One two. Three.\n#\n# Needs: x\n", "One two."),
        ("# One\n# two.\n\nmodel: x\n", "One two."),
        ("# By A et al. (arXiv 1) and B. Then more.\n", "By A et al. (arXiv 1) and B."),
        (f"# Head: {'tail ' * 30}.\n", "Head."),
        (f"# {'word ' * 30}\n", "word " * 18 + "..."),
        ("model: x\n", ""),
    ],
)
def test_summary(text: str, summary: str) -> None:
    assert Starter("x", "", text).summary == summary


@pytest.mark.parametrize("name", sorted(GALLERY))
def test_head(name: str) -> None:
    """What it does, what it needs, the command, and how many layers to expect; the schema's path where the schema describes the file."""
    path = path_of(name)
    lines = path.read_text(encoding="utf-8").splitlines()
    described = jsonschema.Draft202012Validator(Recipe.schema_document()).is_valid(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert described == (name not in ("miquliz-120b", "llama-3-6b")), "two files are in mergekit's dialect, and no schema describes that"
    if described:
        up = "../" * (1 + bool(GALLERY[name].group))
        assert lines[:2] == [f"# yaml-language-server: $schema={up}docs/recipe.schema.json", "#"]
    head = lines[: lines.index("")]
    assert all(line.startswith("#") for line in head)
    assert [line.split(":")[0] for line in head if re.match(r"# [A-Z]\w+:  ", line)] == ["# Needs", "# Run", "# Expect"]
    assert f"# Run:     layercut run {path.relative_to(ROOT).as_posix()}" in head
    depth = 24 if name == "heal-fold" else (STATIC.get(name) or CHOSEN.get(name) or SEARCHED.get(name) or (30,))[0]
    if name != "budget-distance":
        assert re.search(rf"\b{depth}\b", " ".join(head).partition("Expect:")[2])


@pytest.mark.parametrize("name", ["solar", "solar.yaml"])
def test_new_prints_a_recipe(name: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["new", name]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (tmp_path / "my.yaml").write_text(out, encoding="utf-8")
    mine, ours = load_recipe(tmp_path / "my.yaml"), load_recipe(RECIPES / "published" / "solar.yaml")
    assert mine.described() == ours.described()


def test_new_lists_the_gallery(capsys: Capture) -> None:
    assert main(["new"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [one.name for one in starters()]
    assert re.search(r"^solar +SOLAR-10\.7B \(arXiv 2312\.15166\): depth up-scaling of a 32-layer model\.$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 120
    assert err == "to begin with one: layercut new NAME > NAME.yaml\n"


def test_new_as_json(capsys: Capture) -> None:
    assert main(["new", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed[-1] == {"name": "yi-9b", "group": "published", "summary": GALLERY["yi-9b"].summary}
    assert main(["new", "yi-9b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "yi-9b", "group": "published", "text": GALLERY["yi-9b"].text}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("solr", "did you mean 'solar'?"),
        ("goliath", "did you mean 'goliath-120b'?"),
        ("xyzzy", "`layercut new` lists them"),
        ("../setup", "`layercut new` lists them"),
        ("", "`layercut new` lists them"),
    ],
)
def test_new_knows_no_other_names(name: str, hint: str, capsys: Capture) -> None:
    assert main(["new", name]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: no starter recipe is named '{name}'; {hint}\n")


# Where it lies


def test_a_wheel_and_a_checkout_have_the_recipes_at_one_place_each() -> None:
    """The wheel takes the folder of the repository into the package; nothing in the repository is there twice."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "recipes" in wheel["only-include"] and "layercut" in wheel["only-include"]
    assert wheel["sources"] == {"recipes": "layercut/recipes"}
    assert not (ROOT / "layercut" / "recipes").exists()
    assert gallery_folder(ROOT / "layercut") == RECIPES


def package(folder: Path, recipes: Path, project: bool = False) -> Path:
    (folder / "layercut").mkdir(parents=True)
    (recipes / "published").mkdir(parents=True)
    (recipes / "one.yaml").write_text("# yaml-language-server: $schema=x\n#\n# One.\n# Run: layercut run recipes/one.yaml\n\nmodel: m\n")
    (recipes / "published" / "two.yaml").write_text("# Two.\n# layercut run recipes/published/two.yaml\nmodel: m\n")
    (recipes / "notes.txt").write_text("no recipe")
    if project:
        (folder / "pyproject.toml").touch()
    return folder / "layercut"


FOUND = (
    Starter("one", "", "# One.\n# Run: layercut run one.yaml\n\nmodel: m\n"),
    Starter("two", "published", "# Two.\n# layercut run two.yaml\nmodel: m\n"),
)


def test_an_installed_package_holds_its_recipes(tmp_path: Path) -> None:
    installed = package(tmp_path, tmp_path / "layercut" / "recipes")
    assert starters(gallery_folder(installed)) == FOUND
    assert starter("two", gallery_folder(installed)) == FOUND[1]


def test_a_checkout_has_them_beside_the_package(tmp_path: Path) -> None:
    assert starters(gallery_folder(package(tmp_path, tmp_path / "recipes", project=True))) == FOUND


def test_another_package_named_recipes_is_not_the_gallery(tmp_path: Path) -> None:
    installed = package(tmp_path, tmp_path / "recipes")
    with pytest.raises(LayercutError, match=r"layercut.recipes: the starter recipes are missing .*; install layercut again$"):
        gallery_folder(installed)


# Plans


@pytest.mark.parametrize("name", sorted(STATIC))
def test_static_recipe_plans_as_published(name: str, hub: Resolve) -> None:
    depth, order = STATIC[name]
    plan = build_plan(load_recipe(path_of(name)), resolve=hub, measure=never)
    assert [(layer.model, layer.index) for layer in plan.actions.layers] == expanded(order)
    assert len(plan.actions.layers) == depth
    assert json.loads(plan.actions.config)["num_hidden_layers"] == depth
    assert plan.measurement is None
    tensors = {tensor.name for file in plan.actions.files for tensor in file.tensors}
    assert {int(match[1]) for tensor in tensors if (match := re.match(r"model\.layers\.(\d+)\.", tensor))} == set(range(depth))
    assert sum(tensor.startswith("model.layers.") for tensor in tensors) == 9 * depth


@pytest.mark.parametrize("name", sorted(CHOSEN))
def test_chosen_recipe_takes_what_is_near(name: str, hub: Resolve) -> None:
    depth, pairs, order = CHOSEN[name]
    plan = build_plan(load_recipe(path_of(name)), resolve=hub, measure=near(pairs))
    assert [(layer.model, layer.index) for layer in plan.actions.layers] == expanded(order)
    assert len(plan.actions.layers) == depth
    assert plan.choices and plan.measurement is not None


@pytest.mark.parametrize("name", sorted(SEARCHED))
def test_searching_recipe_takes_what_is_not_missed(name: str, hub: Resolve) -> None:
    depth, free, order = SEARCHED[name]
    run = Losing(lambda gone: 3 + len(gone - free) / 10)
    plan = build_plan(load_recipe(path_of(name)), resolve=hub, measure=near({(10, 16): 0.01}), run=run)
    assert [(layer.model, layer.index) for layer in plan.actions.layers] == expanded(order)
    assert len(plan.actions.layers) == depth and plan.choices[0].cost == 3.0
    assert [trial.name for trial in plan.choices[0].trials] == ["as it is", "block", "blocks", "rank", "loss", "greedy"]


class Mending(Losing):
    """A map halves what the state is off, and of what a cut costs it brings back a tenth of a nat."""

    def losses(self, stacks: Sequence[Any], part: str = "calibration", share: float = 1.0) -> list[Loss]:
        maps = [sum(len(layer.folds) for layer in stack) for stack in stacks]
        found = super().losses(stacks, part, share)
        return [loss._replace(sums=tuple(one - count for one in loss.sums)) for loss, count in zip(found, maps, strict=True)]

    def fit(self, given: Any, wanted: Any, ridge: float) -> Fold:
        return super().fit(given, wanted, ridge).model_copy(update={"size": SMALL.hidden})

    def misses(self, given: Any, wanted: Any, fold: Fold) -> Misses:
        return Misses(Loss((5.0, 6.0), (10, 10)), Loss((2.5, 3.0), (10, 10)))


@pytest.mark.parametrize(("make", "folds"), [(Mending, 1), (Losing, 0)])
def test_healing_recipe_folds_a_map_that_helps(make: Callable[..., Losing], folds: int, hub: Resolve) -> None:
    run = make(lambda gone: 3 + len(gone) / 10)
    plan = build_plan(load_recipe(path_of("heal-fold")), resolve=hub, measure=near({(13, 19): 0.01}), run=run)
    assert [(layer.model, layer.index) for layer in plan.actions.layers] == expanded(cut(SMOLLM2, (0, 13), (19, 30)))
    assert [len(layer.folds) for layer in plan.actions.layers] == [0] * 12 + [folds] + [0] * 11
    chosen, healed = plan.choices
    assert (chosen.chosen, [one.block for one in healed.maps]) == ("remove layers [13, 19)", ["[13, 19)"])
    assert healed.cost == pytest.approx(3.6 - folds / 10) and len(plan.maps) == folds
    assert ["is not taken" in note for note in plan.notes if "the map for" in note] == [True] * (1 - folds)


def test_two_models_hand_over_where_their_states_are_near(hub: Resolve) -> None:
    def distance(a: str, i: int, b: str, j: int) -> float:
        close = {("chat", 10, "base", 8), ("base", 8, "chat", 10), ("base", 16, "chat", 12), ("chat", 12, "base", 16)}
        return 0.0 if (a, i) == (b, j) else 0.01 if (a, i, b, j) in close else 0.5

    plan = build_plan(load_recipe(path_of("two-models")), resolve=hub, measure=measuring(distance))
    assert [(layer.model, layer.index) for layer in plan.actions.layers] == expanded([("chat", 0, 10), ("base", 8, 16), ("chat", 12, 24)])
    assert [(seam.from_model, seam.from_boundary, seam.to_model, seam.to_boundary) for seam in plan.seams] == [
        ("chat", 10, "base", 8),
        ("base", 16, "chat", 12),
    ]
    assert plan.choices[0].cost == 0.02
    assert json.loads(plan.actions.config)["max_window_layers"] == 27, "21 of 24 in one, all in the other"


SEAMS = {"solar": 1, "yi-9b": 1, "goliath-120b": 8, "llama-3-120b": 6, "llama-3-225b": 12, "bigllama-681b": 4, "venus-103b": 2}
SEAMS |= {"miquliz-120b": 6, "neuralpipe-9b": 1, "llama-3-12b": 4, "llama-3-6b": 1, "pruneme": 1, "shortgpt-7b": 1, "shortgpt-13b": 1}
SEAMS |= {"llama-pro": 0, "attenuated-repeats": 1, "average-layers": 0, "expand": 0, "zero-attention": 0, "reorder": 9}
NUMBERS = {"one": 1, "two": 2, "four": 4, "six": 6, "eight": 8, "nine": 9, "twelve": 12, "no": 0}


@pytest.mark.parametrize("name", sorted(SEAMS))
def test_seams_are_as_many_as_the_head_says(name: str, hub: Resolve) -> None:
    plan = build_plan(load_recipe(path_of(name)), resolve=hub, measure=never)
    assert len(plan.seams) == SEAMS[name]
    said = re.search(r"\b(\w+) seams?\b", path_of(name).read_text(encoding="utf-8").partition("Expect:")[2])
    assert said is not None and NUMBERS[said[1]] == SEAMS[name]


def test_sources_of_weight_0_are_noted_and_not_read(hub: Resolve) -> None:
    plan = build_plan(load_recipe(path_of("miquliz-120b")), resolve=hub, measure=never)
    noted = [note for note in plan.notes if note.endswith(f"a source of weight 0 is left out, '{LZLV}'")]
    assert len(noted) == 2
    assert (plan.donor, plan.actions.layers[0].model) == (MIQU, MIQU)
    assert json.loads(plan.actions.config)["rope_theta"] == 1000000.0


def test_miquliz_is_refused_without_its_allow(hub: Resolve) -> None:
    text = GALLERY["miquliz-120b"].text
    assert "allow: inexact" in text
    recipe = parse_recipe(YamlText(re.sub(r"^allow: .*\n", "", text, flags=re.MULTILINE), "r.yaml"))
    with pytest.raises(RefusedError, match="would load together but compute something else: rope is"):
        build_plan(recipe, resolve=hub, measure=never)


def made(plan: Plan) -> list[TensorMade]:
    return [tensor for file in plan.actions.files for tensor in file.tensors if isinstance(tensor, TensorMade)]


def test_the_published_dtype_casts_only_what_has_another(hub: Resolve) -> None:
    """What the heads say of torch: Llama-3-70B is bfloat16 and cast, the float16 models are copied."""
    plans = {name: build_plan(load_recipe(path_of(name)), resolve=hub, measure=never) for name in PUBLISHED}
    assert [name for name, plan in plans.items() if any(tensor.parts for tensor in made(plan))] == ["llama-3-120b"]
    assert {tensor.dtype for tensor in made(plans["llama-3-120b"])} == {"F16"}
    assert json.loads(plans["llama-3-120b"].actions.config)["torch_dtype"] == "float16"


def test_expanded_copies_are_zero_where_they_write(hub: Resolve) -> None:
    plan = build_plan(load_recipe(path_of("llama-pro")), resolve=hub, measure=never)
    copies = [position for position, layer in enumerate(plan.actions.layers) if layer.identity]
    assert copies == [4, 9, 14, 19, 24, 29, 34, 39]
    zeros = {tensor.name for tensor in made(plan)}
    assert zeros == {f"model.layers.{at}.{rest}.weight" for at in copies for rest in ("self_attn.o_proj", "mlp.down_proj")}


def test_budgets_are_kept_and_not_by_a_layer_more(hub: Resolve) -> None:
    """SmolLM2 at its true size: 134.5 million parameters, 3.54 million a layer."""
    assert hub(SMOLLM2).parameters == 134_515_008
    layer = 3_540_096
    for name, limit, width in (("budget-parameters", 110_000_000, 1), ("budget-size", 200_000_000, 2)):
        plan = build_plan(load_recipe(path_of(name)), resolve=hub, measure=near(CHOSEN[name][1]))
        size = plan.weight_bytes // 2 * width
        assert size <= limit < size + layer * width


# Execution


def tensors_of(folder: Path) -> dict[str, bytes]:
    """Every tensor of an output, read with nothing but struct and json."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = data[8 + size + begin : 8 + size + end]
    return found


COPIED = sorted(set(STATIC) - {"attenuated-repeats", "average-layers", "llama-3-120b"})


@pytest.mark.parametrize("name", COPIED)
def test_every_byte_comes_from_the_right_layer(name: str, filled_hub: Resolve, tmp_path: Path) -> None:
    plan = build_plan(load_recipe(path_of(name), ["evaluate=null"]), resolve=filled_hub, measure=never)
    execute(plan, tmp_path / "out", progress=False)
    written = tensors_of(tmp_path / "out")
    order = expanded(STATIC[name][1])
    zeros = {tensor.name for tensor in made(plan)}
    for tensor, data in written.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", tensor)
        end = order[0][0] if tensor == "model.embed_tokens.weight" else order[-1][0]
        model, source = (end, tensor) if match is None else (order[int(match[1])][0], f"model.layers.{order[int(match[1])][1]}.{match[2]}")
        expected = bytes(len(data)) if tensor in zeros else marked(model, source, len(data))
        assert data == expected, tensor
    assert len(written) == 9 * len(order) + (2 if MODELS[order[-1][0]].tied else 3)
    assert len(zeros) == {"llama-pro": 16, "expand": 14, "zero-attention": 4}.get(name, 0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == STATIC[name][0]


@pytest.mark.parametrize("name", ["expand", "zero-attention", "drop-block-static"])
def test_heads_that_promise_to_do_without_torch_keep_it(name: str, filled_hub: Resolve, tmp_path: Path) -> None:
    """From the command line to the finished folder, in a fresh process."""
    assert "torch is not even imported" in path_of(name).read_text(encoding="utf-8")
    model = filled_hub(SMOLLM2).folder
    places = ["slices.0.sources.0.model", "slices.1.sources.0.model"] if name == "drop-block-static" else ["model"]
    sets = [f"--set={place}={model}" for place in places] + ["--set=evaluate=null"]
    code = "import sys; from layercut.cli import main; assert main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "run", str(path_of(name)), "--quiet", "--out", str(tmp_path / "out"), *sets]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr
    assert len(read_report(tmp_path / "out").layers) == STATIC[name][0]


@pytest.fixture
def numbers(tmp_path: Path) -> Resolve:
    """SmolLM2's depth in float32, every element the number of its layer plus one (embeddings and norm: 100)."""
    small = MODELS[SMOLLM2]._replace(hidden=4, inner=6, keys=2, vocabulary=4, dtype="F32")
    tensors = {}
    for tensor, shape in shapes_of(small).items():
        match = re.match(r"model\.layers\.(\d+)\.", tensor)
        value = int(match[1]) + 1.0 if match else 100.0
        tensors[tensor] = ("F32", shape, struct.pack("<f", value) * prod(shape))
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "numbers", tensors, config_of(small)))
    return lambda reference: checkpoint


def first(data: bytes) -> float:
    """The number that all elements of a tensor are."""
    values = {number for (number,) in struct.iter_unpack("<f", data)}
    assert len(values) == 1
    return float(values.pop())


def single(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def run(recipe: Recipe, resolve: Resolve, folder: Path) -> dict[str, float]:
    plan = build_plan(recipe, resolve=resolve, measure=never)
    execute(plan, folder, progress=False)
    return {name: first(data) for name, data in tensors_of(folder).items()}


def test_repeats_are_attenuated_and_nothing_else_is(numbers: Resolve, tmp_path: Path) -> None:
    found = run(load_recipe(path_of("attenuated-repeats")), numbers, tmp_path / "out")
    order = expanded(STATIC["attenuated-repeats"][1])
    for name, value in found.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            assert value == 100
            continue
        position = int(match[1])
        softer = 12 <= position < 24 and re.search("q_proj|k_proj", name)
        assert value == (single((order[position][1] + 1) * single(0.7071067812)) if softer else order[position][1] + 1), name


def test_averages_are_those_of_their_layers(numbers: Resolve, tmp_path: Path) -> None:
    found = run(load_recipe(path_of("average-layers")), numbers, tmp_path / "out")
    values = [found[f"model.layers.{position}.mlp.up_proj.weight"] for position in range(28)]
    third = single(single(17 * single(2 / 3)) + single(18 * single(1 / 3)))
    assert values == [*range(1, 13), 13.5, 15, 16, pytest.approx(third, abs=2e-6), *range(19, 31)]


def test_a_cast_stack_has_the_layers_of_its_windows(filled_hub: Resolve, tmp_path: Path) -> None:
    """Llama-3-120B: bfloat16 becomes float16, value by value."""
    model = MODELS[LLAMA_70B]._replace(hidden=4, inner=6, keys=2, vocabulary=4)
    tensors = {}
    for tensor, shape in shapes_of(model).items():
        match = re.match(r"model\.layers\.(\d+)\.", tensor)
        value = struct.pack("<f", int(match[1]) + 1.0 if match else 100.0)[2:]  # the upper half of a float32 is a bfloat16
        tensors[tensor] = ("BF16", shape, value * prod(shape))
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "numbers", tensors, config_of(model), shards=2))
    plan = build_plan(load_recipe(path_of("llama-3-120b")), resolve=lambda reference: checkpoint, measure=never)
    execute(plan, tmp_path / "out", progress=False)
    for name, data in tensors_of(tmp_path / "out").items():
        match = re.match(r"model\.layers\.(\d+)\.", name)
        position = int(match[1]) if match else None
        value = 100.0 if position is None else position // 20 * 10 + position % 20 + 1.0
        assert data == struct.pack("<e", value) * (len(data) // 2), name
