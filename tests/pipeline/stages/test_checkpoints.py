"""Scratch of stages: where it lies, when it goes, and that a search round goes on behind what it had measured."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import coalora.evaluate.losses
from coalora.errors import CoaloraError
from coalora.files import read_json, write_json
from pipeline.settings.sections import StageSettings
from pipeline.stages.checkpoints import Memo, checkpoint_every, checkpoints_folder, discard, place, scratch_of
from tasks.search import search_round
from tasks.train import train_round
from tests.preloaded import Process
from tests.tiny_run import TinyRun, at_home, tiny_run

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COALORA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def run() -> Iterator[TinyRun]:
    made = tiny_run()
    with at_home(made.home):
        yield made


def test_scratch_is_kept_when_the_stage_fails_and_removed_when_it_is_done(home: Path) -> None:
    def write() -> None:
        found = place()
        assert found is not None
        found.folder.mkdir(parents=True, exist_ok=True)
        (found.folder / "a").touch()

    def fail() -> None:
        with scratch_of("train-1"):
            write()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (home / "checkpoints" / "train-1" / "a").exists()
    with scratch_of("train-1"):
        write()
    assert not (home / "checkpoints" / "train-1").exists()
    assert place() is None


def test_checkpoints_can_be_switched_off() -> None:
    with scratch_of("train-1"), checkpoint_every(None):
        assert place() is None
    with scratch_of("train-1"), checkpoint_every(7.0):
        found = place()
        assert found is not None
        assert found.seconds == 7.0


def test_how_often_is_no_input_of_a_stage() -> None:
    assert "checkpoint_seconds" in StageSettings.model_fields
    for stage in (train_round, search_round):
        assert "stages" not in stage.signature.parameters


def test_a_refresh_forgets_what_a_killed_stage_had_reached(home: Path) -> None:
    (checkpoints_folder() / "train-1").mkdir(parents=True)
    discard("train-1")
    discard("train-1")
    assert list((home / "checkpoints").iterdir()) == []


def test_scratch_that_nobody_came_back_to_is_swept(home: Path) -> None:
    for name, days in (("old", 31), ("young", 29)):
        folder = checkpoints_folder() / name
        folder.mkdir(parents=True)
        then = time.time() - days * 86400
        os.utime(folder, (then, then))
    with scratch_of("train-1"):
        pass
    assert [p.name for p in (home / "checkpoints").iterdir()] == ["young"]


def test_a_memo_goes_on_behind_its_numbers_exactly() -> None:
    values = [0.1 + 0.2, 1e-17, 3.0]

    def fail() -> None:
        with scratch_of("search-1"):
            memo = Memo("set", 5)
            for value in values:
                memo.add(value)
            memo.save()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with scratch_of("search-1"):
        assert Memo("set", 5).values == values
        assert Memo("candidates", 5).values == []


@pytest.mark.parametrize("content", ["[1.0", "{}", '["a"]', "[1.0, 2.0, 3.0]"])
def test_a_damaged_memo_is_ignored_with_a_warning(content: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = checkpoints_folder() / "search-1"
    folder.mkdir(parents=True)
    (folder / "set.json").write_text(content)
    with scratch_of("search-1"):
        assert Memo("set", 2).values == []
    assert "damaged and ignored" in caplog.text


def test_a_disk_that_is_full_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CoaloraError, match=r"The disk of .*checkpoints is full"), scratch_of("search-1"):
        _saved_memo()


def _saved_memo() -> None:
    memo = Memo("set", 5)
    memo.add(1.0)
    memo.save()


def test_outside_of_a_stage_nothing_is_written(home: Path) -> None:
    memo = Memo("set", 2)
    memo.add(1.0)
    memo.save()
    assert memo.values == [1.0]
    assert not home.exists()


def test_a_search_that_broke_off_measures_only_what_is_missing(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COALORA_HOME", str(run.home))
    s = run.settings
    inputs = {
        "model": run.model, "configurations": run.trained.sets[0], "state": run.trained.states["coa"][0],
        "search": replace(s.search, rounds=0), "round_index": 1,
        "goal": s.goal,
    }  # fmt: skip
    original, measured = coalora.evaluate.losses._Tally.score, []

    def score(tally):
        measured.append(1)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return original(tally)

    monkeypatch.setattr(coalora.evaluate.losses._Tally, "score", score)
    with pytest.raises(KeyboardInterrupt):
        search_round.task.fn(**inputs)
    again = search_round.task.fn(**inputs)
    assert again.digest == run.trained.sets[1].digest
    n_set, n_candidates = (
        s.initial_set.size,
        read_json(run.home / "store" / again.digest[:2] / again.digest / "round.json"),
    )
    assert len(measured) == 1 + n_set + n_candidates["n_candidates"]  # one was begun twice
    assert not (run.home / "checkpoints" / search_round.key(inputs)).exists()


PROGRAM = """
import os, sys
import flows
from coalora.files import read_json
from pipeline.inputs.adapted import ModelInputs
from pipeline.stages.checkpoints import checkpoint_every
from pipeline.stages.runner import DirectRunner
from coalora.recipes import AdapterRecipe, TrainingRecipe
from pipeline.settings.sections import RuntimeSettings
from pipeline.store.store import Artifact
from tasks.train import train_round
import logging
from prefect.utilities.engine import capture_sigterm
logging.getLogger("coalora").setLevel(logging.INFO)
logging.getLogger("coalora").addHandler(logging.StreamHandler(sys.stdout))
if __name__ == "__main__":
    given = read_json(__import__("pathlib").Path(sys.argv[1]))
    artifacts = {k: Artifact.model_validate(v) for k, v in given["artifacts"].items()}
    configurations = artifacts.pop("configurations")
    adapter, runtime = AdapterRecipe.from_dict(given["adapter"]), RuntimeSettings.from_dict(given["runtime"])
    model = ModelInputs(**artifacts, adapter=adapter, runtime=runtime, seed=0)
    # Prefect's flow runs take a termination signal so.
    with capture_sigterm(), checkpoint_every(0.001):
        found = DirectRunner().run(
            train_round, model=model, configurations=configurations, previous=None, method="coa",
            training=TrainingRecipe.from_dict(given["training"]), rounds=0, round_index=0,
        )
    print("DIGEST", found.digest, flush=True)
