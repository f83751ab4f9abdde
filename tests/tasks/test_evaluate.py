"""Shards change how an evaluation runs, never what it measures; what was finished is not measured again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

import pipeline.inputs.adapted
import tasks.evaluate_shard
from coalora.errors import CoaloraError
from coalora.evaluate.losses import measure_configurations, score
from coalora.evaluate.reference import Reference
from coalora.files import read_json
from flows.graph import Evaluated, Graph
from flows.run import Run
from pipeline.inputs.adapted import ModelInputs, parameters
from pipeline.inputs.loaders import load_selected, load_set
from pipeline.stages.runner import DirectRunner
from pipeline.store.store import default_store
from tasks.evaluate import SCORES, merge_shards
from tasks.evaluate_shard import shard_bounds
from tests.tiny_run import TinyRun

METHODS = ("coa", "none", "shared", "paper")  # in the order in which they are evaluated


@pytest.fixture(autouse=True)
def _own_records(tmp_path: Path) -> Iterator[None]:
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "results"}):
        yield


def evaluate(run: TinyRun, runner: DirectRunner, *, references: bool = False, **changes: Any) -> Evaluated:
    """The evaluation, with the methods that are trained for each budget only where they are asked for."""
    settings = run.settings.model_copy(update={"evaluation": run.settings.evaluation.model_copy(update=changes)})
    if not references:
        baselines = settings.baselines.model_copy(update={"per_budget": []})
        settings = settings.model_copy(update={"baselines": baselines})
    return Graph(Run("tiny", settings, runner), calibrated=run.calibrated, trained=run.trained).evaluated


def stages(runner: DirectRunner) -> list[str]:
    return [record.stage for record in runner.history if not record.cached]


@pytest.mark.parametrize(("shard_size", "workers"), [(1, 1), (2, 1), (3, 2), (1, 4)])
def test_any_cut_gives_the_same_bytes(run: TinyRun, shard_size: int, workers: int) -> None:
    found = evaluate(run, DirectRunner(), shard_size=shard_size, workers=workers)
    assert found.selection == run.evaluated.selection.model_copy(update={"meta": found.selection.meta})
    for method in METHODS:
        assert found.scores[method].digest == run.evaluated.scores[method].digest


def test_scores_are_those_of_each_configuration_alone(run: TinyRun) -> None:
    data, tables = run.model.data, run.model.measured
    adapted = run.model.build("coa", start=False)
    adapted.load_state_dict(parameters(run.trained.states["coa"][-1]))
    found = read_json(default_store().path(run.evaluated.scores["coa"]) / SCORES)
    rows = {
        "members": load_set(run.evaluated.selection, tables).configurations,
        "budgets": load_selected(run.evaluated.selection, tables),
    }
    for part, configurations in rows.items():
        for i in reversed(range(len(configurations))):
            (alone,) = measure_configurations(
                adapted, data.validation, configurations[i : i + 1],
                batch_size=run.settings.evaluation.batch_size, reference=Reference(),
            )  # fmt: skip
            plain = score(adapted, data.validation, batch_size=run.settings.evaluation.batch_size)
            assert {name: alone.metrics[name] for name in plain.metrics} == plain.metrics
            assert found[part]["loss"][i] == alone.loss == plain.loss
            assert {name: values[i] for name, values in found[part]["metrics"].items()} == alone.metrics
    adapted.full_precision()
    plain = score(adapted, data.validation, batch_size=8)
    assert found["full_precision"]["loss"] == plain.loss
    assert found["full_precision"]["metrics"]["kl_divergence"] > 0  # of the shared adapter, from the base


@pytest.mark.parametrize("workers", [1, 2])
def test_an_evaluation_that_broke_off_goes_on_with_what_is_missing(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    n_shards = len(shard_bounds(run.evaluated.selection, 1))
    assert n_shards > 3
    original = tasks.evaluate_shard.measure_configurations
    measured: list[str] = []

    def measure(adapted: Any, split: Any, rows: np.ndarray, *, progress: Any, **options: Any) -> Any:
        measured.append(progress.label)
        if "shared, configurations 3 " in progress.label and measured.count(progress.label) == 1:
            raise RuntimeError("out of memory")
        return original(adapted, split, rows, progress=progress, **options)

    monkeypatch.setattr(tasks.evaluate_shard, "measure_configurations", measure)
    first = DirectRunner()
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(run, first, shard_size=1, workers=workers)
    finished = stages(first).count("evaluate-shard")
    n = len(METHODS) * n_shards
    assert 2 * n_shards + 2 <= finished < n  # all of `coa` and `none`, and what was done of `shared`
    second = DirectRunner()
    found = evaluate(run, second, shard_size=1, workers=workers)
    assert stages(second).count("evaluate-shard") == n - finished
    assert len(measured) == n + 1
    assert {m: a.digest for m, a in found.scores.items()} == {m: a.digest for m, a in run.evaluated.scores.items()}


def test_a_model_is_loaded_once_for_all_shards_of_a_method(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    original = ModelInputs.build

    def build(self: ModelInputs, method: str, **options: Any) -> Any:
        loaded.append(method)
        return original(self, method, **options)

    monkeypatch.setattr(ModelInputs, "build", build)
    evaluate(run, DirectRunner(), references=True, shard_size=1)
    alone = [method for method in run.settings.baselines.per_budget for _ in run.settings.evaluation.budgets]
    assert loaded == [*METHODS, *alone]  # the choice for the budgets shares that of `coa`
    assert not pipeline.inputs.adapted._held  # and forgotten afterwards


def test_progress_tells_every_configuration_of_the_whole(run: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    n = run.evaluated.selection.meta["n_distinct"]
    with caplog.at_level("INFO", logger="coalora"):
        evaluate(run, DirectRunner(), shard_size=2)
    assert f"evaluating coa, configurations 1 to 2 of {n} and full precision: 1/3, loss" in caplog.text
    assert f"evaluating coa, configurations 3 to 4 of {n}: 2/2, loss" in caplog.text


@pytest.mark.parametrize("kept", [[], [0], [1], [0, 0, 1], [0, 1, 1]])
def test_shards_that_do_not_cover_every_configuration_once_are_refused(kept: list[int]) -> None:
    row = {"loss": 1.0, "metrics": {"accuracy": 0.5}}
    shards = [
        {"start": 0, "scores": [row] * 2, "full_precision": row},
        {"start": 2, "scores": [row], "full_precision": None},
    ]
    inverse = np.array([0, 2, 1, 1])
    assert merge_shards(shards[::-1], inverse, 3, 3)["budgets"] == {
        "loss": [1.0],
        "blocks": [()],
        "metrics": {"accuracy": [0.5]},
    }
    with pytest.raises(CoaloraError, match="do not cover the configurations 0 to 3 once each"):
        merge_shards([shards[i] for i in kept], inverse, 3, 3)


def test_how_an_evaluation_is_cut_changes_neither_result_nor_run_folder(run: TinyRun) -> None:
    def run_of(**changes: Any) -> Run:
        settings = run.settings.model_copy(update={"evaluation": run.settings.evaluation.model_copy(update=changes)})
        return Run("tiny", settings, DirectRunner())

    plain, cut = run_of(), run_of(shard_size=3, workers=2, runner="dask", address="tcp://scheduler:8786")
    assert plain.settings != cut.settings
    assert plain.settings.of_the_result() == cut.settings.of_the_result()
    assert plain.identity == cut.identity != run_of(batch_size=3).identity
