"""Prefect artifacts for a person who watches a run: each round's Pareto front, and the result with its links.

Artifacts of one key are one history: `<pipeline>-pareto-front` shows how the front moved, round by round and run by
run. Without a server (`dvc repro`) these tasks do nothing.
"""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext

from coalora.calibrate.costs import UNITS
from coalora.files import read_json
from pipeline.inputs.loaders import ROUND, SET
from pipeline.progress import artifact_key
from pipeline.report.markdown import front_of, result_markdown, round_markdown
from pipeline.report.schema import Round
from pipeline.settings.sections import Settings
from pipeline.store.current import current_store
from pipeline.store.store import Artifact


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
    rounds = [_round(a) for a in sets if (current_store().path(a) / ROUND).is_file()]
    members = read_json(current_store().path(sets[-1]) / SET)["members"]
    url = mlflow_url(settings, mlflow_run_id) if mlflow_run_id else ""
    text = round_markdown(pipeline, settings, round_index, rounds, members, url)
    key = artifact_key(pipeline, "pareto-front")
    create_markdown_artifact(text, key=key, description=f"{pipeline}: Pareto front, round {round_index}")
    if rounds and rounds[-1].round == round_index:
        create_table_artifact(
            [
                {UNITS[settings.cost.kind].label: round(cost, 3), "loss": round(loss, 4)}
                for loss, cost in front_of(rounds[-1])
            ],
            key=f"{key}-table",
            description=f"{pipeline}: members of the front, round {round_index}",
        )
    return text


@task(name="show-result", cache_policy=NO_CACHE)
def show_result(
    *,
    pipeline: str,
    settings: Settings,
    report: Artifact,
    folder: str,
    mlflow_run_id: str,
    registered: dict[str, Any],
) -> str | None:
    """Publish the closing table with links to the report and to MLflow; returns the Markdown."""
    if FlowRunContext.get() is None:
        return None
    url = mlflow_url(settings, mlflow_run_id)
    text = result_markdown(pipeline, current_store().path(report), folder, mlflow_run_id, url, registered)
    create_markdown_artifact(text, key=artifact_key(pipeline, "result"), description=f"{pipeline}: result")
    if url.startswith("http"):
        create_link_artifact(url, "MLflow run", key=artifact_key(pipeline, "mlflow"), description="Curves and files")
        create_link_artifact(
            f"{url}/artifacts/report/report.html", "Report", key=artifact_key(pipeline, "report"), description="Report"
        )
    return text


def mlflow_url(settings: Settings, run_id: str) -> str:
    """Address of a run on the MLflow server, or the command that shows it where there is none."""
    from pipeline.tracking.runs import open_tracker

    return open_tracker(settings.tracking.experiment, settings.tracking.tracking_uri).url_hint(run_id)


def _round(configurations: Artifact) -> Round:
    record = read_json(current_store().path(configurations) / ROUND)
    return Round.model_validate({name: record[name] for name in Round.model_fields})
