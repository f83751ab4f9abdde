"""Parts of uploads that were killed: S3 keeps, and bills, them until somebody says that nobody will finish them."""

from __future__ import annotations

import time

from botocore.exceptions import ClientError

from pipeline.s3.client import S3Location
from pipeline.s3.errors import error_code, translated

_NOT_ALLOWED = ("AccessDenied", "403", "NotImplemented", "MethodNotAllowed")


def abort_stale_uploads(root: S3Location, name: str, *, older_than_seconds: float = 24 * 3600) -> int:
    """Free the parts of unfinished uploads below `name`; returns how many uploads there were.

    Uploads of the last day are left alone: somebody may be at them. Where the credentials do not allow to look, or the
    server does not know the question, nothing is done: it is thrift and no condition of publishing.
    """
    bucket, gone = root.address.bucket, 0
    with translated("looking for unfinished uploads", str(root), root.endpoint):
        try:
            pages = root.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=bucket, Prefix=root.address.key(name)
            )
            for found in (upload for page in pages for upload in page.get("Uploads", [])):
                if time.time() - found["Initiated"].timestamp() > older_than_seconds:
                    root.client.abort_multipart_upload(Bucket=bucket, Key=found["Key"], UploadId=found["UploadId"])
                    gone += 1
        except ClientError as error:
            if error_code(error) not in (*_NOT_ALLOWED, "NoSuchUpload"):  # the last: another was faster
                raise
    return gone
