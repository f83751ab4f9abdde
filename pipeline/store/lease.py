"""Lock between machines that share a store in S3: one object that its holder writes again and again.

Every change is a conditional write, so that of two machines one wins: the object is made with `If-None-Match: *`, kept
alive and taken over with `If-Match: <ETag>`. It expires when it is older than `ttl` by the store's own clock
(`Last-Modified` against the `Date` of the answer; no machine's clock counts), so that a holder that was killed blocks
the others for `ttl` seconds at most.

Guaranteed: at most one live holder while the holder reaches the store at least once in `ttl` seconds. A holder that
does not (network down, machine asleep) loses the lease, says so, and goes on: what it computes is kept as well, since
results are named by their content. A store that ignores conditional writes makes the lease useless and breaks nothing.
"""

import json
import threading
import uuid
from contextlib import suppress

from pipeline.progress import get_logger
from pipeline.s3.client import S3Location, S3Object
from pipeline.s3.errors import StorageError
from pipeline.store.locks import describe, this_process

TTL_SECONDS = 60.0
BEATS = 4  # renewals in one ttl


class Lease:
    """One lease; a `pipeline.store.locks.Lock`."""

    def __init__(self, location: S3Location, name: str, *, ttl: float = TTL_SECONDS) -> None:
        self.location, self.name, self.ttl = location, name, ttl
        self._etag: str | None = None
        self._seen: S3Object | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def try_acquire(self) -> bool:
        """Take the lease if nobody has it, or if its holder has let it expire."""
        etag = self.location.put_bytes(self.name, _content(), if_absent=True) or self._take_over()
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
        with suppress(StorageError):
            if self._etag and self.location.put_bytes(self.name, _content(), if_match=self._etag):
                self.location.delete([self.name])
        self._etag = None

    def holder(self) -> str:
        facts: object = None
        with suppress(ValueError):
            facts = json.loads(self._seen.content) if self._seen else None
        return describe(facts)

    def _take_over(self) -> str | None:
        seen = self._seen = self.location.get(self.name)
        if seen is None or seen.age <= self.ttl:  # gone meanwhile: the next try makes it anew
            return None
        etag = self.location.put_bytes(self.name, _content(), if_match=seen.etag)
        if etag is not None:
            get_logger().warning("%s: taken over from %s, which has not been heard of", self.name, self.holder())
        return etag

    def _keep_alive(self, stop: threading.Event) -> None:
        while not stop.wait(self.ttl / BEATS):
            try:
                self._etag = self.location.put_bytes(self.name, _content(), if_match=self._etag)
            except StorageError as error:
                get_logger().warning("%s: lease not renewed, trying again: %s", self.name, error)
                continue
            if self._etag is None:
                get_logger().warning("%s: lease lost to another machine; both results are kept", self.name)
                return


def _content() -> bytes:
    # The token makes every content, and with it every ETag, another one.
    return json.dumps({**this_process(), "token": uuid.uuid4().hex}).encode()
