"""Pairs of their own for low bit-widths: each layer adds to the shared pair what its choice's bits have learnt.

theta's U turns the rows of A among themselves; it cannot give a 2-bit layer directions that the shared pair does not
have, and these are what an adapter for one configuration alone finds. So layer l under a choice of b bits runs

    y = q(W_l, c_l) x + s (B_l + B_l,b) (I + U_l) (A_l + A_l,b) x,

of the same rank as before. The terms are there for bit-widths up to a limit only: above it the error is small, steps
are few, and the shared pair alone does better. Where a choice has a term, U_l may be left out (`AdapterRecipe.theta:
others`): the term learns what U can, and low bits do better without it (docs/results.md).

The terms start at zero, or with B_l,b where the closed-form compensation of the quantization error puts it (`start`),
which is worth more at low bits than any number of steps that a run can afford. Then A_l itself starts as the
compensation's rows for the lowest bits and every A_l,b at zero, so that what a low-bit step teaches B_l is in the
coordinates in which higher bits use it. (With rows of its own for each bit-width the shared pair learnt nothing from
low-bit steps. No counterpart in the paper, whose pairs are that decomposition for each configuration.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from coalora.models.targets import TargetLayer
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe

NO_EXPERT = -1


class Experts(nn.Module):
    """The terms A_l,b (r x in) and B_l,b (out x r) of every layer and bit-width.

    Args:
        space: the K choices; those of a `Choice.width` of at most `max_bits` have a term, one for each bit-width.
        layers: the N target layers.
        ranks: trained rank (N,) of each.
        max_bits: see above; 0 leaves no term at all.
    """

    def __init__(
        self, space: ChoiceSpace, layers: Sequence[TargetLayer], ranks: Sequence[int], *, max_bits: int
    ) -> None:
        super().__init__()
        self.expert_of_choice = expert_of_choice(space, max_bits)
        n = max(self.expert_of_choice, default=NO_EXPERT) + 1
        # A parameter for each term, not one stacked: what a step does not use has no gradient, and AdamW leaves it be.
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        for index, (layer, r) in enumerate(zip(layers, ranks, strict=True)):
            for expert in range(n):
                self.lora_A[f"{index}_{expert}"] = nn.Parameter(torch.zeros(r, layer.shape[1]))
                self.lora_B[f"{index}_{expert}"] = nn.Parameter(torch.zeros(layer.shape[0], r))

    def first_choices(self, fits: Sequence[bool]) -> list[int]:
        """The first choice of each term's bits, by rising bits, among those that fit (K,)."""
        first: dict[int, int] = {}
        for k, (expert, fitting) in enumerate(zip(self.expert_of_choice, fits, strict=True)):
            if expert != NO_EXPERT and fitting:
                first.setdefault(expert, k)
        return [first[expert] for expert in sorted(first)]

    @torch.no_grad()
    def start(self, index: int, lora_B: Mapping[int, Tensor]) -> None:
        """Set B_l,b of layer `index` to `lora_B` (out x r) for the bits of each of these choices."""
        for choice, B in lora_B.items():
            self.lora_B[f"{index}_{self.expert_of_choice[choice]}"].copy_(B)

    def forward(self, index: int, choice: int) -> tuple[Tensor, Tensor] | None:
        """(A_l,b, B_l,b) of choice `choice` in layer `index`; None where its bits have no term."""
        expert = self.expert_of_choice[choice]
        if expert == NO_EXPERT:
            return None
        return self.lora_A[f"{index}_{expert}"], self.lora_B[f"{index}_{expert}"]


def expert_of_choice(space: ChoiceSpace, max_bits: int) -> list[int]:
    """Number (K,) of each choice's term, counted from 0 by rising bits; -1 for none."""
    bits = [16 if choice.width is None else choice.width for choice in space.choices]
    low = sorted({b for b in bits if b <= max_bits})
    return [low.index(b) if b in low else NO_EXPERT for b in bits]


def adjusted_choices(space: ChoiceSpace, recipe: AdapterRecipe) -> list[bool]:
    """Whether theta adjusts the pair to each choice (K,): not to those with an expert, where the recipe says so."""
    experts = expert_of_choice(space, recipe.expert_bits or 0)
    return [recipe.theta == "all" or expert == NO_EXPERT for expert in experts]


def used_ranks(space: ChoiceSpace, recipe: AdapterRecipe, r: int) -> Tensor | None:
    """Ones and zeros (K, r): the leading ranks of the shared pair that each choice uses; None where all use all.

    Cascaded LoRA (QuEPT, arXiv 2602.12609): what low bits need beyond high bits has ranks of its own in the one pair.
    """
    high = recipe.leading_ranks
    if not high:
        return None
    widths = [16 if choice.width is None else choice.width for choice in space.choices]
    used = torch.tensor([high if b > 3 else (high + r) // 2 if b == 3 else r for b in widths])
    return (torch.arange(r) < used[:, None]).float()


def cascaded(U: Tensor | None, used: Tensor) -> Tensor:
    """U' (N, r, r) with I + U' = diag(used) (I + U): the rows of (I + U') A that a layer does not use are zero.

    Args:
        U: theta's; None is zero.
        used: (N, r) of `used_ranks`.
    """
    identity = torch.eye(used.shape[-1], device=used.device)
    return used[..., None] * (identity if U is None else identity + U) - identity
