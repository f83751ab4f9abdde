"""Progress lines."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from typing import Any

import pytest

from pipeline import progress
from pipeline.progress import Progress, ProgressArtifact, get_logger


def test_progress_logs_first_last_and_few_lines_in_between(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    logger = get_logger()
    assert logger is logging.getLogger("coalora")
    with caplog.at_level(logging.INFO, logger="coalora"):
        tell = Progress("training", logger, interval=5.0)
        for done in range(1, 101):
            tell(done, 100, loss=1 / done, bits=3)
            now[0] += 0.5
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "training: 1/100, loss 1, bits 3"
    assert lines[1] == "training: 11/100, loss 0.09091, bits 3, 2/s, 44.5 s left"
    assert lines[-1] == "training: 100/100, loss 0.01, bits 3, 2/s, took 49.5 s"
    assert len(lines) == 11


def test_a_loop_in_a_task_has_an_artifact_that_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Client:
        def delete_artifact(self, artifact: str) -> None:
            told.append(("gone", artifact))

    monkeypatch.setattr(progress, "_in_task_run", lambda: True)
    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", lambda p, **more: told.append(p) or "id")
    monkeypatch.setattr("prefect.artifacts.update_progress_artifact", lambda a, p, **more: told.append(p))
    monkeypatch.setattr("prefect.client.orchestration.get_client", lambda **more: nullcontext(Client()))
    artifact = ProgressArtifact("training coa, round 0")
    for percent in (10.0, 50.0):
        artifact.show(percent, "words")
        progress._thread.submit(int).result()
    artifact.show(100.0, "words", last=True)
    progress._thread.submit(int).result()
    assert told == [10.0, 50.0, ("gone", "id")]
