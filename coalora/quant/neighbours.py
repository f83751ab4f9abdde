"""Which choices a search may step to from each choice."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from coalora.errors import CoaloraError


def neighbour_table(
    fields: NDArray[np.int64],
    scheme_index: NDArray[np.int64],
    nominal_bits: NDArray[np.float64],
    delta: int,
    allowed: NDArray[np.bool_] | None,
) -> NDArray[np.int64]:
    """See `ChoiceSpace.neighbours`, whose arrays these are: fields (K, F), scheme_index and nominal_bits (K,).

    Raises:
        CoaloraError: ``delta`` is below 1.
    """
    if delta < 1:
        raise CoaloraError("neighbours are at least one step apart", got=delta, expected="delta >= 1")
    near: list[dict[int, None]] = [{} for _ in fields]  # a dictionary keeps the order and drops repetitions
    for mask in np.ones((1, len(fields)), dtype=np.bool_) if allowed is None else np.unique(allowed, axis=0):
        members = np.flatnonzero(mask)
        owner = scheme_index[members]
        groups = [members[owner == s] for s in np.unique(owner)]
        for group in groups:
            for k, found in zip(group.tolist(), _steps(fields[group], delta), strict=True):
                near[k] |= dict.fromkeys(group[found].tolist())
                for other in groups:
                    if other is not group:
                        # The first of equals. One edge each way: without it a climb could never change the scheme.
                        near[k][int(other[np.abs(nominal_bits[other] - nominal_bits[k]).argmin()])] = None
    table = np.full((len(near), max(map(len, near))), -1, dtype=np.int64)
    for k, row in enumerate(near):
        table[k, : len(row)] = list(row)
    return table


def _steps(fields: NDArray[np.int64], delta: int) -> list[list[int]]:
    """Of each row, the rows that differ in one column by at most ``delta`` ranks of the values that occur in it."""
    ranks = np.stack([np.unique(column, return_inverse=True)[1].ravel() for column in fields.T], axis=1)
    by_ranks = {tuple(row): i for i, row in enumerate(ranks.tolist())}
    found: list[list[int]] = []
    for row in by_ranks:
        near = []
        for f in range(len(row)):
            for step in (sign * size for size in range(1, delta + 1) for sign in (-1, 1)):
                i = by_ranks.get((*row[:f], row[f] + step, *row[f + 1 :]))
                near += [i] if i is not None else []
        found.append(near)
    return found
