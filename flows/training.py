"""Flow `training`: the initial set (allocated, or given by a file), then rounds of training and Pareto search.

CoA-LoRA and the methods that it is compared with train on the same sets, step by step: the sets come from CoA's search.
"""

from __future__ import annotations

from typing import Protocol

from prefect import flow
from pydantic import BaseModel

from coalora.adapt.adapted import Method
from flows.calibration import Calibrated
from flows.run import PipelineRun
from pipeline.settings.sections import Settings
from pipeline.store.store import Artifact
from tasks.given_set import given_set
from tasks.initial_set import initial_set
from tasks.search import search_round
from tasks.train import train_round

STAGES = [initial_set, given_set, train_round, search_round]


class Trained(BaseModel):
    """Sets and states round by round: `sets[i]` is what `states[method][i]` was trained on last."""

    sets: list[Artifact]
    states: dict[str, list[Artifact]]

    @property
    def searches(self) -> list[Artifact]:
        """The sets that search rounds made."""
        return self.sets[1:]


class Watcher(Protocol):
    """Told of what training makes, round by round."""

    def on_set(self, round_index: int, configurations: Artifact) -> None:
        """A round's set exists."""

    def on_state(self, method: str, round_index: int, state: Artifact) -> None:
        """A method's state after a round's steps exists."""


def training_chain(run: PipelineRun, calibrated: Calibrated, watcher: Watcher | None = None) -> Trained:
    """Run the stages of this flow; the watcher is told of every round's set and state as soon as it exists."""
    s = run.settings
    if run.given is not None:
        sets = [run.run(given_set, tables=calibrated.tables, content=run.given)]
    else:
        sets = [run.run(initial_set, tables=calibrated.tables, initial=s.initial_set)]
    coa: list[Artifact] = []
    for round_index in range(s.search.rounds + 1):
        if round_index:
            sets.append(
                run.run(
                    search_round,
                    **calibrated.inputs(),
                    configurations=sets[-1],
                    state=coa[-1],
                    adapter=s.adapter,
                    # Each round stands for itself: asking for more of them keeps those that are done.
                    search=s.search.model_copy(update={"rounds": 0}),
                    round_index=round_index,
                    runtime=s.runtime,
                    seed=s.seed,
                )
            )
        if watcher is not None:
            watcher.on_set(round_index, sets[-1])
        coa.append(_train(run, calibrated, sets[-1], coa[-1] if coa else None, "coa", round_index))
        if watcher is not None:
            watcher.on_state("coa", round_index, coa[-1])
    states = {"coa": coa}
    # Without an adapter a language model has nothing to learn; a classifier has its head.
    trains_head = s.benchmark.task == "classification"
    for method in s.baselines.methods:
        trained_on = sets[:1] if method == "none" and not trains_head else sets
        states[method] = _baseline(run, calibrated, trained_on, method, watcher)
    return Trained(sets=sets, states=states)


def _baseline(
    run: PipelineRun, calibrated: Calibrated, sets: list[Artifact], method: Method, watcher: Watcher | None
) -> list[Artifact]:
    states: list[Artifact] = []
    for round_index, configurations in enumerate(sets):
        previous = states[-1] if states else None
        states.append(_train(run, calibrated, configurations, previous, method, round_index))
        if watcher is not None:
            watcher.on_state(method, round_index, states[-1])
    return states


def _train(
    run: PipelineRun,
    calibrated: Calibrated,
    configurations: Artifact,
    previous: Artifact | None,
    method: Method,
    round_index: int,
) -> Artifact:
    s = run.settings
    return run.run(
        train_round,
        **calibrated.inputs(),
        configurations=configurations,
        previous=previous,
        method=method,
        adapter=s.adapter,
        training=s.training,
        rounds=s.search.rounds,
        round_index=round_index,
        runtime=s.runtime,
        seed=s.seed,
    )


@flow(name="training", flow_run_name="{name}: training and search")
def training(name: str, settings: Settings, refresh: list[str], calibrated: Calibrated) -> Trained:
    """Train over the configuration set and let the search improve it, round by round."""
    from flows.publishing import Rounds

    run = PipelineRun.under_prefect(name, settings, refresh)
    return training_chain(run, calibrated, Rounds(run, calibrated.tables))
