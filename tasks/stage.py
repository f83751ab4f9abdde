"""A stage of the pipeline: a function from settings and artifacts to one artifact, as a cached Prefect task.

Trap (Prefect 3.8.8): a cache policy that raises is only logged, and the task then runs uncached. The runners
of `tasks.engine` therefore compute the key first, let its errors out, and hand it to the policy.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import prefect
from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext

from coalora.errors import CoaloraError
from tasks.artifacts import Artifact
from tasks.checkpoints import scratch_of
from tasks.keys import function_source_digest, stage_key

_RESERVED = {"refresh", "return_state", "wait_for"}  # arguments of `run` and of Prefect's task call

# Set by the runner around a task call, appended to when the function has really run.
executions_of_call: ContextVar[list[str] | None] = ContextVar("coalora_executions", default=None)


@dataclass
class StageKeyPolicy(CachePolicy):
    """Prefect cache policy of a stage; `key` is the key that a runner has computed already."""

    owner: Stage | None = None
    key: str | None = None

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str | None:
        if self.key is not None or self.owner is None:
            return self.key
        return self.owner.key(inputs)


class Stage:
    """A function `fn(*, ...) -> Artifact`, its Prefect task, and its cache key. Made by `stage`.

    The code is digested when the stage is defined: what an edit on disk changes later is not what runs here.
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
            raise CoaloraError("a stage's name is lower case letters, digits and single dashes", got=name)
        self.name = name
        self.fn = fn
        self.signature = inspect.signature(fn)
        for parameter in self.signature.parameters.values():
            if parameter.kind is not parameter.KEYWORD_ONLY or parameter.name in _RESERVED:
                raise CoaloraError(
                    "a stage takes named keyword-only arguments",
                    got=f"{name}({parameter})",
                    expected=f"`*` before it, and none of {sorted(_RESERVED)}",
                )
        self.source = function_source_digest(fn)
        self.policy = StageKeyPolicy(owner=self)
        self.task = prefect.task(
            name=name,
            tags=set(tags),
            retries=retries,
            timeout_seconds=timeout_seconds,
            cache_policy=self.policy,
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
        """Cache key for these inputs. Raises TypeError as `tasks.keys.stage_key` does."""
        return stage_key(self.name, self.fn, self.bind(inputs), source=self.source)

    def _checked(self) -> Callable[..., Artifact]:
        """The function as runners call it: notes that it ran and for how long; lets only an `Artifact` be recorded."""

        @wraps(self.fn)
        def run(**inputs: Any) -> Artifact:
            executions = executions_of_call.get()
            if executions is not None:
                executions.append(self.name)
            started = time.perf_counter()
            with scratch_of(self.key(inputs)):
                result = self.fn(**inputs)
            if not isinstance(result, Artifact):
                raise TypeError(f"stage {self.name!r} returns an Artifact, not {type(result).__name__}")
            # Kept with the record, not with the content: a reused result still tells what it cost.
            facts = {"stage": self.name, "seconds": round(time.perf_counter() - started, 3)}
            return result.model_copy(update={"meta": {**result.meta, **facts}})

        return run


def stage(
    name: str, *, tags: Iterable[str] = (), retries: int = 0, timeout_seconds: float | None = None
) -> Callable[[Callable[..., Artifact]], Stage]:
    """Decorator: make a `Stage` of `fn(*, ...) -> Artifact`.

    Args:
        name: lower case, digits, dashes; start of its cache keys.
        tags: Prefect tags (concurrency limits go by tag).
        retries: how often Prefect runs a failed stage again; `DirectRunner` runs it once.
        timeout_seconds: Prefect's limit for one run; none in `DirectRunner`.
    """

    def decorate(fn: Callable[..., Artifact]) -> Stage:
        return Stage(fn, name, tags=tags, retries=retries, timeout_seconds=timeout_seconds)

    return decorate
