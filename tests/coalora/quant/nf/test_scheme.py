"""The nf scheme against its formulas in plain float64 loops, over ordinary and hostile weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from coalora.errors import CoaloraError
from coalora.quant.nf.book import nf_code_book
from coalora.quant.nf.scheme import SCALE_DTYPES, NFChoice, NFScheme
from coalora.quant.scheme import Choice

NF = NFScheme()
ALL = NF.choices()
# Every field value occurs.
SOME = (
    NFChoice(2, 2, "bf16", 16, 16),
    NFChoice(3, 3, "fp16", 32, 64),
    NFChoice(4, 8, "fp32", 64, 256),
    NFChoice(8, 4, "bf16", 16, 64),
)
CHOICES = pytest.mark.parametrize("choice", SOME, ids=str)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixed_magnitudes() -> torch.Tensor:
    return gaussian(40, 32) * torch.logspace(-4, 3, 40)[:, None]


def with_a_zero_block() -> torch.Tensor:
    weight = gaussian(8, 64)
    weight[2:5] = 0
    return weight


WEIGHTS = {
    "random": lambda: gaussian(48, 40),
    "no block divides it": lambda: gaussian(13, 37),
    "mixed magnitudes": mixed_magnitudes,
    "constant": lambda: torch.full((8, 33), -0.7),
    "zero": lambda: torch.zeros(9, 17),
    "some zero blocks": with_a_zero_block,
    "tiny": lambda: gaussian(16, 32) * 1e-30,
    "subnormal": lambda: gaussian(16, 32) * 1e-40,
    "huge": lambda: gaussian(16, 32) * 1e30,
    "up to the largest float": lambda: gaussian(16, 32).sign() * torch.linspace(0, 3.4028e38, 512).view(16, 32),
    "one element": lambda: torch.tensor([[-3.5]]),
}


def check_against_formulas(weight: np.ndarray, choice: NFChoice, state: dict, result: np.ndarray) -> None:
    """Loops over groups in float64; codes may differ from the nearest only by the rounding of float32."""
    flat, columns = weight.astype(np.float64).ravel(), weight.shape[1]
    codes, scale_codes = state["codes"].numpy(), state["scale_codes"].numpy()
    absmax = state["scale_absmax"].to(torch.float32).numpy().astype(np.float64)
    book = nf_code_book(choice.bits).astype(np.float64)
    size, scale_size, levels = choice.block_size, choice.scale_block_size, 2**choice.scale_bits - 1
    starts = [(i + j, min(size, columns - j)) for i in range(0, len(flat), columns) for j in range(0, columns, size)]
    scales = [np.abs(flat[i : i + n]).max() for i, n in starts]
    offset = min(scales)
    assert state["offset"].item() == offset
    assert len(codes) == len(flat)
    assert len(scale_codes) == len(scales)
    info = torch.finfo(SCALE_DTYPES[choice.scale_dtype])
    for j in range(0, len(scales), scale_size):
        exact = min(max(s - offset for s in scales[j : j + scale_size]), info.max)
        assert abs(absmax[j // scale_size] - exact) <= exact * info.eps / 2 * 1.001 + info.smallest_normal * info.eps
    for block, scale in enumerate(scales):
        a = absmax[block // scale_size]
        target = min((scale - offset) / a, 1.0) * levels if a > 0 else 0.0
        assert abs(scale_codes[block] - target) <= 0.5 + 1e-4
        used = min(scale_codes[block] / levels * a + offset, float(np.finfo(np.float32).max))
        for i in range(starts[block][0], sum(starts[block])):
            ratio = np.clip(flat[i] / used, -1, 1) if used > 0 else 0.0
            distance = np.abs(book - ratio)
            # Subnormal scales carry fewer bits than float32 usually has.
            slack = 1e-6 + (2**-149 / used if used > 0 else 0.0)
            assert distance[codes[i]] <= distance.min() + slack
            expected = book[codes[i]] * used
            assert abs(result[i] - expected) <= 1e-6 * used + 2**-148


@CHOICES
@pytest.mark.parametrize("name", WEIGHTS)
def test_quantization_follows_its_formulas(name: str, choice: NFChoice) -> None:
    weight = WEIGHTS[name]()
    state = NF.quantize(weight, choice)
    result = NF.dequantize(state, choice, weight.shape)
    assert result.shape == weight.shape
    assert result.dtype == torch.float32
    assert bool(torch.isfinite(result).all())
    assert bool(torch.isfinite(state["scale_absmax"]).all())
    check_against_formulas(weight.numpy(), choice, state, result.numpy().ravel())


def test_the_formula_check_itself_notices_a_wrong_code() -> None:
    weight, choice = gaussian(4, 32), SOME[2]
    state = NF.quantize(weight, choice)
    state["codes"][5] ^= 1
    with pytest.raises(AssertionError):
        check_against_formulas(weight.numpy(), choice, state, NF.dequantize(state, choice, (4, 32)).numpy().ravel())


@pytest.mark.parametrize("name", ["no block divides it", "some zero blocks", "mixed magnitudes", "huge"])
def test_quantizing_alone_or_together_is_the_same(name: str) -> None:
    weight = WEIGHTS[name]()
    together = [state for (state,) in NF.quantize_layers([weight], ALL, [None])]
    assert len(together) == len(ALL) == 432
    for choice, state in list(zip(ALL, together, strict=True))[::7]:
        alone = NF.quantize(weight, choice)
        assert all(torch.equal(alone[name], state[name]) for name in alone)
        assert torch.equal(NF.fake_quantize(weight, choice), NF.dequantize(state, choice, weight.shape))


def test_states_do_not_share_memory_with_each_other_or_the_weight() -> None:
    weight = gaussian(4, 64)
    kept = weight.clone()
    (first,), (second,) = NF.quantize_layers([weight], [SOME[0], SOME[0]], [None])
    for tensor in first.values():
        tensor.zero_()
    assert all(torch.equal(second[name], tensor) for name, tensor in NF.quantize(weight, SOME[0]).items())
    assert torch.equal(weight, kept)


def test_weights_longer_than_a_chunk_are_quantized_block_by_block_alike() -> None:
    weight, choice = gaussian(130, 1040), SOME[1]  # 135,200 weights: one chunk and a short second
    state = NF.quantize(weight, choice)
    check_against_formulas(weight.numpy(), choice, state, NF.dequantize(state, choice, weight.shape).numpy().ravel())
    assert torch.equal(NF.fake_quantize(weight, choice), NF.dequantize(state, choice, weight.shape))


@CHOICES
def test_zero_weights_stay_exactly_zero(choice: NFChoice) -> None:
    weight = with_a_zero_block()
    assert not NF.fake_quantize(weight, choice)[weight == 0].any()
    assert not NF.fake_quantize(torch.zeros(5, 7), choice).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_quantized_as_its_float32_value(dtype: torch.dtype) -> None:
    weight = gaussian(8, 40).to(dtype)
    assert torch.equal(NF.fake_quantize(weight, SOME[1]), NF.fake_quantize(weight.float(), SOME[1]))
    state = NF.quantize(weight, SOME[1])
    assert NF.dequantize(state, SOME[1], (8, 40), dtype=dtype).dtype == dtype


def test_a_transposed_weight_is_read_row_by_row() -> None:
    weight = gaussian(24, 40)
    assert torch.equal(NF.fake_quantize(weight.T, SOME[1]), NF.fake_quantize(weight.T.contiguous(), SOME[1]))


def test_parameters_give_results_without_a_graph() -> None:
    assert not NF.fake_quantize(torch.nn.Parameter(gaussian(4, 16)), SOME[0]).requires_grad


def test_error_falls_with_every_step_of_bits_and_with_finer_scales() -> None:
    weight = gaussian(128, 256)
    scale = {"scale_bits": 8, "scale_dtype": "fp32", "block_size": 32, "scale_block_size": 64}
    by_bits = [NFChoice(bits, **scale) for bits in (2, 3, 4, 8)]  # type: ignore[arg-type]
    by_scale = [NFChoice(4, bits, "fp32", 32, 64) for bits in (2, 3, 4, 8)]
    by_block = [NFChoice(4, 8, "fp32", size, 64) for size in (64, 32, 16)]
    for choices in (by_bits, by_scale, by_block):
        errors = [float((NF.fake_quantize(weight, choice) - weight).norm()) for choice in choices]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 1.005 * errors[-1]
    assert float((NF.fake_quantize(weight, by_bits[-1]) - weight).norm() / weight.norm()) < 0.01


def test_packed_bytes_are_exactly_those_of_the_packed_tensors_for_every_choice() -> None:
    weight = gaussian(23, 61)
    for choice in ALL:
        state = NF.quantize(weight, choice)
        packed = NF.pack(state, choice, weight.shape)
        assert NF.packed_nbytes(choice, weight.shape) == sum(t.untyped_storage().nbytes() for t in packed.values())
        unpacked = NF.unpack(packed, choice, weight.shape)
        assert unpacked.keys() == state.keys()
        assert all(torch.equal(unpacked[name], state[name]) for name in state)


def test_nominal_bits_agree_with_stored_bytes_on_a_large_layer() -> None:
    shape = (1024, 4096)
    for choice in ALL:
        stored = NF.packed_nbytes(choice, shape) * 8 / math.prod(shape)
        assert stored == pytest.approx(NF.nominal_bits(choice), rel=0.01)
    assert NF.nominal_bits(NFChoice(3, 4, "bf16", 32, 64)) == 3 + 4 / 32 + 16 / (32 * 64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = gaussian(4, 33)
    weight[3, 32] = bad
    with pytest.raises(CoaloraError, match="finite"):
        NF.quantize(weight, SOME[0])
    with pytest.raises(CoaloraError, match="finite"):
        NF.fake_quantize(weight, SOME[0])


@pytest.mark.parametrize("bad", [torch.zeros(0, 4), torch.zeros(4, 4, dtype=torch.int8)])
def test_empty_and_integer_weights_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(CoaloraError, match="cannot be quantized"):
        NF.quantize(bad, SOME[0])


def test_unpack_refuses_tensors_of_another_choice_or_shape() -> None:
    packed = NF.pack(NF.quantize(gaussian(8, 64), SOME[0]), SOME[0], (8, 64))
    for choice, shape in ((SOME[1], (8, 64)), (SOME[0], (8, 65))):
        with pytest.raises(CoaloraError, match="packed weight is not that"):
            NF.unpack(packed, choice, shape)
    del packed["offset"]
    with pytest.raises(CoaloraError, match="packed weight is not that"):
        NF.unpack(packed, SOME[0], (8, 64))


def test_a_state_of_another_shape_or_choice_is_refused() -> None:
    state = NF.quantize(gaussian(8, 64), SOME[0])
    for choice, shape in ((SOME[0], (8, 65)), (SOME[1], (8, 64))):
        with pytest.raises(CoaloraError, match="state is not that"):
            NF.pack(state, choice, shape)
        with pytest.raises(CoaloraError, match="state is not that"):
            NF.dequantize(state, choice, shape)


def test_choices_refuse_values_the_scheme_lacks_and_choices_of_others() -> None:
    with pytest.raises(CoaloraError, match="no bits 5"):
        NFChoice(5, 4, "bf16", 32, 64)
    with pytest.raises(CoaloraError, match="is no NFChoice"):
        NF.nominal_bits(Choice())


def test_choices_hold_plain_values_whatever_they_were_made_from() -> None:
    choice = NFChoice(np.int64(4), 4, "bf16", 32.0, 64)  # type: ignore[arg-type]
    assert [type(value) for value in choice.as_dict().values()] == [int, int, str, int, int]
    assert choice == NFChoice(4, 4, "bf16", 32, 64)
    assert str(choice) == "nf4 b32 s4/bf16 x64"
