"""Progress of long loops as a few log lines, readable in a terminal and in the Prefect UI alike.

Inside a Prefect task run, a loop that takes longer than the time between two lines has a progress artifact as well.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.orchestration.progress_artifact import ProgressArtifact

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


def format_seconds(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Logs `label: done/total`, the given values, the rate and the time left.

    The first and the last call are always logged, those in between at most once per `interval` seconds.

    Args:
        label: what is counted, the start of every line.
        logger: where the lines go; `get_logger()` by default.
        interval: seconds between two lines.
    """

    def __init__(self, label: str, logger: LoggerLike | None = None, *, interval: float = 5.0) -> None:
        self.label = label
        self.logger = logger if logger is not None else get_logger()
        self.interval = interval
        self._first: tuple[float, int] | None = None
        self._last_line = 0.0
        self._artifact: ProgressArtifact | None = None
        if "prefect" in sys.modules:
            from pipeline.orchestration.progress_artifact import ProgressArtifact

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
        parts = [f"{self.label}: {done}/{total}"]
        parts += [f"{name} {_format(value)}" for name, value in values.items()]
        parts += self._timing(now, done, total)
        line = ", ".join(parts)
        self.logger.info("%s", line)
        if self._artifact is not None and not first:
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
            return [shown, f"took {format_seconds(elapsed)}"]
        return [shown, f"{format_seconds((total - done) / rate)} left"]


def _format(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
