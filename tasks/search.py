"""Stage `search`: a round of Pareto search."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coalora.adapt.adapted import AdaptedModel
from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import ConfigurationSet
from coalora.data.benchmark import Split
from coalora.evaluate.losses import score_configurations
from coalora.files import read_json, write_json
from coalora.search.extend import extend_at_random
from coalora.search.hypervolume import hypervolume
from coalora.search.pareto import is_non_dominated
from coalora.search.propose import propose
from coalora.search.segments import segment_filter
from coalora.search.surrogate import Surrogate
from pipeline.inputs.adapted import build_adapted
from pipeline.inputs.loaders import ROUND, SET, BaseModel, load_benchmark, load_set, load_tables
from pipeline.orchestration.progress import Progress
from pipeline.settings.sections import AdapterSettings, RuntimeSettings, SearchSettings
from pipeline.stages.checkpoints import Memo
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, Store


@stage("search", tags=("gpu",))
def search_round(
    *,
    base: Artifact,
    benchmark: Artifact,
    tables: Artifact,
    configurations: Artifact,
    state: Artifact,
    adapter: AdapterSettings,
    search: SearchSettings,
    round_index: int,
    runtime: RuntimeSettings,
    seed: int,
) -> Artifact:
    """The set of the next round: members measured anew, candidates proposed, measured and merged, segments filtered.

    Members are measured each round because theta has trained on since: their old losses no longer compare. The
    reference point is fixed by the first round (its worst loss plus a tenth of the range, and the space's largest
    cost), so that hypervolumes of all rounds compare.
    """
    data, measured = load_benchmark(benchmark), load_tables(tables)
    adapted = build_adapted(
        BaseModel(base), data, tables, method="coa", adapter=adapter, runtime=runtime, seed=seed, state=state
    )
    members = _measure(
        adapted,
        data.search,
        load_set(configurations, measured),
        search.batch_size,
        round_index,
        "set",
    )
    Y = members.objectives(measured)
    ref_point = _reference_point(configurations, Y, measured.cost_range()[1])
    surrogate = Surrogate.fit(measured.err, members.configurations, members.losses, seed=seed)
    proposed, scored = _candidates(search, surrogate, members, Y, measured, ref_point, seed, round_index)
    n = len(proposed)
    candidates = ConfigurationSet(proposed, np.full(n, np.nan), np.full(n, round_index))
    if n:
        predicted, _ = surrogate.predict(proposed)
        candidates = _measure(adapted, data.search, candidates, search.batch_size, round_index, "candidates")
    merged = members.merge(candidates).sorted(measured)
    keep = segment_filter(merged.objectives(measured), search.segments, measured.cost_range())
    kept = merged if search.strategy == "frozen" else merged.take(np.flatnonzero(keep))
    after = kept.objectives(measured)
    record = {
        "round": round_index,
        "strategy": search.strategy,
        "ref_point": ref_point.tolist(),
        "n_members": len(kept),
        "n_candidates": n,
        "n_accepted": int((kept.joined == round_index).sum()),
        "scored": scored,
        "surrogate_error": float(np.abs(predicted - candidates.losses).mean()) if n else None,
        "hypervolume_before": hypervolume(Y, ref_point),
        "hypervolume_after": hypervolume(after, ref_point),
        "front": after[is_non_dominated(after)].tolist(),
        "evaluations": len(members) + n,
    }

    def write(folder: Path) -> dict[str, Scalar]:
        write_json(folder / SET, kept.to_dict(measured))
        write_json(folder / ROUND, record)
        names = ("round", "n_members", "n_accepted", "hypervolume_before", "hypervolume_after")
        return {name: record[name] for name in names}

    return Store().put("configuration-set", write)


def _candidates(
    search: SearchSettings,
    surrogate: Surrogate,
    members: ConfigurationSet,
    Y: np.ndarray,
    measured: CalibrationTables,
    ref_point: np.ndarray,
    seed: int,
    round_index: int,
) -> tuple[np.ndarray, int]:
    """Configurations to measure (q, N) by the strategy asked for, and how many the surrogate scored for them."""
    neighbours, draw = measured.space.neighbours(search.delta, measured.allowed), seed * 1_000_003 + round_index
    n_layers = len(measured.layers)
    if search.strategy == "frozen":
        return np.empty((0, n_layers), dtype=np.int64), 0
    if search.strategy == "random":
        found = extend_at_random(
            members.configurations,
            neighbours,
            n_layers,
            n_candidates=search.candidates,
            seed=draw,
            allowed=measured.allowed,
        )
        return found, 0
    proposal = propose(
        surrogate,
        members.configurations,
        Y,
        measured.search_cost,
        neighbours,
        ref_point,
        n_candidates=search.candidates,
        n_restarts=search.restarts,
        max_steps=search.max_steps,
        seed=draw,
        allowed=measured.allowed,
        progress=Progress(f"search, round {round_index}, proposals"),
    )
    return proposal.configurations, proposal.scored


def _measure(
    adapted: AdaptedModel, split: Split, members: ConfigurationSet, batch_size: int, round_index: int, what: str
) -> ConfigurationSet:
    """Losses of the members; those that a killed run of this stage has measured are taken as they are."""
    progress = Progress(f"search, round {round_index}, {what} measured")
    memo = Memo(what, len(members))
    try:
        for row in members.configurations[len(memo.values) :]:
            losses, _ = score_configurations(adapted, split, row[None], batch_size=batch_size)
            memo.add(losses[0])
            progress(len(memo.values), len(members), loss=memo.values[-1])
    finally:
        memo.save()
    return ConfigurationSet(members.configurations, np.array(memo.values, dtype=float), members.joined)


def _reference_point(configurations: Artifact, Y: np.ndarray, max_cost: float) -> np.ndarray:
    file = Store().path(configurations) / ROUND
    if file.is_file():
        return np.array(read_json(file)["ref_point"])
    low, high = Y[:, 0].min(), Y[:, 0].max()
    # A hundredth above the largest cost: a point at the reference's own cost would count for nothing.
    return np.array([high + 0.1 * (high - low), max_cost * 1.01])
