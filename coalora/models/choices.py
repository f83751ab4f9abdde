"""Choices of each target layer: schemes for all layers, and rules by layer that replace or cut them.

Rules are applied in order, each to what those before it left. A rule with schemes *replaces* the layer's choices; then
the limits of the rule *cut* them: values by field, and least and greatest bits. So hardware constraints are rules too:
`*` at least 4 bits, the head kept in 16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coalora.errors import CoaloraError
from coalora.models.targets import TargetLayer, matches, tied_groups
from coalora.quant.scheme import FieldValue, Scheme
from coalora.quant.space import ChoiceSpace
from coalora.recipes import Tie


@dataclass(frozen=True)
class Part:
    """The choices of one scheme whose fields have the values of `allow`; a field left out keeps all its values."""

    scheme: str
    allow: Mapping[str, Sequence[FieldValue]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """Choices and limits of the layers that a pattern matches.

    Attributes:
        layers: glob over whole module names, or a suffix of one (`lm_head`, `mlp.down_proj`).
        parts: schemes that replace the layer's choices; none keeps them.
        allow: values by field; choices of a scheme without the field stay.
        min_bits, max_bits: limits of a choice's width.
    """

    layers: str
    parts: tuple[Part, ...] = ()
    allow: Mapping[str, Sequence[FieldValue]] = field(default_factory=dict)
    min_bits: int | None = None
    max_bits: int | None = None


def layer_choices(
    layers: Sequence[TargetLayer], parts: Sequence[Part], rules: Sequence[Rule] = (), tie: Tie = "none"
) -> tuple[ChoiceSpace, NDArray[np.bool_]]:
    """The run's choice space and the choices that each layer may take.

    Args:
        layers: the N target layers.
        parts: the choices of a layer that no rule matches.
        tie: of tied layers (`tied_groups`) each may take what all of them may.

    Returns:
        space of K choices, without values that no layer may take; allowed bool (N, K).

    Raises:
        CoaloraError: unknown scheme, field or value; a rule that matches no layer, or cuts a field that its layers do
            not have; a layer left without a choice that fits its shape, or tied ones without one in common.
    """
    space = ChoiceSpace.union([_space(part) for part in [*parts, *(part for rule in rules for part in rule.parts)]])
    allowed = np.repeat(_members(space, parts)[None], len(layers), axis=0)
    for rule in rules:
        rows = [i for i, layer in enumerate(layers) if matches(layer.name, rule.layers)]
        if not rows:
            names = ", ".join(layer.name for layer in layers[:3])
            raise CoaloraError(
                f"{rule.layers!r} matches no target layer (they are {names}, ...)",
                remedy="Correct layers in choices.rules, or name the layer in target_modules",
            )
        if rule.parts:
            allowed[rows] = _members(space, rule.parts)
        allowed[rows] &= within(space, rule, np.flatnonzero(allowed[rows].any(0)))
        empty = [layers[i].name for i in rows if not allowed[i].any()]
        if empty:
            raise CoaloraError(
                f"The rule for {rule.layers!r} leaves {', '.join(empty[:3])} ({len(empty)} in all) without a choice",
                remedy="Loosen it, or give it a scheme of its own",
            )
    allowed = fitting(layers, space, allowed)
    groups = tied_groups(layers, tie)
    for group in np.unique(groups):
        tied = np.flatnonzero(groups == group)
        allowed[tied] &= allowed[tied].all(0)
        if not allowed[tied[0]].any():
            raise CoaloraError(
                f"{', '.join(layers[i].name for i in tied)} take one choice (choices.tie: {tie}), and the rules leave "
                "none to all of them",
                remedy="Give them the same rules, or set choices.tie to none",
            )
    used = np.flatnonzero(allowed.any(0))
    kept = ChoiceSpace.union([_spanned(space, used[space.scheme_index[used] == s]) for s in _owners(space, used)])
    result = np.zeros((len(layers), len(kept)), dtype=np.bool_)
    result[:, [kept.index(_named(space, kept, int(k))) for k in used]] = allowed[:, used]
    return kept, result


def fitting(
    layers: Sequence[TargetLayer], space: ChoiceSpace, allowed: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """Of the choices `allowed` (N, K), those that a layer's shape can take; None allows all.

    Raises:
        CoaloraError: a layer that can take none.
    """
    fits = space.fits([layer.shape for layer in layers])
    may = fits if allowed is None else fits & allowed
    if empty := [layer for layer, row in zip(layers, may, strict=True) if not row.any()]:
        raise CoaloraError(
            f"{empty[0].name} of shape {empty[0].shape} can take none of its choices ({len(empty)} layers in all)",
            remedy="Give such layers choices that fit, by choices.rules, or leave them out of target_modules",
        )
    return may


def _space(part: Part) -> ChoiceSpace:
    return ChoiceSpace(part.scheme, **part.allow)


def _owners(space: ChoiceSpace, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.unique(space.scheme_index[indices])


def _spanned(space: ChoiceSpace, indices: NDArray[np.int64]) -> ChoiceSpace:
    """All choices of one scheme from the field values that occur among its choices `indices`."""
    rows = [space.choices[k].as_dict() for k in indices]
    return ChoiceSpace(space.scheme_of(indices[0]), **{name: [row[name] for row in rows] for name in rows[0]})


def _named(space: ChoiceSpace, of: ChoiceSpace, k: int) -> dict[str, FieldValue]:
    """Choice k of `space` as the dictionary that `of.index` reads."""
    fields = space.choices[k].as_dict()
    return fields if len(of.schemes) == 1 else {"scheme": space.scheme_of(k).name, **fields}


def _members(space: ChoiceSpace, parts: Iterable[Part]) -> NDArray[np.bool_]:
    """(K,): the choices of these parts."""
    mask = np.zeros(len(space), dtype=np.bool_)
    for own in map(_space, parts):
        mask[[space.index(_named(own, space, k)) for k in range(len(own))]] = True
    return mask


def within(space: ChoiceSpace, rule: Rule, present: NDArray[np.int64] | None = None) -> NDArray[np.bool_]:
    """(K,): the choices inside the rule's limits; `present` are the indices of those that its layers have, or all.

    Raises:
        CoaloraError: a field or value that none of them has.
    """
    present = np.arange(len(space)) if present is None else present
    rows = [choice.as_dict() for choice in space.choices]
    mask = np.ones(len(space), dtype=np.bool_)
    schemes = [space.schemes[s] for s in _owners(space, present)]
    for name, values in rule.allow.items():
        known = [value for scheme in schemes for value in scheme.field_values.get(name, ())]
        if unknown := [value for value in values if value not in known]:
            raise CoaloraError(
                f"The layers of the rule for {rule.layers!r} have no {name} {unknown}",
                remedy=f"Take some of {list(dict.fromkeys(known))}" if known else f"Cut fields of {_fields(schemes)}",
            )
        mask &= [name not in row or row[name] in values for row in rows]
    low, high = rule.min_bits or 0, np.inf if rule.max_bits is None else rule.max_bits
    mask &= [choice.width is None or low <= choice.width <= high for choice in space.choices]
    return mask


def _fields(schemes: Iterable[Scheme]) -> str:
    return "; ".join(f"{scheme.name}: {', '.join(scheme.field_values)}" for scheme in schemes)
