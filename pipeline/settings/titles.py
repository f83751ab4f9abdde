"""Titles of settings in the form of Prefect's UI: a key in words."""

from __future__ import annotations

from typing import Any

_WORDS = {"lora": "LoRA", "dtype": "number type"}
# Keys that read badly word by word.
_TITLES = {
    "allow": "Allowed values",
    "also": "Further schemes",
    "base": "Write the packed base",
    "builtin": "Built-in text",
    "cache_mib": "Cache of layers (MiB)",
    "candidates": "Candidates a round",
    "checkpoint_seconds": "Time between checkpoints (seconds)",
    "delta": "Step size (delta)",
    "embedding_dim": "Size of the embeddings",
    "enabled": "Version sets with DVC",
    "files": "Local files",
    "head_lr": "Learning rate of the head",
    "hessians": "Whole Hessians",
    "hidden_dim": "Hidden size",
    "hub": "Data set of the hub",
    "initial_steps": "Steps on the initial set",
    "lr": "Learning rate",
    "master": "Full-precision weights",
    "max_grad_norm": "Gradient clipping (norm)",
    "max_steps": "Moves of a climb",
    "n_samples": "Samples",
    "n_search": "Search examples",
    "n_train": "Training examples",
    "n_validation": "Validation examples",
    "name_or_path": "Hub id or folder",
    "num_attention_heads": "Attention heads",
    "num_hidden_layers": "Blocks",
    "num_labels": "Classes",
    "pretrain": "Pre-train a small decoder",
    "process_configurations": "Configurations of the processes",
    "processes": "Training processes",
    "r": "Rank (r)",
    "restarts": "Starts of a climb",
    "round_steps": "Steps after each search round",
    "scheme": "Quantization scheme",
    "segments": "Segments (U)",
    "theta_lr": "Learning rate of theta",
    "timeout_hours": "Time limit of a stage (hours)",
    "tracking_uri": "Address of MLflow",
    "trust_remote_code": "Run code that comes with the model",
    "weights": "Quantized weights",
    "workers": "Shards at a time",
}


def field_title(name: str, _: Any = None) -> str:
    """`batch_size` as `Batch size`."""
    if name in _TITLES:
        return _TITLES[name]
    words = " ".join(_WORDS.get(word, word) for word in name.split("_"))
    return words[0].upper() + words[1:]


def model_title(model: type) -> str:
    """`InitialSetSettings` as `Initial set`."""
    name = model.__name__.removesuffix("Settings") or "Settings"
    return "".join(f" {c.lower()}" if c.isupper() and i else c for i, c in enumerate(name))


def describe_ranges(schema: dict[str, Any]) -> None:
    """Say the range of each number in its description: the form shows no other sign of it."""
    for field in schema.get("properties", {}).values():
        words = _range(field) or next(filter(None, map(_range, field.get("anyOf", []))), None) or _items(field)
        if words and "description" in field:
            field["description"] += f" [{words}]"


def _range(schema: dict[str, Any]) -> str:
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    return ", ".join(f"{words} {schema[key]:g}" for key, words in bounds.items() if key in schema)


def _items(schema: dict[str, Any]) -> str:
    words = _range(schema["items"]) if isinstance(schema.get("items"), dict) else ""
    return f"each {words}" if words else ""
