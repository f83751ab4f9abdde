"""Stage `select`: the final set measured with the final adapter, and the configuration of each asked budget."""

from coalora.evaluate.losses import LossMeter
from coalora.method import selection as method
from coalora.recipes import Goal
from pipeline.inputs.adapted import ModelInputs, searched_against
from pipeline.inputs.loaders import SELECTED, SET, load_set
from pipeline.progress import Progress
from pipeline.stages.checkpoints import Memo
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, current_store


@stage("select", tags=("gpu",))
def select_budgets(
    *, model: ModelInputs, configurations: Artifact, state: Artifact, batch_size: int, budgets: list[float], goal: Goal
) -> Artifact:
    """`configurations.json`: the members with their losses. `selected.json`: a configuration for each budget."""
    measured = model.measured
    with model.adapted("coa", state) as adapted:
        meter = LossMeter(adapted, model.data.search, batch_size, Progress, Memo, searched_against(goal))
        members, selected = method.select_budgets(meter, load_set(configurations, measured), measured, budgets)
    files = {SET: members.to_dict(measured), SELECTED: selected.to_dict(measured) | {"budgets": budgets}}
    meta = {"n_members": len(members), "n_distinct": len(members.merge(selected).distinct())}
    return current_store().put_json("selection", files, meta)
