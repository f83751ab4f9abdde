"""A store in S3 that machines share: what one has finished, another finds, under the keys of the local store.

    <prefix>/store/<digest[:2]>/<digest>/<file>   as in `tasks.store`; manifest.json is written last
    <prefix>/records/<cache key>.json             the artifact that answers a stage's key
    <prefix>/locks/<cache key>.json               lease of who computes it now (`tasks.shared_lease`)

`COALORA_STORE=s3://bucket/prefix` turns it on; the local disk is then a cache of it, downloaded on need and checked
file by file against the digest. A record is written after its artifact: what has a record is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import ValidationError

from coalora.errors import CoaloraError
from tasks.artifacts import Artifact, FileEntry, content_digest
from tasks.environment import STORE_VARIABLE
from tasks.progress import get_logger
from tasks.shared_lease import Lease

MANIFEST = "manifest.json"
_MISSING = ("NoSuchKey", "404", "NotFound")
_TRANSFER = TransferConfig(multipart_threshold=64 * 2**20, multipart_chunksize=32 * 2**20, max_concurrency=8)


class SharedStore:
    """Artifacts, records and leases below one prefix of a bucket.

    Args:
        client: boto3's S3 client.
        url: `s3://bucket/prefix`, for messages as well.
    """

    def __init__(self, client: Any, url: str) -> None:
        self.client, self.url = client, url.rstrip("/")
        self.bucket, self.prefix = parse_url(url)

    def key(self, *parts: str) -> str:
        return "/".join(filter(None, [self.prefix, *parts]))

    def artifact_key(self, digest: str, name: str) -> str:
        return self.key("store", digest[:2], digest, name)

    def manifest(self, artifact: Artifact) -> list[FileEntry] | None:
        """Files of a complete artifact; None where there is none, or its manifest is not the artifact's."""
        content = self.read_json(self.artifact_key(artifact.digest, MANIFEST))
        try:
            entries = [FileEntry(str(path), int(size), str(sha)) for path, size, sha in content["files"]]  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            return None
        return entries if content_digest(entries) == artifact.digest else None

    def push(self, artifact: Artifact, folder: Path, entries: list[FileEntry]) -> int:
        """Upload an artifact, its manifest last; returns the bytes that were sent."""
        with self._talking(f"uploading {artifact.kind} {artifact.digest[:12]}"):
            for entry in entries:
                self.client.upload_file(
                    str(folder / entry.path),
                    self.bucket,
                    self.artifact_key(artifact.digest, entry.path),
                    ExtraArgs={"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": entry.sha256}},
                    Config=_TRANSFER,
                )
        self.write_json(
            self.artifact_key(artifact.digest, MANIFEST),
            {"digest": artifact.digest, "files": [list(e) for e in entries]},
        )
        return artifact.nbytes

    def pull(self, artifact: Artifact, folder: Path) -> list[FileEntry]:
        """Download an artifact's files into an empty folder, each checked against its digest; returns them.

        Raises:
            CoaloraError: the artifact is not there, or its files are not those of its digest.
        """
        entries = self.manifest(artifact)
        if entries is None:
            raise CoaloraError(
                "an artifact that is read is in the store",
                got=f"{artifact.kind} {artifact.digest[:12]} is neither on this machine nor in {self.url}",
                remedy="run the pipeline again: the stage that made it makes it anew",
            )
        get_logger().info(
            "%s %s: downloading %.1f MB from %s", artifact.kind, artifact.digest[:12], artifact.nbytes / 1e6, self.url
        )
        for entry in entries:
            target = folder / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._talking(f"downloading {entry.path}"):
                self.client.download_file(
                    self.bucket, self.artifact_key(artifact.digest, entry.path), str(target), Config=_TRANSFER
                )
            if problem := entry.problem(target):
                raise CoaloraError(
                    "what a shared store holds is what was uploaded",
                    got=f"{artifact.kind} {artifact.digest[:12]} in {self.url}: {problem}",
                    remedy=f"delete {self.artifact_key(artifact.digest, MANIFEST)} there and run the pipeline again",
                )
        return entries

    def record(self, cache_key: str) -> Artifact | None:
        """The artifact that answers a stage's key; None for none, a truncated record, or one of another version."""
        content = self.read_json(self.key("records", f"{cache_key}.json"))
        try:
            return Artifact.model_validate(content["artifact"])  # type: ignore[index]
        except (KeyError, TypeError, ValidationError):
            return None

    def write_record(self, cache_key: str, artifact: Artifact) -> None:
        self.write_json(self.key("records", f"{cache_key}.json"), {"artifact": artifact.model_dump(mode="json")})

    def lease(self, cache_key: str) -> Lease:
        """The lock of a key among the machines that share this store."""
        return Lease(self.client, self.bucket, self.key("locks", f"{cache_key}.json"), translate=self._told("locking"))

    def read_json(self, key: str) -> object:
        """Content of an object; None where it is missing or no JSON."""
        with self._talking(f"reading {key}"):
            try:
                body = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            except ClientError as error:
                if error.response["Error"]["Code"] in _MISSING:
                    return None
                raise
        try:
            return json.loads(body)
        except ValueError:
            return None

    def write_json(self, key: str, content: Mapping[str, Any]) -> None:
        body = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
        with self._talking(f"writing {key}"):
            self.client.put_object(Bucket=self.bucket, Key=key, Body=body, ContentType="application/json")

    @contextmanager
    def _talking(self, what: str) -> Iterator[None]:
        """Errors of S3 as ours."""
        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise self._told(what)(error) from error

    def _told(self, what: str) -> Any:
        def translate(error: Exception) -> CoaloraError:
            return CoaloraError(
                f"the shared store {self.url} answers",
                got=f"{what}: {type(error).__name__}: {error}",
                remedy=f"check the bucket, the credentials and the endpoint, or unset {STORE_VARIABLE} to go on alone",
            )

        return translate


def parse_url(url: str) -> tuple[str, str]:
    """(bucket, prefix without slashes at its ends).

    Raises:
        CoaloraError: it is no `s3://bucket/prefix`.
    """
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment or "@" in parts.netloc:
        raise CoaloraError(
            f"{STORE_VARIABLE} names a shared store",
            got=url.rsplit("@", 1)[-1],
            expected="s3://bucket/prefix; credentials come from the usual AWS variables or files",
        )
    return parts.netloc, parts.path.strip("/")


def shared_store() -> SharedStore | None:
    """The store that `COALORA_STORE` names; None where it is not set.

    Raises:
        CoaloraError: it names none.
    """
    url = os.environ.get(STORE_VARIABLE)
    return _opened(url, os.getpid()) if url else None


@lru_cache(maxsize=4)
def _opened(url: str, _process: int) -> SharedStore:
    # One client for a process: it may be used by many threads, and by no forked child.
    parse_url(url)
    from tasks.s3.client import make_client

    return SharedStore(make_client(), url)
