"""Store of the run under way: what a stage reads its artifacts from and puts its own into.

A runner sets it for the calls that it makes, in threads as well; a worker process, a command and a test that call
something themselves get the store that the environment names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pipeline.store.store import Store, default_store

_current: ContextVar[Store | None] = ContextVar("coalora_store", default=None)


def current_store() -> Store:
    """The store of the runner whose call this is, else the environment's."""
    return _current.get() or default_store()


@contextmanager
def using(store: Store) -> Iterator[None]:
    """Calls of the block read and write this store."""
    token = _current.set(store)
    try:
        yield
    finally:
        _current.reset(token)
