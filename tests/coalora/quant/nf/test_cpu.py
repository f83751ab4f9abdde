"""The passes made for CPUs against the plain ones that run on any device, bit for bit."""

from __future__ import annotations

import pytest
import torch

from coalora.quant.nf import cpu
from coalora.quant.nf.book import nf_lookup
from coalora.quant.nf.scheme import NFScheme, _nearest, _prepared
from coalora.quant.scheme import Scheme

NF = NFScheme()
SOME = NF.choices()[::17]  # 26 choices in which every field value occurs
# Shorter than a block, no multiple of anything, one chunk, two chunks with a short block at the end.
SHAPES = [(1, 1), (3, 7), (13, 37), (128, 256), (130, 509)]


def gaussian(shape: tuple[int, int]) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
    weight[0, :] *= 1e-3
    weight[-1, : shape[1] // 2] = 0
    return weight


def plain(weight: torch.Tensor, choice) -> torch.Tensor:
    blocks, _, safe, scales = _prepared(weight, choice, None)
    lookup = nf_lookup(choice.bits, weight.device)
    entries = _nearest(blocks, safe, lookup.table, lookup.entries).mul_(scales[:, None])
    return entries.view(-1)[: weight.numel()].view(weight.shape)


def test_the_sample_of_choices_covers_every_value_of_every_field() -> None:
    for name, values in NF.field_values.items():
        assert {choice.as_dict()[name] for choice in SOME} == set(values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_requantizing_equals_the_plain_path(shape: tuple[int, int]) -> None:
    weight = gaussian(shape)
    for choice in SOME:
        out = torch.full(shape, 9.0)
        NF.requantize(weight, choice, out=out)
        assert torch.equal(out, plain(weight, choice)), choice


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
        requantized = torch.empty(shape, dtype=dtype)
        NF.requantize(weight, choice, out=requantized)
        assert torch.equal(out, requantized), choice


def test_results_do_not_depend_on_the_layout_of_the_destination() -> None:
    weight, choice = gaussian((24, 40)), SOME[3]
    expected = NF.fake_quantize(weight, choice)
    for out in (torch.empty(40, 24).T, torch.empty(24, 80)[:, ::2]):
        NF.requantize(weight, choice, out=out)
        assert torch.equal(out, expected)
        out.zero_()
        NF.dequantize_packed(NF.quantize_packed(weight, choice), choice, weight.shape, out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scales_measured_once_serve_every_choice(shape: tuple[int, int]) -> None:
    weight = gaussian(shape)
    measured = NF.measure(weight)
    assert len(measured) == -(-weight.numel() // 16)
    for choice in SOME:
        alone, shared = NF.quantize(weight, choice), NF.quantize(weight, choice, measured=measured)
        assert all(torch.equal(alone[name], shared[name]) for name in alone)


def test_a_chunk_holds_whole_blocks_and_whole_groups_of_packed_codes() -> None:
    assert all(cpu.CHUNK % (8 * size) == 0 for size in (16, 32, 64))
