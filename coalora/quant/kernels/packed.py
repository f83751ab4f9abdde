"""What the kernels of all schemes share: the table of pointers, numbers of three dtypes, bit-packed codes, rounding.

Every kernel has a two-dimensional grid, (tile of a layer, layer), and reads from a table of pointers and sizes (one row
of int64 a layer) what its layer is: layers of different shapes, bits and block sizes go in one launch. That matters,
because 144 launches of a microsecond's work each would spend a hundred times as long in being launched.

Weights are taken in eights, whose codes of b bits fill b whole bytes.

Bit for bit the plain path: divisions are rounded (`div_rn`; Triton's `/` is not), products and sums are not fused
(`launch` says so to the compiler), and rounding to even is the addition and subtraction of 1.5 * 2^23.
Nothing is checked and nothing waits for the GPU: that weights are finite is checked at calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coalora.quant.kernels.available import KERNEL_DTYPES

EIGHTS = 256  # eights of weights in a tile


def address(tensor: Tensor | None) -> int:
    """For a column of the table; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def float_code(tensor: Tensor | None) -> int:
    """For a column of the table: the dtype, as `load_floats` and `store_floats` know it; 0 for no tensor."""
    return 0 if tensor is None else KERNEL_DTYPES[tensor.dtype]


def table_of(rows: Sequence[Sequence[int]] | Tensor, device: torch.device) -> Tensor:
    """int64 (n_layers, columns) on ``device``, without waiting for it."""
    table = torch.as_tensor(rows, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def launch(kernel: Any, tiles: int, table: Tensor, *arguments: object) -> None:
    """Run ``kernel(table, columns, *arguments)`` on a grid of ``tiles`` for each of the table's layers."""
    kernel[(tiles, len(table))](table, table.shape[1], *arguments, enable_fp_fusion=False)


def tiles_of(tensors: Sequence[Tensor]) -> int:
    """Tiles of the largest layer's weights."""
    return triton.cdiv(max(tensor.numel() for tensor in tensors), EIGHTS * 8)


@triton.jit
def load_floats(address, index, mask, dtype):
    """float32 of the bf16 (0), fp16 (1) or fp32 (2) numbers at ``address``; 0 beyond the mask."""
    if dtype == 0:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + index, mask=mask, other=0.0).to(tl.float32)
    elif dtype == 1:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + index, mask=mask, other=0.0).to(tl.float32)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + index, mask=mask, other=0.0)
    return value


@triton.jit
def bf16_bits(value):
    """The bits of finite float32 numbers rounded to bf16, ties to even; Triton's interpreter would cut them off."""
    bits = value.to(tl.uint32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def store_floats(address, index, value, mask, dtype):
    """float32 numbers rounded to dtype 0, 1 or 2, as `load_floats` knows them."""
    if dtype == 0:
        tl.store(address.to(tl.pointer_type(tl.uint16)) + index, bf16_bits(value).to(tl.uint16), mask=mask)
    elif dtype == 1:
        tl.store(address.to(tl.pointer_type(tl.float16)) + index, value.to(tl.float16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.float32)) + index, value, mask=mask)


@triton.jit
def load_packed(address, eight, bits, count):
    """int64 (G, 8): the codes of the eights (G,), of ``count`` codes in all."""
    lanes = tl.arange(0, 8)
    index = eight[:, None] * bits + lanes[None, :]
    known = (lanes[None, :] < bits) & (index < (count * bits + 7) // 8)
    parts = tl.load(address.to(tl.pointer_type(tl.uint8)) + index, mask=known, other=0)
    words = tl.sum(parts.to(tl.int64) << (lanes * 8)[None, :], axis=1)
    return (words[:, None] >> (lanes * bits)[None, :]) & ((1 << bits) - 1)


@triton.jit
def load_code(address, index, bits, count, mask):
    """int32: single codes, of ``count`` codes in all; a code lies in two bytes at most."""
    position = index * bits
    bytes_ = address.to(tl.pointer_type(tl.uint8)) + position // 8
    more = position // 8 + 1 < (count * bits + 7) // 8
    low = tl.load(bytes_, mask=mask, other=0).to(tl.int32)
    high = tl.load(bytes_ + 1, mask=mask & more, other=0).to(tl.int32)
    return ((low | (high << 8)) >> (position % 8).to(tl.int32)) & ((1 << bits) - 1).to(tl.int32)


@triton.jit
def store_packed(address, eight, codes, bits, count):
    """Codes (G, 8) to the bytes of each of the eights (G,); codes beyond ``count`` are zero already.

    An eight of ``count`` or more stands for none: nothing is stored.
    """
    lanes = tl.arange(0, 8)
    words = tl.sum(codes.to(tl.int64) << (lanes * bits)[None, :], axis=1)
    parts = (words[:, None] >> (lanes * 8)[None, :]) & 255
    index = eight[:, None] * bits + lanes[None, :]
    inside = (lanes[None, :] < bits) & (index < (count * bits + 7) // 8)
    tl.store(address.to(tl.pointer_type(tl.uint8)) + index, parts.to(tl.uint8), mask=inside)


@triton.jit
def round_even(value):
    """Of numbers below 2^22."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def groups_of(eight, length, size):
    """int64 (G, 8): the group of every weight of the eights (G,), in rows of ``length`` and groups of ``size``."""
    # One long division for an eight, short ones for its weights.
    above = eight * 8 // length
    column = (eight * 8 - above * length).to(tl.int32)[:, None] + tl.arange(0, 8)[None, :]
    below = column // length.to(tl.int32)
    return (above[:, None] + below) * ((length + size - 1) // size) + (column - below * length) // size
