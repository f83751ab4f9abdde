"""Metrics by name: those of GLUE (arXiv 1804.07461) for classes and values, perplexity and bits per byte for text.

What is undefined has a value all the same, because a report holds finite numbers only: F1 without a positive example
or prediction, Matthews' correlation of a constant and Pearson's or Spearman's of a constant are 0, as a guess is worth
nothing (scikit-learn's convention for the first two; scipy answers NaN to the others).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from coalora.errors import CoaloraError

if TYPE_CHECKING:
    from coalora.models.loading import Task

Kind = Literal["classes", "values", "text"]


@dataclass(frozen=True)
class Outcome:
    """What a model did on a split.

    Attributes:
        loss: mean loss (cross-entropy in nats an example or a token; squared error for values).
        predictions, labels: (n,) classes or values; empty for text.
        n_classes: number of classes; 1 for values, 0 for text.
        bytes_per_token: UTF-8 bytes that a token of text stands for.
    """

    loss: float
    predictions: np.ndarray
    labels: np.ndarray
    n_classes: int
    bytes_per_token: float = 1.0


@dataclass(frozen=True)
class Metric:
    """A named number of an `Outcome`; `binary`: for two classes only, of which 1 is the positive one."""

    name: str
    kind: Kind
    higher_is_better: bool
    compute: Callable[[Outcome], float]
    binary: bool = False


METRICS: dict[str, Metric] = {}


def _metric(
    name: str, kind: Kind, *, higher_is_better: bool = True, binary: bool = False
) -> Callable[[Callable[[Outcome], float]], Callable[[Outcome], float]]:
    """Register a metric. Of each kind, the first one is the default."""

    def register(compute: Callable[[Outcome], float]) -> Callable[[Outcome], float]:
        METRICS[name] = Metric(name, kind, higher_is_better, compute, binary)
        return compute

    return register


@_metric("accuracy", "classes")
def _accuracy(outcome: Outcome) -> float:
    return float((outcome.predictions == outcome.labels).mean())


@_metric("f1", "classes", binary=True)
def _f1(outcome: Outcome) -> float:
    return float(_f1_by_class(outcome)[1])


@_metric("macro_f1", "classes")
def _macro_f1(outcome: Outcome) -> float:
    """Mean over the classes that occur among labels or predictions."""
    table = _confusion(outcome)
    return float(_f1_by_class(outcome)[(table.sum(0) + table.sum(1)) > 0].mean())


@_metric("matthews_correlation", "classes")
def _matthews_correlation(outcome: Outcome) -> float:
    """R_K of Gorodkin (2004), which for two classes is Matthews' correlation coefficient."""
    table = _confusion(outcome).astype(np.float64)
    true, predicted, n = table.sum(1), table.sum(0), table.sum()
    covariance = table.trace() * n - true @ predicted
    scale = (n**2 - predicted @ predicted) * (n**2 - true @ true)
    return float(covariance / math.sqrt(scale)) if scale > 0 else 0.0


@_metric("pearson", "values")
def _pearson(outcome: Outcome) -> float:
    return _correlation(outcome.predictions, outcome.labels)


@_metric("spearman", "values")
def _spearman(outcome: Outcome) -> float:
    """Pearson's correlation of the ranks; ties share their mean rank."""
    from scipy.stats import rankdata  # half a second, which settings that only name metrics should not pay

    return _correlation(rankdata(outcome.predictions), rankdata(outcome.labels))


@_metric("bits_per_byte", "text", higher_is_better=False)
def _bits_per_byte(outcome: Outcome) -> float:
    return outcome.loss / math.log(2) / outcome.bytes_per_token


@_metric("perplexity", "text", higher_is_better=False)
def _perplexity(outcome: Outcome) -> float:
    return perplexity(outcome.loss)


def perplexity(loss: float) -> float:
    """exp of nats a token; depends on the tokenizer, as bits per byte do not."""
    return math.exp(min(loss, 700.0))  # the next larger powers of e are no floats


def kind_of(task: Task, num_labels: int | None) -> Kind:
    """What a benchmark's model predicts; a classification with one label is a regression, as in transformers."""
    if task == "language-modeling":
        return "text"
    return "values" if num_labels == 1 else "classes"


def metrics_of(kind: Kind, num_labels: int | None) -> list[Metric]:
    """The metrics that apply, the default first."""
    return [m for m in METRICS.values() if m.kind == kind and (num_labels == 2 or not m.binary)]


def get_metric(name: str | None, kind: Kind, num_labels: int | None) -> Metric:
    """The metric `name`, or for None the default of the kind.

    Raises:
        CoaloraError: no such metric, or none for what the model predicts.
    """
    known = {metric.name: metric for metric in metrics_of(kind, num_labels)}
    if name is None:
        return next(iter(known.values()))
    if name not in known:
        classes = f" ({num_labels})" if kind == "classes" else ""
        raise CoaloraError(
            f"the metric must be one for {kind}{classes}",
            got=name,
            expected=", ".join(known),
            remedy="set benchmark.metric to one of these, or leave it out",
        )
    return known[name]


def reported_metrics(
    task: Task, num_labels: int | None, headline: str | None = None, further: Sequence[str] | None = None
) -> list[Metric]:
    """The metrics of a report, the headline first; None is the default headline, and all that apply.

    Raises:
        CoaloraError: as `get_metric` does.
    """
    kind = kind_of(task, num_labels)
    first = get_metric(headline, kind, num_labels)
    others = metrics_of(kind, num_labels) if further is None else [get_metric(n, kind, num_labels) for n in further]
    return list({metric.name: metric for metric in [first, *others]}.values())


def _confusion(outcome: Outcome) -> np.ndarray:
    """(n_classes, n_classes) counts: rows are labels, columns predictions."""
    n = outcome.n_classes
    return np.bincount(outcome.labels * n + outcome.predictions, minlength=n * n).reshape(n, n)


def _f1_by_class(outcome: Outcome) -> np.ndarray:
    table = _confusion(outcome)
    both = table.sum(0) + table.sum(1)  # 2 TP + FP + FN
    return np.divide(2 * table.diagonal(), both, out=np.zeros(len(table)), where=both > 0)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    # A constant is compared as it is: its mean may differ from it by rounding, which would pass for variance.
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    x, y = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (x, y))
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip((x @ y) / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0))
