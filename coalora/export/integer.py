"""Integers of schemes `int` and `gptq` as the files of other engines hold them.

compressed-tensors, MLX and GPTQModel store what the scheme packs, in other shapes: the codes of a row are one LSB-first
bit stream in 32-bit words, and since groups (a multiple of 32) divide the rows, that is the scheme's own, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from coalora.calibrate.tables import CalibrationTables
from coalora.errors import CoaloraError
from coalora.export.base import CONFIGURATION, inference_config, packed_layers
from coalora.export.formats import ExportSource
from coalora.files import file_digests, write_json, write_tensors
from coalora.models.targets import TargetLayer, other_tensors
from coalora.quant.gptq.scheme import GPTQChoice
from coalora.quant.integer.scheme import IntChoice
from coalora.recipes import Task

MODEL = "model.safetensors"
Integers = IntChoice | GPTQChoice
Choices = Mapping[str, Any]  # of Integers; of IntChoice alone where the format holds no others


def check_architecture(config: PretrainedConfig, name: str, known: Sequence[str]) -> None:
    """Look whether a format holds a model's architecture.

    Args:
        name: of the format, for the error.
        known: types of models that it was run with.

    Raises:
        CoaloraError: another type.
    """
    if config.model_type not in known:
        raise CoaloraError(
            f"Format {name} is not known to hold the architecture {config.model_type}",
            remedy=f"Export without it, or train one of {', '.join(known)}",
        )


def check_integers(
    tables: CalibrationTables, task: Task, name: str, *, mode: str | None = None, schemes: Sequence[str] = ("int",)
) -> None:
    """Look whether all choices of all layers are integers in groups that divide the rows of an `nn.Linear`.

    Args:
        name: of the format, for the error.
        mode: the only one that the format holds; None: any.
        schemes: that it holds, `int` first.

    Raises:
        CoaloraError: names the first layer that may take something else, and what to train with.
    """
    if task != "language-modeling":
        raise CoaloraError(
            f"Format {name} holds language models, and the task is {task}", remedy=f"Export without {name}"
        )
    for layer, may in zip(tables.layers, tables.allowed, strict=True):
        if layer.transposed:
            raise CoaloraError(
                f"{layer.name} is a Conv1D, and format {name} holds the weights of Linear layers",
                remedy=f"Export without {name}",
            )
        for k in np.flatnonzero(may):
            scheme, choice = tables.space.scheme_of(int(k)), tables.space.choices[int(k)]
            if scheme.name not in schemes:
                raise CoaloraError(
                    f"{layer.name} may take {choice} of scheme {scheme.name}, and format {name} holds integers",
                    remedy=f"Train with choices.scheme: {' or '.join(schemes)}",
                )
            own = cast(Any, choice)
            if mode and own.mode != mode:
                raise CoaloraError(
                    f"{layer.name} may take {choice}, and format {name} holds mode {mode}",
                    remedy=f"Train with choices.allow: {{mode: [{mode}]}}",
                )
            if layer.shape[1] % (size := own.group_size):
                sizes = cast(tuple[int, ...], IntChoice.field_values["group_size"])
                fits = [g for g in sizes if all(other.shape[1] % g == 0 for other in tables.layers)]
                raise CoaloraError(
                    f"{layer.name} may take {choice}, and format {name} has no group shorter than others: rows of "
                    f"{layer.shape[1]} weights are no multiple of {size}",
                    remedy=f"Train with choices.allow: {{group_size: {fits}}}" if fits else f"Export without {name}",
                )


def words(packed: Mapping[str, Tensor], layer: TargetLayer) -> Tensor:
    """int32 (out, in * bits / 32): the code stream of each row."""
    return packed["codes"].view(torch.int32).view(layer.shape[0], -1)


def write_integers(
    folder: Path,
    source: ExportSource,
    *,
    tensors_of: Callable[[TargetLayer, Any, Mapping[str, Tensor]], Mapping[str, Tensor]],
    settings: Callable[[dict[str, Any], Choices], Mapping[str, Any]],
    library: str,
) -> None:
    """Write a folder that an engine loads as a model: tensors, config, tokenizer, and whose configuration they are.

    Args:
        tensors_of: a layer's tensors in the format by their own names, from its choice and what the scheme packs.
        settings: entries that the format adds to the config (a dictionary), or changes, from every layer's choice.
        library: whose tensors these are, as metadata of the file tell.
    """
    model = source.load_model()
    layers = packed_layers(model, source.tables, source.adapted.choices, source.load_statistics())
    folder.mkdir(parents=True)
    choices: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for layer, choice, packed in layers:
        choices[layer.name] = choice
        made = tensors_of(layer, choice, packed)
        tensors |= {f"{layer.name}.{part}": tensor for part, tensor in made.items()}
    tensors |= other_tensors(model, list(choices), source.rest_dtype)
    sha256 = write_tensors(folder / MODEL, tensors, format=library)
    config = inference_config(model).to_dict() | {"architectures": [type(model).__name__]}
    for key in ("_name_or_path", "quantization_config"):  # where the checkpoint lay, and what it was stored in
        config.pop(key, None)
    write_json(folder / "config.json", config | _older_rope(config) | dict(settings(config, choices)))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    source.load_tokenizer().save_pretrained(folder)
    files = {MODEL: sha256, **file_digests(folder, ["config.json"])}
    write_json(folder / CONFIGURATION, source.adapted.content | {"files": files})


def _older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE where mlx-lm and transformers before 5 (with auto-gptq, or in vLLM) look for it: they would take a theta of
    10,000 else, and say nothing."""
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = rope.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}
