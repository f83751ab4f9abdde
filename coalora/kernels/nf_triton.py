"""The nf scheme's passes over many layers in one launch each; the arithmetic is that of `coalora.quant.nf`.

Every kernel has a two-dimensional grid, (tile of a layer, layer), and reads from a table of pointers and sizes (one row
of int64 a layer) what its layer is: layers of different shapes, bits and block sizes go in one launch. That matters,
because 144 launches of a microsecond's work each would spend a hundred times as long in being launched.

Dequantization is one launch: packed codes, packed scale codes and second-level scales in, weights out. Quantization is
three: exact scales and their minimum; scales quantized and back; codes, packed, and weights.

Bit for bit the plain path: divisions are rounded (`div_rn`; Triton's `/` is not), products and sums are not fused
(`enable_fp_fusion=False`), and rounding to even is the addition and subtraction of 1.5 * 2^23.
Nothing is checked and nothing waits for the GPU: that weights are finite is checked at calibration.
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

from coalora.quant.nearest import decision_thresholds
from coalora.quant.nf_book import nf_code_book

_GROUPS = 256  # groups of eight weights in a tile
_ROWS = 8  # scale blocks in a tile
_FLOATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
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
    table, largest = _table(jobs), max(job.out.numel() for job in jobs)
    grid = (triton.cdiv(largest, _GROUPS * 8), len(jobs))
    _dequantize[grid](table, _books(table.device), table.shape[1], _GROUPS, enable_fp_fusion=False)


def quantize(jobs: Sequence[Job]) -> None:
    """Quantize ``weight``: fill ``packed`` and write the dequantized weights into ``out``; three launches for all."""
    device = jobs[0].out.device
    for job in jobs:
        job.packed["offset"].fill_(torch.inf)
    table, columns = _table(jobs), len(_row(jobs[0]))
    tiles = triton.cdiv(max(job.out.numel() for job in jobs), _GROUPS * 8)
    rows = triton.cdiv(max(len(job.packed["scale_absmax"]) for job in jobs), _ROWS)
    _exact_scales[(tiles, len(jobs))](table, columns, _GROUPS * 8, enable_fp_fusion=False)
    _quantize_scales[(rows, len(jobs))](table, columns, _ROWS, enable_fp_fusion=False)
    _quantize[(tiles, len(jobs))](table, _books(device), _thresholds(device), columns, _GROUPS, enable_fp_fusion=False)


def _row(job: Job) -> list[int]:
    pointers = [job.packed[name] for name in ("codes", "scale_codes", "scale_absmax", "offset")]
    extra = [0 if t is None else t.data_ptr() for t in (job.weight, job.exact, job.scales)]
    dtypes = [_FLOATS[job.out.dtype], _FLOATS[job.packed["scale_absmax"].dtype]]
    dtypes.append(0 if job.weight is None else _FLOATS[job.weight.dtype])
    sizes = [job.bits, job.scale_bits, job.block_size, job.scale_block_size, job.out.numel()]
    return [*(t.data_ptr() for t in pointers), job.out.data_ptr(), *extra, *dtypes, *sizes]


def _table(jobs: Sequence[Job]) -> Tensor:
    """int64 (n_jobs, columns); the kernels read it by column number."""
    table = torch.tensor([_row(job) for job in jobs], dtype=torch.int64)
    device = jobs[0].out.device
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


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
def _load(address, index, mask, dtype):
    """float32 of the bf16 (0), fp16 (1) or fp32 (2) numbers at ``address``."""
    if dtype == 0:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + index, mask=mask, other=0.0).to(tl.float32)
    elif dtype == 1:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + index, mask=mask, other=0.0).to(tl.float32)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + index, mask=mask, other=0.0)
    return value


@triton.jit
def _bf16(value):
    """The bits of finite float32 numbers rounded to bf16, ties to even; Triton's interpreter would cut them off."""
    bits = value.to(tl.uint32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def _store(address, index, value, mask, dtype):
    if dtype == 0:
        tl.store(address.to(tl.pointer_type(tl.uint16)) + index, _bf16(value).to(tl.uint16), mask=mask)
    elif dtype == 1:
        tl.store(address.to(tl.pointer_type(tl.float16)) + index, value.to(tl.float16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.float32)) + index, value, mask=mask)


