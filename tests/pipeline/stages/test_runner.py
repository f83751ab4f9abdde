"""Stages run once, share their records between Prefect and direct runs, and never trust damaged files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from coalora.errors import CoaloraError
from pipeline.stages.runner import DirectRunner, PrefectRunner, Runner, stage
from pipeline.store.store import Artifact, default_store
from tests.pipeline.stages.engine_runs import directly, in_flow, writer

pytestmark = pytest.mark.usefixtures("own_results")
ROOT = Path(__file__).resolve().parents[3]
CALLS: list[str] = []  # names of the stage functions that have really run


class Settings(BaseModel):
    text: str = "alpha"


@stage("first", tags=["demo"])
def first(*, settings: Settings, repeat: int = 1) -> Artifact:
    CALLS.append("first")
    if settings.text == "bad":
        raise CoaloraError(f"The text is {settings.text}", remedy="Write another")
    if settings.text == "interrupt":
        raise KeyboardInterrupt

    def build(folder: Path) -> dict[str, Any]:
        (folder / "a.txt").write_text(settings.text * repeat)
        return {"score": 0.5, "text": settings.text, "count": repeat, "best": True, "none": None}

    return default_store().put("text", build)


@stage("second")
def second(*, table: Artifact, more: list[Artifact] | None = None) -> Artifact:
    CALLS.append("second")
    text = (default_store().path(table) / "a.txt").read_text()
    return default_store().put("length", writer(str(len(text))))


@stage("flaky", retries=1)
def flaky(*, n: int) -> Artifact:
    CALLS.append("flaky")
    if CALLS.count("flaky") == 1:
        raise RuntimeError("first try")
    return default_store().put("text", writer(str(n)))


@stage("wrong-return")
def wrong_return(*, n: int) -> Artifact:
    return n  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def nothing_ran_yet() -> None:
    CALLS.clear()


def flags(runner: Runner) -> list[tuple[str, bool, bool]]:
    return [(record.stage, record.cached, record.rebuilt) for record in runner.history]


def damage(artifact: Artifact) -> None:
    file = next(path for path in default_store().path(artifact).iterdir() if path.suffix == ".txt")
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
    file = default_store().path(artifact) / "a.txt"
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
    assert default_store().verify(artifact) == []


def test_damaged_results_are_rebuilt_in_a_flow(prefect_server: None) -> None:
    def body(runner: PrefectRunner) -> list[tuple[str, bool, bool]]:
        artifact = runner.run(first, settings=Settings())
        damage(artifact)
        assert content(runner.run(first, settings=Settings())) == content(artifact)
        assert content(runner.run(first, settings=Settings())) == content(artifact)
        assert default_store().verify(artifact) == []
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
            assert str(caught.value) == "The text is bad. Write another."
            assert caught.value.remedy == "Write another"
        with pytest.raises(TypeError, match="returned no Artifact, but int"):
            runner.run(wrong_return, n=1)
        assert runner.history == []

    execute(body)
    assert CALLS == ["first", "first"]
    assert not list((tmp_path / "results").glob("first-*"))
    assert not list((tmp_path / "results").glob("wrong-return-*"))


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
    with pytest.raises(CoaloraError, match="outside of a flow"):
        PrefectRunner().run(first, settings=Settings())
