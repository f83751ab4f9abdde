"""Choices by the values of their fields: what a restriction keeps, and what occurs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coalora.errors import CoaloraError
from coalora.quant.scheme import Choice, FieldValue, Scheme

ABSENT = "absent"  # the value of a field that a choice's scheme does not have
FieldValues = dict[str, tuple[FieldValue, ...]]


def restricted(scheme: Scheme, allowed: Mapping[str, Sequence[FieldValue]]) -> list[Choice]:
    """The scheme's choices whose fields have the allowed values."""
    known = scheme.field_values
    for name, values in allowed.items():
        if name not in known:
            raise CoaloraError(f"unknown field of scheme {scheme.name!r}", got=name, expected=f"one of {tuple(known)}")
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise CoaloraError(f"field {name!r} takes a list of values", got=repr(values), expected=known[name])
        if unknown := [value for value in values if value not in known[name]]:
            raise CoaloraError(f"unknown value of field {name!r}", got=unknown, expected=f"some of {known[name]}")
    rows = [(choice, choice.as_dict()) for choice in scheme.choices()]
    kept = [choice for choice, row in rows if all(row[name] in values for name, values in allowed.items())]
    if not kept:
        raise CoaloraError("a choice space holds at least one choice", got=dict(allowed), expected=dict(known))
    return kept


def occurring(schemes: Sequence[Scheme], rows: Sequence[Mapping[str, FieldValue]]) -> FieldValues:
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
