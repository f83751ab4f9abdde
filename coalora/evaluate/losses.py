"""Loss and metrics of a model on a split, for one configuration or many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from coalora.adapt.adapted import AdaptedModel
from coalora.data.benchmark import IGNORED, Split
from coalora.errors import CoaloraError
from coalora.evaluate.metrics import Kind, Outcome, metrics_of


@dataclass(frozen=True)
class Score:
    """Mean loss (nats an example or a token; squared error for values) and every metric that applies."""

    loss: float
    metrics: dict[str, float]

    @property
    def metric(self) -> float:
        """The default metric: accuracy, Pearson's correlation, or bits per byte."""
        return next(iter(self.metrics.values()))


@torch.no_grad()
def score(adapted: AdaptedModel, split: Split, *, batch_size: int) -> Score:
    """Score the model as it is now.

    Sums and predictions stay on the device until the last batch: no batch waits for the one before it.

    Raises:
        CoaloraError: text of single tokens, of which none is predicted.
    """
    adapted.peft_model.eval()
    total = torch.zeros((), dtype=torch.float64, device=adapted.device)
    count = torch.zeros((), dtype=torch.int64, device=adapted.device)
    predictions: list[Tensor] = []
    references: list[Tensor] = []
    n_classes = 0
    for batch in split.batches(batch_size, adapted.device):
        labels = batch.pop("labels")
        logits = adapted.peft_model(**batch).logits.float()
        if split.labels is None:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            total += F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            count += (labels != IGNORED).sum()
            continue
        n_classes = logits.shape[-1]
        if split.labels.is_floating_point():
            found = logits.squeeze(-1)
            total += F.mse_loss(found, labels, reduction="sum")
        else:
            found = logits.argmax(-1)
            total += F.cross_entropy(logits, labels, reduction="sum")
        count += len(labels)
        predictions.append(found)
        references.append(labels)
    n = int(count)
    if n == 0:
        raise CoaloraError(
            "bits per byte need a text with at least two tokens", got=f"{len(split)} blocks of one token"
        )
    outcome = Outcome(float(total) / n, _array(predictions), _array(references), bytes_per_token=split.bytes_per_token)
    return Score(outcome.loss, {m.name: m.compute(outcome) for m in metrics_of(_kind(split), n_classes)})


def measure_configurations(
    adapted: AdaptedModel,
    split: Split,
    configurations: np.ndarray,
    *,
    batch_size: int,
    progress: Callable[..., None] | None = None,
) -> list[Score]:
    """Scores of configurations (n, N) on one and the same split: paired by construction.

    A score depends on its own configuration alone, bit for bit, and not on those before it.
    """
    scores = []
    for i, configuration in enumerate(configurations):
        with torch.no_grad():
            adapted.switch(configuration)
        scores.append(score(adapted, split, batch_size=batch_size))
        if progress:
            progress(i + 1, len(configurations), loss=scores[-1].loss)
    return scores


def score_configurations(
    adapted: AdaptedModel,
    split: Split,
    configurations: np.ndarray,
    *,
    batch_size: int,
    progress: Callable[..., None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(losses (n,), default metrics (n,)) of `measure_configurations`."""
    scores = measure_configurations(adapted, split, configurations, batch_size=batch_size, progress=progress)
    return np.array([s.loss for s in scores], dtype=float), np.array([s.metric for s in scores], dtype=float)


def _kind(split: Split) -> Kind:
    if split.labels is None:
        return "text"
    return "values" if split.labels.is_floating_point() else "classes"


def _array(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).cpu().numpy() if parts else np.empty(0)
