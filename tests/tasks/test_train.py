"""Stage `train`: one process or two, the state of a round is what the next one goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from pipeline.inputs.adapted import load_state
from pipeline.store.store import Artifact
from tasks.train import train_round
from tests.tiny_run import TinyRun, at_home, tiny_run


@pytest.fixture(scope="module")
def run() -> Iterator[TinyRun]:
    made = tiny_run()
    with at_home(made.home):
        yield made


def trained(run: TinyRun, *, processes: int, method: str = "coa", previous: Artifact | None = None) -> Artifact:
    s = run.settings
    return train_round.fn(
        **run.calibrated.inputs(),
        configurations=run.trained.sets[0],
        previous=previous,
        method=method,
        adapter=s.adapter,
        training=s.training,
        rounds=s.search.rounds,
        round_index=0 if previous is None else 1,
        runtime=replace(s.runtime, processes=processes, process_configurations="same"),
        seed=s.seed,
    )


def test_two_processes_leave_a_state_that_one_can_go_on_from(run: TinyRun) -> None:
    both = trained(run, processes=2)
    state = load_state(both)
    assert state.step == run.settings.training.initial_steps
    alone = load_state(run.trained.states["coa"][0])
    assert state.tensors.keys() == alone.tensors.keys()
    # Twice the examples: another gradient than that of one process.
    assert any(not torch.equal(v, alone.tensors[k]) for k, v in state.tensors.items())
    assert load_state(trained(run, processes=1, previous=both)).step == state.step + run.settings.training.round_steps


def test_nothing_to_train_is_an_empty_state(run: TinyRun) -> None:
    artifact = trained(run, processes=1, method="none")
    assert artifact.meta["step"] == 0
    assert load_state(artifact).tensors == {}
