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
    """What finding the nearest entry of one code book needs, on one device; not to be written to.

    ``book`` float32 (2**bits,); ``table`` turns numbers into positions; ``codes`` uint8 and ``entries``
    float32 are the nearest code and its entry at every position.
    """

    book: Tensor
    table: IntervalTable
    codes: Tensor
    entries: Tensor


@cache
def nf_lookup(bits: int, device: torch.device) -> Lookup:
    """The lookup of a code book, made once per width and device."""
    book = nf_code_book(bits)
    # A tensor made under inference mode could not be used outside of it afterwards.
    with torch.inference_mode(False):
        table = IntervalTable(decision_thresholds(book), device)
        return Lookup(
            book=torch.from_numpy(book.copy()).to(device),
            table=table,
            codes=torch.from_numpy(table.intervals.astype(np.uint8)).to(device),
            entries=torch.from_numpy(book[table.intervals]).to(device),
        )


def nf_codes(normalised: Tensor, bits: int) -> Tensor:
    """Single level: the code of the nearest code-book entry for weights already divided by their scale.

    Args:
        normalised: floating point, any shape; numbers beyond [-1, 1] get the end entries.
        bits: 2 to 8.

    Returns:
        uint8 of the same shape. With 4 bits and absmax blocks these are bitsandbytes' NF4 codes.

    Raises:
        CoaloraError: NaN in the input, or another width.
    """
    lookup = nf_lookup(bits, normalised.device)
    x = normalised.detach().to(torch.float32).reshape(-1).clamp(-1, 1)
    if bool(torch.isnan(x).any()):
        raise CoaloraError("There is NaN among the normalised weights")
    return lookup.codes.index_select(0, lookup.table.positions(x)).view(normalised.shape)
