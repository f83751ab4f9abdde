"""Several transfers at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


def side_by_side(transfer: Callable[[T], None], items: Iterable[T], workers: int) -> None:
    """`transfer(item)` for all items, `workers` at a time; the first failure stops those that have not begun."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(transfer, item) for item in items]
        finished, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        for future in finished:
            future.result()
