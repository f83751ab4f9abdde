"""Task `show-round`: the Pareto front after a round as Prefect artifacts, for a person who watches the run.

Artifacts of one key are one history: `<pipeline>-pareto-front` shows how the front moved, round by round and run by
run. Without a server (`dvc repro`) the task does nothing.
"""

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext

from coalora.files import read_json
from pipeline.inputs.loaders import ROUND, SET
from pipeline.progress import artifact_key
from pipeline.report.markdown import front_rows, round_markdown
from pipeline.report.schema import Round
from pipeline.settings.sections import Settings
from pipeline.store.store import Artifact, current_store


@task(name="show-round", cache_policy=NO_CACHE)
def show_round(
    *, pipeline: str, settings: Settings, round_index: int, sets: list[Artifact], mlflow_run_id: str | None = None
) -> str | None:
    """Publish the Pareto front after a round as picture and table; returns the Markdown.

    Args:
        sets: of all rounds so far, the initial set first.
    """
    if FlowRunContext.get() is None:
        return None
    from pipeline.tracking.pipeline_run import run_url

    folders = [current_store().path(made) for made in sets]
    rounds = [Round.of_record(read_json(folder / ROUND)) for folder in folders if (folder / ROUND).is_file()]
    members = read_json(folders[-1] / SET)["members"]
    url = run_url(settings, mlflow_run_id) if mlflow_run_id else ""
    text = round_markdown(pipeline, settings, round_index, rounds, members, url)
    key = artifact_key(pipeline, "pareto-front")
    create_markdown_artifact(text, key=key, description=f"Picture of round {round_index}, beside those before")
    if rounds and rounds[-1].round == round_index:
        create_table_artifact(
            front_rows(rounds[-1], settings),
            key=f"{key}-table",
            description=f"Members in round {round_index}",
        )
    return text
