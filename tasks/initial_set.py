"""Stage `initial-set`: the configuration set of round 0."""

from coalora.method import initial as method
from pipeline.inputs.loaders import load_tables, put_set
from pipeline.settings.sections import InitialSetSettings
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact


@stage("initial-set")
def initial_set(*, tables: Artifact, initial: InitialSetSettings) -> Artifact:
    """The set of round 0: allocations at evenly spread budgets."""
    measured = load_tables(tables)
    return put_set(method.initial_set(measured, initial), measured, {"round": 0})
