"""Flow `calibration`: base model, tokenized benchmark, calibration tables."""

from __future__ import annotations

from prefect import flow
from pydantic import BaseModel

from flows.run import PipelineRun
from pipeline.settings.sections import Settings
from pipeline.store.store import Artifact
from tasks.base import prepare_base, prepare_benchmark
from tasks.calibrate import calibrate
from tasks.cost import apply_cost

STAGES = [prepare_base, prepare_benchmark, calibrate, apply_cost]


class Calibrated(BaseModel):
    """What every later stage reads."""

    base: Artifact
    benchmark: Artifact
    tables: Artifact

    def inputs(self) -> dict[str, Artifact]:
        return {"base": self.base, "benchmark": self.benchmark, "tables": self.tables}


def calibration_chain(run: PipelineRun) -> Calibrated:
    """Run the stages of this flow."""
    s = run.settings
    pretrained = s.model.pretrain is not None
    base = run.run(
        prepare_base,
        model=s.model,
        content=run.benchmark_content if pretrained else run.model_content,
        corpus=s.benchmark.data_only() if pretrained else None,
        runtime=s.runtime,
        seed=s.seed,
    )
    benchmark = run.run(prepare_benchmark, base=base, benchmark=s.benchmark.data_only(), content=run.benchmark_content)
    tables = run.run(
        calibrate,
        base=base,
        benchmark=benchmark,
        target_modules=s.target_modules,
        calibration=s.calibration,
        choices=s.choices,
        runtime=s.runtime,
        seed=s.seed,
    )
    if s.cost.kind != "average_bits":
        tables = run.run(apply_cost, tables=tables, cost=s.cost, content=run.cost_content)
    return Calibrated(base=base, benchmark=benchmark, tables=tables)


@flow(name="calibration", flow_run_name="{name}: calibration")
def calibration(name: str, settings: Settings, refresh: list[str]) -> Calibrated:
    """Measure the base model: input statistics, and error and size of every choice for every layer."""
    return calibration_chain(PipelineRun.under_prefect(name, settings, refresh))
