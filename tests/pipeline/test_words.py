"""Sizes, counts, times and differences read well."""

from __future__ import annotations

import pytest

from pipeline.words import human_bytes, human_count, human_seconds, number, signed


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (999_949, "999.9 KB"), (999_950, "1.0 MB"),
     (57_300_000, "57.3 MB"), (1.5e12, "1.5 TB")],
)  # fmt: skip
def test_bytes_have_one_decimal_and_never_read_1000(n: float, text: str) -> None:
    assert human_bytes(int(n)) == text


def test_counts_seconds_and_differences_read_well() -> None:
    assert [human_count(n) for n in (912, 302_000_000, 6_476_000_000)] == ["912", "302.0 M", "6.5 B"]
    seconds = [human_seconds(s) for s in (0.0004, 0.9996, 59.96, 185, 3599.6, 7620)]
    assert seconds == ["0 ms", "1.0 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "2 h 07 min"]
    assert [signed(x) for x in (0.0124, -0.0421, 0.0, -0.0004)] == ["+0.012", "\u22120.042", "0.000", "0.000"]
    assert number(-0.0001) == "0.000"
