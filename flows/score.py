"""Perplexity of a finished run's model on any text, at any budgets, without training.

    python -m flows.score runs/demo/latest --text book.txt --budget 2.5 3 4 [--max-length 129] [--stride 64]

Each (text, budget) is kept in the store: a command that was killed goes on behind the last one, and asking again costs
nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coalora.errors import CoaloraError
from coalora.evaluate.perplexity import windows
from coalora.export.bundle import Bundle
from coalora.files import read_json, write_json
from coalora.models.loading import load_config
from flows.adapt import read_run
from flows.cli import log_to_terminal, run_command
from pipeline.inputs.loaders import BaseModel
from pipeline.settings.sections import RuntimeSettings, Settings
from pipeline.stages.runner import DirectRunner
from pipeline.store.store import Artifact, Store
from tasks.score_text import TEXT_SCORE, put_text, score_budget

COLUMNS = ("text", "budget", "average_bits", "perplexity", "bits_per_byte", "tokens")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    settings, artifacts = read_run(options.run)
    if settings.benchmark.task != "language-modeling":
        raise CoaloraError(
            "perplexity is for language models",
            got=f"a run of task {settings.benchmark.task}",
            remedy="name a run whose benchmark.task is language-modeling",
        )
    # By default as the run's own benchmark: blocks that predict max_length tokens.
    max_length = options.max_length or settings.benchmark.max_length + 1
    stride = options.stride or max_length - 1
    _check(options.budget, max_length, stride, artifacts)
    texts = {path: put_text(path) for path in options.text}
    log_to_terminal()
    rows = score_texts(settings, artifacts, texts, options.budget, max_length, stride)
    print(table(rows))
    if options.json is not None:
        write_json(options.json, {"max_length": max_length, "stride": stride, "scores": rows})
    return 0


def score_texts(
    settings: Settings,
    artifacts: dict[str, Artifact],
    texts: dict[Path, Artifact],
    budgets: Sequence[float],
    max_length: int,
    stride: int,
) -> list[dict[str, Any]]:
    """One row for each text and budget, in their order."""
    runner = DirectRunner()
    # The number type is the run's, the device is this machine's.
    runtime = RuntimeSettings(dtype=settings.runtime.dtype).resolved()
    common: dict[str, Any] = {
        **artifacts,
        "max_length": max_length,
        "stride": stride,
        "batch_size": settings.evaluation.batch_size,
        "export": settings.export,
        "runtime": runtime,
        "seed": settings.seed,
    }
    rows = []
    for path, text in texts.items():
        for budget in budgets:
            found = runner.run(score_budget, **common, text=text, budget=budget)
            rows.append({"text": str(path), **read_json(runner.store.path(found) / TEXT_SCORE)})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned columns."""
    cells = [[name.replace("_", " ") for name in COLUMNS]]
    for row in rows:
        numbers = [f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS]
        cells.append(numbers)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _check(budgets: Sequence[float], max_length: int, stride: int, artifacts: dict[str, Artifact]) -> None:
    """Whatever can be told before a model is loaded."""
    windows(2, max_length, stride)
    for name, artifact in artifacts.items():
        if problems := Store().problems(artifact):
            raise CoaloraError(
                "the run's artifacts must be in the store",
                got=f"{name}: {problems[0]}",
                remedy="call this where the pipeline ran (or set COALORA_HOME), or run the pipeline again",
            )
    limit = getattr(load_config(BaseModel(artifacts["base"]).path), "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise CoaloraError(
            "windows fit the positions of the base model",
            got=f"--max-length {max_length}",
            expected=f"at most {limit} tokens",
            remedy="lower --max-length",
        )
    bundle = Bundle.load(Store().path(artifacts["bundle"]))
    for budget in budgets:
        bundle.select(budget)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m flows.score", description="Perplexity of a finished run's model on any text, at any budgets."
    )
    made.add_argument("run", metavar="RUN", type=Path, help="run folder, such as runs/demo/latest")
    made.add_argument("--text", type=Path, nargs="+", required=True, help="text files in UTF-8, each one document")
    made.add_argument("--budget", type=float, nargs="+", required=True, help="average bits a weight, at most")
    made.add_argument("--max-length", type=int, help="tokens a window (default: the benchmark's blocks)")
    made.add_argument("--stride", type=int, help="tokens from one window to the next (default: no overlap)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file, too")
    return made


if __name__ == "__main__":
    run_command(main)
