"""Whether the Triton kernels can run on a tensor."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


@cache
def triton_available() -> bool:
    return find_spec("triton") is not None


def use_triton(tensor: Tensor) -> bool:
    """Whether kernels run on this tensor: on a CUDA device, where Triton comes with torch."""
    return tensor.is_cuda and triton_available()
