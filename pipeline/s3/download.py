"""A download that goes on where it was cut off: ranges into a part file, hashed, then one atomic rename."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from coalora.files import file_sha256
from pipeline.s3.errors import StorageError, error_code

_CHUNK = 1 << 20


def part_path(path: Path, sha256: str) -> Path:
    """Where the bytes of an unfinished download lie. Named by the content: a part of another version is never used."""
    return path.with_name(f".{path.name}.{sha256[:16]}.part")


def fetch(client: Any, where: dict[str, str], path: Path, sha256: str, size: int, attempts: int) -> bool:
    """Bring `path` to the content that `sha256` and `size` name; returns whether bytes were fetched.

    Requests are retried by botocore. An answer that is cut off is taken up again, until `attempts` in a row bring
    nothing.

    Raises:
        StorageError: the object's content is another, even when it is fetched anew from the start.
        BotoCoreError, ClientError: from the last attempt.
    """
    if path.is_file() and path.stat().st_size == size and file_sha256(path) == sha256:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_path(path, sha256)
    for resumed in (True, False):
        if not resumed or (part.is_file() and part.stat().st_size > size):
            part.unlink(missing_ok=True)
        _fill(client, where, part, size, attempts)
        if part.stat().st_size == size and file_sha256(part) == sha256:
            os.replace(part, path)
            return True
    found = file_sha256(part)
    part.unlink()
    raise StorageError(
        "an object is what its manifest says",
        got=f"s3://{where['Bucket']}/{where['Key']} with sha256 {found[:16]}...",
        expected=f"{size} bytes with sha256 {sha256[:16]}...",
        remedy="publish it again: the copy in the bucket is damaged",
    )


def _fill(client: Any, where: dict[str, str], part: Path, size: int, attempts: int) -> None:
    """Append to `part` until it has `size` bytes, or the object ends."""
    failures = 0
    with part.open("ab") as file:
        while file.tell() < size or size == 0:
            before = file.tell()
            try:
                answer = client.get_object(**where, **({"Range": f"bytes={before}-"} if before else {}))
            except ClientError as error:
                if error_code(error) in ("InvalidRange", "416"):
                    return  # the object is shorter than it should be: the digest will tell
                raise
            if before and "ContentRange" not in answer:
                before = 0  # a server that knows no ranges sends all of it
                file.truncate(0)
            try:
                for chunk in answer["Body"].iter_chunks(_CHUNK):
                    file.write(chunk)
                return
            except BotoCoreError:  # cut in mid-body, which botocore's own retries do not cover
                failures = failures + 1 if file.tell() == before else 1
                if failures >= attempts:
                    raise
