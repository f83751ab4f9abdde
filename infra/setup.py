"""Work pool and limits on a Prefect server, made once: whatever is there already is brought to what is asked for.

    python -m infra.setup [--gpus 4] [--type process | kubernetes] [--pool coalora] [--limit RUNS]

The server is the one of `PREFECT_API_URL`. Deployments are no part of it: `prefect deploy --all` makes them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coalora.errors import CoaloraError
from infra.limits import set_limits
from infra.services import POOL, http_missing

TEMPLATE = Path(__file__).parent / "kubernetes" / "base-job-template.json"


def set_up(api: str, *, pool: str = POOL, kind: str = "process", gpus: int = 1, limit: int | None = None) -> list[str]:
    """Make or update work pool and tag limit; one line for each of what was done.

    Args:
        api: of the server, such as http://127.0.0.1:4200/api.
        kind: type of the work pool; `kubernetes` takes infra/kubernetes/base-job-template.json.
        gpus: GPUs of all workers together: so many tasks with the tag `gpu` run at once.
        limit: flow runs of the pool at once; None for any number.

    Raises:
        CoaloraError: the server does not answer, or the pool is of another type.
    """
    missing = http_missing(f"{api.rstrip('/')}/health")
    if missing is not None:
        raise CoaloraError(
            "a Prefect server answers",
            got=missing,
            remedy="start one (`make up`, or `prefect server start`) and set PREFECT_API_URL to its address with /api",
        )
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        return [_pool(client, pool, kind, limit), *set_limits(client, gpus)]


def count_gpus() -> int:
    """GPUs of this machine, by its driver; 0 where there is none."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def _pool(client: Any, name: str, kind: str, limit: int | None) -> str:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    template = _template(kind)
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(
            WorkPoolCreate(name=name, type=kind, base_job_template=template, concurrency_limit=limit)
        )
        return f"work pool {name}: made, type {kind}"
    if found.type != kind:
        raise CoaloraError(
            "a work pool keeps its type",
            got=f"{name} is of type {found.type}, asked for {kind}",
            remedy=f"choose another name (--pool), or `prefect work-pool delete {name}`, which drops its queues",
        )
    change: dict[str, Any] = {}
    if kind == "kubernetes" and found.base_job_template != template:
        change["base_job_template"] = template
    if limit is not None and found.concurrency_limit != limit:
        change["concurrency_limit"] = limit
    if not change:
        return f"work pool {name}: there already"
    client.update_work_pool(name, WorkPoolUpdate(**change))
    return f"work pool {name}: updated ({', '.join(sorted(change))})"


def _template(kind: str) -> dict[str, Any]:
    if kind == "kubernetes":
        content: dict[str, Any] = json.loads(TEMPLATE.read_text(encoding="utf-8"))
        return content
    from prefect.workers.process import ProcessWorker

    return ProcessWorker.get_default_base_job_template()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.setup", description=__doc__.splitlines()[0])
    parser.add_argument("--api", default=os.environ.get("PREFECT_API_URL"), help="default: PREFECT_API_URL")
    parser.add_argument("--pool", default=POOL)
    parser.add_argument("--type", choices=["process", "kubernetes"], default="process")
    parser.add_argument("--gpus", type=int, help="GPUs of all workers together (default: those of this machine)")
    parser.add_argument("--limit", type=int, help="flow runs of the pool at once (default: any number)")
    options = parser.parse_args(arguments)
    if not options.api:
        raise CoaloraError(
            "the server to set up is named",
            got="neither --api nor PREFECT_API_URL",
            remedy="source .coalora/stack/env after `make up`, or export PREFECT_API_URL=http://HOST:4200/api",
        )
    gpus = max(1, count_gpus()) if options.gpus is None else options.gpus
    for line in set_up(options.api, pool=options.pool, kind=options.type, gpus=gpus, limit=options.limit):
        print(line)
    return 0


if __name__ == "__main__":
    from flows.cli import run_command

    run_command(main)
