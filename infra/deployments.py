"""Deployments on the server whose pipeline is in the file no more: renamed or removed ones still run when asked to.

python -m infra.deployments                 # lists what is stale
python -m infra.deployments --remove        # and removes it; its past runs stay
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import Any

from prefect.client.schemas.filters import FlowFilter, FlowFilterName

from flows.cli import run_command
from pipeline.orchestration.deployed import FILE_VARIABLE, check_server, require_server_named
from pipeline.settings.definitions import DEFAULT_FILE, read_pipelines

FLOW = "pipeline"
_PAGE = 200


def stale_deployments(client: Any, defined: Collection[str], file: str = DEFAULT_FILE) -> list[Any]:
    """Deployments of the flow, made from `file`, that neither have the name of a defined pipeline nor run one.

    Args:
        client: Prefect's synchronous client.
        defined: names of the pipelines in the file.
    """
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


def main(arguments: Sequence[str] | None = None) -> int:
    from prefect.client.orchestration import get_client

    made = argparse.ArgumentParser(prog="python -m infra.deployments", description="Deployments without a pipeline.")
    made.add_argument("--file", default=DEFAULT_FILE, help="file of pipelines (default: %(default)s)")
    made.add_argument("--remove", action="store_true", help="remove them from the server")
    options = made.parse_args(arguments)
    defined = read_pipelines(options.file)
    require_server_named()
    check_server()
    with get_client(sync_client=True) as client:
        stale = stale_deployments(client, defined, options.file)
        for deployment in stale:
            if options.remove:
                client.delete_deployment(deployment.id)
            print(
                f"{FLOW}/{deployment.name}: {'removed' if options.remove else f'its pipeline is not in {options.file}'}"
            )
    if not stale:
        print(f"every deployment of flow {FLOW!r} has its pipeline in {options.file}")
    elif not options.remove:
        print("remove them with --remove; schedules stop, past runs stay")
    return 0


if __name__ == "__main__":
    run_command(main)
