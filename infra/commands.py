"""Commands of the stack and of a Prefect server, which `coalora.cli` adds to its own in a checkout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coalora.cli import Command
from coalora.errors import CoaloraError

if TYPE_CHECKING:
    from infra.stack import Stack

State = Annotated[Path | None, typer.Option(metavar="DIR", help="State folder; by default stack under COALORA_HOME.")]


class PoolType(StrEnum):
    """Types of work pool that deployments run in."""

    process = "process"
    kubernetes = "kubernetes"


def add_to(app: typer.Typer) -> None:
    """Add the commands to a command line, in the order in which `--help` shows them."""
    stack = typer.Typer(help="Start, end or look at the servers on this machine.", rich_markup_mode=None)
    app.add_typer(stack, name="stack")
    own, further = (up, down, status), (limits, pool, deployments)
    for group, commands in ((stack, own), (app, further)):
        for command in commands:
            group.command(command.__name__, cls=Command)(command)


def up(
    state: State = None,
    ports: Annotated[
        list[str], typer.Option(metavar="NAME=PORT ...", help="Of s3, mlflow, prefect; 0 takes a free one.")
    ] = [],  # noqa: B006
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="For each service to get healthy.")] = 180.0,
) -> int:
    """Start what is not running and wait until it is healthy; may be repeated."""
    asked = _numbers(ports, "--ports", "prefect=4201, or 0 for a free one", highest=65535)
    if not 0 < wait < 1e6:
        raise CoaloraError(f"--wait is {wait:g}", remedy="Give a number of seconds above 0")
    _stack(state).up(asked, wait=wait)
    return status(state)


def down(state: State = None) -> None:
    """End what `up` started, and nothing else; state, logs and bytes survive."""
    ended = _stack(state).down()
    print(f"ended: {', '.join(ended)}" if ended else "nothing was running")


def status(state: State = None) -> int:
    """Show how each service is; exit code 1 where one is not healthy."""
    stack = _stack(state)
    rows = stack.status()
    for name, words, where in rows:
        print(f"{name:<8} {words:<12} {where}")
    healthy = all(words == "healthy" for _, words, _ in rows)
    if healthy:
        print(f"\nIn every terminal that works with it:  source {os.path.relpath(stack.env_file)}")
    return 0 if healthy else 1


def limits(
    gpus: Annotated[int, typer.Option(help="GPUs of all workers together: limit of tag `gpu`.")],
    machine: Annotated[
        list[str], typer.Option(metavar="HOST=GPUS ...", help="And of a machine, by the first part of its hostname.")
    ] = [],  # noqa: B006
) -> None:
    """Limit the GPU tasks that run at a time.

    On the Prefect server of PREFECT_API_URL; may be repeated.
    """
    machines = _numbers(machine, "--machine", "node1=2")
    from infra.server import connected, set_limits

    with connected() as client:
        print("\n".join(set_limits(client, gpus, machines)))


def pool(
    api: Annotated[str | None, typer.Option(envvar="PREFECT_API_URL", help="Prefect server, with /api.")] = None,
    name: Annotated[str, typer.Option("--pool", help="Name of the work pool.")] = "coalora",
    type: Annotated[PoolType, typer.Option(help="Where its runs go.")] = PoolType.process,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs of all workers together; by default those of this machine.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Flow runs of the pool at once; by default any number.")] = None,
) -> None:
    """Make or update work pool and limits on a server."""
    if not api:
        raise CoaloraError(
            "No Prefect server is named, neither by --api nor by PREFECT_API_URL",
            remedy="Source .coalora/stack/env after `make up`, or export PREFECT_API_URL=http://HOST:4200/api",
        )
    from infra.server import count_gpus, set_up

    counted = max(1, count_gpus()) if gpus is None else gpus
    print("\n".join(set_up(api, pool=name, kind=type.value, gpus=counted, limit=limit)))


def deployments(
    file: Annotated[Path, typer.Option(metavar="YAML", help="File of pipelines.")] = Path("pipelines.yaml"),
    remove: Annotated[bool, typer.Option("--remove", help="Remove them from the server; past runs stay.")] = False,
) -> None:
    """List deployments whose pipeline is gone.

    Renamed or removed ones still run when asked to.
    """
    from infra.server import FLOW, connected, stale_deployments
    from pipeline.settings.definitions import read_pipelines

    defined = read_pipelines(file)
    with connected() as client:
        stale = stale_deployments(client, defined, str(file))
        for deployment in stale:
            if remove:
                client.delete_deployment(deployment.id)
            print(f"{FLOW}/{deployment.name}: {'removed' if remove else f'its pipeline is not in {file}'}")
    if not stale:
        print(f"every deployment of flow {FLOW!r} has its pipeline in {file}")
    elif not remove:
        print("remove them with --remove; schedules stop, past runs stay")


def _stack(state: Path | None) -> Stack:
    from infra.stack import Stack
    from pipeline.environment import coalora_home

    return Stack(state or coalora_home() / "stack")


def _numbers(words: Sequence[str], option: str, example: str, highest: int | None = None) -> dict[str, int]:
    """{name: number} of words `NAME=NUMBER`."""
    found = {}
    for word in words:
        name, _, number = word.partition("=")
        if not name or not number.isdecimal() or (highest is not None and int(number) > highest):
            raise CoaloraError(f"{option} {word} is no NAME=NUMBER", remedy=f"Write for example {option} {example}")
        found[name] = int(number)
    return found
