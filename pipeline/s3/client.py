"""Client of a bucket: put, get, list and delete below a prefix, with checksums, bounded retries and clear errors.

Credentials come from boto3's own chain (environment, `~/.aws`, role of the machine) and stay there. Every request is
tried `StorageSettings.attempts` times (botocore's mode `standard`). Files travel by boto3's transfer manager, large
ones in parts and several at a time: uploads carry SHA-256, which the server compares; downloads are hashed here before
a file gets its name. A file whose download is cut off begins again; those that are whole are kept.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Lock
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError
from s3transfer.subscribers import BaseSubscriber

from coalora.errors import CoaloraError
from coalora.files import file_sha256
from pipeline.progress import Progress
from pipeline.s3.errors import ABSENT, DENIED, StorageDamaged, StorageError, error_code, translated
from pipeline.settings.sections import BUCKET, StorageSettings

_BUCKET = re.compile(BUCKET)
_MB, _MIB = 1_000_000, 1 << 20
_TAKEN = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_DELETED_AT_ONCE = 1000
_SMALL = 64 * _MIB  # most that is read into memory: manifests and records come from elsewhere
_DIGEST = "sha256"  # in an object's metadata


@dataclass(frozen=True)
class S3Address:
    """A bucket and the start of keys in it, `s3://bucket/prefix`; the prefix has no slash at its ends."""

    bucket: str
    prefix: str = ""

    @classmethod
    def parse(cls, text: str) -> S3Address:
        """Read `s3://bucket[/prefix]`."""
        scheme, _, rest = text.partition("://")
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.strip("/")
        parts = prefix.split("/") if prefix else []
        if scheme != "s3" or not _BUCKET.fullmatch(bucket) or any(p in ("", ".", "..") for p in parts):
            shown = re.sub(r"//[^/]*@", "//***@", text)[:200]
            raise CoaloraError(
                f"{shown!r} is no address in S3",
                remedy="Write s3://BUCKET/PREFIX: a bucket of 3 to 63 lower-case letters, digits, dots and dashes, and "
                "no empty part, . or .. behind it",
            )
        return cls(bucket, prefix)

    def key(self, name: str = "") -> str:
        """The key of a name below the prefix."""
        return "/".join(part for part in (self.prefix, name) if part)

    def below(self, name: str) -> S3Address:
        """The address one or more names down."""
        return S3Address(self.bucket, self.key(name.strip("/")))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"


@dataclass(frozen=True)
class S3Object:
    """An object as S3 describes it."""

    name: str  # below the location's prefix
    size: int
    etag: str
    age: float  # seconds since the last change, by the server's clock where its answer tells the time
    content: bytes = b""  # where it was asked for
    sha256: str | None = None  # as its writer has noted it; None in listings and of other programs' objects


@dataclass(frozen=True)
class Transfer:
    """A file and its object."""

    path: Path
    name: str
    size: int
    sha256: str


class S3Location:
    """A bucket and a prefix; all names are relative to the prefix. Safe for use by several threads.

    Nothing is asked of the server before the first request.
    """

    def __init__(self, address: S3Address, settings: StorageSettings | None = None) -> None:
        self.address = address
        self._start = f"{address.prefix}/" if address.prefix else ""
        self.settings = settings if settings is not None else StorageSettings()
        self.client = _make_client(self.settings)

    @classmethod
    def of(cls, settings: StorageSettings) -> S3Location:
        """The location that settings name."""
        if settings.bucket is None:
            raise CoaloraError("No bucket is named", remedy="Set storage.bucket, or give an address s3://BUCKET/PREFIX")
        return cls(S3Address(settings.bucket, settings.prefix), settings)

    @property
    def endpoint(self) -> str:
        return str(self.client.meta.endpoint_url)

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
        digest = hashlib.sha256(content)
        with self._asking("writing", name):
            try:
                answer = self.client.put_object(
                    **self._object(name),
                    Body=content,
                    ChecksumSHA256=base64.b64encode(digest.digest()).decode(),
                    Metadata={_DIGEST: digest.hexdigest()},
                    **condition,
                )
            except ClientError as error:
                code = error_code(error)
                if not condition or code not in _TAKEN | ABSENT:
                    raise
                # A first attempt may have arrived whose answer was lost: then the object is as we wanted it.
                found = self.get(name) if code in _TAKEN else None
                return found.etag if found is not None and found.content == content else None
        return str(answer["ETag"])

    def get(self, name: str) -> S3Object | None:
        """A small object with its content; None if there is none.

        Raises:
            StorageError: S3 fails, or the object is too large to be a manifest, a record or a lock.
        """
        with self._asking("reading", name):
            for attempt in range(self.settings.attempts, 0, -1):
                try:
                    answer = self.client.get_object(**self._object(name))
                    if answer["ContentLength"] > _SMALL:
                        raise StorageDamaged(
                            f"{self._place(name)} has {answer['ContentLength']:,} bytes, too many to be read here",
                            remedy="See who wrote it: this is no object of this program",
                        )
                    return _described(name, answer, answer["Body"].read())
                except ClientError as error:
                    if error_code(error) in ABSENT:
                        return None
                    raise
                except BotoCoreError:  # cut in mid-body, which botocore's retries do not cover
                    if attempt == 1:
                        raise
        raise AssertionError("settings allow at least one attempt")

    def head(self, name: str) -> S3Object | None:
        """An object without its content; None if there is none."""
        with self._asking("looking", name):
            try:
                return _described(name, self.client.head_object(**self._object(name)))
            except ClientError as error:
                if error_code(error) not in ABSENT:
                    raise
        self.check()  # HEAD has no body to tell a missing bucket from a missing object
        return None

    def list(self, name: str = "") -> Iterator[S3Object]:
        """Objects whose names start with `name`, in order of their keys."""
        where = {"Bucket": self.address.bucket, "Prefix": self._start + name}
        with self._asking("listing", name):
            pages = self.client.get_paginator("list_objects_v2").paginate(**where)
            for found in (item for page in pages for item in page.get("Contents", [])):
                age = time.time() - found["LastModified"].timestamp()
                yield S3Object(found["Key"][len(self._start) :], found["Size"], str(found["ETag"]), age)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that are gone already are no error."""
        with self._asking("deleting", names[0] if len(names) == 1 else ""):
            for start in range(0, len(names), _DELETED_AT_ONCE):
                keys = [{"Key": self.address.key(n)} for n in names[start : start + _DELETED_AT_ONCE]]
                answer = self.client.delete_objects(Bucket=self.address.bucket, Delete={"Objects": keys, "Quiet": True})
                if errors := answer.get("Errors"):
                    first = f"{errors[0].get('Key')} ({errors[0].get('Code')})"
                    raise StorageError(
                        f"S3 refuses to delete {len(errors)} of {len(keys)} objects, first {first}",
                        remedy="Allow s3:DeleteObject on the bucket",
                    )

    def put_files(self, files: Sequence[Transfer], label: str) -> None:
        """Upload files, several at a time; an object appears when its last byte has arrived."""
        progress = Megabytes(label, sum(file.size for file in files))
        with self._manager() as manager:
            begun = [
                manager.upload(
                    str(file.path),
                    self.address.bucket,
                    self.address.key(file.name),
                    {"ChecksumAlgorithm": "SHA256", "Metadata": {_DIGEST: file.sha256}},
                    [_Counter(file, progress)],
                )
                for file in files
            ]
            for file, future in zip(files, begun, strict=True):
                with self._asking(f"upload of {file.path.name}", file.name):
                    future.result()
                if file_sha256(file.path) != file.sha256:
                    self.delete([file.name])
                    raise CoaloraError(f"{file.path} was changed while it was uploaded", remedy="Run the command again")

    def get_files(self, files: Sequence[Transfer], label: str) -> None:
        """Download files, several at a time; each gets its name when it is whole and hashes to its sha256.

        Bytes that arrive altered are asked for once more. Never more is written than the stated size.
        """
        progress = Megabytes(label, sum(file.size for file in files))
        altered = self._get_files(files, progress)
        if altered and (altered := self._get_files(altered, progress)):
            file = altered[0]
            raise StorageDamaged(
                f"{self._place(file.name)} is not what its manifest says: {file.size:,} bytes with sha256 "
                f"{file.sha256[:16]}...",
                remedy="Publish it again, or run the pipeline again: the copy in the bucket is damaged",
            )

    def _get_files(self, files: Sequence[Transfer], progress: Megabytes) -> Sequence[Transfer]:
        """Those of `files` whose bytes were not the wanted ones."""
        altered: list[Transfer] = []
        parts = [file.path.with_name(f".{uuid.uuid4().hex}.part") for file in files]
        try:
            with self._manager() as manager:
                begun = []
                for file, part in zip(files, parts, strict=True):
                    part.parent.mkdir(parents=True, exist_ok=True)
                    counter = _Counter(file, progress, bounded=True)
                    where = (self.address.bucket, self.address.key(file.name))
                    begun.append(manager.download(*where, str(part), {"ChecksumMode": "ENABLED"}, [counter]))
                for file, part, future in zip(files, parts, begun, strict=True):
                    if self._arrived(file, part, future):
                        os.replace(part, file.path)
                    else:
                        altered.append(file)
        finally:
            for part in parts:
                part.unlink(missing_ok=True)
        return altered

    def _arrived(self, file: Transfer, part: Path, future: Any) -> bool:
        with self._asking(f"download of {file.path.name}", file.name):
            try:
                future.result()
            except (FlexibleChecksumError, _OtherSizeError):
                return False
            except ClientError as error:
                if error_code(error) in ABSENT:
                    self.check()  # the manager asks by HEAD, which does not tell a missing bucket from an object
                raise
        return part.stat().st_size == file.size and file_sha256(part) == file.sha256

    def check(self) -> None:
        """One cheap request that fails as any other would: server, credentials, bucket."""
        with self._asking("a first request", ""):
            self.client.list_objects_v2(Bucket=self.address.bucket, Prefix=self.address.prefix, MaxKeys=1)

    def expire_uploads(self, days: int = 7) -> str:
        """Let the bucket free the parts of uploads that were killed, by a lifecycle rule; returns what was done.

        S3 keeps, and bills, such parts until somebody says that nobody will finish them. Where the credentials do not
        allow it, or the server knows no such rules, the answer says what its administrator is to set.
        """
        rule = {
            "ID": f"abort-uploads-{hashlib.sha256(self._start.encode()).hexdigest()[:8]}",
            "Status": "Enabled",
            "Filter": {"Prefix": self._start},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": days},
        }
        with self._asking("setting a lifecycle rule", ""):
            try:
                rules = [other for other in self._lifecycle_rules() if other.get("ID") != rule["ID"]]
                self.client.put_bucket_lifecycle_configuration(
                    Bucket=self.address.bucket, LifecycleConfiguration={"Rules": [*rules, rule]}
                )
            except ClientError as error:
                if error_code(error) not in DENIED:
                    raise
                return (
                    f"{self}: the server does not let you set lifecycle rules ({error_code(error)}). "
                    f"Ask the bucket's administrator to add {json.dumps(rule)}"
                )
        return f"{self}: unfinished uploads are freed {days} days after their start (rule {rule['ID']!r})"

    def _lifecycle_rules(self) -> Sequence[dict[str, Any]]:
        try:
            answer = self.client.get_bucket_lifecycle_configuration(Bucket=self.address.bucket)
        except ClientError as error:
            if error_code(error) == "NoSuchLifecycleConfiguration":
                return []
            raise
        return list(answer.get("Rules", []))

    def _manager(self) -> Any:
        part = self.settings.part_mib * _MIB
        config = TransferConfig(
            multipart_threshold=part,
            multipart_chunksize=part,
            max_concurrency=self.settings.workers,
            num_download_attempts=self.settings.attempts,
            preferred_transfer_client="classic",  # the other one has retries of its own
        )
        return create_transfer_manager(self.client, config)

    def _object(self, name: str) -> dict[str, str]:
        return {"Bucket": self.address.bucket, "Key": self.address.key(name)}

    def _place(self, name: str) -> str:
        return f"s3://{self.address.bucket}/{self.address.key(name)}"

    def _asking(self, what: str, name: str) -> AbstractContextManager[None]:
        return translated(what, self._place(name), self.endpoint)

    def __str__(self) -> str:
        return str(self.address)


