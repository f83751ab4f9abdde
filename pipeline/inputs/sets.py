"""Configuration sets from files: the start of a run with the set of an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import SET_FORMAT, ConfigurationSet
from coalora.errors import CoaloraError
from coalora.files import read_json


def start_members(content: dict[str, Any], measured: CalibrationTables) -> ConfigurationSet:
    """Members of a set that was made by another run, without their losses: these were of another adapter.

    The base model may be another one with the same layers, for example a later checkpoint of it.

    Raises:
        CoaloraError: the set does not fit the layers, the choice space or its rules, or is damaged.
    """
    try:
        found = ConfigurationSet.from_dict({**content, "base_digest": measured.base_digest}, measured)
    except CoaloraError as error:
        raise CoaloraError(
            f"initial_set.file fits the layers and the choice space of this run: {error.problem}",
            got=error.got,
            expected=error.expected,
            remedy="use a set of the same base architecture, target_modules and choices, or set initial_set.file=null",
        ) from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise _damaged(repr(error)) from error
    unique = np.unique(found.configurations, axis=0)
    if len(unique) < 2:
        raise CoaloraError("a run starts with at least two different configurations", got=f"{len(unique)} in the file")
    n = len(unique)
    return ConfigurationSet(unique, np.full(n, np.nan), np.zeros(n, dtype=np.int64)).sorted(measured)


def read_set_file(file: str | Path) -> dict[str, Any]:
    """The content of a configuration set's file.

    Raises:
        CoaloraError: there is no such file, or it holds something else.
    """
    path = Path(file)
    if not path.is_file():
        raise CoaloraError(
            "initial_set.file must exist",
            got=path,
            remedy="bring a set back with `coalora restore ... --out FILE`, or correct the path",
        )
    try:
        content = read_json(path)
    except ValueError as error:
        raise _damaged(f"{path}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != SET_FORMAT:
        form = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise _damaged(f"{path} of the form {form}")
    return content


def _damaged(got: str) -> CoaloraError:
    return CoaloraError(
        "a configuration set is JSON as every search round writes it",
        got=got,
        expected=f"format {SET_FORMAT}",
        remedy="take a file round-*.json of configurations/, or bring one back with `coalora restore`",
    )
