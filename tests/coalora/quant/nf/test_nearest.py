"""The table lookup against a search over all entries in float64, on and next to every threshold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coalora.errors import CoaloraError
from coalora.quant.nf.book import nearest_codes, nf_code_book
from coalora.quant.nf.nearest import IntervalTable, decision_thresholds


def counted(thresholds: np.ndarray, x: list[float]) -> list[int]:
    out = torch.empty(len(x), dtype=torch.uint8)
    IntervalTable(thresholds).count_below(torch.tensor(x), out)
    return out.tolist()


@pytest.mark.parametrize("bits", range(2, 9))
def test_nearest_is_exact_on_and_around_every_threshold(bits: int) -> None:
    book = nf_code_book(bits)
    thresholds = decision_thresholds(book)
    up, down = (np.nextafter(thresholds, np.float32(side)) for side in (2, -2))
    random = np.random.default_rng(bits).uniform(-1, 1, 4000).astype(np.float32)
    x = np.concatenate([thresholds, up, down, book, random, np.array([0.0, -0.0, 1e-30, -1e-30], dtype=np.float32)])
    # argmin takes the first of equal distances, the lower entry: the tie rule. Differences of float32 numbers
    # this close are exact in float64.
    distance = np.abs(x[:, None].astype(np.float64) - book.astype(np.float64))
    expected = distance.argmin(axis=1)
    np.testing.assert_array_equal(nearest_codes(torch.from_numpy(x), bits).numpy(), expected)  # a binary search
    np.testing.assert_array_equal(nearest_codes(torch.from_numpy(np.tile(x, 3)), bits).numpy(), np.tile(expected, 3))


def test_a_tie_goes_to_the_lower_entry() -> None:
    book = np.array([-1, -0.5, 0, 0.5, 1], dtype=np.float32)
    assert counted(decision_thresholds(book), [-0.75, -0.25, 0.25, 0.75]) == [0, 1, 2, 3]


def test_thresholds_much_closer_than_the_first_grid_are_told_apart() -> None:
    thresholds = np.array([0.1, 0.10001, 0.10002], dtype=np.float32)
    many = np.concatenate([thresholds, np.linspace(0.2, 0.9, 20, dtype=np.float32)])  # counted by cells
    for given in (thresholds, many):
        assert counted(given, [0.0, 0.100005, 0.100015, 0.15]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "bad", [[], [0.5, 0.5], [0.5, 0.1], [0.5, 1.0], [0.5, float(np.nextafter(np.float32(0.5), 1))]]
)
def test_thresholds_that_no_table_can_hold_are_refused(bad: list[float]) -> None:
    with pytest.raises(CoaloraError, match=r"[Tt]hresholds"):
        IntervalTable(np.array(bad, dtype=np.float32))