class Megabytes:
    """Progress of transfers side by side, in MB; `label` says what they do."""

    def __init__(self, label: str, total: int) -> None:
        self._progress, self._total, self._done, self._lock = Progress(f"{label} (MB)"), total, 0, Lock()

    def add(self, nbytes: int, file: str) -> None:
        """`nbytes` more have arrived, those of `file` among them."""
        with self._lock:
            self._done += nbytes
            total = max(-(-self._total // _MB), 1)
            # Rounded down until all is there: the last line is to come once.
            self._progress(total if self._done >= self._total else self._done // _MB, total, file=file)


class _OtherSizeError(Exception):
    """More bytes came than the manifest states."""


class _Counter(BaseSubscriber):
    """Bytes of one file; a `bounded` one stops a transfer that brings more than the file's size."""

    def __init__(self, file: Transfer, progress: Megabytes, *, bounded: bool = False) -> None:
        self.file, self.progress, self.bounded = file, progress, bounded
        self._received, self._lock = 0, Lock()

    def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
        with self._lock:
            self._received += bytes_transferred  # less again where a part is asked for once more
            if self.bounded and self._received > self.file.size:
                raise _OtherSizeError
        self.progress.add(bytes_transferred, self.file.path.name)


def _described(name: str, answer: dict[str, Any], content: bytes = b"") -> S3Object:
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    now = parsedate_to_datetime(date).timestamp() if date else time.time()
    age, noted = now - answer["LastModified"].timestamp(), answer.get("Metadata", {}).get(_DIGEST)
    return S3Object(name, answer["ContentLength"], str(answer["ETag"]), age, content, noted)


def _make_client(settings: StorageSettings) -> Any:
    """boto3's S3 client by these settings, and by AWS's variables and files for what they leave out."""
    # At level DEBUG these log the headers of requests: session tokens and signatures.
    for name in ("boto3", "botocore", "s3transfer"):
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.WARNING))
    with translated("opening a session", f"s3://{settings.bucket or ''}", settings.endpoint_url or "AWS"):
        session = boto3.session.Session(
            profile_name=settings.profile,
            # boto3 itself reads AWS_DEFAULT_REGION alone.
            region_name=settings.region or os.environ.get("AWS_REGION") or None,
        )
        config = Config(
            retries={"mode": "standard", "total_max_attempts": settings.attempts},
            connect_timeout=settings.timeout_seconds,
            read_timeout=settings.timeout_seconds,
            max_pool_connections=2 * settings.workers + 2,
            user_agent_appid="coalora",
        )
        return session.client("s3", endpoint_url=settings.endpoint_url, config=config)
