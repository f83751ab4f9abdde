"""Stages on workers in other processes: the same results and records, a model for each, clear words when one dies."""

from __future__ import annotations

import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from coalora.errors import CoaloraError
from flows.graph import Graph
from flows.run import Run
from pipeline.stages.runner import DirectRunner
from pipeline.stages.stage import Stage
from pipeline.store.store import default_store
from pipeline.workers.pool import check_runner, open_pool
from pipeline.workers.worker import WorkerPool, work
from tests.pipeline.store.stores import ROOT
from tests.pipeline.workers.worker_stages import on_worker
from tests.tiny_run import TinyRun, at_home, tiny_run

pytestmark = pytest.mark.servers

NEEDS = {"processes": "torch", "dask": "distributed", "ray": "ray"}


@pytest.fixture(scope="module")
def run() -> TinyRun:
    return tiny_run()


@pytest.fixture(scope="module", params=list(NEEDS))
def pool(request: pytest.FixtureRequest) -> Iterator[WorkerPool]:
    if find_spec(NEEDS[request.param]) is None:
        pytest.skip(f"extra [{request.param}] is not installed")
    made = open_pool(request.param, 2)
    assert made is not None
    yield made
    made.close()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("COALORA_HOME", str(tmp_path / "home"))
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "results"}):
        yield tmp_path / "home"


