"""Whole runs of both goals: what each trains, searches by and reports, and a budget in bytes of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from coalora.export.bundle import Bundle
from coalora.files import read_json
from flows.graph import Graph
from flows.run import Run
from pipeline.preflight import preflight
from pipeline.report.page import render_page
from pipeline.report.schema import RESULT, Result, as_result
from pipeline.report.table import markdown_table
from pipeline.report.terminal import print_result
from pipeline.settings.definitions import load_settings
from pipeline.settings.sections import Settings
from pipeline.store.store import default_store
from tests.tiny_run import CHANGES, _Plain, at_home

PLAIN = [change for change in CHANGES if not change.startswith(("baselines", "evaluation.prompts"))]
TINY = Path(__file__).with_name("tiny.yaml")


def settings_of(*changes: str) -> Settings:
    return load_settings("tiny", file=TINY, changes=[*PLAIN, "baselines.methods=[none]", *changes])


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Settings, Graph, Result]]:
    def make(*changes: str) -> tuple[Path, Settings, Graph, Result]:
        home, settings = tmp_path_factory.mktemp("goal"), settings_of(*changes)
        preflight(settings)
        with at_home(home):
            graph = Graph(Run.start("tiny", settings, _Plain()))  # type: ignore[arg-type]
            content: dict[str, Any] = read_json(default_store().path(graph.exported.result) / RESULT)
        return home, settings, graph, as_result(content)

    return make


@pytest.fixture(scope="module")
def recovered(run_of) -> tuple[Path, Settings, Graph, Result]:
    return run_of("goal=recover", "cost=file_bytes", "evaluation.budgets=[86KB, 88kB]", "export.adapter_dtype=int4")


@pytest.fixture(scope="module")
def tuned(run_of) -> tuple[Path, Settings, Graph, Result]:
    return run_of("baselines.ceiling=own")


def test_to_recover_is_reported_by_the_divergence_from_the_base(recovered) -> None:
    home, _, graph, result = recovered
    assert (result.benchmark.metric, result.benchmark.reference) == ("kl_divergence", "the base in full precision")
    assert result.beside == ["top1_agreement", "bits_per_byte"]
    assert result.full_precision.metric == pytest.approx(0, abs=1e-6)
    assert not result.full_precision.with_adapter
    with at_home(home):
        selected = read_json(default_store().path(graph.selection) / "selected.json")
    losses = [member["loss"] for member in selected["members"]]
    assert max(losses) < min(budget.loss["coa"] for budget in result.budgets)  # KL, and not the task's loss
    for member in result.members:
        assert member.loss == member.metric
    assert "zero KL divergence" in result.hypervolume.normalization
    assert "which has" not in markdown_table(result)


def test_to_fine_tune_the_reference_has_learnt_the_task(tuned) -> None:
    _, settings, _, result = tuned
    assert settings.own_reference
    assert result.benchmark.reference == "full precision with its own adapter"
    assert (result.benchmark.metric, result.beside) == ("bits_per_byte", ["kl_divergence", "top1_agreement"])
    assert result.full_precision.metrics["top1_agreement"] == 1
    assert all(budget.metrics["kl_divergence"]["none"] > 0 for budget in result.budgets)


def test_budgets_in_bytes_hold_what_lies_on_disk(recovered) -> None:
    home, settings, graph, result = recovered
    assert settings.evaluation.budgets == [0.086, 0.088]
    for budget in result.budgets:
        assert budget.total_bytes <= 1e6 * budget.at <= 1e6 * budget.budget
        assert 1e6 * budget.at - budget.total_bytes < 64 * 200  # headers are counted a little too long
    with at_home(home):
        bundle = Bundle.load(default_store().path(graph.bundle))
    assert bundle.tables.cost_kind == "file_bytes"
    assert bundle.tables.costs(bundle.select("87kB")) <= 0.087


@pytest.mark.parametrize("made", ["recovered", "tuned"])
def test_both_are_told_in_terminal_table_and_page(made: str, request: pytest.FixtureRequest, capsys) -> None:
    result: Result = request.getfixturevalue(made)[3]
    print_result(result, Console(width=80, force_terminal=False))
    printed = capsys.readouterr().out
    table = printed[: printed.index("full precision  ")]
    assert max(map(len, table.splitlines())) <= 80
    for text in (" ".join(printed.split()), markdown_table(result), render_page(result)):
        assert "op-1 agreement ↑" in text
        assert f"reference: {result.benchmark.reference}" in text
        value = result.budgets[0].metrics["top1_agreement"]["coa"]
        assert f"{100 * value:.1f}%" in text
