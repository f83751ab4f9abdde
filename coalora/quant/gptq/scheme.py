"""GPTQ: the ``gptq`` scheme, calibrated 2, 3, 4 and 8 bits in groups of 32, 64 or 128 input features.

Frantar et al. 2022, arXiv 2210.17323: columns are rounded one after the other, and what is left of the weight makes
up for the error so far under the Hessian of the layer's inputs, minimising

    tr((W - W^) E[x x^T] (W - W^)^T)                                 w^ = scale (code - zero)

Codes come from gptqmodel (`coalora.quant.gptq.solver`); what is here is storage. A row of W is cut into groups of
``group_size`` neighbouring input features, the last of which may be short; each has a scale in fp16, as in GPTQ
checkpoints, and where ``sym`` is 0 a zero point of ``bits`` bits (``sym`` 1 fixes it in the middle, for all groups).
Codes are kept as gptqmodel chose them and scales are rounded to fp16 afterwards, as its own checkpoints do: below
8 bits this changes the error by less than 0.1 %, at 8 bits by up to 1 %. `dequantize` uses the rounded scales, so
that what is evaluated is what is stored; scales below 6e-8 become zero.

gptqmodel is needed to quantize alone: a packed base unpacks without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.quant.gptq.solver import LayerSolver, check_installed
from coalora.quant.packing import pack_codes, packed_size, unpack_codes
from coalora.quant.scheme import Choice, InputStatistics, Scheme, check_tensors, own_choice


@dataclass(frozen=True)
class GPTQChoice(Choice):
    """One choice; ``sym`` 0 stores a zero point for every group."""

    field_values: ClassVar = {"bits": (2, 3, 4, 8), "group_size": (32, 64, 128), "sym": (1, 0)}
    bits: int
    group_size: int
    sym: int = 1

    def __str__(self) -> str:
        """For example ``gptq3 g64``, or ``gptq3 g64 zp`` with zero points."""
        return f"gptq{self.bits} g{self.group_size}" + ("" if self.sym else " zp")


class GPTQScheme(Scheme):
    """See the module docstring.

    State: ``codes`` uint8 (out * in,), ``scales`` float16 (out * G,) and, where ``sym`` is 0, ``zeros`` uint8
    (out * G,), all row-major, G groups a row. Packed: the same names, codes and zeros bit-packed.
    """

    name = "gptq"
    choice_type: ClassVar[type[Choice]] = GPTQChoice
    needs_statistics: ClassVar[bool] = True

    def require_packages(self) -> None:
        check_installed()

    def nominal_bits(self, choice: Choice) -> float:
        c = own_choice(choice, GPTQChoice)
        return c.bits + (16 + (0 if c.sym else c.bits)) / c.group_size

    def packed_nbytes(self, choice: Choice, shape: Sequence[int]) -> int:
        c = own_choice(choice, GPTQChoice)
        count, n_groups = _counts(c, shape)
        return packed_size(count, c.bits) + 2 * n_groups + (0 if c.sym else packed_size(n_groups, c.bits))

    def quantize(self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None) -> dict[str, Tensor]:
        return next(self.quantize_many(weight, [choice], statistics))

    def quantize_many(
        self, weight: Tensor, choices: Sequence[Choice], statistics: InputStatistics | None = None
    ) -> Iterator[dict[str, Tensor]]:
        if statistics is None or statistics.hessian is None:
            raise CoaloraError(
                "Scheme 'gptq' needs the Hessian of a layer's inputs and got none",
                remedy="Collect it with coalora.calibrate.statistics.collect_statistics(hessians=True)",
            )
        solver = LayerSolver(weight, statistics.hessian)
        for choice in choices:
            yield _solved(solver, own_choice(choice, GPTQChoice))

    def fake_quantize_many(
        self, weight: Tensor, choices: Sequence[Choice], statistics: InputStatistics | None = None
    ) -> Iterator[Tensor]:
        for choice, state in zip(choices, self.quantize_many(weight, choices, statistics), strict=True):
            yield self.dequantize(state, choice, weight.shape)

    def dequantize(
        self,
        state: Mapping[str, Tensor],
        choice: Choice,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        c = own_choice(choice, GPTQChoice)
        _check(state, c, shape, packed=False)
        rows, columns = shape
        by_column = torch.arange(columns, device=state["codes"].device) // c.group_size
        weight = state["codes"].view(rows, columns).to(torch.float32)
        if c.sym:
            weight.sub_(2 ** (c.bits - 1))
        else:
            weight.sub_(state["zeros"].view(rows, -1).to(torch.float32)[:, by_column])
        return weight.mul_(state["scales"].view(rows, -1).to(torch.float32)[:, by_column]).to(dtype)

    def pack(self, state: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        c = own_choice(choice, GPTQChoice)
        _check(state, c, shape, packed=False)
        packed = {"codes": pack_codes(state["codes"], c.bits), "scales": state["scales"].clone()}
        return packed if c.sym else {**packed, "zeros": pack_codes(state["zeros"], c.bits)}

    def unpack(self, tensors: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        c = own_choice(choice, GPTQChoice)
        _check(tensors, c, shape, packed=True)
        count, n_groups = _counts(c, shape)
        state = {"codes": unpack_codes(tensors["codes"], c.bits, count), "scales": tensors["scales"]}
        return state if c.sym else {**state, "zeros": unpack_codes(tensors["zeros"], c.bits, n_groups)}


def _solved(solver: LayerSolver, choice: GPTQChoice) -> dict[str, Tensor]:
    """The state of one choice."""
    solution = solver.solve(choice.bits, choice.group_size, sym=bool(choice.sym))
    scales = solution.scales.to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise CoaloraError(
            f"A scale of scheme 'gptq' is {float(solution.scales.abs().max()):.3g}, beyond fp16's 65504",
            remedy="Leave the layer out of target_modules, or take scheme 'nf', whose scales may be bf16",
        )
    state = {"codes": solution.codes.reshape(-1), "scales": scales.reshape(-1)}
    return state if choice.sym else {**state, "zeros": solution.zeros.reshape(-1)}


def _counts(choice: GPTQChoice, shape: Sequence[int]) -> tuple[int, int]:
    """Numbers of weights and of groups of a shape (out, in)."""
    rows, columns = shape
    return math.prod(shape), rows * -(-columns // choice.group_size)


def _check(tensors: Mapping[str, Tensor], choice: GPTQChoice, shape: Sequence[int], *, packed: bool) -> None:
    count, n_groups = _counts(choice, shape)
    size = packed_size if packed else lambda number, _: number
    expected = {"codes": (torch.uint8, (size(count, choice.bits),)), "scales": (torch.float16, (n_groups,))}
    if not choice.sym:
        expected["zeros"] = (torch.uint8, (size(n_groups, choice.bits),))
    check_tensors("packed weight" if packed else "state", tensors, expected, choice, shape)
