from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import chat_tokenizer
from test_canvas import read

import layercut
from layercut.analysis import Analysis, Folder, Ranking, files, make_analysis
from layercut.api import SURVEY, analyze
from layercut.architecture import Member, find_stack
from layercut.blockscores import BlockScore, best_blocks
from layercut.calibration import BuiltinCalibration
from layercut.checkpoint import open_checkpoint
from layercut.cli import main
from layercut.errors import CalibrationError, LayercutError, OutputError, RecipeError
from layercut.metrics import Angular, Cosine
from layercut.plan import Measurement, Plan, Table

SHORT = {"samples": 3, "max_length": 48}
FLAGS = ["--samples=3", "--max-length=48", "-q"]
Capture = pytest.CaptureFixture[str]


def table(a: str = "m", b: str = "m", metric: str = "angular[last]", rows: int = 4, columns: int = 4) -> Table:
    mean = tuple(tuple(abs(i - j) / 10 for j in range(columns)) for i in range(rows))
    return Table(metric=metric, a=a, b=b, mean=mean, stderr=mean)


def measured(*tables: Table) -> Measurement:
    details = {"source": "builtin", "dtype": {"m": "float32"}}
    return Measurement(tables=tables, samples=4, tokens=100, details=details)


@pytest.fixture
def member(byte_checkpoint: Callable[..., Path]) -> Member:
    checkpoint = open_checkpoint(byte_checkpoint(layers=3), reference="org/model")
    return Member(checkpoint, find_stack(checkpoint))


# The document


def test_an_analysis_ranks_the_blocks_of_every_model_and_metric(member: Member) -> None:
    found = make_analysis({"m": member, "n": member}, measured(table(), table("m", "n"), table("n", "n", "cosine[all]")))
    assert [(ranking.model, ranking.metric) for ranking in found.rankings] == [("m", "angular[last]"), ("n", "cosine[all]")]
    assert found.rankings[0].blocks == best_blocks(table())
    assert found.models["m"].reference == "org/model" and found.models["m"].depth == 3
    assert found.about == "4 samples with 100 tokens of builtin text, measured in float32, layercut " + layercut.__version__


def test_an_analysis_can_be_read_back(member: Member) -> None:
    found = make_analysis({"m": member}, measured(table()))
    assert Analysis.model_validate_json(found.to_json()) == found
    assert json.loads(found.to_json())["format"] == "layercut-analysis/1"


def test_files_of_one_model(member: Member) -> None:
    made = {name: content for name, content in files(make_analysis({"m": member}, measured(table(), table(metric="angular[-1]"))))}
    assert list(made) == [
        "analysis.json", "blocks.csv", "blocks.md",
        "angular-last-blocks.png", "angular-last-blocks-normalised.png", "angular-last-layers.png",
        "angular-1-blocks.png", "angular-1-blocks-normalised.png", "angular-1-layers.png", "index.html",
    ]  # fmt: skip
    for name, content in made.items():
        assert not name.endswith(".png") or read(content).width > 300
    rows = list(csv.DictReader(io.StringIO(made["blocks.csv"].decode())))
    assert [(row["metric"], row["block_size"], row["removed_layers"], row["score"]) for row in rows] == [
        ("angular[last]", "1", "0-0", "0.1"), ("angular[last]", "2", "0-1", "0.2"),
        ("angular[-1]", "1", "0-0", "0.1"), ("angular[-1]", "2", "0-1", "0.2"),
    ]  # fmt: skip
    assert "## `angular[last]`\n\n| Block_size | Removed_layers | Score (avg dist) | Standard error |" in made["blocks.md"].decode()


def test_files_of_several_models(member: Member) -> None:
    found = make_analysis({"m": member, "n": member}, measured(table(), table("m", "n", columns=6), table("n", "n")))
    names = [file.name for file in files(found)]
    assert "angular-last-m-n-boundaries.png" in names and "angular-last-n-blocks.png" in names
    assert "## `angular[last]` of `n`" in dict(files(found))["blocks.md"].decode()


def test_names_of_files_are_never_names_of_others(member: Member) -> None:
    """Paths, equal names after cleaning, and names without a letter."""
    aliases = ("../../etc/x", "..-..-etc-x", "`a`|\n# b", "\u4e2d\u6587", "***")
    found = make_analysis(dict.fromkeys(aliases, member), measured(*(table(alias, alias) for alias in aliases)))
    names = [file.name for file in files(found)]
    assert len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.") for name in names)
    assert [name for name in names if name.endswith("-layers.png")] == [
        "angular-last-etc-x-layers.png", "angular-last-etc-x-2-layers.png", "angular-last-a-b-layers.png",
        "angular-last-x-layers.png", "angular-last-x-2-layers.png",
    ]  # fmt: skip
    text = dict(files(found))["blocks.md"].decode()
    assert "## `angular[last]` of `` `a`|\\n# b ``" not in text and "## `angular[last]` of `` `a`| # b ``" in text


