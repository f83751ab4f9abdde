"""Commands in processes that begin with the heavy libraries imported.

Importing torch, transformers and PEFT costs a process some eight seconds of processor time before it does anything,
and tests of whole runs start dozens. A fork server imports them once; each command is a fork of it: a process in a
session of its own, with its own directory, environment and modules of the project, killed and waited for like any
other. They share the seed of hashes; stages under `dvc repro` do not.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import sys
import threading
import traceback
import types
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

_PROJECT = str(Path(__file__).parents[1])
_SERVER = get_context("forkserver")
# None of them reads a variable at import that a test sets; Prefect does.
_SERVER.set_forkserver_preload(["peft", "accelerate", "scipy.stats", "scipy.optimize", "pandas", "sqlalchemy"])


class Process:
    """`python *command` in `cwd` with `environment`; `stdout` has what it and its children print, stderr included."""

    def __init__(self, command: tuple[str, ...], cwd: Path, environment: dict[str, str]) -> None:
        reader, writer = _SERVER.Pipe(duplex=False)
        self._process = _SERVER.Process(target=_run, args=(command, str(cwd), environment, writer))
        self._process.start()
        writer.close()
        self.stdout: TextIO = os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace")
        reader.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.returncode

    def read(self, timeout: float) -> str:
        """All that it prints until its end; it is killed with its children after `timeout` seconds."""
        killer = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
        killer.start()
        with self.stdout:
            printed = self.stdout.read()
        self.wait()
        killer.cancel()
        return printed


def _run(command: tuple[str, ...], cwd: str, environment: dict[str, str], output: Connection) -> None:
    os.setsid()
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [cwd, *(path for path in sys.path if path not in ("", _PROJECT))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    flag, what, *arguments = command
    code: object = 0
    try:
        sys.argv = [flag, *arguments]
        if flag == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            assert flag == "-c", command
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(what, main.__dict__)
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As an interpreter ends; multiprocessing would leave out what is registered with atexit.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
