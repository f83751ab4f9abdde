"""What a stage may look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from coalora.errors import CoaloraError
from pipeline.settings.sections import ExportSettings as Settings
from pipeline.stages.stage import stage
from pipeline.store.artifacts import Artifact


@pytest.mark.parametrize(
    "define",
    [
        lambda: stage("Bad Name")(_well_formed),
        lambda: stage("positional")(_positional),
        lambda: stage("reserved")(_reserved),
        lambda: stage("catch-all")(_catch_all),
    ],
)
def test_a_badly_defined_stage_is_refused(define: Callable) -> None:
    with pytest.raises(CoaloraError):
        define()


def _positional(settings: Settings) -> Artifact: ...  # type: ignore[empty-body]
def _reserved(*, refresh: bool) -> Artifact: ...  # type: ignore[empty-body]
def _catch_all(**inputs: Any) -> Artifact: ...  # type: ignore[empty-body]
def _well_formed(*, settings: Settings) -> Artifact: ...  # type: ignore[empty-body]
