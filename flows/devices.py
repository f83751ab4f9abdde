"""Prefect flow `devices`: a pair of base and adapter for each of many devices, from one training.

    coalora devices models:/coalora-demo@champion --device phone-1gb laptop-8gb

Deployed (pipelines.yaml), it runs whenever the registered model's `champion` moves, or on a schedule. A pair that is
there and whole is not made again; a device that nothing meets does not keep the others from theirs.
"""

from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.futures import wait
from prefect.task_runners import ThreadPoolTaskRunner

from coalora.errors import CoaloraError
from pipeline.progress import artifact_key, get_logger
from tasks.pair import make_pair

# One at a time: each holds the base model in memory.
_ONE: Any = ThreadPoolTaskRunner(max_workers=1)


@flow(name="devices", flow_run_name="pairs of {source}", task_runner=_ONE)
def devices(
    source: str,
    profiles: list[str],
    folder: str = "devices",
    publish: str | None = None,
) -> list[dict[str, Any]]:
    """Make, verify, publish and register a pair for each device.

    Args:
        source: Run folder, bundle, s3://... or models:/NAME@ALIAS.
        profiles: Names of device profiles, or YAML files.
        folder: Where the pairs are written.
        publish: Place in S3 for them, s3://BUCKET/PREFIX.
    """
    if not profiles:
        raise CoaloraError("No device is named", remedy="Name profiles such as phone-1gb")
    futures = {name: make_pair.submit(source=source, profile=name, folder=folder, publish=publish) for name in profiles}
    wait(list(futures.values()))
    results = {name: future.result(raise_on_failure=False) for name, future in futures.items()}
    rows = [row for row in results.values() if isinstance(row, dict)]
    failed = {name: error for name, error in results.items() if isinstance(error, Exception)}
    table = [*rows, *({"device": name, "problem": str(error)[:300]} for name, error in failed.items())]
    create_table_artifact(table, key=artifact_key("devices", "pairs"), description=f"Pairs of {source}")
    if source.startswith("models:/") and rows:
        from pipeline.sources import registered_version
        from pipeline.tracking.registry import tag_pairs

        get_logger().info("registered model %s: tagged with its pairs", tag_pairs(*registered_version(source), rows))
    if failed:
        told = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise CoaloraError(f"{len(failed)} of {len(profiles)} devices have no pair ({told[:1000]})")
    return rows


def run_devices(source: str, profiles: Sequence[str], folder: str, publish: str | None) -> str:
    """The flow on this machine; says what was made."""
    from pipeline.orchestration.server import check_server, server_faults
    from pipeline.orchestration.temporary import start_temporary_server

    check_server()
    start_temporary_server()
    with server_faults():
        rows = devices(source=source, profiles=list(profiles), folder=folder, publish=publish)
    return "\n".join(
        f"{row['device']}: {row['folder']}, {row['bits']:.2f} bits, {row['bytes']:,} bytes"
        + (f", {row['address']}" if row["address"] else "")
        for row in rows
    )
