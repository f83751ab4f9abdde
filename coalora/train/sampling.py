"""Which configuration a training step sees, and which examples.

Both are pure functions of (seed, step): a resumed run needs no generator state, and methods that are compared see
the same configurations and the same data in the same order.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from coalora.errors import CoaloraError

Sampling = Literal["uniform", "low-bits"]


def sample_member(average_bits: np.ndarray, *, sampling: Sampling, power: float, seed: int, step: int) -> int:
    """Index of the set member that step `step` trains on.

    `uniform` draws all members alike. `low-bits` draws rank u^power of the members in rising order of bits, u uniform:
    low-bit members lose most to quantization and need most steps.

    Args:
        average_bits: (n,).
        power: at least 1; 1 is uniform.
    """
    if power < 1:
        raise CoaloraError("sampling power is at least 1", got=power, remedy="1 is uniform; 2.5 favors low bits")
    u = np.random.default_rng([seed, step, 1]).random()
    if sampling == "low-bits":
        u = u**power
    order = np.argsort(average_bits, kind="stable")
    return int(order[min(int(u * len(order)), len(order) - 1)])


def batch_indices(n: int, batch_size: int, *, seed: int, step: int) -> Tensor:
    """Examples of step `step`: epochs of shuffled examples, cut into batches that may span two epochs."""
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // n, (last - 1) // n + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        permutation = torch.randperm(n, generator=generator)
        parts.append(permutation[max(first - epoch * n, 0) : last - epoch * n])
    return torch.cat(parts)
