"""Stage `report`: pictures, page and tables of a result, and the files that DVC compares and plots."""

from pathlib import Path

from coalora.files import read_json, write_json
from pipeline.report.numbers import write_numbers
from pipeline.report.page import write_report
from pipeline.report.schema import RESULT, as_result
from pipeline.report.table import markdown_table
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, current_store


@stage("report")
def make_report(*, result: Artifact) -> Artifact:
    """`report.html`, `front.png`, `curves.png`, `table.md`, `result.json`, `metrics.json` and two csv tables."""
    content = read_json(current_store().path(result) / RESULT)
    checked = as_result(content)

    def write(folder: Path) -> dict[str, Scalar]:
        write_report(checked, folder)
        (folder / "table.md").write_text(markdown_table(checked) + "\n", encoding="utf-8")
        write_json(folder / RESULT, content)
        write_numbers(content, folder)
        return {}

    return current_store().put("report", write)
