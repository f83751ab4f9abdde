"""Stage `harness`: lm-evaluation-harness tasks for one configuration of an adapted language model."""

from pathlib import Path

import torch

from coalora.evaluate.harness import run_harness
from pipeline.inputs.adapted import ModelInputs
from pipeline.inputs.fingerprint import files_digest
from pipeline.inputs.loaders import load_selected
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, current_store

HARNESS = "harness.json"


def include_digest(include: str | None) -> str | None:
    """Digest of a folder of own tasks, for the key of what is measured with them."""
    return None if include is None else files_digest(sorted(p for p in Path(include).rglob("*") if p.is_file()))


@stage("harness", tags=("gpu",))
def evaluate_harness(
    *,
    model: ModelInputs,
    selection: Artifact,
    state: Artifact,
    method: str,
    index: int,
    tasks: list[str],
    include: str | None,
    include_content: str | None,
    limit: int | None,
    batch_size: int,
    version: str,
) -> Artifact:
    """`harness.json`: task -> its numbers, for the budget number `index` of a selection.

    Args:
        include_content, version: of the own tasks and of lm-eval, so that another content measures again.
    """
    configuration = load_selected(selection, model.measured)[index]
    with model.adapted(method, state) as adapted:
        with torch.no_grad():
            adapted.switch(configuration)
        adapted.peft_model.eval()
        found = run_harness(
            adapted.peft_model,
            model.source.tokenizer(),
            tasks,
            include=include,
            limit=limit,
            batch_size=batch_size,
            seed=model.seed,
        )
    return current_store().put_json("harness", {HARNESS: found}, {"n_tasks": len(tasks)})