def test_a_model_of_one_layer_has_a_page_and_no_blocks(byte_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(byte_checkpoint(layers=1))
    found = make_analysis({"m": Member(checkpoint, find_stack(checkpoint))}, measured(table(rows=2, columns=2)))
    assert found.rankings == (Ranking(model="m", metric="angular[last]", blocks=()),)
    assert [file.name for file in files(found)][3:] == ["angular-last-layers.png", "index.html"]


# The folder


def test_nothing_is_written_over(member: Member, tmp_path: Path) -> None:
    found = make_analysis({"m": member}, measured(table()))
    target = tmp_path / "deep" / "out"
    Folder(target, False).write(found, {"m": member})
    assert sorted(path.name for path in target.iterdir()) == sorted(file.name for file in files(found))
    (target / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match=r"out/ is not empty; choose another folder or pass --overwrite$"):
        Folder(target, False).write(found, {"m": member})
    assert (target / "mine.txt").read_text() == "x"
    Folder(target, True).write(found, {"m": member})
    assert not (target / "mine.txt").exists() and (target / "analysis.json").read_text() == found.to_json()
    assert [path.name for path in target.parent.iterdir()] == ["out"], "nothing is left beside it"


def test_a_folder_of_a_source_is_no_place(member: Member) -> None:
    folder = member.checkpoint.folder
    with pytest.raises(OutputError, match="lie in each other"):
        Folder(folder / "analysis", True).check({"m": member})
    with pytest.raises(OutputError, match="lie in each other"):
        Folder(folder, True).check({"m": member})


def test_a_failure_leaves_the_older_folder(member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make_analysis({"m": member}, measured(table()))
    Folder(tmp_path / "out", False).write(found, {"m": member})
    monkeypatch.setattr("layercut.analysis.make_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Folder(tmp_path / "out", True).write(found, {"m": member})
    assert (tmp_path / "out" / "index.html").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name != "source"] == ["out"]


def test_what_a_killed_analysis_left_is_no_hindrance(member: Member, tmp_path: Path) -> None:
    """Half a folder is thrown away; a folder that had stepped aside comes back first, and is not lost."""
    found = make_analysis({"m": member}, measured(table()))
    content = tmp_path / ".out.layercut-partial" / "content"
    content.mkdir(parents=True)
    (content / "blocks.csv").write_text("half")
    (content / "stray").write_text("x")
    Folder(tmp_path / "out", False).write(found, {"m": member})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(file.name for file in files(found))
    (tmp_path / "out").rename(tmp_path / ".out.layercut-old")
    with pytest.raises(OutputError, match="is not empty"):
        Folder(tmp_path / "out", False).write(found, {"m": member})
    assert (tmp_path / "out" / "index.html").exists() and not content.parent.exists()


def test_the_work_of_a_stopped_run_is_not_thrown_away(member: Member, tmp_path: Path) -> None:
    staging = tmp_path / ".out.layercut-partial"
    (staging / "content").mkdir(parents=True)
    (staging / "journal").write_text("x")
    with pytest.raises(OutputError, match=r"^a stopped run waits to be finished in .*; choose another folder, or finish that run first$"):
        Folder(tmp_path / "out", True).write(make_analysis({"m": member}, measured(table())), {"m": member})
    assert (staging / "journal").exists()


# The whole way


def test_a_model_is_analysed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    found = analyze(tiny("llama"), text=SHORT, out=tmp_path / "out", progress=False)
    assert [ranking.metric for ranking in found.rankings] == [metric.label for metric in SURVEY]
    assert [block.size for block in found.rankings[0].blocks] == [1, 2, 3, 4, 5]
    assert Analysis.model_validate_json((tmp_path / "out" / "analysis.json").read_bytes()) == found
    again = analyze(tiny("llama"), metrics=[Cosine()], text=SHORT, progress=False)
    assert again.measurement.tables == tuple(t for t in found.measurement.tables if t.metric == "cosine[all]")


def test_the_nearest_block_is_the_one_that_a_recipe_cuts(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("llama", layers=8)
    found = analyze(model, metrics=[Angular()], text=SHORT, progress=False)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {model}\ncalibration: {{source: builtin, samples: 3, max_length: 48}}\nsteps: [{{prune: {{layers: 3}}}}]\n")
    made = layercut.plan_recipe(recipe, progress=False)
    best = found.rankings[0].blocks[2]
    assert isinstance(best, BlockScore) and (made.seams[0].from_boundary, made.seams[0].to_boundary) == (best.start, best.stop)
    assert made.seams[0].distances["angular[last]"].mean == best.score


def test_only_models_that_give_layers_are_measured(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {tiny('llama')}\nbase_model: {tiny('llama', seed=1)}\n")
    found = analyze(recipe, text=SHORT, progress=False)
    assert list(found.models) == [str(tiny("llama"))] and len(found.measurement.tables) == 1


def test_a_recipe_says_what_is_measured(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Its metrics and text, and the models that layers come from; flags come first."""
    (tmp_path / "words.txt").write_text("one two three four five six seven eight nine ten " * 20)
    recipe = tmp_path / "r.yaml"
    slices = f"- {{model: {tiny('llama')}, layer_range: [0, 3]}}\n- {{model: {tiny('llama', seed=1)}, layer_range: [3, 6]}}\n"
    recipe.write_text(
        f"slices:\n{slices}metrics: [cosine, {{name: angular, token: all}}]\ncalibration: {{source: builtin, samples: 2, max_length: 32}}\n"
    )
    found = analyze(recipe, progress=False)
    assert [(t.metric, t.a == t.b) for t in found.measurement.tables] == [
        ("cosine[all]", True), ("cosine[all]", False), ("cosine[all]", True),
        ("angular[all]", True), ("angular[all]", False), ("angular[all]", True),
    ]  # fmt: skip
    assert (found.measurement.samples, found.measurement.tokens) == (2, 64)
    text = {"path": str(tmp_path / "words.txt"), "samples": 4}
    other = analyze(recipe, metrics=[Angular()], text=text, overrides=["calibration.max_length=16"], progress=False)
    assert (other.measurement.samples, other.measurement.tokens, len(other.measurement.tables)) == (4, 64, 3)
    assert other.about.startswith(f"4 samples with 64 tokens of {text['path']}, measured in float32, ")


def test_a_folder_with_an_odd_name(tiny: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "m\x1b[31m")
    assert main(["analyze", str(folder), *FLAGS, "--metric=cosine", "-o", str(tmp_path / "out")]) == 0
    shown = f"{tmp_path}/m\\x1b[31m"
    assert capsys.readouterr().out.startswith(f"{shown}: 6 layers, ")
    found = Analysis.model_validate_json((tmp_path / "out" / "analysis.json").read_bytes())
    assert list(found.models) == [shown] == [table.a for table in found.measurement.tables]


def test_a_folder_whose_name_is_no_text(tiny: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    folder = os.fsencode(tmp_path) + b"/m\xff"
    shutil.copytree(os.fsencode(tiny("llama")), folder)
    assert main(["analyze", os.fsdecode(folder), *FLAGS]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {tmp_path}/m\\udcff: no tokenizer can be loaded: ") and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out": "a\0b"}, "'a\\x00b': a name with a NUL is no folder"),
        ({"text": {"column": "words"}}, "builtin text: column: Extra inputs are not permitted"),
        ({"overrides": ["a=1"]}, "MODEL: --set changes recipes, and this is a model"),
        ({"text": {"path": "missing.txt"}}, "missing.txt: no such file"),
    ],
)
def test_what_cannot_be_analysed(arguments: dict[str, object], message: str, tiny: Callable[..., Path]) -> None:
    model = tiny("llama")
    with pytest.raises(LayercutError) as caught:
        analyze(model, progress=False, **arguments)  # type: ignore[arg-type]
    assert str(caught.value).replace(str(model), "MODEL") == message


def test_names_of_metrics_and_recipes_as_data(tiny: Callable[..., Path]) -> None:
    text = {"samples": 1, "max_length": 16}
    found = analyze({"model": str(tiny("llama")), "metric": "cosine"}, text=text, progress=False)
    assert [ranking.metric for ranking in found.rankings] == ["cosine[all]"]
    found = analyze(str(tiny("llama")), metrics=["angular", "cosine:last"], text=text, progress=False)
    assert [ranking.metric for ranking in found.rankings] == ["angular[last]", "cosine[last]"]
    with pytest.raises(CalibrationError) as caught:
        analyze(str(tiny("llama")), text={"sample": 1})
    assert str(caught.value) == "unknown key 'sample' of text; did you mean 'samples'?"
    recipe = layercut.load_recipe({"model": str(tiny("llama"))})
    for call in (layercut.plan_recipe, layercut.run_recipe):
        with pytest.raises(RecipeError) as refused:
            call(recipe, overrides=["depth=3"])
        assert str(refused.value) == "overrides go with a recipe that is read from a file or a dict; give them to load_recipe"


def test_a_plan_is_neither(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {tiny('llama')}\nsteps: [{{prune: {{at: 2}}}}]\n")
    made = layercut.plan_recipe(recipe)
    assert isinstance(made, Plan)
    (tmp_path / "plan.json").write_text(made.to_json())
    with pytest.raises(LayercutError, match=r"plan.json: a plan, not a recipe or a model; name the recipe that it was made from$"):
        analyze(tmp_path / "plan.json")


def test_output_is_checked_before_anything_is_measured(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="is not empty"):
        analyze(tiny("llama"), text={"path": "missing.txt"}, out=tmp_path)
    with pytest.raises(CalibrationError):
        analyze(tiny("llama"), text={"path": "missing.txt"}, out=tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# The command


def test_the_command_prints_the_table(tiny: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    model = tiny("llama")
    assert main(["analyze", str(model), *FLAGS, "--metric=angular", "--metric={name: cosine, token: -1}", "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    found = Analysis.model_validate_json((tmp_path / "out" / "analysis.json").read_bytes())
    best = [ranking.blocks[1] for ranking in found.rankings]
    lines = shown.out.splitlines()
    assert lines[0] == f"{model}: 6 layers, {found.about}"
    assert lines.pop(1) == "  1 document read, none skipped; BOS not added (auto)"
    assert lines[1] == "nearest block of each size (layers from 0, both ends included)"
    assert lines[2].split() == ["block", "size", "angular[last]", "cosine[-1]"]
    cells = [part for block in best for part in (block.removed, f"{block.score:.4f}", "±", f"{block.stderr:.4f}")]
    assert lines[4].split() == ["2", *cells]
    assert len(lines) == 3 + 5
    assert shown.err == f"to look at it: {tmp_path / 'out' / 'index.html'}\n"


def test_the_command_prints_one_json_document(tiny: Callable[..., Path], capsys: Capture) -> None:
    assert main(["analyze", str(tiny("llama")), *FLAGS, "--metric=angular:all", "--json"]) == 0
    shown = capsys.readouterr()
    assert Analysis.model_validate_json(shown.out).rankings[0].metric == "angular[all]"
    assert shown.err == ""


def test_the_command_reads_text_and_recipes(tiny: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "t.jsonl").write_text('{"words": "a b c d e f g h"}\n{"words": "i j k l m n"}\n')
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"model: {tiny('llama')}\n")
    flags = ["--text", str(tmp_path / "t.jsonl"), "--column", "words", "--set", "metric=cosine", "--json", "-q"]
    assert main(["analyze", str(recipe), *flags]) == 0
    found = Analysis.model_validate_json(capsys.readouterr().out)
    assert found.measurement.samples == 2 and found.rankings[0].metric == "cosine[all]"


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("angluar", "unknown metric 'angluar'; did you mean 'angular'? (known: "),
        ("angular:frist", "token must be last, all, completion, skip-first-K"),
        ("{name: angular, size: 3}", "Extra inputs are not permitted"),
        ("{name: [", "not valid YAML"),
    ],
)
def test_a_metric_that_is_spelled_wrong(metric: str, message: str, capsys: Capture) -> None:
    assert main(["analyze", "nowhere", "--metric", metric]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: --metric") and message in shown and shown.count("\n") == 1


def test_defaults_of_a_model_are_those_of_a_recipe(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "layercut.api._measured", lambda members, metrics, calibration, **options: seen.append(calibration) or measured(table())
    )
    analyze(tiny("llama"))
    assert seen == [BuiltinCalibration()]


def test_a_chat_model_is_analysed_on_conversations(tiny: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "chat"))
    chat_tokenizer().save_pretrained(model)
    talks = [[{"from": "human", "value": "hello"}, {"from": "gpt", "value": said}] for said in ("hi", "good day")]
    rows = [{"conversations": talk} for talk in (*talks, talks[0][:1], [])]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--text", str(tmp_path / "t.jsonl"), "--max-length", "64", "--metric", "angular:completion", "--quiet"]
    assert main(["analyze", str(model), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{model}: 6 layers, 2 samples with ")
    assert lines[1] == "  4 documents read, skipped 1 without an assistant turn, 1 empty; BOS not added (auto)"
    assert lines[3].split() == ["block", "size", "angular[completion]"]


@pytest.mark.parametrize("value", ["many", "0", "1.5"])
def test_samples_are_a_number_or_auto(value: str, capsys: Capture) -> None:
    assert main(["analyze", "org/name", f"--samples={value}"]) == 2
    assert "--samples" in capsys.readouterr().err
