"""Errors of S3: what boto3 raises, as a problem and a remedy. No message repeats a key or a signature."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from boto3.exceptions import Boto3Error
from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError

from coalora.errors import CoaloraError
from pipeline.scrub import scrub_text


class StorageError(CoaloraError):
    """S3 cannot be reached, or did not do what was asked; every attempt was made."""


class StorageDamaged(StorageError):
    """An object is missing, or is not what it should be."""


ABSENT = {"NoSuchKey", "404"}
DENIED = {"AccessDenied", "403", "NotImplemented", "MethodNotAllowed"}
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
    boto.ResponseStreamingError,
)
# (codes, problem, remedy), the first that fits
_CODES = (
    (
        "InvalidAccessKeyId SignatureDoesNotMatch InvalidToken ExpiredToken TokenRefreshRequired InvalidClientTokenId "
        "AuthFailure",
        "S3 does not know the credentials",
        "Renew or correct the credentials that AWS_PROFILE or AWS_ACCESS_KEY_ID name; `aws sts get-caller-identity` "
        "shows whose they are",
    ),
    ("RequestTimeTooSkewed", "This machine's clock is wrong", "Set the clock (NTP)"),
    (
        "NoSuchBucket",
        "The bucket does not exist",
        "Create it (`aws s3 mb s3://BUCKET`, with --endpoint-url for a server of your own), or correct storage.bucket "
        "and storage.endpoint_url",
    ),
    (
        "SlowDown ServiceUnavailable InternalError RequestTimeout Throttling ThrottlingException RequestLimitExceeded "
        "BandwidthLimitExceeded 500 502 503 504",
        "The S3 server is overloaded or failing",
        "Run the same command again later: what is done already is kept; storage.attempts raises the limit",
    ),
    (
        "AccessDenied 403",
        "The credentials do not allow this",
        "Allow s3:GetObject, s3:PutObject, s3:DeleteObject, s3:ListBucket and s3:AbortMultipartUpload on the bucket, "
        "or use other credentials",
    ),
    (
        "PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException 301",
        "The bucket is in another region",
        "Set storage.region (or AWS_REGION) to it",
    ),
    (
        "BadDigest InvalidDigest XAmzContentSHA256Mismatch XAmzContentChecksumMismatch ChecksumMismatch",
        "Bytes were altered on the way",
        "Run again; if it repeats, look for a proxy that alters them",
    ),
    ("NoSuchKey 404", "The object does not exist", "Check the address"),
)


def error_code(error: BaseException) -> str | None:
    """S3's code of a failed request, such as `NoSuchKey`; its HTTP status where there is no more (HEAD)."""
    if not isinstance(error, ClientError):
        return None
    return str(error.response.get("Error", {}).get("Code", "")) or str(_status(error))


@contextmanager
def translated(what: str, place: str, endpoint: str) -> Iterator[None]:
    """Turn boto3's errors, and a full disk, into ours."""
    try:
        yield
    except CoaloraError:
        raise
    except (BotoCoreError, ClientError, Boto3Error) as error:
        raise _as_storage_error(error, f"{what} at {place} ({scrub_text(endpoint)})") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CoaloraError(
                f"The disk is full ({what}: {error.strerror})",
                remedy="Free some space and run the same command again: it goes on with the files that are missing",
            ) from error
        raise


def _as_storage_error(error: BaseException, where: str) -> StorageError:
    cause = error
    while not isinstance(cause, BotoCoreError | ClientError):  # boto3 wraps failures of its own transfers
        inner = cause.__cause__ or cause.__context__
        if inner is None:
            break
        cause = inner
    where = f"{where}: {_reason(cause)}"
    if isinstance(cause, _NO_CREDENTIALS):
        return StorageError(
            f"No credentials for S3 in the environment, ~/.aws or the machine's role ({where})",
            remedy="Set AWS_PROFILE (or storage.profile) to a profile of ~/.aws/credentials, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY; never write them into settings",
        )
    if isinstance(cause, _UNREACHABLE):
        return StorageError(
            f"The S3 server cannot be reached ({where})",
            remedy="Check that it runs and that storage.endpoint_url (or AWS_ENDPOINT_URL) names it, then run the same "
            "command again: what is done already is kept",
        )
    code = "BadDigest" if isinstance(cause, boto.FlexibleChecksumError) else error_code(cause)
    if code is None:
        return StorageError(f"boto3 refuses the request ({where})", remedy="Check the settings under storage")
    for status in (code, str(_status(cause)), "503" if _status(cause) >= 500 else ""):
        for codes, problem, remedy in _CODES:
            if status in codes.split():
                kind = StorageDamaged if "NoSuchKey" in codes else StorageError
                return kind(f"{problem} ({where})", remedy=remedy)
    return StorageError(f"S3 refuses the request ({where})", remedy="Look the code up in the server's manual")


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
