"""Progress of long loops: a few log lines and, inside a Prefect task run, a progress artifact in Prefect's UI.

The server is told from a thread of its own, and never twice at a time: a slow or absent server costs no training step.
Prefect is imported by nothing here: a process that has not imported it is in no run.
"""

import logging
import re
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any
from uuid import UUID

from pipeline.words import human_seconds

_thread = ThreadPoolExecutor(1, thread_name_prefix="coalora-progress")  # starts with its first call

LoggerLike = logging.Logger | logging.LoggerAdapter[Any]


def get_logger() -> LoggerLike:
    """Prefect's run logger inside a flow or task run, else `logging.getLogger("coalora")`."""
    if "prefect" in sys.modules:  # whoever has not imported it is in no run, and should not pay its import
        from prefect.exceptions import MissingContextError
        from prefect.logging import get_run_logger

        try:
            return get_run_logger()
        except MissingContextError:
            pass
    return logging.getLogger("coalora")


class Progress:
    """Logs `label: done/total`, the given values, the rate and the time left.

    The first and the last call are always logged, those in between at most once per `interval` seconds, to
    `get_logger()` by default.
    """

    def __init__(self, label: str, logger: LoggerLike | None = None, *, interval: float = 5.0) -> None:
        self.label = label
        self.logger = logger if logger is not None else get_logger()
        self.interval = interval
        self._first: tuple[float, int] | None = None
        self._last_line = 0.0
        self._artifact = ProgressArtifact(label)

    def __call__(self, done: int, total: int, **values: float | int | str) -> None:
        """`done` of `total` steps are finished; `values` (losses, bits) are shown with the line."""
        now = time.monotonic()
        first = self._first is None
        if self._first is None:
            self._first = (now, done)
        elif done < total and now - self._last_line < self.interval:
            return
        self._last_line = now
        said = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )
        line = ", ".join([f"{self.label}: {done}/{total}", *said, *self._timing(now, done, total)])
        self.logger.info("%s", line)
        if not first:
            self._artifact.show(100.0 * done / max(total, 1), line, last=done >= total)

    def _timing(self, now: float, done: int, total: int) -> list[str]:
        # From the first call on: what came before it (loading, compiling) says nothing about the rate.
        started, offset = self._first or (now, done)
        elapsed, steps = now - started, done - offset
        if elapsed <= 0 or steps <= 0:
            return []
        rate = steps / elapsed
        shown = f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"
        if done >= total:
            return [shown, f"took {human_seconds(elapsed)}"]
        return [shown, f"{human_seconds((total - done) / rate)} left"]


def artifact_key(*words: str) -> str:
    """Words as the key of an artifact, under which Prefect keeps its history: lower case letters, digits, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def pipeline_name() -> str:
    """Name of the pipeline whose flow runs here; empty outside of one."""
    if "prefect" not in sys.modules:
        return ""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return str((context.parameters or {}).get("name", "")) if context else ""


class ProgressArtifact:
    """The artifact of one loop; made at the first `show`, gone with the last. Outside of a task run nothing is shown.

    Args:
        label: of the loop; what stands before its first comma is the key, so that rounds are one artifact's history.
    """

    def __init__(self, label: str) -> None:
        self._key = artifact_key(pipeline_name(), label.split(",")[0])
        self._active = "prefect" in sys.modules and _in_task_run()
        self._id: UUID | None = None
        self._under_way: Future[Any] | None = None

    def show(self, percent: float, words: str, *, last: bool = False) -> None:
        """Show `percent` and `words`; left out, unless `last`, while the one before is under way."""
        if not self._active or (last and self._id is None and self._under_way is None):
            return
        if not last and self._under_way is not None and not self._under_way.done():
            return
        self._under_way = _thread.submit(copy_context().run, self._tell, percent, words, last)

    def _tell(self, percent: float, words: str, last: bool) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact
        from prefect.client.orchestration import get_client

        try:
            if last and self._id is not None:  # it would stand between the run's results on its page
                with get_client(sync_client=True) as client:
                    client.delete_artifact(self._id)
            elif self._id is None:
                self._id = create_progress_artifact(percent, key=self._key, description=words)  # type: ignore[assignment]
            else:
                update_progress_artifact(self._id, percent, description=words)
        except Exception as error:
            logging.getLogger("coalora").debug("progress is not shown: %r", error)


def _in_task_run() -> bool:
    from prefect.context import TaskRunContext

    return TaskRunContext.get() is not None
