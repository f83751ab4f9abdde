"""Choices of the nf scheme; what its fields mean is in `coalora.quant.nf.scheme`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from coalora.quant.scheme import Choice


@dataclass(frozen=True)
class NFChoice(Choice):
    """One choice: b, b0, b1, B0, B1 of `coalora.quant.nf.scheme`, in this order."""

    field_values: ClassVar = {
        "bits": (2, 3, 4, 8),
        "scale_bits": (2, 3, 4, 8),
        "scale_dtype": ("bf16", "fp16", "fp32"),
        "block_size": (16, 32, 64),
        "scale_block_size": (16, 64, 256),
    }
    bits: int
    scale_bits: int
    scale_dtype: str
    block_size: int
    scale_block_size: int

    def __str__(self) -> str:
        """For example ``nf3 b32 s4/bf16 x64``."""
        return f"nf{self.bits} b{self.block_size} s{self.scale_bits}/{self.scale_dtype} x{self.scale_block_size}"
