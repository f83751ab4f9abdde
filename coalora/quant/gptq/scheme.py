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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.quant.gptq.solver import LayerSolver, check_installed
from coalora.quant.grouped import Grid, GroupedScheme, Stored, Tensors
from coalora.quant.integer.scheme import IntGrid, integer_layout, integer_parameters
from coalora.quant.scheme import Choice, InputStatistics, own_choice


@dataclass(frozen=True)
class GPTQChoice(Choice):
    """One choice; ``sym`` 0 stores a zero point for every group."""

    field_values: ClassVar = {"bits": (2, 3, 4, 8), "group_size": (32, 64, 128), "sym": (1, 0)}
    bits: int
    group_size: int
    sym: int = 1

    @property
    def zeros(self) -> str | None:
        """Name of the zero points in a state, if there are any."""
        return None if self.sym else "zeros"

    def __str__(self) -> str:
        """For example ``gptq3 g64``, or ``gptq3 g64 zp`` with zero points."""
        return f"gptq{self.bits} g{self.group_size}" + ("" if self.sym else " zp")


class GPTQScheme(GroupedScheme[GPTQChoice]):
    """See the module docstring.

    State: ``codes`` uint8 (out * in,), ``scales`` float16 (out * G,) and, where ``sym`` is 0, ``zeros`` uint8
    (out * G,), all row-major, G groups a row. Packed: the same names, codes and zeros bit-packed.
    """

    name = "gptq"
    choice_type: ClassVar[type[Any]] = GPTQChoice
    needs_statistics: ClassVar[bool] = True

    def require_packages(self) -> None:
        check_installed()

    def nominal_bits(self, choice: Choice) -> float:
        c = own_choice(choice, GPTQChoice)
        return c.bits + (16 + (0 if c.sym else c.bits)) / c.group_size

    def group_size(self, choice: GPTQChoice) -> int:
        return choice.group_size

    def layout(self, choice: GPTQChoice, n_weights: int, n_groups: int) -> dict[str, Stored]:
        return integer_layout(choice.bits, n_weights, n_groups, choice.zeros)

    def grid(self, choice: GPTQChoice) -> Grid:
        return IntGrid(choice.bits, choice.zeros)

    def parameters(self, state: Mapping[str, Tensor], choice: GPTQChoice) -> Tensors:
        return integer_parameters(state, choice.bits, choice.zeros)

    def kernels(self) -> ModuleType:
        from coalora.quant.integer import triton

        return triton

    def fresh_states(
        self, weights: Sequence[Tensor], choices: Sequence[GPTQChoice], statistics: Sequence[InputStatistics | None]
    ) -> Iterator[list[dict[str, Tensor]]]:
        solvers = []
        for weight, known in zip(weights, statistics, strict=True):
            if known is None or known.hessian is None:
                raise CoaloraError(
                    "Scheme 'gptq' needs the Hessian of a layer's inputs and got none",
                    remedy="Collect it with coalora.calibrate.statistics.collect_statistics(hessians=True)",
                )
            solvers.append(LayerSolver(weight, known.hessian))
        for choice in choices:
            yield [_solved(solver, choice) for solver in solvers]


def _solved(solver: LayerSolver, choice: GPTQChoice) -> dict[str, Tensor]:
    solution = solver.solve(choice.bits, choice.group_size, sym=bool(choice.sym))
    scales = solution.scales.to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise CoaloraError(
            f"A scale of scheme 'gptq' is {float(solution.scales.abs().max()):.3g}, beyond fp16's 65504",
            remedy="Leave the layer out of target_modules, or take scheme 'nf', whose scales may be bf16",
        )
    state = {"codes": solution.codes.reshape(-1), "scales": scales.reshape(-1)}
    return state | ({choice.zeros: solution.zeros.reshape(-1)} if choice.zeros else {})
