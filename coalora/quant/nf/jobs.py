"""Layers of the nf scheme as jobs of the Triton kernels: allocation and bookkeeping, no arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coalora.quant.nf.choice import NFChoice
from coalora.quant.nf.scales import SCALE_DTYPES
from coalora.quant.nf.triton import Job, dequantize, quantize, rows_of
from coalora.quant.packing import packed_size

Packed = dict[str, Tensor]


def dequantize_packed_many(layers: Sequence[tuple[Packed, NFChoice, Tensor]]) -> None:
    """Write every layer's weight into its contiguous tensor (packed, choice, out): one launch for all."""
    if layers:
        dequantize([_job(choice, packed, out) for packed, choice, out in layers])


def kernel_rows(layers: Sequence[tuple[Packed, NFChoice, Tensor]]) -> Tensor:
    """int64 (n, columns), on the host: the kernels' table of (packed, choice, out)."""
    return torch.tensor(rows_of([_job(choice, packed, out) for packed, choice, out in layers]), dtype=torch.int64)


def quantize_packed_many(layers: Sequence[tuple[Tensor, NFChoice, Tensor | None]]) -> list[Packed]:
    """Quantize every layer (weight, choice, out): its packed tensors, and its weight written into ``out`` if given."""
    jobs = []
    for weight, choice, out in layers:
        count = weight.numel()
        n_blocks = -(-count // choice.block_size)
        device = weight.device
        empty = {
            "codes": ((packed_size(count, choice.bits),), torch.uint8),
            "scale_codes": ((packed_size(n_blocks, choice.scale_bits),), torch.uint8),
            "scale_absmax": ((-(-n_blocks // choice.scale_block_size),), SCALE_DTYPES[choice.scale_dtype]),
            "offset": ((1,), torch.float32),
        }
        packed = {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in empty.items()}
        exact, scales = torch.empty((2, n_blocks), device=device)
        written = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
        jobs.append(_job(choice, packed, written, weight.detach().contiguous(), exact, scales))
    if jobs:
        quantize(jobs)
    return [job.packed for job in jobs]


def _job(choice: NFChoice, packed: Packed, out: Tensor, *quantization: Tensor) -> Job:
    return Job(choice.bits, choice.scale_bits, choice.block_size, choice.scale_block_size, packed, out, *quantization)
