"""Task `show-result`: the result as Prefect artifacts, with links to the report and to MLflow.

Without a server (`dvc repro`) the task does nothing.
"""

from typing import Any

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext

from pipeline.progress import artifact_key
from pipeline.report.markdown import result_markdown
from pipeline.settings.sections import Settings
from pipeline.store.store import Artifact, current_store


@task(name="show-result", cache_policy=NO_CACHE)
def show_result(
    *, pipeline: str, settings: Settings, report: Artifact, folder: str, mlflow_run_id: str, registered: dict[str, Any]
) -> str | None:
    """Publish the closing table with links to the report and to MLflow; returns the Markdown."""
    if FlowRunContext.get() is None:
        return None
    from pipeline.tracking.pipeline_run import run_url

    url = run_url(settings, mlflow_run_id)
    text = result_markdown(pipeline, current_store().path(report), folder, mlflow_run_id, url, registered)
    create_markdown_artifact(
        text, key=artifact_key(pipeline, "result"), description="Table, pictures, registered version"
    )
    if url.startswith("http"):
        create_link_artifact(
            url, "MLflow run", key=artifact_key(pipeline, "mlflow"), description="Curves and files of the run"
        )
        create_link_artifact(
            f"{url}/artifacts/report/report.html",
            "report.html",
            key=artifact_key(pipeline, "report"),
            description="All that was measured, as one page in MLflow",
        )
    return text
