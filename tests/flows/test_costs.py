"""A whole run that counts microseconds over mixed choices: every stage in the unit of its cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coalora.errors import CoaloraError
from coalora.export.base import load_base
from coalora.export.bundle import Bundle
from coalora.files import read_json
from flows.graph import Calibrated, Exported, Graph, Trained
from flows.run import Run
from pipeline.inputs.loaders import load_input_statistics, load_tables
from pipeline.preflight import preflight
from pipeline.report.schema import RESULT, as_result
from pipeline.report.table import markdown_table
from pipeline.settings.definitions import load_settings
from pipeline.settings.sections import Settings
from pipeline.store.store import default_store
from tests.tiny_run import CHANGES, _Plain, at_home

RULES = (
    "[{layers: '*.mlp.*', scheme: int, allow: {bits: [4, 8], mode: [sym]}},"
    " {layers: v_proj, scheme: float, allow: {dtype: [bf16]}}]"
)
TABLE = "layer,scheme,bits,microseconds\n*_proj,nf,2,30\n*_proj,nf,3,40\n*_proj,nf,4,25\n*_proj,int,4,10\n"
BUDGETS = (300.0, 330.0)


def latency_settings(table: Path, *changes: str) -> Settings:
    return load_settings(
        "tiny",
        file=Path(__file__).with_name("tiny.yaml"),
        changes=[
            *CHANGES, f"choices.rules={RULES}", "cost.kind=latency", f"cost.table={table}",
            f"evaluation.budgets={list(BUDGETS)}", *changes,
        ],
    )  # fmt: skip


@dataclass(frozen=True)
class LatencyRun:
    home: Path
    settings: Settings
    run: Run
    calibrated: Calibrated
    trained: Trained
    exported: Exported


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> LatencyRun:
    home = tmp_path_factory.mktemp("latency")
    table = home / "device.csv"
    table.write_text(TABLE + "*_proj,int,8,20\nv_proj,float,,15\n")
    settings = latency_settings(table)
    preflight(settings)
    with at_home(home):
        run = Run.start("tiny", settings, _Plain())  # type: ignore[arg-type]
        graph = Graph(run)
        return LatencyRun(home, settings, run, graph.calibrated, graph.trained, graph.exported)


def test_tables_carry_the_cost_and_keep_the_statistics(finished: LatencyRun) -> None:
    with at_home(finished.home):
        tables = load_tables(finished.calibrated.tables)
        assert len(load_input_statistics(finished.calibrated.tables, tables)) == 14
        assert default_store().verify(finished.calibrated.tables) == []
    assert tables.cost_kind == "latency"
    # Two blocks of three nf layers, one in 16 bits and three MLPs.
    assert tables.cost_range() == (2 * (3 * 25 + 15 + 3 * 10), 2 * (3 * 40 + 15 + 3 * 20))
    assert finished.calibrated.tables.meta["cost"] == "latency"


def test_budgets_sets_bundle_and_result_are_in_microseconds(finished: LatencyRun) -> None:
    with at_home(finished.home):
        result: dict[str, Any] = read_json(default_store().path(finished.exported.result) / RESULT)
        bundle = Bundle.load(default_store().path(finished.exported.bundle))
        record = read_json(default_store().path(finished.trained.sets[1]) / "round.json")
        base = load_base(default_store().path(finished.exported.exports[0]) / "base")
    assert result["cost"]["unit"] == "µs"
    for budget, row in zip(BUDGETS, result["budgets"], strict=True):
        assert row["budget"] == budget
        assert row["cost"] <= budget
        assert bundle.tables.costs(bundle.select(budget)) <= budget
        assert 4 < row["average_bits"] < 10
    assert [export["folder"] for export in result["exports"]] == ["export/300-us", "export/330-us"]
    assert result["hypervolume"]["ideal"][1] == 240
    assert "smallest microseconds" in result["hypervolume"]["normalization"]
    assert all(240 <= cost <= 390 for _, cost in record["front"])
    assert record["ref_point"][1] == pytest.approx(390 * 1.01)
    assert "| budget | µs | bits a weight |" in markdown_table(as_result(result))
    assert sum(p.numel() for p in base.parameters()) > 0


def test_the_content_of_the_table_is_part_of_what_a_run_is(finished: LatencyRun, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text(TABLE + "*_proj,int,8,21\nv_proj,float,,15\n")
    with at_home(tmp_path):
        changed = Run.start("tiny", latency_settings(other), _Plain())  # type: ignore[arg-type]
    assert changed.cost_content != finished.run.cost_content is not None


@pytest.mark.parametrize(
    ("rows", "changes", "fragments"),
    [
        ("*_proj,int,8,20\n", [], ["no row for self_attn.v_proj under bf16"]),
        ("*_proj,int,8,-20\nv_proj,float,,15\n", [], ["'-20'", "line 6"]),
        ("*_proj,int,8,20\nv_proj,float,,15\n", ["evaluation.budgets=[3]"], ["budgets 3 µs", "240.000 to 390.000 µs"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_runs(
    tmp_path: Path, rows: str, changes: list[str], fragments: list[str]
) -> None:
    table = tmp_path / "device.csv"
    table.write_text(TABLE + rows)
    with pytest.raises(CoaloraError) as caught:
        preflight(latency_settings(table, *changes))
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_table_belongs_to_latency_alone(tmp_path: Path) -> None:
    for change in ("cost.table=null", "cost.kind=bytes"):
        with pytest.raises(CoaloraError, match=r"cost\.table belongs to cost\.kind latency"):
            latency_settings(tmp_path / "t.csv", change)


def test_bytes_are_megabytes_of_the_packed_layers() -> None:
    settings = load_settings(
        "tiny",
        file=Path(__file__).with_name("tiny.yaml"),
        changes=["cost.kind=bytes", "evaluation.budgets=[0.007]"],
    )
    found = preflight(settings)
    assert found.cost_words == "megabytes"
    assert found.cost_range == pytest.approx([bits * found.n_weights / 8e6 for bits in found.bits_range])
