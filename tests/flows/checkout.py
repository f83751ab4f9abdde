"""A checkout for an end-to-end test: the code, the tiny pipeline, stores and databases of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.preloaded import Process

PROJECT = Path(__file__).parents[2]
CODE = ("coalora", "pipeline", "tasks", "flows", "infra", "dvc.yaml", ".dvcignore", "pyproject.toml")


@dataclass
class Checkout:
    """A working directory with git and DVC, and commands that run in it."""

    root: Path
    environment: dict[str, str]

    def start(self, *command: str) -> Process:
        return Process(command, self.root, self.environment)

    def run(self, *command: str, expect: int = 0) -> str:
        """Run `python ...` and return what it printed."""
        process = self.start(*command)
        output = process.read(timeout=400)
        assert process.returncode == expect, output[-6000:]
        return output

    def pipeline(self, *changes: str) -> str:
        return self.run("-m", "coalora", "run", "tiny", *(["--set", *changes] if changes else []))

    def stage(self, part: str, *changes: str) -> str:
        return self.run("-m", "coalora", "stage", part, "tiny", *(["--set", *changes] if changes else []))

    def git(self, *command: str) -> str:
        """What `git COMMAND` prints."""
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *identity, *command],
            cwd=self.root,
            env=self.environment,
            check=True,
            text=True,
            capture_output=True,
        )
        return done.stdout

    def repro(self, *options: str) -> str:
        return self.run("-m", "dvc", "repro", *options)

    def kill_at(self, words: str, *command: str) -> str:
        """Start a command, kill it and its children at once when it prints `words`, and return what it printed."""
        process = self.start(*command)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if words in line:
                os.killpg(process.pid, signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait(timeout=60) == -signal.SIGKILL, "".join(lines)[-6000:]
        return "".join(lines)

    @property
    def latest(self) -> Path:
        return self.root / "runs" / "tiny" / "latest"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def computed(output: str) -> list[str]:
    """Stages that ran, in order, from the log lines `stage: computed ...`."""
    return _stages(output, ("computed", "rebuilt"))


def reused(output: str) -> list[str]:
    """Stages whose result was taken from the cache."""
    return _stages(output, ("reused",))


def _stages(output: str, verbs: tuple[str, ...]) -> list[str]:
    found = []
    for line in output.splitlines():
        message = re.sub(r"^(.* - |[\d:]{8}  )", "", line)
        stage, _, rest = message.partition(": ")
        if rest.startswith(verbs):
            found.append(stage)
    return found
