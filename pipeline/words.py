"""Numbers as people read them: metrics and differences, sizes, counts and times."""

from collections.abc import Sequence

DECIMALS = 3


def number(value: float) -> str:
    """A metric, loss or hypervolume with three decimals; never "-0.000"."""
    return f"{round(value, DECIMALS) + 0.0:.{DECIMALS}f}"


def signed(value: float) -> str:
    """A difference with its sign, a true minus, and no sign for zero."""
    text = number(abs(value))
    return text if float(text) == 0 else ("+" if value > 0 else "\u2212") + text


def human_bytes(n_bytes: int) -> str:
    """Decimal units with one decimal: "812 B", "57.3 KB", "3.2 MB"."""
    return _scaled(n_bytes, ["B", "KB", "MB", "GB", "TB"])


def human_count(n: int) -> str:
    """A number of weights: "912", "12.3 K", "302.0 M", "6.5 B"."""
    return _scaled(n, ["", "K", "M", "B", "T"])


def human_seconds(seconds: float) -> str:
    """A wall time: "85 ms", "4.2 s", "3 min 05 s", "2 h 07 min"."""
    if round(seconds * 1000) < 1000:
        return f"{seconds * 1000:.0f} ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _scaled(n: int, units: Sequence[str]) -> str:
    if n < 1000:
        return f"{n} {units[0]}".strip()
    value, unit = n / 1000, units[1]
    for larger in units[2:]:
        if round(value, 1) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}"
