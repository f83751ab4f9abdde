"""Layers of the nf scheme as jobs of the Triton kernels: bookkeeping, no arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from coalora.kernels.nf_triton import Job, dequantize
from coalora.quant.nf import NFChoice

Packed = dict[str, Tensor]


def dequantize_packed_many(layers: Sequence[tuple[Packed, NFChoice, Tensor]]) -> None:
    """Write every layer's weight into its contiguous tensor (packed, choice, out): one launch for all."""
    if layers:
        dequantize([_job(choice, packed, out) for packed, choice, out in layers])


def _job(choice: NFChoice, packed: Packed, out: Tensor) -> Job:
    return Job(choice.bits, choice.scale_bits, choice.block_size, choice.scale_block_size, packed, out)
