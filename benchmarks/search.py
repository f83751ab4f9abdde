"""Hypervolume for evaluations spent: ours against a frozen set, random extension, NSGA-II and qLogEHVI.

    python -m benchmarks.search [--quick] [--seeds 5]

The problem is small enough for every configuration to be evaluated (K^N = 4,096), so that the true front is known.
Every method starts from the same allocations and gets the same number of evaluations. What the search is told is each
layer's relative error e[l, k]; the loss weighs them by sensitivities s_l that it is not told, and couples neighbours:

    loss(C) = 1 + sum_l a_l + 2 sum_l a_l a_{l+1} + 0.3 sum_l sqrt(a_l a_{l+2}),   a_l = s_l e[l, C_l],
    s_l = 2 exp(0.7 n_l), n_l standard normal, drawn anew for each seed.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks._report import report
from coalora.search.allocation import allocate
from coalora.search.extend import extend_at_random
from coalora.search.hypervolume import hypervolume
from coalora.search.propose import propose
from coalora.search.surrogate import Surrogate

N, K = 6, 4
BITS = np.array([2.0, 3.0, 4.0, 8.0])
NEIGHBOURS = np.array([[1, -1], [0, 2], [1, 3], [2, -1]])
INITIAL, BATCH, ROUNDS = 8, 4, 6


@dataclass(frozen=True)
class Problem:
    """err, cost (N, K); loss (K,) * N, of every configuration; ref_point (loss, cost); best: the true hypervolume."""

    err: np.ndarray
    cost: np.ndarray
    loss: np.ndarray
    ref_point: np.ndarray
    best: float

    def evaluate(self, C: np.ndarray) -> np.ndarray:
        """Loss and cost (n, 2) of configurations (n, N)."""
        return np.stack([self.loss[tuple(C.T)], self.cost[np.arange(N), C].sum(axis=1)], axis=1)


def synthetic(seed: int) -> Problem:
    """The problem of the module's docstring."""
    rng = np.random.default_rng(seed)
    err = 4.0 ** (2.0 - BITS) * 0.3 * np.exp(0.2 * rng.normal(size=(N, 1)))
    size = np.array([1.0, 1.0, 1.0, 1.0, 4.0, 4.0])[:, None]
    cost = size * BITS / size.sum()
    everything = np.array(list(itertools.product(range(K), repeat=N)))
    a = (2.0 * np.exp(0.7 * rng.normal(size=(N, 1))) * err)[np.arange(N), everything]
    loss = 1.0 + a.sum(1) + 2.0 * (a[:, :-1] * a[:, 1:]).sum(1) + 0.3 * np.sqrt(a[:, :-2] * a[:, 2:]).sum(1)
    ref_point = np.array([loss.max() * 1.01, cost.max(axis=1).sum() * 1.01])
    Y = np.stack([loss, cost[np.arange(N), everything].sum(axis=1)], axis=1)
    return Problem(err, cost, loss.reshape((K,) * N), ref_point, hypervolume(Y, ref_point))


Method = Callable[[Problem, np.ndarray, np.ndarray, int], np.ndarray]


def ours(problem: Problem, C: np.ndarray, Y: np.ndarray, seed: int) -> np.ndarray:
    surrogate = Surrogate.fit(problem.err, C, Y[:, 0], seed=seed)
    return propose(
        surrogate,
        C,
        Y,
        problem.cost,
        NEIGHBOURS,
        problem.ref_point,
        n_candidates=BATCH,
        n_restarts=8,
        max_steps=50,
        seed=seed,
    ).configurations


def random(problem: Problem, C: np.ndarray, Y: np.ndarray, seed: int) -> np.ndarray:
    return extend_at_random(C, NEIGHBOURS, N, n_candidates=BATCH, seed=seed)


def qlogehvi(problem: Problem, C: np.ndarray, Y: np.ndarray, seed: int) -> np.ndarray:
    """BoTorch on ordinal coordinates in [0, 1]^N, optimised continuously and rounded; both objectives modelled."""
    import torch
    from botorch.acquisition.multi_objective.logei import qLogExpectedHypervolumeImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.optim import optimize_acqf
    from botorch.sampling import SobolQMCNormalSampler
    from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning
    from gpytorch.mlls import ExactMarginalLogLikelihood

    torch.manual_seed(seed)
    X, values = torch.tensor(C / (K - 1)), torch.tensor(-Y)
    center, spread = values.mean(0), values.std(0)
    scaled = (values - center) / spread
    reference = (-torch.tensor(problem.ref_point) - center) / spread
    model = SingleTaskGP(X, scaled)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    acquisition = qLogExpectedHypervolumeImprovement(
        model,
        ref_point=reference,
        partitioning=FastNondominatedPartitioning(reference, scaled),  # type: ignore[arg-type]
        sampler=SobolQMCNormalSampler(torch.Size([32]), seed=seed),
    )
    bounds = torch.stack([torch.zeros(N), torch.ones(N)]).double()
    found, _ = optimize_acqf(
        acquisition, bounds, q=BATCH, num_restarts=3, raw_samples=32, sequential=True, options={"maxiter": 40}
    )
    return np.rint(found.numpy() * (K - 1)).astype(np.int64)


