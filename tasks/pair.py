"""Task `make-pair`: base and adapter for one device, verified, and published where a bucket is named."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from coalora.contents import problems
from coalora.errors import CoaloraError
from coalora.export.device import export_for
from coalora.export.profile import DeviceProfile
from coalora.export.provenance import RECORD, files_of
from coalora.files import file_sha256, folder_nbytes, read_json
from pipeline.progress import get_logger
from pipeline.settings.sections import storage_settings


@task(name="make-pair", task_run_name="pair for {profile}", cache_policy=NO_CACHE)
def make_pair(*, source: str, profile: str, folder: str, publish: str | None) -> dict[str, Any]:
    """Write the pair of a profile below `folder`, unless it is there and whole; returns what a table shows of it.

    Args:
        source: address of a bundle (`coalora.export.source`).
        publish: `s3://BUCKET/PREFIX`, below which the same files go, the record last.
    """
    from pipeline.sources import open_address

    device, found = DeviceProfile.load(profile), open_address(source)
    out = Path(folder) / found.bundle.digest[:8] / device.name
    if not (out / RECORD).is_file():
        made = export_for(
            found.bundle, out, device=device, base=found.base, about=found.about,
            trust_remote_code=found.trust_remote_code,
        )  # fmt: skip
        get_logger().info("%s", made)
    if wrong := problems(out)[1]:
        raise CoaloraError(f"The pair in {out} is not whole: {wrong[0]}", remedy="Remove the folder and run again")
    record = read_json(out / RECORD)
    return {
        "device": device.name,
        "formats": ", ".join(record["formats"]),
        "bits": record["average_bits"],
        "bytes": folder_nbytes(out),
        "loss": record.get("loss"),
        "digest": record["digest"],
        "folder": str(out),
        "address": None if publish is None else _publish(out, publish),
    }


def _publish(out: Path, publish: str) -> str:
    from pipeline.s3.client import S3Address, S3Location, Transfer

    address = S3Address.parse(publish).below(f"{out.parent.name}/{out.name}")
    location = S3Location(address, storage_settings(None, {}))
    for names in (files_of(out), [RECORD]):  # a reader finds a record of files that are there
        files = [(name, out / name) for name in names]
        location.put_files(
            [Transfer(path, name, path.stat().st_size, file_sha256(path)) for name, path in files], "publishing"
        )
    return str(address)
