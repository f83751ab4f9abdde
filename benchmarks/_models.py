"""Models in the shapes of published ones with random weights, and clocks; nothing is downloaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from coalora.adapt.adapted import AdaptedModel
from coalora.models.targets import TargetLayer, find_target_layers
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe

SHAPES: dict[str, dict] = {
    "MiniLM-L6": {"kind": "bert", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    | {"num_attention_heads": 12, "vocab_size": 30522},
    "SmolLM2-135M": {"kind": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "RoBERTa-large": {"kind": "roberta", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    | {"num_attention_heads": 16, "vocab_size": 50265, "max_position_embeddings": 514},
    "Qwen2.5-1.5B": {"kind": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "Llama-2-7B": {"kind": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
}
BATCHES = {
    "MiniLM-L6": (32, 25),
    "SmolLM2-135M": (8, 512),
    "RoBERTa-large": (64, 128),
    "Qwen2.5-1.5B": (4, 1024),
    "Llama-2-7B": (4, 1024),
}


def build(name: str, device: torch.device, *, blocks: int | None = None) -> PreTrainedModel:
    """Random weights, frozen, in bfloat16 on a GPU."""
    fields = {"num_hidden_layers": blocks} if blocks else {}
    config = _config(name, **fields)
    torch.manual_seed(0)
    with torch.device(device):
        model = _auto(name).from_config(config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return _frozen(model)


def build_small(name: str, *, blocks: int | None = None) -> PreTrainedModel:
    """The shape's layers (or so many blocks) in tiny widths, on the CPU: for counts, which do not depend on widths."""
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 64}
    fields |= {"num_key_value_heads": 1} if "num_key_value_heads" in SHAPES[name] else {}
    fields |= {"num_hidden_layers": blocks} if blocks else {}
    return _frozen(_auto(name).from_config(_config(name, **fields)))


def _config(name: str, **changed: int) -> PretrainedConfig:
    fields = {**SHAPES[name], **changed}
    return CONFIG_MAPPING[fields.pop("kind")](**fields)


def _auto(name: str) -> Any:
    return AutoModelForSequenceClassification if SHAPES[name]["kind"] in ("bert", "roberta") else AutoModelForCausalLM


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.train()


def layers_of(name: str) -> list[TargetLayer]:
    """The target layers without any weights."""
    with torch.device("meta"):
        return find_target_layers(_auto(name).from_config(_config(name)))


def adapt(model: PreTrainedModel, space: ChoiceSpace, method: str, r: int, **memory: object) -> AdaptedModel:
    task = "classification" if hasattr(model, "classifier") else "language-modeling"
    recipe = AdapterRecipe(r=r, lora_alpha=r, compensation_rank=0, expert_bits=0)
    return AdaptedModel(model, find_target_layers(model), space, task, method=method, recipe=recipe, seed=0, **memory)  # type: ignore[arg-type]


def batch(name: str, device: torch.device) -> dict[str, torch.Tensor]:
    shape = BATCHES[name]
    ids = torch.randint(10, SHAPES[name]["vocab_size"], shape, generator=torch.Generator().manual_seed(1)).to(device)
    labels = ids if SHAPES[name]["kind"] in ("qwen2", "llama") else torch.zeros(shape[0], dtype=torch.int64).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """One call, from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
