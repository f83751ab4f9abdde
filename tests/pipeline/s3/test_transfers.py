"""Transfers side by side: their first failure, and what a person reads of them."""

from __future__ import annotations

import logging
import time

import pytest

from pipeline.s3.transfers import Megabytes, side_by_side


def test_the_first_failure_stops_what_has_not_begun() -> None:
    begun: list[int] = []

    def transfer(item: int) -> None:
        begun.append(item)
        if item == 1:
            raise ValueError("broken")
        time.sleep(0.02)

    with pytest.raises(ValueError, match="broken"):
        side_by_side(transfer, range(100), 1)
    assert len(begun) < 100


def test_the_last_line_comes_once_and_counts_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "coalora")
    progress = Megabytes("publishing", 2_400_000 + 20 * 1000)
    progress.add(2_400_000, "large")
    for index in range(20):
        progress.add(1000, f"small-{index}")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0] == "publishing (MB): 2/3, file large"
    assert lines[1].startswith("publishing (MB): 3/3, file small-19")


def test_no_bytes_at_all_are_still_a_whole_transfer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "coalora")
    Megabytes("publishing", 0).add(0, "empty")
    assert [r.getMessage() for r in caplog.records] == ["publishing (MB): 1/1, file empty"]
