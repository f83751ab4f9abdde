"""Adapter in integers of 8 or 4 bits: LoRA pairs at about half or a quarter of their 16-bit size.

A (r, in) and the transpose of B (out, r) are cut into groups along their long side (scheme `int`, to nearest): 128 with
a scale for 8 bits, 32 with scale and zero point for 4; docs/results.md has what it costs. A power of two goes from A to
B first, so that both are as large: B alone is often too small for fp16's normal numbers, and the product stays as it
is. Heads are stored in float16. Stock PEFT reads floating tensors only, so the file has another name than the one that
PEFT looks for: it refuses the folder, and does not take codes for weights. `coalora.load_adapted` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from coalora.errors import CoaloraError
from coalora.quant.integer.scheme import IntChoice, IntScheme

COMPACT = "adapter_integers.safetensors"
CHOICES = {
    torch.int8: IntChoice(bits=8, group_size=128, mode="sym"),
    torch.int4: IntChoice(bits=4, group_size=32, mode="asym"),  # type: ignore[attr-defined]
}
_SCHEME = IntScheme()


def pack_adapter(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """An adapter's pairs as codes, scales and zero points, `<PEFT's name>.codes` and so on; heads as float16.

    Example:
        >>> from coalora.export.compact import pack_adapter
        >>> pair = {"layer.lora_A.weight": torch.ones(4, 32), "layer.lora_B.weight": torch.ones(32, 4)}
        >>> sorted(pack_adapter(pair, torch.int8))[:2]
        ['layer.lora_A.weight.codes', 'layer.lora_A.weight.scales']
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _is_factor(name):
            factor = _along(name, tensor.float() * _share(name, tensors))
            parts = _SCHEME.quantize_packed(factor, CHOICES[dtype])
            packed |= {f"{name}.{part}": value for part, value in parts.items()}
        else:
            packed[name] = tensor.half() if tensor.is_floating_point() else tensor
    return packed


def packed_like(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors on the meta device of the sizes that `pack_adapter` makes of `tensors`, which may lie there, too."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        size = tensor.numel() * 2
        if _is_factor(name):
            made |= {f"{name}.{part}": torch.empty(0, device="meta") for part in ("scales", "zero_points")}
            size, name = _SCHEME.packed_nbytes(CHOICES[dtype], _along(name, tensor).shape), f"{name}.codes"
        made[name] = torch.empty(size, dtype=torch.uint8, device="meta")
    return made


def load_compact(base: PreTrainedModel, folder: str, stored: Mapping[str, Tensor], dtype: torch.dtype) -> PeftModel:
    """`base` with the adapter whose config lies in `folder` and whose tensors are `stored`.

    Raises:
        CoaloraError: a tensor is missing, unknown, or of another size than its layer asks for.
    """
    config = LoraConfig.from_pretrained(folder)
    named, config.base_model_name_or_path = config.base_model_name_or_path, None  # PEFT would warn of another base
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = named
    # Embeddings are never trained here; asked to find that out, PEFT would look for the base on the hub.
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    found: dict[str, Tensor] = {}
    known: set[str] = set()
    for name, own in wanted.items():
        if _is_factor(name):
            parts = {key.removeprefix(f"{name}."): t for key, t in stored.items() if key.startswith(f"{name}.")}
            shape = tuple(_along(name, own).shape)
            factor = _SCHEME.dequantize(_SCHEME.unpack(parts, CHOICES[dtype], shape), CHOICES[dtype], shape)
            found[name] = _along(name, factor)
            known |= {f"{name}.{part}" for part in parts}
        elif name in stored and stored[name].shape == own.shape:
            found[name] = stored[name]
            known.add(name)
    if wrong := sorted((wanted.keys() - found.keys()) | (stored.keys() - known)):
        raise CoaloraError(
            f"{', '.join(wrong[:3])} of the adapter {folder} are missing, unknown or of another size "
            f"({len(wrong)} tensors in all)",
            remedy="Export the adapter again",
        )
    set_peft_model_state_dict(model, found)
    return model.eval()


def _is_factor(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def _share(name: str, tensors: Mapping[str, Tensor]) -> float:
    """Power of two that a factor is multiplied with, so that the two of a pair are as large; 1 where one is zero."""
    sides = (name.replace(f".lora_{other}.", f".lora_{side}.") for side, other in (("A", "B"), ("B", "A")))
    most_A, most_B = (float(tensors[side].abs().max()) for side in sides)
    if not most_A * most_B:
        return 1.0
    power = round(math.log2(most_B / most_A) / 2)
    return 2.0 ** (power if ".lora_A." in name else -power)


def _along(name: str, factor: Tensor) -> Tensor:
    """A factor with its long side along the rows, and back again."""
    return factor.T.contiguous() if name.endswith(".lora_B.weight") else factor
