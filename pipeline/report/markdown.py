"""Markdown of a run for Prefect's UI: the page of a round, and that of the result.

Pictures are data URIs: an image artifact takes an address, and a worker serves none.
"""

import base64
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coalora.files import read_json
from pipeline.report.page import pictures
from pipeline.report.rounds import fronts_png
from pipeline.report.schema import RESULT, Cost, Round, as_result, loss_unit
from pipeline.report.style import figure_png
from pipeline.report.table import cell
from pipeline.settings.sections import Settings
from pipeline.words import number, signed


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
    cost, benchmark = Cost.of(settings.cost.kind), settings.benchmark
    unit_of_loss = loss_unit(benchmark.task, squared=benchmark.num_labels == 1)
    bits = [member["average_bits"] for member in members]
    spread = f"{len(members)} configurations from {min(bits):.2f} to {max(bits):.2f} average bits"
    see = ["", f"In MLflow: {_link(f'round {round_index}', url)}"] if url else []
    lines = [f"# {pipeline}: configuration set of round {round_index}", ""]
    if not rounds:
        return "\n".join([*lines, f"The initial set: {spread}.", *see])
    now = rounds[-1]
    lines += [
        _picture(fronts_png(rounds, cost, unit_of_loss), f"Fronts up to round {now.round}"),
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
    lines += ["", f"| {cost.label} | loss, {unit_of_loss} ↓ |", "| ---: | ---: |"]
    lines += [f"| {at:.3f} | {loss:.4f} |" for loss, at in front_of(now)]
    return "\n".join([*lines, *see])


def result_markdown(
    pipeline: str, files: Path, folder: str, run_id: str, url: str, registered: Mapping[str, Any]
) -> str:
    """The page of a finished run: the report's tables and pictures, since a browser opens no file from Prefect's UI.

    Args:
        files: folder of the report.
        folder: of the run.
        url: of the MLflow run, or the command that shows it.
    """
    result = as_result(read_json(files / RESULT))
    where = f"`{Path(folder).resolve() / 'report' / 'report.html'}` on {socket.gethostname()}"
    served = url.startswith("http")
    report = f"[report.html]({url}/artifacts/report/report.html) in MLflow, and {where}" if served else where
    front, *others = pictures(result).values()
    lines = [
        f"# {pipeline}",
        "",
        # A size stays on one line in a narrow cell.
        re.sub(r"(\d) ([kMG]?B) ", "\\1\u00a0\\2 ", (files / "table.md").read_text(encoding="utf-8").strip()),
        "",
        _picture(figure_png(front[0]), front[1]),
        "",
        f"- Report: {report}",
        f"- MLflow: {_link('run ' + run_id, url)}",
        f"- Registered: {registered['name']}, version {registered['version']} ({registered['reason']})",
        f"- Another budget: `coalora adapt {folder} --bits 3.5 --out adapted/3.5-bits`",
    ]
    for said in result.continued:
        lines += [
            "",
            f"## {cell(said.prompt)}",
            "",
            f"Continued at {result.cost.text(said.budget)}:",
            "",
            "| | |",
            "|---|---|",
        ]
        arms = {"no adapter": said.none, "CoA-LoRA": said.coa, "the original": said.full_precision}
        lines += [f"| {name} | {cell(text)} |" for name, text in arms.items()]
    for figure, title in others:
        lines += ["", f"## {title}", "", _picture(figure_png(figure), title)]
    return "\n".join(lines)


def front_of(at: Round) -> list[tuple[float, float]]:
    """(loss, cost) of the front after a round, by rising cost."""
    return sorted(at.front, key=lambda point: point[1])


def front_rows(at: Round, settings: Settings) -> list[dict[str, float]]:
    """`front_of` as rows of a table."""
    label = Cost.of(settings.cost.kind).label
    return [{label: round(cost, 3), "loss": round(loss, 4)} for loss, cost in front_of(at)]


def _picture(png: bytes, alt: str) -> str:
    return f"![{alt}](data:image/png;base64,{base64.b64encode(png).decode()})"


def _link(words: str, url: str) -> str:
    return f"[{words}]({url})" if url.startswith("http") else f"{words}, `{url}`"
