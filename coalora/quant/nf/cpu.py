"""Decoding of packed nf codes on a CPU, in chunks that stay in its cache.

Two things make it fast: temporaries of one chunk are reused instead of faulting in new pages, and two or four weights
are gathered at a time, a pair or a quad of code-book entries moving as one 8- or 16-byte number.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from coalora.quant.nf.book import nf_code_book

# Weights. Torch works on up to 2^15 numbers without threads, so that several layers can be done at once by threads of
# their own. A multiple of every block size and of the eight codes of a packed group.
CHUNK = 2**15
_GROUPS = {2: 4, 3: 4, 4: 2, 8: 1}  # bits -> codes that one lookup decodes
_WIDE = {1: torch.float32, 2: torch.float64, 4: torch.complex128}


def decode(packed: Tensor, scales: Tensor, bits: int, block_size: int, out: Tensor) -> None:
    """Write the weights that ``packed`` codes stand for into the flat ``out`` (n,), rounded to its dtype.

    Args:
        packed: uint8 (ceil(n*bits/8),), as `coalora.quant.packing.pack_codes` makes it.
        scales: float32 (ceil(n/B0),).
    """
    count = out.numel()
    step = min(CHUNK, -(-count // 64) * 64)
    entries = torch.empty(step)
    table = _entry_table(bits, 8 if bits == 8 else bits)
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        length = -(-(stop - start) // 64) * 64  # whole blocks and whole groups; what is beyond ``count`` is dropped
        bytes_ = packed[start * bits // 8 : (start + length) * bits // 8]
        if len(bytes_) < length * bits // 8:
            bytes_ = torch.nn.functional.pad(bytes_, (0, length * bits // 8 - len(bytes_)))
        index = _triples(bytes_) if bits == 3 else bytes_.to(torch.int32)
        rows = slice(start // block_size, -(-stop // block_size))
        _scale_into(out, rows, _gather(table, index, entries), scales, block_size)


def _scale_into(out: Tensor, rows: slice, entries: Tensor, scales: Tensor, size: int) -> None:
    start, stop = rows.start * size, min(rows.stop * size, len(out))
    count = rows.stop - rows.start
    blocks = entries[: count * size].view(count, size)
    if stop - start == count * size:
        torch.mul(blocks, scales[rows, None], out=out[start:stop].view(count, size))
    else:  # the last block is short
        out[start:stop] = blocks.mul_(scales[rows, None]).view(-1)[: stop - start]


def _gather(table: Tensor, index: Tensor, entries: Tensor) -> Tensor:
    """The float32 entries at ``index`` of a table of singles, pairs or quads; a view of the buffer ``entries``."""
    per = table.element_size() // 4
    used = entries[: len(index) * per]
    torch.index_select(table, 0, index, out=used.view(table.dtype))
    return used


def _triples(packed: Tensor) -> Tensor:
    """Packed 3-bit codes as 12-bit numbers of four codes each: int32 (len/3*2,)."""
    first, second, third = (packed.numpy()[i::3].astype(np.int32) for i in range(3))
    index = np.empty((len(first), 2), dtype=np.int32)
    index[:, 0] = (second & 15) << 8 | first
    index[:, 1] = third << 4 | second >> 4
    return torch.from_numpy(index).view(-1)


@cache
def _entry_table(bits: int, width: int) -> Tensor:
    """Code-book entries by groups of codes of ``width`` bits each, a group's floats viewed as one wide number."""
    per = _GROUPS[width]
    groups = np.arange(2 ** (width * per))
    codes = np.stack([(groups >> (width * i)) & (2**width - 1) for i in range(per)], axis=1)
    book = nf_code_book(bits)
    with torch.inference_mode(False):  # as for `nf_lookup`
        # Codes that the book lacks occur in no state.
        return torch.from_numpy(book[np.minimum(codes, len(book) - 1)]).view(_WIDE[per]).view(-1)
