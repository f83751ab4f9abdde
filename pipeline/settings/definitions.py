"""Pipelines by name: read from pipelines.yaml (or a file of its form), changed by --set, checked.

The file is one for Prefect (`deployments:`), for DVC (params) and for the command line: everything is under
`definitions: pipelines: <name>:`, and deployments refer to it by YAML anchors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from coalora.errors import CoaloraError
from pipeline.settings.sections import Settings
from pipeline.tracking.values import scrub_text

DEFAULT_FILE = "pipelines.yaml"

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
        raise CoaloraError(
            "the pipeline must be defined",
            got=name,
            expected=", ".join(sorted(pipelines)) or "a name, but there are none in the file",
            remedy=f"choose one of these, or define it in {file} under definitions.pipelines",
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
            "the file of pipelines must exist",
            got=path,
            remedy="run from the checkout's root, or name the file with --file",
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CoaloraError(
            "the file of pipelines must be YAML in UTF-8", got=f"{path}: {error}", remedy="correct the file there"
        ) from error
    definitions = content.get("definitions") if isinstance(content, dict) else None
    pipelines = definitions.get("pipelines") if isinstance(definitions, dict) else None
    if not isinstance(pipelines, dict) or not all(isinstance(v, dict) for v in pipelines.values()):
        raise CoaloraError(
            "pipelines stand under definitions.pipelines, each a mapping of sections",
            got=f"{path} with {', '.join(map(str, content)) if isinstance(content, dict) else type(content).__name__}",
            expected="definitions: {pipelines: {NAME: {model: ..., benchmark: ...}}}",
        )
    for name in pipelines:
        check_name(name, f" in {path}")
    return pipelines


def check_name(name: object, where: str = "") -> None:
    """Refuse a pipeline's name that run folders, configuration sets or the registry cannot carry."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CoaloraError(
            "a pipeline has a plain name, which folders and the registry can carry",
            got=f"{name!r}{where}",
            expected="at most 64 letters, digits, . _ -, the first a letter or a digit",
            remedy="rename it, with quotes if it looks like a number",
        )


def apply_change(settings: dict[str, Any], change: str) -> dict[str, Any]:
    """A copy of `settings` with `section.key=value` applied."""
    key, equals, text = change.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise CoaloraError(
            "a change is written section.key=value", got=change, expected="for example --set search.rounds=2"
        )
    try:
        value = yaml.safe_load(text) if text.strip() else None
    except yaml.YAMLError as error:
        raise CoaloraError(
            "the value of a change is YAML",
            got=change,
            expected="for example --set 'evaluation.budgets=[2.5, 3]'",
            remedy="close every bracket and quote, and keep the shell from splitting it",
        ) from error
    changed = dict(settings)
    parts = key.strip().split(".")
    node = changed
    for depth, part in enumerate(parts[:-1]):
        inner = node.get(part)
        if inner is not None and not isinstance(inner, dict):
            raise CoaloraError(
                "a change names a key inside a section",
                got=f"{change}, but {'.'.join(parts[: depth + 1])} is no section",
                expected=f"for example --set {'.'.join(parts[: depth + 1])}=VALUE",
            )
        node[part] = dict(inner or {})
        node = node[part]
    node[parts[-1]] = value
    return changed


def change_settings(settings: Settings, changes: Sequence[str], where: str) -> Settings:
    """Settings with changes of the form `section.key=value`.

    Raises:
        CoaloraError: a change of another form, or settings that do not fit then.
    """
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
        problems = {_key(p): _problem(p) for p in reversed(error.errors(include_url=False))}
        raise CoaloraError(
            f"settings must fit: {where}",
            got="; ".join(reversed(problems.values())),
            remedy="correct these keys in the file or with --set; pipeline/settings/sections.py describes them all",
        ) from error


def _key(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    if path[:2] == ["choices", "allow"] and path[-1] in ("int", "str"):
        path.pop()
    return ".".join(path) or "settings"


def _problem(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    key = _key(problem)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key, {hint}"
    if problem["type"] == "missing":
        return f"{key}: is required"
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
    else:
        message = problem["msg"][0].lower() + problem["msg"][1:].split(" or instance of ")[0]
    value = problem["input"]
    shown = "" if isinstance(value, dict | BaseModel) else f" (got {scrub_text(repr(value))})"
    return f"{key}: {message}{shown}"


def _known_keys(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in path:
        annotation = model.model_fields[part].annotation
        options = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not options:
            return []
        model = options[0]
    return sorted(model.model_fields)
