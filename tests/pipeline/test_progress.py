"""Progress lines."""

from __future__ import annotations

import logging
import time

import pytest

from pipeline.progress import Progress, get_logger


def test_progress_logs_first_last_and_few_lines_in_between(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    logger = get_logger()
    assert logger is logging.getLogger("coalora")
    with caplog.at_level(logging.INFO, logger="coalora"):
        progress = Progress("training", logger, interval=5.0)
        for done in range(1, 101):
            progress(done, 100, loss=1 / done, bits=3)
            now[0] += 0.5
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "training: 1/100, loss 1, bits 3"
    assert lines[1] == "training: 11/100, loss 0.09091, bits 3, 2/s, 44.5 s left"
    assert lines[-1] == "training: 100/100, loss 0.01, bits 3, 2/s, took 49.5 s"
    assert len(lines) == 11
