"""`DirectRunner` in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

from tests.preloaded import Process

ROOT = Path(__file__).resolve().parents[3]


def test_direct_runner_starts_no_server_and_reads_its_own_record(tmp_path: Path) -> None:
    """A process as DVC starts it: no API address, an empty PREFECT_HOME, a killed run before."""
    program = (
        "import os, sys\n"
        "from pipeline.environment import set_defaults\n"
        "set_defaults()\n"
        "from pipeline.stages.runner import DirectRunner, stage\n"
        "from pipeline.store.store import default_store\n"
        "@stage('demo')\n"
        "def demo(*, n: int = 1):\n"
        "    if os.environ.get('KILL'):\n"
        "        os._exit(9)\n"
        "    return default_store().put('text', lambda f: (f / 'a.txt').write_text(str(n)) and None)\n"
        "for run in (DirectRunner(), DirectRunner()):\n"
        "    run.run(demo)\n"
        "    print(run.history[0].cached)\n"
    )
    (tmp_path / "program.py").write_text(program)
    hidden = ("PREFECT_", "COALORA_", "KILL")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "COALORA_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
    }

    def run(**more: str) -> tuple[int, str]:
        process = Process(("program.py",), tmp_path, environment | more)
        printed = process.read(timeout=120)
        return process.returncode, printed

    results = tmp_path / "home" / "results"
    assert run(KILL="1") == (9, "")
    assert not list(results.glob("*"))
    assert run() == (0, "False\nTrue\n")
    assert [path.name.startswith("demo-") for path in results.iterdir()] == [True]
    assert not list((tmp_path / "prefect").rglob("*.db*"))
