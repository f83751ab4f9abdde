"""What boto3 raises, said as the rule that was broken and what to do. No message repeats a key or a signature."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from boto3.exceptions import Boto3Error
from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError

from coalora.errors import CoaloraError
from pipeline.tracking.values import scrub_text


class StorageError(CoaloraError):
    """S3 did not do what was asked, and asking again changes nothing."""


class StorageUnavailable(StorageError):
    """S3 cannot be reached or is overloaded; every attempt was made, and a later one may succeed."""


class StorageRefused(StorageError):
    """S3 does not know the credentials, or they allow too little."""


_WRONG = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired",
    "InvalidClientTokenId", "AuthFailure",
}  # fmt: skip
_BUSY = {
    "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling", "ThrottlingException",
    "RequestLimitExceeded", "BandwidthLimitExceeded", "500", "502", "503", "504",
}  # fmt: skip
_ALTERED = {
    "BadDigest",
    "InvalidDigest",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
    "ChecksumMismatch",
}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
    boto.SSOError,
    boto.TokenRetrievalError,
    boto.UnauthorizedSSOTokenError,
    boto.NoAuthTokenError,
)
_UNREACHABLE = (
    boto.ConnectionError,  # refused, not resolved, TLS
    boto.HTTPClientError,  # closed on the way, time-outs
    boto.IncompleteReadError,
)
_DISK = {errno.ENOSPC, errno.EDQUOT}


def error_code(error: BaseException) -> str | None:
    """S3's code of a failed request, such as `NoSuchKey`; its HTTP status where there is no more (HEAD)."""
    if not isinstance(error, ClientError):
        return None
    return str(error.response.get("Error", {}).get("Code", "")) or str(_status(error))


@contextmanager
def translated(what: str, place: str, endpoint: str) -> Iterator[None]:
    """Turn boto3's errors, and a full disk, into ours.

    Args:
        what: what is being done, such as "upload of adapter.safetensors".
        place: the address that is asked.
        endpoint: URL of the server.
    """
    try:
        yield
    except CoaloraError:
        raise
    except (BotoCoreError, ClientError, Boto3Error) as error:
        raise as_storage_error(error, what, place, endpoint) from error
    except OSError as error:
        if error.errno in _DISK:
            raise CoaloraError(
                "there must be room on the disk",
                got=f"{what}: {error.strerror}",
                remedy="free some space and run the same command again: it goes on where it stopped",
            ) from error
        raise


def as_storage_error(error: BaseException, what: str, place: str, endpoint: str) -> StorageError:
    """The error to raise instead of `error`."""
    cause = error
    while not isinstance(cause, BotoCoreError | ClientError):  # boto3 wraps failures of its own transfers
        inner = cause.__cause__ or cause.__context__
        if inner is None:
            break
        cause = inner
    server = scrub_text(endpoint)
    got = f"{what} at {place} ({server}): {_reason(cause)}"
    if isinstance(cause, _NO_CREDENTIALS):
        return StorageRefused(
            "S3 needs credentials, which boto3 looks for in the environment, ~/.aws, and the machine's role",
            got=got,
            remedy="set AWS_PROFILE (or storage.profile) to a profile of ~/.aws/credentials, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY; never write them into settings",
        )
    if isinstance(cause, _UNREACHABLE):
        return StorageUnavailable(
            "the S3 server must be reachable",
            got=got,
            remedy="check that it runs and that storage.endpoint_url (or AWS_ENDPOINT_URL) names it, then run the same "
            "command again: what is done already is kept",
        )
    code = error_code(cause)
    if isinstance(cause, boto.FlexibleChecksumError):
        code = "BadDigest"
    if code is None:
        return StorageError("S3 must accept the request", got=got, remedy="check the settings under storage")
    return _of_code(code, _status(cause), got)


def _of_code(code: str, status: int, got: str) -> StorageError:
    if code in _WRONG:
        return StorageRefused(
            "S3 must know the credentials",
            got=got,
            remedy="renew or correct the credentials that AWS_PROFILE or AWS_ACCESS_KEY_ID name; `aws sts "
            "get-caller-identity` shows whose they are",
        )
    if code == "RequestTimeTooSkewed":
        return StorageRefused("this machine's clock must be right", got=got, remedy="set the clock (NTP)")
    if code == "NoSuchBucket":
        return StorageError(
            "the bucket must exist",
            got=got,
            remedy="create it (`aws s3 mb s3://BUCKET`, with --endpoint-url for a server of your own), or correct "
            "storage.bucket and storage.endpoint_url",
        )
    if code in _BUSY or status >= 500:
        return StorageUnavailable(
            "the S3 server must answer within the attempts that are allowed",
            got=got,
            remedy="run the same command again later: what is done already is kept; storage.attempts raises the limit",
        )
    if code in ("AccessDenied", "403") or status == 403:
        return StorageRefused(
            "the credentials must allow what is done",
            got=got,
            remedy="allow s3:GetObject, s3:PutObject, s3:DeleteObject, s3:ListBucket and s3:AbortMultipartUpload on "
            "the bucket, or use other credentials",
        )
    if code in _REGION or status == 301:
        return StorageError(
            "the bucket must be asked in its own region", got=got, remedy="set storage.region (or AWS_REGION) to it"
        )
    if code in _ALTERED:
        return StorageError(
            "bytes arrive as they were sent",
            got=got,
            remedy="run again; if it repeats, look for a proxy that alters them",
        )
    if code in ("NoSuchKey", "404") or status == 404:
        return StorageError("the object must exist", got=got, remedy="check the address")
    return StorageError("S3 must accept the request", got=got, remedy="look the code up in the server's manual")


def _status(error: BaseException) -> int:
    response = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def _reason(error: BaseException) -> str:
    if isinstance(error, ClientError):
        found = error.response.get("Error", {})
        text = f"{error_code(error)} {found.get('Message', '')}"
    else:
        text = str(error) or type(error).__name__
    # Queries say nothing to a person, and could be signed.
    return scrub_text(re.sub(r"(https?://[^\s?]+)\?[^\s\"']*", r"\1", " ".join(text.split())))[:300]
