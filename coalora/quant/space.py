"""The choices that a run allows: subsets of one or several schemes, indexed 0 .. K-1.

Everything that searches or learns sees a choice as its index k, or as the row ``fields[k]`` of value indices
(what the configuration-aware model embeds); only quantization itself needs the choice object and its scheme.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.quant.fields import ABSENT, FieldValues, occurring, restricted
from coalora.quant.neighbours import neighbour_table
from coalora.quant.scheme import Choice, FieldValue, InputStatistics, Scheme, get_scheme

MIXED = "mixed"  # the name of several schemes together


class ChoiceSpace:
    """K choices of a scheme, restricted field by field, or of several schemes (`union`); equal when their choices are.

    Args:
        scheme: a scheme or its name.
        **allowed: per field the values to keep, for example ``bits=[2, 3, 4]``; a field not named keeps all.
            Order and repetition do not matter: values keep the scheme's order.

    Attributes:
        schemes: the schemes, in the order of their choices.
        choices: the K choices, in the order of their scheme.
        scheme_index: int64 (K,), each choice's scheme among ``schemes``; read-only.
        field_values: the values that occur, per field, ordered. With several schemes the first field is ``scheme``,
            fields of one name are one field, and one that some scheme lacks ends in `ABSENT`.
        fields: int64 (K, F), index of each choice's value among ``field_values``; read-only.
        field_sizes: number of values per field (F,).
        nominal_bits: float64 (K,), bits per weight by the schemes' formulas; read-only.

    Raises:
        CoaloraError: unknown scheme, field or value, or nothing left.
    """

    def __init__(self, scheme: Scheme | str, /, **allowed: Sequence[FieldValue]) -> None:
        only = get_scheme(scheme) if isinstance(scheme, str) else scheme
        self._fill([(only, restricted(only, allowed))])

    @classmethod
    def union(cls, spaces: Sequence[ChoiceSpace]) -> ChoiceSpace:
        """The choices of all spaces together. Of one scheme, every combination of field values that occur is taken:
        a scheme's part stays a product of fields.

        Raises:
            CoaloraError: no space.
        """
        values: dict[str, dict[str, set[FieldValue]]] = {}
        schemes: dict[str, Scheme] = {}
        for space in spaces:
            for scheme, choice in zip(map(space.scheme_of, range(len(space))), space.choices, strict=True):
                schemes.setdefault(scheme.name, scheme)
                for name, value in choice.as_dict().items():
                    values.setdefault(scheme.name, {}).setdefault(name, set()).add(value)
        if not schemes:
            raise CoaloraError("a union joins at least one choice space", got="none")
        joined = cls.__new__(cls)
        joined._fill([(s, restricted(s, {f: list(v) for f, v in values[name].items()})) for name, s in schemes.items()])
        return joined

    def _fill(self, parts: Sequence[tuple[Scheme, list[Choice]]]) -> None:
        self.schemes = tuple(scheme for scheme, _ in parts)
        self.choices: tuple[Choice, ...] = tuple(choice for _, choices in parts for choice in choices)
        owner = [s for s, (_, choices) in enumerate(parts) for _ in choices]
        self.scheme_index: NDArray[np.int64] = np.array(owner, dtype=np.int64)
        rows = [self._row(k) for k in range(len(self.choices))]
        self.field_values: FieldValues = occurring(self.schemes, rows)
        self.field_sizes: tuple[int, ...] = tuple(map(len, self.field_values.values()))
        self.fields: NDArray[np.int64] = np.array(
            [[values.index(row.get(name, ABSENT)) for name, values in self.field_values.items()] for row in rows],
            dtype=np.int64,
        )
        self.nominal_bits: NDArray[np.float64] = np.array(
            [self.scheme_of(k).nominal_bits(choice) for k, choice in enumerate(self.choices)], dtype=np.float64
        )
        for array in (self.scheme_index, self.fields, self.nominal_bits):
            array.setflags(write=False)
        self._index = {_key(row): k for k, row in enumerate(rows)}

    def _row(self, k: int) -> dict[str, FieldValue]:
        fields = self.choices[k].as_dict()
        return fields if len(self.schemes) == 1 else {"scheme": self.scheme_of(k).name, **fields}

    def __len__(self) -> int:
        return len(self.choices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChoiceSpace):
            return NotImplemented
        return self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[object, ...]:
        return tuple(scheme.name for scheme in self.schemes), self.choices

    def __repr__(self) -> str:
        allowed = ", ".join(f"{name}={list(values)}" for name, values in self.field_values.items())
        return f"ChoiceSpace({self.scheme_name!r}, {allowed})"

    @property
    def scheme(self) -> Scheme:
        """The scheme of a space that has only one.

        Raises:
            CoaloraError: there are several.
        """
        if len(self.schemes) > 1:
            names = ", ".join(scheme.name for scheme in self.schemes)
            raise CoaloraError(
                "a mixed choice space has a scheme for each choice", got=names, remedy="ask for scheme_of(k)"
            )
        return self.schemes[0]

    @property
    def scheme_name(self) -> str:
        """The scheme's name; `MIXED` where there are several."""
        return self.schemes[0].name if len(self.schemes) == 1 else MIXED

    @property
    def needs_statistics(self) -> bool:
        """Whether any scheme reads the Hessians of the layers' inputs."""
        return any(scheme.needs_statistics for scheme in self.schemes)

    def scheme_of(self, k: int) -> Scheme:
        """The scheme of choice k."""
        return self.schemes[self.scheme_index[k]]

    def fake_quantize_many(
        self, weight: Tensor, indices: Sequence[int], statistics: InputStatistics | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(k, weight quantized and dequantized under choice k), scheme by scheme; see `Scheme.fake_quantize_many`."""
        for s, scheme in enumerate(self.schemes):
            own = [k for k in indices if self.scheme_index[k] == s]
            results = scheme.fake_quantize_many(weight, [self.choices[k] for k in own], statistics)
            yield from zip(own, results, strict=True)

    def index(self, choice: Choice | Mapping[str, Any]) -> int:
        """The index k of a choice, given as the object or as its dictionary (`choice_dict`).

        Raises:
            CoaloraError: not a choice of this space.
        """
        row = dict(choice) if isinstance(choice, Mapping) else choice.as_dict()
        if isinstance(choice, Choice) and len(self.schemes) > 1:
            owners = [scheme.name for scheme in self.schemes if type(choice) is scheme.choice_type]
            row = {"scheme": owners[0] if len(owners) == 1 else "", **row}
        k = self._index.get(_key(row))
        if k is None:
            raise CoaloraError("not a choice of this space", got=row, expected=self.field_values)
        return k

    def choice_dict(self, k: int) -> dict[str, FieldValue]:
        """Fields of choice k, JSON-able; with several schemes its ``scheme`` too."""
        self._choice(k)
        return self._row(k)

    def describe(self, k: int) -> str:
        """Choice k in a few characters, for tables and pictures."""
        return str(self._choice(k))

    def bits_range(self) -> tuple[float, float]:
        """Least and largest nominal bits per weight."""
        return float(self.nominal_bits.min()), float(self.nominal_bits.max())

    def neighbours(self, delta: int = 1, allowed: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """The choices next to each choice: those that differ in one field only, by at most ``delta`` steps of its
        ordered values, and of every other scheme the one of the nearest nominal bits.

        Args:
            allowed: (N, K), the choices of each layer; steps are counted among the values that a layer may take, and
                the table joins the steps of all layers. None: every layer may take every choice.

        Returns:
            int64 (K, M): indices, by field and then by growing step; rows with fewer than M end in -1.

        Raises:
            CoaloraError: ``delta`` is below 1.
        """
        return neighbour_table(self.fields, self.scheme_index, self.nominal_bits, delta, allowed)

    def packed_nbytes_table(self, shapes: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Exact stored bytes of every layer under every choice.

        Args:
            shapes: N layer shapes (out, in).

        Returns:
            int64 (N, K).
        """
        keys = [tuple(shape) for shape in shapes]
        distinct = {
            key: [self.scheme_of(k).packed_nbytes(choice, key) for k, choice in enumerate(self.choices)]
            for key in dict.fromkeys(keys)
        }
        return np.array([distinct[key] for key in keys], dtype=np.int64).reshape(len(keys), len(self))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `from_dict`."""
        if len(self.schemes) == 1:
            return {"scheme": self.scheme.name, "fields": {name: list(v) for name, v in self.field_values.items()}}
        parts = []
        for s, scheme in enumerate(self.schemes):
            rows = [c.as_dict() for c, owner in zip(self.choices, self.scheme_index, strict=True) if owner == s]
            parts.append({"scheme": scheme.name, "fields": {n: list(v) for n, v in occurring([scheme], rows).items()}})
        return {"parts": parts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ChoiceSpace:
        """Inverse of `to_dict`.

        Raises:
            CoaloraError: keys other than ``scheme`` and ``fields``, or contents that the constructor refuses.
        """
        if data.keys() == {"parts"}:
            return cls.union([cls.from_dict(part) for part in data["parts"]])
        if data.keys() != {"scheme", "fields"}:
            raise CoaloraError(
                "a serialised choice space has two keys", got=sorted(data), expected=["fields", "scheme"]
            )
        return cls(data["scheme"], **data["fields"])

    def _choice(self, k: int) -> Choice:
        if not 0 <= k < len(self.choices):
            raise CoaloraError("no such choice", got=k, expected=f"0 to {len(self.choices) - 1}")
        return self.choices[k]


def _key(row: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    return frozenset(row.items())
