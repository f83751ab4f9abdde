"""The int scheme in Triton: its passes over many layers in one launch each, as in `coalora.quant.integer.scheme`.

Dequantization is one launch: packed codes, scales and packed zero points in, weights out. Quantization is one launch as
well, which reads a weight once: a tile is a run of whole groups, whose ranges, scales, zero points, codes and weights
follow one from the other. Only where the rows of a weight are no multiple of eight long, so that bytes of packed codes
hold codes of two rows, a second launch takes codes and weights from the scales that the first has stored.
What makes them equal the plain path bit for bit is in `coalora.quant.kernels.packed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coalora.quant.kernels.packed import (
    EIGHTS,
    address,
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

Packed = Mapping[str, Tensor]


def dequantize_packed_many(layers: Sequence[tuple[Packed, Any, Tensor]]) -> None:
    """Write every layer's weight into its contiguous tensor (packed, choice, out (out, in)): one launch for all."""
    if layers:
        outs = [out for _, _, out in layers]
        launch(_dequantize, tiles_of(outs), table_of(kernel_rows(layers), outs[0].device), EIGHTS)


def kernel_rows(layers: Sequence[tuple[Packed, Any, Tensor]]) -> Tensor:
    """int64 (n, columns), on the host: the kernels' table of (packed, choice, out (out, in))."""
    return torch.tensor([_row(packed, choice, out, None, out.shape) for packed, choice, out in layers])


def dequantize_rows(rows: Tensor, n_weights: int) -> None:
    """The same for rows of `kernel_rows` that are on the device; ``n_weights``: of the largest layer."""
    launch(_dequantize, triton.cdiv(n_weights, EIGHTS * 8), rows, EIGHTS)


def quantize_packed_many(layers: Sequence[tuple[Tensor, Any, dict[str, Tensor], Tensor | None]]) -> None:
    """Quantize every layer (weight (out, in), choice, packed tensors to fill, out) by absmax; weights are written into
    the contiguous ``out`` where one is given."""
    rows, uneven, tiles, weights = [], [], 0, []
    for weight, choice, packed, out in layers:
        weights.append(weight.detach().contiguous())
        rows.append(_row(packed, choice, out, weights[-1], weight.shape))
        uneven += [rows[-1]] if weight.shape[1] % 8 else []
        # Groups of every tile fill whole bytes with their zero points: eights of them, the larger the groups the fewer.
        tiles = max(tiles, triton.cdiv(len(packed["scales"]) * choice.group_size, EIGHTS * 8))
    if rows:
        launch(_quantize, tiles, table_of(rows, weights[0].device), EIGHTS * 8)
    if uneven:
        launch(_encode, tiles_of(weights), table_of(uneven, weights[0].device), EIGHTS)


def _row(packed: Packed, choice: Any, out: Tensor | None, weight: Tensor | None, shape: Sequence[int]) -> list[int]:
    """A row of the kernels' table, which they read by column number."""
    zero_points = packed.get("zero_points", packed.get("zeros"))
    return [
        *(address(tensor) for tensor in (packed["codes"], packed["scales"], zero_points, out, weight)),  # 0 to 4
        *(float_code(out), float_code(weight)),  # 5 and 6
        *(choice.bits, choice.group_size.bit_length() - 1, *shape),  # 7 to 10
    ]


@triton.jit
def _grids(row, eight, GROUPS: tl.constexpr):
    """Scale and zero point of every weight of the eights (G,): both float32 (G, 8)."""
    shift, length = tl.load(row + 8), tl.load(row + 10)
    count = tl.load(row + 9) * length
    per_row = (length + (1 << shift) - 1) >> shift
    n_groups = tl.load(row + 9) * per_row
    if length == per_row << shift:
        # Groups are runs of the flattened weight, and no eight lies in two of them.
        scale, zero = _grid(row, (eight * 8) >> shift, n_groups, eight * 8 < count)
        scales = tl.broadcast_to(scale[:, None], (GROUPS, 8))
        zeros = tl.broadcast_to(zero[:, None], (GROUPS, 8))
    else:
        where = eight[:, None] * 8 + tl.arange(0, 8)[None, :]
        group = groups_of(eight, length, 1 << shift)
        scales, zeros = _grid(row, group, n_groups, where < count)
    return scales, zeros


@triton.jit
def _grid(row, group, n_groups, mask):
    """Stored scale and zero point of groups, float32; zero where masked."""
    bits, zero_points = tl.load(row + 7), tl.load(row + 2)
    scale = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.float16)) + group, mask=mask, other=0.0).to(tl.float32)
    if zero_points == 0:
        zero = tl.zeros_like(scale) + (1 << (bits - 1)).to(tl.float32)
    else:
        zero = load_code(zero_points, group, bits, n_groups, mask).to(tl.float32)
    return scale, zero


@triton.jit
def _inverse(scale):
    return tl.where(scale == 0, 0.0, tl.div_rn(tl.zeros_like(scale) + 1.0, tl.where(scale == 0, 1.0, scale)))


@triton.jit
def _steps(weight, inverse, low, high):
    """code - z; the ends are whole numbers, so that clamping first changes nothing but keeps numbers small."""
    return round_even(tl.minimum(tl.maximum(weight * inverse, low), high))


