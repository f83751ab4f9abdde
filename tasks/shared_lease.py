"""A lock between machines that share a store in S3: one object that its holder writes again and again.

Every change is a conditional write, so that of two machines one wins: the object is made with `If-None-Match: *`, kept
alive and taken over with `If-Match: <ETag>`. It expires when it is older than `ttl` by the store's own clock
(`Last-Modified` against the `Date` of the answer; no machine's clock counts), so that a holder that was killed blocks
the others for `ttl` seconds at most.

Guaranteed: at most one live holder while the holder reaches the store at least once in `ttl` seconds. A holder that
does not (network down, machine asleep) loses the lease, says so, and goes on: what it computes is kept as well, since
results are named by their content. A store that ignores conditional writes makes the lease useless and breaks nothing.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from tasks.locks import describe, this_process
from tasks.progress import get_logger

TTL_SECONDS = 60.0
BEATS = 4  # renewals in one ttl


@dataclass(frozen=True)
class Seen:
    """The lease object as it was last read. `age` in seconds, by the store's clock."""

    etag: str
    age: float
    content: dict[str, Any]


class Lease:
    """One lease; a `tasks.locks.Lock`.

    Args:
        client: boto3's S3 client.
        bucket, key: the lease object.
        ttl: seconds after which a lease that was not renewed may be taken over.
        translate: turns an error of the store into one to show.
    """

    def __init__(
        self,
        client: Any,
        bucket: str,
        key: str,
        *,
        ttl: float = TTL_SECONDS,
        translate: Callable[[Exception], Exception] = lambda error: error,
    ) -> None:
        self.client, self.bucket, self.key, self.ttl, self.translate = client, bucket, key, ttl, translate
        self._owner = uuid.uuid4().hex
        self._etag: str | None = None
        self._seen: Seen | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def try_acquire(self) -> bool:
        """Take the lease if nobody has it, or if its holder has let it expire.

        Raises:
            Exception: the store cannot be reached or refuses, as `translate` says it.
        """
        try:
            etag = self._write(IfNoneMatch="*") or self._take_over()
        except (ClientError, BotoCoreError) as error:
            raise self.translate(error) from error
        if etag is None:
            return False
        self._etag = etag
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, args=(self._stop,), name="coalora-lease", daemon=True)
        self._thread.start()
        return True

    def release(self) -> None:
        """Give the lease back. Where the store cannot be reached it expires by itself."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        # Renewed first: after that it is ours for `ttl` seconds, and nobody else's object is deleted.
        with suppress(ClientError, BotoCoreError):
            if self._etag is not None and self._write(IfMatch=self._etag) is not None:
                self.client.delete_object(Bucket=self.bucket, Key=self.key)
        self._etag = None

    def holder(self) -> str:
        return describe(self._seen.content if self._seen else None)

    def _take_over(self) -> str | None:
        seen = self._seen = self._read()
        if seen is None:  # gone meanwhile: the next try makes it anew
            return None
        if self._is_ours(seen):
            return seen.etag
        if seen.age <= self.ttl:
            return None
        get_logger().warning("%s: lease of %s has expired, and is taken over", self.key, self.holder())
        return self._write(IfMatch=seen.etag)

    def _keep_alive(self, stop: threading.Event) -> None:
        while not stop.wait(self.ttl / BEATS):
            try:
                etag = self._write(IfMatch=str(self._etag))
                if etag is None and (seen := self._read()) is not None and self._is_ours(seen):
                    etag = seen.etag
            except (ClientError, BotoCoreError) as error:
                get_logger().warning("%s: lease not renewed, trying again: %s", self.key, type(error).__name__)
                continue
            self._etag = etag
            if etag is None:
                get_logger().warning("%s: lease lost to another machine; both results are kept", self.key)
                return

    def _is_ours(self, seen: Seen) -> bool:
        # A write whose answer was lost is sent again, and then meets itself.
        return seen.content.get("owner") == self._owner

    def _write(self, **condition: str) -> str | None:
        """ETag of the object as written, or None where the condition did not hold."""
        # `beat` makes every content, and with it every ETag, another one.
        content = {**this_process(), "owner": self._owner, "beat": uuid.uuid4().hex}
        body = json.dumps(content).encode()
        try:
            answer = self.client.put_object(Bucket=self.bucket, Key=self.key, Body=body, **condition)
        except ClientError as error:
            # 412: the condition does not hold; 409: another conditional write is under way; 404: the object is gone.
            status = error.response["ResponseMetadata"].get("HTTPStatusCode")
            missing = status == 404 and error.response["Error"]["Code"] == "NoSuchKey"
            if status in (409, 412) or missing:
                return None
            raise
        return str(answer["ETag"])

    def _read(self) -> Seen | None:
        try:
            answer = self.client.get_object(Bucket=self.bucket, Key=self.key)
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return None
            raise
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        now = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
        content: object = None
        with suppress(ValueError):
            content = json.loads(answer["Body"].read())
        age = (now - answer["LastModified"]).total_seconds()
        return Seen(str(answer["ETag"]), age, content if isinstance(content, dict) else {})