def test_workers_of_every_kind(pool: WorkerPool, run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one test for each kind, since starting them takes most of the time."""
    _calls_come_back_in_order_from_two_workers_that_load_once(pool, tmp_path)
    _what_a_stage_raises_arrives_unchanged_and_what_was_finished_is_kept(pool, tmp_path)
    _an_evaluation_gives_the_bytes_of_threads(pool, run, monkeypatch, tmp_path)


def _calls_come_back_in_order_from_two_workers_that_load_once(pool: WorkerPool, traces: Path) -> None:
    runner = DirectRunner()
    calls = [{"n": n, "traces": str(traces)} for n in range(6)]
    made = runner.run_many(on_worker, calls, workers=2, pool=pool)
    assert [(default_store().path(a) / "n.txt").read_text() for a in made] == list("012345")
    processes = {a.meta["process"] for a in made}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert sorted((traces / "loads").read_text().split()) == sorted(map(str, processes))
    assert [record.cached for record in runner.history] == [False] * 6
    assert runner.run_many(on_worker, calls, workers=2, pool=pool) == made  # from the records
    assert [record.cached for record in runner.history[6:]] == [True] * 6
    assert not list((default_store().root / "locks").iterdir())


def _what_a_stage_raises_arrives_unchanged_and_what_was_finished_is_kept(pool: WorkerPool, traces: Path) -> None:
    calls = [{"n": n, "traces": str(traces)} for n in (20, 13, 21, 22, 23)]
    with pytest.raises(CoaloraError) as caught:
        DirectRunner().run_many(on_worker, calls, workers=2, pool=pool)
    assert str(caught.value) == "Number 13 is unlucky. Take another."
    runner = DirectRunner()
    runner.run_many(on_worker, [calls[0]], workers=2, pool=pool)
    assert runner.history[0].cached


def _an_evaluation_gives_the_bytes_of_threads(
    pool: WorkerPool, run: TinyRun, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr("flows.run.open_pool", lambda *_, **__: pool)
    monkeypatch.setattr(pool, "close", lambda: None)
    changes = {"shard_size": 2, "workers": 2, "runner": "processes"}
    baselines = run.settings.baselines.model_copy(update={"per_budget": ["lq-lora"]})
    evaluation = run.settings.evaluation.model_copy(update=changes)
    settings = run.settings.model_copy(update={"evaluation": evaluation, "baselines": baselines})
    trained = replace(run.trained, states={m: run.trained.states[m] for m in ("coa", "none")})
    runner = DirectRunner()
    with at_home(run.home):
        runner.store = default_store()
        found = Graph(Run("tiny", settings, runner), calibrated=run.calibrated, trained=trained).evaluated
    assert [found.scores[m].digest for m in trained.states] == [run.evaluated.scores[m].digest for m in trained.states]
    alone = [[a.digest for a in made.references["lq-lora"]] for made in (found, run.evaluated)]
    assert alone[0] == alone[1]
    assert not any(record.cached for record in runner.history if record.stage == "evaluate-shard")


@pytest.fixture
def real_processes() -> Iterator[None]:
    """Started by the interpreter: the death of a fork is told by a client that stands in for it."""
    forks = multiprocessing.spawn.get_executable()
    multiprocessing.set_executable(sys.executable)
    yield
    multiprocessing.set_executable(forks)


@pytest.mark.usefixtures("real_processes")
def test_a_worker_process_that_dies_is_said_and_the_next_call_gets_a_new_one(tmp_path: Path) -> None:
    pool = open_pool("processes", 1)
    assert pool is not None
    try:
        with pytest.raises(RuntimeError, match=r"a worker process ended before it answered.*run again"):
            DirectRunner().run_many(on_worker, [{"n": 99, "traces": str(tmp_path)}], workers=1, pool=pool)
        (made,) = DirectRunner().run_many(on_worker, [{"n": 1, "traces": str(tmp_path)}], workers=1, pool=pool)
        assert made.meta["process"] != os.getpid()
    finally:
        pool.close()


def test_workers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from pipeline.environment import set_defaults\nset_defaults()\n"
        "from pipeline.stages.runner import DirectRunner\nfrom pipeline.workers.pool import open_pool\n"
        "from tests.pipeline.workers.worker_stages import on_worker\n"
        "if __name__ == '__main__':\n"
        "    made = DirectRunner().run_many(on_worker, [dict(n=1, traces=sys.argv[1])], workers=1, "
        "pool=open_pool('processes', 1))\n"
        "    print(made[0].meta['process'], flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "program.py").write_text(program)
    run = subprocess.Popen(
        [sys.executable, "program.py", str(tmp_path)], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect")},
    )  # fmt: skip
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    os.kill(worker, 0)
    run.send_signal(signal.SIGKILL)
    run.wait(30)
    end = time.monotonic() + 20
    while time.monotonic() < end and _runs(worker):
        time.sleep(0.1)
    assert not _runs(worker)


def _runs(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_with_other_code_or_packages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CoaloraError, match=r"other code or packages.*'on-worker'.*checkout"):
        work(on_worker, "on-worker-0123", {"n": 1, "traces": str(tmp_path)}, {}, 1, None)


def test_a_worker_that_cannot_read_an_input_says_what_to_set(tmp_path: Path) -> None:
    table = default_store().put("text", lambda folder: (folder / "a").write_text("a") and None)
    gone = table.model_copy(update={"digest": "0" * 64})
    inputs = {"n": 1, "traces": str(tmp_path), "table": gone}
    with pytest.raises(CoaloraError, match=r"cannot read the run's table .*not in the store.*COALORA_STORE"):
        work(on_worker, on_worker.key(inputs), inputs, {}, 1, None)


@pytest.mark.parametrize(("kind", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_runner_without_its_extra_is_refused_by_name(
    kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.workers.pool.find_spec", lambda name: None if name == package else object())
    with pytest.raises(CoaloraError, match=rf"pip install 'coalora\[{kind}\]'"):
        check_runner(kind)  # type: ignore[arg-type]
    with pytest.raises(CoaloraError, match=rf"needs the package {package}"):
        open_pool(kind, 2)  # type: ignore[arg-type]


def test_a_stage_goes_to_another_process_by_its_name() -> None:
    import pickle

    again = pickle.loads(pickle.dumps(on_worker))
    assert again is on_worker
    assert isinstance(again, Stage)


def test_a_dask_scheduler_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("pipeline.workers.dask_pool.CONNECT_SECONDS", 1)
    pool = open_pool("dask", 2, address="tcp://127.0.0.1:1")
    assert pool is not None
    with pytest.raises(CoaloraError, match=r"No Dask scheduler answers at evaluation\.address"):
        DirectRunner().run_many(on_worker, [{"n": 1, "traces": str(tmp_path)}], workers=2, pool=pool)
    pool.close()
