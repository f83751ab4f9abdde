"""Layers kept in 16 bits: the ``float`` scheme, a cast to bf16 or fp16 and nothing else.

For layers whose quantization costs more than it saves: heads, embeddings' outputs, a block's first projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.quant.scheme import Choice, FieldValue, InputStatistics, Scheme, register_scheme

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FIELD_VALUES: dict[str, tuple[FieldValue, ...]] = {"bits": (16,), "dtype": tuple(_DTYPES)}


@dataclass(frozen=True)
class FloatChoice(Choice):
    """One choice; `bits` is 16, so that limits on bits apply to every scheme alike.

    Raises:
        CoaloraError: a value that the scheme does not have.
    """

    bits: int
    dtype: str

    def __post_init__(self) -> None:
        for name, value in self.as_dict().items():
            if value not in _FIELD_VALUES[name]:
                raise CoaloraError(f"no such value of float field {name!r}", got=value, expected=_FIELD_VALUES[name])
        object.__setattr__(self, "bits", 16)

    def __str__(self) -> str:
        """``bf16`` or ``fp16``."""
        return self.dtype


@register_scheme
class FloatScheme(Scheme):
    """Rounding to a 16-bit float. State and packed: ``values`` (out, in) of the choice's dtype."""

    name: ClassVar[str] = "float"
    choice_type: ClassVar[type[Choice]] = FloatChoice
    field_values: ClassVar[Mapping[str, tuple[FieldValue, ...]]] = _FIELD_VALUES

    def nominal_bits(self, choice: Choice) -> float:
        _dtype(choice)
        return 16.0

    def packed_nbytes(self, choice: Choice, shape: Sequence[int]) -> int:
        _dtype(choice)
        return 2 * prod(shape)

    def quantize(self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None) -> dict[str, Tensor]:
        dtype = _dtype(choice)
        if not weight.is_floating_point() or weight.numel() == 0:
            raise CoaloraError(
                "a weight to keep is a floating-point tensor that is not empty",
                got=f"{weight.dtype} of shape {tuple(weight.shape)}",
            )
        values = weight.detach().to(torch.float32).to(dtype).contiguous()
        if not bool(torch.isfinite(values).all()):
            raise CoaloraError(
                f"a weight to keep is finite in {choice}",
                got=f"NaN or inf, from weights up to {float(weight.detach().abs().max()):g}",
                expected=f"at most {torch.finfo(dtype).max:g}",
                remedy="allow the dtype bf16, or repair the checkpoint where its weights are not finite",
            )
        return {"values": values}

    def dequantize(
        self,
        state: Mapping[str, Tensor],
        choice: Choice,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        _check(state, choice, shape)
        return state["values"].to(torch.float32).to(dtype)

    def pack(self, state: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        _check(state, choice, shape)
        return {"values": state["values"].clone()}

    def unpack(self, tensors: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        _check(tensors, choice, shape)
        return dict(tensors)


def _dtype(choice: Choice) -> torch.dtype:
    if not isinstance(choice, FloatChoice):
        raise CoaloraError("the float scheme takes its own choices", got=repr(choice), expected="a FloatChoice")
    return _DTYPES[choice.dtype]


def _check(tensors: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> None:
    expected = {"values": (_dtype(choice), tuple(shape))}
    got = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if got != expected:
        raise CoaloraError(f"tensors fit {choice} and shape {tuple(shape)}", got=got, expected=expected)
