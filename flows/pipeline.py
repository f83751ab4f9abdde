"""The whole pipeline, from a base model to registered, exported adapters.

    python -m flows.pipeline NAME [--file OTHER.yaml] [--set search.rounds=2 ...] [--refresh STAGE ...]

A second run does no work; a run that was killed goes on behind its last finished stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.runtime import deployment
from pydantic import Field

from coalora.errors import CoaloraError
from flows.calibration import calibration
from flows.evaluation import evaluation
from flows.export import export
from flows.publishing import ALL_STAGES, Published, publication
from flows.run import PipelineRun
from flows.training import training
from pipeline.orchestration.deployed import check_deployment, check_server
from pipeline.orchestration.progress import get_logger
from pipeline.preflight import preflight
from pipeline.settings.definitions import change_settings, check_name
from pipeline.settings.sections import Settings

STAGE_NAMES = sorted({stage.name for stage in ALL_STAGES})

# Choices for the form in Prefect's UI; `check_refresh` says the same in better words.
Refresh = Annotated[list[str], Field(json_schema_extra={"items": {"type": "string", "enum": STAGE_NAMES}})]


@flow(name="pipeline", flow_run_name="{name}")
def pipeline(
    name: str,
    settings: Settings,
    refresh: Refresh = [],  # noqa: B006 (a form's default)
    changes: list[str] = [],  # noqa: B006
) -> Published:
    """Calibrate, train and search, evaluate, export, publish.

    Args:
        name: Run folder, configuration sets and registered model are named so.
        settings: As in pipelines.yaml.
        refresh: Stages to compute again whatever is cached.
        changes: To the settings above, each section.key=value, such as evaluation.budgets=[3.5]; for the command line.
    """
    check_name(name)  # a run started from a form has not been read from a file
    check_deployment(deployment.name, name)
    check_refresh(refresh)
    settings = change_settings(settings, changes, f"run of {name!r}")
    found = preflight(settings, root=Path.cwd())
    low, high = found.cost_range
    get_logger().info(
        "%d target layers, %d weights, %d choices for each: %.4g to %.4g %s",
        len(found.layers), found.n_weights, found.n_choices, low, high, found.cost_words,
    )  # fmt: skip
    from pipeline.tracking.live import followed  # imports MLflow, which is slow

    run = PipelineRun.under_prefect(name, settings, refresh)
    with followed(name, run.settings, run.identity(ALL_STAGES)) as tracked:
        get_logger().info("MLflow: %s", tracked.url_hint)
        calibrated = calibration(name, settings, refresh)
        trained = training(name, settings, refresh, calibrated)
        evaluated = evaluation(name, settings, refresh, calibrated, trained)
        exported = export(name, settings, refresh, calibrated, trained, evaluated)
        return publication(name, settings, refresh, calibrated, trained, exported)


def check_refresh(refresh: Sequence[str]) -> None:
    """Refuse names of stages that do not exist: a misspelt one would silently refresh nothing."""
    unknown = sorted(set(refresh) - set(STAGE_NAMES))
    if unknown:
        raise CoaloraError("a stage to refresh must exist", got=", ".join(unknown), expected=", ".join(STAGE_NAMES))


def main(arguments: Sequence[str] | None = None) -> int:
    from flows.cli import parser
    from pipeline.settings.definitions import load_settings

    options = parser(
        "flows.pipeline", "Run a pipeline: base model in, registered and exported adapters out."
    ).parse_args(arguments)
    settings = load_settings(options.name, file=options.file, changes=options.changes)
    check_refresh(options.refresh)
    check_server()
    preflight(settings, root=Path.cwd())
    published = pipeline(name=options.name, settings=settings, refresh=options.refresh)
    show(published, settings)
    return 0


def show(published: Published, settings: Settings) -> None:
    """The closing table, where files lie, and the next commands."""
    from rich.console import Console

    from coalora.files import read_json
    from pipeline.report.page import ReportFiles
    from pipeline.report.terminal import print_result
    from pipeline.tracking.place import default_place
    from pipeline.tracking.values import scrub_text

    folder = Path(published.folder)
    console = Console()
    files = ReportFiles(folder / "report/front.png", folder / "report/report.html")
    print_result(read_json(folder / "report/result.json"), console, files)
    registered = published.registered
    place = default_place(settings.tracking.tracking_uri)
    served = scrub_text(place.tracking_uri) if place.artifact_root is None else None
    console.print(
        f"\nRegistered model: {registered['name']} version {registered['version']} ({registered['reason']})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if published.s3_address:
        console.print(f"Published in S3: {published.s3_address}", markup=False, highlight=False, soft_wrap=True)
    console.print("\nNext:", style="bold")
    latest = folder.parent / "latest"
    commands = [
        ("open the report", f"xdg-open {latest}/report/report.html"),
        ("adapt to another budget", f"python -m flows.adapt {latest} --budget 3.5 --out adapted/3.5-bits"),
        ("compare runs in MLflow", served if served else f"mlflow ui --backend-store-uri {place.tracking_uri}"),
        ("start a Prefect server", "prefect server start   # README.md: deploy, schedule, run on a worker"),
    ]
    for words, command in commands:
        console.print(f"  {words:<25} {command}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    from flows.cli import run_command

    run_command(main)
