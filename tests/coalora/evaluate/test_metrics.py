"""Metrics equal scikit-learn's and scipy's, and have a finite value where those are undefined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from coalora.errors import CoaloraError
from coalora.evaluate.metrics import METRICS, Outcome, get_metric, kind_of, metrics_of, reported_metrics


def value(name: str, predictions: object, labels: object) -> float:
    return METRICS[name].compute(Outcome(0.0, np.array(predictions), np.array(labels)))


def draws(n_classes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random answers, right ones, wrong ones, constants, one class only, a class that never occurs."""
    rng = np.random.default_rng(n_classes)
    labels = rng.integers(n_classes, size=50)
    one = np.ones(50, dtype=np.int64)
    found = [rng.integers(n_classes, size=50), labels, (labels + 1) % n_classes, one, 0 * one]
    return [(f, t) for f in found for t in (labels, one, 0 * one)] + [(one[:1], one[:1]), (0 * one[:1], one[:1])]


@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")  # of the expected value, not of ours
@pytest.mark.parametrize("n_classes", [2, 3, 7])
def test_metrics_of_classes_are_scikit_learns(n_classes: int) -> None:
    for predictions, labels in draws(n_classes):
        given = (predictions, labels)
        assert value("accuracy", *given) == pytest.approx(accuracy_score(labels, predictions))
        assert value("matthews_correlation", *given) == pytest.approx(matthews_corrcoef(labels, predictions))
        macro = f1_score(labels, predictions, average="macro", zero_division=0)
        assert value("macro_f1", *given) == pytest.approx(macro)
        if n_classes == 2:
            assert value("f1", *given) == pytest.approx(f1_score(labels, predictions, zero_division=0))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_correlations_are_scipys(ties: bool, dtype: type) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    y = x**3 + rng.normal(size=200)
    x, y = ((np.round(v, 0) if ties else v).astype(dtype) for v in (x, y))
    assert value("pearson", x, y) == pytest.approx(pearsonr(x.astype(float), y.astype(float)).statistic)
    assert value("spearman", x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert value("spearman", np.exp(x), x) == pytest.approx(1)
    assert value("pearson", 3 - 2 * x, x) == pytest.approx(-1)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize(
    ("predictions", "labels"), [([0.1] * 7, [1.0, 2, 3, 4, 5, 6, 7]), ([1.0, 2, 3], [0.3] * 3), ([1.0], [2.0])]
)
def test_a_constant_correlates_with_nothing(name: str, predictions: list[float], labels: list[float]) -> None:
    assert value(name, predictions, labels) == 0.0


def test_correlations_of_tiny_and_huge_values_stay_finite() -> None:
    x = np.array([1.0, 2, 4, 8])
    for scale in (1e-200, 1e200):
        assert value("pearson", x * scale, x) == pytest.approx(1)


def test_text_is_measured_by_perplexity_and_bits_per_byte() -> None:
    outcome = Outcome(math.log(8), np.empty(0), np.empty(0), bytes_per_token=4)
    assert METRICS["perplexity"].compute(outcome) == pytest.approx(8)
    assert METRICS["bits_per_byte"].compute(outcome) == pytest.approx(3 / 4)
    assert math.isfinite(METRICS["perplexity"].compute(Outcome(1e6, np.empty(0), np.empty(0))))


def test_each_kind_has_its_metrics_the_default_first() -> None:
    names = {(k, n): [m.name for m in metrics_of(k, n)] for k, n in [("classes", 2), ("classes", 3), ("values", 1)]}
    assert names["classes", 2] == ["accuracy", "f1", "macro_f1", "matthews_correlation"]
    assert names["classes", 3] == ["accuracy", "macro_f1", "matthews_correlation"]
    assert names["values", 1] == ["pearson", "spearman"]
    assert [m.name for m in metrics_of("text", None, reference=False)] == ["bits_per_byte", "perplexity"]
    beside = ["kl_divergence", "top1_agreement"]
    assert [m.name for m in metrics_of("text", None)] == ["bits_per_byte", "perplexity", *beside]
    assert [m.higher_is_better for m in METRICS.values() if m.kind == "text"] == [False, False, False, True]
    assert all(m.higher_is_better for m in METRICS.values() if m.kind != "text")


def test_the_task_and_its_labels_tell_what_is_predicted() -> None:
    kinds = [kind_of("classification", 2), kind_of("classification", 1), kind_of("language-modeling", None)]
    assert kinds == ["classes", "values", "text"]


def test_a_report_begins_with_the_headline_and_names_each_metric_once() -> None:
    def names(*given: object) -> list[str]:
        return [m.name for m in reported_metrics(*given)]  # type: ignore[arg-type]

    assert names("classification", 2) == ["accuracy", "f1", "macro_f1", "matthews_correlation"]
    assert names("classification", 2, "f1") == ["f1", "accuracy", "macro_f1", "matthews_correlation"]
    assert names("classification", 2, "f1", ["accuracy", "f1"]) == ["f1", "accuracy"]
    assert names("classification", 1, None, []) == ["pearson"]


@pytest.mark.parametrize(
    ("name", "kind", "num_labels"),
    [("f1", "classes", 3), ("accuracy", "values", 1), ("pearson", "classes", 2), ("acuracy", "classes", 2)],
)
def test_a_metric_that_does_not_apply_is_refused_with_those_that_do(name: str, kind: str, num_labels: int) -> None:
    with pytest.raises(CoaloraError, match=rf"^'{name}' is no metric for {kind}.*Choose one of (accuracy|pearson), "):
        get_metric(name, kind, num_labels)  # type: ignore[arg-type]
