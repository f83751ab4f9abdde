"""What a result says of its budgets beyond their numbers."""

from __future__ import annotations

import numpy as np

from pipeline.report.result import noise


def test_budgets_are_told_apart_by_paired_differences_over_blocks() -> None:
    hard = np.array([2.0, 3.0, 4.0, 5.0])  # blocks differ far more than budgets do
    steady, wavering = hard - 0.1, hard - 0.1 - np.array([0.2, -0.2, 0.1, -0.08])
    (words,) = noise([3.0, 2.0, 4.0], [steady, hard, wavering])
    assert words.startswith("4 is 0.005 ± 0.090 nats a token better than 3 ")


def test_equal_budgets_and_what_has_no_blocks_are_passed_over() -> None:
    assert noise([2.0, 3.0], [[1.0, 2.0], [1.0, 2.0]]) == noise([2.0, 3.0], [[], []]) == noise([2.0], [[1.0]]) == []
