"""Steps draw configurations and examples as pure functions of (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from coalora.errors import CoaloraError
from coalora.train.sampling import batch_indices, sample_member

# Not in rising order: ranks go by bits, not by position.
BITS = np.array([4.0, 2.25, 7.0, 3.0, 5.5])


def draw(n: int, **options) -> np.ndarray:
    settings = {"sampling": "low-bits", "power": 2.5, "seed": 0, **options}
    return np.array([sample_member(BITS, step=step, **settings) for step in range(n)])


def test_uniform_draws_all_members_alike() -> None:
    counts = np.bincount(draw(4000, sampling="uniform"), minlength=5)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("power", [1.0, 2.5, 6.0])
def test_low_bits_draws_rank_u_to_the_power(power: float) -> None:
    """P(rank < j) = (j / n)^(1 / power)."""
    counts = np.bincount(draw(4000, power=power), minlength=5)[np.argsort(BITS)]
    expected = 4000 * np.diff((np.arange(6) / 5) ** (1 / power))
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    if power > 1:
        assert counts[0] == counts.max()
        assert stats.chisquare(counts).pvalue < 1e-6


def test_draws_depend_on_seed_and_step_alone() -> None:
    assert np.array_equal(draw(50), draw(50))
    assert not np.array_equal(draw(50), draw(50, seed=1))
    np.random.default_rng(0).random(1000)
    torch.manual_seed(123)
    assert np.array_equal(
        draw(50)[30:], [sample_member(BITS, sampling="low-bits", power=2.5, seed=0, step=s) for s in range(30, 50)]
    )


def test_members_of_equal_bits_are_all_drawn() -> None:
    drawn = {sample_member(np.full(3, 2.0), sampling="low-bits", power=2.5, seed=0, step=s) for s in range(100)}
    assert drawn == {0, 1, 2}


def test_a_single_member_is_always_drawn() -> None:
    assert {sample_member(np.ones(1), sampling="low-bits", power=9, seed=0, step=s) for s in range(20)} == {0}


def test_power_below_one_is_refused() -> None:
    with pytest.raises(CoaloraError, match=r"at least 1; got: 0\.5"):
        sample_member(BITS, sampling="low-bits", power=0.5, seed=0, step=0)


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (7, 7), (5, 12), (3, 1), (8, 2)])
def test_every_epoch_shows_each_example_exactly_once(n: int, batch_size: int) -> None:
    batches = [batch_indices(n, batch_size, seed=0, step=step) for step in range(3 * n)]
    assert {len(batch) for batch in batches} == {batch_size}
    epochs = torch.cat(batches).view(-1, n)
    assert (epochs.sort(dim=1).values == torch.arange(n)).all()


def test_epochs_and_seeds_have_their_own_order() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return batch_indices(50, 50, seed=seed, step=number).tolist()

    orders = [epoch(seed, number) for seed in (0, 1) for number in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert epoch(0, 1) == orders[1]


def test_drawing_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(7)
    state, numpy_state = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002 (what must not change)
    batch_indices(10, 4, seed=0, step=0)
    draw(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert str(np.random.get_state()) == numpy_state  # noqa: NPY002
