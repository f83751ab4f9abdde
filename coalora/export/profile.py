"""Profiles of devices: what a device can hold, as a YAML file.

    description: Phone with 1 GB for the model, llama.cpp
    to: [gguf]                # export formats
    memory: 1GB               # of base and adapter; or bits, or latency with a table
    allow: {bits: [3, 4]}     # values by field of the choices; choices without the field stay
    max_bits: 4               # and min_bits
    tie: fused                # query, key and value take one choice, and gate and up

`coalora adapt SOURCE --device phone-1gb` takes one that ships, or a file. Memory is a ceiling: a device with more than
the largest configuration needs gets that one.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coalora.calibrate.costs import parse_bytes
from coalora.errors import CoaloraError
from coalora.export.bundle import Bundle
from coalora.export.formats import EXPORT_FORMATS
from coalora.models.choices import Rule, within
from coalora.parse import parse_yaml
from coalora.recipes import Tie

SHIPPED = Path(__file__).with_name("profiles")


@dataclass(frozen=True)
class DeviceProfile:
    """Limits of a device: its memory or budget, the choices that it can hold, its formats.

    Attributes:
        name: of its file.
        to: names of `coalora.EXPORT_FORMATS`.
        memory: for base and adapter, such as `1.2GB`; bits: average bits a weight; latency: such as `20ms`, by `table`,
            a CSV whose path counts from the profile's file. Exactly one of the three.
        allow, min_bits, max_bits: cut the choices of every layer, as in `coalora.models.choices.Rule`.
        tie: as in `choices.tie`.

    Example:
        >>> from coalora import DeviceProfile
        >>> DeviceProfile.load("phone-1gb").to
        ['gguf']
    """

    name: str
    to: list[str]
    description: str = ""
    memory: str | None = None
    bits: float | None = None
    latency: str | None = None
    table: str | None = None
    allow: dict[str, list[int | str]] = field(default_factory=dict)
    min_bits: int | None = None
    max_bits: int | None = None
    tie: Tie = "none"

    @classmethod
    def load(cls, name: str | Path) -> DeviceProfile:
        """A profile that ships, by its name, or a file.

        Raises:
            CoaloraError: there is none, or it holds something else than a profile.
        """
        path = SHIPPED / f"{name}.yaml" if str(name) in shipped() else Path(name)
        if not path.is_file():
            raise CoaloraError(
                f"There is no device profile {name}", remedy=f"Take one of {', '.join(shipped())}, or name a YAML file"
            )
        try:
            content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise CoaloraError(f"{path} is not YAML in UTF-8", remedy="Correct it there") from error
        return cls._checked(content, path)

    @classmethod
    def _checked(cls, content: Any, path: Path) -> DeviceProfile:
        known = {f.name for f in fields(cls)} - {"name"}
        if not isinstance(content, dict) or (unknown := sorted(map(str, content.keys() - known))):
            what = "holds no mapping" if not isinstance(content, dict) else f"has {', '.join(unknown)[:100]}"
            raise CoaloraError(f"The device profile {path} {what}", remedy=f"Set some of {', '.join(sorted(known))}")
        content = {"to": [], **content}
        lists, numbers = [content["to"], *_values(content.get("allow", {}))], ("min_bits", "max_bits")
        wrong = [
            *(["to"] if not content["to"] else []),
            *(["a list"] if not all(isinstance(value, list) for value in lists) else []),
            *(n for n in numbers if not (content.get(n) is None or type(content[n]) is int)),
            *(n for n in ("description", "memory", "latency", "table") if not isinstance(content.get(n, ""), str)),
            *(["bits"] if not isinstance(content.get("bits", 1), int | float) else []),
            *(["tie"] if content.get("tie", "none") not in ("none", "fused") else []),
            *(
                ["one of memory, bits and latency"]
                if sum(n in content for n in ("memory", "bits", "latency")) != 1
                else []
            ),
            *(["a latency with its table"] if ("latency" in content) != ("table" in content) else []),
        ]
        if wrong:
            raise CoaloraError(
                f"The device profile {path} is without {wrong[0]}, or with another type of it",
                remedy="Write it as the profiles that ship (`coalora.export.profile`)",
            )
        if "memory" in content:
            parse_bytes(content["memory"])
        if "table" in content:
            content["table"] = str(path.parent / content["table"])
        for name in content["to"]:
            EXPORT_FORMATS.check_foreign(name)
        return cls(name=path.stem, **content)

    def restrict(self, bundle: Bundle) -> Bundle:
        """The bundle without the configurations that the device cannot hold.

        Raises:
            CoaloraError: a layer is left without a choice; names what the bundle has.
        """
        tables = bundle.tables
        rule = Rule("*", allow=self.allow, min_bits=self.min_bits, max_bits=self.max_bits)
        try:
            allowed = tables.allowed & within(tables.space, rule)
        except CoaloraError as error:
            raise CoaloraError(
                f"The device {self.name} asks for choices that the bundle has not ({error.problem})",
                remedy="Train with a space that has them, or change the profile",
            ) from error
        tie: Tie = "fused" if "fused" in (self.tie, tables.tie) else "none"
        cut = replace(tables, allowed=allowed, tie=tie)
        left = np.asarray(cut.search_allowed.any(1))
        if not left.all():
            layer = tables.layers[int(np.argmin(left[cut.groups]))]
            choices = ", ".join(dict.fromkeys(map(str, np.array(tables.space.choices, dtype=object))))
            raise CoaloraError(
                f"The device {self.name} leaves {layer.name} without a choice of the bundle's ({choices[:200]})",
                remedy="Train with a space that the device can hold, or change the profile",
            )
        keeps = (cut.expand(cut.firsts(bundle.members.configurations)) == bundle.members.configurations).all(1)
        other = copy(bundle)
        other.tables, other.members = cut, bundle.members.take(np.flatnonzero(keeps))
        return other

    def limit(self, bundle: Bundle, adapter_dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The arguments of `coalora.export_for` that say the device's limit for a bundle."""
        if self.memory is None:
            return {"bits": self.bits} if self.bits is not None else {"latency": self.latency, "table": self.table}
        most = bundle.counting("file_bytes", adapter_dtype=adapter_dtype).tables.cost_range()[1]
        return {"size": min(parse_bytes(self.memory) / 1e6, most)}


def shipped() -> list[str]:
    """Names of the profiles that come with the library."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def _values(allow: Any) -> list[Any]:
    return list(allow.values()) if isinstance(allow, dict) else [None]
