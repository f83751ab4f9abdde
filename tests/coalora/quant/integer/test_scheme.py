"""The int scheme against NumPy loops over groups, and against torch's own fake quantization."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from coalora.errors import CoaloraError
from coalora.files import write_tensors
from coalora.quant.integer.scheme import IntChoice, IntScheme
from coalora.quant.nf.scheme import NFChoice

INT = IntScheme()
ALL = INT.choices()
# Every field value occurs.
SOME = (IntChoice(2, 32, "sym"), IntChoice(3, 64, "asym"), IntChoice(4, 128, "sym"), IntChoice(8, 32, "asym"))
CHOICES = pytest.mark.parametrize("choice", SOME, ids=str)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {
    "random": lambda: gaussian(24, 256),
    "no group divides a row": lambda: gaussian(13, 37),
    "mixed magnitudes": lambda: gaussian(40, 64) * torch.logspace(-4, 3, 40)[:, None],
    "positive": lambda: gaussian(8, 64).abs() + 1,
    "negative": lambda: -gaussian(8, 64).abs() - 1,
    "constant": lambda: torch.full((8, 33), -0.7),
    "some zero groups": lambda: gaussian(8, 64) * torch.tensor([0.0, 1.0]).repeat_interleave(32),
    "subnormal scales": lambda: gaussian(16, 32) * 1e-6,
    "tiny": lambda: gaussian(16, 32) * 1e-30,
    "huge": lambda: gaussian(16, 32) * 1e30,
    "up to the largest float": lambda: gaussian(16, 32).sign() * torch.linspace(0, 3.4028e38, 512).view(16, 32),
    "one element": lambda: torch.tensor([[-3.5]]),
}


def oracle(weight: np.ndarray, choice: IntChoice) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes (out, in), scales and zero points of the groups, weights: loops in NumPy, float32 where it decides."""
    levels, rows, columns = 2**choice.bits - 1, *weight.shape
    codes, result = np.empty(weight.shape), np.empty(weight.shape, dtype=np.float32)
    scales, zeros = [], []
    for i in range(rows):
        for start in range(0, columns, choice.group_size):
            group = weight[i, start : start + choice.group_size]
            low, high = min(group.min(), np.float32(0)), max(group.max(), np.float32(0))
            if choice.mode == "asym":
                width = high / np.float32(levels) - low / np.float32(levels)
            else:
                width = max(high, -low) / np.float32(levels) * np.float32(2)
            scale = np.float16(min(width, np.float32(65504)))
            inverse = np.float32(0) if scale == 0 else np.float32(1) / np.float32(scale)
            zero = np.clip(np.round(-low * inverse), 0, levels) if choice.mode == "asym" else 2 ** (choice.bits - 1)
            with np.errstate(over="ignore"):
                code = np.clip(np.round(group * inverse) + zero, 0, levels)
            codes[i, start : start + choice.group_size] = code
            result[i, start : start + choice.group_size] = (code - zero).astype(np.float32) * np.float32(scale)
            scales.append(scale)
            zeros.append(zero)
    return codes, np.array(scales), np.array(zeros), result


@CHOICES
@pytest.mark.parametrize("kind", WEIGHTS)
def test_codes_scales_and_weights_are_those_of_the_formulas(kind: str, choice: IntChoice) -> None:
    weight = WEIGHTS[kind]()
    state = INT.quantize(weight, choice)
    codes, scales, zeros, result = oracle(weight.numpy(), choice)
    np.testing.assert_array_equal(state["codes"].numpy(), codes.ravel())
    np.testing.assert_array_equal(state["scales"].numpy(), scales)
    if choice.mode == "asym":
        np.testing.assert_array_equal(state["zero_points"].numpy(), zeros)
    else:
        assert "zero_points" not in state
    np.testing.assert_array_equal(INT.dequantize(state, choice, weight.shape).numpy(), result)
    np.testing.assert_array_equal(INT.fake_quantize(weight, choice).numpy(), result)


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_rounding_is_torchs_fake_quantization_under_the_same_scales(choice: IntChoice) -> None:
    weight = gaussian(16, 256)
    state = INT.quantize(weight, choice)
    groups, low = weight.view(-1, choice.group_size), -(2 ** (choice.bits - 1))
    if choice.mode == "asym":
        zero, ends = state["zero_points"].int(), (0, 2**choice.bits - 1)
    else:
        zero, ends = torch.zeros(len(groups), dtype=torch.int32), (low, -low - 1)
    expected = torch.fake_quantize_per_channel_affine(groups, state["scales"].float(), zero, 0, *ends)
    assert torch.equal(INT.fake_quantize(weight, choice), expected.view(16, 256))


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_scales_and_zero_points_are_those_of_torchs_observer_up_to_fp16(choice: IntChoice) -> None:
    weight = gaussian(16, 256)
    state = INT.quantize(weight, choice)
    symmetric = choice.mode == "sym"
    shift = 2 ** (choice.bits - 1) if symmetric else 0
    observer = PerChannelMinMaxObserver(
        ch_axis=0,
        dtype=torch.qint8 if symmetric else torch.quint8,
        qscheme=torch.per_channel_symmetric if symmetric else torch.per_channel_affine,
        quant_min=-shift,
        quant_max=2**choice.bits - 1 - shift,
    )
    observer(weight.view(-1, choice.group_size))
    scale, zero = observer.calculate_qparams()
    torch.testing.assert_close(state["scales"].float(), scale, rtol=2**-11, atol=0)
    if not symmetric:
        # The stored scale may carry a zero point over a half.
        assert int((state["zero_points"].int() - zero.int()).abs().max()) <= 1


