"""Byte-limited cache: what goes, and what is counted."""

from __future__ import annotations

import torch

from coalora.cache import ByteCache, nbytes


def _cache(limit: int) -> ByteCache[str, tuple[torch.Tensor, ...]]:
    return ByteCache(limit, nbytes)


def test_what_was_used_longest_ago_goes_first() -> None:
    cache = _cache(24)
    for key in "abc":
        cache.put(key, (torch.zeros(1), torch.zeros(1)))
    assert cache.get("a") is not None  # used now
    cache.put("d", (torch.zeros(2),))
    assert [key in cache for key in "abcd"] == [True, False, True, True]
    assert (len(cache), cache.nbytes) == (3, 24)


def test_a_value_above_the_limit_is_not_kept_and_drops_nothing_else() -> None:
    cache = _cache(8)
    cache.put("a", (torch.zeros(2),))
    cache.put("b", (torch.zeros(3),))
    assert ("a" in cache, "b" in cache) == (True, False)
    empty = _cache(0)
    empty.put("a", (torch.zeros(1),))
    assert len(empty) == empty.nbytes == 0


def test_bytes_are_counted_once_for_each_key() -> None:
    cache = _cache(100)
    cache.put("a", (torch.zeros(2),))
    cache.put("a", (torch.zeros(3),))
    assert cache.nbytes == 12
    assert cache.pop("a") is not None
    assert cache.pop("a") is None
    assert cache.nbytes == 0
