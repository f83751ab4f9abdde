"""What calibrated schemes have quantized, packed, so that nothing is quantized twice.

GPTQ takes tenths of a second for a small layer and minutes for a large one, unpacking takes milliseconds, and packed
codes are a fraction of a dequantized weight: so the packed state is what is worth keeping. Entries are addressed by
content (weight, statistics, choice), hence valid whoever asks: calibration fills the cache that training, search,
evaluation and export of the same base read. The least recently used go first once a limit of bytes is reached.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.quant.scheme import Choice, InputStatistics, Scheme


class PackedCache:
    """Packed states by key, on the CPU, `limit` bytes at most; 0 keeps nothing.

    Attributes:
        nbytes: bytes held.

    Raises:
        CoaloraError: a negative limit.
    """

    def __init__(self, limit: int = 1 << 29) -> None:
        self.nbytes = 0
        self._entries: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self.limit = limit

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def limit(self) -> int:
        """Bytes at most; lowering it drops entries at once."""
        return self._limit

    @limit.setter
    def limit(self, nbytes: int) -> None:
        if nbytes < 0:
            raise CoaloraError("a cache is limited to a number of bytes", got=nbytes, expected="0 or more")
        self._limit = nbytes
        self._shrink()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The entry, now the most recently used; None where there is none."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: str, packed: Mapping[str, Tensor]) -> None:
        """Keep an entry as long as the limit allows; one above the limit is not kept at all."""
        self._drop(key)
        entry = {name: tensor.detach().cpu() for name, tensor in packed.items()}
        if _nbytes(entry) <= self._limit:  # or it would drive everything else out first
            self._entries[key] = entry
            self.nbytes += _nbytes(entry)
            self._shrink()

    def _drop(self, key: str) -> None:
        self.nbytes -= _nbytes(self._entries.pop(key, {}))

    def _shrink(self) -> None:
        while self.nbytes > self._limit:
            self._drop(next(iter(self._entries)))


def _nbytes(entry: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


SHARED = PackedCache()
"""The cache of this process."""


class CachedLayer:
    """One layer's weight, quantized once for each choice as long as its packed codes stay in the cache.

    Args:
        weight: (out, in); not to be written to while this object is in use.
        statistics: of the layer's inputs.
        cache: where packed codes are kept.
    """

    def __init__(self, weight: Tensor, statistics: InputStatistics | None, cache: PackedCache = SHARED) -> None:
        self._weight = weight
        self._statistics = statistics
        self._cache = cache

    def fake_quantize(self, scheme: Scheme, choice: Choice) -> Tensor:
        """`Scheme.fake_quantize`, bit for bit, float32 on the weight's device."""
        return next(self.fake_quantize_many(scheme, [choice]))

    def fake_quantize_many(self, scheme: Scheme, choices: Sequence[Choice]) -> Iterator[Tensor]:
        """`Scheme.fake_quantize_many`, bit for bit; choices that the cache lacks share work as they do there."""
        shape, device = self._weight.shape, self._weight.device
        keys = [f"{self._digest}/{scheme.name}/{choice}" for choice in choices]
        found = [self._cache.get(key) for key in keys]
        lacking = [choice for choice, packed in zip(choices, found, strict=True) if packed is None]
        states = scheme.quantize_many(self._weight, lacking, self._statistics)
        for key, choice, packed in zip(keys, choices, found, strict=True):
            if packed is None:
                state = next(states)
                self._cache.put(key, scheme.pack(state, choice, shape))
            else:
                state = scheme.unpack({name: t.to(device) for name, t in packed.items()}, choice, shape)
            yield scheme.dequantize(state, choice, shape)

    @cached_property
    def _digest(self) -> str:
        """Of everything that quantization reads."""
        known = self._statistics
        parts = [self._weight, *((known.second_moment, known.hessian) if known is not None else ())]
        digest = hashlib.sha256()
        for part in parts:
            if part is not None:
                digest.update(f"{part.dtype} {tuple(part.shape)};".encode())
                digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()
