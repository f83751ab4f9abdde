"""One S3 server for the tests of a file, behind a proxy that makes faults; a bucket of its own for each test."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest

from pipeline.s3.address import S3Address
from pipeline.s3.client import S3Location
from pipeline.settings.storage import StorageSettings
from tests.s3_server import FaultProxy, create_bucket, fault_proxy, s3_server, set_credentials, without_waits

Open = Callable[..., S3Location]


@pytest.fixture(scope="module")
def running() -> Iterator[FaultProxy]:
    with s3_server() as backend, fault_proxy(backend) as proxy:
        yield proxy


@pytest.fixture
def proxy(running: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """The proxy without faults and memories; credentials of the test in the environment."""
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    set_credentials(monkeypatch.setenv)
    without_waits(monkeypatch)
    running.clear()
    return running


@pytest.fixture
def bucket(proxy: FaultProxy) -> str:
    name = f"test-{uuid.uuid4().hex[:12]}"
    create_bucket(proxy.url, name)
    proxy.clear()
    return name


@pytest.fixture
def settings(proxy: FaultProxy, bucket: str) -> StorageSettings:
    return StorageSettings(
        endpoint_url=proxy.url,
        bucket=bucket,
        prefix="team/models",
        attempts=3,
        timeout_seconds=5,
        part_mib=5,
        workers=2,
    )


@pytest.fixture
def place(settings: StorageSettings) -> S3Location:
    return S3Location(S3Address(str(settings.bucket), settings.prefix), settings)
