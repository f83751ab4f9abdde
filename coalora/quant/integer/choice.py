"""Choices of the int scheme; what its fields mean is in `coalora.quant.integer.scheme`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from coalora.quant.scheme import Choice


@dataclass(frozen=True)
class IntChoice(Choice):
    """One choice: b, g, and whether the groups have zero points (``asym``) or not (``sym``)."""

    field_values: ClassVar = {"bits": (2, 3, 4, 8), "group_size": (32, 64, 128), "mode": ("sym", "asym")}
    bits: int
    group_size: int
    mode: str

    def __str__(self) -> str:
        """For example ``int4 g64 asym``."""
        return f"int{self.bits} g{self.group_size} {self.mode}"
