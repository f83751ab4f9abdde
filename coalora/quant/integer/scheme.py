"""Group-wise integers: the ``int`` scheme, 24 choices.

The grid of GPTQ (arXiv 2210.17323), AWQ (arXiv 2306.00978) and of torch's observers. Rows are cut into groups of g
(`coalora.quant.grouped`); with Q = 2^b - 1, a group's least and greatest weights lo <= 0 <= hi (zero is in range) give

    asym:  s = (hi - lo) / Q                z = round(-lo / s), a code of b bits
    sym:   s = 2 max(hi, -lo) / Q           z = 2^(b-1), not stored
    code = clamp(round(w / s) + z, 0, Q)    w^ = (code - z) s

unless scales are searched: then lo and hi are drawn together by a factor, and s, with zero points lo as well, refitted
by least squares for the codes that follow. A searched s of sym may be negative: codes reach further on one side.

s is stored in fp16, as the kernels of GPTQ, AWQ and GGUF read it, and codes are taken under the stored s. Rounding s
by 2^-11 can clip a group's ends by an eighth of an 8-bit step; bf16 would clip them by a whole one.
Conventions: ties round to even; s = 0 (a group of zeros, or one below the smallest fp16) gives zeros; s saturates at
the largest fp16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from coalora.quant.grouped import SEARCHED, Grid, GroupedScheme, Stored, Tensors
from coalora.quant.scheme import Choice, own_choice


@dataclass(frozen=True)
class IntChoice(Choice):
    """One choice: b, g, and whether the groups have zero points (``asym``) or not (``sym``)."""

    field_values: ClassVar = {"bits": (2, 3, 4, 8), "group_size": (32, 64, 128), "mode": ("sym", "asym")}
    bits: int
    group_size: int
    mode: str

    def __str__(self) -> str:
        """For example ``int4 g64 asym``."""
        return f"int{self.bits} g{self.group_size} {self.mode}"


class IntScheme(GroupedScheme[IntChoice]):
    """Group-wise integers; see the module docstring for the arithmetic.

    State: ``codes`` uint8 (n,), ``scales`` fp16 (n_groups,), and for ``asym`` ``zero_points`` uint8 (n_groups,), all
    row-major. Packed: the same names, codes and zero points bit-packed.
    """

    name = "int"
    choice_type: ClassVar[type[Any]] = IntChoice

    def nominal_bits(self, choice: Choice) -> float:
        c = own_choice(choice, IntChoice)
        return c.bits + (16 + (c.bits if c.mode == "asym" else 0)) / c.group_size

    def group_size(self, choice: IntChoice) -> int:
        return choice.group_size

    def layout(self, choice: IntChoice, n_weights: int, n_groups: int) -> dict[str, Stored]:
        return integer_layout(choice.bits, n_weights, n_groups, "zero_points" if choice.mode == "asym" else None)

    def grid(self, choice: IntChoice) -> Grid:
        return IntGrid(choice.bits, "zero_points" if choice.mode == "asym" else None)

    def parameters(self, state: Mapping[str, Tensor], choice: IntChoice) -> Tensors:
        return integer_parameters(state, choice.bits, "zero_points" if choice.mode == "asym" else None)

    def kernels(self) -> ModuleType:
        from coalora.quant.integer import triton

        return triton


def integer_layout(bits: int, n_weights: int, n_groups: int, zero_points: str | None) -> dict[str, Stored]:
    """Codes, scales in fp16 and, where they have a name, zero points."""
    layout = {"codes": Stored(n_weights, bits), "scales": Stored(n_groups, torch.float16)}
    return layout | ({zero_points: Stored(n_groups, bits)} if zero_points else {})


def integer_parameters(state: Mapping[str, Tensor], bits: int, zero_points: str | None) -> Tensors:
    """s and z, float32 (n_groups,)."""
    scale = state["scales"].to(torch.float32)
    return scale, state[zero_points].to(torch.float32) if zero_points else torch.full_like(scale, 2.0 ** (bits - 1))


class IntGrid(Grid):
    """See the module docstring; parameters are s and, with zero points, lo; once rounded s, z and 1/s.

    Args:
        zero_points: their name in a state; None: codes are symmetric.
    """

    def __init__(self, bits: int, zero_points: str | None) -> None:
        self._bits, self._levels, self._zero_points = bits, 2**bits - 1, zero_points
        self.key = (bits, zero_points is None)

    def absmax(self, groups: Tensor) -> Tensors:
        # Two reductions: torch.aminmax over a dimension takes five times as long on a CPU.
        low = groups.amin(-2, keepdim=True).clamp_(max=0)
        high = groups.amax(-2, keepdim=True).clamp_(min=0)
        # A number would be multiplied by: on a GPU torch takes its inverse, which is off by a bit.
        levels = low.new_full((), self._levels)
        if not self._zero_points:
            return (torch.maximum(high, -low) / levels * 2,)
        # Divided before they are added: the width of a group may exceed the largest float32.
        return high / levels - low / levels, low

    def searched(self, groups: Tensor, weighting: Tensor, frame: Tensors = ()) -> Tensors:
        start = self.absmax(groups)
        if self._bits not in SEARCHED:
            return start
        best = torch.full_like(start[0], torch.inf)
        found = tuple(p.clone() for p in start)
        signs = (1,) if self._zero_points else (1, -1)
        for factor in (sign * f for sign in signs for f in SEARCHED[self._bits]):
            tried = tuple(p * factor for p in start)
            for _ in range(2):  # the second time under what is refitted to the first one's codes
                _, rounded = self.rounded(tried, ())
                steps = self.codes(groups, rounded).to(torch.float32).sub_(rounded[1])
                error = (steps * rounded[0]).sub_(groups).square_().mul_(weighting).sum(-2, keepdim=True)
                better = error < best
                best = torch.where(better, error, best)
                found = tuple(torch.where(better, t, f) for t, f in zip(tried, found, strict=True))
                tried = self._refitted(groups, weighting, steps, rounded[1], tried)
        return found

    def _refitted(self, groups: Tensor, weighting: Tensor, steps: Tensor, zero: Tensor, tried: Tensors) -> Tensors:
        """Least squares for given code - z: s, with zero points s and lo."""
        weighted = steps * weighting
        power = (weighted * steps).sum(-2, keepdim=True)
        product = (weighted * groups).sum(-2, keepdim=True)
        if not self._zero_points:
            return (torch.where(power > 0, product / power, tried[0]),)
        # w = s (code - z) + c: c is given to lo, the weight of code 0, and z is rounded anew.
        total, first = weighting.sum(-2, keepdim=True), weighted.sum(-2, keepdim=True)
        mean = (groups * weighting).sum(-2, keepdim=True)
        determinant = power * total - first * first
        scale = (product * total - first * mean) / determinant
        shift = (mean - scale * first) / total
        fine = (determinant > 1e-6 * power * total) & (scale > 0)
        low = torch.minimum(shift - zero * scale, torch.zeros_like(scale))
        return torch.where(fine, scale, tried[0]), torch.where(fine, low, tried[1])

    def rounded(self, parameters: Tensors, frame: Tensors) -> tuple[Tensors, Tensors]:
        most = torch.finfo(torch.float16).max
        stored = parameters[0].clamp(-most, most).to(torch.float16)
        scale = stored.to(torch.float32)
        inverse = torch.where(scale == 0, 0, scale.reciprocal())
        if not self._zero_points:
            zero = scale.new_full((1, 1), 2.0 ** (self._bits - 1)).expand_as(scale)
            return (stored,), (scale, zero, inverse)
        zero = (parameters[1] * inverse).round_().clamp_(-self._levels, 0).neg_()
        return (stored, zero.to(torch.uint8)), (scale, zero, inverse)

    def codes(self, weights: Tensor, parameters: Tensors) -> Tensor:
        _, zero, inverse = parameters
        # Before the zero point is added: 2^24 and more would lose it.
        steps = (weights * inverse).round_()
        if self._zero_points:
            # clamp_ with bounds that are broadcast takes three times as long.
            torch.minimum(torch.maximum(steps, -zero, out=steps), self._levels - zero, out=steps)
            return steps.add_(zero).to(torch.uint8)
        half = 2 ** (self._bits - 1)
        return steps.clamp_(-half, half - 1).add_(half).to(torch.uint8)

    def values(self, codes: Tensor, parameters: Tensors) -> Tensor:
        return codes.to(torch.float32).sub_(parameters[1]).mul_(parameters[0])

    def named(self, stored: Tensors) -> dict[str, Tensor]:
        return dict(zip(("scales", self._zero_points or ""), stored, strict=False))
