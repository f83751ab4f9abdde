"""Export format `compressed-tensors`: what transformers, with that package, and vLLM open.

    base/      model.safetensors and a config.json whose `quantization_config` (pack-quantized) names each layer in the
               group of its choice; opened by plain `AutoModelForCausalLM.from_pretrained`
    adapter/   PEFT adapter; put on after a first forward pass, at which compressed-tensors unpacks the weights

A layer stores `weight_packed` int32 (out, in b / 32), `weight_scale` float16 (out, in / g), `weight_shape` int64 (2,).
Readers compute (code - 2^(b-1)) s, the scheme's own arithmetic, in the model's number type, after rounding s to it:
config.json asks for float16 or float32, where s is exact, and never for bfloat16.

Choices are symmetric: the format has zero points, packed, and compressed-tensors 0.20 makes transformers 5.23 look for
unpacked ones. Layers that vLLM multiplies as one (query, key and value, and gate and up) take one choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from coalora.calibrate.tables import CalibrationTables
from coalora.errors import CoaloraError
from coalora.export.formats import ExportFormat, ExportSource
from coalora.export.integer import Choices, check_integers, words, write_integers
from coalora.models.targets import TargetLayer, tied_groups
from coalora.quant.integer.scheme import IntChoice
from coalora.recipes import Task

NAME = "compressed-tensors"
_FORMAT = "pack-quantized"


class CompressedTensorsFormat(ExportFormat):
    """See the module docstring."""

    folder = NAME
    keeps_model = True

    def check(self, tables: CalibrationTables, config: PretrainedConfig, task: Task) -> None:
        check_integers(tables, task, NAME, mode="sym")
        if tables.tie == "fused":
            return
        for group in (groups := tied_groups(tables.layers, "fused")):
            rows = tables.allowed[groups == group]
            if len(rows) > 1 and not (rows.sum() == len(rows) and (rows == rows[0]).all()):
                names = [layer.name for layer, own in zip(tables.layers, groups, strict=True) if own == group]
                raise CoaloraError(
                    f"{', '.join(names)} may take different choices, and engines of format {NAME} multiply them as one",
                    remedy="Train with choices.tie: fused",
                )

    def write(self, folder: Path, source: ExportSource) -> None:
        dtype = "float16" if source.rest_dtype == torch.float16 else "float32"

        def settings(config: dict[str, Any], choices: Choices) -> dict[str, Any]:
            return {"dtype": dtype, "quantization_config": quantization_config(choices)}

        write_integers(folder / "base", source, tensors_of=layer_tensors, settings=settings, library="pt")
        source.adapted.save_pretrained(folder / "adapter", dtype=source.floating_dtype)

    def start_line(self, export: Path) -> str:
        base, adapter = (export / self.folder / part for part in ("base", "adapter"))
        return (
            f'base = transformers.AutoModelForCausalLM.from_pretrained("{base}")\n'
            "base(torch.zeros(1, 1, dtype=torch.long))  # compressed-tensors unpacks the weights at the first call\n"
            f'model = peft.PeftModel.from_pretrained(base, "{adapter}")'
        )


def layer_tensors(layer: TargetLayer, choice: IntChoice, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a layer, from what scheme `int` packs of it."""
    return {
        "weight_packed": words(packed, layer),
        "weight_scale": packed["scales"].view(layer.shape[0], -1),
        "weight_shape": torch.tensor(layer.shape),
    }


def quantization_config(choices: Choices) -> dict[str, Any]:
    """`quantization_config` of config.json: a group for each choice that occurs, with the exact names of its layers."""
    groups = {
        f"group_{index}": {
            "targets": [name for name, own in choices.items() if own == choice],
            "weights": {
                "num_bits": choice.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": choice.group_size,
                "dynamic": False,
            },
            "format": _FORMAT,
        }
        for index, choice in enumerate(dict.fromkeys(choices.values()))
    }
    return {
        "quant_method": NAME,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }
