"""Task `register`: the bundle as a version of the registered model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.events import emit_event

from coalora.files import read_json
from pipeline.progress import get_logger
from pipeline.report.schema import RESULT, as_result
from pipeline.report.table import markdown_table
from pipeline.settings.sections import Settings
from pipeline.store.store import Artifact, current_store

# What a trigger in pipelines.yaml waits for.
EVENT, RESOURCE = "coalora.champion-moved", "coalora.model"

if TYPE_CHECKING:
    from pipeline.tracking.runs import TrackedRun


@task(name="register", cache_policy=NO_CACHE)
def register_version(
    *,
    pipeline: str,
    settings: Settings,
    identity: str,
    benchmark: Artifact,
    bundle: Artifact,
    result: Artifact,
    md5: str | None,
) -> dict[str, Any]:
    """Register the bundle as a model version; `champion` moves only when the hypervolume improves."""
    from pipeline.tracking.pipeline_run import on_run, version_tags
    from pipeline.tracking.registry import register

    content = read_json(current_store().path(result) / RESULT)

    def call(run: TrackedRun) -> dict[str, Any]:
        made = register(
            run,
            current_store().path(bundle),
            bundle.digest,
            settings.tracking.registered_model or f"coalora-{pipeline}",
            hypervolume=content["hypervolume"]["values"]["coa"],
            tags=version_tags(pipeline, content, benchmark, md5),
            description=markdown_table(as_result(content)),
        )
        get_logger().info("registered model %s, version %s: %s", made.name, made.version, made.reason)
        run.finish()
        if made.champion_moved and FlowRunContext.get() is not None:
            emit_event(
                event=EVENT,
                resource={
                    "prefect.resource.id": f"{RESOURCE}.{made.name}", "prefect.resource.name": made.name,
                    "version": str(made.version),
                },
            )  # fmt: skip
        return {"name": made.name, "version": made.version, "champion": made.champion_moved, "reason": made.reason}

    return on_run(pipeline, settings, identity, call)
