"""Metrics by their names: how a recipe spells them, their labels, schema and messages."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from layercut.metric import TokenMetric
from layercut.metrics import CKA, METRICS, Angular, Cosine, Euclidean, Linear, MetricSpec, Procrustes, RelativeMagnitude


class Recipe(BaseModel):
    metric: MetricSpec | None = None
    metrics: tuple[MetricSpec, ...] = ()


def error(value: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"metric": value})
    assert caught.value.error_count() == 1
    return str(caught.value.errors()[0]["msg"])


NAMES = ["angular", "cosine", "relative_magnitude", "euclidean", "linear", "procrustes", "cka"]
KNOWN = ", ".join(NAMES)


def test_labels_and_default_tokens() -> None:
    labels = ["angular[last]", "cosine[all]", "relative_magnitude[all]", "euclidean[all]"]
    labels += ["linear[skip-first-1]", "procrustes[skip-first-1]", "cka[skip-first-1]"]
    assert [metric().label for metric in METRICS.values()] == labels  # type: ignore[call-arg]
    assert Angular(token=-3).label == "angular[-3]"
    assert Euclidean(normalised=True, token="skip-first-4").label == "euclidean[skip-first-4, normalised]"
    assert Linear(token="all", draw=64, ridge=1).label == "linear[all, draw=64, ridge=1.0]"
    assert CKA(normalised=False).label == "cka[skip-first-1, normalised=false]"
    assert Procrustes(draw=256).label == "procrustes[skip-first-1]"
    assert list(METRICS) == NAMES


def test_every_metric_documents_itself() -> None:
    for metric in METRICS.values():
        text = metric.__doc__ or ""
        for word in ("Range", "Small means", "arXiv", "Unchanged by", "Other tools"):
            assert word in text, f"{metric.__name__}: {word}"


def test_a_metric_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Angular().token = "all"  # type: ignore[misc]


def test_a_kind_of_metric_alone_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        TokenMetric(name="angular")  # type: ignore[abstract]


def test_recipe_spellings() -> None:
    metrics = [{"name": "angular", "token": "all"}, "angular", {"name": "cosine", "token": -2}]
    recipe = Recipe.model_validate({"metric": "cosine", "metrics": metrics})
    assert recipe.metric == Cosine()
    assert recipe.metrics == (Angular(token="all"), Angular(), Cosine(token=-2))
    assert Recipe(metrics=(Angular(token=4),)).metrics[0].label == "angular[4]"


def test_tokens_of_a_recipe() -> None:
    for token in ("last", "all", "completion", "skip-first-0", "skip-first-12", 3, -1):
        assert Recipe.model_validate({"metric": {"name": "relative_magnitude", "token": token}}).metric == RelativeMagnitude(token=token)


def test_recipe_round_trip() -> None:
    recipe = Recipe(metric=Angular(token=3), metrics=(Cosine(),))
    assert recipe.model_dump(mode="json") == {"metric": {"name": "angular", "token": 3}, "metrics": [{"name": "cosine", "token": "all"}]}
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_messages() -> None:
    assert error("anguler") == f"unknown metric 'anguler'; did you mean 'angular'? (known: {KNOWN})"
    assert error({"name": "{x}"}) == f"unknown metric '{{x}}' (known: {KNOWN})"
    assert error({"name": 7}) == f"unknown metric '7' (known: {KNOWN})"
    assert error({"token": "all"}) == f"a metric needs a name, one of: {KNOWN}"
    assert error(["angular"]) == "a metric is a name or a mapping with a name and a token"
    for token in ("first", True, 1.5, None, "skip-first", "skip-first--1", "skip-first-4 "):
        assert error({"name": "cosine", "token": token}) == (
            "token must be last, all, completion, skip-first-K such as skip-first-4, or the index of a token"
        )
    assert error({"name": "cosine", "tokens": "all"}) == "Extra inputs are not permitted"


def test_json_schema_lists_every_metric() -> None:
    schema = Recipe.model_json_schema()
    assert schema["properties"]["metrics"]["items"]["anyOf"][0] == {"type": "string", "enum": NAMES}
    assert schema["$defs"]["Angular"]["properties"]["token"]["description"].startswith("Tokens that count")
    assert schema["$defs"]["Cosine"]["properties"]["token"]["default"] == "all"


def test_options_of_metrics_of_many_tokens() -> None:
    metrics = [{"name": "cka", "draw": 64}, {"name": "linear", "ridge": 0.01}, "procrustes"]
    assert Recipe.model_validate({"metrics": metrics}).metrics == (CKA(draw=64), Linear(ridge=0.01), Procrustes())
    assert error({"name": "cka", "draw": 8}) == "Input should be greater than or equal to 16"
    assert error({"name": "cka", "draw": 1 << 20}) == "Input should be less than or equal to 16384"
    assert error({"name": "linear", "ridge": 0}) == "Input should be greater than or equal to 0.000001"
    assert error({"name": "cka", "ridge": 1}) == "Extra inputs are not permitted"


def test_imports_no_heavy_library() -> None:
    code = "import sys, layercut.metrics, layercut.calibration; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'layercut'" in loaded
    for heavy in ("torch", "numpy", "transformers", "datasets", "pyarrow", "huggingface_hub"):
        assert f"'{heavy}'" not in loaded
