"""Many calls of a stage, some at a time: in order, never too many, nobody kept waiting, nothing lost by a failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from coalora.errors import CoaloraError
from pipeline.stages.runner import Runner, stage
from pipeline.store.store import Artifact, default_store
from tests.pipeline.stages.engine_runs import writer

pytestmark = pytest.mark.usefixtures("own_results")
CALLS: list[str] = []  # names of the stage functions that have really run
AT_WORK: list[int] = [0, 0]  # calls of `part` that run now, and the most that ever did
_COUNT = threading.Lock()


@stage("part")
def part(*, n: int, fail: bool = False, at_least: int = 1) -> Artifact:
    with _COUNT:
        AT_WORK[0] += 1
        AT_WORK[1] = max(AT_WORK)
    give_up = time.monotonic() + 10
    while AT_WORK[1] < at_least and time.monotonic() < give_up:  # until another is at work, too
        time.sleep(0.01)
    with _COUNT:
        AT_WORK[0] -= 1
        CALLS.append(f"part {n}")
    if fail:
        raise CoaloraError(f"Part {n} failed")
    return default_store().put("text", writer(f"part {n}"))


@stage("patient")
def patient(*, n: int) -> Artifact:
    """Number 0 ends after number 4."""
    give_up = time.monotonic() + 20
    while n == 0 and "patient 4" not in CALLS:
        if time.monotonic() > give_up:
            raise TimeoutError("number 4 was never begun")
        time.sleep(0.01)
    CALLS.append(f"patient {n}")
    return default_store().put("text", writer(f"patient {n}"))


@pytest.fixture(autouse=True)
def nothing_ran_yet() -> None:
    CALLS.clear()
    AT_WORK[:] = [0, 0]


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_many_calls_come_back_in_their_order_and_never_more_at_a_time_than_workers(
    execute: Callable, workers: int
) -> None:
    def body(runner: Runner) -> None:
        calls = [{"n": n, "at_least": min(workers, 2)} for n in range(6)]
        AT_WORK[1] = 2
        runner.run(part, **calls[2])
        AT_WORK[1] = 0
        found = runner.run_many(part, calls, workers=workers)
        assert [(default_store().path(a) / "a.txt").read_text() for a in found] == [f"part {n}" for n in range(6)]
        assert [record.cached for record in runner.history[1:]] == [n == 2 for n in range(6)]
        assert runner.run_many(part, calls, workers=workers) == found
        assert all(record.cached for record in runner.history[7:])

    execute(body)
    assert sorted(CALLS) == sorted(f"part {n}" for n in range(6))
    assert AT_WORK[1] == 1 if workers == 1 else 2 <= AT_WORK[1] <= workers


def test_a_long_call_keeps_no_other_worker_waiting(execute: Callable) -> None:
    def body(runner: Runner) -> None:
        found = runner.run_many(patient, [{"n": n} for n in range(5)], workers=2)
        assert [(default_store().path(a) / "a.txt").read_text() for a in found] == [f"patient {n}" for n in range(5)]

    execute(body)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_finished_when_one_of_many_failed_is_kept(execute: Callable, workers: int) -> None:
    def calls(failing: int | None) -> list[dict[str, Any]]:
        return [{"n": n, **({"fail": True} if n == failing else {})} for n in range(6)]

    def body(runner: Runner) -> None:
        with pytest.raises(CoaloraError, match="Part 2 failed"):
            runner.run_many(part, calls(2), workers=workers)
        done = set(CALLS) - {"part 2"}
        assert {"part 0", "part 1"} <= done
        assert "part 5" not in done  # none is begun after the failure
        CALLS.clear()
        assert len(runner.run_many(part, calls(None), workers=workers)) == 6
        assert set(CALLS) == {f"part {n}" for n in range(6)} - done

    execute(body)
