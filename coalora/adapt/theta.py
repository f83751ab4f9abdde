"""The configuration-aware model theta: from the choices of all layers to all adjustments U in one batched call.

CoA-LoRA (arXiv 2509.25214), section 3: Q_l joins the embeddings of the fields of the choice c_l, of the layer's kind
and of its block; U_l = theta(Q_l) is r x r. LayerNorm, Linear(d, 128), SiLU, Linear(128, r*r): with the five fields of
the NF scheme and embeddings of 8, d = 56 and theta has 0.54 M parameters at r = 64.

Deviation: the last layer starts at exactly zero (the paper: near zero), so that U = 0 and training starts as
plain Shared-LoRA; its gradient is non-zero from the first step on, because the hidden activations are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from coalora.models.targets import TargetLayer
from coalora.quant.space import ChoiceSpace


class ConfigurationAwareModel(nn.Module):
    """theta.

    Args:
        space: the K choices with their F fields.
        layers: the N target layers (their kinds and blocks are embedded).
        r: LoRA rank.
        embedding_dim: size of each of the F + 2 embeddings.
        hidden_dim: width of the hidden layer.
        adjusted: (K,) the choices with an adjustment; U = 0 for the others. None: all.
    """

    choice_fields: Tensor
    layer_fields: Tensor
    adjusted: Tensor | None

    def __init__(
        self,
        space: ChoiceSpace,
        layers: Sequence[TargetLayer],
        r: int,
        *,
        embedding_dim: int = 8,
        hidden_dim: int = 128,
        adjusted: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        self.r = r
        kinds = sorted({layer.kind for layer in layers})
        blocks = sorted({layer.block for layer in layers})
        sizes = [*space.field_sizes, len(kinds), len(blocks)]
        # One table for all fields: a single gather instead of one for each field.
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        own = np.array([[kinds.index(x.kind), blocks.index(x.block)] for x in layers]) + offsets[-2:]
        self.register_buffer("choice_fields", torch.as_tensor(space.fields + offsets[:-2]), persistent=False)
        self.register_buffer("layer_fields", torch.as_tensor(own), persistent=False)
        mask = None if adjusted is None or all(adjusted) else torch.tensor(adjusted, dtype=torch.float32)
        self.register_buffer("adjusted", mask, persistent=False)
        self.embedding = nn.Embedding(sum(sizes), embedding_dim)
        d = embedding_dim * len(sizes)
        last = nn.Linear(hidden_dim, r * r)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, hidden_dim), nn.SiLU(), last)

    def forward(self, configuration: Tensor) -> Tensor:
        """U (N, r, r) for a configuration: choice indices (N,), int64."""
        fields = torch.cat([self.choice_fields[configuration], self.layer_fields], dim=-1)
        out = self.layers(self.embedding(fields).flatten(-2))
        if self.adjusted is not None:
            out = out * self.adjusted[configuration][..., None]
        return out.unflatten(-1, (self.r, self.r))
