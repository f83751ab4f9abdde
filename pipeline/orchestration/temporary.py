"""Temporary Prefect server of a run without PREFECT_API_URL: with a login and this home's database, ended with the run.

By default Prefect starts it in the terminal's process group, open to every page of a browser and to everybody on the
machine, on one database for all of a user's runs. Here it has a session of its own, so that Ctrl-C does not end the
server under the run; its standard input is a pipe of the run, which the system closes however the run ends; and only
who knows a login that was made up for the run may talk to it.
"""

import os
import secrets
import subprocess
import sys
import threading
import time
from typing import Any

from pipeline.environment import coalora_home

LOGIN_VARIABLE = "PREFECT_API_AUTH_STRING"
_PATIENCE = 10.0  # seconds for the server to end by itself


def prepare_temporary_server() -> None:
    """Let the server that Prefect starts where none is named be one of this module. Call it before any flow runs."""
    from prefect.context import refresh_global_settings_context
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL, get_current_settings

    if PREFECT_API_URL.value():
        return
    os.environ[LOGIN_VARIABLE] = f"coalora:{secrets.token_urlsafe(24)}"
    refresh_global_settings_context()

    class Server(SubprocessASGIServer):
        def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
            settings = get_current_settings().to_environment_variables(exclude_unset=True)
            arguments = ["--factory", "prefect.server.api.server:create_app", "--log-level", "error"]
            arguments += ["--host", "127.0.0.1", "--port", str(self.port), "--lifespan", "on"]
            return subprocess.Popen(
                [sys.executable, "-m", "pipeline.orchestration.temporary", *arguments],
                env=os.environ | settings | _server_environment(self.address, settings),
                stdin=subprocess.PIPE,
                start_new_session=True,
            )

    Server()  # Prefect keeps one instance a port, and asks for the one without a port


def _server_environment(address: str, settings: dict[str, str]) -> dict[str, str]:
    own = {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": address,
        "PREFECT_SERVER_API_AUTH_STRING": os.environ[LOGIN_VARIABLE],
    }
    chosen = {name.replace("PREFECT_SERVER_DATABASE", "PREFECT_API_DATABASE") for name in {**os.environ, **settings}}
    if not chosen & {"PREFECT_HOME", "PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_NAME"}:
        own["PREFECT_API_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{coalora_home() / 'prefect.db'}"
    return own


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
