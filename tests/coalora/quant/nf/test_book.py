"""NormalFloat code books: the definition, and parity with bitsandbytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from coalora.errors import CoaloraError
from coalora.quant.nf.book import nearest_codes, nf_code_book
from tests.coalora.oracles import Oracle, nf4_quantized, nf4_table


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_book_ascends_from_minus_one_to_one_through_an_exact_zero(bits: int) -> None:
    book = nf_code_book(bits)
    assert book.dtype == np.float32
    assert len(book) == 2**bits
    assert (book[0], book[2 ** (bits - 1) - 1], book[-1]) == (-1, 0, 1)
    assert np.all(np.diff(book) > 0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_entries_are_equally_spaced_in_probability_on_either_side(bits: int) -> None:
    d, half = 0.9677083, 2 ** (bits - 1)
    probability = norm.cdf(nf_code_book(bits).astype(np.float64), scale=1 / norm.ppf(d))
    np.testing.assert_allclose(np.diff(probability[:half]), (d - 0.5) / (half - 1), rtol=1e-4)
    np.testing.assert_allclose(np.diff(probability[half - 1 :]), (d - 0.5) / half, rtol=1e-4)


@pytest.mark.oracles
def test_nf4_is_the_table_of_bitsandbytes(oracle: Oracle) -> None:
    np.testing.assert_allclose(nf_code_book(4), oracle(nf4_table), rtol=0, atol=2e-7)


@pytest.mark.oracles
def test_nf4_codes_are_those_of_bitsandbytes(oracle: Oracle) -> None:
    weight = torch.randn(256, 192, generator=torch.Generator().manual_seed(0))
    packed, absmax = oracle(nf4_quantized, weight.numpy(), 64)
    scales = weight.view(-1, 64).abs().amax(1, keepdim=True)
    np.testing.assert_array_equal(absmax, scales.view(-1).numpy())
    codes = nearest_codes(weight.view(-1, 64) / scales, 4)
    np.testing.assert_array_equal(codes.view(-1).numpy(), np.stack([packed >> 4, packed & 15], axis=1).reshape(-1))


def test_numbers_beyond_the_book_get_its_ends_and_shape_is_kept() -> None:
    codes = nearest_codes(torch.tensor([[-7.0, float("-inf")], [7.0, float("inf")]]), 3)
    assert codes.tolist() == [[0, 0], [7, 7]]
    assert nearest_codes(torch.zeros(2, 0, 3), 3).shape == (2, 0, 3)


def test_lookups_made_under_inference_mode_serve_training_too() -> None:
    with torch.inference_mode():
        nearest_codes(torch.zeros(4), 5)  # a width that nothing else here uses first
    assert nearest_codes(torch.zeros(4, requires_grad=True), 5).tolist() == [15] * 4


def test_the_cached_book_cannot_be_overwritten() -> None:
    with pytest.raises(ValueError, match="read-only"):
        nf_code_book(4)[0] = 0


def test_unknown_widths_are_refused() -> None:
    for bits in (1, 9):
        with pytest.raises(CoaloraError, match="2 to 8 bits"):
            nf_code_book(bits)
