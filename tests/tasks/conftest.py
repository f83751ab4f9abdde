"""The tiny run that the tasks' tests read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tiny_run import TinyRun, at_home, tiny_run


@pytest.fixture(scope="module")
def run() -> Iterator[TinyRun]:
    made = tiny_run()
    with at_home(made.home):
        yield made
