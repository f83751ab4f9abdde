"""Bit packing: codes of 1 to 8 bits stored without gaps.

Code ``i`` of width ``b`` takes bits ``i*b .. (i+1)*b - 1`` of a little-endian bit stream (bit 0 is the lowest
bit of byte 0), so that 3-bit codes straddle bytes and ``m`` codes take exactly ``ceil(m*b/8)`` bytes. Eight
codes always fill ``b`` whole bytes, which fit one 64-bit word, so both directions work on words of eight, whose
codes are brought together (or taken apart) in three steps. Words are little-endian wherever torch runs.
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
        raise CoaloraError(f"Code {int(codes.max())} does not fit {bits} bits")
    if bits == 8:
        return codes.clone()
    padded = codes.new_zeros(count + -count % 8)
    padded[:count] = codes
    words = padded.view(torch.int64)
    for step in range(3):
        _shift(words, bits, step, closer=True)
    # A clone drops the bytes of the padding from the storage too, not only from the view.
    packed = words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)
    return packed[: packed_size(count, bits)].clone()


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
            f"{packed.numel()} bytes are not those of {count} codes of {bits} bits ({packed_size(max(count, 0), bits)})"
        )
    if bits == 8:
        return packed.clone()
    groups = pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
    words = torch.zeros(len(groups), dtype=torch.int64, device=packed.device)
    words.view(torch.uint8).view(-1, 8)[:, :bits] = groups
    for step in reversed(range(3)):
        _shift(words, bits, step, closer=False)
    codes = words.view(torch.uint8)
    return codes if len(codes) == count else codes[:count].clone()


def _shift(words: Tensor, bits: int, step: int, *, closer: bool) -> None:
    """In place, in every 64-bit word of eight codes: bring runs of 2^step codes together in pairs, or take them apart.

    A code starts with eight bits to itself. Step 0 makes pairs in 16 bits, step 1 fours in 32, step 2 eights in 64.
    """
    lane, run = 16 << step, bits << step
    distance = lane // 2 - run
    low = _lanes((1 << run) - 1, lane)
    high = _lanes(((1 << run) - 1) << (run if closer else lane // 2), lane)
    moved = (words >> distance if closer else words << distance).bitwise_and_(high)
    words.bitwise_and_(low).bitwise_or_(moved)


def _lanes(pattern: int, lane: int) -> int:
    """`pattern` in every lane of a 64-bit word, as a signed integer."""
    word = sum(pattern << (lane * i) for i in range(64 // lane))
    return word - (1 << 64) if word >> 63 else word


def _check(tensor: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise CoaloraError(f"There are no codes of {bits} bits", remedy="Take 1 to 8 bits")
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise CoaloraError(f"Codes of type {tensor.dtype} and shape {tuple(tensor.shape)} are no flat uint8 tensor")
