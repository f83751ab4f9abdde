"""Objects in S3: put, get, head, list, delete; with checksums, bounded retries, and errors that say what to do.

Credentials come from boto3's own chain (environment, `~/.aws`, role of the machine) and stay there. Every request is
tried `StorageSettings.attempts` times (botocore's mode `standard`). Uploads carry SHA-256, which the server compares,
part by part where a file is cut; downloads are hashed here before a file gets its name.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import BotoCoreError, ClientError

from coalora.errors import CoaloraError
from coalora.files import file_sha256, json_bytes
from pipeline.s3.address import S3Address
from pipeline.s3.download import fetch
from pipeline.s3.errors import StorageError, error_code, translated
from pipeline.s3.session import make_client
from pipeline.settings.storage import StorageSettings

SHA256 = "sha256"  # of the whole object, in its metadata
_MIB = 1 << 20
_ABSENT = {"NoSuchKey", "404"}
_TAKEN = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_DELETED_AT_ONCE = 1000


@dataclass(frozen=True)
class S3Object:
    """What S3 says of an object.

    Attributes:
        key: in the bucket, prefix included.
        size: bytes.
        etag: changes whenever the object does.
        sha256: of the whole content, where the object was put by this class and `head` was asked; else None.
        modified: time of the last change in seconds since 1970, by the server's clock.
    """

    key: str
    size: int
    etag: str
    sha256: str | None
    modified: float


class S3Location:
    """A bucket and a prefix; all names are relative to the prefix. Safe for use by several threads.

    Nothing is asked of the server before the first request.

    Args:
        address: bucket and prefix.
        settings: how the server is reached.

    Raises:
        CoaloraError: the profile does not exist, or the settings do not make a client.
    """

    def __init__(self, address: S3Address, settings: StorageSettings | None = None, *, _client: Any = None) -> None:
        self.address = address
        self.settings = settings if settings is not None else StorageSettings()
        self.client = _client if _client is not None else make_client(self.settings)

    @classmethod
    def of(cls, settings: StorageSettings, name: str = "") -> S3Location:
        """The location that settings name, or one below it."""
        if settings.bucket is None:
            raise CoaloraError(
                "a bucket must be named", remedy="set storage.bucket, or give an address s3://BUCKET/PREFIX"
            )
        address = S3Address(settings.bucket, settings.prefix)
        return cls(address.below(name) if name else address, settings)

    @property
    def endpoint(self) -> str:
        return str(self.client.meta.endpoint_url)

    def below(self, name: str) -> S3Location:
        """The location one or more names down, by the same client."""
        return S3Location(self.address.below(name), self.settings, _client=self.client)

    def put_bytes(
        self, name: str, content: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str | None:
        """Put a small object in one request.

        Args:
            if_absent: only where there is no such object (a lock). The content must be the caller's alone (a random
                token in it): an answer that was lost on the way is then told from a lock that another holds.
            if_match: only where the object's etag is this one (take over a lock, swap a pointer).

        Returns:
            The new etag; None if the condition did not hold, and nothing was written.
        """
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_match} if if_match is not None else {}
        digest = hashlib.sha256(content).digest()
        with self._asking("writing", name):
            try:
                answer = self.client.put_object(
                    **self._object(name),
                    Body=content,
                    ChecksumSHA256=base64.b64encode(digest).decode(),
                    Metadata={SHA256: digest.hex()},
                    **condition,
                )
            except ClientError as error:
                code = error_code(error)
                if not condition or code not in _TAKEN | _ABSENT:
                    raise
                # A first attempt may have arrived whose answer was lost: then the object is as we wanted it.
                found = self.head(name) if code in _TAKEN else None
                return found.etag if found is not None and found.sha256 == digest.hex() else None
        return _etag(answer)

    def put_json(self, name: str, content: object) -> str:
        """Put canonical JSON: sorted keys, a newline at the end."""
        return str(self.put_bytes(name, json_bytes(content)))

    def put_file(self, path: Path, name: str, *, sha256: str | None = None) -> None:
        """Put a file; above `part_mib` in parts, several at a time. The object appears when its last byte has arrived.

        Args:
            sha256: of the content, if it is known already.

        Raises:
            CoaloraError: S3 fails (`StorageError`), or the file changes while it is read.
        """
        digest = sha256 or file_sha256(path)
        part = self.settings.part_mib * _MIB
        config = TransferConfig(
            multipart_threshold=part,
            multipart_chunksize=part,
            max_concurrency=self.settings.workers,
            preferred_transfer_client="classic",  # the other one has retries of its own
        )
        extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {SHA256: digest}}
        with self._asking(f"upload of {path.name}", name):
            self.client.upload_file(str(path), self.address.bucket, self.address.key(name), extra, Config=config)
        if file_sha256(path) != digest:
            self.delete([name])
            raise CoaloraError("a file stays as it is until it is uploaded", got=path, remedy="run the command again")

    def get_bytes(self, name: str) -> bytes | None:
        """The content of a small object, or None if there is none."""
        with self._asking("reading", name):
            for attempt in range(1, self.settings.attempts + 1):
                try:
                    body = self.client.get_object(**self._object(name))["Body"]
                except ClientError as error:
                    if error_code(error) in _ABSENT:
                        return None
                    raise
                try:
                    return bytes(body.read())
                except BotoCoreError:  # cut in mid-body, which botocore's retries do not cover
                    if attempt == self.settings.attempts:
                        raise
        raise AssertionError("settings allow at least one attempt")

    def get_file(self, name: str, path: Path, *, sha256: str, size: int) -> bool:
        """Download an object to `path`, verified; goes on where an earlier call was cut off.

        The bytes are kept beside `path` in `.<name>.<sha256>.part` until they are all there and hash to `sha256`.

        Returns:
            Whether anything was fetched; False where `path` has this content already.

        Raises:
            CoaloraError: S3 fails, the object is missing or is not what `sha256` says, or the disk is full.
        """
        with self._asking(f"download of {path.name}", name):
            return fetch(self.client, self._object(name), path, sha256, size, self.settings.attempts)

    def head(self, name: str) -> S3Object | None:
        """What S3 says of an object; None if there is none."""
        with self._asking("looking", name):
            try:
                answer = self.client.head_object(**self._object(name))
            except ClientError as error:
                if error_code(error) not in _ABSENT:
                    raise
                # HEAD has no body to tell a missing bucket from a missing object.
                self.client.list_objects_v2(Bucket=self.address.bucket, Prefix=self.address.key(name), MaxKeys=1)
                return None
        modified = answer["LastModified"].timestamp()
        digest = answer.get("Metadata", {}).get(SHA256)
        return S3Object(self.address.key(name), answer["ContentLength"], _etag(answer), digest, modified)

    def list(self, name: str = "") -> Iterator[S3Object]:
        """Objects whose names start with `name`, in order of their keys; `sha256` is None in all of them."""
        start = f"{self.address.prefix}/{name}" if self.address.prefix else name
        with self._asking("listing", name):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.address.bucket, Prefix=start)
            for page in pages:
                for found in page.get("Contents", []):
                    modified = found["LastModified"].timestamp()
                    yield S3Object(found["Key"], found["Size"], _etag(found), None, modified)

    def name_of(self, found: S3Object) -> str:
        """The name, relative to this location, of an object that `list` gave."""
        return found.key[len(self.address.prefix) + 1 :] if self.address.prefix else found.key

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that are gone already are no error."""
        with self._asking("deleting", names[0] if len(names) == 1 else ""):
            for start in range(0, len(names), _DELETED_AT_ONCE):
                keys = [{"Key": self.address.key(n)} for n in names[start : start + _DELETED_AT_ONCE]]
                answer = self.client.delete_objects(Bucket=self.address.bucket, Delete={"Objects": keys, "Quiet": True})
                if errors := answer.get("Errors"):
                    first = errors[0]
                    raise StorageError(
                        "the credentials must allow to delete",
                        got=f"{len(errors)} of {len(keys)} refused, first {first.get('Key')}: {first.get('Code')}",
                        remedy="allow s3:DeleteObject on the bucket",
                    )

    def check(self) -> None:
        """One cheap request that fails as any other would: server, credentials, bucket.

        Raises:
            StorageError: and its subclasses, with a remedy.
        """
        with self._asking("a first request", ""):
            self.client.list_objects_v2(Bucket=self.address.bucket, Prefix=self.address.prefix, MaxKeys=1)

    def _object(self, name: str) -> dict[str, str]:
        return {"Bucket": self.address.bucket, "Key": self.address.key(name)}

    def _asking(self, what: str, name: str) -> Any:
        return translated(what, f"s3://{self.address.bucket}/{self.address.key(name)}", self.endpoint)

    def __str__(self) -> str:
        return str(self.address)


def _etag(answer: dict[str, Any]) -> str:
    return str(answer["ETag"])
