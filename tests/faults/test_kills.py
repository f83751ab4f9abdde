"""A run that is killed at random moments, again and again, ends with the result of one that was left alone.

KILLS=100 python -m pytest tests/faults/test_kills.py     # five by default
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coalora.files import file_sha256
from tests.flows.checkout import Checkout

pytestmark = pytest.mark.servers

KILLS = int(os.environ.get("KILLS", "5"))
SEED = int(os.environ.get("KILLS_SEED", "0"))
COMMAND = ("-m", "coalora", "run", "tiny", "--set", "stages.checkpoint_seconds=0.01")


def result(checkout: Checkout) -> dict[str, str]:
    """sha256 by name of what a run leaves: numbers, bundle, exports and the sets of all rounds."""
    folders = [checkout.latest, checkout.root / "configurations"]
    files = [file for folder in folders for file in sorted(folder.resolve().rglob("*")) if file.is_file()]
    kept = [f for f in files if f.suffix in (".safetensors", ".json") and f.name not in ("run.json", "result.json")]
    return {str(f.relative_to(checkout.root.resolve())): file_sha256(f) for f in kept}


def killed(checkout: Checkout, seconds: float) -> bool:
    """Start the run and kill it with all of its children after so many seconds; whether it was not done before."""
    process = checkout.start(*COMMAND)
    timer = threading.Timer(seconds, lambda: os.killpg(process.pid, signal.SIGKILL))
    timer.start()
    printed = process.stdout.read()
    process.wait(60)
    timer.cancel()
    assert process.returncode in (0, -signal.SIGKILL), printed[-6000:]
    return process.returncode != 0


def forget(root: Path) -> None:
    for name in (".coalora", "runs", "configurations", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(root / name, ignore_errors=True)


def test_every_result_is_that_of_a_run_that_was_left_alone(make_checkout: Callable[[str], Checkout]) -> None:
    checkout, moments = make_checkout("killed"), random.Random(SEED)
    began = time.monotonic()
    checkout.run(*COMMAND)
    whole = time.monotonic() - began
    undisturbed = result(checkout)
    assert len(undisturbed) > 10
    forget(checkout.root)
    left = KILLS
    while left:
        seconds = moments.uniform(0, whole)
        if killed(checkout, seconds):
            left -= 1
            continue
        assert result(checkout) == undisturbed, f"{left} kills before the end, seed {SEED}"
        forget(checkout.root)
    checkout.run(*COMMAND)
    assert result(checkout) == undisturbed
