"""What the adapter is: ranks, scale, theta's widths, and which part of the rank is closed-form compensation."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from coalora.errors import CoaloraError
from coalora.models.targets import TargetLayer


@dataclass(frozen=True)
class AdapterRecipe:
    """The adapter's sizes.

    Attributes:
        r: total LoRA rank of a layer: trained part and compensation together.
        lora_alpha: LoRA's scale is s = lora_alpha / r, in every layer.
        lora_dropout: before lora_A, in training.
        theta: the choices that theta adjusts the pair to in method `coa`: `all`, `others` (those without an expert) or
            `none`. Elsewhere U = 0, and experts and compensation alone follow the choice.
        embedding_dim, hidden_dim: theta's widths.
        compensation_rank: the part of each layer's rank that is closed-form compensation of its choice, 0 for none
            (`coalora.adapt.compensation`).
        expert_bits: choices of at most so many bits have a term of their own beside the shared pair, 0 for none
            (`coalora.adapt.experts`).
        expert_start: where the experts start: `zero`, or the `compensation` of the first choice of their bits, to
            which the shared pair's lora_A is aligned. `auto`: compensation for language models, which then lose least
            to quantization, and zero for classifiers, which have more to learn than to make good.
        rank_pattern: total rank of layers whose name or kind matches a glob, instead of r; the last match wins.
    """

    r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    theta: Literal["all", "others", "none"] = "all"
    embedding_dim: int = 8
    hidden_dim: int = 128
    compensation_rank: int = 0
    expert_bits: int = 0
    expert_start: Literal["auto", "zero", "compensation"] = "zero"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """s of y = W x + s B (I + U) A x."""
        return self.lora_alpha / self.r

    def ranks(self, layers: Sequence[TargetLayer]) -> list[int]:
        """Total rank of every layer (N,).

        Raises:
            CoaloraError: a pattern that matches no layer, or a rank that leaves nothing to train beside the
                compensation.
        """
        ranks = [self.r] * len(layers)
        for pattern, rank in self.rank_pattern.items():
            matched = [i for i, layer in enumerate(layers) if _matches(layer, pattern)]
            if not matched:
                raise CoaloraError(
                    "every pattern of adapter.rank_pattern matches a target layer",
                    got=repr(pattern),
                    expected=f"a glob of names such as {layers[0].name}, or a kind such as {layers[0].kind}",
                )
            for i in matched:
                ranks[i] = rank
        for layer, rank in zip(layers, ranks, strict=True):
            if not 0 <= self.compensation_rank < rank:
                raise CoaloraError(
                    "a layer's rank holds its compensation and at least one trained row",
                    got=f"rank {rank} with compensation_rank {self.compensation_rank} in {layer.name}",
                    remedy="raise adapter.r (or rank_pattern), or lower adapter.compensation_rank",
                )
        return ranks


def _matches(layer: TargetLayer, pattern: str) -> bool:
    return fnmatch.fnmatchcase(layer.name, pattern) or fnmatch.fnmatchcase(layer.kind, pattern)