"""


@dataclass(frozen=True)
class Apart:
    """A first round of two processes, in a process of its own that is told what to do by a file."""

    folder: Path
    home: Path
    steps: int = 60

    def start(self, results: str) -> Process:
        environment = os.environ | {
            "COALORA_HOME": str(self.home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(self.folder / results),
            "PREFECT_HOME": str(self.folder / "prefect"),
        }  # fmt: skip
        return Process((str(self.folder / "program.py"), str(self.folder / "given.json")), self.folder, environment)


@pytest.fixture(scope="module")
def apart(run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Apart, str]:
    """How to start it, and what it prints when nothing disturbs it."""
    made = Apart(tmp_path_factory.mktemp("apart"), run.home)
    runtime = replace(run.settings.runtime, processes=2)
    training = replace(run.settings.training, initial_steps=made.steps, sampling="adaptive")
    artifacts = run.calibrated.inputs() | {"configurations": run.trained.sets[0]}
    write_json(
        made.folder / "given.json",
        {"artifacts": {k: v.model_dump(mode="json") for k, v in artifacts.items()}, "runtime": runtime.to_dict(),
         "adapter": run.settings.adapter.to_dict(), "training": training.to_dict()},
    )  # fmt: skip
    (made.folder / "program.py").write_text(PROGRAM)
    return made, made.start("undisturbed").read(timeout=200)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_that_were_ended_resume_to_the_state_of_undisturbed_ones(
    apart: tuple[Apart, str], number: signal.Signals
) -> None:
    """A signal to the parent, caught or not: the processes stop at a boundary, the next call goes on there."""
    program, undisturbed = apart
    killed = program.start(number.name)
    lines = []
    for line in killed.stdout:
        lines.append(line)
        if "training coa, round 0: " in line:
            os.kill(killed.pid, number)
            break
    code = killed.wait(60)
    assert code == -number if number == signal.SIGKILL else code not in (0, None), "".join(lines)
    killed.stdout.read()  # until its children are gone, too
    resumed = program.start(number.name).read(timeout=200)
    assert f"of {program.steps}" in resumed.split("resumed from the checkpoint at step ")[1]
    assert "resumed" not in undisturbed
    assert resumed.split("DIGEST ")[1].split()[0] == undisturbed.split("DIGEST ")[1].split()[0]