def test_packed_bytes_are_exactly_those_of_the_packed_tensors_and_of_the_file(tmp_path) -> None:
    for shape in ((23, 61), (3, 130), (1, 1)):
        weight = gaussian(*shape)
        for choice in ALL:
            state = INT.quantize(weight, choice)
            packed = INT.pack(state, choice, shape)
            nbytes = INT.packed_nbytes(choice, shape)
            assert nbytes == sum(t.untyped_storage().nbytes() for t in packed.values())
            unpacked = INT.unpack(packed, choice, shape)
            assert unpacked.keys() == state.keys()
            assert all(torch.equal(unpacked[name], state[name]) for name in state)
    write_tensors(tmp_path / "one.safetensors", INT.pack(state, choice, shape))
    content = (tmp_path / "one.safetensors").read_bytes()
    assert len(content) - 8 - int.from_bytes(content[:8], "little") == nbytes


def test_nominal_bits_are_the_bytes_of_groups_that_fit() -> None:
    for choice in ALL:
        assert INT.packed_nbytes(choice, (64, 1024)) * 8 / (64 * 1024) == INT.nominal_bits(choice)
    assert INT.nominal_bits(IntChoice(4, 128, "sym")) == 4.125
    assert INT.nominal_bits(IntChoice(4, 128, "asym")) == 4.15625


def test_many_are_each_alone_and_leave_the_weight_as_it_was() -> None:
    weight = gaussian(13, 100)
    kept = weight.clone()
    for choice, (state,) in zip(ALL, INT.quantize_layers([weight], ALL, [None]), strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in INT.quantize(weight, choice).items())
        for tensor in state.values():
            tensor.zero_()
    assert torch.equal(weight, kept)


def test_weights_longer_than_a_chunk_are_those_of_their_parts() -> None:
    weight = gaussian(130, 1024)  # 133,120 weights: one chunk and a short second
    for choice in SOME:
        parts = torch.cat([INT.fake_quantize(part, choice) for part in weight.split(50)])
        assert torch.equal(INT.fake_quantize(weight, choice), parts)
        assert torch.equal(INT.dequantize(INT.quantize(weight, choice), choice, weight.shape), parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_quantized_as_its_float32_value(dtype: torch.dtype) -> None:
    weight = gaussian(8, 40).to(dtype)
    assert torch.equal(INT.fake_quantize(weight, SOME[1]), INT.fake_quantize(weight.float(), SOME[1]))
    assert INT.dequantize(INT.quantize(weight, SOME[1]), SOME[1], (8, 40), dtype=dtype).dtype == dtype


def test_a_transposed_weight_is_read_row_by_row_and_a_parameter_gives_no_graph() -> None:
    weight = gaussian(24, 40)
    assert torch.equal(INT.fake_quantize(weight.T, SOME[1]), INT.fake_quantize(weight.T.contiguous(), SOME[1]))
    assert not INT.fake_quantize(torch.nn.Parameter(weight), SOME[0]).requires_grad


def test_error_falls_with_bits_with_smaller_groups_and_with_zero_points_where_they_are_needed() -> None:
    weight = gaussian(64, 256)
    skewed = weight.exp()
    for given, choices in (
        (weight, [IntChoice(bits, 64, "sym") for bits in (2, 3, 4, 8)]),
        (weight, [IntChoice(3, size, "asym") for size in (128, 64, 32)]),
        (skewed, [IntChoice(4, 64, mode) for mode in ("sym", "asym")]),
    ):
        errors = [float((INT.fake_quantize(given, choice) - given).norm()) for choice in choices]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 1.1 * errors[-1]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.empty(0, 4), "at least one entry"),
        (torch.ones(4, 4, dtype=torch.int64), "type torch.int64"),
        (torch.ones(4), r"shape \(4,\)"),
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinite"),
        (torch.tensor([[1.0, -float("inf")]]), "NaN or infinite"),
    ],
)
def test_weights_that_cannot_be_quantized_are_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(CoaloraError, match=message):
        INT.quantize(weight, SOME[0])
    with pytest.raises(CoaloraError, match=message):
        INT.fake_quantize(weight, SOME[0])


def test_tensors_of_another_choice_or_shape_are_refused() -> None:
    weight = gaussian(8, 64)
    state = INT.quantize(weight, SOME[1])
    packed = INT.pack(state, SOME[1], (8, 64))
    for choice, shape in ((SOME[0], (8, 64)), (SOME[1], (8, 65))):
        with pytest.raises(CoaloraError, match="packed weight is not that"):
            INT.unpack(packed, choice, shape)
        with pytest.raises(CoaloraError, match="state is not that"):
            INT.dequantize(state, choice, shape)
    with pytest.raises(CoaloraError, match="packed weight"):
        INT.unpack({k: v for k, v in packed.items() if k != "zero_points"}, SOME[1], (8, 64))


def test_choices_are_checked_and_of_this_scheme() -> None:
    assert len(ALL) == 24
    assert IntChoice(np.int64(4), 64, "sym").as_dict() == {"bits": 4, "group_size": 64, "mode": "sym"}  # type: ignore[arg-type]
    assert str(IntChoice(4, 64, "asym")) == "int4 g64 asym"
    with pytest.raises(CoaloraError, match=r"IntChoice has no group_size 48\. Take one of 32, 64, 128"):
        IntChoice(4, 48, "sym")
    with pytest.raises(CoaloraError, match="is no IntChoice"):
        INT.quantize(gaussian(4, 32), NFChoice(4, 8, "bf16", 64, 64))
