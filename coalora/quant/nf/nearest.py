"""Nearest entry of a sorted code book, exactly, in a constant number of passes over the data.

Two ways to count how many decision thresholds lie below a number, both exact:

- Few thresholds (2 to 4 bits) on a CPU: one vectorised comparison for each of them. A pass that stays in the cache
  costs 0.15 ms for a million numbers on one core.
- Otherwise cut [-1, 1] into ``S`` equal cells, S large enough that no cell holds two thresholds: the cell of ``x`` is
  one multiply-add, and one comparison with the only threshold of that cell tells the rest (2 to 3 ms, for any width;
  a binary search takes 11 to 56 ms).

The cells are exact because the cell number is a monotone function of ``x`` and is computed for thresholds and data by
the same arithmetic: thresholds in lower cells are below ``x``, those in higher cells above. (S is a power of two,
so that the multiplication is exact, and fusing it with the addition changes nothing.)
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coalora.errors import CoaloraError

_MAX_CELLS = 2**22
_FEW = 16  # thresholds; from here on the table is faster


def decision_thresholds(book: NDArray[np.float32]) -> NDArray[np.float32]:
    """Thresholds between the entries of an ascending code book (n,): float32 (n-1,).

    Threshold j is the largest float32 that is not above the exact midpoint of entries j and j+1, so that
    ``x > threshold`` holds just where entry j+1 is strictly nearer: a tie goes to the lower entry.
    """
    # The sum of two float32 numbers of like magnitude is exact in float64.
    exact = (book[1:].astype(np.float64) + book[:-1].astype(np.float64)) / 2
    rounded = exact.astype(np.float32)
    below = np.nextafter(rounded, np.float32(-np.inf), dtype=np.float32)
    return np.where(rounded.astype(np.float64) > exact, below, rounded)


class IntervalTable:
    """Sorted thresholds, and how many of them lie below numbers; on a CPU.

    Args:
        thresholds: float32 (n,), strictly ascending, inside (-1, 1); at most 255.
    """

    def __init__(self, thresholds: NDArray[np.float32]) -> None:
        if not 0 < len(thresholds) < 256 or np.any(np.diff(thresholds) <= 0) or np.any(np.abs(thresholds) >= 1):
            raise CoaloraError(f"The thresholds {thresholds} are not at most 255 that ascend strictly inside (-1, 1)")
        cells = 64
        while len(np.unique(_cells(torch.from_numpy(thresholds), cells).numpy())) < len(thresholds):
            cells *= 2
            if cells > _MAX_CELLS:
                raise CoaloraError(
                    f"Thresholds lie {np.diff(thresholds).min()} apart, closer than a table can tell ({2 / _MAX_CELLS})"
                )
        occupied = _cells(torch.from_numpy(thresholds), cells).numpy()
        bound = np.full(cells + 1, np.inf, dtype=np.float32)
        bound[occupied] = thresholds
        self.thresholds = thresholds
        self._n_cells = cells
        self._bound = torch.from_numpy(bound)
        below = np.searchsorted(occupied, np.arange(cells + 1), side="left")
        self._below = torch.from_numpy(below.astype(np.uint8))

    def count_below(self, x: Tensor, out: Tensor) -> None:
        """Number of thresholds below each of ``x``: uint8 into ``out`` (m,).

        Args:
            x: float32 (m,) without NaN (the hot path: not checked); overwritten.
        """
        # NumPy's comparisons of float32 are vectorised, torch's with a bool result are not: 0.1 against 0.7 ms for a
        # million numbers.
        values, counts = x.numpy(), out.numpy()
        above = np.empty(len(values), dtype=np.bool_)
        if len(self.thresholds) < _FEW:
            np.greater(values, self.thresholds[0], out=counts.view(np.bool_))
            for threshold in self.thresholds[1:]:
                np.greater(values, threshold, out=above)
                np.add(counts, above.view(np.uint8), out=counts)
            return
        cell = _cells(x.clamp_(-1, 1), self._n_cells)
        np.greater(values, self._bound.index_select(0, cell).numpy(), out=above)
        torch.index_select(self._below, 0, cell, out=out)
        np.add(counts, above.view(np.uint8), out=counts)


def _cells(x: Tensor, n_cells: int) -> Tensor:
    half = n_cells / 2
    return x.mul(half).add_(half).to(torch.int32)
