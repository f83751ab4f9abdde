"""Pipelines by name: read from pipelines.yaml (or a file of its form), changed by --set, checked.

The file is one for Prefect (`deployments:`), for DVC (params) and for the command line: everything is under
`definitions: pipelines: <name>:`, and deployments refer to it by YAML anchors.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from coalora.errors import CoaloraError
from coalora.parse import parse_yaml
from pipeline.scrub import scrub_text
from pipeline.settings.sections import Settings

DEFAULT_FILE = "pipelines.yaml"

_MOST = 6  # problems that are told at a time

# It names a folder under runs/, a DVC file and a registered model.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def load_settings(name: str, *, file: str | Path = DEFAULT_FILE, changes: Sequence[str] = ()) -> Settings:
    """The settings of pipeline `name`.

    Args:
        changes: `section.key=value` with the value in YAML.

    Raises:
        CoaloraError: no such file or pipeline, bad YAML, a change that is no `key=value`, or settings that do not fit.
    """
    pipelines = read_pipelines(file)
    if name not in pipelines:
        known = f"Choose one of {', '.join(sorted(pipelines))}, or define" if pipelines else "Define"
        raise CoaloraError(
            f"{file} defines no pipeline {name!r}", remedy=f"{known} it there under definitions.pipelines"
        )
    raw = pipelines[name]
    for change in changes:
        raw = apply_change(raw, change)
    return validate_settings(raw, f"pipeline {name!r} of {file}")


def read_pipelines(file: str | Path = DEFAULT_FILE) -> dict[str, dict[str, Any]]:
    """All definitions of a file, not validated."""
    path = Path(file)
    if not path.is_file():
        raise CoaloraError(
            f"There is no file of pipelines {path}", remedy="Run from the checkout's root, or name the file with --file"
        )
    try:
        content = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise CoaloraError(f"{path} is not YAML in UTF-8 ({error})", remedy="Save it as UTF-8") from error
    definitions = content.get("definitions") if isinstance(content, dict) else None
    pipelines = definitions.get("pipelines") if isinstance(definitions, dict) else None
    if not isinstance(pipelines, dict) or not all(isinstance(v, dict) for v in pipelines.values()):
        found = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        raise CoaloraError(
            f"{path} has no pipelines under definitions.pipelines, each a mapping of sections (it has {found})",
            remedy="Write definitions: {pipelines: {NAME: {model: ..., benchmark: ...}}}",
        )
    for name in pipelines:
        check_name(name, f" in {path}")
    return pipelines


def check_name(name: object, where: str = "") -> None:
    """Refuse a pipeline's name that run folders, configuration sets or the registry cannot carry."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CoaloraError(
            f"{name!r}{where} is no name of a pipeline, which folders and the registry can carry",
            remedy="Take at most 64 letters, digits, . _ -, the first a letter or a digit, and quote a number",
        )


def apply_change(settings: dict[str, Any], change: str) -> dict[str, Any]:
    """A copy of `settings` with `section.key=value` applied."""
    key, equals, text = change.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise CoaloraError(
            f"The change {change!r} is not section.key=value", remedy="Write for example --set search.rounds=2"
        )
    try:
        value = parse_yaml(text, f"The value of the change {change!r}"[:200]) if text.strip() else None
    except CoaloraError as error:
        raise CoaloraError(
            error.problem,
            remedy="Close every bracket and quote, and keep the shell from splitting it, "
            "for example --set 'evaluation.budgets=[2.5, 3]'",
        ) from error
    changed = dict(settings)
    parts = key.strip().split(".")
    node = changed
    for depth, part in enumerate(parts[:-1]):
        inner = node.get(part)
        if inner is not None and not isinstance(inner, dict):
            section = ".".join(parts[: depth + 1])
            raise CoaloraError(
                f"{section} of the change {change!r} is no section", remedy=f"Write --set {section}=VALUE"
            )
        node[part] = dict(inner or {})
        node = node[part]
    node[parts[-1]] = value
    return changed


def change_settings(settings: Settings, changes: Sequence[str], where: str) -> Settings:
    """Settings with changes of the form `section.key=value`."""
    if not changes:
        return settings
    raw = settings.model_dump(mode="json", exclude_unset=True)
    for change in changes:
        raw = apply_change(raw, change)
    return validate_settings(raw, where)


def validate_settings(raw: dict[str, Any], where: str) -> Settings:
    """Typed settings, or one error that lists everything that is wrong."""
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        # A value that may be a number or a text fails twice; the first says enough.
        problems = {_key(p): p for p in reversed(error.errors(include_url=False))}
        told = [_problem(p) for p in list(reversed(problems.values()))[:_MOST]]
        told += [f"and {len(problems) - _MOST} more"] if len(problems) > _MOST else []
        raise CoaloraError(
            f"Wrong settings in {where}: {'; '.join(told)}",
            remedy="Correct them in the file or with --set (pipeline/settings/sections.py and coalora/recipes.py "
            "describe all keys)",
        ) from error


def _key(problem: Any) -> str:
    """The key that a user would write, without pydantic's names for the members of a union."""
    path = [str(part) for part in problem["loc"]]
    unions = re.compile(r"(list|literal)\[.*\]")
    if (path[:2] == ["choices", "allow"] and path[-1] in ("int", "str")) or (path and unions.fullmatch(path[-1])):
        path.pop()
    return ".".join(path)[:200] or "settings"


def _problem(problem: Any) -> str:
    key, path = _key(problem), [str(part) for part in problem["loc"]]
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(path[:-1])
        close = difflib.get_close_matches(path[-1][:100], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        return f"{key} is an unknown key ({hint})"
    if problem["type"] == "missing":
        return f"{key} is missing"
    value, message = problem["input"], problem["msg"].removeprefix("Value error, ").removesuffix(".")
    if problem["type"] != "value_error":
        message = message.split(" or an instance of ")[0].split(" or instance of ")[0]
        message = message.replace("Input should", "it should").replace("a dictionary", "a mapping")
        message = message[0].lower() + message[1:]
    if isinstance(value, dict | BaseModel):
        return f"{key}: {message[:300]}"
    # Cut behind what is shown, so that no half of an address is left in which a password is not recognised.
    told = scrub_text(repr(value)[:1000])
    return f"{key} is {told if len(told) <= 200 else f'{told[:200]}...'}: {message[:300]}"


def _known_keys(path: Sequence[str]) -> list[str]:
    section: Any = Settings
    for part in path:
        annotation = _keys(section).get(part)
        section = next((a for a in (annotation, *get_args(annotation)) if _keys(a)), None)
    return sorted(_keys(section))


def _keys(section: Any) -> dict[str, Any]:
    """Types of a section's or a recipe's fields, by name."""
    if is_dataclass(section):
        return {field.name: field.type for field in fields(section)}
    return {name: field.annotation for name, field in getattr(section, "model_fields", {}).items()}
