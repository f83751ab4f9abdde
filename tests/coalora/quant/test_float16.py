"""The float scheme: a cast, in exact bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coalora.errors import CoaloraError
from coalora.files import write_tensors
from coalora.quant.float16 import FloatChoice, FloatScheme
from coalora.quant.integer.scheme import IntChoice

FLOAT = FloatScheme()
BF16, FP16 = FLOAT.choices()


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def bf16_oracle(weight: np.ndarray) -> np.ndarray:
    """Round to nearest even on the bits of float32: the upper half of each word."""
    bits = weight.view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


def test_weights_are_rounded_to_the_nearest_16_bit_number() -> None:
    weight = gaussian(13, 37)
    np.testing.assert_array_equal(FLOAT.fake_quantize(weight, BF16).numpy(), bf16_oracle(weight.numpy()))
    expected = weight.numpy().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(FLOAT.fake_quantize(weight, FP16).numpy(), expected)


@pytest.mark.parametrize("choice", FLOAT.choices(), ids=str)
def test_a_weight_of_this_type_is_kept_as_it_is_in_exact_bytes(choice: FloatChoice, tmp_path) -> None:
    weight = gaussian(7, 5).to(torch.bfloat16 if choice == BF16 else torch.float16)
    state = FLOAT.quantize(weight, choice)
    packed = FLOAT.pack(state, choice, (7, 5))
    assert torch.equal(FLOAT.dequantize(FLOAT.unpack(packed, choice, (7, 5)), choice, (7, 5)), weight.float())
    assert FLOAT.packed_nbytes(choice, (7, 5)) == sum(t.untyped_storage().nbytes() for t in packed.values()) == 70
    write_tensors(tmp_path / "one.safetensors", packed)
    content = (tmp_path / "one.safetensors").read_bytes()
    assert len(content) - 8 - int.from_bytes(content[:8], "little") == 70
    assert FLOAT.nominal_bits(choice) == 16


def test_a_transposed_weight_is_packed_row_by_row_and_a_parameter_gives_no_graph() -> None:
    weight = torch.nn.Parameter(gaussian(5, 7))
    packed = FLOAT.pack(FLOAT.quantize(weight.T, BF16), BF16, (7, 5))
    assert packed["values"].is_contiguous()
    assert torch.equal(packed["values"].float(), FLOAT.fake_quantize(weight, BF16).T)
    assert not FLOAT.fake_quantize(weight, BF16).requires_grad


def test_what_cannot_be_kept_is_refused() -> None:
    large = torch.tensor([[1e5]])
    with pytest.raises(CoaloraError, match=r"up to 100000 is not finite in fp16, which reaches 65504\. Allow.* bf16"):
        FLOAT.quantize(large, FP16)
    assert float(FLOAT.fake_quantize(large, BF16)) == pytest.approx(1e5, rel=2**-8)
    for weight, message in ((torch.tensor([[float("nan")]]), "not finite"), (torch.empty(0, 3), "at least one entry")):
        with pytest.raises(CoaloraError, match=message):
            FLOAT.quantize(weight, BF16)
    with pytest.raises(CoaloraError, match="under fp16"):
        FLOAT.unpack(FLOAT.quantize(gaussian(2, 3), BF16), FP16, (2, 3))
    with pytest.raises(CoaloraError, match="is no FloatChoice"):
        FLOAT.quantize(gaussian(2, 3), IntChoice(4, 32, "sym"))
    with pytest.raises(CoaloraError, match="FloatChoice has no dtype"):
        FloatChoice(16, "fp32")
