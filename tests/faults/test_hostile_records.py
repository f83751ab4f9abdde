"""Result records that would run code in whoever reads them: deleted, and computed again."""

from __future__ import annotations

import json
import logging
import pickle
from base64 import encodebytes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.stages.runner import Runner, stage
from pipeline.store.store import Artifact, default_store
from tests.pipeline.conftest import execute, own_results, prefect_server
from tests.pipeline.stages.engine_runs import writer

__all__ = ["execute", "own_results", "prefect_server"]
pytestmark = pytest.mark.usefixtures("own_results")


@stage("victim")
def victim(*, n: int) -> Artifact:
    return default_store().put("text", writer(str(n)))


class Touch:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def records(good: dict[str, Any], trap: Path) -> dict[str, Any]:
    """Hostile or damaged records, made from one that is good."""

    def of(result: Any, **metadata: Any) -> dict[str, Any]:
        text = result if isinstance(result, str) else json.dumps(result)
        return {"metadata": good["metadata"] | metadata, "result": text}

    artifact = json.loads(good["result"])
    pickled = encodebytes(pickle.dumps(Touch(trap))).decode()
    call = {"__class__": "os.mkdir", "data": str(trap)}
    return {
        "pickle": of(pickled, serializer={"type": "pickle", "picklelib": "pickle"}),
        "compressed pickle": of(pickled, serializer={"type": "compressed/pickle"}),
        "decoder": of(artifact, serializer=good["metadata"]["serializer"] | {"object_decoder": "os.mkdir"}) | {
            "result": json.dumps({"name": str(trap)})
        },
        "class": of(call),
        "class inside": of(artifact | {"data": artifact["data"] | {"nbytes": call}}),
        "class of the metadata": of(call, storage_key=call),
        "exception": of({"__exc_type__": "os.mkdir", "message": str(trap)}),
        "path": of(artifact | {"data": artifact["data"] | {"digest": "../../../etc"}}),
        "more": of(artifact | {"data": artifact["data"] | {"more": 1}}),
        "list": [],
        "no text": {"metadata": {}, "result": 1},
        "deep": of("[" * 100_000),
    }  # fmt: skip


@pytest.mark.parametrize("kind", sorted(records({"metadata": {"serializer": {}}, "result": '{"data": {}}'}, Path("/"))))
def test_a_record_that_is_not_of_this_project_is_deleted_and_computed_again(
    kind: str, execute: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trap = tmp_path / "trap"

    def body(runner: Runner) -> None:
        runner.run(victim, n=1)
        (record,) = (tmp_path / "results").glob("victim-*")
        good = record.read_bytes()
        record.write_text(json.dumps(records(json.loads(good), trap)[kind]))
        with caplog.at_level(logging.WARNING):
            runner.run(victim, n=1)
        assert [made.cached for made in runner.history] == [False, False]
        assert json.loads(record.read_bytes())["metadata"] == json.loads(good)["metadata"]
        runner.run(victim, n=1)
        assert runner.history[-1].cached

    execute(body)
    assert not trap.exists()
