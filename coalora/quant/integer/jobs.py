"""Layers of the int scheme as jobs of the Triton kernels: allocation and bookkeeping, no arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coalora.quant.integer.choice import IntChoice
from coalora.quant.integer.triton import Job, dequantize, quantize, rows_of
from coalora.quant.packing import packed_size

Packed = dict[str, Tensor]


def dequantize_packed_many(layers: Sequence[tuple[Packed, IntChoice, Tensor]]) -> None:
    """Write every layer's weight into its contiguous tensor (packed, choice, out (out, in)): one launch for all."""
    if layers:
        dequantize([Job(c.bits, c.group_size, _shape(out), packed, out) for packed, c, out in layers])


def kernel_rows(layers: Sequence[tuple[Packed, IntChoice, Tensor]]) -> Tensor:
    """int64 (n, columns), on the host: the kernels' table of (packed, choice, out (out, in))."""
    jobs = [Job(c.bits, c.group_size, _shape(out), packed, out) for packed, c, out in layers]
    return torch.tensor(rows_of(jobs), dtype=torch.int64)


def quantize_packed_many(layers: Sequence[tuple[Tensor, IntChoice, Tensor | None]]) -> list[Packed]:
    """Quantize every layer (weight (out, in), choice, out).

    Returns:
        The layers' packed tensors; their weights are written into the contiguous ``out`` where one is given.
    """
    jobs = []
    for weight, c, out in layers:
        rows, columns = _shape(weight)
        n_groups = rows * -(-columns // c.group_size)
        empty = {
            "codes": (packed_size(rows * columns, c.bits), torch.uint8),
            "scales": (n_groups, torch.float16),
            "zero_points": (packed_size(n_groups, c.bits), torch.uint8),
        }
        if c.mode == "sym":
            del empty["zero_points"]
        packed = {name: torch.empty(n, dtype=dtype, device=weight.device) for name, (n, dtype) in empty.items()}
        jobs.append(Job(c.bits, c.group_size, (rows, columns), packed, out, weight.detach().contiguous()))
    if jobs:
        quantize(jobs)
    return [job.packed for job in jobs]


def _shape(matrix: Tensor) -> tuple[int, int]:
    rows, columns = matrix.shape
    return rows, columns
