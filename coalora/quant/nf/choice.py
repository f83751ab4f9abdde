"""The choices of the nf scheme: which values its five fields have."""

from __future__ import annotations

from dataclasses import dataclass

from coalora.errors import CoaloraError
from coalora.quant.scheme import Choice, FieldValue

FIELD_VALUES: dict[str, tuple[FieldValue, ...]] = {
    "bits": (2, 3, 4, 8),
    "scale_bits": (2, 3, 4, 8),
    "scale_dtype": ("bf16", "fp16", "fp32"),
    "block_size": (16, 32, 64),
    "scale_block_size": (16, 64, 256),
}


@dataclass(frozen=True)
class NFChoice(Choice):
    """One choice: b, b0, b1, B0, B1 of `coalora.quant.nf.scheme`, in this order.

    Raises:
        CoaloraError: a value that the scheme does not have.
    """

    bits: int
    scale_bits: int
    scale_dtype: str
    block_size: int
    scale_block_size: int

    def __post_init__(self) -> None:
        for name, value in self.as_dict().items():
            allowed = FIELD_VALUES[name]
            if value not in allowed:
                raise CoaloraError(f"no such value of nf field {name!r}", got=value, expected=allowed)
            # NumPy integers and whole floats become the plain value, or as_dict would not be JSON-able.
            object.__setattr__(self, name, allowed[allowed.index(value)])

    def __str__(self) -> str:
        """For example ``nf3 b32 s4/bf16 x64``."""
        return f"nf{self.bits} b{self.block_size} s{self.scale_bits}/{self.scale_dtype} x{self.scale_block_size}"
