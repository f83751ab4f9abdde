"""Base models in GGUF, llama.cpp's format: turned once into what every other base model is, a folder of safetensors.

transformers reads the file, through the package `gguf`. What it holds in fewer bits is dequantized: such weights lie on
a grid already, and a choice that finds the same grid again (int in groups of 32 for Q4_0 and Q4_1) loses nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from coalora.errors import CoaloraError
from coalora.models.files import save_model


def unpack_gguf(file: Path, folder: Path) -> None:
    """Write weights (float16), config and tokenizer of a GGUF file to a folder, as `save_pretrained` does, and a model
    card with its licence where the file names one (`general.license`).

    Args:
        file: the GGUF file (`coalora.models.files.gguf_path`).
        folder: exists already.

    Raises:
        CoaloraError: the package `gguf` is absent; a damaged file; an architecture that transformers does not read from
            GGUF; weights beyond float16's range.
    """
    options: dict[str, Any] = {"dtype": torch.float16}
    if hasattr(transformers, "GgufConfig"):  # transformers 4 dequantizes without being asked
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _parsed_once():
        tokenizer = _read(file, AutoTokenizer.from_pretrained)
        model = _read(file, AutoModelForCausalLM.from_pretrained, **options)
        licence = _licence(file)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise CoaloraError(f"{file} has weights beyond float16's range", remedy="Take the model in safetensors")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with redirect_stderr(StringIO()):  # bars
        save_model(model, tokenizer, folder)
    if licence:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\nUnpacked from {file.name}.\n", "utf-8")


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Within, a file is parsed once: transformers does so again for config, tokenizer and weights, each time with the
    whole vocabulary, and makes a map of tensor names for every module. That is most of the time."""
    if find_spec("gguf") is None:  # `_read` says so
        yield
        return
    import gguf

    with patch.multiple(gguf, GGUFReader=cache(gguf.GGUFReader), get_tensor_name_map=cache(gguf.get_tensor_name_map)):
        yield


def _licence(file: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(str(file)).fields.get("general.license")
    return None if field is None else str(field.contents())


def _read(file: Path, load: Callable[..., Any], **options: Any) -> Any:
    """What a loader of transformers makes of the file, without its bars, its faults in words that say what to do."""
    if find_spec("gguf") is None:
        raise CoaloraError(
            f"{file.name} is a GGUF file, and the package gguf is not installed",
            remedy="pip install 'coalora[gguf]'",
        )
    try:
        with redirect_stderr(StringIO()):  # bars
            return load(str(file.parent), gguf_file=file.name, **options)
    except MemoryError:
        raise
    except Exception as error:  # of any kind, by what is wrong with the file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise CoaloraError(
            f"transformers cannot read the GGUF file {file} ({reason})",
            remedy="Download it again, or take the model in safetensors",
        ) from error
