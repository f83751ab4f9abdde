"""A stage of the pipeline: a function from settings and artifacts to one artifact, as a cached Prefect task.

Trap (Prefect 3.8.8): a cache policy that raises is only logged, and the task then runs uncached. The runners
of `pipeline.stages.runner` therefore compute the key first, let its errors out, and hand it to the policy.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from operator import attrgetter
from typing import Any, Protocol

import prefect
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from coalora.allocator import keep_freed_memory
from coalora.errors import CoaloraError
from pipeline.stages.checkpoints import scratch_of
from pipeline.stages.keys import function_source_digest, stage_key
from pipeline.store.artifacts import Artifact

_RESERVED = {"refresh", "return_state", "wait_for"}  # arguments of `run` and of Prefect's task call


class Pool(Protocol):
    """Workers in other processes (`pipeline.workers.worker`)."""

    def run(self, stage: Stage, key: str, inputs: dict[str, Any]) -> Artifact:
        """Run a stage's function there, and wait for it."""


@dataclass(frozen=True)
class Call:
    """What a runner tells the function of a stage: note that it has run in `executions`; run it in `pool`, if any.

    Or not to run at all, where the runner has the verified artifact `reuse`.
    """

    key: str
    executions: list[str]
    pool: Pool | None = None
    reuse: Artifact | None = None


# Set by the runner around a task call.
current_call: ContextVar[Call | None] = ContextVar("coalora_call", default=None)


class Stage:
    """A function `fn(*, ...) -> Artifact`, its Prefect task, and its cache key. Made by `stage`.

    The code is digested when the stage is defined: what an edit on disk changes later is not what runs here.

    Args:
        name: lower case, digits, dashes; start of its cache keys.
        tags: Prefect tags (concurrency limits go by tag).
        retries: how often Prefect runs a failed stage again; `DirectRunner` runs it once.
        timeout_seconds: Prefect's limit for one run; none in `DirectRunner`.
    """

    def __init__(
        self,
        fn: Callable[..., Artifact],
        name: str,
        *,
        tags: Iterable[str] = (),
        retries: int = 0,
        timeout_seconds: float | None = None,
    ) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
            raise CoaloraError(
                f"Stage name {name!r} holds more than lower case letters, digits and single dashes",
                remedy="Name it such as evaluate-shard",
            )
        self.name = name
        self.fn = fn
        self.signature = inspect.signature(fn)
        for parameter in self.signature.parameters.values():
            if parameter.kind is not parameter.KEYWORD_ONLY or parameter.name in _RESERVED:
                raise CoaloraError(
                    f"Argument {name}({parameter}) of a stage is not keyword-only, or has a reserved name",
                    remedy=f"Put `*` before it, and use none of {sorted(_RESERVED)}",
                )
        self.source = function_source_digest(fn)
        self.task = prefect.task(
            name=name,
            tags=set(tags),
            retries=retries,
            timeout_seconds=timeout_seconds,
            cache_policy=NO_CACHE,  # the runner's call has the key
            persist_result=True,
            result_serializer="json",
            cache_result_in_memory=False,  # another process may rewrite the record
        )(self._checked())

    def __call__(self, **inputs: Any) -> Artifact:
        """The plain function: neither cached nor tracked."""
        return self.fn(**inputs)

    def bind(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs with the function's defaults filled in. Raises TypeError for missing or unknown ones."""
        try:
            bound = self.signature.bind(**inputs)
        except TypeError as error:
            raise TypeError(f"stage {self.name!r}: {error}") from None
        bound.apply_defaults()
        return dict(bound.arguments)

    def key(self, inputs: Mapping[str, Any]) -> str:
        """Cache key for these inputs. Raises TypeError as `pipeline.stages.keys.stage_key` does."""
        return stage_key(self.name, self.fn, self.bind(inputs), source=self.source)

    def measured(self, inputs: Mapping[str, Any]) -> Artifact:
        """Call the function and note what it cost. Raises TypeError where it returns no artifact."""
        started = time.perf_counter()
        keep_freed_memory()
        with scratch_of(self.key(inputs)):
            result = self.fn(**inputs)
        if not isinstance(result, Artifact):
            raise TypeError(f"stage {self.name!r} returned no Artifact, but {type(result).__name__}")
        # Kept with the record, not with the content: a reused result still tells what it cost.
        facts = {"stage": self.name, "seconds": round(time.perf_counter() - started, 3)}
        return result.model_copy(update={"meta": {**result.meta, **facts}})

    def _checked(self) -> Callable[..., Artifact]:
        """The function as runners call it: here, or in the pool that the runner has opened."""

        @wraps(self.fn)
        def run(**inputs: Any) -> Any:
            call = current_call.get()
            if call is None:
                return self.measured(inputs)
            if call.reuse is not None:
                return Completed(name="Cached", data=call.reuse)  # the state that Prefect's own cache gives
            call.executions.append(self.name)
            return self.measured(inputs) if call.pool is None else call.pool.run(self, call.key, inputs)

        return run

    def __reduce__(self) -> tuple[Callable[..., Stage], tuple[str, str]]:
        """By name: another process has the code, and compares the key (`pipeline.workers.worker.work`)."""
        return _stage_named, (self.fn.__module__, self.fn.__qualname__)


def _stage_named(module: str, name: str) -> Stage:
    return attrgetter(name)(import_module(module))


def stage(name: str, **options: Any) -> Callable[[Callable[..., Artifact]], Stage]:
    """Decorator: make a `Stage` of `fn(*, ...) -> Artifact`; further arguments as of `Stage`."""
    return partial(Stage, name=name, **options)
