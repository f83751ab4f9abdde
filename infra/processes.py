"""Background processes that are found again: started once, known by pid, start time and command line, ended alone.

A pid by itself says little: after a reboot, or a day, it may be somebody else's. So a process counts as ours only
where its start time and command line are those that were written down when it was started.
"""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import BaseModel

from coalora.errors import CoaloraError

TOLERANCE = 2.0  # seconds: start times are computed from the boot time, which clocks correct
LOG_LINES = 15


class Process(BaseModel):
    """A process that was started here."""

    pid: int
    started: float  # seconds since 1970
    command: list[str]

    def find(self) -> psutil.Process | None:
        """The running process, or None where it has ended, or its id belongs to another one now."""
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.started) <= TOLERANCE and found.cmdline() == self.command
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


def start(command: Sequence[str], *, log: Path, environment: Mapping[str, str], folder: Path) -> Process:
    """Start a command in the background, in a session of its own, its output appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        made = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,  # Ctrl-C in this terminal is not for the servers
        )
    found = psutil.Process(made.pid)
    # Between fork and exec the command line is still that of this process.
    for _ in range(100):
        with suppress(psutil.Error):
            if found.cmdline() and found.cmdline() != psutil.Process().cmdline():
                break
        time.sleep(0.02)
    try:
        return Process(pid=made.pid, started=found.create_time(), command=found.cmdline())
    except psutil.Error:
        raise CoaloraError(
            f"{Path(command[0]).name} ended at once; the end of {log}:\n{tail(log)}", remedy="Mend what the log says"
        ) from None


def stop(process: Process, *, patience: float = 15.0) -> bool:
    """End a process and what it has started: asked first, killed after `patience` seconds.

    Returns:
        Whether it was running.
    """
    found = process.find()
    if found is None:
        return False
    family = [found]
    with suppress(psutil.Error):
        family += found.children(recursive=True)
    with suppress(psutil.Error):
        found.terminate()
    _, alive = psutil.wait_procs(family, timeout=patience)
    for member in alive:  # psutil checks start times before it signals
        with suppress(psutil.Error):
            member.kill()
    psutil.wait_procs(alive, timeout=5)
    return True


def wait_until(healthy: Callable[[], str | None], process: Process, *, name: str, log: Path, seconds: float) -> None:
    """Wait until `healthy()` returns None, and not what is missing.

    Raises:
        CoaloraError: the process ended, or is not healthy after `seconds`; with the end of its log.
    """
    until = time.monotonic() + seconds
    while (missing := healthy()) is not None:
        ended = process.find() is None
        if ended or time.monotonic() > until:
            raise CoaloraError(
                f"{name} {'ended' if ended else f'was not healthy after {seconds:.0f} s ({missing})'}; "
                f"the end of {log}:\n{tail(log)}",
                remedy="Mend what the log says; a slow machine needs more time: --wait 600",
            )
        time.sleep(0.3)


def tail(log: Path, lines: int = LOG_LINES) -> str:
    """The last lines of a log file."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 100_000))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError as error:
        return f"(no log: {error.strerror})"
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (the log is empty)"


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free(port: int, name: str, host: str = "127.0.0.1") -> None:
    """Refuse a port that something listens on, and say what where the system tells."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT can be had
        try:
            probe.bind((host, port))
            return
        except OSError as error:
            reason = error.strerror
    raise CoaloraError(
        f"Port {port} of {name} is taken ({_holder(port) or reason})",
        remedy=f"End what uses it, or take another: --ports {name}={port + 1} (0 takes a free one)",
    )


def _holder(port: int) -> str | None:
    with suppress(psutil.Error, OSError):
        for found in psutil.net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port and found.pid:
                words = " ".join(psutil.Process(found.pid).cmdline())
                return f"used by process {found.pid}: {words[:160]}"
    return None
