"""GPU tags, by which Prefect's concurrency limits keep one task at a time on each GPU, and log lines while one waits.

A stage that uses a GPU carries the tag `gpu` and one of its machine, `gpu-<hostname>`; `coalora limits` sets how many
tasks of a tag run at a time. Prefect itself waits without a word (3.8.8), so that the wait is logged here.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.progress import LoggerLike, get_logger
from pipeline.words import human_seconds

GPU = "gpu"
_FIRST_LOOK = 10.0  # seconds after which a task that has not begun is looked after
_REPEAT = 60.0


def machine_tag(host: str | None = None) -> str:
    """The tag of a machine's GPUs, by default of this one's."""
    return f"{GPU}-{(host or socket.gethostname()).split('.')[0].lower()}"


def tags_of_call(tags: Iterable[str], call: Mapping[str, Any], *, reused: bool, elsewhere: bool = False) -> set[str]:
    """Tags of a stage's task run: a call that computes nothing, elsewhere, or on the CPU, takes no GPU from another.

    Never empty where `tags` is not: Prefect then keeps the task's own.
    """
    found = set(tags)
    if GPU not in found:
        return found
    on_cpu = getattr(call.get("runtime"), "device", None) == "cpu"
    instead = "reused" if reused else "cluster" if elsewhere else "cpu" if on_cpu else None
    return found - {GPU} | {instead} if instead else found | {machine_tag()}


@contextmanager
def waiting_logged(what: str, tags: Iterable[str], begun: Callable[[], bool]) -> Iterator[None]:
    """Log when the task of the block waits for a free slot of its GPU tags, and when it got one."""
    limited = sorted(tag for tag in tags if tag.startswith(GPU))
    if not limited:
        yield
        return
    logger, started, done = get_logger(), time.monotonic(), threading.Event()
    told = _say_if_full(what, limited, logger)

    def watch() -> None:
        nonlocal told
        next_word = _REPEAT if told else _FIRST_LOOK
        while not done.wait(0.5):
            waited = time.monotonic() - started
            if begun():
                if told:
                    logger.info("%s: got a slot after %s", what, human_seconds(waited))
                return
            if waited >= next_word:
                told = _say_if_full(what, limited, logger, f" for {human_seconds(waited)}") or told
                next_word = waited + _REPEAT
        if told and begun():  # it began and ended between two looks
            logger.info("%s: got a slot after %s", what, human_seconds(time.monotonic() - started))

    watcher = threading.Thread(target=watch, name="coalora-slots", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(timeout=5)


def _say_if_full(what: str, tags: list[str], logger: LoggerLike, how_long: str = "") -> bool:
    """Name the limits that have no free slot, and who holds them. What the server does not tell is left out."""
    from prefect.client.orchestration import get_client

    found = False
    for tag in tags:
        # No such limit, or no word from the server: the task itself will tell.
        with suppress(Exception), get_client(sync_client=True) as client:
            limit = client.read_concurrency_limit_by_tag(tag)
            if len(limit.active_slots) < limit.concurrency_limit:
                continue
            found = True
            holders = ", ".join(_holder(client, run_id) for run_id in limit.active_slots)
            logger.info(
                "%s: waits%s for a free GPU: the limit of tag %r is %d at a time, taken by %s",
                what, how_long, tag, limit.concurrency_limit, holders,
            )  # fmt: skip
    return found


def _holder(client: Any, task_run_id: Any) -> str:
    with suppress(Exception):
        task_run = client.read_task_run(task_run_id)
        flow_run = client.read_flow_run(task_run.flow_run_id) if task_run.flow_run_id else None
        return f"{task_run.name!r}" + (f" of run {flow_run.name!r}" if flow_run else "")
    return f"task run {task_run_id}"
