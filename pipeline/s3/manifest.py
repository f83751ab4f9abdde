"""The layout of what is published, and the manifest that makes a run visible.

    PREFIX/objects/<sha256[:2]>/<sha256>               every file once, under the digest of its content
    PREFIX/runs/<pipeline>/<run>/manifest.json         path, size and digest of each file of the run; written last
    PREFIX/runs/<pipeline>/latest.json                 which run was published last

Objects never change, so that nothing half sent is ever seen: a run is there from the moment that its manifest is.
Files that runs or budgets share are kept and sent once.
"""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from coalora.errors import CoaloraError
from pipeline.s3.address import S3Address
from pipeline.s3.client import S3Location
from pipeline.store.artifacts import FileEntry, content_digest

MANIFEST = "manifest.json"
OBJECTS, RUNS, LATEST = "objects", "runs", "latest.json"
FORMAT = "coalora-publication/1"
_HEX = re.compile(r"[0-9a-f]{64}")


class PublishedFile(BaseModel):
    """One file: relative posix path, bytes, sha256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    size: int = Field(ge=0)
    sha256: str

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        # A manifest comes from elsewhere: it must not write outside of the folder that it is downloaded to.
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "\\" in path or str(PurePosixPath(path)) != path:
            raise ValueError("a path is relative and stays inside the folder")
        return path

    @field_validator("sha256")
    @classmethod
    def _is_a_digest(cls, sha256: str) -> str:
        if not _HEX.fullmatch(sha256):
            raise ValueError("64 hexadecimal digits")
        return sha256


class Manifest(BaseModel):
    """What a run consists of; the same run gives the same bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = FORMAT
    pipeline: str
    run: str
    identity: str | None
    mlflow_run_id: str | None
    files: list[PublishedFile]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """sha256 over the sorted (path, size, sha256) of the files, as of an artifact."""
        return content_digest([FileEntry(f.path, f.size, f.sha256) for f in self.files])


def object_name(sha256: str) -> str:
    """Name of a file's bytes below the prefix."""
    return f"{OBJECTS}/{sha256[:2]}/{sha256}"


def run_name(pipeline: str, run: str) -> str:
    return f"{RUNS}/{pipeline}/{run}"


def split_run_address(address: S3Address) -> tuple[S3Address, str, str]:
    """(prefix, pipeline, run) of `s3://BUCKET/PREFIX/runs/PIPELINE/RUN`; RUN may be `latest`.

    Raises:
        CoaloraError: an address of another form.
    """
    *prefix, runs, pipeline, run = ["", "", "", *(address.prefix.split("/") if address.prefix else [])]
    if runs != RUNS or not pipeline or not run:
        raise CoaloraError(
            "a published run has the address s3://BUCKET/PREFIX/runs/PIPELINE/RUN",
            got=address,
            expected="for example s3://models/coalora/runs/demo/latest",
        )
    return S3Address(address.bucket, "/".join(part for part in prefix if part)), pipeline, run


def published_names(root: S3Location) -> list[tuple[str, str]]:
    """(pipeline, run) of every manifest below `root`, sorted."""
    names = [root.name_of(found).split("/") for found in root.list(f"{RUNS}/")]
    return sorted((name[1], name[2]) for name in names if len(name) == 4 and name[3] == MANIFEST)


def read_manifest(root: S3Location, pipeline: str, run: str) -> Manifest:
    """The manifest of a published run; `latest` is looked up.

    Raises:
        CoaloraError: there is no such run, or its manifest is damaged or of another version.
    """
    if run == "latest":
        pointer = root.get_bytes(f"{RUNS}/{pipeline}/{LATEST}")
        if pointer is None:
            raise _missing(root, pipeline, run)
        try:
            run = str(json.loads(pointer)["run"])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(root, f"{RUNS}/{pipeline}/{LATEST}", error) from error
    name = f"{run_name(pipeline, run)}/{MANIFEST}"
    content = root.get_bytes(name)
    if content is None:
        raise _missing(root, pipeline, run)
    return parse_manifest(root, name, content)


def parse_manifest(root: S3Location, name: str, content: bytes) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise _damaged(root, name, error.errors(include_url=False)[0]["msg"]) from error
    if manifest.format != FORMAT:
        raise _damaged(root, name, f"format {manifest.format}")
    return manifest


def _missing(root: S3Location, pipeline: str, run: str) -> CoaloraError:
    there = ["/".join(name) for name in published_names(root)]
    shown = ", ".join(there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
    return CoaloraError(
        "a run must be published before it is downloaded",
        got=f"{root}/{run_name(pipeline, run)}",
        expected=shown or f"a published run, but there is none under {root}",
        remedy="publish it: coalora upload RUN_FOLDER --to s3://BUCKET/PREFIX",
    )


def _damaged(root: S3Location, name: str, reason: object) -> CoaloraError:
    return CoaloraError(
        f"a manifest is of the form {FORMAT}",
        got=f"{root}/{name}: {reason}",
        remedy="publish the run again with this version",
    )
