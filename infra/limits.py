"""How many GPU tasks run at a time, as limits of Prefect's tags; set again as often as you like.

    python -m infra.limits --gpus 4                      # of all workers together: tag `gpu`
    python -m infra.limits --gpus 4 --machine node1=2    # and at most 2 of these on node1: tag `gpu-node1`

A machine is named by the first part of its hostname. The server is the one of PREFECT_API_URL.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from coalora.errors import CoaloraError
from flows.cli import run_command
from pipeline.orchestration.deployed import check_server, require_server_named
from pipeline.orchestration.slots import GPU, machine_tag


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
                "a limit lets at least one GPU task run",
                got=f"{count} for tag {tag}",
                expected="the number of GPUs, 1 or more",
                remedy="stop the worker, or pause its work pool, to run none",
            )
    for tag, count in asked.items():
        client.create_concurrency_limit(tag=tag, concurrency_limit=count)  # changes the limit that is there
    return [f"tag {tag}: {count} at a time" for tag, count in asked.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    from prefect.client.orchestration import get_client

    made = argparse.ArgumentParser(prog="python -m infra.limits", description="Limit the GPU tasks that run at a time.")
    made.add_argument("--gpus", type=int, required=True, help="GPUs of all workers together")
    made.add_argument(
        "--machine", metavar="HOST=GPUS", nargs="+", action="extend", default=[], help="GPUs of a machine"
    )
    options = made.parse_args(arguments)
    machines = {}
    for text in options.machine:
        host, _, count = text.partition("=")
        if not host or not count.isdigit():
            raise CoaloraError("a machine is written HOST=GPUS", got=text, expected="for example --machine node1=2")
        machines[host] = int(count)
    require_server_named()
    check_server()
    with get_client(sync_client=True) as client:
        print("\n".join(set_limits(client, options.gpus, machines)))
    return 0


if __name__ == "__main__":
    run_command(main)
