"""Answers of a finished run, from its record and the store: any budget, and perplexity on any text."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from coalora.calibrate.costs import parse_budget
from coalora.errors import CoaloraError
from coalora.evaluate.perplexity import windows
from coalora.files import read_json, require_writable, whole_or_nothing, write_json
from coalora.models.loading import resolved
from pipeline.inputs.exports import ExportInputs
from pipeline.inputs.loaders import BaseModel, put_text
from pipeline.report.schema import Cost
from pipeline.settings.definitions import validate_settings
from pipeline.settings.sections import RuntimeSettings, Settings
from pipeline.stages.runner import DirectRunner
from pipeline.store.store import Artifact, default_store
from tasks.score_text import TEXT_SCORE, score_budget

ARTIFACTS = ("base", "benchmark", "tables", "bundle")
COLUMNS = ("text", "budget", "average_bits", "perplexity", "bits_per_byte", "tokens")


def read_run(folder: Path) -> tuple[Settings, dict[str, Artifact]]:
    """Settings of a finished run, and its `ARTIFACTS`."""
    file = folder / "run.json"
    if not file.is_file():
        raise CoaloraError(
            f"{folder} is no run folder: it holds no run.json",
            remedy="Name one such as runs/demo/latest, or run the pipeline first (`coalora run demo`)",
        )
    record: Any = read_json(file)
    try:
        settings = validate_settings(record["settings"], str(file))
        return settings, {n: Artifact.model_validate(record[n]) for n in ARTIFACTS}
    except CoaloraError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        reason = "artifacts that do not fit" if isinstance(error, ValidationError) else repr(error)
        raise CoaloraError(
            f"{file} is no record of a finished run of this version ({reason})",
            remedy="Run the pipeline again, which writes it anew",
        ) from error


def adapt_run(folder: Path, budget: float | str, out: Path) -> str:
    """Write configuration, adapter and packed base of a budget into `out`, whole or not at all; says what."""
    settings, artifacts = read_run(folder)
    _require_stored(artifacts)
    started = time.perf_counter()
    export = _export(settings, artifacts)
    budget = parse_budget(budget, settings.cost.kind)
    configuration = export.loaded.select(budget)
    chosen = time.perf_counter()
    with whole_or_nothing(out) as part:
        facts = export.write(part, configuration, list(dict.fromkeys([*settings.export.formats, "packed"])))
    counted = Cost.of(settings.cost.kind)
    cost = "" if settings.cost.kind == "average_bits" else f"{facts['cost']:.4g} {counted.unit}, "
    at, unused = float(facts["cost"] or 0), ""
    if counted.unused(at, budget):
        unused = f"\n{counted.text(at)} is the best of the run's set up to {counted.text(budget)}"
    return (
        f"{out}: {cost}{facts['average_bits']:.3f} average bits, adapter {facts['adapter_bytes']:,} bytes, "
        f"base {facts['base_bytes']:,} bytes; chosen in {1000 * (chosen - started):.0f} ms, "
        f"written in {time.perf_counter() - chosen:.1f} s{unused}"
    )


def score_run(
    folder: Path,
    texts: Sequence[Path],
    budgets: Sequence[float | str],
    max_length: int | None = None,
    stride: int | None = None,
    json: Path | None = None,
) -> str:
    """Perplexity of each text at each budget, as a table.

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
    cells = [[name.replace("_", " ") for name in COLUMNS]]
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
