"""What a web page may do that a user opens while a Prefect server runs on the machine: nothing.

Such a page sends requests and opens sockets to 127.0.0.1 from the user's own browser. With a server that allows every
origin it makes a deployment whose command a worker then runs.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest

from infra.processes import free_port, start, stop, wait_until
from infra.services import services
from tests import shared
from tests.faults.runs import SERVED, served

pytestmark = pytest.mark.servers

EVIL = "http://evil.example"
DEPLOY = json.dumps({"name": "evil"}).encode()


@dataclass
class Target:
    """A server: its address, and the login that its own clients have."""

    address: str
    login: str

    def ask(
        self, path: str, data: bytes | None = None, *, method: str | None = None, login: bool = False, **headers: str
    ) -> tuple[int, dict[str, str]]:
        """Status and headers of the answer."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if login:
            given["Authorization"] = f"Basic {base64.b64encode(self.login.encode()).decode()}"
        request = urllib.request.Request(f"{self.address}/api{path}", data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, {k.lower(): v for k, v in answer.headers.items()}
        except urllib.error.HTTPError as error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}

    def socket_status(self, path: str) -> str:
        """First line of the answer to a browser's handshake for a web socket."""
        host, port = self.address.removeprefix("http://").split(":")
        words = (
            f"GET /api{path} HTTP/1.1\r\nHost: {host}:{port}\r\nOrigin: {EVIL}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        with closing(socket.create_connection((host, int(port)), timeout=20)) as connection:
            connection.sendall(words.encode())
            return connection.recv(200).decode().splitlines()[0]


@pytest.fixture(scope="module", params=["stack", "temporary"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "temporary":
        with served(folder, SERVED) as (_, told):
            yield Target(told["address"], told["login"])
        return
    shared.prefect_home(folder / "prefect")
    port, login = free_port(), "coalora:of-the-test"
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "PREFECT_API_AUTH_STRING": login}
    (server,) = [s for s in services(folder, {"prefect": port, "mlflow": 1, "s3": 2}, keys) if s.name == "prefect"]
    assert not {"a", "b"} & set(server.environment.values()), "the server needs no key of the store"
    log = folder / "log"
    process = start(server.command, log=log, environment=os.environ | server.environment, folder=folder)
    try:
        wait_until(server.missing, process, name="prefect", log=log, seconds=180)
        yield Target(f"http://127.0.0.1:{port}", login)
    finally:
        stop(process)


def test_its_own_clients_are_let_in(target: Target) -> None:
    assert target.ask("/flows/filter", b"{}", login=True, Content_Type="application/json")[0] == 200


@pytest.mark.parametrize("path", ["/deployments/", "/work_pools/", "/flow_runs/"])
def test_a_page_may_not_send_json(target: Target, path: str) -> None:
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    status, headers = target.ask(path, method="OPTIONS", Origin=EVIL, **asked)
    assert status == 400
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "application/x-www-form-urlencoded"])
def test_a_request_that_a_browser_sends_unasked_changes_nothing(target: Target, kind: str) -> None:
    status, headers = target.ask("/flows/", DEPLOY, Origin=EVIL, Content_Type=kind)
    assert status == 401
    assert "access-control-allow-origin" not in headers


def test_a_page_reads_nothing_not_even_with_a_name_that_leads_here(target: Target) -> None:
    for headers in ({"Origin": EVIL}, {"Host": "evil.example", "Origin": EVIL}, {"Host": "evil.example"}):
        assert target.ask("/admin/settings", **headers)[0] == 401


@pytest.mark.parametrize("path", ["/events/in", "/events/out", "/logs/out"])
def test_a_page_opens_no_socket(target: Target, path: str) -> None:
    assert "101" not in target.socket_status(path)


def test_only_its_own_page_may_read_the_answers(target: Target) -> None:
    assert target.ask("/health", Origin=target.address)[1]["access-control-allow-origin"] == target.address
    assert "access-control-allow-origin" not in target.ask("/health", Origin=EVIL)[1]
