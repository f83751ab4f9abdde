"""Store in S3 that machines share, and the layout of everything that is kept in a bucket.

    <prefix>/objects/<sha256[:2]>/<sha256>            every file once, under the digest of its content
    <prefix>/artifacts/<digest[:2]>/<digest>.json     manifest of an artifact
    <prefix>/records/<cache key>.json                 the artifact that answers a stage's key
    <prefix>/runs/<pipeline>/<run>/manifest.json      manifest of a published run (`pipeline.store.publish`)
    <prefix>/runs/<pipeline>/latest.json              the run that was published last
    <prefix>/locks/<cache key>.json                   lease of who computes a key now (`pipeline.store.lease`)

Objects never change, a manifest is written after its objects and a record after its artifact, so that nothing half sent
is ever seen. A file that artifacts, runs or budgets have in common is kept, and sent, once. `COALORA_STORE` names the
store of a machine, whose disk is then a cache of it; a run may be published there or at any other prefix.
Whoever may write to the bucket decides what its readers compute with; where on their disks it lands and how much comes
is checked here (`pipeline.store.artifacts.Manifest`). `pipeline.prune.garbage` removes what nothing refers to.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from coalora.errors import CoaloraError
from coalora.files import json_bytes
from pipeline.environment import STORE_VARIABLE
from pipeline.progress import get_logger
from pipeline.s3.client import S3Address, S3Location, Transfer
from pipeline.s3.errors import StorageDamaged, StorageError
from pipeline.settings.sections import StorageSettings
from pipeline.store.artifacts import Artifact, FileEntry, Manifest, artifact_folder, files_below
from pipeline.store.lease import TTL_SECONDS, Lease

OBJECTS, ARTIFACTS, RECORDS, RUNS, LOCKS = "objects/", "artifacts/", "records/", "runs/", "locks/"
USED_SECONDS = 24 * 3600.0  # use is noted in the bucket (by writing the manifest again) this often


class SharedStore:
    """Objects, manifests, records and leases below one prefix of a bucket."""

    def __init__(self, location: S3Location, *, ttl: float = TTL_SECONDS, read_only: bool = False) -> None:
        self.location, self.ttl, self.read_only = location, ttl, read_only

    def __str__(self) -> str:
        return str(self.location)

    def put_manifest(self, name: str, manifest: Manifest, folder: Path) -> tuple[list[FileEntry], bool]:
        """Upload the files of a folder that are not there, and then their manifest.

        Returns (entries whose bytes travelled, whether the manifest is new).
        """
        contents = list({entry.sha256: entry for entry in manifest.files}.values())
        sent = self._send(contents, folder)
        changed = self.put_if_other(name, manifest.model_dump())
        if changed:
            # Objects that were there may have been pruned by somebody who had not seen the manifest.
            sent += self._send([entry for entry in contents if entry not in sent], folder)
        return sent, changed

    def put_if_other(self, name: str, content: object) -> bool:
        """Put JSON unless it is there already; whether it was not."""
        found = self.location.get(name)
        if found is not None and found.content == json_bytes(content):
            return False
        self.location.put_bytes(name, json_bytes(content))
        return True

    def get_files(self, entries: Sequence[FileEntry], folder: Path, label: str) -> None:
        """Download files of a manifest into a folder, each checked against its digest."""
        self.location.get_files(_transfers(entries, folder), label)

    def manifest(self, artifact: Artifact) -> Manifest | None:
        """Files of a complete artifact; None where there is none, or its manifest is not the artifact's.

        Asking counts as use: what was used lately is not pruned.
        """
        name = manifest_name(artifact.digest)
        found = self.location.get(name)
        try:
            manifest = Manifest.model_validate_json(found.content) if found is not None else None
        except ValidationError:
            return None
        if found is None or manifest is None or manifest.digest != artifact.digest:
            return None
        if found.age > USED_SECONDS and not self.read_only:
            self.location.put_bytes(name, found.content)
        return manifest

    def push(self, artifact: Artifact, folder: Path, manifest: Manifest) -> int:
        """Upload an artifact; returns the bytes that were sent."""
        sent, _ = self.put_manifest(manifest_name(artifact.digest), manifest, folder)
        return sum(entry.size for entry in sent)

    def pull(self, artifact: Artifact, folder: Path) -> Manifest:
        """Download an artifact into a folder, which then holds these files alone; whole files in it are kept.

        An artifact that turns out to be damaged, or to have lost a file, loses its manifest: it is made anew.
        """
        manifest = self.manifest(artifact)
        if manifest is None:
            raise CoaloraError(
                f"{artifact.kind} {artifact.digest[:12]} is neither on this machine nor in {self}",
                remedy="Run the pipeline again: the stage that made it makes it anew",
            )
        get_logger().info("%s %s: %.1f MB from %s", artifact.kind, artifact.digest[:12], manifest.nbytes / 1e6, self)
        present = files_below(folder)
        whole = {e.path for e in manifest.files if e.path in present and not e.problem(present[e.path])}
        for name in set(present) - whole:
            present[name].unlink()
        try:
            self.get_files([e for e in manifest.files if e.path not in whole], folder, f"{artifact.kind} from S3")
        except StorageDamaged:
            get_logger().warning("%s is not whole in %s: run again, to make it anew", artifact.kind, self)
            if not self.read_only:
                with suppress(StorageError):
                    self.location.delete([manifest_name(artifact.digest)])
            raise
        return manifest

    def record(self, cache_key: str) -> Artifact | None:
        """The artifact that answers a stage's key; None for none, a truncated record, or one of another version."""
        found = self.location.get(record_name(cache_key))
        return None if found is None else parse_record(found.content)

    def write_record(self, cache_key: str, artifact: Artifact) -> None:
        """Say which artifact answers a key; nothing where the store is only read."""
        if not self.read_only:
            self.location.put_bytes(record_name(cache_key), json_bytes({"artifact": artifact.model_dump(mode="json")}))

    def lease(self, cache_key: str) -> Lease:
        """The lock of a key among the machines that share this store."""
        return Lease(self.location, f"{LOCKS}{cache_key}.json", ttl=self.ttl)

    def _send(self, contents: Sequence[FileEntry], folder: Path) -> list[FileEntry]:
        """Upload the files whose content is not in the bucket, the largest first; returns their entries."""

        def is_missing(entry: FileEntry) -> bool:
            found = self.location.head(object_name(entry.sha256))
            return found is None or (found.size, found.sha256) != (entry.size, entry.sha256)

        with ThreadPoolExecutor(self.location.settings.workers) as pool:
            missing = [e for e, gone in zip(contents, pool.map(is_missing, contents), strict=True) if gone]
        missing.sort(key=lambda entry: -entry.size)
        if missing:
            self.location.put_files(_transfers(missing, folder), "uploading")
        return missing


