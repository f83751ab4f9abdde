"""Stages run once, share their records between Prefect and direct runs, and never trust damaged files."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prefect
import pytest
from prefect.settings import PREFECT_HOME, PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from prefect.testing.utilities import prefect_test_harness
from pydantic import BaseModel

from coalora.errors import CoaloraError
from tasks.engine import DirectRunner, PrefectRunner, Runner, stage
from tasks.store import Artifact, Store

ROOT = Path(__file__).resolve().parents[2]
CALLS: list[str] = []  # names of the stage functions that have really run


class Settings(BaseModel):
    text: str = "alpha"


def writer(text: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "a.txt").write_text(text)

    return build


@stage("first", tags=["demo"])
def first(*, settings: Settings, repeat: int = 1) -> Artifact:
    CALLS.append("first")
    if settings.text == "bad":
        raise CoaloraError("the text is good", got=settings.text, remedy="write another")
    if settings.text == "interrupt":
        raise KeyboardInterrupt

    def build(folder: Path) -> dict[str, Any]:
        (folder / "a.txt").write_text(settings.text * repeat)
        return {"score": 0.5, "text": settings.text, "count": repeat, "best": True, "none": None}

    return Store().put("text", build)


@stage("second")
def second(*, table: Artifact, more: list[Artifact] | None = None) -> Artifact:
    CALLS.append("second")
    text = (Store().path(table) / "a.txt").read_text()
    return Store().put("length", writer(str(len(text))))


@stage("flaky", retries=1)
def flaky(*, n: int) -> Artifact:
    CALLS.append("flaky")
    if CALLS.count("flaky") == 1:
        raise RuntimeError("first try")
    return Store().put("text", writer(str(n)))


@stage("wrong-return")
def wrong_return(*, n: int) -> Artifact:
    return n  # type: ignore[return-value]


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
        raise CoaloraError("a part succeeds", got=n)
    return Store().put("text", writer(f"part {n}"))


@stage("patient")
def patient(*, n: int) -> Artifact:
    """Number 0 ends after number 4."""
    give_up = time.monotonic() + 20
    while n == 0 and "patient 4" not in CALLS:
        if time.monotonic() > give_up:
            raise TimeoutError("number 4 was never begun")
        time.sleep(0.01)
    CALLS.append(f"patient {n}")
    return Store().put("text", writer(f"patient {n}"))


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = tmp_path_factory.mktemp("prefect-home")
    with temporary_settings({PREFECT_HOME: home}), prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("COALORA_HOME", str(tmp_path / "home"))
    CALLS.clear()
    AT_WORK[:] = [0, 0]
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "results"}):
        yield tmp_path / "home"


def in_flow(body: Callable[[PrefectRunner], Any]) -> Any:
    """Run `body(runner)` inside a flow run and return its value."""
    values: list[Any] = []

    @prefect.flow(name="engine-test")
    def run() -> None:
        values.append(body(PrefectRunner()))

    run()
    return values[0]


def directly(body: Callable[[DirectRunner], Any]) -> Any:
    return body(DirectRunner())


@pytest.fixture(params=["direct", "prefect"])
def execute(request: pytest.FixtureRequest) -> Callable[[Callable[[Any], Any]], Any]:
    if request.param == "direct":
        return directly
    request.getfixturevalue("prefect_server")
    return in_flow


def flags(runner: Runner) -> list[tuple[str, bool, bool]]:
    return [(record.stage, record.cached, record.rebuilt) for record in runner.history]


def damage(artifact: Artifact) -> None:
    file = next(path for path in Store().path(artifact).iterdir() if path.suffix == ".txt")
    file.chmod(0o644)
    file.write_text("damaged")


def content(artifact: Artifact) -> tuple[str, str, int]:
    """All of an artifact that computing it again must give again: not how long it took."""
    return artifact.kind, artifact.digest, artifact.nbytes


def test_the_second_run_does_no_work_and_keeps_every_fact(execute: Callable) -> None:
    def body(runner: Runner) -> list[tuple[str, bool, bool]]:
        one = runner.run(first, settings=Settings())
        again = runner.run(first, settings=Settings(), repeat=1)  # the default, written out
        assert again == one
        facts = {"score": 0.5, "text": "alpha", "count": 1, "best": True, "none": None, "stage": "first"}
        assert {name: again.meta[name] for name in facts} == facts
        assert set(again.meta) == {*facts, "seconds"}
        assert again.meta["seconds"] >= 0
        kinds = [type(again.meta[name]) for name in facts]
        assert kinds == [float, str, int, bool, type(None), str]
        length = runner.run(second, table=one, more=[one])
        assert runner.run(second, table=again, more=[again]) == length
        assert runner.run(first, settings=Settings(text="beta")) != one
        assert content(runner.run(first, settings=Settings(), refresh=True)) == content(one)
        assert all(record.key.startswith(record.stage + "-") for record in runner.history)
        return flags(runner)

    assert execute(body) == [
        ("first", False, False),
        ("first", True, False),
        ("second", False, False),
        ("second", True, False),
        ("first", False, False),
        ("first", False, False),
    ]
    assert CALLS == ["first", "second", "first", "first"]


@pytest.mark.parametrize("how", ["altered", "deleted", "extra"])
def test_damaged_results_are_named_rebuilt_and_recorded_anew(how: str, caplog: pytest.LogCaptureFixture) -> None:
    artifact = DirectRunner().run(first, settings=Settings())
    file = Store().path(artifact) / "a.txt"
    if how == "altered":
        damage(artifact)
    elif how == "deleted":
        file.unlink()
    else:
        (file.parent / "b.txt").write_text("extra")
    runner = DirectRunner()
    with caplog.at_level(logging.WARNING, logger="coalora"):
        assert content(runner.run(first, settings=Settings())) == content(artifact)
    assert ("b.txt: extra" if how == "extra" else "a.txt: ") in caplog.text
    assert content(runner.run(first, settings=Settings())) == content(artifact)
    assert flags(runner) == [("first", False, True), ("first", True, False)]
    assert Store().verify(artifact) == []


def test_damaged_results_are_rebuilt_in_a_flow(prefect_server: None) -> None:
    def body(runner: PrefectRunner) -> list[tuple[str, bool, bool]]:
        artifact = runner.run(first, settings=Settings())
        damage(artifact)
        assert content(runner.run(first, settings=Settings())) == content(artifact)
        assert content(runner.run(first, settings=Settings())) == content(artifact)
        assert Store().verify(artifact) == []
        return flags(runner)

    assert in_flow(body) == [("first", False, False), ("first", False, True), ("first", True, False)]


def test_records_are_shared_between_prefect_and_direct_runs_both_ways(prefect_server: None) -> None:
    def alpha(runner: Runner) -> tuple[Artifact, bool]:
        return runner.run(first, settings=Settings()), runner.history[0].cached

    def beta(runner: Runner) -> tuple[Artifact, bool]:
        return runner.run(first, settings=Settings(text="beta")), runner.history[0].cached

    from_flow, cached = in_flow(alpha)
    assert not cached
    assert directly(alpha) == (from_flow, True)
    from_direct, cached = directly(beta)
    assert not cached
    assert in_flow(beta) == (from_direct, True)
    assert CALLS == ["first", "first"]


def test_errors_of_the_function_arrive_unchanged_and_leave_no_record(execute: Callable, tmp_path: Path) -> None:
    def body(runner: Runner) -> None:
        for _ in range(2):
            with pytest.raises(CoaloraError) as caught:
                runner.run(first, settings=Settings(text="bad"))
            assert str(caught.value) == "the text is good; got: bad; remedy: write another"
            assert caught.value.remedy == "write another"
        with pytest.raises(TypeError, match="returns an Artifact, not int"):
            runner.run(wrong_return, n=1)
        assert runner.history == []

    execute(body)
    assert CALLS == ["first", "first"]
    assert not list((tmp_path / "results").glob("first-*"))
    assert not list((tmp_path / "results").glob("wrong-return-*"))


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
        assert [(Store().path(a) / "a.txt").read_text() for a in found] == [f"part {n}" for n in range(6)]
        assert len(runner.history[1:]) == 6
        assert [record.artifact for record in runner.history[1:] if record.cached] == [found[2]]
        assert runner.run_many(part, calls, workers=workers) == found
        assert all(record.cached for record in runner.history[7:])

    execute(body)
    assert sorted(CALLS) == sorted(f"part {n}" for n in range(6))
    assert AT_WORK[1] == 1 if workers == 1 else 2 <= AT_WORK[1] <= workers


def test_a_long_call_keeps_no_other_worker_waiting(execute: Callable) -> None:
    def body(runner: Runner) -> None:
        found = runner.run_many(patient, [{"n": n} for n in range(5)], workers=2)
        assert [(Store().path(a) / "a.txt").read_text() for a in found] == [f"patient {n}" for n in range(5)]

    execute(body)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_finished_when_one_of_many_failed_is_kept(execute: Callable, workers: int) -> None:
    def calls(failing: int | None) -> list[dict[str, Any]]:
        return [{"n": n, **({"fail": True} if n == failing else {})} for n in range(6)]

    def body(runner: Runner) -> None:
        with pytest.raises(CoaloraError, match="a part succeeds; got: 2"):
            runner.run_many(part, calls(2), workers=workers)
        done = set(CALLS) - {"part 2"}
        assert {"part 0", "part 1"} <= done
        assert "part 5" not in done  # none is begun after the failure
        CALLS.clear()
        assert len(runner.run_many(part, calls(None), workers=workers)) == 6
        assert set(CALLS) == {f"part {n}" for n in range(6)} - done

    execute(body)


def test_bad_inputs_are_refused_before_anything_runs(execute: Callable) -> None:
    def body(runner: Runner) -> None:
        with pytest.raises(TypeError, match="input 'settings' of type PosixPath"):
            runner.run(first, settings=Path("x"))
        with pytest.raises(TypeError, match="stage 'first': missing a required argument: 'settings'"):
            runner.run(first)
        with pytest.raises(TypeError, match="unexpected keyword argument 'setings'"):
            runner.run(first, settings=Settings(), setings=1)

    execute(body)
    assert CALLS == []


def test_a_damaged_or_missing_input_is_refused_before_the_function_runs(execute: Callable) -> None:
    def body(runner: Runner) -> None:
        table = runner.run(first, settings=Settings())
        damage(table)
        with pytest.raises(CoaloraError, match=r"table: a\.txt: altered.*--refresh"):
            runner.run(second, table=table)
        gone = table.model_copy(update={"digest": "0" * 64})
        with pytest.raises(CoaloraError, match=r"more\[0\]: .*not in the store"):
            runner.run(second, table=runner.run(first, settings=Settings()), more=[gone])

    execute(body)
    assert "second" not in CALLS


def test_a_half_written_record_is_no_record(execute: Callable, tmp_path: Path) -> None:
    def body(runner: Runner) -> list[tuple[str, bool, bool]]:
        artifact = runner.run(first, settings=Settings())
        (record,) = (tmp_path / "results").glob("first-*")
        whole = record.read_bytes()
        for broken in (b"", whole[: len(whole) // 2], b'{"metadata": {}, "result": "1"}'):
            record.write_bytes(broken)
            assert content(runner.run(first, settings=Settings())) == content(artifact)
        assert json.loads(record.read_bytes())["metadata"]["serializer"]["type"] == "json"
        return flags(runner)

    assert execute(body) == [("first", False, False)] * 4


def test_an_interrupt_leaves_no_record(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        DirectRunner().run(first, settings=Settings(text="interrupt"))
    assert not list(tmp_path.glob("results/*"))


def test_prefect_shows_cached_stages_and_retries_failed_ones(prefect_server: None) -> None:
    states: list[str | None] = []
    flaky.task.on_completion(lambda task, run, state: states.append(state.name))

    def body(runner: PrefectRunner) -> list[tuple[str, bool, bool]]:
        runner.run(flaky, n=1)
        runner.run(flaky, n=1)
        return flags(runner)

    assert in_flow(body) == [("flaky", False, False), ("flaky", True, False)]
    assert states == ["Completed", "Cached"]
    assert CALLS == ["flaky", "flaky"]
    CALLS.clear()
    with pytest.raises(RuntimeError, match="first try"):
        DirectRunner().run(flaky, n=2)


def test_prefect_runner_outside_a_flow_is_an_error() -> None:
    with pytest.raises(CoaloraError, match="inside a flow"):
        PrefectRunner().run(first, settings=Settings())
