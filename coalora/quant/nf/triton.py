"""The nf scheme's passes over many layers in one launch each; the arithmetic is that of `coalora.quant.nf.scheme`.

Dequantization is one launch: packed codes, packed scale codes and second-level scales in, weights out. Quantization is
three: exact scales and their minimum; scales quantized and back; codes, packed, and weights.
What makes them equal the plain path bit for bit is in `coalora.quant.kernels.packed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from coalora.quant.kernels.packed import (
    EIGHTS,
    address,
    bf16_bits,
    float_code,
    launch,
    load_code,
    load_floats,
    load_packed,
    round_even,
    store_floats,
    store_packed,
    table_of,
    tiles_of,
)
from coalora.quant.nf.book import nf_code_book
from coalora.quant.nf.nearest import decision_thresholds

_ROWS = 8  # scale blocks in a tile
_WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Job:
    """One layer: its numbers of weights, its choice, and contiguous tensors of one device.

    ``packed`` has the names of `NFScheme.pack`; ``out`` (n,) or the shape of the weight, any floating dtype; ``weight``
    and ``exact``, ``scales`` float32 (n_blocks,) are for quantization.
    """

    bits: int
    scale_bits: int
    block_size: int
    scale_block_size: int
    packed: dict[str, Tensor]
    out: Tensor
    weight: Tensor | None = None
    exact: Tensor | None = None
    scales: Tensor | None = None


def dequantize(jobs: Sequence[Job]) -> None:
    """Write the weights of ``packed`` into ``out``, all jobs in one launch."""
    table = _table(jobs)
    launch(_dequantize, tiles_of([job.out for job in jobs]), table, _books(table.device), EIGHTS)


def dequantize_rows(rows: Tensor, n_weights: int) -> None:
    """The same for rows of `rows_of` that are on the device; ``n_weights``: of the largest layer."""
    launch(_dequantize, triton.cdiv(n_weights, EIGHTS * 8), rows, _books(rows.device), EIGHTS)


def quantize(jobs: Sequence[Job]) -> None:
    """Quantize ``weight``: fill ``packed`` and write the dequantized weights into ``out``; three launches for all."""
    offsets = [job.packed["offset"] for job in jobs]
    torch._foreach_zero_(offsets)  # two launches for all; a fill of each would be one a layer
    torch._foreach_add_(offsets, torch.inf)
    table, tiles = _table(jobs), tiles_of([job.out for job in jobs])
    scale_tiles = triton.cdiv(max(len(job.packed["scale_absmax"]) for job in jobs), _ROWS)
    launch(_exact_scales, tiles, table, EIGHTS * 8)
    launch(_quantize_scales, scale_tiles, table, _ROWS)
    launch(_quantize, tiles, table, _books(table.device), _thresholds(table.device), EIGHTS)


def _table(jobs: Sequence[Job]) -> Tensor:
    return table_of(rows_of(jobs), jobs[0].out.device)


def rows_of(jobs: Sequence[Job]) -> list[list[int]]:
    """The kernels' table, which they read by column number."""
    return [
        [
            *(address(job.packed[name]) for name in ("codes", "scale_codes", "scale_absmax", "offset")),  # 0 to 3
            *(address(tensor) for tensor in (job.out, job.weight, job.exact, job.scales)),  # 4 to 7
            *(float_code(tensor) for tensor in (job.out, job.packed["scale_absmax"], job.weight)),  # 8 to 10
            *(job.bits, job.scale_bits, job.block_size, job.scale_block_size, job.out.numel()),  # 11 to 15
        ]
        for job in jobs
    ]


@cache
def _books(device: torch.device) -> Tensor:
    """Code books of 2 to 8 bits, each at 2^bits of one float32 array."""
    books = torch.zeros(512)
    for bits in _WIDTHS:
        books[2**bits : 2 ** (bits + 1)] = torch.from_numpy(nf_code_book(bits).copy())
    return books.to(device)


