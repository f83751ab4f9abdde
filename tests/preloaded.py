"""Commands in processes that begin with the heavy libraries imported.

Importing torch, transformers, PEFT, Prefect and MLflow costs a process some fifteen seconds of processor time before it
does anything, and tests of whole runs start dozens. One server for all of the tests' processes imports them once; each
command is a fork of it: a process in a session of its own, with its own directory, environment, modules of the project
and settings of Prefect, killed and waited for like any other. The forks share the seed of hashes; `python(real=...)`
says which commands get an interpreter of their own.
"""

from __future__ import annotations

import fcntl
import gc
import importlib.abc
import importlib.machinery
import json
import os
import signal
import socket
import sys
import threading
import types
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

_PROJECT = Path(__file__).parents[1]
_ROOMS = ("tests", "coalora", "pipeline", "tasks", "flows", "infra", "benchmarks")
# Prefect reads variables at import; it is hidden in a fork until it is asked for, and reads them anew then.
_PREFECT = (
    "prefect", "prefect.main", "prefect.artifacts", "prefect.runtime", "prefect.variables",
    "prefect.deployments.runner", "prefect.server.api.server",
)  # fmt: skip
_LIBRARIES = (
    "peft", "accelerate", "scipy.stats", "scipy.optimize", "pandas", "sqlalchemy", "matplotlib.pyplot", "datasets",
    "torch._dynamo", "transformers.masking_utils", "transformers.conversion_mapping", "uvicorn", "dvc.cli", "dvc.repo",
    "transformers.models.llama.modeling_llama", "mlflow", "mlflow.pyfunc",
    "mlflow.system_metrics.system_metrics_monitor", "typer", "rich.console", "rich.table",
)  # fmt: skip


class Process:
    """`python *command` in `cwd` with `environment`; `stdout` has what it and its children print, stderr included."""

    def __init__(self, command: tuple[str, ...], cwd: Path, environment: dict[str, str]) -> None:
        reader, writer = os.pipe()
        with open(os.devnull) as nothing:
            self._connection = _Connection(command, str(cwd), environment, {0: nothing.fileno(), 1: writer, 2: writer})
        os.close(writer)
        self.stdout: TextIO = os.fdopen(reader, encoding="utf-8", errors="replace")
        self.pid: int = self._connection.pid
        self._ended = threading.Thread(target=self._connection.wait, daemon=True)
        self._ended.start()

    @property
    def returncode(self) -> int | None:
        return self._connection.code

    def wait(self, timeout: float | None = None) -> int | None:
        self._ended.join(timeout)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def read(self, timeout: float) -> str:
        """All that it prints until its end; it is killed with its children after `timeout` seconds."""
        killer = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
        killer.start()
        with self.stdout:
            printed = self.stdout.read()
        self.wait()
        killer.cancel()
        return printed


def run(*command: str, cwd: Path | None = None, expect: int = 0, **environment: str) -> str:
    """What `python *command` prints, with these variables added to the environment; its exit code is checked."""
    process = Process(command, cwd or Path.cwd(), os.environ | environment)
    printed = process.read(timeout=400)
    assert process.returncode == expect, printed[-6000:]
    return printed


