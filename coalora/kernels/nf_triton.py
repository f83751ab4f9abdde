"""The nf scheme's passes over many layers in one launch each; the arithmetic is that of `coalora.quant.nf`.

Every kernel has a two-dimensional grid, (tile of a layer, layer), and reads from a table of pointers and sizes (one row
of int64 a layer) what its layer is: layers of different shapes, bits and block sizes go in one launch. That matters,
because 144 launches of a microsecond's work each would spend a hundred times as long in being launched.

Dequantization is one launch: packed codes, packed scale codes and second-level scales in, weights out.

Bit for bit the plain path: divisions are rounded (`div_rn`; Triton's `/` is not), products and sums are not fused
(`enable_fp_fusion=False`). Nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from coalora.quant.nf_book import nf_code_book

_GROUPS = 256  # groups of eight weights in a tile
_FLOATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Job:
    """One layer: its numbers of weights, its choice, and contiguous tensors of one device.

    ``packed`` has the names of `NFScheme.pack`; ``out`` (n,) or the shape of the weight, any floating dtype.
    """

    bits: int
    scale_bits: int
    block_size: int
    scale_block_size: int
    packed: dict[str, Tensor]
    out: Tensor


def dequantize(jobs: Sequence[Job]) -> None:
    """Write the weights of ``packed`` into ``out``, all jobs in one launch."""
    table, largest = _table(jobs), max(job.out.numel() for job in jobs)
    grid = (triton.cdiv(largest, _GROUPS * 8), len(jobs))
    _dequantize[grid](table, _books(table.device), table.shape[1], _GROUPS, enable_fp_fusion=False)


def _row(job: Job) -> list[int]:
    pointers = [job.packed[name] for name in ("codes", "scale_codes", "scale_absmax", "offset")]
    dtypes = [_FLOATS[job.out.dtype], _FLOATS[job.packed["scale_absmax"].dtype]]
    sizes = [job.bits, job.scale_bits, job.block_size, job.scale_block_size, job.out.numel()]
    return [*(t.data_ptr() for t in pointers), job.out.data_ptr(), *dtypes, *sizes]


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
def _dequantize(table, books, columns, GROUPS: tl.constexpr):
    row = table + tl.program_id(1) * columns
    count = tl.load(row + 11)
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    if tl.program_id(0) * GROUPS * 8 < count:
        bits, scale_bits = tl.load(row + 7), tl.load(row + 8)
        block_size, scale_block_size = tl.load(row + 9), tl.load(row + 10)
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
        absmax = _load(tl.load(row + 2), block // scale_block_size, inside, tl.load(row + 6))
        offset = tl.load(tl.load(row + 3).to(tl.pointer_type(tl.float32)))
        steps = tl.broadcast_to(levels.to(tl.float32), (GROUPS,))
        scale = tl.div_rn(code.to(tl.float32), steps) * absmax + offset
        scale = tl.minimum(scale, 3.4028234663852886e38)
        where = group[:, None] * 8 + lanes[None, :]
        _store(tl.load(row + 4), where, entries * scale[:, None], where < count, tl.load(row + 5))
