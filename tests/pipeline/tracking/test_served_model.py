"""The registered model behind `mlflow models serve`: right answers for many clients, links, 400 for bad requests."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from coalora.export.bundle import Bundle
from infra.processes import free_port
from pipeline.tracking.registry import register
from pipeline.tracking.runs import Tracker
from tests import shared
from tests.s3_server import ACCESS_KEY, SECRET_KEY, create_bucket, s3_server
from tests.servers import end
from tests.tiny_run import tiny_run

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(tiny_run().folder / "bundle")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home, port = tmp_path_factory.mktemp("served"), free_port()
    tracker = Tracker(shared.mlflow_database(home), "tests", home / "mlartifacts")
    run = tracker.open_run("served", "a run")
    register(
        run, tiny_run().folder / "bundle", "served", "served", hypervolume=1.0,
        tags={"hypervolume_reference": "x"}, description="a bundle",
    )  # fmt: skip
    with s3_server() as (host, at):
        endpoint = f"http://{host}:{at}"
        create_bucket(endpoint, "adapters")
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_DEFAULT_REGION": "us-east-1"}
        process = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/served@champion",
                "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port),
            ],
            cwd=home,  # not in the checkout
            env=os.environ | keys | {
                "MLFLOW_TRACKING_URI": tracker.tracking_uri, "AWS_ENDPOINT_URL": endpoint,
                "COALORA_ADAPTERS": "s3://adapters/served", "OMP_NUM_THREADS": "1",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # MLflow calls uvicorn by its name
            },
            start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 180
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            end(process)


def ask(address: str, *requests: dict[str, Any]) -> tuple[int, Any]:
    body = json.dumps({"inputs": list(requests)}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)["predictions"]
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_64_clients_at_once_get_each_their_own_answer(address: str, bundle: Bundle) -> None:
    low, high = bundle.tables.cost_range()
    budgets = [low + (high - low) * i / 63 for i in range(64)]
    with ThreadPoolExecutor(64) as clients:
        found = list(clients.map(lambda b: ask(address, {"budget": b, "format": "inline"}), budgets))
    assert {status for status, _ in found} == {200}
    for budget, (_, (answer,)) in zip(budgets, found, strict=True):
        expected = bundle.adapt(budget)
        assert (answer["digest"], answer["configuration"]) == (expected.digest, expected.configuration)
        tensors = load(base64.b64decode(answer["adapter_safetensors"]))
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_a_link_leads_to_the_adapter(address: str, bundle: Bundle, tmp_path: Path) -> None:
    (status, (answer,)) = ask(address, {"budget": 3, "format": "link"})
    assert status == 200
    with urllib.request.urlopen(answer["adapter_url"], timeout=30) as found:
        tensors = load(found.read())
    assert all(torch.equal(tensors[name], tensor) for name, tensor in bundle.adapt(3).tensors.items())
    assert "X-Amz-Expires=3600" in answer["adapter_url"] or "Expires=" in answer["adapter_url"]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"budget": 1.0}, "below the choice space"),
        ({"budget": 3, "format": "zip"}, "format"),
        ({}, "exactly one of budget and configuration"),
        ({"configuration": {"layer": {"bits": 3}}}, "not for the"),
    ],
)
def test_a_bad_request_is_answered_with_400_and_the_reason(address: str, request_: dict[str, Any], words: str) -> None:
    status, text = ask(address, request_)
    assert status == 400
    assert words in text
    assert "Traceback" not in text
