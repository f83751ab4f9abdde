"""GPU kernels in Triton for what a switch spends its time on; the plain torch path beside each is its tested oracle."""

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
