"""Scoring every neighbour of a configuration: surrogate and exact EHVI at d = 720 coordinates, n = 100 observations.

    python -m benchmarks.neighbours

Work for m moves: a dozen operations, a square root and an exponential for each of the m n kernel elements, and 2 m n^2
for whitening. At m = 1,006 and n = 100 these are 1.2 M element operations and 20 MFLOP: about 1 ms on one core.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from benchmarks._report import report
from coalora.quant.space import ChoiceSpace
from coalora.search.checks import table_sum
from coalora.search.ehvi import log_ehvi
from coalora.search.proposals import enumerate_moves
from coalora.search.surrogate import Surrogate

N, OBSERVED, LIMIT_MS = 144, 100, 1.0


def main() -> None:
    space = ChoiceSpace("nf")
    rng = np.random.default_rng(0)
    err = np.exp(rng.normal(0, 0.7, (N, 1))) * 4.0**-space.nominal_bits
    cost = np.tile(space.nominal_bits / N, (N, 1))
    C = rng.integers(0, len(space), (OBSERVED, N))
    loss = 2.0 + table_sum(err, C)
    surrogate = Surrogate.fit(err, C, loss, seed=0)
    front = np.stack([np.linspace(loss.max(), loss.min(), 40), np.linspace(2.5, 7.0, 40)], axis=1)
    ref_point = [loss.max() * 1.1, 8.7]
    table, here = space.neighbours(1), C[0]

    def at_once() -> np.ndarray:
        layers, choices = enumerate_moves(here, table)
        mean, sigma = surrogate.predict_moves(here, layers, choices)
        total = table_sum(cost, here) + cost[layers, choices] - cost[layers, here[layers]]
        return log_ehvi(mean, sigma, total, front, ref_point)

    def written_out() -> np.ndarray:
        layers, choices = enumerate_moves(here, table)
        neighbours = np.tile(here, (layers.size, 1))
        neighbours[np.arange(layers.size), layers] = choices
        return log_ehvi(*surrogate.predict(neighbours), table_sum(cost, neighbours), front, ref_point)

    assert np.allclose(at_once(), written_out(), atol=1e-4)
    ours, plain = best_ms(at_once), best_ms(written_out)
    rows = [
        {"way": "all moves at once", "CPU ms": ours, "over the limit of 1 ms": ours / LIMIT_MS, "yardstick ms": 5.0},
        {"way": "neighbours written out", "CPU ms": plain, "over the limit of 1 ms": plain / LIMIT_MS},
    ]
    report("neighbours", rows, notes=f"{at_once().size} neighbours, {OBSERVED} observations, front of {len(front)}.")


def best_ms(function: Callable[[], object], repeats: int = 20) -> float:
    """Lowest CPU time (ms) of `repeats` calls: what other programs take of the machine does not count."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


if __name__ == "__main__":
    main()
