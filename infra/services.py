"""The services of the local stack: how each is started, and how its health is seen.

S3 store: rclone serves a folder, so that buckets and objects are plain folders and files that survive `down` and can
be looked at; moto's server, which tests use, keeps all in memory and forgets. Limits of rclone's server: it ignores
`If-None-Match`, forgets user metadata other than the time, and answers a ranged read with the checksum of the whole
object; hence the two `when_required` below, which botocore, s3fs and DVC read.
"""

import base64
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from coalora.errors import CoaloraError
from pipeline.tracking.server import set_aside_unfinished

HOST = "127.0.0.1"
BUCKET = "coalora"
POOL = "coalora"
PORTS = {"s3": 9000, "mlflow": 5000, "prefect": 4200}  # the worker listens on none


@dataclass(frozen=True)
class Service:
    """One process of the stack."""

    name: str  # as in `--ports` and `status`
    command: list[str]  # started in the checkout
    environment: Mapping[str, str]  # added to this process's own, without what leads to other servers
    missing: Callable[[], str | None]  # what keeps it from being healthy; None when it is healthy
    url: str  # for people
    prepare: Callable[[], None] = lambda: None  # called before it is started


def client_environment(ports: Mapping[str, int], credentials: Mapping[str, str]) -> dict[str, str]:
    """Variables by which flows, workers and people reach the stack."""
    return {
        "PREFECT_API_URL": f"http://{HOST}:{ports['prefect']}/api",
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{ports['mlflow']}",
        "AWS_ENDPOINT_URL": f"http://{HOST}:{ports['s3']}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        **credentials,
    }


def services(folder: Path, ports: Mapping[str, int], credentials: Mapping[str, str]) -> list[Service]:
    """The services in the order in which they are started; each is given the credentials that it needs.

    The worker's runs use the S3 store by themselves (`COALORA_STORE`, DVC's remote, published runs).
    """
    client = client_environment(ports, credentials)
    login = credentials["PREFECT_API_AUTH_STRING"]
    keys = {name: value for name, value in client.items() if name.startswith("AWS_")}
    name = f"local-{ports['prefect']}"
    python = [sys.executable, "-m"]
    api, s3, mlflow = client["PREFECT_API_URL"], client["AWS_ENDPOINT_URL"], client["MLFLOW_TRACKING_URI"]
    ui = api.removesuffix("/api")
    home = {"PREFECT_HOME": str(folder / "prefect")}
    runs = folder / "mlflow" / "mlflow.db"
    # For pages of other origins; sockets, which browsers do not hold back, need the login.
    origins = f"{ui},http://localhost:{ports['prefect']}"
    return [
        Service(
            "s3",
            [rclone(), "serve", "s3", "--addr", f"{HOST}:{ports['s3']}", "--dir-cache-time", "1s", str(folder / "s3")],
            # By the environment, since command lines are seen by everybody on the machine.
            {
                "RCLONE_AUTH_KEY": f'"{credentials["AWS_ACCESS_KEY_ID"]},{credentials["AWS_SECRET_ACCESS_KEY"]}"',
                "RCLONE_CONFIG": os.devnull,
            },
            lambda: s3_missing(s3, credentials),
            s3,
        ),
        Service(
            "mlflow",
            [*python, "mlflow", "server", "--host", HOST, "--port", str(ports["mlflow"]), "--workers", "1",
             "--backend-store-uri", f"sqlite:///{runs}",
             "--artifacts-destination", f"s3://{BUCKET}/mlflow"],
            {**keys, "MLFLOW_S3_ENDPOINT_URL": s3, "MLFLOW_DISABLE_TELEMETRY": "true",
             "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            lambda: http_missing(f"{mlflow}/health"),
            mlflow,
            lambda: set_aside_unfinished(runs),
        ),
        Service(
            "prefect",
            [*python, "prefect", "server", "start", "--host", HOST, "--port", str(ports["prefect"])],
            {**home, "PREFECT_API_URL": api, "PREFECT_UI_API_URL": api, "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origins,
             "PREFECT_SERVER_API_AUTH_STRING": login, "PREFECT_API_AUTH_STRING": login},
            lambda: http_missing(f"{api}/health"),
            ui,
        ),
        Service(
            "worker",
            [*python, "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", name],
            {**client, **home},
            lambda: worker_missing(api, name, login),
            f"{ui}/work-pools/work-pool/{POOL}",
        ),
    ]  # fmt: skip


def rclone() -> str:
    """rclone of this environment, else of the machine."""
    beside = Path(sys.executable).parent / "rclone"
    found = str(beside) if beside.is_file() else shutil.which("rclone")
    if found is None:
        raise CoaloraError("rclone, which serves the local S3 store, is not installed", remedy="Run `make up`")
    return found


def http_missing(url: str) -> str | None:
    """None where the URL answers 200."""
    found = _request(url)
    return found if isinstance(found, str) else None


def worker_missing(api: str, name: str, login: str) -> str | None:
    """None where the worker of that name sends heartbeats."""
    found = _request(f"{api}/work_pools/{POOL}/workers/filter", b"{}", login)
    if isinstance(found, str):
        return found
    states = [worker["status"] for worker in json.loads(found) if worker["name"] == name]
    return None if states == ["ONLINE"] else f"worker {name} is {states[0] if states else 'unknown'} to the server"


def s3_missing(endpoint: str, credentials: Mapping[str, str]) -> str | None:
    """None where the bucket answers to these credentials."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    session = boto3.session.Session(credentials["AWS_ACCESS_KEY_ID"], credentials["AWS_SECRET_ACCESS_KEY"])
    config = Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1})
    try:
        session.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config).head_bucket(Bucket=BUCKET)
    except (BotoCoreError, ClientError) as error:
        return str(error)
    return None


def _request(url: str, data: bytes | None = None, login: str | None = None) -> bytes | str:
    """The answer, or what is wrong as text."""
    headers = {"Content-Type": "application/json"}
    if login is not None:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    request = urllib.request.Request(url, data, headers)
    # No proxy: these addresses are on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as answer:
            content: bytes = answer.read()
            return content
    except (OSError, urllib.error.URLError) as error:
        return f"{url}: {error}"
