"""Checks shared by the search: every table and point set is turned into a float64 or int64 array, or refused."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coalora.errors import CoaloraError

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]


def as_objectives(Y: ArrayLike, *, n_objectives: int | None = 2) -> Float:
    """`Y` as float64 (n, m); an empty `Y` becomes (0, m). Raises CoaloraError on NaN or another shape."""
    array = np.asarray(Y, dtype=np.float64)
    if array.size == 0:
        return np.empty((0, n_objectives or 2))
    if array.ndim != 2 or (n_objectives is not None and array.shape[1] != n_objectives) or array.shape[1] < 2:
        columns = "m" if n_objectives is None else n_objectives
        raise CoaloraError(f"Y has the shape {array.shape}", remedy=f"Give one row per point, (n, {columns})")
    if np.isnan(array).any():
        raise CoaloraError(
            f"Y has NaN in {int(np.isnan(array).any(axis=1).sum())} rows",
            remedy="Drop configurations whose evaluation failed",
        )
    return array


def as_point(point: ArrayLike, *, name: str) -> Float:
    """`point` as float64 (2,): (loss, cost). Raises CoaloraError unless it is two finite numbers."""
    array = np.asarray(point, dtype=np.float64)
    if array.shape != (2,) or not np.isfinite(array).all():
        raise CoaloraError(f"{name} is {point!r}", remedy="Give two finite numbers, (loss, cost)")
    return array


def as_table(table: ArrayLike, *, name: str, shape: tuple[int, ...] | None = None) -> Float:
    """`table` as float64 (N, K), finite. Raises CoaloraError on another shape, NaN or infinity."""
    array = np.asarray(table, dtype=np.float64)
    if array.ndim != 2 or array.size == 0 or (shape is not None and array.shape != shape):
        raise CoaloraError(
            f"{name} has the shape {array.shape}",
            remedy=f"Give one row per layer and one column per choice, {shape or '(N, K)'}",
        )
    if not np.isfinite(array).all():
        raise CoaloraError(
            f"{name} has {int((~np.isfinite(array)).sum())} entries that are not finite",
            remedy="Leave out choices that a layer cannot take, or give them a large finite error",
        )
    return array


def as_configurations(configurations: ArrayLike, shape: tuple[int, int], *, name: str) -> Int:
    """`configurations` as int64 (n, N) for a table of `shape` (N, K). Raises CoaloraError when out of range."""
    array = np.asarray(configurations)
    if array.size == 0:
        return np.empty((0, shape[0]), dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != shape[0] or not np.issubdtype(array.dtype, np.integer):
        raise CoaloraError(
            f"{name} has the type {array.dtype} and the shape {array.shape}",
            remedy=f"Give integers, one row per configuration and one column per layer, (n, {shape[0]})",
        )
    if array.min() < 0 or array.max() >= shape[1]:
        raise CoaloraError(
            f"{name} goes from {array.min()} to {array.max()}", remedy=f"Give indices of choices, 0 to {shape[1] - 1}"
        )
    return array.astype(np.int64)


def as_losses(losses: ArrayLike, n: int) -> Float:
    """`losses` as float64 (n,), finite. Raises CoaloraError otherwise."""
    array = np.asarray(losses, dtype=np.float64)
    if array.shape != (n,) or not np.isfinite(array).all():
        raise CoaloraError(
            f"Losses of shape {array.shape}, {int((~np.isfinite(array)).sum())} of them not finite, are not those of "
            f"{n} configurations",
            remedy="Drop configurations whose evaluation failed",
        )
    return array


def table_sum(table: Float, configurations: Int) -> Float:
    """Sum over layers of `table[l, C_l]`: (N, K) and (n, N) give (n,); average bits for a table of bits / N."""
    return table[np.arange(table.shape[0]), configurations].sum(axis=-1)


def as_allowed(allowed: ArrayLike | None, shape: tuple[int, ...]) -> Bool:
    """`allowed` as bool (N, K): the choices that each layer may take; None allows all.

    Raises:
        CoaloraError: another shape or type, or a layer that is left without a choice.
    """
    if allowed is None:
        return np.ones(shape, dtype=np.bool_)
    mask = np.asarray(allowed)
    if mask.shape != shape or mask.dtype != np.bool_:
        raise CoaloraError(
            f"allowed has the type {mask.dtype} and the shape {mask.shape}",
            remedy=f"Say of every layer which choice it may take, bool {shape}",
        )
    empty = np.flatnonzero(~mask.any(axis=1))
    if empty.size:
        raise CoaloraError(
            f"{empty.size} layers are left without a choice, the first is layer {empty[0]}",
            remedy="Loosen the constraints on these layers",
        )
    return mask


def is_allowed(allowed: Bool, configurations: Int) -> Bool:
    """Mask (n,) of the configurations (n, N) that take only choices of `allowed` (N, K)."""
    return np.asarray(allowed[np.arange(allowed.shape[0]), configurations].all(axis=-1))
