"""Work of many layers in threads: torch leaves Python's lock, and most operations on a layer are too small to share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def n_threads(device: torch.device) -> int:
    """How many threads there are for work on a device: on a CPU as many as torch may use; one feeds a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def each(function: Callable[[T], R], items: Sequence[T], threads: int, *, wait: bool = True) -> list[R]:
    """`function` of all items, each in one of so many threads, in the caller's grad mode and context variables.

    After an exception items that are not begun are left out.

    Args:
        wait: for items in work, before an exception is passed on; otherwise they come to their end unheard.

    Example:
        >>> from coalora.threads import each
        >>> each(lambda n: n * n, [1, 2, 3], threads=2)
        [1, 4, 9]
    """
    threads = min(threads, len(items))
    if threads < 2:
        return [function(item) for item in items]
    enabled = torch.is_grad_enabled()

    def run(context: Context, item: T) -> R:
        with torch.set_grad_enabled(enabled):
            return context.run(function, item)

    pool = ThreadPoolExecutor(threads)
    try:
        found = list(pool.map(run, [copy_context() for _ in items], items))
    except BaseException:
        pool.shutdown(wait=wait, cancel_futures=True)
        raise
    pool.shutdown()
    return found
