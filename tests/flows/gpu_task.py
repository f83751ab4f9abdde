"""A flow whose task carries the GPU tag and shows progress: `python gpu_task.py`, run in a checkout by tests."""

from __future__ import annotations

import flows  # noqa: F401 (sets the storage before Prefect is imported)

from pathlib import Path  # isort: skip

from prefect import flow

from pipeline.progress import Progress
from pipeline.settings.sections import RuntimeSettings
from pipeline.stages.runner import PrefectRunner, stage
from pipeline.store.store import Artifact, default_store


@stage("hold", tags=("gpu",))
def hold(*, runtime: RuntimeSettings) -> Artifact:
    progress = Progress("training coa, round 0", interval=0.0)
    for step in (10, 20, 30):
        progress(step, 30, loss=1.0 / step)

    def write(folder: Path) -> None:
        (folder / "held").write_text(runtime.device)

    return default_store().put("held", write)


@flow(flow_run_name="holding")
def holding(name: str) -> None:
    runner = PrefectRunner()
    runner.run(hold, runtime=RuntimeSettings(device="cpu"))
    runner.run(hold, runtime=RuntimeSettings(device="cuda"))
    runner.run(hold, runtime=RuntimeSettings(device="cuda"))


if __name__ == "__main__":
    holding(name="gpu-test")
