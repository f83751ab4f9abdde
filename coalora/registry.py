"""Registries of named parts: quantization schemes, architectures, search strategies, methods and export formats.

A registry maps a name to an object. Built-in objects are written as ``module:attribute`` and imported when they are
first asked for, so that names can be listed and checked without importing torch, and a part may import its registry's
room without a circle. Other packages add parts in two ways, neither of which touches this repository:

- an entry point in the registry's group, after which the name is as good as a built-in one::

      [project.entry-points."coalora.schemes"]
      ternary = "my_package.ternary:TernaryScheme"

- ``module:attribute`` itself as the name, in code, settings and files: ``ChoiceSpace("my_package.ternary:Ternary")``.
  In settings and files, which somebody else may have written, it needs `COALORA_TRUST_CODE=1` (`check_foreign`).

The source of an added part counts in the pipeline's cache keys (`added_modules`), as that of the built-in ones does.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from coalora.errors import CoaloraError
from coalora.trust import require_trust

T = TypeVar("T")
_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Registry(Mapping[str, T], Generic[T]):
    """Objects of one kind by name; a read-only mapping whose values are imported on access.

    Args:
        kind: what the objects are, for error messages: ``quantization scheme``.
        group: entry point group in which other packages add objects.
        base: ``module:attribute`` of the class that every object is an instance or a subclass of. A name may come
            from a file that somebody else wrote: nothing else is taken, and nothing is called before this check.
        builtin: the built-in objects, or their ``module:attribute``, by name.

    Example:
        >>> from fractions import Fraction
        >>> from coalora.registry import Registry
        >>> units = Registry("unit", "example.units", "fractions:Fraction", {"tenth": Fraction(1, 10)})
        >>> list(units), units["tenth"]
        (['tenth'], Fraction(1, 10))
    """

    def __init__(self, kind: str, group: str, base: str, builtin: Mapping[str, T | str]) -> None:
        self.kind, self.group, self._base, self._builtin = kind, group, base, dict(builtin)
        self._loaded: dict[str, T] = {}

    @cached_property
    def _added(self) -> dict[str, str]:
        """``module:attribute`` by name of other packages' entry points; a built-in name cannot be taken over."""
        return {entry.name: entry.value for entry in entry_points(group=self.group) if entry.name not in self._builtin}

    def __getitem__(self, name: str) -> T:
        """The object of a name.

        Raises:
            CoaloraError: an unknown name, a reference that cannot be imported, or an object of another kind.
        """
        if name not in self._loaded:
            found = self._builtin.get(self.check(name)) or self._added.get(name, name)
            self._loaded[name] = self._import(name, found) if isinstance(found, str) else found
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._builtin, *self._added])

    def __len__(self) -> int:
        return len(self._builtin) + len(self._added)

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._added

    def check(self, name: str) -> str:
        """`name` itself where it is registered or a ``module:attribute``; nothing is imported.

        Raises:
            CoaloraError: neither; says which names there are, and the nearest one.
        """
        if name in self or _REFERENCE.fullmatch(name):
            return name
        near = difflib.get_close_matches(name, self, n=1)
        raise CoaloraError(
            f"There is no {self.kind} {name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""),
            remedy=f"Take one of {', '.join(self)}, or name an object of your own as `module:name`",
        )

    def check_foreign(self, name: str) -> str:
        """`check` of a name from settings or from a file that somebody else may have written.

        A ``module:attribute`` would import any module that is installed. It is taken where that changes nothing (the
        module is imported already, or an installed package registers it) and where the machine's owner has agreed.

        Raises:
            CoaloraError: an unknown name, or one that needs `COALORA_TRUST_CODE=1`.
        """
        module = self.check(name).partition(":")[0]
        if name not in self and name not in self._added.values() and module not in sys.modules:
            require_trust(f"The {self.kind} {name!r} would import {module}")
        return name

    def _import(self, name: str, reference: str) -> T:
        base = _attribute(self._base)
        try:
            found = _attribute(reference)
        except Exception as error:  # of any kind: importing runs what others wrote
            raise CoaloraError(
                f"The {self.kind} {name!r} cannot be imported from {reference!r} ({error or type(error).__name__})",
                remedy="Install the package that defines it, or correct the name",
            ) from error
        if not (isinstance(found, base) or (isinstance(found, type) and issubclass(found, base))):
            raise CoaloraError(
                f"{reference!r} is no {self.kind}: it is neither an instance nor a subclass of {base.__name__}",
                remedy=f"Derive it from {self._base}",
            )
        return cast(T, found)


def added_modules(name: str) -> set[str]:
    """Modules that `name` may mean in a registry: its own where it is a ``module:attribute``, and those of other
    packages' entry points in the groups ``coalora.*``. They are found, not imported.

    The pipeline asks this of every string among a stage's inputs: the source of what they name is part of the key.
    """
    own = [name] if _REFERENCE.fullmatch(name) else []
    modules = {reference.partition(":")[0] for reference in [*own, *_references().get(name, ())]}
    return {module for module in modules if _exists(module)}


def added_source(found: object) -> str | None:
    """sha256 of the file of a class or function that another package adds; None for our own, or without a file.

    What is computed with it carries this digest (`ChoiceSpace.to_dict`), so that what is computed from that is computed
    anew once the file changes.
    """
    try:
        file = inspect.getsourcefile(found)  # type: ignore[arg-type]
    except TypeError:
        return None
    if file is None or not Path(file).is_file() or Path(__file__).resolve().parent in Path(file).resolve().parents:
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@cache
def _references() -> dict[str, list[str]]:
    """``module:attribute`` of all entry points of our groups, by name."""
    found: dict[str, list[str]] = {}
    for group in sorted(group for group in entry_points().groups if group.startswith("coalora.")):
        for entry in entry_points(group=group):
            found.setdefault(entry.name, []).append(entry.value)
    return found


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _attribute(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)
