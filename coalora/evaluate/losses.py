"""Loss and metric of a model on a split, for one configuration or many."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from coalora.adapt.adapted import AdaptedModel
from coalora.data.benchmark import IGNORED, Split
from coalora.errors import CoaloraError


@dataclass(frozen=True)
class Score:
    """Mean loss (nats an example or a token) and the benchmark's metric."""

    loss: float
    metric: float


@torch.no_grad()
def score(adapted: AdaptedModel, split: Split, *, batch_size: int) -> Score:
    """Score the model as it is now: accuracy for classes, bits per byte for text.

    Raises:
        CoaloraError: text of single tokens, of which none is predicted.
    """
    adapted.peft_model.eval()
    total = correct = count = 0.0
    for batch in split.batches(batch_size, adapted.device):
        labels = batch.pop("labels")
        logits = adapted.peft_model(**batch).logits.float()
        if split.labels is None:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total += float(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
        if split.labels is not None:
            correct += int((logits.argmax(-1) == labels).sum())
    if count == 0:
        raise CoaloraError(
            "bits per byte need a text with at least two tokens", got=f"{len(split)} blocks of one token"
        )
    loss = total / count
    return Score(loss, correct / count if split.labels is not None else loss / math.log(2) / split.bytes_per_token)


def score_configurations(
    adapted: AdaptedModel,
    split: Split,
    configurations: np.ndarray,
    *,
    batch_size: int,
    progress: Callable[..., None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(losses (n,), metrics (n,)) of configurations (n, N) on one and the same split: paired by construction."""
    losses, metrics = np.empty(len(configurations)), np.empty(len(configurations))
    for i, configuration in enumerate(configurations):
        with torch.no_grad():
            adapted.switch(configuration)
        result = score(adapted, split, batch_size=batch_size)
        losses[i], metrics[i] = result.loss, result.metric
        if progress:
            progress(i + 1, len(configurations), loss=result.loss)
    return losses, metrics
