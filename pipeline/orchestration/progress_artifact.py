"""Progress of a long loop in Prefect's UI: one progress artifact, brought up to date while the loop runs.

The server is told from a thread of its own, and never twice at a time: a slow or absent server costs no training step.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_logger

_teller = ThreadPoolExecutor(1, thread_name_prefix="coalora-progress")


def artifact_key(*words: str) -> str:
    """Words as the key of an artifact, under which Prefect keeps its history: lower case letters, digits, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def pipeline_name() -> str:
    """Name of the pipeline whose flow runs here; empty outside of one."""
    context = FlowRunContext.get()
    return str((context.parameters or {}).get("name", "")) if context else ""


class ProgressArtifact:
    """The artifact of one loop; made at the first `show`. Outside of a task run nothing is shown.

    Args:
        label: of the loop; what stands before its first comma is the key, so that rounds are one artifact's history.
    """

    def __init__(self, label: str) -> None:
        self._key = artifact_key(pipeline_name(), label.split(",")[0])
        self._active = TaskRunContext.get() is not None
        self._id: UUID | None = None
        self._under_way: Future[Any] | None = None

    def show(self, percent: float, words: str, *, last: bool = False) -> None:
        """Show `percent` and `words`; left out, unless `last`, while the one before is under way."""
        if not self._active or (last and self._id is None and self._under_way is None):
            return
        if not last and self._under_way is not None and not self._under_way.done():
            return
        tell: Callable[[], None] = lambda: self._tell(percent, words)  # noqa: E731 (bound to this call's values)
        self._under_way = _teller.submit(copy_context().run, tell)

    def _tell(self, percent: float, words: str) -> None:
        try:
            if self._id is None:
                self._id = create_progress_artifact(percent, key=self._key, description=words)  # type: ignore[assignment]
            else:
                update_progress_artifact(self._id, percent, description=words)
        except Exception as error:
            get_logger("coalora").debug("progress is not shown: %r", error)
