"""Costs other than average bits, from the table to allocation, search and bundle; and bad latency tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coalora.adapt.adapted import AdaptedModel
from coalora.calibrate.costs import UNITS, CostKind, budget_name, parse_budget, parse_bytes
from coalora.calibrate.latency import read_latency
from coalora.calibrate.tables import CalibrationTables, calibration_tables
from coalora.configurations import ConfigurationSet
from coalora.errors import CoaloraError
from coalora.export.bundle import Bundle
from coalora.models.choices import Part, Rule, layer_choices
from coalora.models.targets import TargetLayer
from coalora.search.knapsack import allocate
from coalora.search.pareto import segment_filter
from coalora.search.proposals import propose
from coalora.search.surrogate import Surrogate

LAYERS = [
    TargetLayer(f"model.layers.{block}.{kind}", kind, block, shape, False)
    for block in range(2)
    for kind, shape in (("self_attn.q_proj", (64, 64)), ("mlp.up_proj", (128, 64)))
] + [TargetLayer("lm_head", "lm_head", 0, (96, 64), False)]
INT = Part("int", {"bits": [2, 4, 8], "group_size": [64], "mode": ["sym"]})
ROWS = ["*_proj,int2 *,10", "*_proj,int4 *,5", "*_proj,int8 *,20", "lm_head,bf16,7.5"]
KINDS: list[CostKind] = ["average_bits", "bytes", "file_bytes", "latency"]


@pytest.fixture(scope="module")
def plain() -> CalibrationTables:
    space, allowed = layer_choices(LAYERS, [INT], [Rule("lm_head", (Part("float", {"dtype": ["bf16"]}),))])
    err = 4.0 ** -np.array([2, 4, 8, 16]) * np.arange(1, 6)[:, None]
    err = np.where(allowed, err, np.where(allowed, err, 0).max(1, keepdims=True))
    return calibration_tables(LAYERS, space, err, "0" * 64, allowed)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(*rows: str, header: str = "layer,choice,microseconds") -> Path:
        path = tmp_path / "latency.csv"
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return path

    return make


def priced(plain: CalibrationTables, kind: CostKind, write: Callable[..., Path]) -> CalibrationTables:
    if kind == "file_bytes":
        return replace(plain, rest_nbytes=1_000_003).of_files(20_011)
    if kind != "latency":
        return replace(plain, cost_kind=kind)
    return replace(plain, cost_kind=kind, latency=read_latency(write(*ROWS), LAYERS, plain.space, plain.allowed))


def drawn(tables: CalibrationTables, n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([[rng.choice(np.flatnonzero(row)) for row in tables.allowed] for _ in range(n)])


@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_sums_over_layers_inside_their_range(plain, write, kind: CostKind) -> None:
    tables, C = priced(plain, kind, write), drawn(plain, 50)
    costs, low, high = tables.costs(C), *tables.cost_range()
    np.testing.assert_allclose(costs, tables.cost[np.arange(5), C].sum(1), rtol=1e-12)
    by_hand = {
        "average_bits": tables.total_nbytes(C) * 8 / tables.n_weights,
        "bytes": tables.total_nbytes(C) / 1e6,
        "file_bytes": (tables.total_nbytes(C) + 1_000_003 + 20_011 + tables.beside - 1_020_014) / 1e6,
        "latency": np.array([10.0, 5, 20, 7.5])[C].sum(1),
    }
    np.testing.assert_array_equal(costs, by_hand[kind])
    assert low <= costs.min() < costs.max() <= high
    np.testing.assert_array_equal(tables.average_bits(C), plain.average_bits(C))
    assert tables.cost_unit is UNITS[kind]


def test_the_range_of_latency_is_that_of_the_fastest_and_the_slowest_choices(plain, write) -> None:
    assert priced(plain, "latency", write).cost_range() == (4 * 5 + 7.5, 4 * 20 + 7.5)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_survive_saving_with_their_cost(plain, write, kind: CostKind, tmp_path: Path) -> None:
    tables = priced(plain, kind, write)
    tables.save(tmp_path / "t.safetensors")
    back = CalibrationTables.load(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(back.cost, tables.cost)
    assert back.cost_kind == kind
    assert (b"cost" in (tmp_path / "t.safetensors").read_bytes()) == (kind != "average_bits")


@pytest.mark.parametrize("kind", KINDS)
def test_allocation_proposals_and_segments_count_the_cost(plain, write, kind: CostKind) -> None:
    tables, every = priced(plain, kind, write), np.arange(5)
    low, high = tables.cost_range()
    budgets = np.linspace(low, high, 20)
    found = allocate(tables.err, tables.search_cost, budgets)
    assert (tables.costs(found) <= budgets * (1 + 1e-9)).all()
    assert tables.allowed[every, found].all()
    # Exhaustively: no configuration within the budget has less error.
    grid = np.array(np.meshgrid(*[np.flatnonzero(row) for row in tables.allowed])).reshape(5, -1).T
    errors, costs = tables.err[every, grid].sum(1), tables.costs(grid)
    for configuration, budget in zip(found, budgets, strict=True):
        best = errors[costs <= budget * (1 + 1e-9)].min()
        assert tables.err[every, configuration].sum() <= best * (1 + 1e-3)
    members = ConfigurationSet(grid[::9], errors[::9], np.zeros(len(grid[::9]), dtype=np.int64)).sorted(tables)
    Y = members.objectives(tables)
    np.testing.assert_array_equal(Y[:, 1], tables.costs(members.configurations))
    proposal = propose(
        Surrogate.fit(tables.err, members.configurations, members.losses, seed=0), members.configurations, Y,
        tables.search_cost, tables.space.neighbours(1, tables.allowed), (2 * errors.max(), 1.01 * high),
        n_candidates=2, n_restarts=4, max_steps=10, seed=0,
    )  # fmt: skip
    np.testing.assert_allclose(proposal.cost, tables.costs(proposal.configurations), rtol=1e-12)
    assert tables.allowed[every, proposal.configurations].all()
    assert segment_filter(Y, 4, (low, high)).any()


def test_a_faster_choice_of_more_bits_is_taken_where_time_is_the_cost(plain, write) -> None:
    tables = priced(plain, "latency", write)
    (found,) = allocate(tables.err, tables.search_cost, tables.cost_range()[0])
    assert [tables.space.describe(int(k)) for k in found] == ["int4 g64 sym"] * 4 + ["bf16"]


@pytest.mark.parametrize("kind", ["bytes", "latency"])
def test_a_bundle_answers_budgets_in_its_cost(tiny_llama, tables_for, make_adapted, kind: CostKind) -> None:
    adapted: AdaptedModel = make_adapted(tiny_llama())
    tables = tables_for(tiny_llama())
    latency = tables.nbytes.max() - tables.nbytes + 1.0 if kind == "latency" else None  # fewer bits are slower
    tables = replace(tables, cost_kind=kind, latency=latency)
    C = np.repeat(np.arange(8)[:, None], len(tables.layers), axis=1)
    members = ConfigurationSet(C, np.linspace(3, 2, 8), np.zeros(8, dtype=np.int64)).sorted(tables)
    bundle = Bundle(tables, members, adapted.state_dict(), adapted.recipe, "language-modeling")
    low, high = tables.cost_range()
    for budget in np.linspace(low, high, 5):
        chosen = bundle.select(float(budget))
        assert tables.costs(chosen) <= budget * (1 + 1e-9)
    unit = {"bytes": r"MB is below .* megabytes", "latency": r"µs is below .* microseconds"}[kind]
    with pytest.raises(CoaloraError, match=unit):
        bundle.select(low * 0.9)


def test_rows_may_name_fields_layers_and_blanks(plain, write) -> None:
    by_choice = read_latency(write(*ROWS), LAYERS, plain.space, plain.allowed)
    rows = [
        "model.layers.0.self_attn.q_proj,int,2,10", "model.layers.1.*.q_proj,int,2,10", "mlp.up_proj,,2,10",
        "*_proj,int,4,5", "*_proj,,8,20", "lm_head,float,,7.5", "embed_tokens,int,4,1", "*_proj,nf,4,1",
    ]  # fmt: skip
    by_field = read_latency(
        write(*rows, "", header="layer,scheme,bits,microseconds"), *(LAYERS, plain.space), plain.allowed
    )
    np.testing.assert_array_equal(by_field, by_choice)
    assert by_choice[~plain.allowed].max() == 0


@pytest.mark.parametrize(
    ("rows", "fragments"),
    [
        (ROWS[:3], ["no row for lm_head under bf16 (1 pairs in all)", "leave such choices out"]),
        (ROWS[1:], ["self_attn.q_proj under int2 g64 sym", "mlp.up_proj under int2 g64 sym", "(4 pairs in all)"]),
        ([*ROWS, "mlp.up_proj,int4 g64 sym,3"], ["lines 3 and 6", "up_proj under int4 g64 sym", "narrower"]),
        ([*ROWS[:3], "lm_head,bf16,-1"], ["'-1'", "line 5", "from 0 on"]),
        ([*ROWS[:3], "lm_head,bf16,fast"], ["'fast'", "line 5", "finite number"]),
        ([*ROWS[:3], "lm_head,bf16,"], ["''", "line 5"]),
        ([*ROWS[:3], "lm_head,bf16,nan"], ["'nan'", "line 5"]),
        ([*ROWS[:3], "lm_head,bf16,inf"], ["'inf'", "line 5"]),
        ([*ROWS[:3], "lm_head,bf16"], ["line 5", "2 cells for 3 columns (layer, choice, microseconds)"]),
        ([*ROWS[:3], 'lm_head,"bf16,7'], ["no CSV in UTF-8"]),
    ],
)
def test_bad_rows_are_refused_with_their_lines(plain, write, rows: list[str], fragments: list[str]) -> None:
    with pytest.raises(CoaloraError) as caught:
        read_latency(write(*rows), LAYERS, plain.space, plain.allowed)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "header",
    ["layer,microseconds", "choice,microseconds", "layer,choice", "layer,choice,bits,microseconds",
     "layer,block_size,microseconds", ""],
)  # fmt: skip
def test_tables_with_other_columns_are_refused(plain, write, header: str) -> None:
    with pytest.raises(CoaloraError, match=r"has the columns .*Write layer,choice,microseconds"):
        read_latency(write(header=header), LAYERS, plain.space, plain.allowed)


def test_a_table_that_is_not_there_is_named(plain, tmp_path: Path) -> None:
    with pytest.raises(CoaloraError, match=r"none\.csv does not exist\. Correct cost\.table"):
        read_latency(tmp_path / "none.csv", LAYERS, plain.space, plain.allowed)


def test_budgets_are_named_by_their_unit() -> None:
    assert [budget_name(2.5, kind) for kind in KINDS] == ["2.5-bits", "2.5-mb", "2.5-mb", "2.5-us"]


@pytest.mark.parametrize(
    ("budget", "kind", "value"),
    [
        (2.5, "average_bits", 2.5), ("2.5", "average_bits", 2.5), ("2.5 bits", "average_bits", 2.5),
        ("120MB", "file_bytes", 120), ("1.2 gb", "file_bytes", 1200), ("900KiB", "bytes", 0.9216), ("7", "bytes", 7),
        ("310", "latency", 310), ("3ms", "latency", 3000), ("80 µs", "latency", 80),
    ],
)  # fmt: skip
def test_a_budget_may_name_its_unit(budget: float | str, kind: CostKind, value: float) -> None:
    assert parse_budget(budget, kind) == pytest.approx(value)


@pytest.mark.parametrize(
    ("budget", "kind", "words"),
    [
        ("120MB", "average_bits", r"'120MB' is none of average bits.*cost\.kind: bytes, file_bytes"),
        ("2.5 bits", "file_bytes", r"none of megabytes of base and adapter.*average_bits"),
        ("3ms", "bytes", r"none of megabytes.*latency"),
        ("12 parsecs", "bytes", r"no number above 0.*as 120 or 120MB"), ("two", "average_bits", "as 2.5"),
        ("0", "average_bits", "above 0"), ("-3MB", "bytes", "above 0"), ("", "bytes", "above 0"),
        ("nan", "latency", "above 0"), ("1e999", "bytes", "above 0"),
    ],
)  # fmt: skip
def test_a_budget_in_another_unit_or_none_is_refused(budget: str, kind: CostKind, words: str) -> None:
    with pytest.raises(CoaloraError, match=words):
        parse_budget(budget, kind)


@pytest.mark.parametrize("text", ["120", "MB", "2 bits", "-1MB", "0.1B", "1 MB 2", "1_000kB"])
def test_a_size_has_a_unit_of_bytes(text: str) -> None:
    assert parse_bytes("120MB") == 120_000_000
    with pytest.raises(CoaloraError, match="no size in bytes"):
        parse_bytes(text)
