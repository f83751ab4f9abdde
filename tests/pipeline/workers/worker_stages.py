"""Stages for the tests of workers: in a module that other processes can import."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from coalora.errors import CoaloraError
from pipeline.inputs.adapted import hold
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, default_store


class Model:
    def __init__(self, traces: str) -> None:
        with (Path(traces) / "loads").open("a") as loads:
            loads.write(f"{os.getpid()}\n")


@stage("on-worker")
def on_worker(*, n: int, traces: str, table: Artifact | None = None) -> Artifact:
    if n == 13:
        raise CoaloraError(f"Number {n} is unlucky", remedy="Take another")
    if n == 99:
        os._exit(9)
    with hold("model", lambda: Model(traces)):  # type: ignore[arg-type, return-value]
        time.sleep(0.3)  # so that no worker does it all

    def build(folder: Path) -> dict[str, Any]:
        (folder / "n.txt").write_text(str(n))
        return {"process": os.getpid()}

    return default_store().put("text", build)
