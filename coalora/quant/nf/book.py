"""NormalFloat code books and the nearest entry in them.

A b-bit code book holds quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, arXiv 2305.14314,
section 3): ``2^(b-1)`` of them at equal steps of probability from ``1-d`` to 1/2 and ``2^(b-1)+1`` from 1/2
to ``d``, the shared 1/2 (zero) once, scaled so that the ends are -1 and +1.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.quant.nf.nearest import IntervalTable, decision_thresholds

_SMALL = 2**13  # numbers: from here on the passes of a table are faster than a binary search
NF_QUANTILE = 0.9677083  # d: the outermost quantile, QLoRA's constant


@cache
def nf_code_book(bits: int) -> NDArray[np.float32]:
    """The NormalFloat code book: float32 (2**bits,), ascending from -1 to 1 through an exact 0, read-only.

    Computed in float64. Four bits is NF4, the table of bitsandbytes, to 2e-7.

    Raises:
        CoaloraError: ``bits`` is not 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise CoaloraError(f"There is no NormalFloat code of {bits} bits", remedy="Take 2 to 8 bits")
    half = 2 ** (bits - 1)
    probabilities = np.concatenate(
        [np.linspace(1 - NF_QUANTILE, 0.5, half)[:-1], [0.5], np.linspace(0.5, NF_QUANTILE, half + 1)[1:]]
    )
    quantiles = ndtri(probabilities)
    # The outermost probabilities are d and 1-d, whose float64 quantiles need not be each other's negative.
    book = np.where(quantiles < 0, quantiles / -quantiles[0], quantiles / quantiles[-1]).astype(np.float32)
    book.setflags(write=False)
    return book


class Lookup(NamedTuple):
    """A code book float32 (2**bits,) on a device, its decision thresholds there, and the table that counts them."""

    book: Tensor
    thresholds: Tensor
    table: IntervalTable


@cache
def nf_lookup(bits: int, device: torch.device) -> Lookup:
    """The lookup of a code book, made once per width and device; not to be written to."""
    book = nf_code_book(bits)
    thresholds = decision_thresholds(book)
    # A tensor made under inference mode could not be used outside of it afterwards.
    with torch.inference_mode(False):
        return Lookup(
            torch.from_numpy(book.copy()).to(device),
            torch.from_numpy(thresholds).to(device),
            IntervalTable(thresholds),
        )


def nearest_codes(x: Tensor, bits: int) -> Tensor:
    """The code of the nearest code-book entry for weights already divided by their scale.

    Args:
        x: float32 without NaN, any shape, contiguous; may be written to. Numbers beyond [-1, 1] get the end entries.
        bits: 2 to 8.

    Returns:
        uint8 of the same shape. With 4 bits and absmax blocks these are bitsandbytes' NF4 codes.
    """
    lookup = nf_lookup(bits, x.device)
    if x.device.type != "cpu" or x.numel() < _SMALL:
        return torch.bucketize(x, lookup.thresholds, out_int32=True).to(torch.uint8)
    codes = torch.empty(x.shape, dtype=torch.uint8)
    lookup.table.count_below(x.view(-1), codes.view(-1))
    return codes
