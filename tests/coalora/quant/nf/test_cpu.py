"""Decoding made for CPUs against unpacking and dequantizing, bit for bit."""

from __future__ import annotations

import pytest
import torch

from coalora.quant.nf import cpu
from coalora.quant.nf.scheme import NFScheme
from coalora.quant.scheme import Scheme

NF = NFScheme()
SOME = NF.choices()[::17]  # 26 choices in which every field value occurs
# Rows that no group divides, rows that all do, one chunk, two chunks.
SHAPES = [(1, 1), (13, 37), (3, 64), (128, 256), (130, 512)]


def gaussian(shape: tuple[int, int]) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
    weight[0, :] *= 1e-3
    weight[-1, : shape[1] // 2] = 0
    return weight


def test_the_sample_of_choices_covers_every_value_of_every_field() -> None:
    for name, values in NF.field_values.items():
        assert {choice.as_dict()[name] for choice in SOME} == set(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding_packed_codes_equals_unpacking_and_dequantizing(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = gaussian(shape)
    for choice in SOME:
        packed = NF.quantize_packed(weight, choice)
        out, expected = (torch.full(shape, 9.0, dtype=dtype) for _ in range(2))
        NF.dequantize_packed(packed, choice, shape, out)
        Scheme.dequantize_packed(NF, packed, choice, shape, expected)
        assert torch.equal(out, expected), choice


def test_results_do_not_depend_on_the_layout_of_the_destination() -> None:
    weight, choice = gaussian((24, 64)), SOME[3]
    expected = NF.fake_quantize(weight, choice)
    for out in (torch.empty(64, 24).T, torch.empty(24, 128)[:, ::2]):
        NF.dequantize_packed(NF.quantize_packed(weight, choice), choice, weight.shape, out)
        assert torch.equal(out, expected)


def test_a_chunk_holds_whole_blocks_and_whole_groups_of_packed_codes() -> None:
    assert all(cpu.CHUNK % (8 * size) == 0 for size in (16, 32, 64))
