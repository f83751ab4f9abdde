"""A process with a Prefect flow on a temporary server of its own, as `coalora run` has it, without the pipeline."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests import shared
from tests.preloaded import Process

# Tells address, login and number of the server; then sleeps in a flow until it is ended.
SERVED = """
import json, os, time
from pipeline.environment import set_defaults
set_defaults()
from pipeline.orchestration.temporary import start_temporary_server
start_temporary_server()
from prefect import flow
from prefect.server.api.server import SubprocessASGIServer

@flow(name="served")
def served():
    server = SubprocessASGIServer()
    told = {"address": server.address, "login": os.environ["PREFECT_API_AUTH_STRING"], "pid": server.server_process.pid}
    print("TOLD", json.dumps(told), flush=True)
    time.sleep(120)

served()
"""


@contextmanager
def served(folder: Path, script: str = SERVED, *, database: bool = True) -> Iterator[tuple[Process, dict[str, str]]]:
    """The process of a script and what it told; its COALORA_HOME is `folder`, with a database that is migrated."""
    if database:
        shutil.move(shared.prefect_home(folder / "migrated") / "prefect.db", folder / "prefect.db")
    own = ("PREFECT_", "COALORA_", "MLFLOW_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    environment |= {"COALORA_HOME": str(folder), "HOME": str(folder)}  # no profile of the user's
    root = Path(__file__).parents[2]
    process = Process(("-c", script), root, environment)
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("TOLD "):
                break
        else:
            raise AssertionError("".join(lines))
        yield process, json.loads(line.removeprefix("TOLD "))
    finally:
        with suppress(ProcessLookupError):
            process.kill()
