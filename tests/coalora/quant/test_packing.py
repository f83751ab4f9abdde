"""Bit packing against numpy's packbits, which shares no code with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coalora.errors import CoaloraError
from coalora.quant.packing import pack_codes, packed_size, unpack_codes

COUNTS = (0, 1, 2, 7, 8, 9, 63, 64, 1001)


def random_codes(count: int, bits: int) -> torch.Tensor:
    rng = np.random.default_rng(100 * bits + count)
    return torch.from_numpy(rng.integers(0, 2**bits, count).astype(np.uint8))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", COUNTS)
def test_packed_bits_are_the_little_endian_stream_and_come_back(bits: int, count: int) -> None:
    codes = random_codes(count, bits)
    stream = (codes.numpy()[:, None] >> np.arange(bits)) & 1
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.untyped_storage().nbytes() == packed_size(count, bits) == -(-count * bits // 8)
    np.testing.assert_array_equal(packed.numpy(), np.packbits(stream.ravel(), bitorder="little"))
    assert torch.equal(unpack_codes(packed, bits, count), codes)


def test_three_bit_codes_straddle_bytes() -> None:
    packed = pack_codes(torch.tensor([0b001, 0b010, 0b111], dtype=torch.uint8), 3)
    assert packed.tolist() == [0b11_010_001, 0b1]


def test_packing_does_not_alias_its_input() -> None:
    codes = random_codes(16, 8)
    packed = pack_codes(codes, 8)
    packed.zero_()
    assert int(codes.max()) > 0


def test_a_code_too_large_for_its_width_is_refused() -> None:
    with pytest.raises(CoaloraError, match="does not fit 3 bits"):
        pack_codes(torch.tensor([3, 8], dtype=torch.uint8), 3)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_widths_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(CoaloraError, match="Take 1 to 8 bits"):
        pack_codes(torch.zeros(4, dtype=torch.uint8), bits)


@pytest.mark.parametrize("codes", [torch.zeros(4, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.uint8)])
def test_only_flat_uint8_codes_are_taken(codes: torch.Tensor) -> None:
    with pytest.raises(CoaloraError, match="no flat uint8"):
        pack_codes(codes, 4)


@pytest.mark.parametrize("count", [0, 7, 11, -1])
def test_a_truncated_or_overlong_buffer_is_refused(count: int) -> None:
    with pytest.raises(CoaloraError, match="bytes"):
        unpack_codes(torch.zeros(4, dtype=torch.uint8), 3, count)  # 8 to 10 codes fit
