"""Ways to run stages: inside a flow, and without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import prefect

from pipeline.stages.runner import DirectRunner, PrefectRunner


def writer(text: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "a.txt").write_text(text)

    return build


def in_flow(body: Callable[[PrefectRunner], Any]) -> Any:
    """Run `body(runner)` inside a flow run and return its value."""
    values: list[Any] = []

    @prefect.flow(name="engine-test")
    def run() -> None:
        values.append(body(PrefectRunner()))

    run()
    return values[0]


def directly(body: Callable[[DirectRunner], Any]) -> Any:
    return body(DirectRunner())
