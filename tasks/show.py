"""Prefect artifacts for a person who watches a run: each round's Pareto front, and the result with its links.

Artifacts of one key are one history: `<pipeline>-pareto-front` shows how the front moved, round by round and run by
run. Pictures are data URIs in Markdown: an image artifact takes an address, and a worker serves none. Without a server
(`dvc repro`) these tasks do nothing.
"""

from __future__ import annotations

import base64
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext

from coalora.calibrate.costs import UNITS
from coalora.files import read_json
from pipeline.inputs.loaders import ROUND, SET
from pipeline.orchestration.progress import artifact_key
from pipeline.report.rounds import fronts_png
from pipeline.report.schema import Cost, Round, loss_unit
from pipeline.report.table import number, signed
from pipeline.settings.sections import BenchmarkSettings, Settings
from pipeline.store.store import Artifact, Store


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
    rounds = [_round(a) for a in sets if (Store().path(a) / ROUND).is_file()]
    members = read_json(Store().path(sets[-1]) / SET)["members"]
    url = mlflow_url(settings, mlflow_run_id) if mlflow_run_id else ""
    text = round_markdown(pipeline, settings, round_index, rounds, members, url)
    key = artifact_key(pipeline, "pareto-front")
    create_markdown_artifact(text, key=key, description=f"{pipeline}: Pareto front, round {round_index}")
    if rounds and rounds[-1].round == round_index:
        create_table_artifact(
            [
                {UNITS[settings.cost.kind].label: round(cost, 3), "loss": round(loss, 4)}
                for loss, cost in _front(rounds[-1])
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
    url, files = mlflow_url(settings, mlflow_run_id), Store().path(report)
    served = url.startswith("http")
    where = f"`{Path(folder).resolve() / 'report' / 'report.html'}` on {socket.gethostname()}"
    report_link = f"[report.html]({url}/artifacts/report/report.html) in MLflow, and {where}" if served else where
    text = "\n".join(
        [
            f"# {pipeline}",
            "",
            (files / "table.md").read_text(encoding="utf-8").strip(),
            "",
            _picture((files / "front.png").read_bytes(), "Pareto front"),
            "",
            f"- Report: {report_link}",
            f"- MLflow: {_link('run ' + mlflow_run_id, url)}",
            f"- Registered: {registered['name']}, version {registered['version']} ({registered['reason']})",
            f"- Another budget: `coalora adapt {folder} --budget 3.5 --out adapted/3.5-bits`",
        ]
    )
    create_markdown_artifact(text, key=artifact_key(pipeline, "result"), description=f"{pipeline}: result")
    if served:
        create_link_artifact(url, "MLflow run", key=artifact_key(pipeline, "mlflow"), description="Curves and files")
        create_link_artifact(
            f"{url}/artifacts/report/report.html", "Report", key=artifact_key(pipeline, "report"), description="Report"
        )
    return text


def round_markdown(
    pipeline: str,
    settings: Settings,
    round_index: int,
    rounds: Sequence[Round],
    members: Sequence[dict[str, Any]],
    url: str,
) -> str:
    """The page of one round.

    Args:
        rounds: records of the search rounds so far; none for the initial set.
        members: of the set after the round.
        url: of the round's MLflow run, or the command that shows it; empty where there is neither.
    """
    unit, unit_of_loss = UNITS[settings.cost.kind], _loss_unit(settings.benchmark)
    bits = [member["average_bits"] for member in members]
    spread = f"{len(members)} configurations from {min(bits):.2f} to {max(bits):.2f} average bits"
    see = ["", f"In MLflow: {_link(f'round {round_index}', url)}"] if url else []
    lines = [f"# {pipeline}: configuration set of round {round_index}", ""]
    if not rounds:
        return "\n".join([*lines, f"The initial set: {spread}.", *see])
    now = rounds[-1]
    lines += [
        _picture(fronts_png(rounds, _cost(settings), unit_of_loss), f"Fronts up to round {now.round}"),
        "",
        f"{spread}; {len(now.front)} of them on the front. {now.n_accepted} of {now.n_candidates} candidates accepted.",
        "",
        "| round | hypervolume before ↑ | after ↑ | change | accepted |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {at.round} | {number(at.hypervolume_before)} | {number(at.hypervolume_after)} | "
        f"{signed(at.hypervolume_after - at.hypervolume_before)} | {at.n_accepted} of {at.n_candidates} |"
        for at in rounds
    ]
    lines += ["", f"| {unit.label} | loss, {unit_of_loss} ↓ |", "| ---: | ---: |"]
    lines += [f"| {cost:.3f} | {loss:.4f} |" for loss, cost in _front(now)]
    return "\n".join([*lines, *see])


def mlflow_url(settings: Settings, run_id: str) -> str:
    """Address of a run on the MLflow server, or the command that shows it where there is none."""
    from pipeline.tracking.runs import open_tracker

    return open_tracker(settings.tracking.experiment, settings.tracking.tracking_uri).url_hint(run_id)


def _loss_unit(benchmark: BenchmarkSettings) -> str:
    return loss_unit(benchmark.task, squared=benchmark.num_labels == 1)


def _round(configurations: Artifact) -> Round:
    record = read_json(Store().path(configurations) / ROUND)
    return Round.model_validate({name: record[name] for name in Round.model_fields})


def _cost(settings: Settings) -> Cost:
    unit = UNITS[settings.cost.kind]
    return Cost(kind=settings.cost.kind, label=unit.label, words=unit.words, unit=unit.unit)


def _front(at: Round) -> list[tuple[float, float]]:
    return sorted(((loss, cost) for loss, cost in at.front), key=lambda point: point[1])


def _picture(png: bytes, alt: str) -> str:
    return f"![{alt}](data:image/png;base64,{base64.b64encode(png).decode()})"


def _link(words: str, url: str) -> str:
    return f"[{words}]({url})" if url.startswith("http") else f"{words}, `{url}`"
