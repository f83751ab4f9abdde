"""What `coalora prune` shows and removes: artifacts of the store, or published objects, that nothing refers to."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from coalora.errors import CoaloraError
from pipeline.s3.address import S3Address
from pipeline.s3.client import S3Location
from pipeline.s3.garbage import check_published, delete_left_over, left_over, published_runs, withdraw
from pipeline.settings.storage import StorageSettings
from pipeline.store.prune import Garbage, find_garbage, remove
from pipeline.store.references import references_of
from pipeline.store.store import Store


def prune_store(root: Path, trackers: Sequence[str], *, days: float, delete: bool) -> None:
    """Show, or remove, what nothing refers to in the store of this home.

    Args:
        root: checkout with runs/, outputs/ and configurations/.
        trackers: MLflow servers or databases to ask, besides the default one and those that the runs name.
        days: what was made or used within them stays.
    """
    store, seconds = Store(), days * 24 * 3600
    references = references_of(root, _trackers(store, trackers))
    found = find_garbage(store, references, _results(store), older_than=seconds)
    _show(found, references.seen, store, days)
    if not found:
        return
    if not delete:
        print("\nNothing was removed. To remove it: coalora prune --delete")
        return
    removed = [item for item in found if remove(store, item, older_than=seconds)]
    print(f"\nRemoved {len(removed)} of {len(found)}: {_megabytes(sum(item.nbytes for item in removed))} freed.")


def prune_published(
    place: str, storage: StorageSettings, withdrawn: Sequence[str], *, days: float, delete: bool
) -> None:
    """Show, or remove, objects of a place of publications that no published run refers to.

    Args:
        place: s3://BUCKET/PREFIX.
        storage: how the server is reached.
        withdrawn: runs that go, too, as PIPELINE/RUN.
    """
    address, seconds = S3Address.parse(place), days * 24 * 3600
    root = S3Location.of(storage.model_copy(update={"bucket": address.bucket, "prefix": address.prefix}))
    root.check()
    if wrong := [name for name in withdrawn if name.count("/") != 1]:
        raise CoaloraError(f"--withdraw {wrong[0]} names no run", remedy="Write PIPELINE/RUN, such as demo/a2f1f322")
    pairs = [(pipeline, run) for pipeline, _, run in (name.partition("/") for name in withdrawn)]
    for pipeline, run in pairs:
        check_published(root, pipeline, run)
    for pipeline, run in pairs if delete else ():
        withdraw(root, pipeline, run)
        print(f"Withdrawn: {pipeline}/{run}")
    runs = published_runs(root)
    found = left_over(root, older_than=seconds, without=pairs)
    stay = f"what is younger than {days:g} days stays"
    print(f"{root}: {len(runs.keys() - set(pairs))} runs that stay, {len(pairs)} withdrawn; {stay}.")
    for item in sorted(found, key=lambda item: -item.size):
        print(f"  {_megabytes(item.size):>10}  {(time.time() - item.modified) / 86400:6.1f} d  {root.name_of(item)}")
    print(f"  {_megabytes(sum(item.size for item in found)):>10}  in {len(found)} objects")
    if not delete:
        print("\nNothing was removed. To remove it, say the same with --delete.")
        return
    gone = delete_left_over(root, found, older_than=seconds)
    print(f"\nRemoved {len(gone)} of {len(found)}: {_megabytes(sum(item.size for item in gone))} freed.")


def _trackers(store: Store, named: Sequence[str]) -> set[str]:
    """MLflow's places that may hold runs; the database of COALORA_HOME where there is one."""
    found = {*named, *filter(None, [os.environ.get("MLFLOW_TRACKING_URI")])}
    if (store.root / "mlflow.db").is_file():
        found.add(f"sqlite:///{store.root / 'mlflow.db'}")
    return found


def _results(store: Store) -> Path:
    from prefect.settings import get_current_settings

    return Path(get_current_settings().results.local_storage_path or store.root / "results")


def _show(found: Sequence[Garbage], seen: dict[str, int], store: Store, days: float) -> None:
    words = ", ".join(f"{number} {what}" for what, number in sorted(seen.items()))
    print(f"{store.root}: references of {words or 'nothing'}; what is younger than {days:g} days stays.")
    if not found:
        print("Nothing to free.")
        return
    for item in sorted(found, key=lambda item: -item.nbytes):
        place = item.path.relative_to(store.root) if item.path.is_relative_to(store.root) else item.path
        print(f"  {_megabytes(item.nbytes):>10}  {item.age / 86400:6.1f} d  {item.kind:<10}  {place}  ({item.why})")
    print(f"  {_megabytes(sum(item.nbytes for item in found)):>10}  in {len(found)}")


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f} MB"
