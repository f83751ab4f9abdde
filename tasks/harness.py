"""Stage `harness`: lm-evaluation-harness tasks for one configuration of an adapted language model."""

from __future__ import annotations

from pathlib import Path

import torch

from coalora.evaluate.harness import run_harness
from coalora.files import write_json
from coalora.recipes import AdapterRecipe
from pipeline.inputs.fingerprint import files_digest
from pipeline.inputs.loaders import BaseModel, load_benchmark, load_selected, load_tables
from pipeline.inputs.resident import resident_model
from pipeline.settings.sections import RuntimeSettings
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, Store

HARNESS = "harness.json"


def include_digest(include: str | None) -> str | None:
    """Digest of a folder of own tasks, for the key of what is measured with them."""
    return None if include is None else files_digest(sorted(p for p in Path(include).rglob("*") if p.is_file()))


@stage("harness", tags=("gpu",))
def evaluate_harness(
    *,
    base: Artifact,
    benchmark: Artifact,
    tables: Artifact,
    selection: Artifact,
    state: Artifact,
    method: str,
    adapter: AdapterRecipe,
    index: int,
    tasks: list[str],
    include: str | None,
    include_content: str | None,
    limit: int | None,
    batch_size: int,
    version: str,
    runtime: RuntimeSettings,
    seed: int,
) -> Artifact:
    """`harness.json`: task -> its numbers, for the budget number `index` of a selection.

    Args:
        include_content, version: of the own tasks and of lm-eval, so that another content measures again.
    """
    data = load_benchmark(benchmark)
    configuration = load_selected(selection, load_tables(tables))[index]
    with resident_model(
        data,
        base=base,
        benchmark=benchmark,
        tables=tables,
        state=state,
        method=method,
        adapter=adapter,
        runtime=runtime,
        seed=seed,
    ) as adapted:
        with torch.no_grad():
            adapted.switch(configuration)
        adapted.peft_model.eval()
        found = run_harness(
            adapted.peft_model,
            BaseModel(base).tokenizer(),
            tasks,
            include=include,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
        )

    def write(folder: Path) -> dict[str, Scalar]:
        write_json(folder / HARNESS, found)
        return {"n_tasks": len(tasks)}

    return Store().put("harness", write)
