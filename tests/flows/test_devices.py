"""Pairs for devices on a real server: started by the champion's event, whole, and one failure beside successes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun

from coalora.contents import problems
from tasks.register import EVENT, RESOURCE
from tests.flows.checkout import Checkout
from tests.servers import Server, prefect_server
from tests.tiny_run import tiny_run

pytestmark = pytest.mark.servers
ROOT = Path(__file__).parents[2]
EMIT = f"""
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
emit_event(event="{EVENT}", resource={{"prefect.resource.id": "{RESOURCE}.coalora-demo"}})
EventsWorker.drain_all()
"""


def first_run(server: Server, deployment: str, *, timeout: float = 120.0) -> FlowRun:
    of_it = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[server.deployment_id(deployment)]))
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for run in server.client.read_flow_runs(flow_run_filter=of_it):
            return run
        time.sleep(0.5)
    raise AssertionError(f"nothing has started {deployment}")


def test_the_champion_s_event_makes_the_pairs(make_checkout: Callable[[str], Checkout], tmp_path: Path) -> None:
    made, checkout = tiny_run(), make_checkout("devices")
    content = yaml.safe_load((ROOT / "pipelines.yaml").read_text(encoding="utf-8"))
    (found,) = [d for d in content["deployments"] if d["name"] == "demo-devices"]
    (checkout.root / "nobody.yaml").write_text("to: [peft]\nmemory: 1kB\n")
    found["parameters"] = {"source": str(made.folder), "profiles": ["edge-100mb", "nobody.yaml"], "folder": "pairs"}
    (checkout.root / "pipelines.yaml").write_text(yaml.safe_dump({"deployments": [found]}))
    with prefect_server(tmp_path / "prefect") as server:
        server.environment["COALORA_HOME"] = str(made.home)
        server.run(checkout.root, "work-pool", "create", "coalora", "--type", "process")
        server.deploy(checkout.root)
        with server.worker(checkout.root):
            server.python(checkout.root, "-c", EMIT)
            run = first_run(server, "devices/demo-devices")
            assert server.wait(run) == "Failed"  # one of the two devices holds nothing
            assert server.wait_for_log(run, "1 of 2 devices have no pair (nobody.yaml: ")
        (table,) = server.artifacts("devices-pairs")
    assert "edge-100mb" in str(table.data)
    (pair,) = (checkout.root / "pairs").glob("*/edge-100mb")
    assert problems(pair)[1] == []
