"""Base models by hub id or local path, or their architecture alone on the meta device."""

from __future__ import annotations

import copy
import re
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
from transformers.utils import logging as transformers_logging

from coalora.errors import CoaloraError
from coalora.recipes import RuntimeRecipe, Task

R = TypeVar("R", bound=RuntimeRecipe)

_AUTO = {"classification": AutoModelForSequenceClassification, "language-modeling": AutoModelForCausalLM}


def resolved(runtime: R) -> R:
    """The same with `auto` replaced by what this machine has: results of CPU and GPU are kept apart.

    Raises:
        CoaloraError: a GPU or a CUDA graph is asked for, and there is no GPU.
    """
    device, dtype = runtime.device, runtime.dtype
    if device == "cuda" and not torch.cuda.is_available():
        raise CoaloraError("runtime.device is cuda, and torch sees no GPU here", remedy="Set runtime.device=auto")
    if device == "auto":
        device = "cuda" if default_device().type == "cuda" else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if default_dtype(torch.device(device)) is torch.bfloat16 else "float32"
    if dtype == "fast":
        dtype = "bfloat16" if device == "cuda" or multiplies_bfloat16() else "float32"
    if device == "cpu" and runtime.compile == "cuda-graph":
        raise CoaloraError(
            "runtime.compile is cuda-graph, and the run is on a CPU", remedy="Set runtime.compile to auto"
        )
    # On a GPU model and data decide.
    return replace(runtime, device=device, dtype=dtype, compile="none" if device == "cpu" else runtime.compile)


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 matrix products are many times slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether this CPU has products in bfloat16 (AMX or AVX512-BF16); others take many times as long as for float32."""
    known = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in known)


def load_model(
    name_or_path: str | Path,
    task: Task,
    *,
    num_labels: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """A base model in eval mode, its parameters frozen.

    Args:
        seed: decides the weights of a classification model that its checkpoint lacks: the same seed gives the same.
        pad_token_id: what fills the rows of batches; a decoder's classifier finds the last token by it.

    Raises:
        CoaloraError: the model cannot be found or read, or is quantized already; its architecture is none for the task;
            its checkpoint lacks weights other than the task head's (they would be random), or has a head for other
            classes; it counts positions from another padding token.
    """
    load_config(name_or_path, trust_remote_code=trust_remote_code)
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
    except CoaloraError as error:
        if isinstance(error.__cause__, RuntimeError):  # transformers' word for tensors of other shapes
            raise CoaloraError(
                f"The tensors of {name_or_path} have other shapes than a model with num_labels {num_labels}",
                remedy="Set benchmark.num_labels to the number of classes of the checkpoint's head",
            ) from error.__cause__
        raise
    finally:
        transformers_logging.set_verbosity(verbosity)
    model = model.to(device).eval()
    if task == "language-modeling":
        check_causal(model)
    _check_complete(model, info["missing_keys"], task, name_or_path)
    model.coalora_missing = sorted(info["missing_keys"])
    if task == "classification" and model.config.problem_type is not None:
        # Training asks the model for its loss, evaluation computes it: a checkpoint's own kind of problem may differ.
        many = model.config.num_labels > 1
        model.config.problem_type = "single_label_classification" if many else "regression"
    if pad_token_id is not None:
        check_padding(model, pad_token_id)
        model.config.pad_token_id = pad_token_id
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def load_config(
    name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The architecture's config, from a local folder or the hub.

    Raises:
        CoaloraError: there is no such model.
    """
    with _known(name_or_path, "either task"):
        config = AutoConfig.from_pretrained(
            str(name_or_path), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    if quantized := getattr(config, "quantization_config", None):
        fields = quantized if isinstance(quantized, dict) else vars(quantized)
        raise CoaloraError(
            f"{name_or_path} is quantized already ({fields.get('quant_method', 'quantization_config in its config')})",
            remedy="Set model.name_or_path to the checkpoint in 16 or 32 bits that it was made from",
        )
    return config


# transformers 4 finds out that a folder has none by the package that it would convert one with.
_OF_TOKENIZERS = re.compile("token|vocab|merges|spiece|sentencepiece|spm|bpe")


def _no_tokenizer(name_or_path: Path | str) -> CoaloraError:
    return CoaloraError(
        f"{name_or_path} has no tokenizer",
        remedy="Save the tokenizer to the model's folder with tokenizer.save_pretrained",
    )


def load_tokenizer(
    name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer; what it pads with lies inside the model's embedding.

    That is its padding token, else its end-of-text token, else what the model's config names. `pad_token` is None where
    there is no such token.

    Raises:
        CoaloraError: there is no such model, or it comes without a tokenizer, or with a damaged one.
    """
    config = load_config(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name_or_path), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # of any kind, by the file that is damaged or missing
        if Path(name_or_path).is_dir() and not any(_OF_TOKENIZERS.search(p.name) for p in Path(name_or_path).iterdir()):
            raise _no_tokenizer(name_or_path) from error
        raise CoaloraError(
            f"The tokenizer of {name_or_path} cannot be read ({_reason(error)})",
            remedy="Save it to the model's folder with tokenizer.save_pretrained, or download its files again (a file "
            "of git-lfs alone is a pointer to it)",
        ) from error
    # transformers makes up a tokenizer of special tokens alone where there is none: every text would be unknown.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise _no_tokenizer(name_or_path)
    vocab_size = getattr(config.get_text_config(), "vocab_size", len(tokenizer))
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, getattr(config, "pad_token_id", None))
    found = next((i for i in ids if i is not None and 0 <= i < min(vocab_size, len(tokenizer))), None)
    if found != tokenizer.pad_token_id:
        tokenizer.pad_token = None if found is None else tokenizer.convert_ids_to_tokens(found)
    return tokenizer


def meta_model(
    config: PretrainedConfig, task: Task, *, num_labels: int | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The architecture without weights: names and shapes for checks that must cost nothing.

    Raises:
        CoaloraError: the architecture is none for the task.
    """
    if task == "classification" and num_labels is not None:
        config = copy.deepcopy(config)
        config.num_labels = num_labels
    with _known(config.model_type, task), torch.device("meta"):
        return _AUTO[task].from_config(config, trust_remote_code=trust_remote_code)


def check_padding(model: PreTrainedModel, pad_token_id: int) -> None:
    """Refuse a model that counts positions from behind another padding token than that which fills rows (RoBERTa)."""
    for name, module in model.named_modules():
        own = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and own not in (None, pad_token_id):
            raise CoaloraError(
                f"The model counts positions from behind its padding token {own}, and its tokenizer pads with "
                f"{pad_token_id}",
                remedy="Correct pad_token_id in config.json, or pad_token in tokenizer_config.json",
            )


def embedded(model: PreTrainedModel) -> int:
    """Number of tokens that the model embeds."""
    return model.get_input_embeddings().get_parameter("weight").shape[0]


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Refuse a language model that sees the tokens which it predicts: its first output follows the last token.

    transformers makes a language model of bidirectional encoders, too. Numbers of random draws are left as they are.
    """
    device = next(model.parameters()).device
    vocab_size = embedded(model)
    ids = (vocab_size - 1 - torch.arange(8, device=device) % vocab_size)[None]  # special tokens have low numbers
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    first, second = (model(input_ids=row).logits[0, 0].float() for row in (ids, other))
    # Routing to experts, and sums in 16 bits, may round otherwise; what attention brings is far more.
    if (first - second).norm() > (1e-4 if model.dtype == torch.float32 else 3e-2) * first.norm():
        raise CoaloraError(
            f"Architecture {model.config.model_type!r} sees the tokens that it would have to predict",
            remedy="Set benchmark.task to classification, or choose a causal decoder such as llama or qwen2",
        )


def small_model(config: PretrainedConfig, task: Task) -> PreTrainedModel | None:
    """The architecture with one block, few tokens and random weights; None where it cannot be cut down so."""
    small = copy.deepcopy(config)
    try:
        pad = getattr(config, "pad_token_id", None)
        small.update({"num_hidden_layers": 1, "vocab_size": 64, "pad_token_id": None if pad is None else pad % 8})
        size = sum(p.numel() for p in meta_model(small, task).parameters())
        if size > 50_000_000:
            return None
        with torch.random.fork_rng(devices=[]):
            return _AUTO[task].from_config(small).float().eval()
    except Exception:  # of any kind, by the architecture: the whole model will tell
        return None


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
    except (MemoryError, torch.OutOfMemoryError, CoaloraError):
        raise
    except (OSError, SafetensorError, HFValidationError) as error:
        raise CoaloraError(
            f"There is no base model {name} ({_reason(error)})",
            remedy="Set model.name_or_path to a hub id, or to a local folder with config.json and weights in "
            "safetensors",
        ) from error
    except ValueError as error:
        raise CoaloraError(
            f"transformers has no architecture of {name} for {task} ({_reason(error)})",
            remedy="Choose another model.name_or_path or benchmark.task: for example llama for language-modeling",
        ) from error
    except Exception as error:  # of any kind, by what config.json holds
        raise CoaloraError(
            f"transformers makes no model of {name} for {task} ({type(error).__name__}: {_reason(error)})",
            remedy="Correct its config.json; without flash attention installed, leave attn_implementation out",
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
