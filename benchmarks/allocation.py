"""Allocation for 50 budgets of RoBERTa-large (144 layers x 432 choices), with equal layers and with its own 4:1 shapes.

    python -m benchmarks.allocation [--oracle]

`--oracle` also compares with a dynamic program of wide beam (seconds); the relaxation's lower bound is always there.
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks._report import report
from benchmarks.neighbours import best_ms
from coalora.quant.space import ChoiceSpace
from coalora.search import knapsack
from coalora.search.knapsack import allocate, staircase, walk_hulls

SHAPES = {
    "equal, 1024 x 1024": [(1024, 1024)] * 144,
    "RoBERTa-large, 4:1": ([(1024, 1024)] * 4 + [(4096, 1024), (1024, 4096)]) * 24,
}
YARDSTICK_MS = 50.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--oracle", action="store_true")
    arguments = parser.parse_args()
    space = ChoiceSpace("nf")
    rows = []
    for name, shapes in SHAPES.items():
        rng = np.random.default_rng(0)
        cost = space.packed_nbytes_table(shapes) * 8
        fine = np.exp(0.03 * rng.normal(size=(len(shapes), len(space))))
        err = np.exp(0.7 * rng.normal(size=(len(shapes), 1))) * 4.0**-space.nominal_bits * fine
        weights = sum(out * inner for out, inner in shapes)
        budgets = np.asarray(np.linspace(2.25, 7.25, 50) * weights, dtype=np.float64)
        layers = np.arange(len(shapes))
        ms = best_ms(lambda: allocate(err, cost, budgets), repeats=5)  # noqa: B023 - called at once
        total = err[layers, allocate(err, cost, budgets)].sum(axis=1)
        stairs = staircase(cost.astype(np.float64), err)
        walk = walk_hulls(stairs, budgets)
        row = {"layers": name, "CPU ms, all budgets": ms, "over the yardstick": ms / YARDSTICK_MS}
        row["above the relaxation, worst"] = f"{100 * (total / walk.bound - 1).max():.3f} %"
        if arguments.oracle:
            knapsack._WORK = 2**19
            wide = [
                knapsack.solve_core(stairs, p, b, m, 0.0)
                for p, b, m in zip(walk.position, budgets, walk.price, strict=True)
            ]
            oracle = stairs.err[layers, np.array(wide)].sum(axis=1)
            row["above a wide beam, worst"] = f"{100 * (total / oracle - 1).max():.3f} %"
        rows.append(row)
    report("allocation", rows, notes="50 budgets from 2.25 to 7.25 bits; yardstick: 50 ms together on one core.")


if __name__ == "__main__":
    main()
