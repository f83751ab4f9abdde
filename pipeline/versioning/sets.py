"""Configuration sets under DVC, one for each round: a small JSON in the checkout, its bytes in DVC's cache.

The sets are added while the pipeline runs, also inside `dvc repro`. There DVC holds no lock and `add` of a
file outside the stage's outputs works; add of an output of its own, status, commit, checkout and gc do not,
and are never called.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from coalora.errors import CoaloraError
from coalora.files import json_bytes, replace_file
from pipeline.versioning.repository import initialised, with_remotes, with_repository

FOLDER = "configurations"

_PIPELINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ROUND_FILE = re.compile(r"round-(\d{2,})\.json(\.dvc)?")


@dataclass(frozen=True)
class DvcRecord:
    """A file under DVC; paths are relative to the root."""

    path: Path
    md5: str  # under which DVC's cache and remotes keep its content
    dvc_file: Path  # what git tracks in its place
    added: bool  # False where DVC had this content already


def write_set(pipeline: str, round_index: int, payload: Mapping[str, Any], root: Path) -> Path:
    """Write a round's set to `configurations/<pipeline>/round-<02d>.json`; untouched if identical.

    Canonical JSON: equal sets are equal bytes, so that DVC and git see no change.
    """
    path, content = _folder(pipeline, root) / f"round-{round_index:02d}.json", json_bytes(payload)
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    return path


def version_file(path: Path, repo_root: Path, tags: Mapping[str, str | int] | None = None) -> DvcRecord:
    """`dvc add` of a file, unless DVC has this content of it already (DVC is not even imported then).

    A cache in another place than `.dvc/cache` is not looked into: DVC is asked there every time. Nothing is committed
    to git; where DVC's `core.autostage` is on, the .dvc file is staged as by the command.

    Args:
        path: inside `repo_root` and outside every stage's outputs.
        repo_root: folder that holds `.dvc`.
        tags: facts to keep in the .dvc file, under `meta` of the output: run, round.

    Raises:
        CoaloraError: DVC is not initialised there, the file is missing or outside, or DVC refuses it.
    """
    root = initialised(repo_root)
    absolute = path if path.is_absolute() else root / path
    # The file itself stays unresolved: it may be a link into DVC's cache.
    absolute = absolute.parent.resolve() / absolute.name
    if not absolute.is_relative_to(root):
        raise CoaloraError(f"{path} is outside of DVC's root {root}", remedy="Name a file under it")
    if not absolute.is_file():
        raise CoaloraError(f"{path} does not exist, so that DVC cannot version it")
    relative = absolute.relative_to(root)
    dvc_file = absolute.with_name(absolute.name + ".dvc")
    with absolute.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    # A clone has the .dvc file that git brought, and a cache without the content.
    usual_cache = root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    added = _recorded_md5(dvc_file) != md5 or not usual_cache.is_file()
    if added:
        with_repository(root, f"dvc add {relative.as_posix()}", lambda repo: repo.add([str(absolute)]))
        if _recorded_md5(dvc_file) != md5:
            raise CoaloraError(f"{relative} was changed while DVC added it", remedy="Run again")
    if tags is not None:
        _tag(dvc_file, tags)
    return DvcRecord(relative, md5, dvc_file.relative_to(root), added)


def push_file(record: DvcRecord, repo_root: Path) -> None:
    """`dvc push` of a versioned file to the default remote; does nothing where the remote has it."""
    root = initialised(repo_root)
    target = str(root / record.dvc_file)
    with_remotes(
        root,
        f"dvc push {record.dvc_file}",
        lambda repo: repo.push([target]),
        problem=f"DVC's remote does not take {record.path}",
        remedy=f"See what `dvc push {record.dvc_file}` says (`dvc remote list`, credentials, network), or set "
        "versioning.push=false",
    )


def remove_stale_sets(pipeline: str, last_round: int, root: Path) -> list[Path]:
    """Remove the sets of rounds after `last_round`, left by an earlier run with more rounds.

    File, .dvc file and the line in .gitignore go; the bytes stay in DVC's cache, and git's history leads to
    them. Returns the files that were removed, relative to `root`, without their .dvc files.
    """
    folder = _folder(pipeline, root)
    stale = sorted(
        {
            folder / p.name.removesuffix(".dvc")
            for p in (folder.iterdir() if folder.is_dir() else ())
            if (match := _ROUND_FILE.fullmatch(p.name)) and int(match[1]) > last_round
        }
    )
    tracked = [dvc for p in stale if (dvc := p.with_name(p.name + ".dvc")).is_file()]
    if tracked:
        targets = [str(dvc_file.resolve()) for dvc_file in tracked]
        with_repository(
            initialised(root), "dvc remove --outs", lambda repo: [repo.remove(t, outs=True) for t in targets]
        )
    for path in stale:
        path.unlink(missing_ok=True)
    return [p.relative_to(root) for p in stale]


def _folder(pipeline: str, root: Path) -> Path:
    if not _PIPELINE.fullmatch(pipeline):
        raise CoaloraError(f"{pipeline!r} is no plain name of a pipeline", remedy="Use letters, digits, . _ -")
    return root / FOLDER / pipeline


def _output(dvc_file: Path) -> dict[str, Any]:
    """What a .dvc file says of its output; empty where there is no such file."""
    if not dvc_file.is_file():
        return {}
    try:
        (out,) = yaml.safe_load(dvc_file.read_text(encoding="utf-8"))["outs"]
        return dict(out)
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise CoaloraError(
            f"{dvc_file} does not name one output", remedy="Restore it with git, or delete it"
        ) from error


def _recorded_md5(dvc_file: Path) -> str | None:
    out = _output(dvc_file)
    # Without `hash: md5` it is of DVC 2, which hashed text with line ends rewritten.
    return out.get("md5") if out.get("hash") == "md5" else None


def _tag(dvc_file: Path, tags: Mapping[str, str | int]) -> None:
    """Set `meta` of the output, DVC's place for facts of the user's; `dvc add` keeps it."""
    if _output(dvc_file).get("meta") == dict(tags):
        return
    content = yaml.safe_load(dvc_file.read_text(encoding="utf-8"))
    content["outs"][0]["meta"] = dict(tags)
    # Replaced, never written through: with DVC's link types a file can be a link into the cache.
    replace_file(dvc_file, yaml.safe_dump(content, sort_keys=False).encode())
