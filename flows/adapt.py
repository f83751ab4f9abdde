"""Any budget from a finished run: configuration, adapter and packed base, without training.

python -m flows.adapt runs/demo/latest --budget 3.5 --out adapted/3.5-bits
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from coalora.errors import CoaloraError
from coalora.export.bundle import Bundle
from coalora.files import read_json
from flows.cli import run_command
from tasks.export import write_export
from tasks.settings import Settings
from tasks.store import Artifact, Store


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m flows.adapt", description="Adapt a finished run to any budget of average bits."
    )
    made.add_argument("run", metavar="RUN", type=Path, help="run folder, such as runs/demo/latest")
    made.add_argument("--budget", type=float, required=True, help="average bits a weight, at most")
    made.add_argument("--out", type=Path, required=True, help="folder to write; must not hold files")
    made.add_argument("--no-base", action="store_true", help="write the adapter and its configuration only")
    options = made.parse_args(arguments)
    record_file = options.run / "run.json"
    if not record_file.is_file():
        raise CoaloraError(
            "a run folder is what a finished pipeline wrote",
            got=options.run,
            expected="for example runs/demo/latest",
            remedy="run the pipeline first: python -m flows.pipeline demo",
        )
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise CoaloraError("the output folder must be new or empty", got=options.out, remedy="name another folder")
    record = read_json(record_file)
    settings = Settings.model_validate(record["settings"])
    artifacts = {name: Artifact.model_validate(record[name]) for name in ("base", "benchmark", "bundle")}
    for name, artifact in artifacts.items():
        problems = Store().verify(artifact)
        if problems:
            raise CoaloraError(
                "the run's artifacts must be in the store",
                got=f"{name}: {problems[0]}",
                remedy=f"run the pipeline again: python -m flows.pipeline {record['pipeline']}",
            )
    started = time.perf_counter()
    bundle = Bundle.load(Store().path(artifacts["bundle"]))
    configuration = bundle.select(options.budget)
    chosen = time.perf_counter()
    facts = write_export(
        options.out,
        configuration,
        base=artifacts["base"],
        benchmark=artifacts["benchmark"],
        bundle=artifacts["bundle"],
        export=settings.export.model_copy(update={"base": not options.no_base}),
        runtime=settings.runtime,
        seed=settings.seed,
    )
    print(
        f"{options.out}: {facts['average_bits']:.3f} average bits, adapter {facts['adapter_bytes']:,} bytes, "
        f"base {facts['base_bytes']:,} bytes; chosen in {1000 * (chosen - started):.0f} ms, "
        f"written in {time.perf_counter() - chosen:.1f} s"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
