"""Perplexity of a finished run on any text, at any budget, from its record and the store."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coalora.calibrate.costs import parse_budget
from coalora.errors import CoaloraError
from coalora.evaluate.metrics import AGREEMENT, KL
from coalora.evaluate.perplexity import windows
from coalora.files import read_json, require_writable, write_json
from coalora.models.loading import resolved
from pipeline.inputs.exports import ExportInputs
from pipeline.inputs.loaders import BaseModel, put_text
from pipeline.report.schema import metric_words
from pipeline.settings.sections import RuntimeSettings, Settings
from pipeline.sources import read_run
from pipeline.stages.runner import DirectRunner
from pipeline.store.store import Artifact, default_store
from tasks.score_text import TEXT_SCORE, score_budget

COLUMNS = ("text", "budget", "average_bits", "perplexity", "bits_per_byte", KL, AGREEMENT, "tokens")


def score_run(
    folder: Path,
    texts: Sequence[Path],
    budgets: Sequence[float | str],
    max_length: int | None = None,
    stride: int | None = None,
    json: Path | None = None,
) -> str:
    """Perplexity of each text at each budget, and how near the base in full precision is, as a table.

    Args:
        max_length: tokens a window; by default as the run's own benchmark: blocks that predict max_length tokens.
        stride: tokens from one window to the next; by default no overlap.
        json: file for the numbers.
    """
    settings, artifacts = read_run(folder)
    if settings.benchmark.task != "language-modeling":
        raise CoaloraError(
            f"{folder} is a run of task {settings.benchmark.task}, which has no perplexity",
            remedy="Name a run whose benchmark.task is language-modeling",
        )
    if json is not None:
        require_writable(json)
    max_length = settings.benchmark.max_length + 1 if max_length is None else max_length
    stride = max_length - 1 if stride is None else stride
    export = _export(settings, artifacts)
    windows(2, max_length, stride)  # here and below: whatever can be told before a model is loaded
    _require_stored(artifacts)
    limit = getattr(BaseModel(export.base).config().get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise CoaloraError(
            f"--max-length {max_length} is above the {limit} positions of the base model", remedy="Lower --max-length"
        )
    budgets = [parse_budget(budget, settings.cost.kind) for budget in budgets]
    for budget in budgets:
        export.loaded.select(budget)
    runner, rows = DirectRunner(), []
    for path, text in {path: put_text(path) for path in texts}.items():
        for budget in budgets:
            found = runner.run(
                score_budget,
                export=export,
                text=text,
                budget=budget,
                max_length=max_length,
                stride=stride,
                batch_size=settings.evaluation.batch_size,
            )
            rows.append({"text": str(path), **read_json(runner.store.path(found) / TEXT_SCORE)})
    if json is not None:
        write_json(json, {"max_length": max_length, "stride": stride, "scores": rows})
    return table(rows)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned columns."""
    cells = [[metric_words(name) for name in COLUMNS]]
    for row in rows:
        cells.append([f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _require_stored(artifacts: dict[str, Artifact]) -> None:
    for name, artifact in artifacts.items():
        if problems := default_store().problems(artifact):
            raise CoaloraError(
                f"The run's {name} is not in the store ({problems[0]})",
                remedy="Call this where the pipeline ran (or set COALORA_HOME), or run the pipeline again",
            )


def _export(settings: Settings, artifacts: dict[str, Artifact]) -> ExportInputs:
    """The number type is the run's, the device this machine's."""
    runtime = resolved(RuntimeSettings(dtype=settings.runtime.dtype))
    return ExportInputs(**artifacts, settings=settings.export, runtime=runtime, seed=settings.seed)
