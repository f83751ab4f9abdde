"""The nf scheme's passes over many layers in one launch each; the arithmetic is that of `coalora.quant.nf.scheme`.

Dequantization is one launch: packed codes, packed scale codes and second-level scales in, weights out. Quantization is
three: exact scales and their minimum; scales quantized and back; codes, packed, and weights.
What makes them equal the plain path bit for bit is in `coalora.quant.kernels.packed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

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
    groups_of,
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
Packed = Mapping[str, Tensor]


def dequantize_packed_many(layers: Sequence[tuple[Packed, Any, Tensor]]) -> None:
    """Write every layer's weight into its contiguous tensor (packed, choice, out (out, in)): one launch for all."""
    if layers:
        outs = [out for _, _, out in layers]
        table = table_of(kernel_rows(layers), outs[0].device)
        launch(_dequantize, tiles_of(outs), table, _books(table.device), EIGHTS)


def kernel_rows(layers: Sequence[tuple[Packed, Any, Tensor]]) -> Tensor:
    """int64 (n, columns), on the host: the kernels' table of (packed, choice, out (out, in))."""
    return torch.tensor([_row(packed, choice, out) for packed, choice, out in layers])


def dequantize_rows(rows: Tensor, n_weights: int) -> None:
    """The same for rows of `kernel_rows` that are on the device; ``n_weights``: of the largest layer."""
    launch(_dequantize, triton.cdiv(n_weights, EIGHTS * 8), rows, _books(rows.device), EIGHTS)


