"""A tracking server that goes away in the middle of a run costs the run nothing."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from coalora.errors import CoaloraError
from flows.graph import Rounds
from flows.run import Run
from pipeline.store.store import Artifact
from tests.tiny_run import tiny_run


class _Away:
    """A runner whose tracking tasks end as they do without a server; the others are noted."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def call(self, task: Any, **inputs: Any) -> None:
        self.called.append(task.name)
        if task.name.startswith("track"):
            raise CoaloraError("the MLflow server does not answer", remedy="Start it")


def test_the_run_goes_on_and_says_what_is_not_logged_yet(caplog: pytest.LogCaptureFixture) -> None:
    settings = tiny_run().settings
    quiet = settings.model_copy(update={"versioning": settings.versioning.model_copy(update={"enabled": False})})
    runner = _Away()
    rounds = Rounds(Run("tiny", quiet, runner))  # type: ignore[arg-type]
    made = Artifact(kind="configuration-set", digest="0" * 64, nbytes=1)
    with caplog.at_level(logging.WARNING, logger="coalora"):
        rounds.on_set(0, made, tiny_run().calibrated.tables)
        rounds.on_state("coa", 0, made)
    assert runner.called == ["track-round", "show-round", "track-training"]
    assert caplog.text.count("not logged to MLflow yet, the run goes on") == 2


def test_other_failures_still_end_the_run() -> None:
    class Broken(_Away):
        def call(self, task: Any, **inputs: Any) -> None:
            raise ValueError("a mistake of ours")

    rounds = Rounds(Run("tiny", tiny_run().settings, Broken()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a mistake of ours"):
        rounds.on_state("coa", 0, Artifact(kind="state", digest="0" * 64, nbytes=1))
