"""Cache of tensors by key, limited in bytes: what was used longest ago goes first."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def share_of_free_memory(device: torch.device) -> int:
    """Bytes that a cache takes by default: a quarter of a GPU's memory that is free now, an eighth of the RAM that is
    available now and at most 2 GiB.

    Example:
        >>> import torch
        >>> from coalora.cache import share_of_free_memory
        >>> 0 < share_of_free_memory(torch.device("cpu")) <= 2 << 30
        True
    """
    # The rest is for activations, gradients and the optimizer; a training set's packed layers mostly fit.
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    try:
        kilobytes = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:  # other systems than Linux
        kilobytes = None
    available = int(kilobytes[1]) << 10 if kilobytes else 1 << 32
    return min(available // 8, 1 << 31)


class ByteCache(Generic[K, V]):
    """Values by key, at most `limit` bytes of them; iterates over keys, from the one used longest ago on.

    Args:
        limit: bytes; 0 keeps nothing.
        size: bytes of a value.
        dropped: told the key of each value that `put` did not keep, or did not keep any longer.

    Attributes:
        nbytes: bytes of what is kept now.

    Example:
        >>> import torch
        >>> from coalora.cache import ByteCache
        >>> cache = ByteCache(limit=8, size=lambda tensor: tensor.nbytes)
        >>> for key in "abc":
        ...     cache.put(key, torch.zeros(1))
        >>> list(cache), cache.get("a") is None, cache.nbytes
        (['b', 'c'], True, 8)
    """

    def __init__(self, limit: int, size: Callable[[V], int], dropped: Callable[[K], None] | None = None) -> None:
        self.limit, self.nbytes, self._size, self._dropped = limit, 0, size, dropped
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[K]:
        return iter(self._kept)

    def __contains__(self, key: K) -> bool:
        return key in self._kept

    def values(self) -> Iterator[V]:
        """The values that are kept now."""
        return (value for value, _ in self._kept.values())

    def get(self, key: K) -> V | None:
        """The value, which counts as used now; None where it is not kept."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: K, value: V) -> None:
        """Keep a value in place of those used longest ago; one that exceeds the limit alone is not kept."""
        if key in self._kept:
            self.pop(key)
        size = self._size(value)
        if size <= self.limit:
            self._kept[key] = value, size
            self.nbytes += size
        elif self._dropped is not None:
            self._dropped(key)
        while self.nbytes > self.limit:
            oldest = next(iter(self._kept))
            self.pop(oldest)
            if self._dropped is not None:
                self._dropped(oldest)

    def pop(self, key: K) -> V | None:
        """Take a value out; None where it is not kept."""
        value, size = self._kept.pop(key, (None, 0))
        self.nbytes -= size
        return value
