"""Search strategies: what each proposes from the same state."""

from __future__ import annotations

import numpy as np
import pytest

from coalora.quant.space import ChoiceSpace
from coalora.search.strategies import STRATEGIES, SearchState
from coalora.search.surrogate import Surrogate

SPACE = ChoiceSpace("nf", bits=[2, 3, 4], scale_bits=[8], scale_dtype=["bf16"], block_size=[64], scale_block_size=[64])
N, K = 5, len(SPACE)


@pytest.mark.parametrize(("strategy", "count"), [("ehvi", 3), ("random", 3), ("frozen", 0)])
def test_a_strategy_proposes_as_many_new_configurations_as_asked_and_frozen_none(strategy: str, count: int) -> None:
    err = np.random.default_rng(0).uniform(0.5, 1.5, (N, 1)) * 4.0**-SPACE.nominal_bits
    cost = np.broadcast_to(SPACE.nominal_bits / N, (N, K))
    C = np.array([[0] * N, [1] * N, [2] * N, [0, 1, 2, 1, 0]])
    rows = np.arange(N)
    losses = 1.0 + err[rows, C].sum(axis=1)
    state = SearchState(
        C,
        np.column_stack([losses, cost[rows, C].sum(axis=1)]),
        Surrogate.fit(err, C, losses, seed=0),
        cost,
        SPACE.neighbours(),
        np.ones((N, K), dtype=np.bool_),
        np.array([losses.max() * 1.1, 5.0]),
        n_candidates=3,
        n_restarts=4,
        max_steps=20,
        seed=1,
    )
    found, scored = STRATEGIES[strategy]().propose(state)
    assert found.shape == (count, N)
    assert len({tuple(row) for row in np.concatenate([C, found])}) == len(C) + count
    assert (scored > 0) == (strategy == "ehvi")


def test_only_the_frozen_set_keeps_dominated_members() -> None:
    assert [name for name, strategy in STRATEGIES.items() if strategy.keeps_all] == ["frozen"]
