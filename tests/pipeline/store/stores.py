"""A stage that leaves traces, run by processes of their own: two folders are two machines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tests.preloaded import Process

ROOT = Path(__file__).resolve().parents[3]

# Imports, waits for `start-<name>`, and runs the stage, which adds a line to `calls`, waits for `go`, and ends.
PROGRAM = """
import logging, os, sys, time
from pathlib import Path
from pipeline.environment import set_defaults
set_defaults()
import pipeline.store.shared
from pipeline.stages.runner import DirectRunner, stage
from pipeline.store.store import Store, default_store
if "TTL" in os.environ:
    pipeline.store.shared.SharedStore.__init__.__kwdefaults__["ttl"] = float(os.environ["TTL"])
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
logging.getLogger("coalora").setLevel(logging.INFO)
traces = Path(os.environ["TRACES"])

@stage("traced")
def traced(*, n: int):
    with (traces / "calls").open("a") as calls:
        calls.write(f"{os.getpid()}\\n")
    print("begun", flush=True)
    while not (traces / "go").exists():
        time.sleep(0.02)
    return default_store().put("text", lambda folder: (folder / "a.txt").write_text("n" * n) and None)

runner = DirectRunner()
print("ready", flush=True)
while not (traces / f"start-{sys.argv[1]}").exists():
    time.sleep(0.02)
made = runner.run(traced, n=1)
print("done", made.digest, runner.history[0].cached, (default_store().path(made) / "a.txt").read_text(), flush=True)
"""


@dataclass
class Traced:
    """Processes that run the stage `traced`; `traces` is what they share."""

    traces: Path
    environment: dict[str, str]

    @classmethod
    def at(cls, folder: Path, **environment: str) -> Traced:
        folder.mkdir(exist_ok=True)
        (folder / "program.py").write_text(PROGRAM)
        hidden = ("PREFECT_", "COALORA_", "AWS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        own = {"PYTHONPATH": str(ROOT), "TRACES": str(folder), "PREFECT_HOME": str(folder / "prefect")}
        return cls(folder, kept | own | environment)

    def prepare(self, name: str, home: str = "home", **environment: str) -> Process:
        """Start a process that imports what it needs and waits for `let`."""
        environment = self.environment | {"COALORA_HOME": str(self.traces / home)} | environment
        return Process(("program.py", name), self.traces, environment)

    def let(self, name: str) -> None:
        (self.traces / f"start-{name}").touch()

    def go(self) -> None:
        (self.traces / "go").touch()

    @property
    def calls(self) -> int:
        """How often the stage's function has begun."""
        return len((self.traces / "calls").read_text().split())


def until(process: Process, words: str) -> str:
    """Output up to the line with these words."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"{words!r} never came:\n{''.join(lines)}")
