"""Problems of the search benchmark: one with a formula, and the loss of a real adapted and quantized decoder.

`synthetic`: N = 6 layers, K = 4. What the search is told is each layer's relative error e[l, k]; the loss weighs them
by sensitivities s_l that it is not told, and couples neighbours:

    loss(C) = 1 + sum_l a_l + 2 sum_l a_l a_{l+1} + 0.3 sum_l sqrt(a_l a_{l+2}),   a_l = s_l e[l, C_l],
    s_l = 2 exp(0.7 n_l), n_l standard normal, drawn anew for each seed.

`kinds` and `layers`: the decoder of `benchmarks.recovery pydoc` with an adapter trained for 200 steps, measured on the
search split. In `kinds` the layers of a kind take one choice together (query and key are one kind), so that all 4^6
configurations are measured and the true front is known; `layers` is the whole space, 4^28.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from benchmarks._settings import CACHE, SIZES, Setting, prepare
from coalora.adapt.adapted import AdaptedModel
from coalora.evaluate.losses import LossMeter
from coalora.files import read_json, write_json
from coalora.recipes import AdapterRecipe, TrainingRecipe
from coalora.search.knapsack import allocate
from coalora.search.pareto import hypervolume
from coalora.train.loop import train

BITS = np.array([2.0, 3.0, 4.0, 8.0])
NEIGHBOURS = np.array([[1, -1], [0, 2], [1, 3], [2, -1]])
TRAINED_STEPS = 200
_N = 6


@dataclass(frozen=True)
class Problem:
    """err, cost (N, K); losses (n, N) -> (n,); ref_point (loss, cost); best: the true hypervolume, None if unknown."""

    err: np.ndarray
    cost: np.ndarray
    losses: Callable[[np.ndarray], np.ndarray]
    ref_point: np.ndarray
    best: float | None

    def evaluate(self, C: np.ndarray) -> np.ndarray:
        """Loss and cost (n, 2) of configurations (n, N)."""
        return np.stack([self.losses(C), self.cost[np.arange(len(self.cost)), C].sum(axis=1)], axis=1)

    def start(self, size: int) -> np.ndarray:
        """At most `size` allocations at evenly spread budgets."""
        low, high = self.cost.min(axis=1).sum(), self.cost.max(axis=1).sum()
        return np.unique(allocate(self.err, self.cost, np.linspace(low, high, size)), axis=0)


def everything(n_layers: int) -> np.ndarray:
    """All configurations (K^N, N)."""
    return np.array(list(itertools.product(range(len(BITS)), repeat=n_layers)))


def known(err: np.ndarray, cost: np.ndarray, loss: np.ndarray) -> Problem:
    """The problem whose losses (K^N,), in the order of `everything`, are all there."""
    table = loss.reshape((len(BITS),) * len(err))
    ref_point = np.array([loss.max() * 1.01, cost.max(axis=1).sum() * 1.01])
    problem = Problem(err, cost, lambda C: table[tuple(C.T)], ref_point, None)
    return Problem(err, cost, problem.losses, ref_point, hypervolume(problem.evaluate(everything(len(err))), ref_point))


def synthetic(seed: int) -> Problem:
    """The problem of the formula."""
    rng = np.random.default_rng(seed)
    err = 4.0 ** (2.0 - BITS) * 0.3 * np.exp(0.2 * rng.normal(size=(_N, 1)))
    size = np.array([1.0, 1.0, 1.0, 1.0, 4.0, 4.0])[:, None]
    cost = size * BITS / size.sum()
    a = (2.0 * np.exp(0.7 * rng.normal(size=(_N, 1))) * err)[np.arange(_N), everything(_N)]
    loss = 1.0 + a.sum(1) + 2.0 * (a[:, :-1] * a[:, 1:]).sum(1) + 0.3 * np.sqrt(a[:, :-2] * a[:, 2:]).sum(1)
    return known(err, cost, loss)


@cache
def kinds() -> Problem:
    """The decoder's choices by kind of layer; all losses are measured once and kept."""
    setting, groups, file = _decoder(), _groups(_decoder()), CACHE / f"search-kinds-{_decoder().identity[:12]}.json"
    err = np.stack([setting.tables.err[group].sum(axis=0) for group in groups])
    cost = np.stack([setting.tables.bits[group].sum(axis=0) for group in groups])
    if not file.is_file():
        configurations = everything(len(groups))
        print(f"measuring all {len(configurations)} configurations", flush=True)
        write_json(file, _model_losses()(spread(configurations, groups)).tolist())
    return known(err, cost, np.array(read_json(file)))


@cache
def layers() -> Problem:
    """The decoder's whole space."""
    setting, losses = _decoder(), _model_losses()
    seen: dict[tuple[int, ...], float] = {}

    def remembered(C: np.ndarray) -> np.ndarray:
        new = [c for c in dict.fromkeys(map(tuple, C.tolist())) if c not in seen]
        if new:
            seen.update(zip(new, losses(np.array(new)).tolist(), strict=True))
        return np.array([seen[tuple(c)] for c in C.tolist()])

    cost = setting.tables.bits
    worst = remembered(np.zeros((1, len(cost)), dtype=np.int64))[0]
    ref_point = np.array([worst * 1.01, cost.max(axis=1).sum() * 1.01])
    return Problem(setting.tables.err, cost, remembered, ref_point, None)


def spread(configurations: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    """Configurations of groups as configurations of all layers."""
    out = np.empty((len(configurations), sum(map(len, groups))), dtype=np.int64)
    for column, group in zip(configurations.T, groups, strict=True):
        out[:, group] = column[:, None]
    return out


def _groups(setting: Setting) -> list[np.ndarray]:
    kind = ["q_proj" if layer.kind.endswith("k_proj") else layer.kind.split(".")[-1] for layer in setting.tables.layers]
    return [np.flatnonzero(np.array(kind) == name) for name in dict.fromkeys(kind)]


@cache
def _decoder() -> Setting:
    return prepare("pydoc", {}, None, replace(SIZES["decoder"], batch_size=8, search=32))


@cache
def _model_losses() -> Callable[[np.ndarray], np.ndarray]:
    setting = _decoder()
    tables = setting.tables
    recipe = AdapterRecipe(theta="all", compensation_rank=0, expert_bits=3, expert_start="compensation")
    adapted = AdaptedModel(
        setting.load(), tables.layers, tables.space, setting.benchmark.task,
        method="coa", recipe=recipe, seed=0, statistics=setting.statistics,
    )  # fmt: skip
    low, high = tables.bits_range()
    members = np.unique(allocate(tables.err, tables.bits, np.maximum(np.linspace(low, high, 24), low)), axis=0)
    print(f"training an adapter for {TRAINED_STEPS} steps", flush=True)
    training = TrainingRecipe(batch_size=setting.size.batch_size, lr=setting.size.lr)
    train(
        adapted, setting.benchmark.train, members, tables.average_bits(members), training,
        steps=TRAINED_STEPS, total_steps=TRAINED_STEPS, seed=0,
    )  # fmt: skip
    meter = LossMeter(adapted, setting.benchmark.search, 32)
    return lambda C: meter(C, "losses")
