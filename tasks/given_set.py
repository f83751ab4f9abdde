"""Stage `given-set`: a set of an earlier run as the start of another one."""

from typing import Any

from coalora.method import initial as method
from pipeline.inputs.loaders import load_tables, put_set
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact


@stage("given-set")
def given_set(*, tables: Artifact, content: dict[str, Any]) -> Artifact:
    """The members of `content` as the set of round 0.

    The content itself is the input, so that it decides the cache key, wherever the file lies.
    """
    measured = load_tables(tables)
    return put_set(method.given_set(content, measured), measured, {"round": 0})
