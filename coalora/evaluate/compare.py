"""Comparison of methods over a set of configurations: hypervolumes on one scale.

Hypervolume of (validation loss, cost), both minimised; by default the cost is average bits. The scale depends on the
benchmark and the choice space alone, so that values compare between methods, runs and versions: the ideal is a loss of
zero at the space's smallest cost, the reference point the loss of a guess at its largest: a uniform one (ln of the
number of classes, or of tokens), or for a regression the labels' mean (their variance). To recover, the loss is the
KL divergence from the base, of which a uniform guess has at most as much. A value is the dominated
fraction of the rectangle between them; a configuration worse than guessing adds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from coalora.data.benchmark import Split
from coalora.recipes import Goal
from coalora.search.pareto import normalized_hypervolume


def normalization(cost: str, goal: Goal = "fine-tune") -> str:
    """The scale in words; `cost` as in "average bits"."""
    loss, guess = ("KL divergence", "ln of the vocabulary") if goal == "recover" else ("loss", "the loss of a guess")
    return f"fraction of the rectangle between zero {loss} at the space's smallest {cost} and {guess} at its largest"


@dataclass(frozen=True)
class Comparison:
    """Hypervolume of each method, with the rectangle that they share: (loss, cost) corners."""

    values: dict[str, float]
    ideal: tuple[float, float]
    ref_point: tuple[float, float]


def compare(
    losses: Mapping[str, np.ndarray], costs: np.ndarray, *, cost_range: tuple[float, float], guess_loss: float
) -> Comparison:
    """Hypervolumes of methods measured on the same configurations.

    Args:
        losses: method -> (n,) validation losses.
        costs: (n,) of the same configurations: average bits, or what else the run's budgets count.
        cost_range: smallest and largest cost of the space.
        guess_loss: loss of a guess.
    """
    ideal = (0.0, cost_range[0])
    ref_point = (guess_loss, cost_range[1])
    values = {
        method: normalized_hypervolume(np.column_stack([loss, costs]), ideal, ref_point)
        for method, loss in losses.items()
    }
    return Comparison(values, ideal, ref_point)


def guess_loss(split: Split, n_outcomes: int) -> float:
    """Loss of a guess on `split`: uniform among `n_outcomes` classes or tokens, or the mean of its values."""
    if split.labels is not None and split.labels.is_floating_point():
        return float(split.labels.double().var(correction=0))
    return math.log(n_outcomes)
