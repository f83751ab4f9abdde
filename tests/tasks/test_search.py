"""What the search strategies propose."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from coalora.calibrate.tables import CalibrationTables, calibration_tables
from coalora.configurations import ConfigurationSet
from coalora.models.targets import TargetLayer
from coalora.quant.space import ChoiceSpace
from coalora.search.surrogate import Surrogate
from pipeline.settings.sections import SearchSettings
from tasks.search import _candidates

SPACE = ChoiceSpace("nf", bits=[2, 3, 4], scale_bits=[8], scale_dtype=["bf16"], block_size=[64], scale_block_size=[64])
N, K = 5, len(SPACE)


def _problem() -> tuple[ConfigurationSet, CalibrationTables]:
    layers = [TargetLayer(f"layers.{i}.q_proj", "q_proj", i, (64, 64), False) for i in range(N)]
    err = np.random.default_rng(0).uniform(0.5, 1.5, (N, 1)) * 4.0**-SPACE.nominal_bits
    tables = calibration_tables(layers, SPACE, err, "digest")
    C = np.array([[0] * N, [1] * N, [2] * N, [0, 1, 2, 1, 0]])
    losses = 1.0 + err[np.arange(N), C].sum(axis=1)
    return ConfigurationSet(C, losses, np.zeros(len(C), dtype=np.int64)), tables


@pytest.mark.parametrize(("strategy", "count"), [("ehvi", 3), ("random", 3), ("frozen", 0)])
def test_a_strategy_proposes_as_many_new_configurations_as_asked_and_frozen_none(strategy: str, count: int) -> None:
    members, tables = _problem()
    surrogate = Surrogate.fit(tables.err, members.configurations, members.losses, seed=0)
    settings = SearchSettings.model_validate({"strategy": strategy, "candidates": 3})
    Y = members.objectives(tables)
    reference = np.array([Y[:, 0].max() * 1.1, tables.bits_range()[1] * 1.01])
    found, scored = _candidates(settings, surrogate, members, Y, tables, reference, 0, 1)
    assert found.shape == (count, N)
    assert len({tuple(row) for row in np.concatenate([members.configurations, found])}) == len(members) + count
    assert (scored > 0) == (strategy == "ehvi")


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValidationError):
        SearchSettings.model_validate({"strategy": "paper"})
