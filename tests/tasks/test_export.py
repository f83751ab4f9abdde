"""Exports in a row read one loaded base, and write what each would with a base of its own."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.inputs.adapted import release_models
from pipeline.inputs.exports import ExportInputs
from pipeline.inputs.loaders import BaseModel
from tasks.export import export_budget
from tests.tiny_run import at_home, tiny_run


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
