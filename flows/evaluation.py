"""Flow `evaluation`: choose a configuration for each budget, then measure every method."""

from __future__ import annotations

from typing import Any

from prefect import flow
from pydantic import BaseModel

from coalora.evaluate.harness import harness_version
from flows.calibration import Calibrated
from flows.run import PipelineRun
from flows.training import Trained
from pipeline.inputs.resident import release_models
from pipeline.settings.sections import Settings
from pipeline.stages.stage import Pool
from pipeline.store.store import Artifact
from tasks.evaluate import evaluate_method, evaluate_shard, shard_bounds
from tasks.harness import evaluate_harness, include_digest
from tasks.reference import train_reference
from tasks.select import select_budgets

STAGES = [select_budgets, evaluate_shard, evaluate_method, evaluate_harness, train_reference]


class Evaluated(BaseModel):
    """The final set with the chosen configurations, and each method's scores."""

    selection: Artifact
    scores: dict[str, Artifact]
    references: dict[str, list[Artifact]] = {}
    harness: list[Artifact] = []  # one for each asked budget, where tasks are asked for


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
    scores = {}
    try:
        with run.workers() as pool:
            for method in trained.states:
                shards = run.run_many(
                    evaluate_shard,
                    [
                        {
                            **common,
                            "selection": selection,
                            "state": trained.states[method][-1],
                            "method": method,
                            "batch_size": s.evaluation.batch_size,
                            "start": start,
                            "stop": stop,
                        }
                        for start, stop in shard_bounds(selection, s.evaluation.shard_size)
                    ],
                    workers=s.evaluation.workers,
                    pool=pool,
                )
                scores[method] = run.run(
                    evaluate_method, tables=calibrated.tables, selection=selection, method=method, shards=shards
                )
            asked = common | {"selection": selection, "state": trained.states["coa"][-1]}
            harness = _harness(run, asked, pool)
            references = _references(run, calibrated, selection, pool)
    finally:
        release_models()
    return Evaluated(selection=selection, scores=scores, references=references, harness=harness)


def _harness(run: PipelineRun, common: dict[str, Any], pool: Pool | None) -> list[Artifact]:
    """CoA-LoRA's model of every budget on the harness's tasks."""
    asked = run.settings.evaluation
    if not asked.harness_tasks:
        return []
    common |= {
        "method": "coa",
        "tasks": asked.harness_tasks,
        "include": asked.harness_include,
        "include_content": include_digest(asked.harness_include),
        "limit": asked.harness_limit,
        "batch_size": asked.batch_size,
        "version": harness_version(),
    }
    calls = [{**common, "index": index} for index in range(len(asked.budgets))]
    return run.run_many(evaluate_harness, calls, workers=asked.workers, pool=pool)


def _references(
    run: PipelineRun, calibrated: Calibrated, selection: Artifact, pool: Pool | None
) -> dict[str, list[Artifact]]:
    """The adapters that are trained for one budget alone; each in a process of its own where there are several."""
    s = run.settings
    steps = s.baselines.per_budget_steps or s.training.initial_steps + s.search.rounds * s.training.round_steps
    release_models()  # of this process: training loads its own
    common = {
        **calibrated.inputs(),
        "selection": selection,
        "adapter": s.adapter,
        "training": s.training,
        "steps": steps,
        "batch_size": s.evaluation.batch_size,
        "runtime": s.runtime,
        "seed": s.seed,
    }
    indices = range(len(s.evaluation.budgets))
    return {
        method: run.run_each(train_reference, [{**common, "method": method, "index": i} for i in indices], pool)
        for method in s.baselines.per_budget
    }


@flow(name="evaluation", flow_run_name="{name}: evaluation")
def evaluation(
    name: str, settings: Settings, refresh: list[str], calibrated: Calibrated, trained: Trained
) -> Evaluated:
    """Measure CoA-LoRA, Shared-LoRA and no adapter on every member and every asked budget."""
    run = PipelineRun.under_prefect(name, settings, refresh)
    return evaluation_chain(run, calibrated, trained)
