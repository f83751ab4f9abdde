"""Base models by hub id or local path, or their architecture alone on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from coalora.errors import CoaloraError
from coalora.recipes import RuntimeRecipe, Task

R = TypeVar("R", bound=RuntimeRecipe)

_AUTO = {"classification": AutoModelForSequenceClassification, "language-modeling": AutoModelForCausalLM}


def resolved(runtime: R) -> R:
    """The same with `auto` replaced by what this machine has: results of CPU and GPU are kept apart."""
    device, dtype = runtime.device, runtime.dtype
    if device == "auto":
        device = "cuda" if default_device().type == "cuda" else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if default_dtype(torch.device(device)) is torch.bfloat16 else "float32"
    return replace(runtime, device=device, dtype=dtype)


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
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A base model in eval mode, its parameters frozen.

    `seed` decides the head of a classification model whose checkpoint has none: the same seed gives the same head.

    Raises:
        CoaloraError: the model cannot be found or read; its architecture is none for the task; its checkpoint lacks
            weights other than the task head's (they would be random), or has a head for other classes.
    """
    device = device or default_device()
    options: dict = {"num_labels": num_labels} if task == "classification" and num_labels is not None else {}
    # A checkpoint without a task head is the ordinary case here; the report about its "missing" keys is noise.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    torch.manual_seed(seed)
    try:
        with _known(name_or_path, task):
            model, info = _AUTO[task].from_pretrained(
                str(name_or_path),
                use_safetensors=True,
                output_loading_info=True,
                dtype=dtype or default_dtype(device),
                trust_remote_code=trust_remote_code,
                **options,
            )
    except RuntimeError as error:  # transformers' word for tensors of other shapes
        raise CoaloraError(
            f"The tensors of {name_or_path} have other shapes than a model with num_labels {num_labels}",
            remedy="Set benchmark.num_labels to the number of classes of the checkpoint's head",
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    _check_causal(model.config, task)
    _check_complete(model, info["missing_keys"], task, name_or_path)
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
    with _known(name_or_path, "either task"):
        return AutoConfig.from_pretrained(
            str(name_or_path), revision=revision or "main", trust_remote_code=trust_remote_code
        )


def load_tokenizer(name_or_path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (the end-of-text token where it has none).

    Raises:
        CoaloraError: there is no such model, or it comes without a tokenizer.
    """
    try:
        with _known(name_or_path, "either task"):
            tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code)
    except (TypeError, ImportError):  # of transformers 4 where a folder has no tokenizer
        tokenizer = None
    # transformers 5 makes up a tokenizer of special tokens alone there: every text would be unknown.
    if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise CoaloraError(
            f"{name_or_path} has no tokenizer",
            remedy="Save the tokenizer to the model's folder with tokenizer.save_pretrained",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def meta_model(config: PretrainedConfig, task: Task, *, num_labels: int | None = None) -> PreTrainedModel:
    """The architecture without weights: names and shapes for checks that must cost nothing.

    Raises:
        CoaloraError: the architecture is none for the task.
    """
    _check_causal(config, task)
    if task == "classification" and num_labels is not None:
        config = copy.deepcopy(config)
        config.num_labels = num_labels
    with _known(config.model_type, task), torch.device("meta"):
        return _AUTO[task].from_config(config)


def _check_causal(config: PretrainedConfig, task: Task) -> None:
    # transformers makes a language model of an encoder, too: one that sees the tokens which it predicts.
    bidirectional = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if task == "language-modeling" and bidirectional:
        raise CoaloraError(
            f"Architecture {config.model_type!r} sees the tokens that it would have to predict",
            remedy="Set benchmark.task to classification, or choose a causal decoder such as llama or qwen2",
        )


def _check_complete(model: PreTrainedModel, missing: Iterable[str], task: Task, name_or_path: str | Path) -> None:
    body = model.base_model_prefix + "."
    # A pooler counts as part of the head: masked language models are published without one.
    head = [k for k in missing if task == "classification" and (not k.startswith(body) or ".pooler." in k)]
    if lost := sorted(set(missing) - set(head)):
        raise CoaloraError(
            f"{name_or_path} is without {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''} ({len(lost)} missing)",
            remedy="Set model.name_or_path to a complete checkpoint of this architecture",
        )


@contextmanager
def _known(name: str | Path, task: str) -> Iterator[None]:
    """Refusals of transformers and the hub in words that say what to do."""
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, ValueError) and not isinstance(error, HFValidationError):
            raise CoaloraError(
                f"transformers has no architecture of {name} for {task} ({reason})",
                remedy="Choose another model.name_or_path or benchmark.task: for example llama for language-modeling",
            ) from error
        raise CoaloraError(
            f"There is no base model {name} ({reason})",
            remedy="Set model.name_or_path to a hub id, or to a local folder with config.json and weights in "
            "safetensors",
        ) from error
