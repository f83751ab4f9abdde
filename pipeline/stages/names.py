"""Names of task runs in Prefect's UI: the stage or task in words, and what tells its runs apart."""

from collections.abc import Mapping
from typing import Any

from coalora.adapt.methods import METHODS

_WORDS = {
    "base": "prepare base model",
    "benchmark": "prepare benchmark",
    "calibrate": "calibrate layers",
    "cost": "price choices",
    "initial-set": "initial configuration set",
    "search": "Pareto search",
    "select": "choose configurations for the budgets",
    "evaluate-shard": "evaluate",
    "evaluate": "collect scores of",
    "reference": "train for one budget alone:",
    "harness": "evaluate on harness tasks:",
    "result": "put results together",
    "version-set": "version the set with DVC",
    "remove-stale-sets": "remove sets of rounds that are no more",
    "track-round": "log the set to MLflow",
    "track-run": "log results to MLflow",
    "track-training": "log the curve of",
    "register": "register in MLflow",
    "write-run-folder": "write the run folder",
    "show-round": "show the Pareto front",
    "show-result": "show the result",
}


def run_name(stage: str, call: Mapping[str, Any]) -> str:
    """`evaluate CoA-LoRA, configurations 1 to 16`."""
    name = _WORDS.get(stage, stage)
    if "method" in call:
        name += f" {METHODS[call['method']].label}"
    if "round_index" in call:
        name += f", round {call['round_index']}"
    if "start" in call:
        name += f", configurations {call['start'] + 1} to {call['stop']}"
    return f"{name}, budget {call['index'] + 1}" if "index" in call else name
