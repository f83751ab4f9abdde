"""Export format `gptq`: what GPTQModel opens, and with one choice for all layers transformers and auto-gptq's readers.

    base/      model.safetensors, quantize_config.json, and the same as `quantization_config` in config.json, with
               GPTQModel's `dynamic` for layers whose choice is not the commonest, or that are not quantized
    adapter/   PEFT adapter, which PEFT puts onto GPTQModel's layers

A layer stores `qweight` int32 (in b / 32, out), `qzeros` int32 (G, out b / 32), `scales` float16 (G, out) and `g_idx`
int32 (in,): codes are one LSB-first stream a column, which is the scheme's own stream of a row. Readers compute
(code - zero) scale in float16. Format `gptq` holds zero - 1, which wraps at zero 0; symmetric choices have none, and
are written so. With zero points it is `gptq_v2`, which holds zero itself. Columns stay in order (`desc_act` false).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from coalora.calibrate.tables import CalibrationTables
from coalora.errors import CoaloraError
from coalora.export.formats import ExportFormat, ExportSource
from coalora.export.integer import Choices, Integers, check_architecture, check_integers, words, write_integers
from coalora.files import write_json
from coalora.models.targets import TargetLayer
from coalora.quant.packing import pack_codes, unpack_codes
from coalora.quant.scheme import Choice
from coalora.recipes import Task

NAME, CONFIG = "gptq", "quantize_config.json"
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # that were run


class GPTQFormat(ExportFormat):
    """See the module docstring."""

    folder = NAME
    keeps_model = True

    def check(self, tables: CalibrationTables, config: PretrainedConfig, task: Task) -> None:
        check_architecture(config, NAME, ARCHITECTURES)
        check_integers(tables, task, NAME, schemes=("int", "gptq"))
        for layer in tables.layers:
            if any(size % 32 for size in layer.shape):
                raise CoaloraError(
                    f"{layer.name} is {layer.shape[0]} x {layer.shape[1]}, and format {NAME} packs 32 codes together",
                    remedy=f"Leave it out of target_modules, or export without {NAME}",
                )

    def write(self, folder: Path, source: ExportSource) -> None:
        model = source.load_model()
        zeros = any(with_zeros(source.tables.space.choices[int(k)]) for k in source.adapted.choices)

        def settings(config: dict[str, Any], choices: Choices) -> dict[str, Any]:
            found = quantization_config(choices, plain_layers(model, choices), zeros=zeros)
            write_json(folder / "base" / CONFIG, found)
            return {"dtype": "float16", "quantization_config": found}

        write_integers(
            folder / "base",
            replace(source, load_model=lambda: model),
            tensors_of=partial(layer_tensors, zeros=zeros),
            settings=settings,
            library="pt",
        )
        source.adapted.save_pretrained(folder / "adapter", dtype=source.floating_dtype)

    def start_line(self, export: Path) -> str:
        base, adapter = (export / self.folder / part for part in ("base", "adapter"))
        return (
            f'base = gptqmodel.GPTQModel.load("{base}", dtype=torch.float16)\n'
            f'model = peft.PeftModel.from_pretrained(base.model, "{adapter}")'
        )


def with_zeros(choice: Choice) -> bool:
    """Whether a choice of scheme `int` or `gptq` stores zero points."""
    return getattr(choice, "mode", "sym") == "asym" or not getattr(choice, "sym", True)


def plain_layers(model: PreTrainedModel, choices: Choices) -> list[str]:
    """Names of the linear layers that stay as they are, the output's aside."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name not in choices
    ]


def layer_tensors(layer: TargetLayer, choice: Integers, packed: Mapping[str, Tensor], *, zeros: bool) -> dict[str, Any]:
    """Tensors of a layer, from what its scheme packs of it.

    Args:
        zeros: some layer has zero points: all are stored as `gptq_v2` has them.
    """
    n_out, n_in = layer.shape
    scales = packed["scales"].view(n_out, -1)
    if with_zeros(choice):
        stored = packed["zero_points" if "zero_points" in packed else "zeros"]
        points = unpack_codes(stored, choice.bits, scales.numel()).view(scales.shape)
    else:
        points = torch.full(scales.shape, 2 ** (choice.bits - 1), dtype=torch.uint8)
    if not zeros:
        points = points - 1
    return {
        "qweight": words(packed, layer).T.contiguous(),
        "qzeros": pack_codes(points.T.reshape(-1), choice.bits).view(torch.int32).view(scales.shape[1], -1),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(n_in, dtype=torch.int32) // choice.group_size,
    }


def quantization_config(choices: Choices, plain: list[str], *, zeros: bool) -> dict[str, Any]:
    """Contents of `quantize_config.json`: the commonest choice, and `dynamic` for layers that have another or none."""

    def of(choice: Integers) -> dict[str, Any]:
        return {"bits": choice.bits, "group_size": choice.group_size, "sym": not with_zeros(choice)}

    usual = Counter(choices.values()).most_common(1)[0][0]
    dynamic = {f"+:^{_literal(name)}$": of(own) for name, own in choices.items() if own != usual}
    dynamic |= {f"-:^{_literal(name)}$": {} for name in plain}
    return {
        **of(usual),
        "desc_act": False,
        "lm_head": False,
        "quant_method": NAME,
        "checkpoint_format": "gptq_v2" if zeros else "gptq",
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _literal(name: str) -> str:
    """A module's name as a regular expression."""
    return name.replace(".", "\\.")
