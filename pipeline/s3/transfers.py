"""Several transfers at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Lock
from typing import TypeVar

from pipeline.orchestration.progress import Progress

T = TypeVar("T")
_MB = 1_000_000


def side_by_side(transfer: Callable[[T], None], items: Iterable[T], workers: int) -> None:
    """`transfer(item)` for all items, `workers` at a time; the first failure stops those that have not begun."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(transfer, item) for item in items]
        finished, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        for future in finished:
            future.result()


class Megabytes:
    """Progress of transfers side by side, in MB; `label` says what they do."""

    def __init__(self, label: str, total: int) -> None:
        self._progress, self._total, self._done, self._lock = Progress(f"{label} (MB)"), total, 0, Lock()

    def add(self, nbytes: int, file: str) -> None:
        """`nbytes` more have arrived, those of `file` among them."""
        with self._lock:
            self._done += nbytes
            total = max(-(-self._total // _MB), 1)
            # Rounded down until all is there: the last line is to come once.
            self._progress(total if self._done >= self._total else self._done // _MB, total, file=file)
