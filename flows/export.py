"""Flow `export`: adapter and packed base for each budget, the bundle, and the result."""

from __future__ import annotations

from prefect import flow
from pydantic import BaseModel

from flows.calibration import Calibrated
from flows.evaluation import Evaluated
from flows.run import PipelineRun
from flows.training import Trained
from pipeline.settings.sections import Settings
from pipeline.store.store import Artifact
from tasks.export import export_budget, make_bundle
from tasks.result import assemble

STAGES = [make_bundle, export_budget, assemble]


class Exported(BaseModel):
    """What leaves the pipeline: `exports` in the order of the budgets."""

    bundle: Artifact
    exports: list[Artifact]
    result: Artifact


def export_chain(run: PipelineRun, calibrated: Calibrated, trained: Trained, evaluated: Evaluated) -> Exported:
    """Run the stages of this flow."""
    s = run.settings
    bundle = run.run(
        make_bundle,
        **calibrated.inputs(),
        selection=evaluated.selection,
        state=trained.states["coa"][-1],
        adapter=s.adapter,
        runtime=s.runtime,
        seed=s.seed,
    )
    common = {
        "base": calibrated.base,
        "benchmark": calibrated.benchmark,
        "tables": calibrated.tables,
        "selection": evaluated.selection,
        "bundle": bundle,
        "export": s.export,
        "runtime": s.runtime,
        "seed": s.seed,
    }
    with run.workers() as pool:
        exports = run.run_each(export_budget, [{**common, "index": i} for i in range(len(s.evaluation.budgets))], pool)
    result = run.run(
        assemble,
        pipeline=run.name,
        settings=s.of_the_result(),
        **calibrated.inputs(),
        searches=trained.searches,
        selection=evaluated.selection,
        states=trained.states,
        scores=evaluated.scores,
        exports=exports,
        references=evaluated.references,
        harness=evaluated.harness,
    )
    return Exported(bundle=bundle, exports=exports, result=result)


@flow(name="export", flow_run_name="{name}: export")
def export(
    name: str,
    settings: Settings,
    refresh: list[str],
    calibrated: Calibrated,
    trained: Trained,
    evaluated: Evaluated,
) -> Exported:
    """Write what devices take, and put the numbers of the run together."""
    run = PipelineRun.under_prefect(name, settings, refresh)
    return export_chain(run, calibrated, trained, evaluated)
