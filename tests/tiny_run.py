"""One run of the tiny pipeline without cache or server: its artifacts, made by the stages' own functions.

What publishes, adapts and reports needs real artifacts; they are made once for all tests of a session, by whichever
process asks first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flows.graph import Calibrated, Evaluated, Exported, Graph, Trained
from flows.run import Run
from pipeline.inputs.adapted import ModelInputs
from pipeline.settings.definitions import load_settings
from pipeline.settings.sections import Settings
from pipeline.stages.runner import Stage
from pipeline.store.store import Artifact
from tasks.write_run_folder import write_run_folder
from tests import shared

CHANGES = [
    "search.rounds=1", "training.initial_steps=2", "training.round_steps=1", "training.warmup_steps=1",
    "model.pretrain.steps=4", "runtime.device=cpu", "runtime.dtype=float32", "initial_set.size=3",
    "adapter.compensation_rank=1", "adapter.expert_bits=3", "adapter.rank_pattern={mlp.down_proj: 5}",
    "training.paired=false",
    "calibration.hessians=true", "evaluation.prompts=[A list is]", "evaluation.prompt_tokens=5",
    "baselines.methods=[none, shared, paper]", "baselines.per_budget=[qlora, lq-lora]", "baselines.per_budget_steps=2",
]  # fmt: skip


class _Plain:
    """Calls stages as they are."""

    def run(self, stage: Stage, /, *, refresh: bool = False, **inputs: Any) -> Artifact:
        return stage.task.fn(**stage.bind(inputs))

    def run_many(self, stage: Stage, calls: Any, **_: Any) -> list[Artifact]:
        return [self.run(stage, **inputs) for inputs in calls]


@dataclass(frozen=True)
class TinyRun:
    """What a finished run has made. `home` is its COALORA_HOME, `folder` its run folder."""

    home: Path
    folder: Path
    settings: Settings
    calibrated: Calibrated
    trained: Trained
    evaluated: Evaluated
    exported: Exported

    @property
    def model(self) -> ModelInputs:
        return self.model_with()

    def model_with(self, **runtime: Any) -> ModelInputs:
        """The inputs of the run's model, with another runtime."""
        s = self.settings
        return ModelInputs(
            **self.calibrated.inputs(), adapter=s.adapter, runtime=replace(s.runtime, **runtime), seed=s.seed
        )


@contextmanager
def at_home(home: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COALORA_HOME", str(home))
        yield


@cache
def tiny_run() -> TinyRun:
    return shared.once("tiny-run", _make)


def _make(root: Path) -> TinyRun:
    home = root / "home"
    settings = load_settings("tiny", file=Path(__file__).parent / "flows" / "tiny.yaml", changes=CHANGES)
    with at_home(home):
        graph = Graph(Run("tiny", settings, _Plain()))  # type: ignore[arg-type]
        exported = graph.exported
        folder = write_run_folder.fn(
            folder=str(root / "runs" / "tiny" / "0123abcd"),
            report=exported.report,
            bundle=exported.bundle,
            exports={f"export/{name}": made for name, made in graph.named_exports().items()},
            record={
                "pipeline": "tiny",
                "settings": settings.model_dump(mode="json"),
                **{name: made.model_dump(mode="json") for name, made in graph.calibrated.inputs().items()},
                "bundle": exported.bundle.model_dump(mode="json"),
            },
        )
    return TinyRun(home, Path(folder), settings, graph.calibrated, graph.trained, graph.evaluated, exported)
