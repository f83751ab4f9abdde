"""The cache of packed states: exact results, no work twice, never more bytes than allowed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.quant.nf import NFScheme
from coalora.quant.packed_cache import CachedLayer, PackedCache
from coalora.quant.scheme import InputStatistics

CHOICES = NFScheme().choices()[::60]


class CountingScheme(NFScheme):
    """nf that counts what it quantizes."""

    def __init__(self) -> None:
        self.quantized: list[object] = []

    def quantize(self, weight: Tensor, choice, statistics=None) -> dict[str, Tensor]:
        self.quantized.append(choice)
        return super().quantize(weight, choice, statistics)


def weight(seed: int = 0) -> Tensor:
    return torch.randn(12, 40, generator=torch.Generator().manual_seed(seed))


def entry(nbytes: int) -> dict[str, Tensor]:
    return {"codes": torch.zeros(nbytes, dtype=torch.uint8)}


def test_results_are_those_of_the_scheme_before_and_after_they_are_cached() -> None:
    scheme, W = CountingScheme(), weight()
    layer = CachedLayer(W, None, PackedCache())
    for _ in range(2):
        for choice, result in zip(CHOICES, layer.fake_quantize_many(scheme, CHOICES), strict=True):
            assert torch.equal(result, scheme.fake_quantize(W, choice))
            assert torch.equal(layer.fake_quantize(scheme, choice), result)
    assert scheme.quantized == list(CHOICES)


def test_whoever_has_the_same_weight_and_statistics_shares_entries_and_nobody_else() -> None:
    scheme, cache = CountingScheme(), PackedCache()
    known, other = InputStatistics(torch.ones(40), torch.eye(40)), InputStatistics(torch.ones(40), torch.eye(40) * 2)
    for W, statistics, expected in (
        (weight(), known, 1),
        (weight(), InputStatistics(torch.ones(40), torch.eye(40)), 1),
        (weight(), other, 2),
        (weight(), InputStatistics(torch.ones(40)), 3),
        (weight(1), known, 4),
        (weight().view(20, 24), known, 5),
        (weight().T, known, 6),
    ):
        CachedLayer(W, statistics, cache).fake_quantize(scheme, CHOICES[0])
        assert len(scheme.quantized) == expected


def test_without_room_everything_is_quantized_anew_and_equal() -> None:
    scheme = CountingScheme()
    layer = CachedLayer(weight(), None, PackedCache(0))
    first, second = (layer.fake_quantize(scheme, CHOICES[0]) for _ in range(2))
    assert torch.equal(first, second)
    assert len(scheme.quantized) == 2


def test_bytes_stay_below_the_limit_and_the_least_recently_used_go_first() -> None:
    cache = PackedCache(100)
    for name in "abc":
        cache.put(name, entry(40))
        cache.get("a")
        assert cache.nbytes <= 100
    assert [name for name in "abc" if cache.get(name)] == ["a", "c"]
    cache.put("a", entry(10))
    assert cache.nbytes == 50
    cache.put("huge", entry(101))
    assert [name for name in ("a", "c", "huge") if cache.get(name)] == ["a", "c"]
    cache.limit = 45
    assert (len(cache), cache.nbytes) == (1, 40)
    with pytest.raises(CoaloraError, match="number of bytes"):
        cache.limit = -1
