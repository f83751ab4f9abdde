"""The whole stack on this machine, without containers: Prefect server, MLflow server, S3 store and a worker.

`up` starts what is not running and waits until it is healthy; it may be repeated. `down` ends what `up` started and
nothing else. All listens on 127.0.0.1; state, logs and bytes lie under the state folder (`.coalora/stack`) and survive.
"""

import fcntl
import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from coalora.errors import CoaloraError
from infra.processes import Process, free_port, require_free, start, stop, wait_until
from infra.services import BUCKET, PORTS, Service, client_environment, services

ROOT = Path(__file__).resolve().parent.parent
WAIT = 180.0  # seconds: the first start of each server runs its migrations


class State(BaseModel):
    """What was started, as `state.json` in the state folder."""

    ports: dict[str, int] = {}
    processes: dict[str, Process] = {}


class Stack:
    """The stack of one state folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().resolve()
        self.env_file = self.folder / "env"

    def up(self, ports: Mapping[str, int] | None = None, *, wait: float = WAIT) -> State:
        """Start what is not running: the servers side by side, the worker when they are healthy.

        Args:
            ports: by service; 0 takes a free one. Of what runs already the port stays.
            wait: seconds for each service.
        """
        with self._locked():
            state = self._read()
            state.ports = self._ports(state, ports or {})
            credentials = self._credentials()
            self._lay_out(state.ports, credentials)
            *servers, worker = services(self.folder, state.ports, credentials)
            started = [(server, self._ensure(server, state)) for server in servers]
            for server, process in started:
                self._wait(server, process, wait)
            self._set_up()
            self._wait(worker, self._ensure(worker, state), wait)
            return state

    def down(self) -> list[str]:
        """End what `up` started, the worker first; names of what was running."""
        with self._locked():
            state = self._read()
            ended = []
            for name in reversed(list(state.processes)):
                if stop(state.processes[name]):
                    ended.append(name)
                del state.processes[name]
                self._write(state)
            return ended

    def status(self) -> list[tuple[str, str, str]]:
        """(service, what it is, where to look) of every service."""
        state = self._read()
        ports = {**PORTS, **state.ports}
        rows = []
        for service in services(self.folder, ports, self._credentials(make=False)):
            process = state.processes.get(service.name)
            if process is None or process.find() is None:
                rows.append((service.name, "not running", ""))
                continue
            missing = service.missing()
            words = "healthy" if missing is None else f"not healthy: {missing}"
            rows.append((service.name, words, f"{service.url}  pid {process.pid}  {self._log(service.name)}"))
        return rows

    def environment(self) -> dict[str, str]:
        """Variables that reach the stack, as in the file `env`."""
        return client_environment({**PORTS, **self._read().ports}, self._credentials(make=False))

    def _wait(self, service: Service, process: Process, seconds: float) -> None:
        wait_until(service.missing, process, name=service.name, log=self._log(service.name), seconds=seconds)

    def _ensure(self, service: Service, state: State) -> Process:
        """The service's process, started where there is none."""
        log = self._log(service.name)
        process = state.processes.get(service.name)
        if process is None or process.find() is None:
            if service.name in state.ports:
                require_free(state.ports[service.name], service.name)
            environment = {**self._outer(), **service.environment}
            service.prepare()
            process = start(service.command, log=log, environment=environment, folder=ROOT)
            state.processes[service.name] = process
            self._write(state)  # before it is healthy: `down` must find it whatever happens
        return process

    def _outer(self) -> dict[str, str]:
        """This process's variables without those by which another stack would be reached."""
        others = ("AWS_", "PREFECT_API", "PREFECT_SERVER", "MLFLOW_", "RCLONE_")
        return {k: v for k, v in os.environ.items() if not k.startswith(others)}

    def _ports(self, state: State, asked: Mapping[str, int]) -> dict[str, int]:
        unknown = sorted(set(asked) - set(PORTS))
        if unknown:
            raise CoaloraError(
                f"The stack has no service {', '.join(unknown)}", remedy=f"Give ports of {', '.join(PORTS)}"
            )
        ports = {}
        for name, default in PORTS.items():
            process = state.processes.get(name)
            known = state.ports.get(name)
            if process is not None and process.find() is not None and known is not None:
                if asked.get(name) not in (None, 0, known):
                    raise CoaloraError(
                        f"{name} runs on port {known} and cannot move to {asked[name]}",
                        remedy="End the stack first: `coalora stack down`",
                    )
                ports[name] = known
            else:
                wanted = asked.get(name, known or default)
                ports[name] = wanted or free_port()
            if shared := [other for other in ports if other != name and ports[other] == ports[name]]:
                raise CoaloraError(
                    f"{shared[0]} and {name} have one port, {ports[name]}", remedy="Give each its own with --ports"
                )
        return ports

    def _credentials(self, *, make: bool = True) -> dict[str, str]:
        """Of store and Prefect server: made up once, readable by the owner alone, for this machine's loopback only."""
        path = self.folder / "credentials.json"
        known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        fresh = {
            "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
            "PREFECT_API_AUTH_STRING": f"coalora:{secrets.token_hex(20)}",
        }
        if not make:
            return {**dict.fromkeys(fresh, "none"), **known}
        if not fresh.keys() <= known.keys():
            known = {**fresh, **known}
            _write_private(path, json.dumps(known))
        return known

    def _lay_out(self, ports: Mapping[str, int], credentials: Mapping[str, str]) -> None:
        for below in (f"s3/{BUCKET}", "mlflow", "prefect", "logs"):
            (self.folder / below).mkdir(parents=True, exist_ok=True)
        lines = [f"export {k}={shlex.quote(v)}" for k, v in client_environment(ports, credentials).items()]
        _write_private(self.env_file, "\n".join(lines) + "\n")

    def _set_up(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "coalora", "pool"],
            env={**self._outer(), **self.environment(), "PREFECT_HOME": str(self.folder / "prefect")},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise CoaloraError(
                f"Work pool and limits could not be set up: {(done.stdout + done.stderr)[-2000:].strip()}",
                remedy=f"See the log {self._log('prefect')}",
            )

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _read(self) -> State:
        path = self.folder / "state.json"
        return State.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else State()

    def _write(self, state: State) -> None:
        _write_private(self.folder / "state.json", state.model_dump_json(indent=2) + "\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.folder.chmod(0o700)  # one that was made before, too: databases and logs are for nobody else
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # freed by the system when its holder dies
            yield


def _write_private(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW  # nothing that somebody has laid there before
    with os.fdopen(os.open(part, flags, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    part.replace(path)
