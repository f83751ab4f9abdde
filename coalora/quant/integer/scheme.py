"""Group-wise integers, rounded to nearest: the ``int`` scheme, 24 choices.

The grid of GPTQ (arXiv 2210.17323), AWQ (arXiv 2306.00978) and of torch's observers. Every row of a weight (out, in) is
cut along the input dimension into groups of g, the last of which may be short; with Q = 2^b - 1, a group's least and
greatest weights lo <= 0 <= hi (zero is always in range) give

    asym:  s = (hi - lo) / Q                z = round(-lo / s), a code of b bits
    sym:   s = 2 max(hi, -lo) / Q           z = 2^(b-1), not stored
    code = clamp(round(w / s) + z, 0, Q)    w^ = (code - z) s

s is stored in fp16, as the kernels of GPTQ, AWQ and GGUF read it, and codes are taken under the stored s. Rounding s by
2^-11 can clip a group's ends by an eighth of an 8-bit step; bf16 would clip them by a whole one.
Conventions: ties round to even; padding of a short group is arithmetic only and never stored; s = 0 (a group of zeros,
or one below the smallest fp16) gives zeros; s saturates at the largest fp16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from coalora.errors import CoaloraError
from coalora.quant.integer.choice import IntChoice
from coalora.quant.kernels.available import contiguous, use_triton
from coalora.quant.packing import pack_codes, packed_size, unpack_codes
from coalora.quant.scheme import (
    Choice,
    InputStatistics,
    Scheme,
    check_tensors,
    check_weight,
    not_finite,
    own_choice,
)

_CHUNK = 2**17  # weights


@dataclass(frozen=True)
class _Grid:
    """Of every group, (n_groups, 1) float32: the stored scale, its inverse (0 for 0), and the ends of code - z."""

    scale: Tensor
    inverse: Tensor
    low: Tensor
    high: Tensor


class IntScheme(Scheme):
    """Group-wise integers; see the module docstring for the arithmetic.

    State: ``codes`` uint8 (n,), ``scales`` fp16 (n_groups,), and for ``asym`` ``zero_points`` uint8 (n_groups,), all
    row-major. Packed: the same names, codes and zero points bit-packed.
    """

    name = "int"
    has_kernels = True
    choice_type: ClassVar[type[Choice]] = IntChoice

    def nominal_bits(self, choice: Choice) -> float:
        c = own_choice(choice, IntChoice)
        return c.bits + (16 + (c.bits if c.mode == "asym" else 0)) / c.group_size

    def packed_nbytes(self, choice: Choice, shape: Sequence[int]) -> int:
        c = own_choice(choice, IntChoice)
        count, n_groups = _counts(c, shape)
        zero_points = packed_size(n_groups, c.bits) if c.mode == "asym" else 0
        return packed_size(count, c.bits) + 2 * n_groups + zero_points

    def quantize(self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None) -> dict[str, Tensor]:
        c = own_choice(choice, IntChoice)
        groups = _groups(weight, c.group_size)
        grid = _grid(_ends(groups), c)
        codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
        for rows, steps in _steps(groups, grid, c, torch.empty_like(groups)):
            codes[rows] = steps.sub_(_rows(grid.low, rows)).to(torch.uint8)
        state = {
            "codes": codes.view(weight.shape[0], -1)[:, : weight.shape[1]].reshape(-1),
            "scales": grid.scale.view(-1).to(torch.float16),
        }
        return state | ({"zero_points": grid.low.neg().view(-1).to(torch.uint8)} if c.mode == "asym" else {})

    def dequantize(
        self,
        state: Mapping[str, Tensor],
        choice: Choice,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        c = own_choice(choice, IntChoice)
        _check(state, c, shape, packed=False)
        rows, columns = shape
        steps = pad(state["codes"].view(rows, columns), (0, -columns % c.group_size)).to(torch.float32)
        steps = steps.view(-1, c.group_size)
        zero = state["zero_points"].to(torch.float32)[:, None] if c.mode == "asym" else 2.0 ** (c.bits - 1)
        weight = steps.sub_(zero).mul_(state["scales"].to(torch.float32)[:, None])
        return weight.view(rows, -1)[:, :columns].to(dtype).contiguous()

    def pack(self, state: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        c = own_choice(choice, IntChoice)
        _check(state, c, shape, packed=False)
        return {k: v.clone() if k == "scales" else pack_codes(v, c.bits) for k, v in state.items()}

    def unpack(self, tensors: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        c = own_choice(choice, IntChoice)
        _check(tensors, c, shape, packed=True)
        count, n_groups = _counts(c, shape)
        counts = {"codes": count, "zero_points": n_groups}
        return {k: unpack_codes(v, c.bits, counts[k]) if k in counts else v for k, v in tensors.items()}

    def quantize_packed(
        self,
        weight: Tensor,
        choice: Choice,
        statistics: InputStatistics | None = None,
        measured: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if not _kernels_take(weight):
            return super().quantize_packed(weight, choice, statistics, measured)
        from coalora.quant.integer.jobs import quantize_packed_many  # needs triton, which a CPU build of torch lacks

        return quantize_packed_many([(weight, own_choice(choice, IntChoice), None)])[0]

    def dequantize_packed(
        self, packed: Mapping[str, Tensor], choice: Choice, shape: Sequence[int], out: Tensor
    ) -> None:
        if use_triton(out):
            self.dequantize_packed_many([(packed, choice, out)])
        else:
            super().dequantize_packed(packed, choice, shape, out)

    def dequantize_packed_many(self, layers: Sequence[tuple[Mapping[str, Tensor], Choice, Tensor]]) -> None:
        if not all(use_triton(out) for _, _, out in layers):
            super().dequantize_packed_many(layers)
            return
        from coalora.quant.integer.jobs import dequantize_packed_many

        for packed, choice, out in layers:
            _check(packed, own_choice(choice, IntChoice), out.shape, packed=True)
        with contiguous([out for _, _, out in layers]) as written:
            dequantize_packed_many(
                [(dict(p), own_choice(c, IntChoice), w) for (p, c, _), w in zip(layers, written, strict=True)]
            )

    def requantize(
        self,
        weight: Tensor,
        choice: Choice,
        statistics: InputStatistics | None = None,
        *,
        out: Tensor,
        measured: Tensor | None = None,
    ) -> None:
        if not (_kernels_take(weight) and use_triton(out)):
            super().requantize(weight, choice, statistics, out=out, measured=measured)
            return
        from coalora.quant.integer.jobs import quantize_packed_many

        with contiguous([out]) as (written,):
            quantize_packed_many([(weight, own_choice(choice, IntChoice), written)])

    def quantize_packed_many(
        self, layers: Sequence[tuple[Tensor, Choice, InputStatistics | None, Tensor]]
    ) -> list[dict[str, Tensor]]:
        if not all(use_triton(weight) and use_triton(out) and out.is_contiguous() for weight, _, _, out in layers):
            return super().quantize_packed_many(layers)
        from coalora.quant.integer.jobs import quantize_packed_many

        return quantize_packed_many([(weight, own_choice(choice, IntChoice), out) for weight, choice, _, out in layers])

    def kernel_rows(self, layers: Sequence[tuple[Mapping[str, Tensor], Choice, Tensor]]) -> Tensor:
        from coalora.quant.integer.jobs import kernel_rows

        return kernel_rows([(dict(packed), own_choice(choice, IntChoice), out) for packed, choice, out in layers])

    def dequantize_rows(self, rows: Tensor, n_weights: int) -> None:
        from coalora.quant.integer.triton import dequantize_rows

        dequantize_rows(rows, n_weights)

    def fake_quantize(self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None) -> Tensor:
        """About 1.2 ms for a million weights on one core, without large temporaries."""
        return next(self.fake_quantize_many(weight, [choice]))

    def fake_quantize_many(
        self, weight: Tensor, choices: Sequence[Choice], statistics: InputStatistics | None = None
    ) -> Iterator[Tensor]:
        by_size: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        for choice in choices:
            c = own_choice(choice, IntChoice)
            if c.group_size not in by_size:
                groups = _groups(weight, c.group_size)
                by_size[c.group_size] = groups, _ends(groups)
            groups, ends = by_size[c.group_size]
            grid = _grid(ends, c)
            result = torch.empty_like(groups)
            for rows, steps in _steps(groups, grid, c, result):
                steps.mul_(grid.scale[rows])
            yield result.view(weight.shape[0], -1)[:, : weight.shape[1]].contiguous()


def _kernels_take(weight: Tensor) -> bool:
    """Whether the weight is quantized by kernels; one that is none is left to the plain path, which says so."""
    return use_triton(weight) and weight.dim() == 2 and weight.numel() > 0


def _groups(weight: Tensor, group_size: int) -> Tensor:
    """Groups float32 (n_groups, g), row by row, short ones padded with zeros; may alias the weight."""
    check_weight(weight)
    matrix = weight.detach().to(torch.float32)
    short = -matrix.shape[1] % group_size
    return (pad(matrix, (0, short)) if short else matrix.contiguous()).view(-1, group_size)


def _ends(groups: Tensor) -> tuple[Tensor, Tensor]:
    """lo and hi (n_groups, 1), zero between them."""
    # Two reductions: torch.aminmax over rows takes five times as long on a CPU.
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    # NaN and inf come through, so the weight itself need not be read once more.
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise not_finite()
    return low.clamp_(max=0), high.clamp_(min=0)


def _grid(ends: tuple[Tensor, Tensor], choice: IntChoice) -> _Grid:
    low, high = ends
    levels = 2**choice.bits - 1
    # A number would be multiplied by: on a GPU torch takes its inverse, which is off by a bit.
    divisor = low.new_full((), levels)
    # Divided before they are added: the width of a group may exceed the largest float32.
    width = high / divisor - low / divisor if choice.mode == "asym" else torch.maximum(high, -low) / divisor * 2
    scale = width.clamp_(max=torch.finfo(torch.float16).max).to(torch.float16).to(torch.float32)
    inverse = torch.where(scale == 0, 0, scale.reciprocal())
    if choice.mode == "asym":
        bottom = (low * inverse).round_().clamp_(min=-levels)
    else:
        bottom = low.new_full((1, 1), -(2.0 ** (choice.bits - 1)))
    return _Grid(scale, inverse, bottom, bottom + levels)


def _steps(groups: Tensor, grid: _Grid, choice: IntChoice, out: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """code - z of some groups at a time, float32, written into these rows of ``out`` (n_groups, g)."""
    # On a CPU, temporaries that fit its cache and are reused cost a third of those that fault in new pages.
    size = _CHUNK // groups.shape[1] if groups.device.type == "cpu" else len(groups)
    for start in range(0, len(groups), size):
        rows = slice(start, start + size)
        steps = torch.mul(groups[rows], grid.inverse[rows], out=out[rows]).round_()
        if choice.mode == "asym":
            # clamp_ with bounds that are broadcast takes three times as long.
            steps = torch.minimum(torch.maximum(steps, grid.low[rows], out=steps), grid.high[rows], out=steps)
        else:
            steps.clamp_(-(2 ** (choice.bits - 1)), 2 ** (choice.bits - 1) - 1)
        yield rows, steps


def _rows(per_group: Tensor, rows: slice) -> Tensor:
    return per_group if len(per_group) == 1 else per_group[rows]


def _counts(choice: IntChoice, shape: Sequence[int]) -> tuple[int, int]:
    """Numbers of weights and of groups."""
    if len(shape) != 2 or min(shape) < 1:
        raise CoaloraError(f"{tuple(shape)} is no shape of a weight", remedy="Give (out, in), neither of them 0")
    return shape[0] * shape[1], shape[0] * -(-shape[1] // choice.group_size)


def _check(tensors: Mapping[str, Tensor], choice: IntChoice, shape: Sequence[int], *, packed: bool) -> None:
    count, n_groups = _counts(choice, shape)
    size = packed_size if packed else lambda number, _: number
    expected = {"codes": (torch.uint8, (size(count, choice.bits),)), "scales": (torch.float16, (n_groups,))}
    if choice.mode == "asym":
        expected["zero_points"] = (torch.uint8, (size(n_groups, choice.bits),))
    check_tensors("packed weight" if packed else "state", tensors, expected, choice, shape)
