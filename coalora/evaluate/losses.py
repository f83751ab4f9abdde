"""Loss and metrics of a model on a split, for one configuration or many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

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
    """Mean loss (nats an example or a token; squared error for values) and every metric that applies.

    Example:
        >>> model.switch(budget=3.5)
        >>> sorted(model.evaluate(search_texts).metrics)
        ['bits_per_byte', 'perplexity']
    """

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
            f"None of the {len(split)} examples has a second token to predict", remedy="Give longer texts"
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


class Memo(Protocol):
    """Losses that a loop has found so far, kept by its caller: a loop that was killed does not measure them again."""

    values: list[float]

    def add(self, value: float) -> None:
        """One more loss."""

    def save(self) -> None:
        """The loop ends, by itself or by an exception."""


@dataclass(frozen=True)
class LossMeter:
    """Losses of configurations on one and the same split: `meter(configurations (n, N), what) -> (n,)`.

    Args:
        adapted: the model; it is left at the last configuration.
        split: the examples.
        progress: makes a listener (done, total, loss=...) for what is measured.
        memo: makes the memory (what, number of losses) of a loop.

    Example:
        >>> from coalora import LossMeter
        >>> meter = LossMeter(model.adapted, model.split(search_texts), batch_size=8)
        >>> meter(model.members.configurations[:2], "two members").shape
        (2,)
    """

    adapted: AdaptedModel
    split: Split
    batch_size: int
    progress: Callable[[str], Callable[..., None]] | None = None
    memo: Callable[[str, int], Memo] | None = None

    def __call__(self, configurations: np.ndarray, what: str) -> np.ndarray:
        told = self.progress(what) if self.progress else None
        memo = self.memo(what, len(configurations)) if self.memo else None
        losses = list(memo.values) if memo else []
        try:
            for row in configurations[len(losses) :]:
                (found,) = measure_configurations(self.adapted, self.split, row[None], batch_size=self.batch_size)
                losses.append(found.loss)
                if memo:
                    memo.add(losses[-1])
                if told:
                    told(len(losses), len(configurations), loss=losses[-1])
        finally:
            if memo:
                memo.save()
        return np.array(losses, dtype=float)


def _kind(split: Split) -> Kind:
    if split.labels is None:
        return "text"
    return "values" if split.labels.is_floating_point() else "classes"


def _array(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).cpu().numpy() if parts else np.empty(0)
