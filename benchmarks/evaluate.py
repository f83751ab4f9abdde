"""Two worker processes against one, on the evaluation of one set: what `evaluation.runner: processes` is for.

A decoder of the shape of pipeline tiny, hardly trained; a set of configurations; one stage call a shard, as in a run.
Each worker has one thread and keeps its model. The workers are started, and have loaded the model, before the clock
runs; the two ways alternate, and medians are compared. Both must give the same scores, bit for bit.

Beside the time on the clock: the processor time of the busiest worker, which says what the clock would on a machine
that has nothing else to do; and what two processes of this machine can do at all, from two lone workers that evaluate
the whole set at the same time (cores share memory, and virtual ones more than that).

    python -m benchmarks.evaluate [--quick] [--runner processes|dask]
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import psutil

import benchmarks._one_thread  # noqa: F401 (before torch and Prefect)
from benchmarks._report import report
from coalora.files import read_json
from flows.graph import Graph
from flows.run import Run
from pipeline.settings.definitions import load_settings
from pipeline.stages.runner import DirectRunner
from pipeline.store.store import default_store
from pipeline.workers.pool import open_pool
from pipeline.workers.worker import WorkerPool
from tasks.evaluate_shard import SHARD, evaluate_shard, shard_bounds

SHARD_SIZE = 2
CHANGES = [
    "model.pretrain.steps=30", "training.initial_steps=2", "training.warmup_steps=1", "search.rounds=0",
    "baselines.methods=[shared]", "runtime.device=cpu", "runtime.dtype=float32", "initial_set.size=15",
    "evaluation.budgets=[2.5,3.5]",
]  # fmt: skip


def shard_calls(run: Run) -> list[dict[str, Any]]:
    """The calls that evaluate CoA-LoRA on the set of a run which is made here."""
    graph = Graph(run)
    common: dict[str, Any] = {"model": graph.model, "state": graph.trained.states["coa"][-1]}
    common |= {"selection": graph.selection, "method": "coa", "batch_size": run.settings.evaluation.batch_size}
    return [{**common, "start": start, "stop": stop} for start, stop in shard_bounds(graph.selection, SHARD_SIZE)]


def evaluate(runner: DirectRunner, calls: list[dict[str, Any]], pool: WorkerPool) -> tuple[float, float, list[Any]]:
    """(seconds, processor seconds of the busiest worker, scores) of all shards, computed whatever is recorded."""
    before = processor_seconds()
    started = time.perf_counter()
    shards = runner.run_many(evaluate_shard, calls, workers=pool.workers, pool=pool, refresh=True)
    elapsed = time.perf_counter() - started
    busiest = max(after - before.get(process, 0.0) for process, after in processor_seconds().items())
    return elapsed, busiest, [read_json(default_store().path(shard) / SHARD) for shard in shards]


def side_by_side(calls: list[dict[str, Any]], pools: list[WorkerPool]) -> float:
    """Seconds that lone workers take when each evaluates the whole set at the same time."""

    def whole_set(pool: WorkerPool) -> None:
        for call in calls:
            pool.run(evaluate_shard, evaluate_shard.key(call), call)

    started = time.perf_counter()
    with ThreadPoolExecutor(len(pools)) as threads:
        list(threads.map(whole_set, pools))
    return time.perf_counter() - started


def processor_seconds() -> dict[int, float]:
    """Processor time of every process below this one."""
    times = {child.pid: child.cpu_times() for child in psutil.Process().children(recursive=True)}
    return {process: time.user + time.system for process, time in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--runner", choices=("processes", "dask"), default="processes")
    options = parser.parse_args()
    file = Path(__file__).parents[1] / "pipelines.yaml"
    runner = DirectRunner()
    calls = shard_calls(Run.start("tiny", load_settings("tiny", file=file, changes=CHANGES), runner))
    pools = [pool for workers in (1, 2, 1) if (pool := open_pool(options.runner, workers)) is not None]
    compared, lone = pools[:2], pools[::2]
    times: dict[int, list[float]] = {1: [], 2: []}
    busiest: dict[int, list[float]] = {1: [], 2: []}
    beside: list[float] = []
    scores = []
    try:
        for pool in pools:
            evaluate(runner, calls, pool)
        for _ in range(3 if options.quick else 7):
            for pool in compared:
                elapsed, busy, found = evaluate(runner, calls, pool)
                times[pool.workers].append(elapsed)
                busiest[pool.workers].append(busy)
                scores.append(found)
            beside.append(side_by_side(calls, lone))
    finally:
        for pool in pools:
            pool.close()
    if any(found != scores[0] for found in scores):
        raise SystemExit("one and two workers measured different scores")
    what = f"evaluation of {calls[-1]['stop']} configurations, 2 {options.runner} / 1"
    rows = [
        {"what": f"{what}: {kind}", "measured": median(found[2]) / median(found[1]), "limit": 0.55, "unit": "x"}
        | {"note": f"{median(found[2]):.2f} and {median(found[1]):.2f} s"}
        for kind, found in (("time", times), ("busiest processor", busiest))
    ]
    rows.append(
        {"what": "this machine's bound: two lone workers at once, twice the work", "unit": "x"}
        | {"measured": median(beside) / 2 / median(times[1]), "note": f"{median(beside):.2f} s for both"}
    )
    name = "evaluate" if options.runner == "processes" else f"evaluate-{options.runner}"
    report(name, rows, notes="One thread a process; the same scores, bit for bit.")


if __name__ == "__main__":
    main()
