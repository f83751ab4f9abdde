"""One checked type says which files a manifest may name, and a digest becomes a path in one place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from coalora.errors import CoaloraError
from pipeline.store.artifacts import MANIFEST, MARKER, Artifact, Manifest, artifact_folder
from pipeline.store.store import Store

DIGEST = "0" * 64


def manifest(*rows: tuple[Any, Any, Any]) -> Manifest:
    files = [dict(zip(("path", "size", "sha256"), row, strict=True)) for row in rows]
    return Manifest.model_validate_json(json.dumps({"files": files}))


def test_ordinary_files_pass_and_their_order_does_not_matter() -> None:
    a, b = ("a.txt", 0, DIGEST), ("sub/ü 1.bin", 1 << 40, "1" * 64)
    assert manifest(a, b).digest == manifest(b, a).digest
    assert manifest(a, b).nbytes == 1 << 40
    assert manifest((("e" * 251) + ".txt", 1, DIGEST)).files[0].size == 1


@pytest.mark.parametrize(
    "path",
    [
        "", ".", "..", "/", "/etc/passwd", "../a", "a/../b", "a/./b", "a//b", "a/", "a\\b", "a\nb", "a\x1b[2J",
        "a\x00b", "a\u202eb", "e" * 256, "ü" * 128, "a/" * 600 + "a", MANIFEST, MARKER, f"a/{MARKER}", 1, None,
    ],
)  # fmt: skip
def test_a_path_that_leaves_the_folder_or_deceives_is_refused(path: Any) -> None:
    with pytest.raises(ValidationError):
        manifest((path, 1, DIGEST))


@pytest.mark.parametrize("size", [-1, 1.5, True, "1", None, float("nan"), float("inf"), 1 << 60])
def test_a_size_is_a_count_of_bytes(size: Any) -> None:
    with pytest.raises(ValidationError):
        manifest(("a", size, DIGEST))


@pytest.mark.parametrize(
    "digest", ["", "0" * 63, "0" * 65, "A" * 64, "../" * 21 + "0", "0" * 63 + "\n", "\u0660" * 64, 0]
)
def test_a_digest_has_64_hexadecimal_digits_wherever_it_comes_from(digest: Any, tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        manifest(("a", 1, digest))
    with pytest.raises(ValidationError):
        Artifact(kind="table", digest=digest, nbytes=1)
    with pytest.raises(CoaloraError, match="cannot have this digest"):
        Store(tmp_path).path(Artifact.model_construct(kind="table", digest=str(digest), nbytes=1, meta={}))
    with pytest.raises(CoaloraError):
        artifact_folder(str(digest))


@pytest.mark.parametrize("paths", [["a", "a"], ["a", "a/b"], ["a/b/c", "a"], ["a/b", "a/b/c"]])
def test_no_path_is_there_twice_or_a_folder_of_another(paths: list[str]) -> None:
    with pytest.raises(ValidationError, match="twice, or is a folder"):
        manifest(*[(path, 1, DIGEST) for path in paths])


def test_what_a_manifest_cannot_hold_is_refused_when_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(CoaloraError, match="No manifest can list"):
        Store(tmp_path).put("table", lambda folder: (folder / "a\nb").write_text("a") and None)
