"""Bit packing: codes of 1 to 8 bits stored without gaps.

Code ``i`` of width ``b`` takes bits ``i*b .. (i+1)*b - 1`` of a little-endian bit stream (bit 0 is the lowest
bit of byte 0), so that 3-bit codes straddle bytes and ``m`` codes take exactly ``ceil(m*b/8)`` bytes. Eight
codes always fill ``b`` whole bytes, which fit one 64-bit word, so both directions work on words of eight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from coalora.errors import CoaloraError


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` packed codes of ``bits`` bits."""
    return (count * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes.

    Args:
        codes: uint8 (m,), each below ``2**bits``.
        bits: 1 to 8.

    Returns:
        uint8 (ceil(m*bits/8),), a new tensor on the same device; unused bits of the last byte are zero.

    Raises:
        CoaloraError: wrong dtype, shape or width, or a code that does not fit.
    """
    _check(codes, bits)
    count = codes.numel()
    if count and bits < 8 and int(codes.max()) >= 2**bits:
        raise CoaloraError("a code must fit its width", got=int(codes.max()), expected=f"below {2**bits}")
    if bits == 8:
        return codes.clone()
    groups = pad(codes, (0, -count % 8)).view(-1, 8)
    words = torch.zeros(len(groups), dtype=torch.int64, device=codes.device)
    for i in range(8):
        words |= groups[:, i].to(torch.int64) << (bits * i)
    packed = torch.empty((len(groups), bits), dtype=torch.uint8, device=codes.device)
    for j in range(bits):
        packed[:, j] = (words >> (8 * j)) & 0xFF
    # A clone drops the bytes of the padding from the storage too, not only from the view.
    return packed.view(-1)[: packed_size(count, bits)].clone()


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_codes`.

    Args:
        packed: uint8 (ceil(count*bits/8),).
        bits: 1 to 8.
        count: number of codes m.

    Returns:
        uint8 (m,), a new tensor on the same device.

    Raises:
        CoaloraError: wrong dtype, shape or width, or a size that is not that of ``count`` codes.
    """
    _check(packed, bits)
    if count < 0 or packed.numel() != packed_size(count, bits):
        raise CoaloraError(
            "packed codes have ceil(count*bits/8) bytes",
            got=f"{packed.numel()} bytes for count={count}, bits={bits}",
            expected=f"{packed_size(max(count, 0), bits)} bytes",
        )
    if bits == 8:
        return packed.clone()
    groups = pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
    words = torch.zeros(len(groups), dtype=torch.int64, device=packed.device)
    for j in range(bits):
        words |= groups[:, j].to(torch.int64) << (8 * j)
    codes = torch.empty((len(groups), 8), dtype=torch.uint8, device=packed.device)
    for i in range(8):
        codes[:, i] = (words >> (bits * i)) & (2**bits - 1)
    return codes.view(-1)[:count].clone()


def _check(tensor: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise CoaloraError("codes have 1 to 8 bits", got=bits)
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise CoaloraError("codes are a flat uint8 tensor", got=f"{tensor.dtype} of shape {tuple(tensor.shape)}")
