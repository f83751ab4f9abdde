"""Download a published run, or a part of it, verified; after an interruption it goes on where it stopped.

python -m flows.download s3://BUCKET/PREFIX/runs/demo/latest --out demo-run [--only 'export/3-bits/*']
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flows.cli import log_to_terminal, run_command
from flows.upload import add_server_arguments, server_settings
from pipeline.s3.address import S3Address


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m flows.download", description="Download a published run.")
    made.add_argument("address", metavar="s3://BUCKET/PREFIX/runs/PIPELINE/RUN", help="RUN may be `latest`")
    made.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="new or empty folder, or an earlier download"
    )
    made.add_argument(
        "--only",
        metavar="PATTERN",
        nargs="+",
        default=[],
        help="paths to fetch, such as 'export/3-bits/*' (default: all)",
    )
    add_server_arguments(made)
    options = made.parse_args(arguments)
    address = S3Address.parse(options.address)
    storage = server_settings(options)
    log_to_terminal()

    from pipeline.s3.retrieval import retrieve

    found = retrieve(address, options.out, storage, only=options.only)
    print(
        f"{options.out}: run {found.run}, {found.n_files} files, {found.nbytes:,} bytes, all verified; "
        f"{found.fetched_files} fetched, the others were there"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
