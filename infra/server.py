"""Work pool, limits of GPU tasks and stale deployments on a Prefect server.

Everything may be repeated: what is there already is brought to what is asked for. Deployments themselves are made by
`prefect deploy --all`.
"""

import json
import subprocess
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coalora.errors import CoaloraError
from infra.services import POOL
from pipeline.orchestration.gpu_tags import GPU, machine_tag
from pipeline.orchestration.server import FILE_VARIABLE, check_server, require_server_named
from pipeline.settings.definitions import DEFAULT_FILE

TEMPLATE = Path(__file__).parent / "kubernetes" / "base-job-template.json"
FLOW = "pipeline"
_PAGE = 200


@contextmanager
def connected() -> Iterator[Any]:
    """Prefect's synchronous client of the server of PREFECT_API_URL."""
    require_server_named()
    check_server()
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        yield client


def set_up(api: str, *, pool: str = POOL, kind: str = "process", gpus: int = 1, limit: int | None = None) -> list[str]:
    """Make or update work pool and tag limit; one line for each of what was done.

    Args:
        api: of the server, such as http://127.0.0.1:4200/api.
        kind: type of the work pool; `kubernetes` takes infra/kubernetes/base-job-template.json.
        gpus: GPUs of all workers together: so many tasks with the tag `gpu` run at once.
        limit: flow runs of the pool at once; None for any number.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: api}), connected() as client:
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
            f"Work pool {name} is of type {found.type}, not {kind}",
            remedy=f"Choose another name (--pool), or `prefect work-pool delete {name}`, which drops its queues",
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


def set_limits(client: Any, gpus: int, machines: Mapping[str, int] | None = None) -> list[str]:
    """Make or change the limits; one line for each.

    Args:
        client: Prefect's synchronous client (`get_client(sync_client=True)`).
        gpus: of all workers together.
        machines: GPUs by hostname, for those that are to be limited on their own.

    Raises:
        CoaloraError: a number below 1: Prefect aborts tasks at a limit of 0.
    """
    asked = {GPU: gpus} | {machine_tag(name): count for name, count in (machines or {}).items()}
    for tag, count in asked.items():
        if count < 1:
            raise CoaloraError(
                f"A limit of {count} for tag {tag} would end every GPU task",
                remedy="Give the number of GPUs, 1 or more; to run none, stop the worker or pause its work pool",
            )
    for tag, count in asked.items():
        client.create_concurrency_limit(tag=tag, concurrency_limit=count)  # changes the limit that is there
    return [f"tag {tag}: {count} at a time" for tag, count in asked.items()]


def stale_deployments(client: Any, defined: Collection[str], file: str = DEFAULT_FILE) -> list[Any]:
    """Deployments of the flow, made from `file`, that neither have the name of a defined pipeline nor run one."""
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    flows = FlowFilter(name=FlowFilterName(any_=[FLOW]))
    found: list[Any] = []
    while page := client.read_deployments(flow_filter=flows, limit=_PAGE, offset=len(found)):
        found += page
    return [
        d
        for d in found
        if (d.job_variables or {}).get("env", {}).get(FILE_VARIABLE, DEFAULT_FILE) == file
        and d.name not in defined
        and (d.parameters or {}).get("name") not in defined
    ]
