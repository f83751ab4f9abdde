"""A local S3 server (moto's) and, before it, a proxy that makes the faults that networks and servers make.

Moto checks neither signatures nor checksums. What a real server would refuse, the proxy refuses: bodies that do not
have the SHA-256 that they are said to have, and credentials that the test calls wrong.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import http.client
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from botocore.loaders import create_loader
from moto.server import ThreadedMotoServer

ACCESS_KEY, SECRET_KEY, SESSION_TOKEN = "AKIATESTONLY0000WXYZ", "test-only-secret-Zq9Xw3", "test-only-session-Jm4Kp7"


@dataclass
class Fault:
    """What happens to the next `times` requests that match.

    Attributes:
        matches: of "METHOD /path?query".
        kind: cut-request (closed in mid-body), cut-answer (half of the body), close (no answer), busy (503),
            forbidden (403 and a code), lost-answer (done, but the answer is lost), flip and flip-answer (a byte of
            the body changes).
    """

    matches: re.Pattern[str]
    kind: str
    times: int
    code: str = ""
    met: int = 0


@dataclass
class FaultProxy:
    """Listens on `url`, forwards to the server behind it, and remembers every request."""

    backend: tuple[str, int]
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    bytes_sent: int = 0  # bodies of requests that arrived whole
    url: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, pattern: str, kind: str, times: int = 1, code: str = "") -> Fault:
        fault = Fault(re.compile(pattern), kind, times, code)
        self.faults.append(fault)
        return fault

    def clear(self) -> None:
        self.faults.clear()
        self.requests.clear()
        self.bytes_sent = 0

    def puts(self) -> list[str]:
        """Requests that write objects, in order."""
        return [r for r in self.requests if r.startswith(("PUT ", "POST ")) and "?delete" not in r]

    def take(self, request: str) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.met < fault.times and fault.matches.search(request):
                    fault.met += 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        fault = self.proxy.take(f"{self.command} {self.path}")
        kind = fault.kind if fault else ""
        length = int(self.headers.get("Content-Length") or 0)
        if kind == "cut-request":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length)
        if kind == "close":
            self.close_connection = True
            return
        if kind == "busy":
            self._error(503, "SlowDown", "Please reduce your request rate.")
            return
        if kind == "forbidden":
            assert fault is not None
            self._error(403, fault.code, "The request was refused.")
            return
        if kind == "flip" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        wanted = self.headers.get("x-amz-checksum-sha256")
        if wanted and body and base64.b64encode(hashlib.sha256(body).digest()).decode() != wanted:
            self._error(400, "BadDigest", "The SHA256 you specified did not match the calculated checksum.")
            return
        with self.proxy._lock:
            self.proxy.bytes_sent += length
        status, headers, content = self._forward(body)
        if kind == "lost-answer":
            self.close_connection = True
            return
        if kind == "flip-answer" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        self.send_response_only(status)  # the date is the server's
        for name, value in headers:
            self.send_header(name, value)
        # An answer to HEAD tells the length of a body that it does not have.
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if kind == "cut-answer":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.proxy.backend, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("expect", "connection")}
        connection.request(self.command, self.path, body=body or None, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        dropped = {"connection", "transfer-encoding"} | ({"content-length"} if self.command != "HEAD" else set())
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in dropped]
        connection.close()
        return answer.status, kept, content

    def _error(self, status: int, code: str, message: str) -> None:
        body = "" if self.command == "HEAD" else f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # faults close connections under the handler's hands


@contextmanager
def fault_proxy(backend: tuple[str, int]) -> Iterator[FaultProxy]:
    """A running proxy before `backend`."""
    proxy = FaultProxy(backend)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def s3_server() -> Iterator[tuple[str, int]]:
    """A running S3 server; (host, port)."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()
    finally:
        server.stop()


def set_credentials(set_variable: Callable[[str, str], None]) -> None:
    """The test's credentials in the environment, and nothing of the person who runs it."""
    variables = {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_SESSION_TOKEN": SESSION_TOKEN,
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent/aws", "AWS_CONFIG_FILE": "/nonexistent/aws",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    for name, value in variables.items():
        set_variable(name, value)


_LOADERS = functools.cache(create_loader)


def create_bucket(url: str, name: str) -> None:
    """By a plain request: moto asks for no signature, and a client of boto3 takes half a second to make."""
    with urllib.request.urlopen(urllib.request.Request(f"{url}/{name}", method="PUT"), timeout=30) as answer:
        assert answer.status == 200


@contextmanager
def bucket(patch: pytest.MonkeyPatch, name: str) -> Iterator[str]:
    """A server with an empty bucket, to which boto3 goes by itself; its URL."""
    set_credentials(patch.setenv)
    without_waits(patch)
    with s3_server() as (host, port):
        url = f"http://{host}:{port}"
        patch.setenv("AWS_ENDPOINT_URL", url)
        create_bucket(url, name)
        yield url


def without_waits(patch: pytest.MonkeyPatch) -> None:
    """Retries of botocore without their pauses (up to 20 s each), and its description of S3 (10 MB) read once."""
    patch.setattr("botocore.session.create_loader", _LOADERS)
    patch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.0)
