"""Free the store of what nothing refers to: says what it would free, and removes it when told to.

    python -m flows.prune                # only shows
    python -m flows.prune --delete       # removes
    python -m flows.prune --published s3://BUCKET/PREFIX [--withdraw PIPELINE/RUN] [--delete]

Kept: everything that a run folder under runs/, a run or registered version in MLflow, or a configuration set under DVC
refers to, with all stages of these runs; what a run uses that is under way; and what was made or used in the last days.
Run it in the checkout, whose runs/, outputs/ and configurations/ it reads. With --published it looks at what
`flows.upload` has sent instead: objects there that no published run refers to.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from coalora.errors import CoaloraError
from flows.cli import run_command
from flows.upload import add_server_arguments, server_settings
from pipeline.s3.address import S3Address
from pipeline.s3.client import S3Location
from pipeline.s3.garbage import check_published, delete_left_over, left_over, published_runs, withdraw
from pipeline.store.prune import Garbage, find_garbage, remove
from pipeline.store.references import references_of
from pipeline.store.store import Store

DAYS = 7.0


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m flows.prune", description="Show or remove what no run, version or DVC file refers to."
    )
    made.add_argument("--delete", "--yes", action="store_true", help="remove it; without, nothing is touched")
    made.add_argument(
        "--older-than",
        type=float,
        default=DAYS,
        metavar="DAYS",
        help="keep what was made or used in the last DAYS (default: %(default)g)",
    )
    made.add_argument("--root", type=Path, default=Path.cwd(), help="checkout with runs/ and configurations/")
    made.add_argument(
        "--tracking-uri",
        action="append",
        default=[],
        help="MLflow server or database to ask, besides the default one and those that the runs name",
    )
    made.add_argument("--published", metavar="s3://BUCKET/PREFIX", help="free this place of publications instead")
    made.add_argument(
        "--withdraw",
        action="append",
        default=[],
        metavar="PIPELINE/RUN",
        help="with --published: this run goes, too; may be repeated",
    )
    add_server_arguments(made)
    options = made.parse_args(arguments)
    if options.withdraw and not options.published:
        raise CoaloraError("--withdraw names a published run", remedy="give --published s3://BUCKET/PREFIX")
    if options.older_than < 0:
        raise CoaloraError("--older-than is a number of days", got=options.older_than, expected="0 or more")
    seconds = options.older_than * 24 * 3600
    if options.published:
        return _published(options, seconds)
    store = Store()
    references = references_of(options.root.resolve(), _trackers(store, options.tracking_uri))
    found = find_garbage(store, references, _results(store), older_than=seconds)
    _show(found, references.seen, store, options.older_than)
    if not found:
        return 0
    if not options.delete:
        print("\nNothing was removed. To remove it: python -m flows.prune --delete")
        return 0
    removed = [item for item in found if remove(store, item, older_than=seconds)]
    print(f"\nRemoved {len(removed)} of {len(found)}: {_megabytes(sum(item.nbytes for item in removed))} freed.")
    return 0


def _published(options: argparse.Namespace, seconds: float) -> int:
    address = S3Address.parse(options.published)
    changes = {"bucket": address.bucket, "prefix": address.prefix}
    root = S3Location.of(server_settings(options).model_copy(update=changes))
    root.check()
    if wrong := [name for name in options.withdraw if name.count("/") != 1]:
        raise CoaloraError("--withdraw names PIPELINE/RUN", got=wrong[0], expected="for example demo/a2f1f322")
    pairs = [(pipeline, run) for pipeline, _, run in (name.partition("/") for name in options.withdraw)]
    for pipeline, run in pairs:
        check_published(root, pipeline, run)
    for pipeline, run in pairs if options.delete else ():
        withdraw(root, pipeline, run)
        print(f"Withdrawn: {pipeline}/{run}")
    runs = published_runs(root)
    found = left_over(root, older_than=seconds, without=pairs)
    stay = f"what is younger than {options.older_than:g} days stays"
    print(f"{root}: {len(runs.keys() - set(pairs))} runs that stay, {len(pairs)} withdrawn; {stay}.")
    for item in sorted(found, key=lambda item: -item.size):
        print(f"  {_megabytes(item.size):>10}  {(time.time() - item.modified) / 86400:6.1f} d  {root.name_of(item)}")
    print(f"  {_megabytes(sum(item.size for item in found)):>10}  in {len(found)} objects")
    if not options.delete:
        print("\nNothing was removed. To remove it, say the same with --delete.")
        return 0
    gone = delete_left_over(root, found, older_than=seconds)
    print(f"\nRemoved {len(gone)} of {len(found)}: {_megabytes(sum(item.size for item in gone))} freed.")
    return 0


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


if __name__ == "__main__":
    run_command(main)
