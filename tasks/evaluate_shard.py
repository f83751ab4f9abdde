"""Stage `evaluate-shard`: validation loss and metrics of one method, for some of the members and budgets.

The distinct configurations among both are cut into shards of `evaluation.shard_size`. Each shard is a stage of its
own, so that an evaluation that was killed goes on behind its last finished shard; `evaluate` only puts them together.
A configuration's scores do not depend on what was measured before it: any cut gives the same numbers, bit for bit.
"""

import numpy as np

from coalora.calibrate.tables import CalibrationTables
from coalora.evaluate.losses import measure_configurations
from coalora.models.switching.quantized import FULL_PRECISION
from pipeline.inputs.adapted import ModelInputs, reference_of
from pipeline.inputs.loaders import load_selected, load_set
from pipeline.progress import Progress
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, current_store

SHARD = "shard.json"


def shard_bounds(selection: Artifact, shard_size: int) -> list[tuple[int, int]]:
    """(start, stop) of the shards of a selection's distinct configurations."""
    n = int(selection.meta["n_distinct"] or 0)
    return [(start, min(start + shard_size, n)) for start in range(0, n, shard_size)]


def distinct_configurations(selection: Artifact, measured: CalibrationTables) -> tuple[np.ndarray, np.ndarray]:
    """Distinct configurations (n, N) among members and budgets, and which of them each member and budget has.

    A budget's configuration is often a member as it is: what is equal is measured once.
    """
    both = np.concatenate([load_set(selection, measured).configurations, load_selected(selection, measured)])
    distinct, inverse = np.unique(both, axis=0, return_inverse=True)
    return distinct, inverse.ravel()


@stage("evaluate-shard", tags=("gpu",))
def evaluate_shard(
    *,
    model: ModelInputs,
    selection: Artifact,
    state: Artifact,
    method: str,
    batch_size: int,
    start: int,
    stop: int,
    reference: Artifact | None = None,
) -> Artifact:
    """`shard.json`: scores of the distinct configurations `start` to `stop` of a selection.

    The first shard measures full precision as well.

    Args:
        reference: state of an adapter in full precision, with which KL divergence and agreement of a language model are
            measured; None: with the base alone.
    """
    rows = distinct_configurations(selection, model.measured)[0][start:stop]
    asked = np.concatenate([rows, np.full((int(start == 0), rows.shape[1]), FULL_PRECISION)])
    with model.adapted(method, state) as adapted:
        label = f"evaluating {method}, configurations {start + 1} to {stop} of {selection.meta['n_distinct']}"
        label += " and full precision" if start == 0 else ""
        found = measure_configurations(
            adapted,
            model.data.validation,
            asked,
            batch_size=batch_size,
            reference=reference_of(model, reference),
            by_block=True,
            progress=Progress(label),
        )
    scores = [vars(one) for one in found]
    full = scores.pop() if start == 0 else None
    content = {"start": start, "scores": scores, "full_precision": full}
    return current_store().put_json("scores-shard", {SHARD: content}, {"n_configurations": len(rows)})
