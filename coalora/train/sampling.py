"""Draws of a training step: its configuration, and its examples.

Where training spends its steps is the largest lever on low-bit configurations, and costs nothing. Five modes:

`uniform`   all members alike (CoA-LoRA, arXiv 2509.25214, section 3).
`low-bits`  rank u^power of the members in rising order of bits: a fixed preference for low bits.
`low-bits-first` the same with a power that falls to 1 over the steps: low bits first, uniform draws in the end.
`sandwich`  smallest, largest and a random member in turn (the sandwich rule of slimmable networks, Yu and Huang 2019,
            arXiv 1903.05134, spread over three steps so that a step costs what it costs elsewhere).
`adaptive`  in proportion to each member's own excess loss, estimated as training goes on: a member that full training
            has brought down to the level of the best one gets few steps, one that still loses gets many.

Draws are functions of (seed, step), and of what was observed before for `adaptive`, whose estimates are part of the
training state: a resumed run draws as an undisturbed one. Methods that are compared see the same examples in the same
order, and the same configurations in the modes that observe nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.recipes import Sampling

_RATE = 0.1  # of a member's running mean
_SPREAD = 1.5  # ranks over which the estimates are smoothed: losses change slowly along the bits, batches are noisy
_FLOOR = 0.25  # share of `adaptive` steps that are drawn uniformly: estimates of all members stay fresh
_WARMUP = 2  # observations a member on average, before estimates are trusted


@dataclass
class LossEstimates:
    """Running means of the training loss along the bits.

    Attributes:
        bits: (n,) rising.
        loss: (n,), NaN where nothing was observed.
        count: (n,) observations.
    """

    bits: NDArray[np.float64]
    loss: NDArray[np.float64]
    count: NDArray[np.float64]

    @classmethod
    def empty(cls, bits: NDArray[np.float64]) -> LossEstimates:
        return cls(bits, np.full(len(bits), np.nan), np.zeros(len(bits)))

    def moved_to(self, bits: NDArray[np.float64]) -> LossEstimates:
        """The same knowledge at other bits (a new round's members, rising): interpolated between the old ones."""
        if np.array_equal(bits, self.bits):
            return LossEstimates(bits, self.loss.copy(), self.count.copy())
        known = np.flatnonzero(self.count)
        if not known.size:
            return LossEstimates.empty(bits)
        return LossEstimates(
            bits,
            np.interp(bits, self.bits[known], self.loss[known]),
            np.interp(bits, self.bits[known], self.count[known]),
        )

    def observe(self, rank: int, loss: float) -> None:
        self.count[rank] += 1
        old = self.loss[rank]
        rate = max(1.0 / self.count[rank], _RATE)
        self.loss[rank] = loss if np.isnan(old) else old + rate * (loss - old)

    def excess(self) -> NDArray[np.float64] | None:
        """Smoothed loss above the lowest one (n,); None before there are enough observations."""
        known = np.flatnonzero(self.count)
        if self.count.sum() < _WARMUP * len(self.bits) or not known.size:
            return None
        distance = np.subtract.outer(np.arange(len(self.bits)), known) / _SPREAD
        weight = np.exp(-0.5 * distance**2) * np.minimum(self.count[known], 1 / _RATE)
        # Where no neighbour has been seen the nearest known member counts, however far.
        weight += 1e-12 * np.exp(-np.abs(distance))
        smooth = weight @ self.loss[known] / weight.sum(axis=1)
        return smooth - smooth.min()


class Sampler:
    """Draws members of a configuration set, step by step.

    Args:
        average_bits: (n,) of the members, in any order.
        sampling: a mode of the module docstring.
        power: at least 1. `low-bits`: exponent of the rank; `adaptive`: exponent of the excess. 1 is uniform for
            `low-bits`, and in proportion to the excess for `adaptive`. Other modes do not use it.
        seed: of the draws.
        total_steps: those that `low-bits-first` falls over.
        estimates: of an earlier round or an interrupted one (`adaptive`).

    Raises:
        CoaloraError: a power below 1.
    """

    def __init__(
        self,
        average_bits: np.ndarray,
        *,
        sampling: Sampling,
        power: float,
        seed: int,
        total_steps: int = 1,
        estimates: LossEstimates | None = None,
    ) -> None:
        if power < 1:
            raise CoaloraError(
                f"A sampling power of {power} is below 1", remedy="Set it to 1 (uniform) or more; 2.5 favors low bits"
            )
        self.sampling, self.power, self.seed, self.total_steps = sampling, power, seed, total_steps
        self.order = np.argsort(average_bits, kind="stable")
        self._rank = np.argsort(self.order)
        bits = np.asarray(average_bits, dtype=np.float64)[self.order]
        self.estimates = LossEstimates.empty(bits) if estimates is None else estimates.moved_to(bits)

    def draw(self, step: int, *, opposite: bool = False) -> int:
        """Index of the member that step `step` trains on, or of its counterpart at the other end of the bits, which is
        drawn from 1 - u in place of u, and so distributed alike."""
        u = float(np.random.default_rng([self.seed, step, 1]).random())
        u = 1 - u if opposite else u
        n = len(self.order)
        if self.sampling == "sandwich" and step % 3 < 2:
            return int(self.order[0 if (step % 3 == 0) != opposite else n - 1])
        excess = self.estimates.excess() if self.sampling == "adaptive" else None
        if excess is not None and excess.max() > 0:
            share = excess**self.power
            share = (1 - _FLOOR) * share / share.sum() + _FLOOR / n
            return int(self.order[min(int(np.searchsorted(np.cumsum(share), u, side="right")), n - 1)])
        if self.sampling == "low-bits":
            u = u**self.power
        elif self.sampling == "low-bits-first":
            u = u ** (1 + (self.power - 1) * max(0.0, 1 - step / self.total_steps))
        return int(self.order[min(int(u * n), n - 1)])

    def observe(self, member: int, loss: float) -> None:
        """Tell the loss of a step on `member`."""
        if self.sampling == "adaptive":
            self.estimates.observe(int(self._rank[member]), loss)


def batch_indices(n: int, batch_size: int, *, seed: int, step: int) -> Tensor:
    """Examples of step `step`: epochs of shuffled examples, cut into batches that may span two epochs."""
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // n, (last - 1) // n + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        permutation = torch.randperm(n, generator=generator)
        parts.append(permutation[max(first - epoch * n, 0) : last - epoch * n])
    return torch.cat(parts)