def quantize_packed_many(layers: Sequence[tuple[Tensor, Any, dict[str, Tensor], Tensor | None]]) -> None:
    """Quantize every layer (weight (out, in), choice, packed tensors to fill, out) by absmax, in three launches for
    all; weights are written into the contiguous ``out`` where one is given."""
    if not layers:
        return
    rows, kept, outs, tiles, scale_tiles = [], [], [], 0, 0
    for weight, choice, packed, out in layers:
        n_groups = weight.shape[0] * -(-weight.shape[1] // choice.block_size)
        exact, scales = torch.empty((2, n_groups), device=weight.device)
        outs.append(torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out)
        kept.append((weight.detach().contiguous(), exact, scales))
        rows.append(_row(packed, choice, outs[-1], *kept[-1]))
        tiles = max(tiles, triton.cdiv(n_groups * choice.block_size, EIGHTS * 8))
        scale_tiles = max(scale_tiles, triton.cdiv(len(packed["scale_absmax"]), _ROWS))
    offsets = [packed["offset"] for _, _, packed, _ in layers]
    torch._foreach_zero_(offsets)  # two launches for all; a fill of each would be one a layer
    torch._foreach_add_(offsets, torch.inf)
    table = table_of(rows, outs[0].device)
    launch(_exact_scales, tiles, table, EIGHTS * 8)
    launch(_quantize_scales, scale_tiles, table, _ROWS)
    launch(_quantize, tiles_of(outs), table, _books(table.device), _thresholds(table.device), EIGHTS)


def _row(
    packed: Packed,
    choice: Any,
    out: Tensor,
    weight: Tensor | None = None,
    exact: Tensor | None = None,
    scales: Tensor | None = None,
) -> list[int]:
    """A row of the kernels' table, which they read by column number; ``exact`` and ``scales`` float32 (n_groups,)."""
    return [
        *(address(packed[name]) for name in ("codes", "scale_codes", "scale_absmax", "offset")),  # 0 to 3
        *(address(tensor) for tensor in (out, weight, exact, scales)),  # 4 to 7
        *(float_code(tensor) for tensor in (out, packed["scale_absmax"], weight)),  # 8 to 10
        *(choice.bits, choice.scale_bits, choice.block_size, choice.scale_block_size, *out.shape),  # 11 to 16
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
def _shape(row):
    """Numbers of weights, of a row's weights, and of groups."""
    length, size = tl.load(row + 16), tl.load(row + 13)
    n_rows = tl.load(row + 15)
    return n_rows * length, length, n_rows * ((length + size - 1) // size)


@triton.jit
def _dequantize(table, columns, books, GROUPS: tl.constexpr):
    row = table + tl.program_id(1) * columns
    count, length, n_groups = _shape(row)
    eight = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    if tl.program_id(0) * GROUPS * 8 < count:
        bits, size = tl.load(row + 11), tl.load(row + 13)
        codes = load_packed(tl.load(row + 0), eight, bits, count)
        entries = tl.load(books + (1 << bits) + codes)
        where = eight[:, None] * 8 + tl.arange(0, 8)[None, :]
        if length % size == 0:
            # Groups are runs of the flattened weight, and no eight lies in two of them.
            scales = tl.broadcast_to(_scales(row, eight * 8 // size, n_groups, eight * 8 < count)[:, None], (GROUPS, 8))
        else:
            scales = _scales(row, groups_of(eight, length, size), n_groups, where < count)
        store_floats(tl.load(row + 4), where, entries * scales, where < count, tl.load(row + 8))


@triton.jit
def _scales(row, group, n_groups, mask):
    """s^ of groups, float32; of none where masked."""
    scale_bits = tl.load(row + 12)
    code = load_code(tl.load(row + 1), group, scale_bits, n_groups, mask).to(tl.float32)
    absmax = load_floats(tl.load(row + 2), group // tl.load(row + 14), mask, tl.load(row + 9))
    offset = tl.load(tl.load(row + 3).to(tl.pointer_type(tl.float32)))
    steps = tl.zeros_like(code) + ((1 << scale_bits) - 1).to(tl.float32)
    return tl.minimum(tl.div_rn(code, steps) * absmax + offset, 3.4028234663852886e38)


@triton.jit
def _exact_scales(table, columns, TILE: tl.constexpr):
    """Absmax of every group, and the least of them."""
    row = table + tl.program_id(1) * columns
    size = tl.load(row + 13)
    # The shape of a group must be known to the compiler.
    if size == 16:
        _reduce(row, TILE, 16)
    elif size == 32:
        _reduce(row, TILE, 32)
    else:
        _reduce(row, TILE, 64)


@triton.jit
def _reduce(row, TILE: tl.constexpr, SIZE: tl.constexpr):
    RUN: tl.constexpr = TILE // SIZE
    _, length, n_groups = _shape(row)
    if tl.program_id(0) * RUN < n_groups:
        group = tl.program_id(0).to(tl.int64) * RUN + tl.arange(0, RUN)
        per_row = (length + SIZE - 1) // SIZE
        column = (group % per_row * SIZE)[:, None] + tl.arange(0, SIZE)[None, :]
        inside = (column < length) & (group < n_groups)[:, None]
        weights = load_floats(
            tl.load(row + 5), (group // per_row * length)[:, None] + column, inside, tl.load(row + 10)
        )
        largest = tl.max(tl.abs(weights), axis=1)
        tl.store(tl.load(row + 6).to(tl.pointer_type(tl.float32)) + group, largest, mask=group < n_groups)
        least = tl.min(tl.where(group < n_groups, largest, float("inf")), axis=0)
        tl.atomic_min(tl.load(row + 3).to(tl.pointer_type(tl.float32)), least)


@triton.jit
def _quantize_scales(table, columns, ROWS: tl.constexpr):
    """Scale blocks: second-level absmax, packed scale codes, and the scales s^ that they stand for."""
    row = table + tl.program_id(1) * columns
    _, _, n_blocks = _shape(row)
    scale_block_size = tl.load(row + 14)
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
    count, length, _ = _shape(row)
    if tl.program_id(0) * GROUPS * 8 < count:
        bits, size = tl.load(row + 11), tl.load(row + 13)
        group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        lanes = tl.arange(0, 8)
        where = group[:, None] * 8 + lanes[None, :]
        inside = where < count
        weights = load_floats(tl.load(row + 5), where, inside, tl.load(row + 10))
        scales = tl.load(row + 7).to(tl.pointer_type(tl.float32))
        scale = tl.load(scales + groups_of(group, length, size), mask=inside, other=0.0)
        divisor = tl.where(scale == 0, float("inf"), scale)
        x = tl.div_rn(weights, divisor)
        # Binary search: 2^bits - 1 thresholds take exactly `bits` comparisons.
        codes = tl.zeros((GROUPS, 8), dtype=tl.int64)
        for step in tl.static_range(8):
            half = (1 << bits) >> (step + 1)
            at = tl.load(thresholds + (1 << bits) + codes + tl.maximum(half, 1) - 1)
            codes += tl.where((half > 0) & (x > at), half, 0)
        entries = tl.load(books + (1 << bits) + codes)
        store_floats(tl.load(row + 4), where, entries * scale, inside, tl.load(row + 8))
        store_packed(tl.load(row + 0), group, tl.where(inside, codes, 0), bits, count)
