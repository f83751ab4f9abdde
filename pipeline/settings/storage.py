"""Settings of S3: where results are published. Credentials have no place here: boto3 finds them by itself.

What is left out is taken from the usual variables and files of AWS: `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`,
`AWS_REGION`, `AWS_DEFAULT_REGION`, `AWS_PROFILE`, `~/.aws/config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator

from coalora.errors import CoaloraError
from pipeline.settings.data import Section

BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"  # names that S3 allows


class StorageSettings(Section):
    """S3: whether a run is published there, and how the server is reached."""

    publish: bool = Field(False, description="Publish adapters, packed bases, bundle and report of a run to S3.")
    bucket: str | None = Field(None, pattern=f"^{BUCKET}$", description="Bucket; it must exist already.")
    prefix: str = Field("", description="Start of every key in the bucket, for example team/coalora.")
    endpoint_url: str | None = Field(
        None, description="Server, for example http://127.0.0.1:9000; by default AWS_ENDPOINT_URL_S3, else AWS itself."
    )
    region: str | None = Field(None, description="Region; by default AWS_REGION or the profile's.")
    profile: str | None = Field(None, description="Profile of ~/.aws that credentials come from; else AWS_PROFILE.")
    attempts: int = Field(5, ge=1, le=20, description="Attempts of a request that the network or the server fails.")
    timeout_seconds: float = Field(30.0, gt=0, description="Longest wait for a connection, and for the next bytes.")
    part_mib: int = Field(16, ge=5, le=512, description="Files above this size travel in parts of this size (MiB).")
    workers: int = Field(4, ge=1, le=64, description="Parts or files under way at a time.")

    @field_validator("prefix")
    @classmethod
    def _plain_prefix(cls, prefix: str) -> str:
        prefix = prefix.strip("/")
        if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
            raise ValueError("a prefix is names joined by single slashes, none of them . or ..")
        return prefix

    @field_validator("endpoint_url")
    @classmethod
    def _no_credentials(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an endpoint is written http://host:port or https://host")
        if "@" in parts.netloc or parts.query:
            # The value itself is in pydantic's message: it must not be repeated there.
            raise ValueError("an endpoint holds no credentials: give them by AWS_PROFILE or AWS_ACCESS_KEY_ID")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _bucket_to_publish_in(self) -> StorageSettings:
        if self.publish and self.bucket is None:
            raise ValueError("storage.publish needs storage.bucket")
        return self


def storage_settings(base: StorageSettings | None, changes: Mapping[str, Any]) -> StorageSettings:
    """`base` (or the defaults) with `changes`, checked.

    Raises:
        CoaloraError: a value that does not fit; the value is not repeated, since it may hold a password.
    """
    start = base.model_dump() if base is not None else {}
    try:
        return StorageSettings.model_validate({**start, **changes})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors(include_url=False))
        raise CoaloraError("settings of S3 must fit", got=problems, remedy="correct the option") from error
