"""Adapted models that stay loaded between the shards of an evaluation.

Each worker thread holds one model and no more: the shards of a method come one after the other, and its next one finds
the model there; another method, state or base drops it before the next is built. So `evaluation.workers` threads hold
as many models at the same time. Processes hold their own.

Loading a model changes what all threads share (torch's default number type and random generator, transformers' way to
initialise), so that a model is loaded while nothing is measured: with several workers a load waits for the shards that
are under way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from coalora.adapt.adapted import AdaptedModel
from coalora.data.benchmark import Benchmark
from coalora.files import digest
from coalora.recipes import AdapterRecipe
from pipeline.inputs.adapted import build_adapted
from pipeline.inputs.loaders import BaseModel
from pipeline.settings.sections import RuntimeSettings
from pipeline.store.store import Artifact


class LoadGuard:
    """Many may measure at a time, or one may load. A load that waits goes before measurements that come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._measuring = 0
        self._waiting = 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
            self._measuring += 1
        try:
            yield
        finally:
            with self._changed:
                self._measuring -= 1
                self._changed.notify_all()

    @contextmanager
    def loading(self) -> Iterator[None]:
        with self._changed:  # held throughout: nothing can begin meanwhile
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._measuring)
                yield
            finally:
                self._waiting -= 1
                self._changed.notify_all()


_guard = LoadGuard()
# By thread, and not by its number, which a new thread takes over from one that is gone.
_held: dict[threading.Thread, tuple[str, AdaptedModel]] = {}


@contextmanager
def resident_model(
    data: Benchmark,
    *,
    base: Artifact,
    benchmark: Artifact,
    tables: Artifact,
    state: Artifact,
    method: str,
    adapter: AdapterRecipe,
    runtime: RuntimeSettings,
    seed: int,
) -> Iterator[AdaptedModel]:
    """The adapted model of a state for this thread alone, loaded if it is not there. Which configuration it holds is
    left from what was measured before: switch first.

    Args:
        data: what `benchmark` holds.
    """
    artifacts = [a.digest for a in (base, benchmark, tables, state)]
    key = digest([artifacts, method, adapter.to_dict(), runtime.to_dict(), seed])

    def build() -> AdaptedModel:
        return build_adapted(
            BaseModel(base), data, tables, method=method, adapter=adapter, runtime=runtime, seed=seed, state=state
        )

    with hold(key, build) as model:
        yield model


@contextmanager
def hold(key: str, build: Callable[[], AdaptedModel]) -> Iterator[AdaptedModel]:
    """The model `key` of this thread; what raises while it is used drops it."""
    thread = threading.current_thread()
    held = _held.get(thread)
    if held is None or held[0] != key:
        del held  # first, or there would be two for a while
        with _guard.loading():
            _drop_others(key)
            held = _held[thread] = key, build()
    try:
        with _guard.measuring():
            yield held[1]
    except BaseException:
        _held.pop(thread, None)
        raise


def _drop_others(key: str) -> None:
    """Drop models of other keys, of which none is in use while one is loaded, and those of threads that are gone."""
    for thread, (other, _) in list(_held.items()):
        if other != key or not thread.is_alive():
            del _held[thread]


def release_models() -> None:
    """Forget the models of all threads of this process."""
    _held.clear()
