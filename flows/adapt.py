"""Any budget from a finished run: configuration, adapter and packed base, without training.

python -m flows.adapt runs/demo/latest --budget 3.5 --out adapted/3.5-bits
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from coalora.calibrate.costs import UNITS
from coalora.errors import CoaloraError
from coalora.export.bundle import Bundle
from coalora.files import read_json
from flows.cli import run_command
from pipeline.settings.definitions import validate_settings
from pipeline.settings.sections import RuntimeSettings, Settings
from pipeline.store.store import Artifact, Store
from tasks.export import write_export

ARTIFACTS = ("base", "benchmark", "tables", "bundle")


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m flows.adapt", description="Adapt a finished run to any budget.")
    made.add_argument("run", metavar="RUN", type=Path, help="run folder, such as runs/demo/latest")
    made.add_argument(
        "--budget",
        type=float,
        required=True,
        help="at most, in units of the run's cost (average bits)",
    )
    made.add_argument("--out", type=Path, required=True, help="folder to write; must not hold files")
    made.add_argument("--no-base", action="store_true", help="write the adapter and its configuration only")
    options = made.parse_args(arguments)
    settings, artifacts = read_run(options.run)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise CoaloraError("the output folder must be new or empty", got=options.out, remedy="name another folder")
    for name in ("bundle",) if options.no_base else artifacts:
        if problems := Store().problems(artifacts[name]):
            raise CoaloraError(
                "the run's artifacts must be in the store",
                got=f"{name}: {problems[0]}",
                remedy="call this where the pipeline ran (or set COALORA_HOME), or run the pipeline again",
            )
    started = time.perf_counter()
    configuration = Bundle.load(Store().path(artifacts["bundle"])).select(options.budget)
    chosen = time.perf_counter()
    with _all_or_nothing(options.out) as folder:
        facts = write_export(
            folder,
            configuration,
            base=artifacts["base"],
            benchmark=artifacts["benchmark"],
            tables=artifacts["tables"],
            bundle=artifacts["bundle"],
            export=settings.export.model_copy(update={"base": not options.no_base}),
            # The number type is the run's, the device is this machine's.
            runtime=RuntimeSettings(dtype=settings.runtime.dtype).resolved(),
            seed=settings.seed,
        )
    unit = UNITS[settings.cost.kind].unit
    cost = "" if settings.cost.kind == "average_bits" else f"{facts['cost']:.4g} {unit}, "
    print(
        f"{options.out}: {cost}{facts['average_bits']:.3f} average bits, adapter {facts['adapter_bytes']:,} bytes, "
        f"base {facts['base_bytes']:,} bytes; chosen in {1000 * (chosen - started):.0f} ms, "
        f"written in {time.perf_counter() - chosen:.1f} s"
    )
    return 0


def read_run(folder: Path) -> tuple[Settings, dict[str, Artifact]]:
    """Settings of a finished run, and its `ARTIFACTS`.

    Raises:
        CoaloraError: no run folder, or one whose record is damaged or of another version.
    """
    file = folder / "run.json"
    if not file.is_file():
        raise CoaloraError(
            "a run folder is what a finished pipeline wrote",
            got=folder,
            expected="for example runs/demo/latest",
            remedy="run the pipeline first: python -m flows.pipeline demo",
        )
    try:
        record: Any = read_json(file)
        settings = validate_settings(record["settings"], str(file))
        return settings, {n: Artifact.model_validate(record[n]) for n in ARTIFACTS}
    except CoaloraError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        reason = "artifacts that do not fit" if isinstance(error, ValidationError) else repr(error)
        raise CoaloraError(
            "run.json is the record of a finished run of this version",
            got=f"{file}: {reason}",
            remedy="run the pipeline again, which writes it anew",
        ) from error


@contextmanager
def _all_or_nothing(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when all is written, and goes when something fails."""
    target = Path(os.path.abspath(target))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


if __name__ == "__main__":
    run_command(main)
