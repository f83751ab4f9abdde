"""Costs that a budget can count: average bits, bytes, or a device's microseconds; any sum over layers will do.

`bytes` are those of the packed target layers; `file_bytes` those of the files that a device holds: the target layers as
they are packed, all other tensors of the base, its config and tokenizer, and the adapter. A budget is a number in the
unit of its cost, or names its own unit (`parse_budget`). Settings are read with this module: it imports no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from coalora.errors import CoaloraError

CostKind = Literal["average_bits", "bytes", "file_bytes", "latency"]


@dataclass(frozen=True)
class CostUnit:
    """Words for a cost: on an axis, in a sentence, behind a number, in a file's name."""

    label: str
    words: str
    unit: str
    suffix: str
    form: str = ".4g"

    def number(self, value: float) -> str:
        return format(value, self.form)

    def text(self, value: float) -> str:
        """A cost with its unit."""
        return f"{self.number(value)} {self.unit}"

    def unused(self, at: float, budget: float) -> str | None:
        """What is said of a budget of which less than 9/10 is used; None otherwise."""
        if at >= 0.9 * budget:
            return None
        return f"{self.text(at)} measured better than anything up to {self.text(budget)}"


UNITS: dict[CostKind, CostUnit] = {
    "average_bits": CostUnit("average bits per weight", "average bits", "bits", "bits", ".2f"),
    # Decimal megabytes, as the reports write sizes.
    "bytes": CostUnit("packed target layers (MB)", "megabytes", "MB", "mb"),
    "file_bytes": CostUnit("base and adapter (MB)", "megabytes of base and adapter", "MB", "mb"),
    "latency": CostUnit("latency (µs)", "microseconds", "µs", "us"),
}

_BYTES = {
    **{name: 1000.0**power for power, name in enumerate(("b", "kb", "mb", "gb", "tb"))},
    **{name: 1024.0**power for power, name in enumerate(("kib", "mib", "gib", "tib"), 1)},
}
# Unit, in lower case -> what it is in the unit of each cost that it can count.
_MEGABYTES = {name: size / 1e6 for name, size in _BYTES.items()}
_UNITS_OF: dict[CostKind, dict[str, float]] = {
    "average_bits": {"bit": 1.0, "bits": 1.0},
    "bytes": _MEGABYTES,
    "file_bytes": _MEGABYTES,
    "latency": {"us": 1.0, "µs": 1.0, "μs": 1.0, "ms": 1e3, "s": 1e6},
}


def parse_bytes(text: str) -> int:
    """Bytes of a size with its unit: B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024), in any case.

    Raises:
        CoaloraError: no number above zero, or no unit of bytes.

    Example:
        >>> parse_bytes("120MB"), parse_bytes("1.5 GiB")
        (120000000, 1610612736)
    """
    number, unit = _split(text)
    if unit not in _BYTES or number * _BYTES[unit] < 1:
        raise CoaloraError(f"{text[:100]!r} is no size in bytes", remedy="Write it as 120MB, 1.2GB or 900MiB")
    return int(number * _BYTES[unit])


def parse_budget(budget: float | str, kind: CostKind) -> float:
    """A budget in the unit of a cost: numbers are in it already, `120MB`, `2.5 bits` and `3ms` name theirs.

    Raises:
        CoaloraError: a text without a finite number above zero, or with a unit that does not count this cost.

    Example:
        >>> parse_budget("1.2GB", "file_bytes"), parse_budget("2.5", "average_bits"), parse_budget(310, "latency")
        (1200.0, 2.5, 310.0)
    """
    if not isinstance(budget, str):
        return float(budget)
    number, unit = _split(budget)
    known = _UNITS_OF[kind]
    if not 0 < number < math.inf or (unit and not any(unit in units for units in _UNITS_OF.values())):
        example = {"average_bits": "2.5", "latency": "310 or 3ms"}.get(kind, "120 or 120MB")
        raise CoaloraError(
            f"The budget {budget[:100]!r} is no number above 0 with a unit that is known",
            remedy=f"Write {UNITS[kind].words} as {example}",
        )
    if unit and unit not in known:
        kinds = ", ".join(other for other, units in _UNITS_OF.items() if unit in units)
        raise CoaloraError(
            f"The budget {budget[:100]!r} is none of {UNITS[kind].words}, which are counted here",
            remedy=f"Give {UNITS[kind].words}, or count another cost (cost.kind: {kinds})",
        )
    return float(f"{number * known[unit]:.12g}") if unit else number  # 72kB is .072 MB to the last digit


def _split(text: str) -> tuple[float, str]:
    """Number (NaN where there is none) and unit, in lower case, of a text."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?|[0-9]+\.)\s*([a-zµμ]*)\s*", text.lower())
    return (float(found[1]), found[2]) if found else (math.nan, "")


def budget_name(budget: float, kind: CostKind) -> str:
    """A budget as folders and metrics are named: `2.5-bits`, `0.8-mb`, `310-us`."""
    return f"{budget:g}-{UNITS[kind].suffix}"
