"""What a scheme asks before it takes its Triton kernels; nothing here needs Triton."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

KERNEL_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # of weights; the kernels know them by number


@cache
def triton_available() -> bool:
    return find_spec("triton") is not None


def use_triton(weight: Tensor) -> bool:
    """Whether kernels read or write this weight: on a CUDA device, where Triton comes with torch, in a usual dtype."""
    return weight.is_cuda and weight.dtype in KERNEL_DTYPES and triton_available()


@contextmanager
def contiguous(outs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors to write instead of ``outs``, copied there on leaving.

    A kernel writes along the flattened weight: a transposed one (Conv1D) gets it by way of a copy, others are
    themselves.
    """
    written = [
        out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device) for out in outs
    ]
    yield written
    for out, own in zip(outs, written, strict=True):
        if own is not out:
            out.copy_(own)
