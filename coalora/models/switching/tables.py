"""Rows of the kernels' table for what is held, so that a switch gathers them and builds none.

A switch's part on the host is some operations of NumPy on arrays of N numbers, one copy to the device for each scheme,
and one launch: no Python for each layer, no page-locked memory asked for, nothing waited for.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]
_WAYS = 16  # copies that may be under way: a buffer is written again when that of so many switches ago has arrived


class HeldRows:
    """A row for each held (layer, choice), by scheme.

    Args:
        n_layers, n_choices: N and K.
        device: where the rows are used.

    Attributes:
        used: (N, K), when each was asked for last.
    """

    def __init__(self, n_layers: int, n_choices: int, device: torch.device) -> None:
        self._n_choices = n_choices
        self._place: Indices = np.full((n_layers, n_choices), -1, dtype=np.int64)
        self._banks: dict[str, Indices] = {}
        self._free: dict[str, list[int]] = {}
        self._device, self._turn = device, 0
        self._buffers: list[Tensor] = []
        self._arrived: list[torch.cuda.Event] = []
        self.used: Indices = np.zeros((n_layers, n_choices), dtype=np.int64)
        self._clock = 0

    def use(self, layers: Indices, choices: Indices) -> Indices:
        """Where the row of each is, -1 for none; they count as used now."""
        self._clock += 1
        pairs = layers * self._n_choices + choices  # of flat arrays NumPy takes in a third of the time
        self.used.reshape(-1)[pairs] = self._clock
        return self._place.reshape(-1).take(pairs)

    def gather(self, scheme: str, places: Indices) -> Tensor:
        """int64 (n, columns), on the device: the rows at places of one scheme."""
        rows = self._banks[scheme].take(places, axis=0)
        if self._device.type != "cuda":
            return torch.from_numpy(rows)
        if not self._buffers or self._buffers[0].numel() < rows.size:
            size = max(len(self._place), len(rows)) * rows.shape[1]
            self._buffers = [torch.empty(size, dtype=torch.int64, pin_memory=True) for _ in range(_WAYS)]
            self._arrived = [torch.cuda.Event() for _ in range(_WAYS)]
        self._turn = (self._turn + 1) % _WAYS
        self._arrived[self._turn].synchronize()
        part = self._buffers[self._turn][: rows.size]
        part.numpy()[:] = rows.reshape(-1)
        there = part.to(self._device, non_blocking=True).view(rows.shape)
        self._arrived[self._turn].record()
        return there

    def put(self, scheme: str, layers: Indices, choices: Indices, rows: Tensor) -> None:
        """Hold the rows (n, columns), given on the host."""
        free = self._free.setdefault(scheme, [])
        if len(free) < len(rows):
            old = self._banks.get(scheme, np.empty((0, rows.shape[1]), dtype=np.int64))
            more = np.empty((len(old) + len(rows), rows.shape[1]), dtype=np.int64)
            self._banks[scheme] = np.concatenate([old, more])
            free.extend(range(len(old), len(self._banks[scheme])))
        places = np.array([free.pop() for _ in range(len(rows))], dtype=np.int64)
        self._banks[scheme][places] = rows.numpy()
        self._place[layers, choices] = places

    def drop(self, scheme: str, layer: int, choice: int) -> None:
        """Forget a row."""
        self._free[scheme].append(int(self._place[layer, choice]))
        self._place[layer, choice] = -1
