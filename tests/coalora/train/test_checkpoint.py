"""A training call that broke off at any moment goes on from its checkpoint to the same state, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coalora.recipes import TrainingRecipe
from coalora.train.checkpoint import CHECKPOINT, Checkpoint, Checkpoints, uninterrupted
from coalora.train.loop import train

STEPS = 26  # two flushes of losses and a rest
RECIPE = TrainingRecipe(batch_size=4, lr=1e-2, theta_lr=1e-2, warmup_steps=2, sampling="adaptive")


class Cancelled(BaseException):
    """As Prefect's termination signal: no Exception."""


@pytest.fixture
def go(tiny_llama, make_adapted, text_split):
    """`go(steps, checkpoints, stop_at, error)`: train afresh, as a new process does."""

    def run(checkpoints=None, *, steps=STEPS, state=None, stop_at=None, error=Cancelled, recipe=RECIPE):
        adapted = make_adapted(tiny_llama(), lora_dropout=0.2, expert_bits=3)
        configurations = np.random.default_rng(4).integers(8, size=(5, len(adapted.layers)))
        bits = np.array([adapted.base.space.nominal_bits[c].mean() for c in configurations])
        switch, calls = adapted.switch, []

        def spy(configuration):
            calls.append(1)
            if stop_at is not None and len(calls) == stop_at:
                raise error
            switch(configuration)

        adapted.switch = spy
        result = train(
            adapted,
            text_split,
            configurations,
            bits,
            recipe,
            steps=steps,
            seed=0,
            total_steps=40,
            state=state,
            checkpoints=checkpoints,
        )
        return *result, len(calls) - 1  # steps: the last call looks at the model that is left

    return run


def assert_same(first, second) -> None:
    assert (first[0].step, first[0].tensors.keys()) == (second[0].step, second[0].tensors.keys())
    assert [k for k, v in first[0].tensors.items() if not torch.equal(v, second[0].tensors[k])] == []
    assert first[1] == second[1]


@pytest.mark.parametrize("stop_at", [2, 11, 18, 26])
def test_a_cancelled_call_goes_on_at_the_very_step_to_the_same_state(go, tmp_path: Path, stop_at: int) -> None:
    whole = go()
    said: list[str] = []
    with pytest.raises(Cancelled):
        go(Checkpoints(tmp_path, notify=said.append), stop_at=stop_at)
    resumed = go(Checkpoints(tmp_path, notify=said.append))
    assert_same(whole, resumed)
    assert resumed[2] == STEPS - stop_at + 1  # no step was done twice
    assert said == [
        f"stopped at step {stop_at - 1} of {STEPS}; a checkpoint is kept for the next run",
        f"resumed from the checkpoint at step {stop_at - 1} of {STEPS}",
    ]


def test_checkpoints_by_steps_are_kept_when_the_process_dies_without_a_word(go, tmp_path: Path) -> None:
    whole = go()
    with pytest.raises(RuntimeError):  # an error saves nothing: only the last periodic checkpoint is there
        go(Checkpoints(tmp_path, steps=7), stop_at=20, error=RuntimeError)
    assert json.loads((tmp_path / CHECKPOINT).read_text())["step"] == 14
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    resumed = go(Checkpoints(tmp_path, steps=7))
    assert_same(whole, resumed)
    assert resumed[2] == STEPS - 14


def test_a_time_limit_keeps_what_was_reached(go, tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        go(Checkpoints(tmp_path), stop_at=5, error=TimeoutError)
    assert json.loads((tmp_path / CHECKPOINT).read_text())["step"] == 4


def test_a_second_round_resumes_too(go, tmp_path: Path) -> None:
    first = go()
    whole = go(steps=12, state=first[0])
    with pytest.raises(Cancelled):
        go(Checkpoints(tmp_path), steps=12, state=first[0], stop_at=6)
    resumed = go(Checkpoints(tmp_path), steps=12, state=first[0])
    assert_same(whole, resumed)
    assert resumed[2] == 7


def test_checkpoints_change_no_result(go, tmp_path: Path) -> None:
    assert_same(go(), go(Checkpoints(tmp_path, steps=1)))
    assert_same(go(), go(Checkpoints(tmp_path, steps=3)))  # the last one lies at step 24, and is taken up


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("*.safetensors", _cut),
        ("*.safetensors", _flip),
        ("*.safetensors", Path.unlink),
        (CHECKPOINT, _cut),
        (CHECKPOINT, lambda path: path.write_text("[]")),
        (CHECKPOINT, lambda path: path.write_text("{}")),
    ],
)
def test_a_damaged_checkpoint_is_ignored_with_a_word(
    go, tmp_path: Path, pattern: str, damage: Callable[[Path], object]
) -> None:
    said: list[str] = []
    with pytest.raises(Cancelled):
        go(Checkpoints(tmp_path), stop_at=5)
    (target,) = tmp_path.glob(pattern)
    damage(target)
    steps = go(Checkpoints(tmp_path, notify=said.append))[2]
    assert steps == STEPS
    assert said[0].startswith("WARNING: a checkpoint is ignored, training starts anew")


def test_the_checkpoint_of_another_span_is_ignored(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, notify=said.append)
    checkpoints.save((0, 8), Checkpoint(4, {"a": torch.zeros(2)}, [], []))
    assert checkpoints.load((0, 9)) is None
    assert "of steps [0, 8], not [0, 9]" in said[0]
    assert checkpoints.load((0, 8)) is not None


def test_an_older_checkpoint_survives_a_write_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save((0, 8), Checkpoint(3, {"a": torch.full((2,), 3.0)}, [], []))

    def dies(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coalora.train.checkpoint.replace_file", dies)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save((0, 8), Checkpoint(5, {"a": torch.full((2,), 5.0)}, [], []))
    found = checkpoints.load((0, 8))
    assert found is not None
    assert found.step == 3
    assert found.tensors["a"].tolist() == [3.0, 3.0]


def test_writing_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("coalora.train.checkpoint.time.monotonic", lambda: now[0])
    checkpoints = Checkpoints(tmp_path, seconds=10)
    checkpoints._saved_at = 0.0
    now[0] = 9.9
    assert not checkpoints.due(1)
    now[0] = 10.0
    assert checkpoints.due(1)
    checkpoints._saved_at, checkpoints._cost = 10.0, 3.0
    now[0] = 69.0
    assert not checkpoints.due(2)
    now[0] = 70.1
    assert checkpoints.due(2)


def test_a_signal_waits_for_the_end_of_what_must_not_be_torn() -> None:
    seen: list[str] = []

    def handler(*_: object) -> None:
        raise Cancelled

    def torn() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append("done")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Cancelled):
            torn()
        assert seen == ["done"]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_leave_the_handlers_alone() -> None:
    def run() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    seen: list[object] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_a_recipe_without_adaptive_sampling_resumes_as_well(go, tmp_path: Path) -> None:
    recipe = replace(RECIPE, sampling="low-bits")
    with pytest.raises(Cancelled):
        go(Checkpoints(tmp_path), stop_at=13, recipe=recipe)
    assert_same(go(recipe=recipe), go(Checkpoints(tmp_path), recipe=recipe))