def python(folder: Path, *, real: str = "") -> Path:
    """A program `python` in `folder` whose every start is a fork, but where the command matches pattern `real`."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "python"
    otherwise = f'case "$*" in {real}) exec {sys.executable} "$@";; esac\n' if real else ""
    shared = f"export TESTS_SHARED={os.environ['TESTS_SHARED']}"
    program.write_text(f'#!/bin/sh\n{otherwise}{shared}\nexec {sys.executable} -ISE {__file__} "$@"\n')
    program.chmod(0o755)
    return program


class _Connection:
    """A fork as its client sees it: it has files under these numbers, gets signals, and is killed with its client."""

    def __init__(self, command: tuple[str, ...], cwd: str, environment: dict[str, str], files: dict[int, int]) -> None:
        self.code: int | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(_server())
        asked = {"command": command, "cwd": cwd, "environment": environment, "files": list(files)}
        socket.send_fds(self._socket, [b"!"], list(files.values()))
        self._socket.sendall(json.dumps(asked).encode() + b"\n")
        self._answers = self._socket.makefile()
        self.pid = int(self._answers.readline())

    def send(self, number: int) -> None:
        with suppress(OSError):  # it has ended, and its answer is on its way
            self._socket.sendall(bytes([number]))

    def wait(self) -> int:
        self.code = int(self._answers.readline() or -signal.SIGKILL)
        self._socket.close()
        return self.code


def _server() -> str:
    """Socket of the server, which is started where it does not run."""
    owner, _, folder = os.environ["TESTS_SHARED"].partition(":")
    path = os.path.join(folder, "forks")
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path):
            import subprocess

            started = subprocess.Popen(
                [sys.executable, "-m", "tests.preloaded", path, owner],
                cwd=_PROJECT, stdout=subprocess.PIPE, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(_PROJECT), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert started.stdout is not None
            assert started.stdout.readline() == b"ready\n"
    return path


def _serve(path: str, owner: int) -> None:
    """Fork for every connection until process `owner` is gone."""
    import select

    from pipeline.environment import set_defaults

    set_defaults()
    for name in _PREFECT + _LIBRARIES:
        with suppress(ModuleNotFoundError):  # where the library is tested alone
            importlib.import_module(name)
    for name in _modules_of(*_ROOMS):
        if name != "tests.preloaded":
            del sys.modules[name]
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1, threading.enumerate()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(16)
    print("ready", flush=True)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    forks: dict[socket.socket, int] = {}
    while _alive(owner):
        ready, _, _ = select.select([listener, ended, *forks], [], [], 1.0)
        if listener in ready:
            connection, _ = listener.accept()
            _, files, _, _ = socket.recv_fds(connection, 1, 64)
            asked = json.loads(connection.makefile().readline() or "null")
            if asked is None:  # a client that was killed meanwhile
                connection.close()
                continue
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setsid()
                above = max([100, *asked["files"]]) + 1  # or a copy would take the number of one that waits for its own
                kept = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in files]
                for each in (listener, connection, *forks):
                    each.close()
                for file in (ended, wake, *files):
                    os.close(file)
                for file, number in zip(kept, asked["files"], strict=True):
                    os.dup2(file, number)
                    os.close(file)
                _become(asked["command"], asked["cwd"], asked["environment"])
            for file in files:
                os.close(file)
            connection.sendall(f"{pid}\n".encode())
            forks[connection] = pid
        if ended in ready:
            os.read(ended, 4096)
        for connection, pid in list(forks.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                with suppress(OSError):  # nobody may wait for it any more
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                connection.close()
                del forks[connection]
            elif connection in ready:
                sent = connection.recv(1)
                if sent:
                    os.kill(pid, sent[0])
                else:
                    _kill(pid)
                    os.waitpid(pid, 0)
                    connection.close()
                    del forks[connection]
    for pid in forks.values():
        _kill(pid)


def _kill(pid: int) -> None:
    """A fork and its children, whether or not it has its session yet."""
    for kill in (os.kill, os.killpg):
        with suppress(OSError):
            kill(pid, signal.SIGKILL)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


def _modules_of(*packages: str) -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in packages]


class _Hidden(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Prefect's modules as they are imported the first time: with the settings of this process."""

    def __init__(self) -> None:
        self._modules = {name: sys.modules.pop(name) for name in _modules_of("prefect")}
        self._spec = self._modules["prefect"].__spec__

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "prefect":
            return None
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = list(self._modules["prefect"].__path__)
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return self._modules["prefect"]

    def exec_module(self, module: types.ModuleType) -> None:
        sys.meta_path.remove(self)
        sys.modules.update(self._modules)
        module.__spec__ = self._spec
        from prefect.context import refresh_global_settings_context
        from prefect.logging.configuration import PROCESS_LOGGING_CONFIG, setup_logging

        refresh_global_settings_context()
        PROCESS_LOGGING_CONFIG.clear()
        setup_logging()


def use(program: str) -> None:
    """Start other processes of Python, those of multiprocessing as well, by this program."""
    import multiprocessing

    sys.executable = program
    multiprocessing.set_executable(program)


def _become(command: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Run `python *command` in this process, which is a fork, to its end."""
    import atexit
    import runpy
    import traceback

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    if "PRELOADED_PYTHON" in environment:
        use(environment["PRELOADED_PYTHON"])
    more = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [cwd, *more, *(path for path in sys.path if path not in ("", str(_PROJECT)))]
    for name in _modules_of("tests"):
        del sys.modules[name]
    if "prefect" in sys.modules:
        sys.meta_path.insert(0, _Hidden())
    while command[0].startswith("-") and command[0] not in ("-c", "-m"):  # such as -B
        command = command[2:] if command[0] in ("-X", "-W") else command[1:]
    flag, what, arguments = command[0], "".join(command[1:2]), command[2:]
    code: object = 0
    try:
        sys.argv = [flag, *arguments]
        if flag == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            if flag != "-c":  # a file
                sys.argv, main.__file__ = command, flag
                sys.path[0] = str(Path(flag).parent)
                what = Path(flag).read_text(encoding="utf-8")
            exec(compile(what, "<string>" if flag == "-c" else flag, "exec"), main.__dict__)
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As an interpreter ends.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _client(*command: str) -> int:
    """`python` of a folder made by `python()`: a fork with this process' files, directory and environment."""
    files = [int(name) for name in os.listdir("/dev/fd")]
    inherited = {number: number for number in files if number < 3 or _inheritable(number)}
    connection = _Connection(command, os.getcwd(), dict(os.environ), inherited)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: connection.send(number))
    for number in inherited:
        if number > 2:
            os.close(number)  # the fork alone holds its ends of pipes
    code = connection.wait()
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _inheritable(number: int) -> bool:
    try:
        return os.get_inheritable(number)
    except OSError:  # it was open to list the others
        return False


if __name__ == "__main__":
    if sys.flags.no_site:
        sys.exit(_client(*sys.argv[1:]))
    _serve(sys.argv[1], int(sys.argv[2]))