def _transfers(entries: Sequence[FileEntry], folder: Path) -> list[Transfer]:
    return [Transfer(folder / e.path, object_name(e.sha256), e.size, e.sha256) for e in entries]


def object_name(sha256: str) -> str:
    """Name of a file's bytes, below the prefix."""
    return f"{OBJECTS}{sha256[:2]}/{sha256}"


def manifest_name(digest: str) -> str:
    """Name of an artifact's manifest, below the prefix."""
    return f"{ARTIFACTS}{artifact_folder(digest)}.json"


def record_name(cache_key: str) -> str:
    return f"{RECORDS}{cache_key}.json"


def parse_record(content: bytes) -> Artifact | None:
    """The artifact that a record names; None for anything else."""
    try:
        return Artifact.model_validate(json.loads(content)["artifact"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def open_shared(url: str, *, read_only: bool = False) -> SharedStore:
    """The shared store at `s3://bucket/prefix`. Server and credentials: AWS's own variables."""
    endpoint = [os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_PROFILE")]
    return _opened(url, read_only, *endpoint, os.getpid())


@lru_cache(maxsize=4)
def _opened(url: str, read_only: bool, *_: object) -> SharedStore:
    # One client for a process: it may be used by many threads, and by no forked child.
    try:
        address = S3Address.parse(url)
    except CoaloraError as error:
        raise CoaloraError(f"{STORE_VARIABLE} names no store: {error.problem}", remedy=error.remedy) from error
    return SharedStore(S3Location(address, StorageSettings()), read_only=read_only)
