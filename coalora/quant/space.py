"""The choices that a run allows for each layer: a subset of a scheme's, indexed 0 .. K-1.

Everything that searches or learns sees a choice as its index k, or as the row ``fields[k]`` of value indices
(what the configuration-aware model embeds); only quantization itself needs the choice object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coalora.errors import CoaloraError
from coalora.quant.scheme import Choice, FieldValue, Scheme, get_scheme


class ChoiceSpace:
    """K choices of a scheme, restricted field by field; equal when scheme and choices are.

    Args:
        scheme: a scheme or its name.
        **allowed: per field the values to keep, for example ``bits=[2, 3, 4]``; a field not named keeps all.
            Order and repetition do not matter: values keep the scheme's order.

    Attributes:
        scheme: the scheme.
        choices: the K choices, in the scheme's order.
        field_values: the values that occur, per field, ordered.
        fields: int64 (K, F), index of each choice's value among ``field_values``; read-only.
        field_sizes: number of values per field (F,).
        nominal_bits: float64 (K,), bits per weight by the scheme's formula; read-only.

    Raises:
        CoaloraError: unknown scheme, field or value, or nothing left.
    """

    def __init__(self, scheme: Scheme | str, /, **allowed: Sequence[FieldValue]) -> None:
        self.scheme = get_scheme(scheme) if isinstance(scheme, str) else scheme
        known = self.scheme.field_values
        for name, values in allowed.items():
            if name not in known:
                raise CoaloraError(
                    f"unknown field of scheme {self.scheme.name!r}",
                    got=name,
                    expected=f"one of {tuple(known)}",
                )
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise CoaloraError(f"field {name!r} takes a list of values", got=repr(values), expected=known[name])
            if unknown := [value for value in values if value not in known[name]]:
                raise CoaloraError(f"unknown value of field {name!r}", got=unknown, expected=f"some of {known[name]}")
        rows = [
            (choice, choice.as_dict())
            for choice in self.scheme.choices()
            if all(choice.as_dict()[name] in values for name, values in allowed.items())
        ]
        if not rows:
            raise CoaloraError("a choice space holds at least one choice", got=dict(allowed), expected=dict(known))
        self.choices: tuple[Choice, ...] = tuple(choice for choice, _ in rows)
        self.field_values: dict[str, tuple[FieldValue, ...]] = {
            name: tuple(value for value in values if any(row[name] == value for _, row in rows))
            for name, values in known.items()
        }
        self.field_sizes: tuple[int, ...] = tuple(map(len, self.field_values.values()))
        self.fields: NDArray[np.int64] = np.array(
            [[values.index(row[name]) for name, values in self.field_values.items()] for _, row in rows],
            dtype=np.int64,
        )
        self.nominal_bits: NDArray[np.float64] = np.array(
            [self.scheme.nominal_bits(choice) for choice in self.choices], dtype=np.float64
        )
        self.fields.setflags(write=False)
        self.nominal_bits.setflags(write=False)
        self._index = {tuple(row.values()): k for k, (_, row) in enumerate(rows)}

    def __len__(self) -> int:
        return len(self.choices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChoiceSpace):
            return NotImplemented
        return self.scheme.name == other.scheme.name and self.choices == other.choices

    def __hash__(self) -> int:
        return hash((self.scheme.name, self.choices))

    def __repr__(self) -> str:
        allowed = ", ".join(f"{name}={list(values)}" for name, values in self.field_values.items())
        return f"ChoiceSpace({self.scheme.name!r}, {allowed})"

    def index(self, choice: Choice | Mapping[str, Any]) -> int:
        """The index k of a choice, given as the object or as the dictionary of its fields.

        Raises:
            CoaloraError: not a choice of this space.
        """
        row = choice.as_dict() if isinstance(choice, Choice) else dict(choice)
        key = tuple(row.get(name) for name in self.field_values)
        if row.keys() != self.field_values.keys() or key not in self._index:
            raise CoaloraError("not a choice of this space", got=row, expected=self.field_values)
        return self._index[key]

    def choice_dict(self, k: int) -> dict[str, FieldValue]:
        """Fields of choice k, JSON-able."""
        return self._choice(k).as_dict()

    def describe(self, k: int) -> str:
        """Choice k in a few characters, for tables and pictures."""
        return str(self._choice(k))

    def bits_range(self) -> tuple[float, float]:
        """Least and largest nominal bits per weight."""
        return float(self.nominal_bits.min()), float(self.nominal_bits.max())

    def neighbours(self, delta: int = 1) -> NDArray[np.int64]:
        """Choices that differ from k in one field only, by at most ``delta`` steps of its ordered values.

        Returns:
            int64 (K, M): indices, by field and then by growing step; rows with fewer than M end in -1.

        Raises:
            CoaloraError: ``delta`` is below 1.
        """
        if delta < 1:
            raise CoaloraError("neighbours are at least one step apart", got=delta, expected="delta >= 1")
        by_fields = {tuple(row): k for k, row in enumerate(self.fields.tolist())}
        found: list[list[int]] = []
        for row in by_fields:
            near: list[int] = []
            for f in range(len(row)):
                for step in (sign * size for size in range(1, delta + 1) for sign in (-1, 1)):
                    k = by_fields.get((*row[:f], row[f] + step, *row[f + 1 :]))
                    near += [k] if k is not None else []
            found.append(near)
        table = np.full((len(found), max(map(len, found))), -1, dtype=np.int64)
        for k, near in enumerate(found):
            table[k, : len(near)] = near
        return table

    def packed_nbytes_table(self, shapes: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Exact stored bytes of every layer under every choice.

        Args:
            shapes: N layer shapes (out, in).

        Returns:
            int64 (N, K).
        """
        keys = [tuple(shape) for shape in shapes]
        distinct = {
            key: [self.scheme.packed_nbytes(choice, key) for choice in self.choices] for key in dict.fromkeys(keys)
        }
        return np.array([distinct[key] for key in keys], dtype=np.int64).reshape(len(keys), len(self))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `from_dict`."""
        return {
            "scheme": self.scheme.name,
            "fields": {name: list(v) for name, v in self.field_values.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ChoiceSpace:
        """Inverse of `to_dict`.

        Raises:
            CoaloraError: keys other than ``scheme`` and ``fields``, or contents that the constructor refuses.
        """
        if data.keys() != {"scheme", "fields"}:
            raise CoaloraError(
                "a serialised choice space has two keys", got=sorted(data), expected=["fields", "scheme"]
            )
        return cls(data["scheme"], **data["fields"])

    def _choice(self, k: int) -> Choice:
        if not 0 <= k < len(self.choices):
            raise CoaloraError("no such choice", got=k, expected=f"0 to {len(self.choices) - 1}")
        return self.choices[k]
