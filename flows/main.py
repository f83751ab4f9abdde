"""Prefect flow `pipeline`: from a base model to registered, exported adapters.

    coalora run NAME [--file OTHER.yaml] [--set search.rounds=2 ...] [--refresh STAGE ...]

A second run does no work; a run that was killed goes on behind its last finished stage. All task runs belong to this
one flow run.
"""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.runtime import deployment
from pydantic import Field

from flows.graph import PARTS, STAGE_NAMES, Graph, Published, Rounds, check_refresh, start
from flows.parts import part_key
from flows.stage import remember_part
from pipeline.orchestration.server import check_deployment, check_server, server_faults
from pipeline.orchestration.temporary import start_temporary_server
from pipeline.preflight import preflight
from pipeline.progress import get_logger
from pipeline.settings.definitions import change_settings, check_name
from pipeline.settings.sections import Settings
from pipeline.stages.runner import PrefectRunner

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
        "%d target layers, %s weights, %d choices for each: %.4g to %.4g %s%s",
        len(found.layers), f"{found.n_weights:,}", found.n_choices, low, high, found.cost_words,
        f"; {found.kept_mb:,.0f} MB of quantized weights are kept" if found.kept_mb else "",
    )  # fmt: skip
    from pipeline.tracking.pipeline_run import followed  # imports MLflow, which is slow

    hours = settings.stages.timeout_hours
    runner = PrefectRunner(retries=settings.stages.retries, timeout_seconds=None if hours is None else hours * 3600)
    keys = {part: part_key(part, name, settings) for part in PARTS}
    run = start(name, settings, runner, refresh)
    with followed(name, run.settings, run.identity) as tracked:
        get_logger().info("MLflow: %s", tracked.url_hint)
        graph = Graph(run, Rounds(run))
        published = graph.published
        for part, key in keys.items():  # what `dvc repro` would find, asking every stage
            remember_part(part, graph, key)
        return published


def run_pipeline(name: str, settings: Settings, refresh: Sequence[str] = ()) -> None:
    """The flow on this machine, after every check that needs no run, and the closing lines."""
    check_refresh(refresh)
    check_server()
    preflight(settings, root=Path.cwd())
    start_temporary_server()
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
        # A terminal that is closed ends the run as SIGTERM does: Prefect and MLflow are told.
        signal.signal(signal.SIGHUP, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    with server_faults():
        published = pipeline(name=name, settings=settings, refresh=list(refresh))
    show(published, settings)


def show(published: Published, settings: Settings) -> None:
    """Print the closing table, where files lie, and the next commands."""
    from rich.console import Console

    from coalora.files import read_json
    from pipeline.report.schema import as_result
    from pipeline.report.terminal import print_result
    from pipeline.scrub import scrub_text
    from pipeline.tracking.server import place_of_runs

    folder = Path(published.folder)
    console = Console()
    print_result(as_result(read_json(folder / "report/result.json")), console, folder / "report")
    registered = published.registered
    uri = place_of_runs(settings.tracking.tracking_uri)
    latest = folder.parent / "latest"
    lines = [f"\nRegistered model: {registered['name']} version {registered['version']} ({registered['reason']})"]
    lines += [f"Published in S3: {published.s3_address}"] if published.s3_address else []
    commands = {
        "open the report": f"xdg-open {latest}/report/report.html",
        "adapt to another budget": f"coalora adapt {latest} --bits 3.5 --out adapted/3.5-bits",
        "compare runs in MLflow": f"mlflow ui --backend-store-uri {uri}"
        if uri.startswith("sqlite:")
        else scrub_text(uri),
        "start a Prefect server": "prefect server start   # README.md: deploy, schedule, run on a worker",
    }
    lines += ["\nNext:", *(f"  {words:<25} {command}" for words, command in commands.items())]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
