"""Publish a finished run in S3: adapters, packed bases, bundle and report. Sends only what is not there.

    python -m flows.upload runs/demo/latest --to s3://BUCKET/PREFIX

`storage.publish: true` in the settings does the same at the end of every run. pipeline/s3/manifest.py states the
layout.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from coalora.errors import CoaloraError
from coalora.files import read_json
from flows.adapt import read_run
from flows.cli import log_to_terminal, run_command
from pipeline.s3.address import S3Address
from pipeline.settings.storage import StorageSettings, storage_settings


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m flows.upload", description="Publish a finished run in S3.")
    made.add_argument("run", metavar="RUN", type=Path, help="run folder, such as runs/demo/latest")
    made.add_argument(
        "--to", metavar="s3://BUCKET/PREFIX", help="where to; by default storage.bucket of the run's settings"
    )
    add_server_arguments(made)
    options = made.parse_args(arguments)
    settings, _ = read_run(options.run)
    storage = server_settings(options, settings.storage)
    if options.to:
        address = S3Address.parse(options.to)
        storage = storage.model_copy(update={"bucket": address.bucket, "prefix": address.prefix})
    if storage.bucket is None:
        raise CoaloraError("a place to publish in must be named", remedy="give --to s3://BUCKET/PREFIX")
    log_to_terminal()

    from pipeline.s3.client import S3Location
    from pipeline.s3.publication import publish
    from tasks.publish_s3 import tag_address, words

    found = publish(options.run, S3Location.of(storage))
    print(f"{found.address}: {words(found)}")
    run_id = read_json(options.run / "run.json").get("mlflow_run_id")
    for version in tag_address(settings.tracking, run_id, found.address) if run_id else []:
        print(f"registered model {version}: tagged with this address")
    return 0


def add_server_arguments(made: argparse.ArgumentParser) -> None:
    """How the server is reached; what is left out comes from AWS's own variables and files."""
    made.add_argument("--endpoint-url", help="server (default: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, else AWS)")
    made.add_argument("--region", help="region (default: AWS_REGION or the profile's)")
    made.add_argument("--profile", help="profile of ~/.aws that credentials come from (default: AWS_PROFILE)")


def server_settings(options: argparse.Namespace, base: StorageSettings | None = None) -> StorageSettings:
    """`base` with the given options in place of its own values.

    Raises:
        CoaloraError: a value that does not fit.
    """
    given = {name: getattr(options, name) for name in ("endpoint_url", "region", "profile")}
    return storage_settings(base, {name: value for name, value in given.items() if value is not None})


if __name__ == "__main__":
    run_command(main)
