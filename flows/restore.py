"""Bring a round's configuration set back, as a file that another run can start with.

python -m flows.restore --mlflow-run ID [--round N] --out FILE
python -m flows.restore --rev GITREV [--pipeline NAME] [--round N] --out FILE
python -m flows.restore --pipeline NAME --out FILE                               # as the checkout is now

python -m flows.pipeline demo --set initial_set.file=FILE
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from coalora.errors import CoaloraError
from coalora.files import replace_file
from flows.cli import log_to_terminal, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m flows.restore", description="Bring a configuration set back.")
    source = made.add_mutually_exclusive_group()
    source.add_argument("--mlflow-run", metavar="ID", help="run of a pipeline, or of one of its rounds")
    source.add_argument(
        "--rev", metavar="GITREV", help="commit, branch, tag or experiment (default: the files as they are)"
    )
    made.add_argument("--pipeline", metavar="NAME", help="where DVC has sets of several")
    made.add_argument("--round", dest="round_index", metavar="N", type=int, help="round (default: the last)")
    made.add_argument("--tracking-uri", help="MLflow's server or database (default: that of this checkout)")
    made.add_argument("--out", metavar="FILE", type=Path, required=True, help="file to write")
    options = made.parse_args(arguments)
    log_to_terminal()

    from pipeline.tracking.tracker import default_place
    from pipeline.versioning.restoring import from_dvc, from_mlflow

    if options.mlflow_run:
        uri = default_place(options.tracking_uri).tracking_uri
        found = from_mlflow(options.mlflow_run, options.round_index, tracking_uri=uri, root=Path.cwd())
    else:
        found = from_dvc(Path.cwd(), rev=options.rev, pipeline=options.pipeline, round_index=options.round_index)
    write_new(options.out, found.content)
    bits = [member["average_bits"] for member in found.members]
    print(
        f"{options.out}: {len(bits)} configurations of round {found.round_index}, {min(bits):.3f} to {max(bits):.3f} "
        f"average bits, from {found.source}\nstart a run with it: --set initial_set.file={options.out}"
    )
    return 0


def write_new(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; one that is there already stays, and is an error unless it is the same.

    Raises:
        CoaloraError: the file exists with other content.
    """
    if path.exists():
        if path.is_file() and path.read_bytes() == content:
            return
        raise CoaloraError("a file that exists is not overwritten", got=path, remedy="name another one, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content)


if __name__ == "__main__":
    run_command(main)
