"""Loss and metrics of a model on a split, for one configuration or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from coalora.adapt.adapted import AdaptedModel
from coalora.data.benchmark import IGNORED, Split
from coalora.errors import CoaloraError
from coalora.evaluate.metrics import KL, Kind, Outcome, metrics_of
from coalora.evaluate.reference import Predictions, Reference, divergence


@dataclass(frozen=True)
class Score:
    """Mean loss (nats an example or a token; squared error for values) and every metric that applies.

    Example:
        >>> model.switch(budget=3.5)
        >>> sorted(model.evaluate(search_texts).metrics)
        ['bits_per_byte', 'kl_divergence', 'perplexity', 'top1_agreement']
    """

    loss: float
    metrics: dict[str, float]
    blocks: tuple[float, ...] = ()  # losses of the blocks of a text, where they are asked for

    @property
    def metric(self) -> float:
        """The default metric: accuracy, Pearson's correlation, or bits per byte."""
        return next(iter(self.metrics.values()))


class _Tally:
    """Sums over batches of what a configuration scores.

    Sums and predictions stay on the device until the last batch: no batch waits for the one before it.
    """

    def __init__(self, adapted: AdaptedModel, split: Split, by_block: bool = False) -> None:
        self._adapted, self._split, self._by_block = adapted, split, by_block
        self._blocks: list[Tensor] = []
        self._total = torch.zeros((), dtype=torch.float64, device=adapted.device)
        self._count = torch.zeros((), dtype=torch.int64, device=adapted.device)
        self._predictions: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._n_classes = 0
        self._from_reference: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(self, batch: dict[str, Tensor], reference: Predictions | None) -> None:
        """Score a batch with the model as it is now, beside a reference's predictions where there are any."""
        self._adapted.peft_model.eval()
        labels = batch["labels"]
        logits = self._adapted.peft_model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        if self._split.labels is None:
            own, labels = Predictions.of(logits), labels[:, 1:].flatten()
            self._total += F.nll_loss(own.log_probabilities, labels, ignore_index=IGNORED, reduction="sum")
            self._count += (labels != IGNORED).sum()
            if self._by_block:
                each = F.nll_loss(own.log_probabilities, labels, ignore_index=IGNORED, reduction="none")
                each, counted = (x.view(len(batch["labels"]), -1).sum(1) for x in (each, labels != IGNORED))
                self._blocks.append(each / counted.clamp(min=1))
            if reference is not None:
                nats, same = divergence(own, reference, labels != IGNORED)
                before = self._from_reference or (0.0, 0.0)
                self._from_reference = before[0] + nats, before[1] + same
            return
        logits = logits.float()
        self._n_classes = logits.shape[-1]
        if self._split.labels.is_floating_point():
            found = logits.squeeze(-1)
            self._total += F.mse_loss(found, labels, reduction="sum")
        else:
            found = logits.argmax(-1)
            self._total += F.cross_entropy(logits, labels, reduction="sum")
        self._count += len(labels)
        self._predictions.append(found)
        self._labels.append(labels)

    def score(self) -> Score:
        """Loss and metrics of the batches so far.

        Raises:
            CoaloraError: text of single tokens, of which none is predicted.
        """
        n = int(self._count)
        if n == 0:
            raise CoaloraError(
                f"None of the {len(self._split)} examples has a second token to predict", remedy="Give longer texts"
            )
        beside = {}
        if self._from_reference is not None:
            nats, same = map(float, self._from_reference)
            beside = {"kl": nats / n, "agreement": same / n}
        outcome = Outcome(
            float(self._total) / n,
            _array(self._predictions),
            _array(self._labels),
            bytes_per_token=self._split.bytes_per_token,
            **beside,
        )
        known = metrics_of(_kind(self._split), self._n_classes, reference=self._from_reference is not None)
        blocks = tuple(_array(self._blocks).tolist())
        return Score(outcome.loss, {m.name: m.compute(outcome) for m in known}, blocks)


def score(adapted: AdaptedModel, split: Split, *, batch_size: int) -> Score:
    """Score the model as it is now.

    Raises:
        CoaloraError: text of single tokens, of which none is predicted.
    """
    tally = _Tally(adapted, split)
    for batch in split.batches(batch_size, adapted.device):
        tally.add(batch, None)
    return tally.score()


def scores(
    adapted: AdaptedModel,
    split: Split,
    configurations: np.ndarray,
    *,
    batch_size: int,
    reference: Reference | None = None,
    by_block: bool = False,
) -> Iterator[Score]:
    """Scores of configurations (n, N) on one and the same split, one by one: paired by construction.

    A score depends on its own configuration alone, bit for bit, and not on those before it. A reference computes each
    batch once for all of them; where its predictions take much memory, configurations are switched to several times.

    Args:
        reference: what KL divergence and agreement of a language model are measured against; None leaves them out, as
            classes do.
        by_block: of text also the loss of every block, the longest first.
    """
    batches, done, n_batches = split.batches(batch_size, adapted.device), 0, -(-len(split) // batch_size)
    tallies = [_Tally(adapted, split, by_block) for _ in configurations]
    while tallies and done < n_batches:
        if reference is None or split.labels is not None:
            group: list[tuple[dict[str, Tensor], Predictions | None]] = [(batch, None) for batch in batches]
        else:
            with torch.no_grad():
                group = reference.with_predictions(adapted, batches)
        done += len(group)
        for tally, configuration in zip(tallies, configurations, strict=True):
            with torch.no_grad():
                adapted.switch(configuration)
            for batch, wanted in group:
                tally.add(batch, wanted)
            if done == n_batches:
                yield tally.score()


def measure_configurations(
    adapted: AdaptedModel,
    split: Split,
    configurations: np.ndarray,
    *,
    batch_size: int,
    reference: Reference | None = None,
    by_block: bool = False,
    progress: Callable[..., None] | None = None,
) -> list[Score]:
    """All of `scores`; `progress` listens to (done, total, loss=...)."""
    found: list[Score] = []
    options: dict[str, Any] = {"batch_size": batch_size, "reference": reference, "by_block": by_block}
    for one in scores(adapted, split, configurations, **options):
        found.append(one)
        if progress:
            progress(len(found), len(configurations), loss=one.loss)
    return found


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
        reference: its KL divergence is what is measured, in place of the task's loss, where one is given.

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
    reference: Reference | None = None

    def __call__(self, configurations: np.ndarray, what: str) -> np.ndarray:
        told = self.progress(what) if self.progress else None
        memo = self.memo(what, len(configurations)) if self.memo else None
        losses = list(memo.values) if memo else []
        try:
            left = configurations[len(losses) :]
            for found in scores(self.adapted, self.split, left, batch_size=self.batch_size, reference=self.reference):
                losses.append(found.loss if self.reference is None else found.metrics[KL])
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