def evolve(problem: Problem, start: np.ndarray, evaluations: int, seed: int) -> np.ndarray:
    """All configurations (n, N) that NSGA-II evaluates, in order, its first population being `start`."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem as Pymoo
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.optimize import minimize

    asked: list[np.ndarray] = []

    class Counted(Pymoo):
        def __init__(self) -> None:
            super().__init__(n_var=N, n_obj=2, xl=0, xu=K - 1, vtype=int)

        def _evaluate(self, x: np.ndarray, out: dict, *args: object, **kwargs: object) -> None:
            C = np.asarray(x).astype(np.int64)
            asked.append(C)
            out["F"] = problem.evaluate(C)

    repair = RoundingRepair()
    algorithm = NSGA2(
        pop_size=len(start),
        n_offsprings=BATCH,
        sampling=start,
        crossover=SBX(prob=1.0, eta=3.0, vtype=float, repair=repair),
        mutation=PM(prob=1.0, eta=3.0, vtype=float, repair=repair),
        eliminate_duplicates=True,
    )
    minimize(Counted(), algorithm, ("n_eval", evaluations), seed=seed, verbose=False)
    return np.concatenate(asked)[:evaluations]


def trace(problem: Problem, method: Method | None, seed: int, rounds: int) -> list[float]:
    """Hypervolume over the true one after the initial set and after every round of `BATCH` evaluations."""
    low, high = problem.cost.min(axis=1).sum(), problem.cost.max(axis=1).sum()
    start = np.unique(allocate(problem.err, problem.cost, np.linspace(low, high, INITIAL)), axis=0)
    if method is None:
        C = evolve(problem, start, len(start) + BATCH * rounds, seed)
        counts = [len(start) + BATCH * i for i in range(rounds + 1)]
        return [hypervolume(problem.evaluate(C[:n]), problem.ref_point) / problem.best for n in counts]
    C = start
    out = [hypervolume(problem.evaluate(C), problem.ref_point) / problem.best]
    for i in range(rounds):
        found = method(problem, C, problem.evaluate(C), seed * 1000 + i)
        C = np.concatenate([C, found])
        out.append(hypervolume(problem.evaluate(C), problem.ref_point) / problem.best)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two seeds, without BoTorch")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    seeds = 2 if arguments.quick else arguments.seeds
    methods: dict[str, Method | None] = {
        "EHVI neighbours (ours)": ours,
        "random extension": random,
        "NSGA-II (pymoo)": None,
    }
    if not arguments.quick:
        methods["qLogEHVI (BoTorch)"] = qlogehvi
    problems = [synthetic(seed) for seed in range(seeds)]
    rows: list[dict] = []
    for name, method in methods.items():
        traces = np.array([trace(problem, method, seed, ROUNDS) for seed, problem in enumerate(problems)])
        if not rows:
            rows.append(_row("frozen set", np.repeat(traces[:, :1], ROUNDS + 1, axis=1)))
        rows.append(_row(name, traces))
    notes = (
        f"{N} layers, {K} choices: {K**N} configurations; {seeds} seeds; at most {INITIAL} initial evaluations, then "
        f"{ROUNDS} rounds of {BATCH}.\nHypervolume over that of the true front, in percent: mean (standard "
        "deviation) after so much of the further evaluations."
    )
    report("search", rows, notes=notes)


def _row(name: str, traces: np.ndarray) -> dict:
    at = {"25 %": 0.25, "50 %": 0.5, "100 %": 1.0}
    picked = {label: 100 * traces[:, round(share * ROUNDS + 1e-9)] for label, share in at.items()}
    cells = {label: f"{values.mean():.2f} ({values.std():.2f})" for label, values in picked.items()}
    return {"method": name, **cells, "missing at the end": f"{100 - picked['100 %'].mean():.3f}"}


if __name__ == "__main__":
    main()
