"""Restoration of a round's configuration set: from the MLflow run that logged it, or from a revision of DVC's record.

A set lies in MLflow (artifact of the round's run) and in DVC (cache and remotes, under its md5, which the MLflow run
carries as a tag). What one of them no longer has is taken from the other.
"""

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from coalora.configurations import SET_FORMAT
from coalora.errors import CoaloraError
from coalora.files import reading, replace_file
from pipeline.inputs.loaders import SET
from pipeline.scrub import one_line, scrub_text
from pipeline.versioning.repository import initialised, with_remotes
from pipeline.versioning.sets import FOLDER

_ROUND = re.compile(r"round-(\d{2,})\.json")
_RECORD = re.compile(r"round-(\d{2,})\.json\.dvc")


@dataclass(frozen=True)
class RestoredSet:
    """A set's file. `source` says in words where it came from."""

    content: bytes
    round_index: int
    source: str

    @property
    def members(self) -> list[dict[str, Any]]:
        return list(json.loads(self.content)["members"])


def from_mlflow(run_id: str, round_index: int | None = None, *, tracking_uri: str, root: Path) -> RestoredSet:
    """The set of a pipeline's run (its last round by default), or of a round's own run.

    Args:
        root: checkout whose DVC is asked where MLflow's artifact is gone.

    Raises:
        CoaloraError: MLflow does not know the run, it has no such round, or no copy of the set can be had.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=tracking_uri)
    try:
        run = client.get_run(run_id)
        rounds = _rounds(client, run)
    except MlflowException as error:
        raise CoaloraError(
            f"MLflow at {scrub_text(tracking_uri)} does not know run {run_id} ({scrub_text(one_line(error))[:300]})",
            remedy="Copy the id from MLflow's page of the run, and name the server with --tracking-uri",
        ) from error
    if not rounds:
        raise CoaloraError(f"Run {run_id} has logged no configuration set", remedy="Name a run of a pipeline")
    found = _pick(rounds, round_index, f"run {run_id}")
    md5 = rounds[found].data.tags.get("dvc_md5")
    source = f"MLflow run {rounds[found].info.run_id}"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = client.download_artifacts(rounds[found].info.run_id, f"configurations/{SET}", scratch)
            content = Path(path).read_bytes()
    except (MlflowException, OSError) as error:
        if md5 is None:
            raise CoaloraError(
                f"The set of {source} is gone ({scrub_text(one_line(error))[:300]}), and DVC never had it",
                remedy="Run the pipeline again, with versioning.enabled=true to keep sets in DVC as well",
            ) from error
        content, source = _by_md5(md5, root), f"DVC, by the md5 that {source} names"
    return _checked(content, md5, found, source)


def from_dvc(
    root: Path, *, rev: str | None = None, pipeline: str | None = None, round_index: int | None = None
) -> RestoredSet:
    """The set that DVC records at a git revision, from its cache or default remote.

    Args:
        rev: commit, branch, tag, or name of an experiment; None for the files as they are now (without git, too).
        pipeline: needed where there are several.
        round_index: the last one by default.

    Raises:
        CoaloraError: no such revision, pipeline or round; the bytes are neither in the cache nor in the remote.
    """
    from dvc.api import DVCFileSystem

    root = initialised(root)
    at = f"revision {rev}" if rev else "the working folder"

    def read(_: Any) -> RestoredSet:
        # Its own, read-only view of the repository: any revision, nothing is checked out.
        fs = DVCFileSystem(str(root), rev=rev)
        names = _names(fs, FOLDER, "directory")
        if not names or (pipeline is not None and pipeline not in names):
            raise CoaloraError(
                f"DVC has no configuration set of {pipeline or 'any pipeline'} at {at}, only of "
                f"{', '.join(names) or 'none'}",
                remedy="Name another revision with --rev; `git log -- configurations` lists those that changed sets",
            )
        if pipeline is None and len(names) > 1:
            raise CoaloraError(f"DVC has sets of several pipelines ({', '.join(names)})", remedy="Add --pipeline NAME")
        folder = f"{FOLDER}/{pipeline or names[0]}"
        rounds = {int(m[1]): n for n in _names(fs, folder, "file") if (m := _ROUND.fullmatch(n))}
        if not rounds:
            raise CoaloraError(f"{folder} holds no round at {at}", remedy="Name another revision with --rev")
        found = _pick(rounds, round_index, f"{folder} at {at}")
        recorded = {int(m[1]): n for n in _names(fs, folder, "file", dvcfiles=True) if (m := _RECORD.fullmatch(n))}
        for number in sorted(recorded.keys() - rounds.keys()):
            if round_index is None and number > found:  # an earlier round is not silently taken for the last one
                raise CoaloraError(
                    f"{folder}/{recorded[number]} at {at} names no file",
                    remedy="Restore it with git, or choose --round",
                )
        path = f"{folder}/{rounds[found]}"
        try:
            content = fs.read_bytes(path)
        except FileNotFoundError as error:
            raise _not_in_dvc(f"{path} at {at}") from error
        with reading(Path(f"{path}.dvc")):
            (out,) = yaml.safe_load(fs.read_text(f"{path}.dvc"))["outs"]
            md5 = out.get("md5")
        return _checked(content, md5, found, f"DVC, {path} at {at}")

    return _asking_remotes(root, "dvc pull", read)


def write_new(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; one that is there already stays, and is an error unless it is the same."""
    if path.exists():
        if path.is_file() and path.read_bytes() == content:
            return
        raise CoaloraError(f"{path} exists and is not overwritten", remedy="Name another file, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content)


def _rounds(client: Any, run: Any) -> dict[int, Any]:
    """{round: run that logged its set}, of a parent run or of a round's own."""
    if "round" in run.data.tags and "mlflow.parentRunId" in run.data.tags:
        return {int(run.data.tags["round"]): run}
    children = client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", max_results=1000
    )
    return {int(child.data.tags["round"]): child for child in children if "round" in child.data.tags}


