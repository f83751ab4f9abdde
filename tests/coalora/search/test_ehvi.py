"""Closed form against BoTorch, Monte Carlo and arbitrary precision limits."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from coalora.errors import CoaloraError
from coalora.search.ehvi import log_ehvi, log_h
from coalora.search.pareto import hypervolume
from tests.coalora.oracles import Oracle, expected_improvement

REF = np.array([1.0, 8.0])


def _ehvi(*given: object) -> np.ndarray:
    return np.exp(log_ehvi(*given))  # type: ignore[arg-type]


def _problem(seed: int, n: int = 25) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    front = np.stack([rng.uniform(0.2, 1.2, n), rng.uniform(2, 9, n)], axis=1)
    return rng.uniform(0, 1.3, 12), rng.uniform(0.02, 0.4, 12), rng.uniform(2, 7.9, 12), front


@pytest.mark.oracles
@pytest.mark.parametrize("seed", range(3))
def test_ehvi_equals_botorch_when_the_variance_of_the_cost_vanishes(oracle: Oracle, seed: int) -> None:
    mean, sigma, cost, front = _problem(seed)
    expected = oracle(expected_improvement, mean, sigma, cost, front, REF)
    assert _ehvi(mean, sigma, cost, front, REF) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_ehvi_is_the_mean_of_sampled_hypervolume_gains() -> None:
    mean, sigma, cost, front = _problem(7, n=6)
    rng = np.random.default_rng(0)
    before = hypervolume(front, REF)
    for i in range(3):
        gains = [
            hypervolume(np.concatenate([front, [[loss, cost[i]]]]), REF) - before
            for loss in rng.normal(mean[i], sigma[i], 1500)
        ]
        error = np.std(gains) / np.sqrt(len(gains))
        assert abs(_ehvi(mean, sigma, cost, front, REF)[i] - np.mean(gains)) < 4 * error + 1e-12


@pytest.mark.parametrize("z", [-30.0, -8.0, -1.0, -0.3, 0.0, 2.0, 9.9, 10.1])
def test_log_h_equals_its_integral(z: float) -> None:
    # h(z) = phi(z) * integral_0^inf u exp(-u^2/2 + z u) du: free of cancellation for negative z
    integral, _ = quad(lambda u: u * np.exp(-0.5 * u * u + z * u - 0.5 * max(z, 0) ** 2), 0, 60, points=[max(z, 0.05)])
    expected = np.log(integral) + 0.5 * max(z, 0) ** 2 - 0.5 * z * z - 0.5 * np.log(2 * np.pi)
    assert log_h(np.array([z]))[0] == pytest.approx(expected, rel=1e-8)


def test_log_h_is_smooth_and_finite_far_from_improvement() -> None:
    z = np.array([-1e8, -1e4, -100.001, -99.999, -50.0, -1.0001, -0.9999, 9.999, 10.001, 1e6])
    value = log_h(z)
    assert np.isfinite(value).all()
    assert (np.diff(value) > 0).all()
    # d log h / dz = Phi/h is about -z - 2/z for z << 0
    assert value[3] - value[2] == pytest.approx(0.002 * 100.02, rel=1e-3)


def test_candidate_far_from_improving_still_ranks() -> None:
    value = log_ehvi([50.0, 60.0], [0.1, 0.1], [3.0, 3.0], [[0.1, 2.5]], REF)
    assert np.isfinite(value).all()
    assert value[0] > value[1]
    assert (_ehvi([50.0, 60.0], [0.1, 0.1], [3.0, 3.0], [[0.1, 2.5]], REF) == 0).all()


def test_certain_candidate_gains_exactly_its_rectangle() -> None:
    front = np.array([[0.5, 3.0], [0.3, 6.0]])
    mean, cost = np.array([0.4, 0.45, 0.6, 0.3, 0.2]), np.array([4.0, 2.5, 3.5, 6.0, 2.0])
    expected = [hypervolume([*front, [m, c]], REF) - hypervolume(front, REF) for m, c in zip(mean, cost, strict=True)]
    got = log_ehvi(mean, np.zeros(5), cost, front, REF)
    np.testing.assert_allclose(np.exp(got), expected, atol=1e-14)
    assert got[2] == got[3] == -np.inf


def test_cost_at_or_beyond_the_reference_cannot_gain() -> None:
    assert log_ehvi([0.0] * 3, [0.1] * 3, [8.0, 9.0, 7.0], np.empty((0, 2)), REF)[:2].tolist() == [-np.inf] * 2


def test_empty_front_gains_the_whole_expected_strip() -> None:
    got = _ehvi([0.0], [0.5], [3.0], np.empty((0, 2)), REF)[0]
    z = (1.0 - 0.0) / 0.5
    assert got == pytest.approx(5.0 * 0.5 * np.exp(log_h(np.array([z]))[0]), rel=1e-12)


def test_dominated_and_outside_points_do_not_change_the_value() -> None:
    mean, sigma, cost, front = _problem(3)
    extra = np.concatenate([front, front + 0.01, [[0.0, 8.5], [1.5, 2.0]]])
    np.testing.assert_allclose(
        log_ehvi(mean, sigma, cost, extra, REF), log_ehvi(mean, sigma, cost, front, REF), rtol=1e-12
    )


def test_negative_sigma_and_uneven_candidates_are_refused() -> None:
    with pytest.raises(CoaloraError):
        log_ehvi([0.0], [-1.0], [3.0], [[0.1, 2.5]], REF)
    with pytest.raises(CoaloraError):
        log_ehvi([0.0, 1.0], [1.0], [3.0], [[0.1, 2.5]], REF)
