"""Report of `coalora prune`: what nothing refers to on this machine or in a bucket, and its removal."""

import os
from collections.abc import Sequence
from pathlib import Path

from coalora.errors import CoaloraError
from pipeline.environment import STORE_VARIABLE
from pipeline.prune.garbage import Garbage, find_garbage, find_shared_garbage, remove, remove_shared
from pipeline.prune.roots import Roots, roots_of
from pipeline.settings.sections import StorageSettings
from pipeline.store.store import Store, default_store

_MOST = 50  # pieces that are shown one by one


def prune_store(root: Path, trackers: Sequence[str], *, days: float, delete: bool) -> None:
    """Show, or remove, what nothing refers to in the store of this home.

    Args:
        root: checkout with runs/, outputs/ and configurations/.
        trackers: MLflow servers or databases to ask, besides the default one and those that the runs name.
        days: what was made or used within them stays.
    """
    store, seconds = default_store(), days * 24 * 3600
    found = find_garbage(store, _roots(store, root, trackers, days), _results(store), older_than=seconds)
    _show(str(store.root), found, store.root)
    if store.shared_url is not None:
        print(f"The shared store is another place: `coalora prune --at ${STORE_VARIABLE}` looks there.")
    _conclude(found, [item for item in found if remove(store, item, older_than=seconds)] if delete else None)


def prune_bucket(
    storage: StorageSettings,
    root: Path,
    trackers: Sequence[str],
    withdrawn: Sequence[str],
    *,
    days: float,
    delete: bool,
) -> None:
    """Show, or remove, what nothing refers to in a bucket, by the rules of this machine; published runs stay."""
    from pipeline.s3.client import S3Location
    from pipeline.store.publish import check_published, published_names, withdraw
    from pipeline.store.shared import SharedStore

    if wrong := [name for name in withdrawn if name.count("/") != 1]:
        raise CoaloraError(f"--withdraw {wrong[0]} names no run", remedy="Write PIPELINE/RUN, such as demo/a2f1f322")
    shared, store, seconds = SharedStore(S3Location.of(storage)), default_store(), days * 24 * 3600
    shared.location.check()
    roots = _roots(store, root, trackers, days)
    pairs = [(pipeline, run) for pipeline, _, run in (name.partition("/") for name in withdrawn)]
    for pair in pairs:
        check_published(shared, *pair)
    for pair in pairs if delete else ():
        withdraw(shared, *pair)
        print(f"Withdrawn: {'/'.join(pair)}")
    print(f"{shared}: {len(set(published_names(shared)) - set(pairs))} runs that stay, {len(pairs)} withdrawn.")
    used, _ = roots.used(store.root, seconds)
    found = find_shared_garbage(shared, used, roots, older_than=seconds, without=pairs)
    _show(str(shared), found)
    _conclude(found, remove_shared(shared, found, used, roots, older_than=seconds) if delete else None)


def _roots(store: Store, root: Path, trackers: Sequence[str], days: float) -> Roots:
    """References of the checkout and of MLflow's places that may hold runs, which are told."""
    found = {*trackers, *filter(None, [os.environ.get("MLFLOW_TRACKING_URI")])}
    if (store.root / "mlflow.db").is_file():
        found.add(f"sqlite:///{store.root / 'mlflow.db'}")
    roots = roots_of(root, found)
    words = ", ".join(f"{number} {what}" for what, number in sorted(roots.seen.items()))
    print(f"References of {words or 'nothing'}; what is younger than {days:g} days stays.")
    return roots


def _results(store: Store) -> Path:
    from prefect.settings import get_current_settings

    return Path(get_current_settings().results.local_storage_path or store.root / "results")


def _show(where: str, found: Sequence[Garbage], below: Path | None = None) -> None:
    """A line for each piece, the largest first."""
    for item in sorted(found, key=lambda item: -item.nbytes)[:_MOST]:
        place = item.place
        if below is not None and isinstance(place, Path) and place.is_relative_to(below):
            place = place.relative_to(below)
        place = str(place) if str(place).isprintable() else ascii(str(place))  # a bucket holds others' names, too
        print(f"  {_megabytes(item.nbytes):>10}  {item.age / 86400:6.1f} d  {item.kind:<10}  {place}  ({item.why})")
    if len(found) > _MOST:
        print(f"  and {len(found) - _MOST} smaller ones")
    print(f"  {_megabytes(sum(item.nbytes for item in found)):>10}  in {len(found)} to free at {where}")


def _conclude(found: Sequence[Garbage], gone: Sequence[Garbage] | None) -> None:
    if not found:
        print("Nothing to free.")
    elif gone is None:
        print("\nNothing was removed. To remove it, say the same with --delete.")
    else:
        print(f"\nRemoved {len(gone)} of {len(found)}: {_megabytes(sum(item.nbytes for item in gone))} freed.")


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f} MB"
