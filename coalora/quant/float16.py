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
from coalora.quant.scheme import Choice, InputStatistics, Scheme, check_tensors, check_weight, own_choice

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FloatChoice(Choice):
    """One choice; `bits` is 16, so that limits on bits apply to every scheme alike."""

    field_values: ClassVar = {"bits": (16,), "dtype": tuple(_DTYPES)}
    bits: int
    dtype: str

    def __str__(self) -> str:
        """``bf16`` or ``fp16``."""
        return self.dtype


class FloatScheme(Scheme):
    """Rounding to a 16-bit float. State and packed: ``values`` (out, in) of the choice's dtype."""

    name = "float"
    choice_type: ClassVar[type[Choice]] = FloatChoice

    def nominal_bits(self, choice: Choice) -> float:
        _dtype(choice)
        return 16.0

    def packed_nbytes(self, choice: Choice, shape: Sequence[int]) -> int:
        _dtype(choice)
        return 2 * prod(shape)

    def quantize(self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None) -> dict[str, Tensor]:
        dtype = _dtype(choice)
        check_weight(weight)
        values = weight.detach().to(torch.float32).to(dtype).contiguous()
        if not bool(torch.isfinite(values).all()):
            raise CoaloraError(
                f"A weight up to {float(weight.detach().abs().max()):g} is not finite in {choice}, which reaches "
                f"{torch.finfo(dtype).max:g}",
                remedy="Allow the dtype bf16, or repair the checkpoint where its weights are not finite",
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
    return _DTYPES[own_choice(choice, FloatChoice).dtype]


def _check(tensors: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> None:
    check_tensors("state", tensors, {"values": (_dtype(choice), tuple(shape))}, choice, shape)
