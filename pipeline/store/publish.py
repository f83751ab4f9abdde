"""Published runs: a run folder as content-addressed objects and a manifest in a bucket, and back, verified.

The layout is that of `pipeline.store.shared`: a run whose artifacts are in the shared store already sends little more
than its manifest. Publishing again after any failure sends what is missing; a run is there from the moment that its
manifest is. A download that was cut off begins again with the files that are not whole.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from coalora.errors import CoaloraError
from coalora.files import read_json
from pipeline.s3.client import S3Address, S3Location
from pipeline.settings.sections import StorageSettings
from pipeline.store.artifacts import (
    MANIFEST,
    MARKER,
    FileEntry,
    FileName,
    Manifest,
    checked_name,
    files_below,
    first_problem,
)
from pipeline.store.artifacts import manifest_of as manifest_of_files
from pipeline.store.copies import fill
from pipeline.store.shared import RUNS, SharedStore

LATEST = "latest.json"
RECORD = "run.json"


class RunManifest(Manifest):
    """Files of a published run; the same run gives the same bytes."""

    format: Literal["coalora-run/2"] = "coalora-run/2"
    pipeline: FileName
    run: FileName
    identity: str | None
    mlflow_run_id: str | None

    @property
    def name(self) -> str:
        """PIPELINE/RUN."""
        return f"{self.pipeline}/{self.run}"


@dataclass(frozen=True)
class Publication:
    """What became of a run folder: of all its files, which had to travel, and whether the manifest is new."""

    address: str  # s3://BUCKET/PREFIX/runs/PIPELINE/RUN
    n_files: int
    nbytes: int
    sent_files: int
    sent_bytes: int
    changed: bool

    @property
    def summary(self) -> str:
        """What was sent, in a few words."""
        if not self.changed and not self.sent_files:
            return f"published already, all {self.n_files} files ({self.nbytes:,} bytes) are there"
        return f"{self.n_files} files, {self.nbytes:,} bytes; sent {self.sent_files} files, {self.sent_bytes:,} bytes"


@dataclass(frozen=True)
class Retrieval:
    """Outcome of a download: the run, and how many of its wanted files were not there already."""

    run: str  # tells what `latest` was
    n_files: int
    nbytes: int
    fetched_files: int


def publish(folder: Path, location: S3Location) -> Publication:
    """Publish a run folder below a location. Calling it again after any failure goes on with what is missing."""
    folder = folder.resolve()  # `latest` is a link to the run
    manifest = manifest_of(folder)
    location.check()
    shared = SharedStore(location)
    sent, changed = shared.put_manifest(_manifest_name(manifest.pipeline, manifest.run), manifest, folder)
    shared.put_if_other(f"{RUNS}{manifest.pipeline}/{LATEST}", {"run": manifest.run})
    address = location.address.below(f"{RUNS}{manifest.name}")
    nbytes = sum(entry.size for entry in sent)
    return Publication(str(address), len(manifest.files), manifest.nbytes, len(sent), nbytes, changed)


def manifest_of(folder: Path) -> RunManifest:
    """The manifest of a run folder; hashes every file."""
    record = folder / RECORD
    if not record.is_file():
        raise CoaloraError(
            f"{folder} is no run folder of a finished pipeline (there is no {RECORD})",
            remedy="Name one, such as runs/demo/latest, or run the pipeline first",
        )
    content = read_json(record)
    files = {
        name: path
        for name, path in files_below(folder).items()
        if path.name != MARKER and not path.name.endswith(".part")
    }
    return RunManifest(
        files=manifest_of_files(files.items(), f"run folder {folder}").files,
        pipeline=content["pipeline"],
        run=folder.name,
        identity=content.get("identity"),
        mlflow_run_id=content.get("mlflow_run_id"),
    )


def retrieve(address: S3Address, folder: Path, settings: StorageSettings, *, only: Sequence[str] = ()) -> Retrieval:
    """Bring `folder` to the files of a published run.

    The folder is new, empty, or one that an earlier call has filled: that is brought up to date, and keeps none of the
    files of another run.

    Args:
        address: `s3://BUCKET/PREFIX/runs/PIPELINE/RUN`; RUN may be `latest`.
        only: shell patterns of the paths to fetch; all by default.

    Raises:
        CoaloraError: no such run, a folder with other files, no room, or S3 fails.
    """
    prefix, pipeline, run = split_run_address(address)
    shared = SharedStore(S3Location(prefix, settings))
    manifest = read_run(shared, pipeline, run)
    wanted = manifest.matching(only)

    def bring(missing: list[FileEntry]) -> None:
        needed, free = sum(entry.size for entry in missing), shutil.disk_usage(folder).free
        if needed > free:
            raise CoaloraError(
                f"{folder} has {free:,} bytes free, and {needed:,} are needed",
                remedy="Free some space, name another folder, or fetch a part with --only 'export/3-bits/*'",
            )
        shared.get_files(missing, folder, "downloading")

    state = {"address": str(prefix), "run": manifest.name, "digest": manifest.digest}
    fetched = fill(folder, wanted, state, bring)
    return Retrieval(manifest.run, len(wanted), sum(entry.size for entry in wanted), fetched)


def split_run_address(address: S3Address) -> tuple[S3Address, str, str]:
    """(prefix, pipeline, run) of `s3://BUCKET/PREFIX/runs/PIPELINE/RUN`; RUN may be `latest`."""
    *prefix, runs, pipeline, run = ["", "", "", *(address.prefix.split("/") if address.prefix else [])]
    if f"{runs}/" != RUNS or not pipeline or not run:
        raise CoaloraError(
            f"{address} is no address of a published run",
            remedy="Write s3://BUCKET/PREFIX/runs/PIPELINE/RUN, for example s3://models/coalora/runs/demo/latest",
        )
    return S3Address(address.bucket, "/".join(part for part in prefix if part)), pipeline, run


def published_names(shared: SharedStore) -> Iterator[tuple[str, str]]:
    """(pipeline, run) of every published run, in order."""
    for found in shared.location.list(RUNS):
        _, *names = found.name.split("/")
        with suppress(ValueError):  # another program's
            pipeline, run, file = map(checked_name, names)
            if file == MANIFEST:
                yield pipeline, run


def read_run(shared: SharedStore, pipeline: str, run: str) -> RunManifest:
    """The manifest of a published run; `latest` is looked up.

    Raises:
        CoaloraError: there is no such run, or its manifest is damaged, hostile or of another version.
    """
    if run == "latest":
        run = _latest(shared, pipeline) or run
    name = _manifest_name(pipeline, run)
    found = shared.location.get(name)
    if found is None:
        raise _missing(shared, pipeline, run)
    try:
        return RunManifest.model_validate_json(found.content)
    except ValidationError as error:
        raise CoaloraError(
            f"{shared}/{name} is no manifest of this version: {first_problem(error)}",
            remedy="Publish the run again with this version",
        ) from error


def withdraw(shared: SharedStore, pipeline: str, run: str) -> None:
    """Make a published run invisible; where it was the latest one, so is that pointer."""
    check_published(shared, pipeline, run)
    if _latest(shared, pipeline) == run:
        shared.location.delete([f"{RUNS}{pipeline}/{LATEST}"])  # first: it never points at a run that is gone
    shared.location.delete([_manifest_name(pipeline, run)])


def check_published(shared: SharedStore, pipeline: str, run: str) -> None:
    """Refuse to withdraw a run that nobody has published."""
    if (pipeline, run) not in published_names(shared):
        raise _missing(shared, pipeline, run)


def _latest(shared: SharedStore, pipeline: str) -> str | None:
    """The run of a pipeline that was published last."""
    name = f"{RUNS}{pipeline}/{LATEST}"
    pointer = shared.location.get(name)
    try:
        return None if pointer is None else checked_name(json.loads(pointer.content)["run"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CoaloraError(
            f"{shared}/{name} names no run", remedy="Name one, or publish a run of this pipeline again"
        ) from error


def _manifest_name(pipeline: str, run: str) -> str:
    return f"{RUNS}{pipeline}/{run}/{MANIFEST}"


def _missing(shared: SharedStore, pipeline: str, run: str) -> CoaloraError:
    there = ["/".join(name) for name in published_names(shared)]
    shown = ", ".join(there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
    return CoaloraError(
        f"There is no run {pipeline}/{run} in {shared}",
        remedy=f"Name one of {shown}" if there else "Publish it first: nothing is published there",
    )
