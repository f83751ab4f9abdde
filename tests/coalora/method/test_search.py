"""Round of search."""

from __future__ import annotations

import numpy as np

from coalora.calibrate.tables import CalibrationTables, calibration_tables
from coalora.configurations import ConfigurationSet
from coalora.method.search import search_round
from coalora.models.targets import TargetLayer
from coalora.quant.space import ChoiceSpace
from coalora.recipes import SearchRecipe

SPACE = ChoiceSpace("nf", bits=[2, 3, 4], scale_bits=[8], scale_dtype=["bf16"], block_size=[64], scale_block_size=[64])
N, K = 5, len(SPACE)


def _problem() -> tuple[ConfigurationSet, CalibrationTables]:
    layers = [TargetLayer(f"layers.{i}.q_proj", "q_proj", i, (64, 64), False) for i in range(N)]
    err = np.random.default_rng(0).uniform(0.5, 1.5, (N, 1)) * 4.0**-SPACE.nominal_bits
    tables = calibration_tables(layers, SPACE, err, "digest")
    C = np.array([[0] * N, [1] * N, [2] * N, [0, 1, 2, 1, 0]])
    losses = 1.0 + err[np.arange(N), C].sum(axis=1)
    return ConfigurationSet(C, losses, np.zeros(len(C), dtype=np.int64)), tables


def test_a_round_takes_losses_from_any_measure_and_keeps_what_no_member_dominates() -> None:
    members, tables = _problem()
    asked: list[tuple[str, int]] = []

    def measure(configurations: np.ndarray, what: str) -> np.ndarray:
        asked.append((what, len(configurations)))
        return 2.0 + tables.err[np.arange(N), configurations].sum(axis=1)

    recipe = SearchRecipe(strategy="ehvi", candidates=3)
    kept, record = search_round(measure, members, tables, recipe, round_index=1, seed=0)
    assert asked == [("set", 4), ("candidates", 3)]
    assert (kept.losses > 2.0).all()  # the members' old losses, of another adapter, are gone
    assert record["ref_point"][0] > kept.losses.max()
    assert record["hypervolume_after"] > record["hypervolume_before"] > 0
    assert record["n_accepted"] == (kept.joined == 1).sum() > 0
    # The next round is measured against the first one's reference point, whatever its losses are.
    _, later = search_round(
        lambda C, what: measure(C, what) - 1, kept, tables, recipe, round_index=2, seed=0, ref_point=record["ref_point"]
    )
    assert later["ref_point"] == record["ref_point"]
    assert later["hypervolume_before"] > record["hypervolume_after"]


def test_a_frozen_round_measures_the_set_and_changes_nothing_else() -> None:
    members, tables = _problem()
    recipe = SearchRecipe(strategy="frozen", candidates=3)
    kept, record = search_round(lambda C, what: members.losses + 1, members, tables, recipe, round_index=1, seed=0)
    assert {tuple(c) for c in kept.configurations} == {tuple(c) for c in members.configurations}
    assert (kept.joined == 0).all()
    assert record["n_candidates"] == 0
    assert record["surrogate_error"] is None
