"""Base models by hub id or local path, or their architecture alone on the meta device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from coalora.errors import CoaloraError

Task = Literal["classification", "language-modeling"]
_AUTO = {"classification": AutoModelForSequenceClassification, "language-modeling": AutoModelForCausalLM}


def model_class(task: Task) -> Any:
    """The transformers class that loads a model of a task."""
    return _AUTO[task]


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 matrix products are many times slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(
    name_or_path: str | Path,
    task: Task,
    *,
    num_labels: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A base model in eval mode, its parameters frozen.

    `seed` decides the head of a classification model whose checkpoint has none: the same seed gives the same head.

    Raises:
        CoaloraError: the model cannot be found or read.
    """
    device = device or default_device()
    options: dict = {"num_labels": num_labels} if task == "classification" and num_labels is not None else {}
    # A checkpoint without a task head is the ordinary case here; the report about its "missing" keys is noise.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    torch.manual_seed(seed)
    try:
        model = _AUTO[task].from_pretrained(
            str(name_or_path),
            dtype=dtype or default_dtype(device),
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            **options,
        )
    except OSError as error:
        raise _not_found(name_or_path, error) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.to(device).eval()


def load_config(
    name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The architecture's config, from a local folder or the hub.

    Raises:
        CoaloraError: there is no such model.
    """
    try:
        return AutoConfig.from_pretrained(
            str(name_or_path), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except OSError as error:
        raise _not_found(name_or_path, error) from error


def load_tokenizer(
    name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (the end-of-text token where it has none)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name_or_path), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except OSError as error:
        raise _not_found(name_or_path, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def meta_model(config: PretrainedConfig, task: Task, *, num_labels: int | None = None) -> PreTrainedModel:
    """The architecture without weights: names and shapes for checks that must cost nothing."""
    if task == "classification" and num_labels is not None:
        config = copy.deepcopy(config)
        config.num_labels = num_labels
    with torch.device("meta"):
        return _AUTO[task].from_config(config)


def _not_found(name_or_path: str | Path, error: OSError) -> CoaloraError:
    return CoaloraError(
        "the base model must be a hub id or a local folder with config.json and weights",
        got=f"{name_or_path} ({str(error).splitlines()[0]})",
        expected="for example 'FacebookAI/roberta-large' or a path to a saved model",
        remedy="set model.name_or_path; without a network, to a local folder",
    )
