"""Choice space of a run: subsets of one or several schemes, indexed 0 .. K-1.

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
from coalora.quant.registry import SCHEMES, get_scheme
from coalora.quant.scheme import Choice, FieldValue, InputStatistics, Scheme
from coalora.registry import added_source

MIXED = "mixed"  # the name of several schemes together
ABSENT = "absent"  # the value of a field that a choice's scheme does not have
FieldValues = dict[str, tuple[FieldValue, ...]]


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

    Example:
        >>> from coalora.quant.space import ChoiceSpace
        >>> space = ChoiceSpace("nf", bits=[2, 3], scale_bits=[8], scale_dtype=["bf16"], block_size=[64])
        >>> len(space), space.describe(0)
        (6, 'nf2 b64 s8/bf16 x16')
    """

    def __init__(self, scheme: Scheme | str, /, **allowed: Sequence[FieldValue]) -> None:
        only = get_scheme(scheme) if isinstance(scheme, str) else scheme
        self._fill([(only, _restricted(only, allowed))])

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
            raise CoaloraError("There is no choice space to join", remedy="Give at least one")
        joined = cls.__new__(cls)
        joined._fill(
            [(s, _restricted(s, {f: list(v) for f, v in values[name].items()})) for name, s in schemes.items()]
        )
        return joined

    def _fill(self, parts: Sequence[tuple[Scheme, list[Choice]]]) -> None:
        self.schemes = tuple(scheme for scheme, _ in parts)
        self.choices: tuple[Choice, ...] = tuple(choice for _, choices in parts for choice in choices)
        owner = [s for s, (_, choices) in enumerate(parts) for _ in choices]
        self.scheme_index: NDArray[np.int64] = np.array(owner, dtype=np.int64)
        rows = [self._row(k) for k in range(len(self.choices))]
        self.field_values: FieldValues = _occurring(self.schemes, rows)
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
                f"A choice space of several schemes ({names}) has no single one",
                remedy="Ask for a choice's scheme with scheme_of(k)",
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

    def quantize_layers(
        self, weights: Sequence[Tensor], indices: Sequence[int], statistics: Sequence[InputStatistics | None]
    ) -> Iterator[tuple[int, list[dict[str, Tensor]]]]:
        """(k, states of the weights under choice k), scheme by scheme; see `Scheme.quantize_layers`."""
        for s, scheme in enumerate(self.schemes):
            own = [k for k in indices if self.scheme_index[k] == s]
            yield from zip(
                own, scheme.quantize_layers(weights, [self.choices[k] for k in own], statistics), strict=True
            )

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
            values = ", ".join(f"{name} {list(known)}" for name, known in self.field_values.items())
            raise CoaloraError(f"{row} is no choice of this space", remedy=f"Take values of {values}")
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
        return _neighbour_table(self.fields, self.scheme_index, self.nominal_bits, delta, allowed)

    def fits(self, shapes: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
        """Whether layers of these N shapes (out, in) can take every choice: bool (N, K)."""
        distinct = {
            shape: [self.scheme_of(k).fits(choice, shape) for k, choice in enumerate(self.choices)]
            for shape in set(map(tuple, shapes))
        }
        return np.array([distinct[tuple(shape)] for shape in shapes], dtype=np.bool_).reshape(len(shapes), len(self))

    def packed_nbytes_table(self, shapes: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Exact stored bytes of every layer under every choice; of one that does not fit, the layer's most.

        Args:
            shapes: N layer shapes (out, in).

        Returns:
            int64 (N, K).
        """
        distinct: dict[tuple[int, ...], list[int]] = {}
        for shape, fits in zip(map(tuple, shapes), self.fits(shapes), strict=True):
            if shape not in distinct:
                own = {k: self.scheme_of(int(k)).packed_nbytes(self.choices[k], shape) for k in np.flatnonzero(fits)}
                distinct[shape] = [own.get(k, max(own.values(), default=0)) for k in range(len(self))]
        return np.array([distinct[tuple(s)] for s in shapes], dtype=np.int64).reshape(len(shapes), len(self))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `from_dict`; with the source's digest of schemes that other packages add."""
        parts = []
        for s, scheme in enumerate(self.schemes):
            rows = [c.as_dict() for c, owner in zip(self.choices, self.scheme_index, strict=True) if owner == s]
            fields = {name: list(values) for name, values in _occurring([scheme], rows).items()}
            source = added_source(type(scheme))
            parts.append({"scheme": scheme.name, "fields": fields} | ({"source": source} if source else {}))
        return parts[0] if len(parts) == 1 else {"parts": parts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ChoiceSpace:
        """Inverse of `to_dict`.

        Raises:
            CoaloraError: keys other than ``scheme`` and ``fields``, or contents that the constructor refuses.
        """
        if data.keys() == {"parts"}:
            return cls.union([cls.from_dict(part) for part in data["parts"]])
        if data.keys() - {"source"} != {"scheme", "fields"}:
            raise CoaloraError(f"A choice space is read from `scheme` and `fields`, not from {sorted(data)}")
        return cls(SCHEMES.check_foreign(data["scheme"]), **data["fields"])

    def _choice(self, k: int) -> Choice:
        if not 0 <= k < len(self.choices):
            raise CoaloraError(f"There is no choice {k} among 0 to {len(self.choices) - 1}")
        return self.choices[k]


def _key(row: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    return frozenset(row.items())


def _restricted(scheme: Scheme, allowed: Mapping[str, Sequence[FieldValue]]) -> list[Choice]:
    """The scheme's choices whose fields have the allowed values."""
    known = scheme.field_values
    for name, values in allowed.items():
        if name not in known:
            raise CoaloraError(
                f"Scheme {scheme.name!r} has no field {name!r}", remedy=f"Restrict some of {', '.join(known)}"
            )
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise CoaloraError(
                f"{values!r} is no list of values of field {name!r}", remedy=f"Give some of {list(known[name])}"
            )
        if unknown := [value for value in values if value not in known[name]]:
            raise CoaloraError(
                f"Field {name!r} of scheme {scheme.name!r} has no values {unknown}",
                remedy=f"Take some of {list(known[name])}",
            )
    rows = [(choice, choice.as_dict()) for choice in scheme.choices()]
    kept = [choice for choice, row in rows if all(row[name] in values for name, values in allowed.items())]
    if not kept:
        raise CoaloraError(
            f"No choice of scheme {scheme.name!r} is left by {dict(allowed)}", remedy="Allow at least one value a field"
        )
    return kept


def _occurring(schemes: Sequence[Scheme], rows: Sequence[Mapping[str, FieldValue]]) -> FieldValues:
    """Ordered values of every field that occur in the rows; see `ChoiceSpace.field_values`."""
    found: dict[str, list[FieldValue]] = {}
    if len(schemes) > 1:
        found["scheme"] = [scheme.name for scheme in schemes]
    for scheme in schemes:
        for name, known in scheme.field_values.items():
            found[name] = list(dict.fromkeys([*found.get(name, []), *known]))
    present: FieldValues = {}
    for name, values in found.items():
        if len(schemes) > 1 and all(isinstance(value, int) for value in values):
            values = sorted(values, key=int)
        kept = tuple(value for value in values if any(row.get(name) == value for row in rows))
        present[name] = kept if all(name in row for row in rows) else (*kept, ABSENT)
    return present


def _neighbour_table(
    fields: NDArray[np.int64],
    scheme_index: NDArray[np.int64],
    nominal_bits: NDArray[np.float64],
    delta: int,
    allowed: NDArray[np.bool_] | None,
) -> NDArray[np.int64]:
    """See `ChoiceSpace.neighbours`, whose arrays these are: fields (K, F), scheme_index and nominal_bits (K,)."""
    if delta < 1:
        raise CoaloraError(f"Neighbours cannot be {delta} steps apart", remedy="Take a delta of at least 1")
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
