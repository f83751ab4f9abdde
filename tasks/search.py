"""Stage `search`: a round of Pareto search."""

from coalora.evaluate.losses import LossMeter
from coalora.files import read_json
from coalora.method import search as method
from coalora.recipes import Goal, SearchRecipe
from pipeline.inputs.adapted import ModelInputs, searched_against
from pipeline.inputs.loaders import ROUND, SET, load_set
from pipeline.progress import Progress
from pipeline.stages.checkpoints import Memo
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, current_store


@stage("search", tags=("gpu",))
def search_round(
    *, model: ModelInputs, configurations: Artifact, state: Artifact, search: SearchRecipe, round_index: int, goal: Goal
) -> Artifact:
    """The set of the next round: members measured anew, candidates proposed, measured and merged, segments filtered.

    To recover, losses are KL divergences from the base; to fine-tune, the task's.
    """
    measured = model.measured
    before = current_store().path(configurations) / ROUND
    label = f"search, round {round_index}"

    def progress(what: str) -> Progress:
        return Progress(f"{label}, {what} measured")

    with model.adapted("coa", state) as adapted:
        kept, record = method.search_round(
            LossMeter(adapted, model.data.search, search.batch_size, progress, Memo, searched_against(goal)),
            load_set(configurations, measured),
            measured,
            search,
            round_index=round_index,
            seed=model.seed,
            ref_point=read_json(before)["ref_point"] if before.is_file() else None,
            progress=Progress(f"{label}, proposals"),
        )
    meta = {n: record[n] for n in ("round", "n_members", "n_accepted", "hypervolume_before", "hypervolume_after")}
    return current_store().put_json("configuration-set", {SET: kept.to_dict(measured), ROUND: record}, meta)