@triton.jit
def _store_packed(address, group, codes, bits, count):
    """Eight codes (G, 8) to the ``bits`` bytes of each group (G,); codes beyond ``count`` are zero already."""
    lanes = tl.arange(0, 8)
    words = tl.sum(codes.to(tl.int64) << (lanes * bits)[None, :], axis=1)
    parts = (words[:, None] >> (lanes * 8)[None, :]) & 255
    index = group[:, None] * bits + lanes[None, :]
    inside = (lanes[None, :] < bits) & (index < (count * bits + 7) // 8)
    tl.store(address.to(tl.pointer_type(tl.uint8)) + index, parts.to(tl.uint8), mask=inside)


@triton.jit
def _dequantize(table, books, columns, GROUPS: tl.constexpr):
    row = table + tl.program_id(1) * columns
    count = tl.load(row + 15)
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    if tl.program_id(0) * GROUPS * 8 < count:
        bits, scale_bits = tl.load(row + 11), tl.load(row + 12)
        block_size, scale_block_size = tl.load(row + 13), tl.load(row + 14)
        lanes = tl.arange(0, 8)
        inside = group * 8 < count
        # Codes.
        index = group[:, None] * bits + lanes[None, :]
        known = (lanes[None, :] < bits) & (index < (count * bits + 7) // 8)
        parts = tl.load(tl.load(row + 0).to(tl.pointer_type(tl.uint8)) + index, mask=known, other=0)
        words = tl.sum(parts.to(tl.int64) << (lanes * 8)[None, :], axis=1)
        codes = (words[:, None] >> (lanes * bits)[None, :]) & ((1 << bits) - 1)
        entries = tl.load(books + (1 << bits) + codes)
        # Scales: eight weights never lie in two blocks.
        block = group * 8 // block_size
        n_blocks = (count + block_size - 1) // block_size
        position = block * scale_bits
        bytes_ = tl.load(row + 1).to(tl.pointer_type(tl.uint8)) + position // 8
        more = position // 8 + 1 < (n_blocks * scale_bits + 7) // 8
        low = tl.load(bytes_, mask=inside, other=0).to(tl.int32)
        high = tl.load(bytes_ + 1, mask=inside & more, other=0).to(tl.int32)
        levels = (1 << scale_bits) - 1
        code = ((low | (high << 8)) >> (position % 8).to(tl.int32)) & levels.to(tl.int32)
        absmax = _load(tl.load(row + 2), block // scale_block_size, inside, tl.load(row + 9))
        offset = tl.load(tl.load(row + 3).to(tl.pointer_type(tl.float32)))
        steps = tl.broadcast_to(levels.to(tl.float32), (GROUPS,))
        scale = tl.div_rn(code.to(tl.float32), steps) * absmax + offset
        scale = tl.minimum(scale, 3.4028234663852886e38)
        where = group[:, None] * 8 + lanes[None, :]
        _store(tl.load(row + 4), where, entries * scale[:, None], where < count, tl.load(row + 8))


@triton.jit
def _exact_scales(table, columns, TILE: tl.constexpr):
    """Absmax of every block, and the least of them."""
    row = table + tl.program_id(1) * columns
    count, block_size = tl.load(row + 15), tl.load(row + 13)
    start = tl.program_id(0).to(tl.int64) * TILE
    if start < count:
        where = start + tl.arange(0, TILE)
        weights = tl.abs(_load(tl.load(row + 5), where, where < count, tl.load(row + 10)))
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
            absmax = (_bf16(tl.minimum(absmax, 3.3895313892515355e38)) << 16).to(tl.float32, bitcast=True)
        elif dtype == 1:
            absmax = tl.minimum(absmax, 65504.0).to(tl.float16).to(tl.float32)
        else:
            absmax = tl.minimum(absmax, 3.4028234663852886e38)
        _store(tl.load(row + 2), r, absmax, r * scale_block_size < n_blocks, dtype)
        levels = ((1 << scale_bits) - 1).to(tl.float32)
        divisor = tl.where(absmax == 0, float("inf"), absmax)
        level = tl.div_rn(above, tl.broadcast_to(divisor[:, None], (ROWS, 256))) * levels
        codes = tl.minimum(tl.maximum((level + 12582912.0) - 12582912.0, 0.0), levels)
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
        _store_packed(tl.load(row + 1), group, packed, scale_bits, n_blocks)


@triton.jit
def _quantize(table, books, thresholds, columns, GROUPS: tl.constexpr):
    """Nearest codes under s^, packed, and the weights that they stand for."""
    row = table + tl.program_id(1) * columns
    count = tl.load(row + 15)
    if tl.program_id(0) * GROUPS * 8 < count:
        bits, block_size = tl.load(row + 11), tl.load(row + 13)
        group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        lanes = tl.arange(0, 8)
        where = group[:, None] * 8 + lanes[None, :]
        inside = where < count
        weights = _load(tl.load(row + 5), where, inside, tl.load(row + 10))
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
        _store(tl.load(row + 4), where, entries * scale[:, None], inside, tl.load(row + 8))
        _store_packed(tl.load(row + 0), group, tl.where(inside, codes, 0), bits, count)
