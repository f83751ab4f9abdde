"""Hypervolume for evaluations spent: ours against a frozen set, random extension, NSGA-II and qLogEHVI.

    python -m benchmarks.search [synthetic | kinds | layers] [--quick] [--seeds 5]

The problems are those of `benchmarks._search_problems`; of `synthetic` and `kinds` all configurations are known, hence
the true front. Every method starts from the same allocations and gets the same number of evaluations. Where the true
front is not known, hypervolumes are relative to that of all that any method found.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import numpy as np

from benchmarks._report import report
from benchmarks._search_problems import BITS, NEIGHBOURS, Problem, kinds, layers, synthetic
from coalora.search.pareto import hypervolume
from coalora.search.proposals import extend_at_random, propose
from coalora.search.surrogate import Surrogate

INITIAL, BATCH, ROUNDS = 8, 4, 6
K = len(BITS)

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
    return extend_at_random(C, NEIGHBOURS, len(problem.err), n_candidates=BATCH, seed=seed)


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
        partitioning=FastNondominatedPartitioning(reference, scaled),
        sampler=SobolQMCNormalSampler(torch.Size([32]), seed=seed),
    )
    bounds = torch.stack([torch.zeros(C.shape[1]), torch.ones(C.shape[1])]).double()
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
            super().__init__(n_var=start.shape[1], n_obj=2, xl=0, xu=K - 1, vtype=int)

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


def trace(problem: Problem, method: Method | None, seed: int, rounds: int) -> list[np.ndarray]:
    """Loss and cost (n, 2) of all that is evaluated after the initial set and after every round of `BATCH`."""
    C = problem.start(INITIAL)
    if method is None:
        n = len(C)
        Y = problem.evaluate(evolve(problem, C, n + BATCH * rounds, seed))
        return [Y[: n + BATCH * i] for i in range(rounds + 1)]
    out = [problem.evaluate(C)]
    for i in range(rounds):
        C = np.concatenate([C, method(problem, C, out[-1], seed * 1000 + i)])
        out.append(problem.evaluate(C))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("problem", nargs="?", default="synthetic", choices=["synthetic", "kinds", "layers"])
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
    makers: dict[str, Callable[[int], Problem]] = {
        "synthetic": synthetic,
        "kinds": lambda _: kinds(),
        "layers": lambda _: layers(),
    }
    problems = [makers[arguments.problem](seed) for seed in range(seeds)]
    found: dict[str, list[list[np.ndarray]]] = {}
    for name, method in methods.items():
        found[name] = [trace(problem, method, seed, ROUNDS) for seed, problem in enumerate(problems)]
        print(f"{name}: done", flush=True)
    every = np.concatenate([traces[-1] for runs in found.values() for traces in runs])
    rows: list[dict] = []
    for name, runs in found.items():
        volumes = np.array(
            [
                [hypervolume(Y, p.ref_point) / (p.best or hypervolume(every, p.ref_point)) for Y in traces]
                for traces, p in zip(runs, problems, strict=True)
            ]
        )
        if not rows:
            rows.append(_row("frozen set", np.repeat(volumes[:, :1], ROUNDS + 1, axis=1)))
        rows.append(_row(name, volumes))
    n_layers = len(problems[0].err)
    of = "the true front" if problems[0].best else "all that any method found"
    notes = (
        f"{n_layers} layers, {K} choices: {K}^{n_layers} configurations; {seeds} seeds; at most {INITIAL} initial "
        f"evaluations, then {ROUNDS} rounds of {BATCH}.\nHypervolume over that of {of}, in percent: mean (standard "
        "deviation) after so much of the further evaluations."
    )
    report("search" if arguments.problem == "synthetic" else f"search-{arguments.problem}", rows, notes=notes)


def _row(name: str, traces: np.ndarray) -> dict:
    at = {"25 %": 0.25, "50 %": 0.5, "100 %": 1.0}
    picked = {label: 100 * traces[:, round(share * ROUNDS + 1e-9)] for label, share in at.items()}
    cells = {label: f"{values.mean():.2f} ({values.std():.2f})" for label, values in picked.items()}
    return {"method": name, **cells, "missing at the end": f"{100 - picked['100 %'].mean():.3f}"}


if __name__ == "__main__":
    main()
