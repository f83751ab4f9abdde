"""Steps draw configurations and examples as pure functions of (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from coalora.errors import CoaloraError
from coalora.train.sampling import LossEstimates, Sampler, batch_indices

# Not in rising order: ranks go by bits, not by position.
BITS = np.array([4.0, 2.25, 7.0, 3.0, 5.5])


def draw(n: int, **options) -> np.ndarray:
    settings = {"sampling": "low-bits", "power": 2.5, "seed": 0, **options}
    sampler = Sampler(BITS, **settings)
    return np.array([sampler.draw(step) for step in range(n)])


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


def test_low_bits_come_first_and_uniform_draws_last() -> None:
    sampler = Sampler(BITS, sampling="low-bits-first", power=6.0, seed=0, total_steps=8000)
    ranks = np.argsort(np.argsort(BITS))[[sampler.draw(step) for step in range(8000)]]
    first, last = np.bincount(ranks[:400], minlength=5), np.bincount(ranks[-400:], minlength=5)
    assert first[0] > 250
    assert stats.chisquare(last).pvalue > 1e-3


def test_a_counterpart_lies_at_the_other_end_and_is_drawn_alike() -> None:
    sampler = Sampler(BITS, sampling="low-bits", power=2.5, seed=0)
    ranks = np.argsort(np.argsort(BITS))
    one, other = (ranks[[sampler.draw(s, opposite=side) for s in range(4000)]] for side in (False, True))
    assert np.corrcoef(one, other)[0, 1] < -0.5
    expected = 4000 * np.diff((np.arange(6) / 5) ** (1 / 2.5))
    assert stats.chisquare(np.bincount(other, minlength=5), expected).pvalue > 1e-3


def test_draws_depend_on_seed_and_step_alone() -> None:
    assert np.array_equal(draw(50), draw(50))
    assert not np.array_equal(draw(50), draw(50, seed=1))
    np.random.default_rng(0).random(1000)
    torch.manual_seed(123)
    late = Sampler(BITS, sampling="low-bits", power=2.5, seed=0)
    assert np.array_equal(draw(50)[30:], [late.draw(step) for step in range(30, 50)])


def test_members_of_equal_bits_are_all_drawn() -> None:
    sampler = Sampler(np.full(3, 2.0), sampling="low-bits", power=2.5, seed=0)
    drawn = {sampler.draw(step) for step in range(100)}
    assert drawn == {0, 1, 2}


def test_a_single_member_is_always_drawn() -> None:
    sampler = Sampler(np.ones(1), sampling="low-bits", power=9, seed=0)
    assert {sampler.draw(step) for step in range(20)} == {0}


def test_power_below_one_is_refused() -> None:
    with pytest.raises(CoaloraError, match=r"power of 0\.5 is below 1"):
        Sampler(BITS, sampling="low-bits", power=0.5, seed=0)


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


def test_sandwich_draws_smallest_largest_and_a_random_member_in_turn() -> None:
    drawn = BITS[draw(300, sampling="sandwich")]
    assert set(drawn[0::3]) == {BITS.min()}
    assert set(drawn[1::3]) == {BITS.max()}
    assert set(drawn[2::3]) == set(BITS)
    sampler = Sampler(BITS, sampling="sandwich", power=1, seed=0)
    assert BITS[[sampler.draw(step, opposite=True) for step in (0, 1)]].tolist() == [BITS.max(), BITS.min()]


def told(sampler: Sampler, loss_of, n: int) -> np.ndarray:
    """Draw `n` members, telling the sampler the loss of each."""
    drawn = []
    for step in range(n):
        member = sampler.draw(step)
        sampler.observe(member, loss_of(step, member))
        drawn.append(member)
    return np.array(drawn)


def test_adaptive_spends_its_steps_where_the_loss_is_in_excess_whatever_the_bits() -> None:
    bits = np.linspace(2, 8, 30)
    # The excess sits at high bits: a sampler that believes in low bits would miss it.
    drawn = told(Sampler(bits, sampling="adaptive", power=1, seed=0), lambda _, m: 1.0 + 2.0 * (m > 22), 900)
    late = drawn[300:]
    assert (late > 21).mean() > 0.6
    assert (late < 18).mean() > 0.1  # every member is visited now and then


def test_adaptive_is_uniform_until_it_has_seen_the_set_twice() -> None:
    bits = np.linspace(2, 8, 30)
    drawn = told(Sampler(bits, sampling="adaptive", power=3, seed=0), lambda _, m: float(m == 0), 60)
    assert np.array_equal(drawn, told(Sampler(bits, sampling="uniform", power=3, seed=0), lambda _, m: 0.0, 60))


def test_adaptive_follows_losses_that_change() -> None:
    bits = np.linspace(2, 8, 20)
    drawn = told(
        Sampler(bits, sampling="adaptive", power=1, seed=0), lambda s, m: float(m < 5 if s < 600 else m > 14), 1800
    )
    assert (drawn[300:600] < 7).mean() > 0.6
    assert (drawn[1500:] > 12).mean() > 0.6


def test_adaptive_goes_on_from_its_estimates_as_if_undisturbed() -> None:
    def loss(step: int, member: int) -> float:
        return float(np.random.default_rng([step, member]).random() + member / 5)

    whole = told(Sampler(BITS, sampling="adaptive", power=2, seed=3), loss, 60)
    first = Sampler(BITS, sampling="adaptive", power=2, seed=3)
    told(first, loss, 30)
    second = Sampler(BITS, sampling="adaptive", power=2, seed=3, estimates=first.estimates)
    drawn = []
    for step in range(30, 60):
        drawn.append(second.draw(step))
        second.observe(drawn[-1], loss(step, drawn[-1]))
    assert np.array_equal(whole[30:], drawn)


def test_estimates_move_to_the_members_of_a_new_round() -> None:
    old = LossEstimates.empty(np.array([2.0, 4.0, 8.0]))
    for rank, loss in ((0, 3.0), (2, 1.0)):
        old.observe(rank, loss)
    new = old.moved_to(np.array([2.0, 5.0, 8.0, 9.0]))
    assert new.loss.tolist() == [3.0, 2.0, 1.0, 1.0]
    assert np.isnan(old.loss[1])


def test_modes_that_observe_nothing_draw_the_same_whatever_the_losses() -> None:
    for mode in ("uniform", "low-bits", "sandwich"):
        quiet, loud = (Sampler(BITS, sampling=mode, power=2, seed=0) for _ in range(2))
        assert np.array_equal(told(quiet, lambda s, m: 0.0, 40), told(loud, lambda s, m: 9.0 * m, 40))
