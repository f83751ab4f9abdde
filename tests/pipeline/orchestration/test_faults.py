"""A Prefect server that goes away or is busy in mid-run ends the run in a sentence; other errors pass unchanged."""

from __future__ import annotations

import httpx
import pytest
from prefect.concurrency._asyncio import ConcurrencySlotAcquisitionError
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings

from coalora.errors import CoaloraError
from pipeline.orchestration.server import server_faults

API = "http://127.0.0.1:4200/api"


def answered(status: int) -> PrefectHTTPStatusError:
    request = httpx.Request("POST", f"{API}/task_runs/")
    return PrefectHTTPStatusError("no", request=request, response=httpx.Response(status, request=request))


def no_slots() -> ConcurrencySlotAcquisitionError:
    error = ConcurrencySlotAcquisitionError("Unable to acquire concurrency slots on ['tag:gpu']")
    error.__cause__ = answered(503)
    return error


@pytest.mark.parametrize(
    "error",
    [answered(503), answered(429), no_slots(), httpx.ConnectError("refused", request=httpx.Request("GET", f"{API}/x"))],
    ids=lambda error: type(error).__name__,
)
def test_a_server_that_is_away_or_busy_is_said_with_what_to_do(error: Exception) -> None:
    with (
        temporary_settings({PREFECT_API_URL: API}),
        pytest.raises(CoaloraError, match=r"Prefect server did not do its part.*Run again: every finished stage"),
        server_faults(),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        answered(422),
        ValueError("of a stage"),
        CoaloraError("of ours"),
        httpx.ConnectError("refused", request=httpx.Request("GET", "https://huggingface.co/api/models")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with temporary_settings({PREFECT_API_URL: API}), pytest.raises(type(error)) as caught, server_faults():
        raise error
    assert caught.value is error
