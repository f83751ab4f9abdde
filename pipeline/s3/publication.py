"""Publishing a run folder: its files as content-addressed objects, then the manifest. Sends only what is not there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from coalora.errors import CoaloraError
from coalora.files import file_sha256, json_bytes, read_json
from pipeline.s3.client import S3Location
from pipeline.s3.leftovers import abort_stale_uploads
from pipeline.s3.manifest import LATEST, MANIFEST, OBJECTS, RUNS, Manifest, PublishedFile, object_name, run_name
from pipeline.s3.transfers import Megabytes, side_by_side
from pipeline.store.artifacts import files_below
from pipeline.store.store import MARKER

RECORD = "run.json"


@dataclass(frozen=True)
class Publication:
    """What became of a run folder.

    Attributes:
        address: of the run, `s3://BUCKET/PREFIX/runs/PIPELINE/RUN`.
        n_files, nbytes: of the run.
        sent_files, sent_bytes: that had to travel.
        changed: whether the manifest is new.
    """

    address: str
    n_files: int
    nbytes: int
    sent_files: int
    sent_bytes: int
    changed: bool


def publish(folder: Path, root: S3Location) -> Publication:
    """Publish a run folder below `root`. Calling it again after any failure goes on with what is missing.

    Raises:
        CoaloraError: no run folder, a file in it that is no regular file or changes meanwhile, or S3 fails.
    """
    folder = folder.resolve()  # `latest` is a link to the run
    manifest = describe(folder)
    root.check()
    abort_stale_uploads(root, OBJECTS)
    missing = _missing_objects(manifest, root)
    _send(missing, folder, root)
    changed = _put_if_other(root, f"{run_name(manifest.pipeline, manifest.run)}/{MANIFEST}", manifest.model_dump())
    _put_if_other(root, f"{RUNS}/{manifest.pipeline}/{LATEST}", {"run": manifest.run})
    address = root.address.below(run_name(manifest.pipeline, manifest.run))
    sent = sum(file.size for file in missing)
    return Publication(str(address), len(manifest.files), manifest.nbytes, len(missing), sent, changed)


def _put_if_other(root: S3Location, name: str, content: object) -> bool:
    found = root.get_bytes(name)
    if found is not None and found == json_bytes(content):
        return False
    root.put_bytes(name, json_bytes(content))
    return True


def describe(folder: Path) -> Manifest:
    """The manifest of a run folder; hashes every file.

    Raises:
        CoaloraError: no run folder, or a file that cannot be published.
    """
    record = folder / RECORD
    if not record.is_file():
        raise CoaloraError(
            "a run folder is what a finished pipeline wrote",
            got=folder,
            expected="for example runs/demo/latest",
            remedy="run the pipeline first: coalora run demo",
        )
    content = read_json(record)
    files = []
    for name, path in sorted(files_below(folder).items()):
        if path.name == MARKER or path.name.endswith(".part"):
            continue
        if path.is_symlink() or not path.is_file():
            raise CoaloraError("a run folder holds regular files only", got=path, remedy="replace the link by a copy")
        files.append(PublishedFile(path=name, size=path.stat().st_size, sha256=file_sha256(path)))
    return Manifest(
        pipeline=content["pipeline"],
        run=folder.name,
        identity=content.get("identity"),
        mlflow_run_id=content.get("mlflow_run_id"),
        files=files,
    )


def _missing_objects(manifest: Manifest, root: S3Location) -> list[PublishedFile]:
    """One file for each content that is not in the bucket, the largest first."""
    by_content = {file.sha256: file for file in manifest.files}

    def is_missing(file: PublishedFile) -> bool:
        found = root.head(object_name(file.sha256))
        return found is None or found.size != file.size

    with ThreadPoolExecutor(root.settings.workers) as pool:
        files = list(by_content.values())
        missing = [file for file, gone in zip(files, pool.map(is_missing, files), strict=True) if gone]
    return sorted(missing, key=lambda file: -file.size)


def _send(files: list[PublishedFile], folder: Path, root: S3Location) -> None:
    """Upload the files, several at a time; the first failure stops those that have not begun."""
    progress = Megabytes("publishing", sum(f.size for f in files))

    def send(file: PublishedFile) -> None:
        root.put_file(folder / file.path, object_name(file.sha256), sha256=file.sha256)
        progress.add(file.size, file.path)

    # A large file occupies all connections by its parts; small ones go side by side.
    part = root.settings.part_mib << 20
    for file in (f for f in files if f.size > part):
        send(file)
    side_by_side(send, [file for file in files if file.size <= part], root.settings.workers)
