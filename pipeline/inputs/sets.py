"""Configuration sets from files: the start of a run with the set of an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coalora.configurations import SET_FORMAT
from coalora.errors import CoaloraError
from coalora.files import read_json


def read_set_file(file: str | Path) -> dict[str, Any]:
    """The content of a configuration set's file.

    Raises:
        CoaloraError: there is no such file, or it holds something else.
    """
    path = Path(file)
    if not path.is_file():
        raise CoaloraError(
            f"initial_set.file {path} does not exist",
            remedy="Bring a set back with `coalora restore ... --out FILE`, or correct the path",
        )
    try:
        content = read_json(path)
    except ValueError as error:
        raise _damaged(f"{path} is no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != SET_FORMAT:
        form = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise _damaged(f"{path} is of the form {form}, and no configuration set")
    return content


def _damaged(problem: str) -> CoaloraError:
    return CoaloraError(
        problem,
        remedy="Take a file round-*.json of configurations/, or bring one back with `coalora restore`",
    )
