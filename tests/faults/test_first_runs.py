"""Two first runs at once in a fresh clone: both end well, and nothing is computed twice."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.flows.checkout import Checkout, computed, reused

pytestmark = pytest.mark.servers


def test_two_first_runs_at_once_share_one_home_that_neither_has_made(make_checkout: Callable[[str], Checkout]) -> None:
    checkout = make_checkout("first")
    del checkout.environment["PREFECT_HOME"]  # each home has databases of its own, which both migrate
    shutil.rmtree(checkout.root / ".coalora")
    checkout.environment["HOME"] = str(checkout.root)
    runs = [checkout.start("-m", "coalora", "run", "tiny") for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        printed = list(pool.map(lambda run: run.read(timeout=400), runs))
    for run, text in zip(runs, printed, strict=True):
        assert run.returncode == 0, text[-6000:]
        assert "Traceback" not in text
        assert "locked" not in text
        assert re.findall(r"Registered model: coalora-tiny version (\d+)", text) == ["1"], text[-3000:]
    asked = [len(computed(text)) + len(reused(text)) for text in printed]
    assert asked[0] == asked[1] == sum(len(computed(text)) for text in printed)
