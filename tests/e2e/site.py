"""A checkout with the whole stack of `make up` on free ports, as the end-to-end test needs it."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from prefect.client.orchestration import SyncPrefectClient

from infra.services import BUCKET
from infra.stack import Stack
from tests.flows.checkout import PROJECT, Checkout
from tests.servers import Server

PIPELINE = "tiny"


@dataclass
class Site:
    """The checkout, its stack's state folder, and the Prefect server as a person's terminal sees it."""

    checkout: Checkout
    folder: Path
    server: Server

    def up(self) -> str:
        """`make up`: starts what does not run."""
        ports = [f"{name}=0" for name in ("prefect", "mlflow", "s3")]
        return self.checkout.run("-m", "coalora", "stack", "up", "--state", str(self.folder), "--ports", *ports)

    def kill_worker(self) -> None:
        """The worker and all that it has started are gone at once, as when a machine loses its power."""
        process = Stack(self.folder)._read().processes["worker"].find()
        assert process is not None
        family = [process, *process.children(recursive=True)]
        for member in family:
            member.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=20)


def write_pipelines(root: Path, initial_steps: int) -> None:
    """The tiny pipeline with a first training that is long enough to be killed in, checkpointed at nearly each step."""
    content = yaml.safe_load((PROJECT / "tests" / "flows" / "tiny.yaml").read_text())
    settings = content["definitions"]["pipelines"][PIPELINE]
    settings["training"]["initial_steps"] = initial_steps
    settings["search"]["rounds"] = 1
    settings["stages"] = {"checkpoint_seconds": 0.2}
    settings["versioning"] = {"push": True}
    (deployment,) = content["deployments"]
    deployment["parameters"]["settings"] = settings
    deployment["schedules"] = [{"interval": 20.0, "active": True}]
    (root / "pipelines.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def trained_steps(messages: list[str]) -> list[int]:
    """Steps that the progress lines of CoA's first training name, in order."""
    found = (re.search(r"training coa, round 0: (\d+)/", line) for line in messages)
    return [int(match[1]) for match in found if match]


@contextmanager
def site(checkout: Checkout, folder: Path, *, initial_steps: int) -> Iterator[Site]:
    """Stack up, pipeline deployed, DVC's remote set and all committed; down at the end."""
    root = checkout.root
    write_pipelines(root, initial_steps)
    (root / ".gitignore").write_text(".coalora/\nruns/\noutputs/\n__pycache__/\n")
    # What the stack starts are processes of their own, as on a user's machine.
    del checkout.environment["PRELOADED_PYTHON"]
    checkout.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    checkout.environment["PREFECT_WORKER_QUERY_SECONDS"] = "1"  # in place of 10
    checkout.environment["COALORA_STORE"] = f"s3://{BUCKET}/store"
    made = Site(checkout, folder, None)  # type: ignore[arg-type]
    try:
        made.up()
        checkout.environment |= Stack(folder).environment()
        checkout.run("-m", "dvc", "remote", "add", "--default", "s3", f"s3://{BUCKET}/dvc")
        made.checkout.git("add", "--all")
        made.checkout.git("commit", "--quiet", "--message", "The pipeline")
        api = checkout.environment["PREFECT_API_URL"]
        with SyncPrefectClient(api, auth_string=checkout.environment["PREFECT_API_AUTH_STRING"]) as client:
            made.server = Server(api, checkout.environment, folder / "logs" / "prefect.log", client)
            made.server.deploy(root)
            yield made
    finally:
        checkout.run("-m", "coalora", "stack", "down", "--state", str(folder))


def wait_for_files(folder: Path, pattern: str, *, timeout: float = 120.0) -> None:
    """Wait until a file of that pattern is there."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if next(folder.glob(pattern), None) is not None:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {pattern} in {folder}: {os.listdir(folder) if folder.is_dir() else 'no folder'}")


def wait_for_checkpoint(folder: Path, reached: Callable[[], int], *, timeout: float = 120.0) -> None:
    """Wait until a training's checkpoint is of a step that was `reached`, or a later one."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        wanted = reached()
        if any(json.loads(path.read_text())["step"] >= wanted for path in folder.glob("train-*/checkpoint.json")):
            return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of step {wanted} in {folder}")