@triton.jit
def _dequantize(table, columns, GROUPS: tl.constexpr):
    row = table + tl.program_id(1) * columns
    count = tl.load(row + 9) * tl.load(row + 10)
    eight = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    if tl.program_id(0).to(tl.int64) * GROUPS * 8 < count:
        codes = load_packed(tl.load(row + 0), eight, tl.load(row + 7), count)
        scale, zero = _grids(row, eight, GROUPS)
        where = eight[:, None] * 8 + tl.arange(0, 8)[None, :]
        store_floats(tl.load(row + 3), where, (codes.to(tl.float32) - zero) * scale, where < count, tl.load(row + 5))


@triton.jit
def _quantize(table, columns, TILE: tl.constexpr):
    """A run of groups of TILE weights in all, short ones counted in full."""
    row = table + tl.program_id(1) * columns
    shift = tl.load(row + 8)
    # The shape of a group must be known to the compiler.
    if shift == 5:
        _quantize_groups(row, TILE, 32)
    elif shift == 6:
        _quantize_groups(row, TILE, 64)
    else:
        _quantize_groups(row, TILE, 128)


@triton.jit
def _quantize_groups(row, TILE: tl.constexpr, SIZE: tl.constexpr):
    RUN: tl.constexpr = TILE // SIZE
    length, bits, zero_points, out = tl.load(row + 10), tl.load(row + 7), tl.load(row + 2), tl.load(row + 3)
    count = tl.load(row + 9) * length
    # Groups are numbered in 32 bits, which divide faster; weights in 64.
    per_row = ((length + SIZE - 1) // SIZE).to(tl.int32)
    n_groups = tl.load(row + 9).to(tl.int32) * per_row
    tile = tl.program_id(0)
    if tile * RUN < n_groups:
        group = tile * RUN + tl.arange(0, RUN)
        start = group % per_row * SIZE
        first = (group // per_row) * length + start
        column = start[:, None] + tl.arange(0, SIZE)[None, :]
        where = first[:, None] + tl.arange(0, SIZE)[None, :]
        inside = (column < length) & (group < n_groups)[:, None]
        weight = load_floats(tl.load(row + 4), where, inside, tl.load(row + 6))
        low, high = tl.minimum(tl.min(weight, axis=1), 0.0), tl.maximum(tl.max(weight, axis=1), 0.0)
        levels = tl.zeros_like(low) + ((1 << bits) - 1).to(tl.float32)
        if zero_points == 0:
            width = tl.div_rn(tl.maximum(high, -low), levels) * 2.0
        else:
            width = tl.div_rn(high, levels) - tl.div_rn(low, levels)
        stored = tl.minimum(width, 65504.0).to(tl.float16)
        tl.store(tl.load(row + 1).to(tl.pointer_type(tl.float16)) + group, stored, mask=group < n_groups)
        scale = stored.to(tl.float32)
        inverse = _inverse(scale)
        bottom = tl.zeros_like(low) - (1 << (bits - 1)).to(tl.float32)
        if zero_points != 0:
            bottom = round_even(tl.maximum(low * inverse, -levels))
            eights = tile * (RUN // 8) + tl.arange(0, RUN // 8)
            store_packed(zero_points, eights, tl.reshape((0.0 - bottom).to(tl.int32), (RUN // 8, 8)), bits, n_groups)
        if length % 8 == 0:
            steps = _steps(weight, inverse[:, None], bottom[:, None], (bottom + levels)[:, None])
            if out != 0:
                store_floats(out, where, steps * scale[:, None], inside, tl.load(row + 5))
            codes = tl.reshape((steps - bottom[:, None]).to(tl.int32), (TILE // 8, 8))
            # Every eight lies in a row or beyond one: the latter are sent beyond the end.
            part = tl.arange(0, SIZE // 8)[None, :]
            own = (start[:, None] + part * 8 < length) & (group < n_groups)[:, None]
            eights = tl.reshape(tl.where(own, first[:, None] // 8 + part, count), (TILE // 8,))
            store_packed(tl.load(row + 0), eights, codes, bits, count)


@triton.jit
def _encode(table, columns, GROUPS: tl.constexpr):
    """Codes, packed, and weights under the stored scales and zero points."""
    row = table + tl.program_id(1) * columns
    count, bits, out = tl.load(row + 9) * tl.load(row + 10), tl.load(row + 7), tl.load(row + 3)
    eight = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    if tl.program_id(0).to(tl.int64) * GROUPS * 8 < count:
        where = eight[:, None] * 8 + tl.arange(0, 8)[None, :]
        inside = where < count
        weight = load_floats(tl.load(row + 4), where, inside, tl.load(row + 6))
        scale, zero = _grids(row, eight, GROUPS)
        steps = _steps(weight, _inverse(scale), 0.0 - zero, ((1 << bits) - 1).to(tl.float32) - zero)
        if out != 0:
            store_floats(out, where, steps * scale, inside, tl.load(row + 5))
        store_packed(tl.load(row + 0), eight, tl.where(inside, (steps + zero).to(tl.int32), 0), bits, count)
