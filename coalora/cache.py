"""Cache of tensors by key, limited in bytes: what was used longest ago goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from torch import Tensor

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def total_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of several tensors together."""
    return sum(tensor.nbytes for tensor in tensors)


class ByteCache(Generic[K, V]):
    """Values by key, at most `limit` bytes of them.

    Args:
        limit: bytes; 0 keeps nothing.
        size: bytes of a value.

    Attributes:
        nbytes: bytes of what is kept now.

    Example:
        >>> import torch
        >>> from coalora.cache import ByteCache
        >>> cache = ByteCache(limit=8, size=lambda tensor: tensor.nbytes)
        >>> for key in "abc":
        ...     cache.put(key, torch.zeros(1))
        >>> cache.get("a") is None, cache.get("c") is None, cache.nbytes
        (True, False, 8)
    """

    def __init__(self, limit: int, size: Callable[[V], int]) -> None:
        self.limit, self.nbytes, self._size = limit, 0, size
        self._kept: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: K) -> bool:
        return key in self._kept

    def get(self, key: K) -> V | None:
        """The value, which counts as used now; None where it is not kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep a value in place of those used longest ago; one that exceeds the limit alone is not kept."""
        self.pop(key)
        if self._size(value) <= self.limit:
            self._kept[key] = value
            self.nbytes += self._size(value)
            while self.nbytes > self.limit:
                self.pop(next(iter(self._kept)))

    def pop(self, key: K) -> V | None:
        """Take a value out; None where it is not kept."""
        value = self._kept.pop(key, None)
        self.nbytes -= 0 if value is None else self._size(value)
        return value
