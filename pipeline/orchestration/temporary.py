"""Temporary Prefect server of a run without PREFECT_API_URL: with a login and this home's database, ended with the run.

By default Prefect starts it in the terminal's process group, open to every page of a browser and to everybody on the
machine, on one database for all of a user's runs. Here it has a session of its own, so that Ctrl-C does not end the
server under the run; its standard input is a pipe of the run, which the system closes however the run ends; and only
who knows a login that was made up for the run may talk to it.
"""

import atexit
import os
import secrets
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock

from coalora.errors import CoaloraError
from pipeline.environment import require_home

LOGIN_VARIABLE = "PREFECT_API_AUTH_STRING"
_PATIENCE = 10.0  # seconds for the server to end by itself


def start_temporary_server() -> None:
    """Start the server that Prefect uses where none is named; nothing where PREFECT_API_URL names one.

    Raises:
        CoaloraError: COALORA_HOME cannot be written, or the server does not start.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.logging import get_logger
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, get_current_settings

    if PREFECT_API_URL.value():
        return
    home = require_home()
    if not (home / "prefect.db").exists():
        get_logger("run").info("starting Prefect: it makes its database first, which takes half a minute")
    os.environ[LOGIN_VARIABLE] = f"coalora:{secrets.token_urlsafe(24)}"
    refresh_global_settings_context()

    class Server(SubprocessASGIServer):
        """As Prefect's own, which waits for two minutes for one that has ended."""

        def start(self, timeout: int | None = None) -> None:
            if self.running:
                return
            self.port, log = self.find_available_port(), home / "prefect.log"
            # Two that begin with one database would both migrate it.
            with filelock.FileLock(home / "prefect.db.lock"):
                self.server_process = _process(self.address, log, get_current_settings(), home)
                atexit.register(self.stop)
                until = time.monotonic() + (timeout or PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value())
                while not _answers(f"{self.api_url}/health"):
                    if self.server_process.poll() is not None or time.monotonic() > until:
                        raise CoaloraError(
                            f"Prefect's temporary server does not start ({_last_line(log)})",
                            remedy=f"See {log}; a slow machine needs a longer "
                            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS",
                        )
                    time.sleep(0.1)
            self.running = True

    Server().start()  # Prefect keeps one instance a port, and asks for the one without a port


def _process(address: str, log: Path, settings: Any, home: Path) -> subprocess.Popen[Any]:
    environment = os.environ | settings.to_environment_variables(exclude_unset=True)
    arguments = ["--factory", "prefect.server.api.server:create_app", "--log-level", "error", "--lifespan", "on"]
    arguments += ["--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.orchestration.temporary", *arguments],
            env=environment | _server_environment(address, environment, home),
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def _server_environment(address: str, given: dict[str, str], home: Path) -> dict[str, str]:
    own = {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": address,
        "PREFECT_SERVER_API_AUTH_STRING": given[LOGIN_VARIABLE],
    }
    chosen = {name.replace("PREFECT_SERVER_DATABASE", "PREFECT_API_DATABASE") for name in given}
    if not chosen & {"PREFECT_HOME", "PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_NAME"}:
        own["PREFECT_API_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{home / 'prefect.db'}"
    return own


def _answers(url: str) -> bool:
    # No proxy: the address is on this machine.
    with suppress(OSError), urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it says nothing")


def _end_with_parent() -> None:
    """End this process when standard input closes: its other end is the run's."""
    import signal

    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import uvicorn

    uvicorn.main()
