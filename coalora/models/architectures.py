"""Registry of architectures: the linear layers of a transformer block that are quantized and adapted by default.

A name is the `model_type` of a transformers config. Models of any other architecture take ``all-linear``
(`coalora.models.targets`), so an entry is worth having where names of kinds should be stable and short, or where some
linear layers should be left alone. Other packages add architectures in the entry point group ``coalora.architectures``.
"""

from __future__ import annotations

from dataclasses import dataclass

from coalora.registry import Registry


@dataclass(frozen=True)
class Architecture:
    """Name suffixes of the target layers; the longest that matches is a layer's kind."""

    target_modules: tuple[str, ...]


_ENCODER = Architecture(
    (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
)
_DECODER = Architecture(
    (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
)
ARCHITECTURES: Registry[Architecture] = Registry(
    "architecture",
    "coalora.architectures",
    "coalora.models.architectures:Architecture",
    {
        "bert": _ENCODER,
        "roberta": _ENCODER,
        "llama": _DECODER,
        "mistral": _DECODER,
        "qwen2": _DECODER,
        "qwen3": _DECODER,
        "gpt2": Architecture(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    },
)
