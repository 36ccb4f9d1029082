"""Metrics: arithmetic by hand, properties, and how a recipe spells them."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from layercut.metrics import METRICS, Angular, Cosine, Metric, MetricSpec


class Recipe(BaseModel):
    metric: MetricSpec | None = None
    metrics: tuple[MetricSpec, ...] = ()


def gram(*tokens: list[list[float]]) -> torch.Tensor:
    """Inner products of the boundary states of each token."""
    states = torch.tensor(tokens, dtype=torch.float64)
    return states @ states.transpose(1, 2)


def error(value: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"metric": value})
    assert caught.value.error_count() == 1
    return str(caught.value.errors()[0]["msg"])


def test_cosine_by_hand() -> None:
    # x = (3, 4), y = (4, 3): x.y = 12 + 12 = 24, |x| = |y| = 5, cos = 24/25 = 0.96, distance = 1 - 0.96 = 0.04
    distances = Cosine().distances(gram([[3, 4], [4, 3]]))
    assert distances.shape == (1, 2, 2)
    assert distances[0, 0].tolist() == pytest.approx([0.0, 0.04], abs=1e-15)
    assert distances[0, 1].tolist() == pytest.approx([0.04, 0.0], abs=1e-15)


def test_angular_by_hand() -> None:
    # the same x and y: arccos(0.96) = 0.283794109208 rad; / pi = 0.090334470601
    distances = Angular().distances(gram([[3, 4], [4, 3]]))
    assert distances[0, 0, 1].item() == pytest.approx(0.090334470601, abs=1e-12)
    assert distances[0, 1, 0].item() == distances[0, 0, 1].item()
    # x = (1, 0), y = (1, sqrt 3): cos = 1/2, an angle of 60 degrees = 1/3 of pi
    assert Angular().distances(gram([[1, 0], [1, math.sqrt(3)]]))[0, 0, 1].item() == pytest.approx(1 / 3, abs=1e-15)


@pytest.mark.parametrize(
    ("other", "angular", "cosine"),
    [
        ([2.0, 0.0], 0.0, 0.0),  # the same direction, another length
        ([0.0, 7.0], 0.5, 1.0),  # a right angle
        ([-3.0, 0.0], 1.0, 2.0),  # opposite
        ([1.0, 1.0], 0.25, 1 - 1 / math.sqrt(2)),  # 45 degrees
    ],
)
def test_special_angles(other: list[float], angular: float, cosine: float) -> None:
    pair = gram([[1.0, 0.0], other])
    assert Angular().distances(pair)[0, 0, 1].item() == pytest.approx(angular, abs=1e-15)
    assert Cosine().distances(pair)[0, 0, 1].item() == pytest.approx(cosine, abs=1e-15)


def test_each_token_by_itself() -> None:
    distances = Cosine().distances(gram([[1, 0], [0, 1], [1, 0]], [[1, 0], [1, 0], [-1, 0]]))
    assert distances.tolist() == [[[0, 1, 0], [1, 0, 1], [0, 1, 0]], [[0, 0, 2], [0, 0, 2], [2, 2, 0]]]


def test_angular_is_accurate_near_zero() -> None:
    # y = (cos a, sin a) is turned from x = (1, 0) by exactly a
    for angle in (1e-2, 1e-4, 1e-6):
        found = Angular().distances(gram([[1.0, 0.0], [math.cos(angle), math.sin(angle)]]))[0, 0, 1].item()
        assert found == pytest.approx(angle / math.pi, abs=1e-8)


def test_bf16_arithmetic_would_not_do() -> None:
    # What short-transformers does: arccos of a cosine that was rounded to bf16. 1 - 5e-5 rounds to 1.
    angle = 1e-2
    rounded = torch.tensor(math.cos(angle)).bfloat16().arccos().item() / math.pi
    assert rounded == 0.0
    assert Angular().distances(gram([[1.0, 0.0], [math.cos(angle), math.sin(angle)]]))[0, 0, 1].item() > 3e-3


def test_a_zero_state_has_no_direction() -> None:
    # zero and zero are equal: distance 0; zero and anything else: cosine 0
    zero = gram([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    assert Cosine().distances(zero).tolist() == [[[0, 1, 0], [1, 0, 1], [0, 1, 0]]]
    assert Angular().distances(zero).tolist() == [[[0, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0]]]


def test_rounding_beyond_one_is_clamped() -> None:
    beyond = torch.tensor([[[1.0, 1.0 + 1e-15], [1.0 + 1e-15, 1.0]]], dtype=torch.float64)
    assert Angular().distances(beyond).tolist() == [[[0, 0], [0, 0]]]
    assert Angular().distances(-beyond + 2 * torch.eye(2, dtype=torch.float64))[0, 0, 1].item() == 1.0


@pytest.mark.parametrize("metric", [Angular(), Cosine()])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(metric: Metric, bad: float) -> None:
    distances = metric.distances(gram([[1.0, 0.0], [bad, 1.0], [0.0, 1.0]]))
    assert distances.isfinite().tolist() == [[[True, False, True], [False, False, False], [True, False, True]]]


def test_huge_and_tiny_states_do_not_overflow() -> None:
    # the largest and smallest magnitudes of float32 states, d = 4
    for scale in (3e38, 1e-45):
        pair = gram([[scale, scale, 0, 0], [scale, 0, 0, 0]])
        assert Angular().distances(pair)[0, 0, 1].item() == pytest.approx(0.25, abs=1e-12)


VECTORS = st.lists(st.lists(st.integers(-50, 50), min_size=3, max_size=3), min_size=2, max_size=4)


@given(VECTORS)
def test_ranges_symmetry_and_diagonal(states: list[list[int]]) -> None:
    inner = gram([[float(x) for x in state] for state in states])
    for metric, top in ((Angular(), 1.0), (Cosine(), 2.0)):
        distances = metric.distances(inner)
        assert distances.isfinite().all()
        assert distances.min() >= 0
        assert distances.max() <= top
        assert torch.equal(distances, distances.transpose(1, 2))
        assert distances.diagonal(dim1=1, dim2=2).abs().max() < 1e-7


@given(VECTORS, st.floats(0.01, 100))
def test_equals_plain_python_and_ignores_length(states: list[list[int]], scale: float) -> None:
    distances = Angular().distances(gram([[float(x) * scale for x in state] for state in states]))
    for i, x in enumerate(states):
        for j, y in enumerate(states):
            norms = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y))
            if norms:
                cosine = max(-1.0, min(1.0, sum(a * b for a, b in zip(x, y, strict=True)) / norms))
                assert distances[0, i, j].item() == pytest.approx(math.acos(cosine) / math.pi, abs=1e-7)


@given(VECTORS)
def test_angular_is_a_distance(states: list[list[int]]) -> None:
    states = [state for state in states if any(state)]
    if len(states) > 2:
        d = Angular().distances(gram([[float(x) for x in state] for state in states]))[0]
        assert d[0, 2] <= d[0, 1] + d[1, 2] + 1e-7


def test_labels_and_default_tokens() -> None:
    assert [metric().label for metric in METRICS.values()] == ["angular[last]", "cosine[all]"]  # type: ignore[call-arg]
    assert Angular(token=-3).label == "angular[-3]"
    assert list(METRICS) == ["angular", "cosine"]


def test_every_metric_documents_itself() -> None:
    for metric in METRICS.values():
        text = metric.__doc__ or ""
        for word in ("Range", "Small means", "arXiv", "Other tools"):
            assert word in text


def test_a_metric_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Angular().token = "all"  # type: ignore[misc]


def test_metric_alone_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Metric(name="angular")  # type: ignore[abstract]


def test_recipe_spellings() -> None:
    metrics = [{"name": "angular", "token": "all"}, "angular", {"name": "cosine", "token": -2}]
    recipe = Recipe.model_validate({"metric": "cosine", "metrics": metrics})
    assert recipe.metric == Cosine()
    assert recipe.metrics == (Angular(token="all"), Angular(), Cosine(token=-2))
    assert Recipe(metrics=(Angular(token=4),)).metrics[0].label == "angular[4]"


def test_recipe_round_trip() -> None:
    recipe = Recipe(metric=Angular(token=3), metrics=(Cosine(),))
    assert recipe.model_dump(mode="json") == {"metric": {"name": "angular", "token": 3}, "metrics": [{"name": "cosine", "token": "all"}]}
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_messages() -> None:
    assert error("anguler") == "unknown metric 'anguler'; did you mean 'angular'? (known: angular, cosine)"
    assert error({"name": "{x}"}) == "unknown metric '{x}' (known: angular, cosine)"
    assert error({"name": 7}) == "unknown metric '7' (known: angular, cosine)"
    assert error({"token": "all"}) == "a metric needs a name, one of: angular, cosine"
    assert error(["angular"]) == "a metric is a name or a mapping with a name and a token"
    for token in ("first", True, 1.5, None):
        assert error({"name": "cosine", "token": token}) == "token must be last, all or the index of a token"
    assert error({"name": "cosine", "tokens": "all"}) == "Extra inputs are not permitted"


def test_json_schema_lists_every_metric() -> None:
    schema = Recipe.model_json_schema()
    assert schema["properties"]["metrics"]["items"]["anyOf"][0] == {"type": "string", "enum": ["angular", "cosine"]}
    assert schema["$defs"]["Angular"]["properties"]["token"]["description"].startswith("Tokens that count")
    assert schema["$defs"]["Cosine"]["properties"]["token"]["default"] == "all"


def test_imports_no_heavy_library() -> None:
    code = "import sys, layercut.metrics, layercut.calibration; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'layercut'" in loaded
    for heavy in ("torch", "numpy", "transformers", "datasets", "pyarrow", "huggingface_hub"):
        assert f"'{heavy}'" not in loaded