def _pick(rounds: dict[int, Any], wanted: int | None, where: str) -> int:
    if wanted is None:
        return max(rounds)
    if wanted not in rounds:
        known = ", ".join(map(str, sorted(rounds)))
        raise CoaloraError(f"There is no round {wanted} of {where}", remedy=f"Choose from {known}")
    return wanted


def _by_md5(md5: str, root: Path) -> bytes:
    """Bytes that DVC keeps under an md5, from its cache or its default remote."""
    from dvc.config import NoRemoteError

    def read(repo: Any) -> bytes:
        stores = [repo.cache.local]
        with suppress(NoRemoteError):
            stores.append(repo.cloud.get_remote_odb(hash_name="md5"))
        for odb in stores:
            path = odb.oid_to_path(md5)
            if odb.fs.exists(path):
                return bytes(odb.fs.cat_file(path))
        raise _not_in_dvc(f"The md5 {md5}")

    return _asking_remotes(initialised(root), "dvc remote list", read)


def _asking_remotes(root: Path, command: str, do: Callable[[Any], Any]) -> Any:
    remedy = "See what `dvc pull` says (`dvc remote list`, credentials, network)"
    return with_remotes(root, command, do, problem="DVC's remote cannot be read", remedy=remedy)


def _not_in_dvc(what: str) -> CoaloraError:
    return CoaloraError(
        f"{what} is neither in DVC's cache nor in its default remote",
        remedy="Push it where it was made (`dvc push`; versioning.push=true does so at every round), and name that "
        "remote here: `dvc remote add --default NAME s3://BUCKET/PREFIX`",
    )


def _checked(content: bytes, md5: str | None, round_index: int, source: str) -> RestoredSet:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 is not None and found != md5:
        raise CoaloraError(
            f"The set from {source} was edited or damaged: its md5 is {found}, not {md5}",
            remedy="Bring a working file back with `dvc checkout --force`",
        )
    try:
        read = json.loads(content)
        form = read["format"]
        if form == SET_FORMAT and not sum(math.isfinite(member["average_bits"]) for member in read["members"]):
            raise ValueError("no members")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CoaloraError(f"{source} is no configuration set ({error!r})", remedy="Name another revision") from error
    if form != SET_FORMAT:
        raise CoaloraError(
            f"The set from {source} is of format {form}, not {SET_FORMAT}",
            remedy="Restore it with the version that made it",
        )
    return RestoredSet(content, round_index, source)


def _names(fs: Any, folder: str, kind: Literal["file", "directory"], **options: bool) -> list[str]:
    try:
        return sorted(Path(e["name"]).name for e in fs.ls(folder, detail=True, **options) if e["type"] == kind)
    except FileNotFoundError:
        return []
