"""Gaussian process: exact identities, recovery of what the prior says, and neighbours at once."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import check_grad

from coalora.errors import CoaloraError
from coalora.search.surrogate import Hyperparameters, Surrogate, negative_log_likelihood

N, K = 20, 12


def _data(n: int, seed: int = 0, bend: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    table = rng.random((N, K)) * np.exp(rng.normal(size=(N, 1)))
    C = rng.integers(0, K, (n, N))
    total = table[np.arange(N), C].sum(axis=1)
    return table, C, 2.0 + 0.01 * total + bend * np.sin(total)


def test_linear_losses_are_recovered_at_unseen_configurations() -> None:
    table, C, loss = _data(90)
    surrogate = Surrogate.fit(table, C[:60], loss[:60], seed=0)
    mean, sigma = surrogate.predict(C[60:])
    assert np.abs(mean - loss[60:]).max() < 0.02 * loss.std()
    assert (sigma < 0.2 * loss.std()).all()


def test_noise_free_process_interpolates_its_data() -> None:
    table, C, loss = _data(40, bend=0.02)
    mean, sigma = Surrogate.fit(table, C, loss, noise=0.0, seed=0).predict(C)
    np.testing.assert_allclose(mean, loss, atol=1e-3 * loss.std())
    assert (sigma < 0.01 * loss.std()).all()


def test_intervals_cover_held_out_losses() -> None:
    table, C, loss = _data(160, bend=0.01)
    noisy = loss + np.random.default_rng(1).normal(0, 0.002, loss.size)
    surrogate = Surrogate.fit(table, C[:80], noisy[:80], seed=0)
    mean, sigma = surrogate.predict(C[80:])
    z = np.abs(noisy[80:] - mean) / np.sqrt(sigma**2 + surrogate.hyper.noise * surrogate.loss_scale**2)
    assert 0.85 <= (z < 2).mean() <= 1.0
    assert (z < 1).mean() < 0.95


def test_moves_at_once_equal_neighbours_written_out() -> None:
    table, C, loss = _data(50, bend=0.05)
    surrogate = Surrogate.fit(table, C, loss, seed=0)
    layers, choices = np.repeat(np.arange(N), K), np.tile(np.arange(K), N)
    for start in (C[0], C[1]):
        neighbours = np.tile(start, (layers.size, 1))
        neighbours[np.arange(layers.size), layers] = choices
        for got, expected in zip(
            surrogate.predict_moves(start, layers, choices), surrogate.predict(neighbours), strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


def test_gradient_of_the_likelihood_equals_finite_differences() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(15, N)), rng.normal(size=15)
    inner = X @ X.T / N
    distance = np.maximum(np.diag(inner)[:, None] + np.diag(inner) - 2 * inner, 0)
    point = np.log(Hyperparameters(0.7, 0.4, 1.3, 0.05))

    def value(v: np.ndarray) -> float:
        return negative_log_likelihood(v, inner, distance, y)[0]

    def gradient(v: np.ndarray) -> np.ndarray:
        return negative_log_likelihood(v, inner, distance, y)[1]

    assert check_grad(value, gradient, point) < 1e-4


def test_conditioning_equals_a_process_of_all_points_and_keeps_hyperparameters() -> None:
    table, C, loss = _data(40, bend=0.05)
    surrogate = Surrogate.fit(table, C[:30], loss[:30], seed=0)
    more = surrogate.condition_on(C[30:35], loss[30:35])
    assert more.hyper == surrogate.hyper
    assert more.y.shape == (35,)
    # Believing its own mean changes no mean, and only lowers the uncertainty.
    believed = surrogate.condition_on(C[35:36], surrogate.predict(C[35:36])[0])
    np.testing.assert_allclose(believed.predict(C)[0], surrogate.predict(C)[0], atol=1e-8)
    assert (believed.predict(C)[1] <= surrogate.predict(C)[1] + 1e-12).all()
    assert believed.predict(C[35:36])[1] < surrogate.predict(C[35:36])[1]


def test_same_seed_gives_the_same_process_and_units_only_scale_it() -> None:
    table, C, loss = _data(30, bend=0.05)
    one, two = (Surrogate.fit(table, C, loss, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one.predict(C)[0], two.predict(C)[0])
    scaled = Surrogate.fit(1e6 * table, C, 1e3 * loss - 7, seed=3)
    np.testing.assert_allclose(scaled.predict(C)[0], 1e3 * one.predict(C)[0] - 7, rtol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_equal_or_constant_observations_give_finite_predictions(n: int) -> None:
    table, C, _ = _data(5)
    surrogate = Surrogate.fit(table, np.repeat(C[:1], n, axis=0), np.full(n, 1.5), noise=0.0, seed=0)
    mean, sigma = surrogate.predict(C)
    assert np.isfinite(mean).all()
    assert np.isfinite(sigma).all()
    assert mean[0] == pytest.approx(1.5)


@pytest.mark.parametrize(
    "change",
    [
        {"losses": [1.0, np.nan]},
        {"losses": [1.0]},
        {"configurations": [[0] * N, [K] * N]},
        {"configurations": np.empty((0, N), dtype=int), "losses": []},
        {"noise": -1.0},
        {"feature_table": np.full((N, K), np.inf)},
    ],
)
def test_bad_input_is_refused(change: dict[str, object]) -> None:
    table, C, _ = _data(2)
    arguments: dict[str, object] = {
        "feature_table": table,
        "configurations": C,
        "losses": [1.0, 2.0],
        "seed": 0,
    }
    with pytest.raises(CoaloraError):
        Surrogate.fit(**(arguments | change))  # type: ignore[arg-type]


def test_moves_out_of_range_are_refused() -> None:
    table, C, loss = _data(4)
    surrogate = Surrogate.fit(table, C, loss, seed=0)
    with pytest.raises(CoaloraError):
        surrogate.predict_moves(C[0], [N], [0])
    with pytest.raises(CoaloraError):
        surrogate.predict_moves(C[0], [0], [-1])
