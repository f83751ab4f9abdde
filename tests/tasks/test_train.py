"""Stage `train`: one process or two, the state of a round is what the next one goes on from."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.inputs.adapted import load_state, release_models
from pipeline.store.store import Artifact
from tasks.search import search_round
from tasks.train import train_round
from tests.tiny_run import TinyRun


def trained(run: TinyRun, *, processes: int, method: str = "coa", previous: Artifact | None = None) -> Artifact:
    s = run.settings
    return train_round.fn(
        model=run.model_with(processes=processes, process_configurations="same"),
        configurations=run.trained.sets[0],
        previous=previous,
        method=method,
        training=s.training,
        rounds=s.search.rounds,
        round_index=0 if previous is None else 1,
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


def test_a_stage_that_loads_its_model_gives_the_bytes_of_one_that_finds_it_loaded(run: TinyRun) -> None:
    """The tiny run's stages took the model over from each other."""
    s = run.settings
    sets, states = run.trained.sets, run.trained.states["coa"]
    search = replace(s.search, rounds=0)
    release_models()
    found = search_round.fn(
        model=run.model, configurations=sets[0], state=states[0], search=search, round_index=1, goal="fine-tune"
    )
    assert found.digest == sets[1].digest
    release_models()
    trained = train_round.fn(
        model=run.model, configurations=sets[1], previous=states[0], method="coa", training=s.training,
        rounds=s.search.rounds, round_index=1,
    )  # fmt: skip
    assert trained.digest == states[1].digest
