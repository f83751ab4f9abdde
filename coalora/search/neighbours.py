"""Coordinate neighbours of a configuration: all configurations that differ in one layer by one listed
move.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from coalora.errors import CoaloraError
from coalora.search.checks import Int


def as_neighbour_table(neighbour_table: ArrayLike) -> Int:
    """`neighbour_table` as int64 (K, M), entries -1 (padding) or 0 to K-1. Raises CoaloraError otherwise."""
    table = np.asarray(neighbour_table)
    if table.ndim != 2 or not np.issubdtype(table.dtype, np.integer):
        raise CoaloraError(
            "neighbour_table must hold one row of integers per choice",
            got=f"{table.dtype} {table.shape}",
            expected="integers (K, M), -1 where a choice has fewer neighbours",
        )
    if table.size and (table.min() < -1 or table.max() >= table.shape[0]):
        raise CoaloraError(
            "neighbour_table must index the choices",
            got=f"values from {table.min()} to {table.max()}",
            expected=f"-1 to {table.shape[0] - 1}",
        )
    return table.astype(np.int64)


def enumerate_moves(
    configuration: ArrayLike, neighbour_table: ArrayLike, allowed: ArrayLike | None = None
) -> tuple[Int, Int]:
    """All single-coordinate moves from a configuration, layer by layer in the order of the table.

    Args:
        configuration: C (N,), the choice of every layer.
        neighbour_table: (K, M) int, the choices next to each choice, -1 where there are fewer than M.
        allowed: bool (N, K), or (K,) for all layers: the choices that a layer may take; None allows all.

    Returns:
        layers (m,), choices (m,): move i sets `configuration[layers[i]] = choices[i]`; staying is no move.

    Raises:
        CoaloraError: an index out of range, or `allowed` of another shape.
    """
    table = as_neighbour_table(neighbour_table)
    start = np.asarray(configuration, dtype=np.int64)
    K = table.shape[0]
    if start.ndim != 1 or (start.size and (start.min() < 0 or start.max() >= K)):
        raise CoaloraError("configuration must index the choices", got=start.shape, expected=f"(N,) in 0..{K - 1}")
    options = table[start]
    layers, columns = np.nonzero((options >= 0) & (options != start[:, None]))
    choices = options[layers, columns]
    if allowed is not None:
        mask = np.asarray(allowed, dtype=np.bool_)
        if mask.shape not in ((K,), (start.shape[0], K)):
            raise CoaloraError("allowed must say which choices a layer may take", got=mask.shape, expected="(N, K)")
        good = np.broadcast_to(mask, (start.shape[0], K))[layers, choices]
        layers, choices = layers[good], choices[good]
    return layers, choices
