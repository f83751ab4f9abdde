"""Set of configurations, as training samples from it and the search improves it, and its JSON form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from coalora.calibrate.tables import CalibrationTables
from coalora.errors import CoaloraError
from coalora.files import digest
from coalora.models.switching.quantized import check_configuration
from coalora.quant.registry import SCHEMES
from coalora.quant.scheme import Choice, Scheme
from coalora.quant.space import MIXED, ChoiceSpace

SET_FORMAT = "coalora-configurations/1"
CONFIGURATION_FORMAT = "coalora-configuration/1"


@dataclass(frozen=True)
class ConfigurationSet:
    """n configurations in rising order of average bits.

    Attributes:
        configurations: (n, N) choice indices.
        losses: (n,) of the adapted model on the search split when they were last measured; NaN before that.
        joined: (n,) round in which a member joined; 0 is the initial set.

    Example:
        >>> from coalora import ConfigurationSet
        >>> C = allocate(tables.search_err, tables.search_cost, tables.cost_range())
        >>> members = ConfigurationSet.unmeasured(tables.expand(C))
        >>> len(members), ConfigurationSet.from_dict(members.to_dict(tables), tables).joined.tolist()
        (2, [0, 0])
    """

    configurations: np.ndarray
    losses: np.ndarray
    joined: np.ndarray

    @classmethod
    def unmeasured(cls, configurations: np.ndarray, joined: int = 0) -> ConfigurationSet:
        """Configurations (n, N) without losses that join in one round."""
        n = len(configurations)
        return cls(configurations, np.full(n, np.nan), np.full(n, joined, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.configurations)

    def with_losses(self, losses: np.ndarray) -> ConfigurationSet:
        """The same members with losses (n,)."""
        return replace(self, losses=losses)

    def sorted(self, tables: CalibrationTables) -> ConfigurationSet:
        """The same members in rising order of stored bytes (ties: lower loss, then lexicographic)."""
        nbytes = tables.total_nbytes(self.configurations)
        keys = (*self.configurations.T[::-1], np.nan_to_num(self.losses, nan=np.inf), nbytes)
        return self.take(np.lexsort(keys))

    def take(self, index: np.ndarray) -> ConfigurationSet:
        return ConfigurationSet(*(values[index] for values in vars(self).values()))

    def merge(self, other: ConfigurationSet) -> ConfigurationSet:
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return ConfigurationSet(*map(np.concatenate, both))

    def distinct(self) -> ConfigurationSet:
        """Each configuration once, as its first member."""
        _, first = np.unique(self.configurations, axis=0, return_index=True)
        return self.take(first)

    def objectives(self, tables: CalibrationTables) -> np.ndarray:
        """Y (n, 2): loss and cost (by default average bits), both minimised."""
        return np.column_stack([self.losses, tables.costs(self.configurations)])

    def to_dict(self, tables: CalibrationTables) -> dict:
        """JSON that needs nothing else to be read: choices are written out once, members point into them."""
        used = sorted(set(self.configurations.ravel().tolist()))
        position = {k: i for i, k in enumerate(used)}
        bits = tables.average_bits(self.configurations)
        return {
            "format": SET_FORMAT,
            "scheme": tables.space.scheme_name,
            "base_digest": tables.base_digest,
            "layers": [layer.name for layer in tables.layers],
            "choices": [tables.space.choice_dict(k) for k in used],
            "members": [
                {
                    "average_bits": round(float(b), 6),
                    "loss": None if np.isnan(loss) else float(loss),
                    "round": int(joined),
                    "choices": [position[k] for k in row.tolist()],
                }
                for row, b, loss, joined in zip(self.configurations, bits, self.losses, self.joined, strict=True)
            ],
        }

    @classmethod
    def from_dict(cls, content: dict, tables: CalibrationTables) -> ConfigurationSet:
        """Read `to_dict`.

        Raises:
            CoaloraError: another format, scheme, layers or base model than that of `tables`; a choice outside of its
                space; a member that does not give every layer one of the listed choices, or tied layers different ones.
        """
        if content.get("format") != SET_FORMAT:
            raise CoaloraError(
                f"The format {content.get('format')!r} is not that of a configuration set ({SET_FORMAT})",
                remedy="Use a file that this version wrote",
            )
        layers = [layer.name for layer in tables.layers]
        if content.get("layers") != layers or content.get("scheme") != tables.space.scheme_name:
            raise CoaloraError(
                f"The set was made for scheme {content.get('scheme')} and {len(content.get('layers', []))} layers, and "
                f"not for {tables.space.scheme_name} and these {len(layers)} layers",
                remedy="Use a set of the same layers and scheme",
            )
        if content.get("base_digest") != tables.base_digest:
            raise CoaloraError(
                f"The set was made for the base model {content.get('base_digest')}, and not for {tables.base_digest}",
                remedy="Make a set for this base model, or load the base model that the set names",
            )
        index = np.array([tables.space.index(choice) for choice in content["choices"]], dtype=np.int64)
        members = content["members"]
        every = np.arange(len(layers))
        for number, member in enumerate(members):
            chosen: list[int] = member["choices"]
            extent = f"{min(chosen, default=0)} to {max(chosen, default=0)}"
            if len(chosen) != len(layers) or not all(0 <= k < len(index) for k in chosen):
                raise CoaloraError(
                    f"Member {number} of the set has {len(chosen)} choices from {extent}, and not {len(layers)} "
                    f"from 0 to {len(index) - 1}",
                    remedy="Use the file as it was written",
                )
            if not (taken := tables.allowed[every, index[chosen]]).all():
                raise CoaloraError(
                    f"Member {number} of the set gives {layers[int(np.argmin(taken))]} a choice that its rules forbid",
                    remedy="Make a set for these rules",
                )
        configurations = np.array([index[m["choices"]] for m in members], dtype=np.int64).reshape(-1, len(layers))
        tables.of_groups(configurations)  # refuses broken ties
        return cls(
            configurations,
            np.array([np.nan if m["loss"] is None else m["loss"] for m in members]),
            np.array([m["round"] for m in members], dtype=np.int64),
        )


def configuration_dict(configuration: np.ndarray, tables: CalibrationTables) -> dict:
    """One configuration as JSON: the base it is for, its scheme (or `mixed`), and the choice of every layer.

    Raises:
        CoaloraError: choices outside of the space, or different ones of tied layers.
    """
    configuration = check_configuration(configuration, len(tables.layers), len(tables.space.choices))
    tables.of_groups(configuration)
    return {
        "format": CONFIGURATION_FORMAT,
        "scheme": tables.space.scheme_name,
        "base_digest": tables.base_digest,
        "layers": {
            layer.name: tables.space.choice_dict(int(k)) for layer, k in zip(tables.layers, configuration, strict=True)
        },
    }


def configuration_of(content: object, tables: CalibrationTables) -> np.ndarray:
    """The configuration (N,) of `configuration_dict`, for the same base, layers and choices.

    Raises:
        CoaloraError: it is none, or one of another base model, of other layers, or with a choice that a layer lacks.
    """
    if not isinstance(content, dict) or content.get("format") != CONFIGURATION_FORMAT:
        raise CoaloraError(
            f"The file is no configuration ({CONFIGURATION_FORMAT})", remedy="Take configuration.json of an export"
        )
    if content.get("base_digest") != tables.base_digest:
        raise CoaloraError(
            f"The configuration is for the base model {content.get('base_digest')}, and not for {tables.base_digest}",
            remedy="Take one of this base model",
        )
    names, chosen = [layer.name for layer in tables.layers], content.get("layers")
    if not isinstance(chosen, dict) or sorted(chosen) != sorted(names):
        raise CoaloraError(
            f"The configuration is not for the {len(names)} layers of this model", remedy="Give each layer a choice"
        )
    return np.array([_chosen(tables, index, chosen[name]) for index, name in enumerate(names)], dtype=np.int64)


def _chosen(tables: CalibrationTables, index: int, fields: object) -> int:
    """Index of a layer's choice by its fields."""
    given = fields if isinstance(fields, dict) else {}
    try:
        if tables.allowed[index, found := tables.space.index(given)]:
            return found
    except (CoaloraError, TypeError):  # values that cannot be looked up
        pass

    def apart(k: np.intp) -> tuple[int, float]:
        own = tables.space.choice_dict(int(k))
        numbers = [(own.get(name), value) for name, value in given.items()]
        steps = [abs(a - b) for a, b in numbers if isinstance(a, int | float) and isinstance(b, int | float)]
        return sum(a != b for a, b in numbers), sum(steps)

    nearest = min(np.flatnonzero(tables.allowed[index]), key=apart)
    raise CoaloraError(
        f"The configuration gives {tables.layers[index].name} {str(fields)[:200]}, which is none of its choices",
        remedy=f"Give it the nearest, {tables.space.choice_dict(int(nearest))}, or train with a space that has it",
    )


def read_choices(content: dict) -> dict[str, tuple[Scheme, Choice]]:
    """The scheme and choice of every layer of `configuration_dict`.

    Raises:
        CoaloraError: a scheme or choice that does not exist.
    """
    spaces: dict[str, ChoiceSpace] = {}
    read = {}
    for name, fields in content["layers"].items():
        # In a mixed space each choice names its scheme.
        own = {"scheme": content["scheme"], **fields} if content["scheme"] != MIXED else dict(fields)
        scheme = own.pop("scheme", "none")
        space = spaces[scheme] = spaces.get(scheme) or ChoiceSpace(SCHEMES.check_foreign(scheme))
        read[name] = space.scheme, space.choices[space.index(own)]
    return read


def configuration_digest(content: dict) -> str:
    """Digest of a quantized base: the base model's digest, the scheme and every layer's choice."""
    return digest({key: content[key] for key in ("base_digest", "scheme", "layers")})