@cache
def _thresholds(device: torch.device) -> Tensor:
    """Decision thresholds of 2 to 8 bits, each at 2^bits of one float32 array, beyond the last one infinity."""
    thresholds = np.full(512, np.inf, dtype=np.float32)
    for bits in _WIDTHS:
        thresholds[2**bits : 2 ** (bits + 1) - 1] = decision_thresholds(nf_code_book(bits))
    return torch.from_numpy(thresholds).to(device)


@triton.jit
def _dequantize(table, columns, books, GROUPS: tl.constexpr):
    row = table + tl.program_id(1) * columns
    count = tl.load(row + 15)
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    if tl.program_id(0) * GROUPS * 8 < count:
        bits, scale_bits = tl.load(row + 11), tl.load(row + 12)
        block_size, scale_block_size = tl.load(row + 13), tl.load(row + 14)
        inside = group * 8 < count
        codes = load_packed(tl.load(row + 0), group, bits, count)
        entries = tl.load(books + (1 << bits) + codes)
        # Scales: eight weights never lie in two blocks.
        block = group * 8 // block_size
        n_blocks = (count + block_size - 1) // block_size
        code = load_code(tl.load(row + 1), block, scale_bits, n_blocks, inside)
        absmax = load_floats(tl.load(row + 2), block // scale_block_size, inside, tl.load(row + 9))
        offset = tl.load(tl.load(row + 3).to(tl.pointer_type(tl.float32)))
        steps = tl.broadcast_to(((1 << scale_bits) - 1).to(tl.float32), (GROUPS,))
        scale = tl.div_rn(code.to(tl.float32), steps) * absmax + offset
        scale = tl.minimum(scale, 3.4028234663852886e38)
        where = group[:, None] * 8 + tl.arange(0, 8)[None, :]
        store_floats(tl.load(row + 4), where, entries * scale[:, None], where < count, tl.load(row + 8))


@triton.jit
def _exact_scales(table, columns, TILE: tl.constexpr):
    """Absmax of every block, and the least of them."""
    row = table + tl.program_id(1) * columns
    count, block_size = tl.load(row + 15), tl.load(row + 13)
    start = tl.program_id(0).to(tl.int64) * TILE
    if start < count:
        where = start + tl.arange(0, TILE)
        weights = tl.abs(load_floats(tl.load(row + 5), where, where < count, tl.load(row + 10)))
        exact = tl.load(row + 6).to(tl.pointer_type(tl.float32))
        offset = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        # The shape of a block must be known to the compiler.
        if block_size == 16:
            _reduce(weights, exact, offset, start, count, TILE, 16)
        elif block_size == 32:
            _reduce(weights, exact, offset, start, count, TILE, 32)
        else:
            _reduce(weights, exact, offset, start, count, TILE, 64)


@triton.jit
def _reduce(weights, exact, offset, start, count, TILE: tl.constexpr, SIZE: tl.constexpr):
    largest = tl.max(tl.reshape(weights, (TILE // SIZE, SIZE)), axis=1)
    block = start // SIZE + tl.arange(0, TILE // SIZE)
    inside = block * SIZE < count
    tl.store(exact + block, largest, mask=inside)
    tl.atomic_min(offset, tl.min(tl.where(inside, largest, float("inf")), axis=0))


@triton.jit
def _quantize_scales(table, columns, ROWS: tl.constexpr):
    """Scale blocks: second-level absmax, packed scale codes, and the scales s^ that they stand for."""
    row = table + tl.program_id(1) * columns
    count, block_size, scale_block_size = tl.load(row + 15), tl.load(row + 13), tl.load(row + 14)
    n_blocks = (count + block_size - 1) // block_size
    if tl.program_id(0) * ROWS * scale_block_size < n_blocks:
        scale_bits, dtype = tl.load(row + 12), tl.load(row + 9)
        r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        lanes = tl.arange(0, 256)  # the largest scale block
        block = r[:, None] * scale_block_size + lanes[None, :]
        inside = (lanes[None, :] < scale_block_size) & (block < n_blocks)
        exact = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float32)) + block, mask=inside, other=0.0)
        offset = tl.load(tl.load(row + 3).to(tl.pointer_type(tl.float32)))
        above = tl.where(inside, exact - offset, 0.0)
        absmax = tl.max(above, axis=1)
        if dtype == 0:
            absmax = (bf16_bits(tl.minimum(absmax, 3.3895313892515355e38)) << 16).to(tl.float32, bitcast=True)
        elif dtype == 1:
            absmax = tl.minimum(absmax, 65504.0).to(tl.float16).to(tl.float32)
        else:
            absmax = tl.minimum(absmax, 3.4028234663852886e38)
        store_floats(tl.load(row + 2), r, absmax, r * scale_block_size < n_blocks, dtype)
        levels = ((1 << scale_bits) - 1).to(tl.float32)
        divisor = tl.where(absmax == 0, float("inf"), absmax)
        level = tl.div_rn(above, tl.broadcast_to(divisor[:, None], (ROWS, 256))) * levels
        codes = tl.minimum(tl.maximum(round_even(level), 0.0), levels)
        scales = tl.div_rn(codes, tl.broadcast_to(levels, (ROWS, 256))) * absmax[:, None] + offset
        scales = tl.minimum(scales, 3.4028234663852886e38)
        tl.store(tl.load(row + 7).to(tl.pointer_type(tl.float32)) + block, scales, mask=inside)
        # Eight codes of one row fill whole bytes: scale blocks are multiples of eight.
        packed = tl.reshape(tl.where(inside, codes, 0.0).to(tl.int32), (ROWS * 32, 8))
        eights = tl.arange(0, ROWS * 32)
        first = (tl.program_id(0).to(tl.int64) * ROWS + eights // 32) * scale_block_size + (eights % 32) * 8
        own = (eights % 32) * 8 < scale_block_size
        # Groups of lanes beyond the scale block belong to the next row: sent beyond the end, where nothing is stored.
        group = tl.where(own, first // 8, n_blocks)
        store_packed(tl.load(row + 1), group, packed, scale_bits, n_blocks)


@triton.jit
def _quantize(table, columns, books, thresholds, GROUPS: tl.constexpr):
    """Nearest codes under s^, packed, and the weights that they stand for."""
    row = table + tl.program_id(1) * columns
    count = tl.load(row + 15)
    if tl.program_id(0) * GROUPS * 8 < count:
        bits, block_size = tl.load(row + 11), tl.load(row + 13)
        group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        lanes = tl.arange(0, 8)
        where = group[:, None] * 8 + lanes[None, :]
        inside = where < count
        weights = load_floats(tl.load(row + 5), where, inside, tl.load(row + 10))
        scales = tl.load(row + 7).to(tl.pointer_type(tl.float32)) + group * 8 // block_size
        scale = tl.load(scales, mask=group * 8 < count, other=0.0)
        divisor = tl.where(scale == 0, float("inf"), scale)
        x = tl.div_rn(weights, tl.broadcast_to(divisor[:, None], (GROUPS, 8)))
        # Binary search: 2^bits - 1 thresholds take exactly `bits` comparisons.
        codes = tl.zeros((GROUPS, 8), dtype=tl.int64)
        for step in tl.static_range(8):
            half = (1 << bits) >> (step + 1)
            at = tl.load(thresholds + (1 << bits) + codes + tl.maximum(half, 1) - 1)
            codes += tl.where((half > 0) & (x > at), half, 0)
        entries = tl.load(books + (1 << bits) + codes)
        store_floats(tl.load(row + 4), where, entries * scale[:, None], inside, tl.load(row + 8))
        store_packed(tl.load(row + 0), group, tl.where(inside, codes, 0), bits, count)
