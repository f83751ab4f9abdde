"""Exports in a row read one loaded base, and write what each would with a base of its own; a tied run of integers is
exported in the formats of other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.graph import Graph
from flows.run import Run
from pipeline.inputs.adapted import release_models
from pipeline.inputs.exports import ExportInputs
from pipeline.inputs.loaders import BaseModel, load_set, load_tables
from pipeline.preflight import preflight
from pipeline.settings.definitions import load_settings
from pipeline.stages.runner import DirectRunner
from pipeline.store.store import default_store
from tasks.export import export_budget
from tests.tiny_run import CHANGES, at_home, tiny_run


def test_the_base_is_loaded_once_for_exports_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    run, loaded = tiny_run(), []
    original = BaseModel.load

    def load(self: BaseModel, *arguments: Any, **options: Any) -> Any:
        loaded.append(self.name)
        return original(self, *arguments, **options)

    monkeypatch.setattr(BaseModel, "load", load)
    s = run.settings
    inputs = {**run.calibrated.inputs(), "bundle": run.exported.bundle}
    export = ExportInputs(**inputs, settings=s.export, runtime=s.runtime, seed=s.seed)
    asked = {"export": export, "selection": run.evaluated.selection}
    release_models()
    with at_home(run.home):
        made = [export_budget(**asked, index=index) for index in range(len(s.evaluation.budgets))]
        assert len(made) > len(loaded) == 1
        release_models()
        alone = export_budget(**asked, index=len(made) - 1)
    assert [a.digest for a in made] == [a.digest for a in run.exported.exports]
    assert alone.digest == made[-1].digest
    release_models()


def test_a_tied_run_of_integers_is_exported_in_the_formats_of_other_engines() -> None:
    settings = load_settings(
        "tiny",
        file=Path(__file__).parents[1] / "flows" / "tiny.yaml",
        changes=[
            *CHANGES, "choices={scheme: int, allow: {group_size: [32], mode: [sym]}, tie: fused}", "search.rounds=1",
            "baselines.methods=[none]", "baselines.ceiling=own", "evaluation.budgets=[3]",
            "export.formats=[peft, compressed-tensors, mlx]",
        ],
    )  # fmt: skip
    preflight(settings)
    run = tiny_run()
    with at_home(run.home):
        graph = Graph(Run.start("tiny", settings, DirectRunner()))
        tables = load_tables(graph.calibrated.tables)
        assert tables.tie == "fused"
        for made in graph.trained.sets:
            tables.of_groups(load_set(made, tables).configurations)  # refuses what is not tied
        folder = default_store().path(graph.exported.exports[0])
        for file in ("compressed-tensors/base/model.safetensors", "mlx/adapter/adapters.safetensors"):
            assert (folder / file).is_file()
    release_models()
