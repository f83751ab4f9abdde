"""Export format `mlx`: what mlx-lm, and LM Studio with it, open on Apple's processors.

    base/      model.safetensors, and a config.json whose `quantization` has a dictionary for each layer
    adapter/   adapters.safetensors and adapter_config.json of mlx-lm

A layer stores `weight` uint32 (out, in b / 32), `scales` float16 and `biases` (out, in / g) of w = s code + bias. The
bias is -z s, exact in float16 without zero points and in float32 with them: rounded to float16 it shifts all weights of
a group alike, and features of large mean made half a nat of that (SmolLM2-135M at 2.5 bits). Other tensors keep the
checkpoint's number type. MLX computes in the type that holds all: float32, or float16 where there is nothing else.

LoRA: `lora_a` (in, r), `lora_b` (r, out), one scale and one rank for all layers: smaller ranks are padded with zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig

from coalora.calibrate.tables import CalibrationTables
from coalora.errors import CoaloraError
from coalora.export.adapter import peft_key
from coalora.export.formats import ExportFormat, ExportSource
from coalora.export.integer import Choices, check_architecture, check_integers, words, write_integers
from coalora.files import write_json, write_tensors
from coalora.models.targets import TargetLayer
from coalora.quant.integer.scheme import IntChoice
from coalora.quant.packing import unpack_codes
from coalora.recipes import Task

NAME = "mlx"
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # whose modules have the same names in both


class MlxFormat(ExportFormat):
    """See the module docstring."""

    folder = NAME
    keeps_model = True

    def check(self, tables: CalibrationTables, config: PretrainedConfig, task: Task) -> None:
        check_architecture(config, NAME, ARCHITECTURES)
        for key, value in {"hidden_act": "silu", "use_sliding_window": False}.items():
            if getattr(config, key, value) != value:
                raise CoaloraError(
                    f"{key} of the model is {getattr(config, key)!r}, and mlx-lm computes with {value!r}",
                    remedy=f"Export without {NAME}",
                )
        check_integers(tables, task, NAME)

    def write(self, folder: Path, source: ExportSource) -> None:
        write_integers(folder / "base", source, tensors_of=layer_tensors, settings=model_settings, library="mlx")
        write_adapter(folder / "adapter", source)

    def start_line(self, export: Path) -> str:
        base, adapter = (export / self.folder / part for part in ("base", "adapter"))
        return f'mlx_lm.generate --model {base} --adapter-path {adapter} --prompt "..."'


def layer_tensors(layer: TargetLayer, choice: IntChoice, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a layer, from what scheme `int` packs of it."""
    scales = packed["scales"].view(layer.shape[0], -1)
    if choice.mode == "sym":
        biases = scales * -(2 ** (choice.bits - 1))
    else:
        zeros = unpack_codes(packed["zero_points"], choice.bits, scales.numel()).view(scales.shape)
        biases = scales.float() * -zeros.float()
    return {"weight": words(packed, layer).view(torch.uint32), "scales": scales, "biases": biases}


def model_settings(config: dict[str, Any], choices: Choices) -> dict[str, Any]:
    """`quantization` of config.json, by layer."""
    layers = {name: {"group_size": c.group_size, "bits": c.bits} for name, c in choices.items()}
    usual = Counter((c.group_size, c.bits) for c in choices.values()).most_common(1)[0][0]
    return {"quantization": {"group_size": usual[0], "bits": usual[1], **layers}}


def write_adapter(folder: Path, source: ExportSource) -> None:
    """Write mlx-lm's adapter folder."""
    adapted, layers = source.adapted, source.tables.layers
    folder.mkdir(parents=True)
    pairs = {
        layer.name: tuple(adapted.tensors[peft_key(f"{layer.name}.lora_{side}.weight")] for side in "AB")
        for layer in layers
    }
    rank = max(len(A) for A, _ in pairs.values())
    tensors = {}
    for name, (A, B) in pairs.items():
        tensors[f"{name}.lora_a"] = pad(A, (0, 0, 0, rank - len(A))).T
        tensors[f"{name}.lora_b"] = pad(B, (0, rank - len(A))).T
    write_tensors(folder / "adapters.safetensors", tensors, dtype=source.floating_dtype, format="mlx")
    write_json(
        folder / "adapter_config.json",
        {
            "fine_tune_type": "lora",
            "num_layers": source.config.num_hidden_layers,
            "lora_parameters": {
                "keys": [layer.name for layer in layers],
                "rank": rank,
                "scale": adapted.config.lora_alpha / adapted.config.r,
                "dropout": 0.0,
            },
        },
    )
