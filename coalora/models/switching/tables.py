"""Rows of the kernels' table for what is held, on the device, so that a switch gathers them and builds none."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]


class HeldRows:
    """A row for each held (layer, choice), by scheme.

    Args:
        n_layers, n_choices: N and K.
        device: where the rows are used.

    Attributes:
        used: (N, K), when each was asked for last.
    """

    def __init__(self, n_layers: int, n_choices: int, device: torch.device) -> None:
        self._place: Indices = np.full((n_layers, n_choices), -1, dtype=np.int64)
        self._banks: dict[str, Tensor] = {}
        self._free: dict[str, list[int]] = {}
        self._device = device
        self.used: Indices = np.zeros((n_layers, n_choices), dtype=np.int64)

    def holds(self, layers: Indices, choices: Indices) -> NDArray[np.bool_]:
        """Whether each has a row."""
        return self._place[layers, choices] >= 0

    def gather(self, scheme: str, layers: Indices, choices: Indices) -> Tensor:
        """int64 (n, columns): the rows of layers under choices of one scheme."""
        return self._banks[scheme].index_select(0, self._there(self._place[layers, choices]))

    def put(self, scheme: str, layers: Indices, choices: Indices, rows: Tensor) -> None:
        """Hold the rows (n, columns), given on the host."""
        free = self._free.setdefault(scheme, [])
        if len(free) < len(rows):
            old = self._banks.get(scheme)
            start = 0 if old is None else len(old)
            with torch.inference_mode(False):  # or training could not write to what an evaluation has made
                bank = torch.empty((2 * start + len(rows), rows.shape[1]), dtype=torch.int64, device=self._device)
            if old is not None:
                bank[:start] = old
            self._banks[scheme] = bank
            free.extend(range(start, len(bank)))
        places = np.array([free.pop() for _ in range(len(rows))], dtype=np.int64)
        self._banks[scheme].index_copy_(0, self._there(places), self._there(rows))
        self._place[layers, choices] = places

    def drop(self, scheme: str, layer: int, choice: int) -> None:
        """Forget a row."""
        self._free[scheme].append(int(self._place[layer, choice]))
        self._place[layer, choice] = -1

    def _there(self, numbers: Indices | Tensor) -> Tensor:
        tensor = torch.from_numpy(numbers) if isinstance(numbers, np.ndarray) else numbers
        # Page-locked, or the host would wait for the device.
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor
