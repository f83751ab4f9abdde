"""Metrics by name: those of GLUE (arXiv 1804.07461) for classes and values; perplexity and bits per byte for text, and
KL divergence from a full-precision reference with the share of tokens that both find most likely.

What is undefined has a value all the same, because a report holds finite numbers only: F1 without a positive example
or prediction, Matthews' correlation of a constant and Pearson's or Spearman's of a constant are 0, as a guess is worth
nothing (scikit-learn's convention for the first two; scipy answers NaN to the others). Both packages are
imported by the metrics that need them: a second or two, which settings that only name metrics should not pay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from coalora.errors import CoaloraError

if TYPE_CHECKING:
    from coalora.recipes import Goal, Task

Kind = Literal["classes", "values", "text"]
KL, AGREEMENT = "kl_divergence", "top1_agreement"


@dataclass(frozen=True)
class Outcome:
    """Loss and predictions of a model on a split.

    Attributes:
        loss: mean loss (cross-entropy in nats an example or a token; squared error for values).
        predictions, labels: (n,) classes or values; empty for text.
        bytes_per_token: UTF-8 bytes that a token of text stands for.
        kl, agreement: of text beside a full-precision reference (`coalora.evaluate.reference`).
    """

    loss: float
    predictions: np.ndarray
    labels: np.ndarray
    bytes_per_token: float = 1.0
    kl: float = 0.0
    agreement: float = 1.0


@dataclass(frozen=True)
class Metric:
    """A named number of an `Outcome`; `binary`: for two classes only, of which 1 is the positive one; `beside`: where a
    reference was measured beside it."""

    name: str
    kind: Kind
    higher_is_better: bool
    compute: Callable[[Outcome], float]
    binary: bool = False
    beside: bool = False


def perplexity(loss: float) -> float:
    """exp of nats a token; depends on the tokenizer, as bits per byte do not."""
    return math.exp(min(loss, 700.0))  # the next larger powers of e are no floats


def _f1(outcome: Outcome, average: str) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(outcome.labels, outcome.predictions, average=average, zero_division=0))


def _matthews_correlation(outcome: Outcome) -> float:
    """R_K of Gorodkin (2004), which for two classes is Matthews' correlation coefficient."""
    from sklearn.metrics import matthews_corrcoef

    if len(np.union1d(outcome.labels, outcome.predictions)) < 2:
        return 0.0  # scikit-learn's answer, too, but it warns
    return float(matthews_corrcoef(outcome.labels, outcome.predictions))


def _correlation(outcome: Outcome, name: str) -> float:
    from scipy import stats

    x, y = (np.asarray(values, dtype=np.float64) for values in (outcome.predictions, outcome.labels))
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    return float(getattr(stats, name)(x, y).statistic)


# Of each kind, the first one is the default. Macro F1 is the mean over the classes that occur among labels or
# predictions; Spearman's is Pearson's correlation of the ranks, of which ties share their mean.
METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "classes", True, lambda outcome: float((outcome.predictions == outcome.labels).mean())),
        Metric("f1", "classes", True, lambda outcome: _f1(outcome, "binary"), binary=True),
        Metric("macro_f1", "classes", True, lambda outcome: _f1(outcome, "macro")),
        Metric("matthews_correlation", "classes", True, _matthews_correlation),
        Metric("pearson", "values", True, lambda outcome: _correlation(outcome, "pearsonr")),
        Metric("spearman", "values", True, lambda outcome: _correlation(outcome, "spearmanr")),
        Metric("bits_per_byte", "text", False, lambda o: o.loss / math.log(2) / o.bytes_per_token),
        Metric("perplexity", "text", False, lambda outcome: perplexity(outcome.loss)),
        Metric(KL, "text", False, lambda outcome: outcome.kl, beside=True),
        Metric(AGREEMENT, "text", True, lambda outcome: outcome.agreement, beside=True),
    )
}


def kind_of(task: Task, num_labels: int | None) -> Kind:
    """Kind of a benchmark's predictions; a classification with one label is a regression, as in transformers."""
    if task == "language-modeling":
        return "text"
    return "values" if num_labels == 1 else "classes"


def metrics_of(kind: Kind, num_labels: int | None, *, reference: bool = True) -> list[Metric]:
    """The metrics that apply, the default first; `reference`: whether one was measured beside the model."""
    known = [m for m in METRICS.values() if m.kind == kind and (num_labels == 2 or not m.binary)]
    return [m for m in known if reference or not m.beside]


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
            f"{name!r} is no metric for {kind}{classes}",
            remedy=f"Choose one of {', '.join(known)}, or name none for the first of them",
        )
    return known[name]


def reported_metrics(
    task: Task,
    num_labels: int | None,
    headline: str | None = None,
    further: Sequence[str] | None = None,
    *,
    goal: Goal = "fine-tune",
) -> list[Metric]:
    """The metrics of a report, the headline first; None is the default headline (to recover, KL divergence), and all
    that apply.

    Raises:
        CoaloraError: as `get_metric` does.
    """
    kind = kind_of(task, num_labels)
    first = get_metric(headline or (KL if goal == "recover" else None), kind, num_labels)
    others = metrics_of(kind, num_labels) if further is None else [get_metric(n, kind, num_labels) for n in further]
    return list({metric.name: metric for metric in [first, *others]}.values())
