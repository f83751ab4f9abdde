"""NormalFloat with double quantization: the ``nf`` scheme, 432 choices.

Guo et al. 2024, LQ-LoRA, arXiv 2311.12023, whose search space of (b, b0, b1, B0, B1) this is; the code books are in
`coalora.quant.nf.book`. Groups of B0 weights along a row (`coalora.quant.grouped`) share a scale s, the largest
magnitude unless it is searched; the scales in turn, row by row, are quantized to b0 bits in blocks of B1:

    m = min s        t = s - m        a = max t over B1 scales, stored in b1
    scale code = round(t / a * (2^b0 - 1))        s^ = code / (2^b0 - 1) * a + m
    weight code = nearest entry to w / s^         w^ = entry * s^

Deviations from LQ-LoRA: a weight's code is the nearest entry under the *dequantized* scale s^, the one that will be
multiplied back, and not under the exact s (with 2-bit scales the two differ a lot); groups end with their row. A
searched scale may be negative, which mirrors the code book (of 2 and 3 bits it reaches further on one side), where
scales have 8 bits: they are spread over twice the range then.
Conventions: s^ = 0 gives the code of 0.0; ties go to the lower entry; ``a`` saturates at the largest finite number of
its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from coalora.quant.grouped import SEARCHED, Grid, GroupedScheme, Stored, Tensors
from coalora.quant.kernels.available import use_triton
from coalora.quant.nf import cpu
from coalora.quant.nf.book import nearest_codes, nf_lookup
from coalora.quant.packing import unpack_codes
from coalora.quant.scheme import Choice, own_choice

SCALE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class NFChoice(Choice):
    """One choice: b, b0, b1, B0, B1 of the module docstring, in this order."""

    field_values: ClassVar = {
        "bits": (2, 3, 4, 8),
        "scale_bits": (2, 3, 4, 8),
        "scale_dtype": ("bf16", "fp16", "fp32"),
        "block_size": (16, 32, 64),
        "scale_block_size": (16, 64, 256),
    }
    bits: int
    scale_bits: int
    scale_dtype: str
    block_size: int
    scale_block_size: int

    def __str__(self) -> str:
        """For example ``nf3 b32 s4/bf16 x64``."""
        return f"nf{self.bits} b{self.block_size} s{self.scale_bits}/{self.scale_dtype} x{self.scale_block_size}"


class NFScheme(GroupedScheme[NFChoice]):
    """NormalFloat with double quantization; see the module docstring for the arithmetic.

    State: ``codes`` uint8 (n,), ``scale_codes`` uint8 (n_groups,), ``scale_absmax`` (n_scale_blocks,) in b1,
    ``offset`` float32 (1,). Packed: the same names, both code tensors bit-packed.
    """

    name = "nf"
    choice_type: ClassVar[type[Any]] = NFChoice

    def nominal_bits(self, choice: Choice) -> float:
        c = own_choice(choice, NFChoice)
        second = SCALE_DTYPES[c.scale_dtype].itemsize * 8
        return c.bits + c.scale_bits / c.block_size + second / (c.block_size * c.scale_block_size)

    def group_size(self, choice: NFChoice) -> int:
        return choice.block_size

    def layout(self, choice: NFChoice, n_weights: int, n_groups: int) -> dict[str, Stored]:
        return {
            "codes": Stored(n_weights, choice.bits),
            "scale_codes": Stored(n_groups, choice.scale_bits),
            "scale_absmax": Stored(-(-n_groups // choice.scale_block_size), SCALE_DTYPES[choice.scale_dtype]),
            "offset": Stored(1, torch.float32),
        }

    def grid(self, choice: NFChoice) -> Grid:
        return _NFGrid(choice)

    def parameters(self, state: Mapping[str, Tensor], choice: NFChoice) -> Tensors:
        count = len(state["scale_codes"])
        absmax = state["scale_absmax"].to(torch.float32).repeat_interleave(choice.scale_block_size)[:count]
        return (_scales(state["scale_codes"], absmax, state["offset"], choice.scale_bits),)

    def dequantize_packed(
        self, packed: Mapping[str, Tensor], choice: Choice, shape: Sequence[int], out: Tensor
    ) -> None:
        c = own_choice(choice, NFChoice)
        whole = shape[1] % c.block_size == 0 and out.device.type == "cpu" and out.is_contiguous()
        if not whole or use_triton(out):
            super().dequantize_packed(packed, choice, shape, out)
            return
        layout = self._check(packed, c, shape, packed=True)
        scale_codes = unpack_codes(packed["scale_codes"], c.scale_bits, layout["scale_codes"].count)
        (scales,) = self.parameters({**packed, "scale_codes": scale_codes}, c)
        cpu.decode(packed["codes"], scales, c.bits, c.block_size, out.view(-1))

    def kernels(self) -> ModuleType:
        from coalora.quant.nf import triton

        return triton


def _scales(codes: Tensor, absmax: Tensor, offset: Tensor, bits: int) -> Tensor:
    """s^, float32 and finite, of scale codes."""
    # A number would be multiplied by: on a GPU torch takes its inverse, which is off by a bit.
    levels = absmax.new_full((), 2**bits - 1)
    # Rounding a up to b1 can carry s^ past the largest float32.
    return (codes.to(torch.float32) / levels).mul_(absmax).add_(offset).clamp_(max=torch.finfo(torch.float32).max)


class _NFGrid(Grid):
    """See the module docstring; parameters are s, once rounded s^ and what weights are divided by."""

    has_frame = True

    def __init__(self, choice: NFChoice) -> None:
        self._choice = choice
        self._mirrored = choice.bits <= 3 and choice.scale_bits == 8
        self.key = (choice.bits, self._mirrored)

    def absmax(self, groups: Tensor) -> Tensors:
        return (groups.abs().amax(-2, keepdim=True),)

    def searched(self, groups: Tensor, weighting: Tensor, frame: Tensors = ()) -> Tensors:
        (absmax,) = self.absmax(groups)
        bits = self._choice.bits
        if bits not in SEARCHED:
            return (absmax,)
        book = nf_lookup(bits, groups.device).book
        weighted = groups * weighting
        best, scale = torch.zeros_like(absmax), absmax.clone()
        low, high = (frame[1], frame[0] + frame[1]) if frame else (None, None)
        for factor in SEARCHED[bits] + tuple(-f for f in SEARCHED[bits]) * self._mirrored:
            tried = absmax * factor
            entries = _entries(book, nearest_codes(groups / _divisor(tried), bits))
            product = (weighted * entries).sum(-2, keepdim=True)
            power = (entries.square_().mul_(weighting)).sum(-2, keepdim=True)
            fitted = torch.where(power > 0, product / power, 0)
            if frame:
                fitted = torch.clamp(fitted, low, high)
            # These codes under this scale leave sum h w^2 - gain.
            gain = fitted * (2 * product - fitted * power)
            better = (gain > best) & (fitted * factor > 0)
            best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
        return (scale,)

    def frame(self, parameters: Tensors) -> tuple[Tensors, dict[str, Tensor]]:
        (scales,) = parameters
        size, dtype = self._choice.scale_block_size, SCALE_DTYPES[self._choice.scale_dtype]
        # Searched anew in the frame, a scale may turn its sign.
        if mirrored := bool((scales < 0).any()):
            scales = scales.abs()
        offset = -scales.max() if mirrored else scales.min()
        above = (scales - offset).view(-1)
        absmax = pad(above, (0, -len(above) % size)).view(-1, size).amax(dim=1)
        absmax = absmax.clamp_(max=torch.finfo(dtype).max).to(dtype)
        each = absmax.to(torch.float32).repeat_interleave(size)[: len(above)].view(scales.shape)
        return (each, offset.expand(scales.shape)), {"scale_absmax": absmax, "offset": offset.view(1)}

    def rounded(self, parameters: Tensors, frame: Tensors) -> tuple[Tensors, Tensors]:
        levels = 2**self._choice.scale_bits - 1
        absmax, offset = frame
        above = (parameters[0] - offset).div_(_divisor(absmax)).mul_(levels)
        codes = above.round_().clamp_(0, levels).to(torch.uint8)
        scales = _scales(codes, absmax, offset, self._choice.scale_bits)
        return (codes,), (scales, _divisor(scales))

    def codes(self, weights: Tensor, parameters: Tensors) -> Tensor:
        return nearest_codes(weights / parameters[1], self._choice.bits)

    def values(self, codes: Tensor, parameters: Tensors) -> Tensor:
        book = nf_lookup(self._choice.bits, codes.device).book
        return _entries(book, codes).mul_(parameters[0])

    def named(self, stored: Tensors) -> dict[str, Tensor]:
        return {"scale_codes": stored[0]}


def _entries(book: Tensor, codes: Tensor) -> Tensor:
    """The book's entries of codes; on a CPU a fifth of the time of `book[codes]`."""
    return book.index_select(0, codes.reshape(-1).long()).view(codes.shape)


def _divisor(scales: Tensor) -> Tensor:
    """What is divided by: a group of scale zero gets the code of 0.0."""
    return scales.masked_fill(scales == 0, math.inf)
