"""Checks of the Prefect server that a run talks to, and of the deployment that started it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from coalora.errors import CoaloraError
from pipeline.scrub import scrub_text
from pipeline.settings.definitions import DEFAULT_FILE, read_pipelines

# Set in a deployment's job variables where it was made from another file than pipelines.yaml.
FILE_VARIABLE = "COALORA_PIPELINES"


def check_deployment(deployment: str | None, name: str, pipelines: Mapping[str, Any] | None = None) -> None:
    """Refuse a run of a deployment whose pipeline was renamed or removed: it carries the settings of back then.

    Args:
        deployment: that started this run; None where none did.
        name: the run's parameter; a person may give a run of a deployment another name.
        pipelines: the definitions; by default those of `pipelines_file()`.
    """
    if deployment is None:
        return
    file = os.environ.get(FILE_VARIABLE) or DEFAULT_FILE
    known = read_pipelines(file) if pipelines is None else pipelines
    if deployment in known or name in known:
        return
    raise CoaloraError(
        f"Deployment 'pipeline/{deployment}' is left over: {file} defines no {deployment!r} any more, but "
        f"{', '.join(sorted(known))}",
        remedy=f"Deploy again (prefect --no-prompt deploy --all --prefect-file {file}) and remove what is left behind "
        f"(coalora deployments --file {file} --remove); a deployment of another file names it in its job "
        f"variables ({FILE_VARIABLE})",
    )


def require_server_named() -> None:
    """For commands that change what is on a server."""
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise CoaloraError(
            "PREFECT_API_URL names no Prefect server",
            remedy="Start one (prefect server start), then export PREFECT_API_URL=http://127.0.0.1:4200/api",
        )


def check_server() -> None:
    """Refuse to start where PREFECT_API_URL names a server that does not answer, or wants another login.

    Prefect itself ends in a traceback.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        return
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
        if problem is None:
            try:
                client.api_version()
            except PrefectHTTPStatusError as error:
                if error.response.status_code not in (401, 403):
                    raise
                raise CoaloraError(
                    f"The Prefect server at {scrub_text(url)} refuses this login (HTTP {error.response.status_code})",
                    remedy="Set PREFECT_API_AUTH_STRING to its own: `source .coalora/stack/env` after `make up`, or as "
                    "in infra/env",
                ) from error
    if problem is not None:
        raise CoaloraError(
            f"No Prefect server answers at {scrub_text(url)} ({type(problem).__name__})",
            remedy="Start it (`make up`, or prefect server start), or correct PREFECT_API_URL (it ends in /api), or "
            "unset it to run without a server",
        )


@contextmanager
def server_faults() -> Iterator[None]:
    """Turn a Prefect server that does not answer in mid-run, or answers that it is busy, into an error that says so."""
    import httpx
    from prefect.concurrency._asyncio import ConcurrencySlotAcquisitionError
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        yield
    except CoaloraError:
        raise
    except (ConcurrencySlotAcquisitionError, PrefectHTTPStatusError, httpx.TransportError) as error:
        cause = error.__cause__ if isinstance(error, ConcurrencySlotAcquisitionError) else error
        answer = getattr(cause, "response", None)
        if answer is not None and answer.status_code not in (408, 429, 502, 503, 504):
            raise
        if isinstance(cause, httpx.TransportError) and not str(cause.request.url).startswith(_api()):
            raise  # another server, such as the hub's
        told = f"HTTP {answer.status_code}" if answer is not None else f"{type(cause).__name__}: {cause}"[:200]
        raise CoaloraError(
            f"The Prefect server did not do its part for minutes ({scrub_text(told)}): it is away, or its database is "
            "locked by another run",
            remedy="Run again: every finished stage is kept. Several runs at once want a server with a database of its "
            "own (`make up`), or a COALORA_HOME each",
        ) from error


def _api() -> str:
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value() or SubprocessASGIServer().api_url
