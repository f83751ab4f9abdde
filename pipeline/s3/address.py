"""Addresses `s3://bucket/prefix`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from coalora.errors import CoaloraError
from pipeline.settings.storage import BUCKET

_BUCKET = re.compile(BUCKET)


@dataclass(frozen=True)
class S3Address:
    """A bucket and the start of keys in it; the prefix has no slash at its ends."""

    bucket: str
    prefix: str = ""

    @classmethod
    def parse(cls, text: str) -> S3Address:
        """Read `s3://bucket[/prefix]`.

        Raises:
            CoaloraError: another scheme, a bucket's name that S3 does not allow, or a prefix with empty parts.
        """
        scheme, _, rest = text.partition("://")
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.strip("/")
        parts = prefix.split("/") if prefix else []
        if scheme != "s3" or not _BUCKET.fullmatch(bucket) or any(p in ("", ".", "..") for p in parts):
            raise CoaloraError(
                "an address in S3 is s3://BUCKET/PREFIX",
                got=re.sub(r"//[^/]*@", "//***@", text),
                expected="a bucket of 3 to 63 lower-case letters, digits, dots and dashes; no empty part, . or ..",
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
