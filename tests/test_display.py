from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import byte_tensors, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from layercut.architecture import find_stack
from layercut.checkpoint import open_checkpoint
from layercut.display import amount, change, columns, inspect_data, inspect_text, picture, plan_text, report_text, seam_line, size
from layercut.executor import execute
from layercut.plan import Distance, Measurement, Plan, Seam, Table
from layercut.planner import build_plan
from layercut.recipe import parse_recipe
from layercut.stack import Fold, LayerRef, Scaling, Share
from layercut.yamltext import YamlText


def planned(text: str) -> Plan:
    def never(*_: object) -> None:
        raise AssertionError("nothing is measured here")

    recipe = parse_recipe(YamlText(text, "r.yaml"))
    return build_plan(recipe, resolve=lambda reference: open_checkpoint(Path(reference), reference="m"), measure=never)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.234 kB"),
        (999_499, "999.5 kB"),
        (269_055_360, "269.1 MB"),
        (5 * 10**12, "5 TB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("count", "text"), [(7, "7"), (1_500, "1.5 k"), (134_515_008, "134.5 M"), (8_030_261_248, "8.03 B")])
def test_amounts(count: int, text: str) -> None:
    assert amount(count) == text


@given(st.integers(min_value=1, max_value=10**16))
def test_a_size_is_right_to_four_digits(count: int) -> None:
    number, unit = size(count).split()
    scale = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
    assert float(number) * scale == pytest.approx(count, rel=1e-3)


def test_changes() -> None:
    assert change(200, 150, amount) == "200 -> 150 (-25.0 %)"
    assert change(0, 5, size) == "0 B -> 5 B"
    assert change(337_520, 337_440, size) == "337.5 kB -> 337.4 kB (+0.0 %)"  # not -0.0


def test_columns_are_aligned() -> None:
    assert list(columns([("a", "bb", "c"), ("long", "x"), ("", "y", "z")])) == ["  a     bb  c", "  long  x", "        y   z"]
    assert list(columns([])) == []


def test_a_seam_with_its_distances() -> None:
    price = Distance(mean=0.14604, stderr=0.00312)
    seam = Seam(at=13, from_model="a", from_boundary=13, to_model="b", to_boundary=19, distances={"angular[last]": price})
    assert seam_line(seam, several=False) == "13 -> 19, angular[last] 0.1460 ± 0.0031"
    single = seam.model_copy(update={"distances": {"angular[last]": Distance(mean=0.14604, stderr=0)}})
    assert seam_line(single, several=False) == "13 -> 19, angular[last] 0.1460"  # one sample has no standard error
    assert seam_line(seam, several=True) == "a:13 -> b:19, angular[last] 0.1460 ± 0.0031"


def test_the_picture_of_a_stack() -> None:
    layers = [LayerRef(model="m", index=index) for index in (0, 1, 2, 1, 2, 3)]
    seams = [
        Seam(at=3, from_model="m", from_boundary=3, to_model="m", to_boundary=1),
        Seam(at=6, from_model="m", from_boundary=4, to_model="m", to_boundary=5),
    ]
    assert list(picture(layers, seams)) == [
        "  [0, 3)  ### 3 layers",
        "          ~ seam 3 -> 1",
        "  [1, 4)  ### 3 layers",
        "          ~ seam 4 -> 5",
    ]


FOLD = Fold(sha256="a" * 64, size=4, module="mlp.down_proj", tokens=100, ridge=0.01, explained=0.5)


def test_the_picture_says_what_is_done_to_layers() -> None:
    layers = [
        LayerRef(model="a", index=0, scalings=((Scaling(tensors="*", by=0.5),),)),
        LayerRef(model="b", index=4, span=2, shares=(Share(model="b", index=4, weight=0.25), Share(model="b", index=5, weight=0.75))),
        LayerRef(model="a", index=5, identity=True, scalings=((Scaling(tensors="*", by=0),),)),
        LayerRef(model="a", index=6, folds=(FOLD,)),
    ]
    assert list(picture(layers, [])) == [
        "  [0, 1)  # 1 layer of a, tensors scaled",
        "  [4, 6)  # 1 layer of b, average of 0.25 x b:4, 0.75 x b:5",
        "  [5, 6)  # 1 layer of a, adds nothing: its outputs are zeroed",
        "  [6, 7)  # 1 layer of a, with a map for the layers that were removed behind it folded into mlp.down_proj",
    ]


def test_a_long_stack_fits_the_terminal() -> None:
    lines = list(picture([LayerRef(model="m", index=index) for index in range(400)], []))
    assert lines == [f"  [0, 400)  {'#' * 40} 400 layers"]


def test_a_plan_and_its_report(byte_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = byte_checkpoint(layers=6)
    (source / "tokenizer.json").write_text("{}")
    plan = planned(f"model: {source}\nsteps: [{{prune: {{at: [1, 2, 4]}}}}]\noutput: somewhere\n")
    assert plan_text(plan).splitlines() == [
        "m: 6 -> 3 layers",
        "",
        "the new stack, first layer on top (half-open ranges, from 0)",
        "  [0, 1)  # 1 layer",
        "          ~ seam 1 -> 3",
        "  [3, 4)  # 1 layer",
        "          ~ seam 4 -> 5",
        "  [5, 6)  # 1 layer",
        "",
        "  config.json num_hidden_layers  6 -> 3",
        "  parameters                     960 -> 576 (-40.0 %)",
        "  weights                        576 B in 1 file",
        "  carried over                   1 file, 2 B",
        "  disk needed                    578 B",
        "  output                         somewhere",
        "",
        "left out",
        "  layers 1 to 2 (4 tensors, model.layers.*)  not in the stack that the recipe asks for",
        "  layer 4 (2 tensors, model.layers.*)        not in the stack that the recipe asks for",
    ]
    report = execute(plan, tmp_path / "out", progress=False)
    shown = report_text(report, tmp_path / "out").splitlines()
    assert shown[:5] == [
        "m",
        "  layers      6 -> 3",
        "  kept        [0, 1) + [3, 4) + [5, 6)",
        "  seam        1 -> 3",
        "  seam        4 -> 5",
    ]
    assert shown[-1] == f"  model       {tmp_path / 'out'}"


def test_the_report_shows_what_was_done_to_layers(byte_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Which are averages, or scaled; of a slice that is copied there is nothing to say."""
    tensors = {f"model.layers.{at}.{name}": ("F32", (2,), bytes(8)) for at in range(6) for name in ("self_attn.o_proj.weight", "w")}
    folder = write_checkpoint(tmp_path / "m", tensors, {"model_type": "llama", "num_hidden_layers": 6})
    recipe = f"model: {folder}\nsteps:\n- merge: {{at: [1, 2]}}\n- scale: {{at: '3-4', tensors: '*.w', by: 2}}\n"
    shown = report_text(execute(planned(recipe), tmp_path / "out", progress=False), tmp_path / "out")
    assert [" ".join(line.split()) for line in shown.splitlines()[2:5]] == [
        "kept [0, 1) + [1, 3) + [3, 6)",
        f"changed [1, 3), average of 0.5 x {folder}:1, 0.5 x {folder}:2",
        "changed [3, 6), tensors of 2 scaled",
    ]


def test_the_report_shows_the_evaluation(byte_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    report = execute(planned(f"model: {byte_checkpoint()}\nsteps: [{{prune: {{at: 1}}}}]\n"), tmp_path / "out", progress=False)
    measured = {"source": "builtin", "windows": 8, "max_length": 256}
    evaluation = {
        "perplexity": {"before": {"value": 25.987, **measured}, "after": {"value": 42.8, **measured}},
        "generate": {"prompt": "Once", "before": " upon\na time", "after": " more"},
    }
    shown = report_text(report.with_evaluation(evaluation), tmp_path / "out")
    assert "  perplexity  25.99 -> 42.80 (builtin text, 8 windows of 256 tokens)\n" in shown
    assert "  prompt      Once\n  before      upon a time\n  after       more\n" in shown


def test_inspect_names_the_stacks_and_the_cuts_that_are_refused(tmp_path: Path) -> None:
    tensors = {f"model.{side}.layers.{at}.w": ("U8", (4,), b"abcd") for side in ("encoder", "decoder") for at in range(3)}
    config = {"model_type": "bart", "encoder_layers": 3, "decoder_layers": 3, "num_hidden_layers": 3}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", tensors, config), reference="m")
    for name, prefix in (("encoder", "model.encoder.layers."), ("decoder", "model.decoder.layers.")):
        data = inspect_data(checkpoint, find_stack(checkpoint, name))
        assert (data["stack"], data["prefix"]) == (name, prefix)
        line = f"{name}, of encoder (model.encoder.layers.*), decoder (model.decoder.layers.*)"
        assert next(row for row in inspect_text(data).splitlines() if row.startswith("  stack")).endswith(f"  {line}")
    assert inspect_data(checkpoint, find_stack(checkpoint))["stack"] == "decoder"
    folder = write_checkpoint(tmp_path / "d", byte_tensors(4), {"model_type": "diffllama", "num_hidden_layers": 4})
    checkpoint = open_checkpoint(folder, reference="d")
    data = inspect_data(checkpoint, find_stack(checkpoint))
    reason = (
        "model type diffllama: lambda_init depends on the layer index, and layer 0 has no self_attn.o_proj.weight in floating point "
        "that could make up for it, so this stack would load but compute something else"
    )
    assert data["refused_cuts"] == [{"layers": [0, 1, 2], "reason": reason}]
    assert f"  no cut of                 layers 0-2: {reason}" in inspect_text(data).splitlines()


def test_inspect(tmp_path: Path) -> None:
    tensors = byte_tensors(3)
    tensors["model.layers.1.extra.weight"] = ("F32", (2,), bytes(8))
    config = {"model_type": "llama", "num_hidden_layers": 3, "layer_types": ["a", "b", "a"]}
    folder = write_checkpoint(tmp_path / "m", tensors, config)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    checkpoint = open_checkpoint(folder, reference="m")
    data = inspect_data(checkpoint, find_stack(checkpoint))
    assert data["layers"] == 3 and data["prefix"] == "model.layers." and data["dtypes"] == {"F32": 8, "U8": 576}
    assert data["kinds"] == [{"layers": [0, 2], "tensors": 2, "bytes": 128}, {"layers": [1], "tensors": 3, "bytes": 136}]
    assert [value["key"] for value in data["depends_on_layers"]] == ["num_hidden_layers", "layer_types"]
    assert inspect_text(data).splitlines() == [
        "m",
        "  type                      llama",
        f"  folder                    {folder}",
        "  layers                    3 (model.layers.0 to 2)",
        "                            layers 0, 2: 2 tensors, 128 B each",
        "                            layers 1: 3 tensors, 136 B each",
        "  parameters                578 in 10 tensors",
        "  weights                   584 B in 1 file, 67 % of it in layers",
        "  dtypes                    F32 8 B, U8 576 B",
        "  config num_hidden_layers  3 (depth)",
        '  config layer_types        ["a", "b", "a"] (one entry a layer)',
        "  carried over              nothing",
        "  left out                  pytorch_model.bin: weights of the uncut model, in another format or copy",
    ]


def test_a_measured_plan_and_its_report_say_what_was_measured_on(tmp_path: Path) -> None:
    details = {"source": "text", "path": "a.jsonl", "documents_read": 5, "documents_skipped": {"empty": 2}, "bos": "added"}
    parts = [
        {"path": "a.jsonl", "samples_wanted": 2, "samples_found": 1, "samples": 1, "tokens": 9, "documents_read": 5},
        {"source": "builtin", "samples_wanted": 2, "samples_found": 2, "samples": 2, "tokens": 20, "documents_read": 1},
    ]

    def told(**more: object) -> tuple[list[str], list[str]]:
        matrix = tuple(tuple(abs(i - j) / 10 for j in range(7)) for i in range(7))
        table = Table(metric="angular[last]", a="m", b="m", mean=matrix, stderr=matrix)
        measured = Measurement(tables=(table,), samples=3, tokens=29, details={**details, "bos_policy": True, **more})
        recipe = parse_recipe(YamlText("model: m\nsteps: [{prune: {layers: 2}}]", "r.yaml"))
        source = write_checkpoint(tmp_path / "m", byte_tensors(6), {"model_type": "llama", "num_hidden_layers": 6, "vocab_size": 8})
        plan = build_plan(recipe, resolve=lambda _: open_checkpoint(source, reference="m"), measure=lambda *_, **__: measured)
        report = execute(plan, tmp_path / f"out{len(more)}", progress=False)
        shown = plan_text(plan), report_text(report, tmp_path / "out")
        return tuple([" ".join(line.split()) for line in text.splitlines() if "tokens of" in line] for text in shown)  # type: ignore[return-value]

    documents = "5 documents read, skipped 2 empty; BOS added (bos: true)"
    assert told() == ([f"measured 3 samples, 29 tokens of a.jsonl; {documents}"],) * 2
    assert (
        told(by_source=parts)
        == (
            [
                f"measured 3 samples, 29 tokens of a.jsonl and builtin text; {documents}",
                "1 sample, 9 tokens of a.jsonl, which ended after 1 of 2 samples; 5 documents read, none skipped",
                "2 samples, 20 tokens of builtin text; 1 document read, none skipped",
            ],
        )
        * 2
    )
