"""A store in S3 that machines share: what one has finished, another finds, under the keys of the local store.

    <prefix>/store/<digest[:2]>/<digest>/<file>   as in `pipeline.store.store`; manifest.json is written last
    <prefix>/records/<cache key>.json             the artifact that answers a stage's key
    <prefix>/locks/<cache key>.json               lease of who computes it now (`pipeline.store.lease`)

`COALORA_STORE=s3://bucket/prefix` turns it on; the local disk is then a cache of it, downloaded on need and checked
file by file against the digest. A record is written after its artifact: what has a record is complete.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from coalora.errors import CoaloraError
from pipeline.environment import STORE_VARIABLE
from pipeline.orchestration.progress import get_logger
from pipeline.s3.address import S3Address
from pipeline.s3.client import S3Location
from pipeline.s3.errors import StorageError, StorageRefused, StorageUnavailable
from pipeline.settings.storage import StorageSettings
from pipeline.store.artifacts import MANIFEST, Artifact, FileEntry, artifact_folder, content_digest
from pipeline.store.lease import TTL_SECONDS, Lease


class SharedStore:
    """Artifacts, records and leases below one prefix of a bucket.

    Args:
        location: the prefix.
        ttl: seconds after which the lease of a machine that is not heard of may be taken over.
    """

    def __init__(self, location: S3Location, *, ttl: float = TTL_SECONDS) -> None:
        self.location, self.ttl = location, ttl

    def __str__(self) -> str:
        return str(self.location)

    def manifest(self, artifact: Artifact) -> list[FileEntry] | None:
        """Files of a complete artifact; None where there is none, or its manifest is not the artifact's."""
        content = self._json(file_name(artifact.digest, MANIFEST))
        try:
            entries = [FileEntry(str(path), int(size), str(sha)) for path, size, sha in content["files"]]  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            return None
        return entries if content_digest(entries) == artifact.digest else None

    def push(self, artifact: Artifact, folder: Path, entries: list[FileEntry]) -> int:
        """Upload an artifact, its manifest last; returns the bytes that were sent."""
        for entry in entries:
            self.location.put_file(folder / entry.path, file_name(artifact.digest, entry.path), sha256=entry.sha256)
        content = {"digest": artifact.digest, "files": [list(entry) for entry in entries]}
        self.location.put_json(file_name(artifact.digest, MANIFEST), content)
        return artifact.nbytes

    def pull(self, artifact: Artifact, folder: Path) -> list[FileEntry]:
        """Download an artifact's files, each checked against its digest; returns them. Goes on where one broke off.

        One that turns out to be damaged, or to have lost a file, loses its manifest: the next run makes it anew.

        Raises:
            CoaloraError: the artifact is not there, or its files are not those of its digest.
        """
        entries = self.manifest(artifact)
        if entries is None:
            raise CoaloraError(
                "an artifact that is read is in the store",
                got=f"{artifact.kind} {artifact.digest[:12]} is neither on this machine nor in {self}",
                remedy="run the pipeline again: the stage that made it makes it anew",
            )
        get_logger().info("%s %s: %.1f MB from %s", artifact.kind, artifact.digest[:12], artifact.nbytes / 1e6, self)
        for entry in entries:
            name = file_name(artifact.digest, entry.path)
            try:
                self.location.get_file(name, folder / entry.path, sha256=entry.sha256, size=entry.size)
            except (StorageUnavailable, StorageRefused):
                raise
            except StorageError:
                get_logger().warning("%s is not whole in %s: run again, to make it anew", artifact.kind, self)
                with suppress(StorageError):
                    self.location.delete([file_name(artifact.digest, MANIFEST)])
                raise
        return entries

    def record(self, cache_key: str) -> Artifact | None:
        """The artifact that answers a stage's key; None for none, a truncated record, or one of another version."""
        content = self._json(record_name(cache_key))
        try:
            return Artifact.model_validate(content["artifact"])  # type: ignore[index]
        except (KeyError, TypeError, ValidationError):
            return None

    def write_record(self, cache_key: str, artifact: Artifact) -> None:
        self.location.put_json(record_name(cache_key), {"artifact": artifact.model_dump(mode="json")})

    def lease(self, cache_key: str) -> Lease:
        """The lock of a key among the machines that share this store."""
        return Lease(self.location, f"locks/{cache_key}.json", ttl=self.ttl)

    def _json(self, name: str) -> object:
        """Content of an object; None where it is missing or no JSON."""
        content = self.location.get_bytes(name)
        try:
            return None if content is None else json.loads(content)
        except ValueError:
            return None


def file_name(digest: str, path: str) -> str:
    """Name of an artifact's file, below the prefix."""
    return f"store/{artifact_folder(digest)}/{path}"


def record_name(cache_key: str) -> str:
    return f"records/{cache_key}.json"


def shared_store() -> SharedStore | None:
    """The store that `COALORA_STORE` names; None where it is not set. Server and credentials: AWS's own variables.

    Raises:
        CoaloraError: it names none.
    """
    url = os.environ.get(STORE_VARIABLE)
    endpoint = [os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_PROFILE")]
    return _opened(url, *endpoint, os.getpid()) if url else None


@lru_cache(maxsize=4)
def _opened(url: str, *_: object) -> SharedStore:
    # One client for a process: it may be used by many threads, and by no forked child.
    try:
        address = S3Address.parse(url)
    except CoaloraError as error:
        raise CoaloraError(
            f"{STORE_VARIABLE} names a store in S3", got=error.got, expected="s3://bucket/prefix", remedy=error.remedy
        ) from error
    return SharedStore(S3Location(address, StorageSettings()))
