"""Task `version-set`: a round's configuration set under DVC.

Tasks for their effect are not cached; where the effect is there already, they do nothing.
"""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from coalora.files import read_json
from pipeline.inputs.loaders import SET
from pipeline.progress import get_logger
from pipeline.store.store import Artifact, current_store


@task(name="version-set", cache_policy=NO_CACHE)
def version_set(
    *, pipeline: str, identity: str, round_index: int, configurations: Artifact, root: str, push: bool = False
) -> str:
    """Write a round's set into the checkout and add it to DVC, tagged with run and round; returns its md5."""
    from pipeline.versioning.sets import push_file, version_file, write_set

    payload = read_json(current_store().path(configurations) / SET)
    tags: dict[str, str | int] = {"pipeline": pipeline, "run": identity[:8], "round": round_index}
    record = version_file(write_set(pipeline, round_index, payload, Path(root)), Path(root), tags)
    get_logger().info("%s: %s %s", record.path, "added to DVC," if record.added else "in DVC already,", record.md5)
    if push:
        push_file(record, Path(root))
    return record.md5
