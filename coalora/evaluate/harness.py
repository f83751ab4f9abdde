"""Tasks of the lm-evaluation-harness (EleutherAI) for an adapted causal model; extra `[eval]`.

The harness gets the PEFT model as it is, switched to its configuration. Its own task folders and yours
(`include`: folders of task YAML files) are known by name. Data sets come from the hub or from local files, as a task's
YAML says.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from coalora.errors import CoaloraError


def harness_version() -> str:
    """The installed version of lm-eval.

    Raises:
        CoaloraError: it is not installed.
    """
    try:
        return version("lm-eval")
    except PackageNotFoundError:
        raise CoaloraError(
            "The package lm-eval, which harness tasks need, is not installed",
            remedy="Run `pip install 'coalora[eval]'`, or set evaluation.harness_tasks=[]",
        ) from None


def check_tasks(names: Sequence[str], include: str | Path | None = None) -> None:
    """Refuse tasks that the harness does not know, before anything is measured.

    Raises:
        CoaloraError: no lm-eval, no such folder, or no such task.
    """
    harness_version()
    if include is not None and not Path(include).is_dir():
        raise CoaloraError(
            f"There is no folder {include} of harness tasks", remedy="Correct evaluation.harness_include"
        )
    known = _manager_of(names, include).all_tasks
    for name in names:
        if name not in known:
            close = ", ".join(difflib.get_close_matches(name, known, n=3)) or "see `lm-eval ls tasks`"
            raise CoaloraError(
                f"lm-eval knows no task {name!r} ({close})",
                remedy="Correct evaluation.harness_tasks, or name its folder with evaluation.harness_include",
            )


def run_harness(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Task (or group) -> the numbers that the harness reports of it, such as `acc,none` and `acc_stderr,none`.

    Args:
        model: causal model, in PEFT's wrapper or without, on the device where it runs.
        limit: at most so many examples of each task, for a quick look.
        seed: of few-shot examples and of bootstrapped errors.

    Raises:
        CoaloraError: as `check_tasks` does.
    """
    check_tasks(tasks, include)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size),
        tasks=list(tasks),
        task_manager=_manager_of(tasks, include),
        limit=limit,
        log_samples=False,
        bootstrap_iters=1000,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    if found is None:  # on ranks other than the first of several processes
        raise CoaloraError("The harness gave no results to this process", remedy="Run it in one process")
    return {task: _numbers(values) for task, values in found["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Finite numbers alone: the rest is names, or `N/A` where an error cannot be estimated."""
    plain = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {name: float(value) for name, value in sorted(plain.items()) if math.isfinite(value)}


def _manager_of(names: Sequence[str], include: str | Path | None) -> Any:
    """The harness's index of tasks: of the own ones alone where they are enough."""
    if include is not None:
        own = _manager(str(include), defaults=False)
        if all(name in own.all_tasks for name in names):
            return own
    return _manager(None if include is None else str(include), defaults=True)


@lru_cache(maxsize=4)
def _manager(include: str | None, *, defaults: bool) -> Any:
    """The harness's own tasks are thousands of YAML files: read once a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include, include_defaults=defaults)
