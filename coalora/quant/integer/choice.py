"""A choice of the int scheme; what its fields mean is in `coalora.quant.integer.scheme`."""

from __future__ import annotations

from dataclasses import dataclass

from coalora.errors import CoaloraError
from coalora.quant.scheme import Choice, FieldValue

FIELD_VALUES: dict[str, tuple[FieldValue, ...]] = {
    "bits": (2, 3, 4, 8),
    "group_size": (32, 64, 128),
    "mode": ("sym", "asym"),
}


@dataclass(frozen=True)
class IntChoice(Choice):
    """One choice: b, g, and whether the groups have zero points (``asym``) or not (``sym``).

    Raises:
        CoaloraError: a value that the scheme does not have.
    """

    bits: int
    group_size: int
    mode: str

    def __post_init__(self) -> None:
        for name, value in self.as_dict().items():
            allowed = FIELD_VALUES[name]
            if value not in allowed:
                raise CoaloraError(f"no such value of int field {name!r}", got=value, expected=allowed)
            # NumPy integers and whole floats become the plain value, or as_dict would not be JSON-able.
            object.__setattr__(self, name, allowed[allowed.index(value)])

    def __str__(self) -> str:
        """For example ``int4 g64 asym``."""
        return f"int{self.bits} g{self.group_size} {self.mode}"
