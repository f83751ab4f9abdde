"""The scales of the nf scheme: exact, quantized and back; the formulas are in `coalora.quant.nf.scheme`.

One number for every 16 to 64 weights: what can be done with a weight's scales alone costs little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from coalora.quant.scheme import not_finite

if TYPE_CHECKING:
    from coalora.quant.nf.choice import NFChoice

SCALE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FINEST = 16  # the block size at which scales are measured: every other block size is a multiple of it
_CHUNK = 2**15  # weights, on a CPU: temporaries stay in its cache


def block_scales(blocks: Tensor) -> Tensor:
    """Exact absmax (n_blocks,) of every block."""
    scales = blocks.new_empty(len(blocks))
    step = _CHUNK // blocks.shape[1] if blocks.device.type == "cpu" else len(blocks)
    for start in range(0, len(blocks), step):
        torch.amax(blocks[start : start + step].abs(), dim=1, out=scales[start : start + step])
    # absmax carries NaN and inf along, so the weight itself need not be read once more.
    if not bool(torch.isfinite(scales).all()):
        raise not_finite()
    return scales


def coarser(finest: Tensor, block_size: int) -> Tensor:
    """Exact absmax of blocks of ``block_size`` from those of the finest blocks."""
    ratio = block_size // FINEST
    return finest if ratio == 1 else _rows(finest, ratio).amax(dim=1)


def quantize_scales(scales: Tensor, choice: NFChoice) -> dict[str, Tensor]:
    """The scale part of the state, from exact scales (n_blocks,); see `NFScheme`."""
    dtype = SCALE_DTYPES[choice.scale_dtype]
    levels = 2**choice.scale_bits - 1
    offset = scales.min().view(1)
    above = _rows(scales - offset, choice.scale_block_size)
    absmax = above.amax(dim=1).clamp_(max=torch.finfo(dtype).max).to(dtype)
    # Not in place: for fp32 the cast is absmax itself.
    divisor = absmax.to(torch.float32).masked_fill(absmax == 0, math.inf)
    codes = above.div_(divisor[:, None]).mul_(levels).round_().clamp_(0, levels)
    return {
        "scale_codes": codes.view(-1)[: len(scales)].to(torch.uint8),
        "scale_absmax": absmax,
        "offset": offset,
    }


def dequantize_scales(state: Mapping[str, Tensor], choice: NFChoice) -> Tensor:
    """s^: float32 (n_blocks,), finite and not negative."""
    codes = state["scale_codes"].to(torch.float32)
    count = len(codes)
    blocks = _rows(codes, choice.scale_block_size)
    # A number would be multiplied by: on a GPU torch takes its inverse, which is off by a bit.
    levels = blocks.new_full((), 2**choice.scale_bits - 1)
    scales = blocks.div_(levels).mul_(state["scale_absmax"].to(torch.float32)[:, None])
    # Rounding a up to b1 can carry s^ past the largest float32.
    return scales.add_(state["offset"]).clamp_(max=torch.finfo(torch.float32).max).view(-1)[:count]


def divisor(scales: Tensor) -> Tensor:
    """What weights are divided by: a block of scale zero gets the code of 0.0."""
    return scales.masked_fill(scales == 0, math.inf)


def _rows(flat: Tensor, size: int) -> Tensor:
    """Rows of `size`, the last padded with zeros; the same memory where nothing is to be padded."""
    short = -len(flat) % size
    return (pad(flat, (0, short)) if short else flat).view(-1, size)
