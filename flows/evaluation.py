"""Flow `evaluation`: choose a configuration for each budget, then measure every method."""

from __future__ import annotations

from prefect import flow
from pydantic import BaseModel

from flows.calibration import Calibrated
from flows.run import PipelineRun
from flows.training import Trained
from tasks.evaluation import evaluate_method
from tasks.reference import train_reference
from tasks.selection import select_budgets
from tasks.settings import Settings
from tasks.store import Artifact

STAGES = [select_budgets, evaluate_method, train_reference]


class Evaluated(BaseModel):
    """The final set with the chosen configurations, and each method's scores."""

    selection: Artifact
    scores: dict[str, Artifact]
    references: dict[str, list[Artifact]] = {}


def evaluation_chain(run: PipelineRun, calibrated: Calibrated, trained: Trained) -> Evaluated:
    """Run the stages of this flow."""
    s = run.settings
    common = {**calibrated.inputs(), "adapter": s.adapter, "runtime": s.runtime, "seed": s.seed}
    selection = run.run(
        select_budgets,
        **common,
        configurations=trained.sets[-1],
        state=trained.states["coa"][-1],
        batch_size=s.search.batch_size,
        budgets=s.evaluation.budgets,
    )
    scores = {
        method: run.run(
            evaluate_method,
            **common,
            selection=selection,
            state=trained.states[method][-1],
            method=method,
            batch_size=s.evaluation.batch_size,
        )
        for method in trained.states
    }
    return Evaluated(selection=selection, scores=scores, references=_references(run, calibrated, selection))


def _references(run: PipelineRun, calibrated: Calibrated, selection: Artifact) -> dict[str, list[Artifact]]:
    s = run.settings
    steps = s.baselines.per_budget_steps or s.training.initial_steps + s.search.rounds * s.training.round_steps
    return {
        method: [
            run.run(
                train_reference,
                **calibrated.inputs(),
                selection=selection,
                index=index,
                method=method,
                adapter=s.adapter,
                training=s.training,
                steps=steps,
                batch_size=s.evaluation.batch_size,
                runtime=s.runtime,
                seed=s.seed,
            )
            for index in range(len(s.evaluation.budgets))
        ]
        for method in s.baselines.per_budget
    }


@flow(name="evaluation", flow_run_name="{name}: evaluation")
def evaluation(
    name: str, settings: Settings, refresh: list[str], calibrated: Calibrated, trained: Trained
) -> Evaluated:
    """Measure CoA-LoRA, Shared-LoRA and no adapter on every member and every asked budget."""
    run = PipelineRun.under_prefect(name, settings, refresh)
    return evaluation_chain(run, calibrated, trained)
