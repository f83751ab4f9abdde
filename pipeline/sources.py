"""Bundles behind addresses: a finished run with its store, a published run in a bucket, a version in MLflow's registry.

Downloads stay under `COALORA_HOME/downloads` until `coalora prune` frees them, checked by the bundle's own digests when
they are read.
"""

import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from coalora.errors import CoaloraError
from coalora.export import source as sources
from coalora.export.bundle import HEADER
from coalora.export.source import Source
from coalora.files import digest, read_json
from coalora.parse import parse_yaml
from pipeline.environment import coalora_home, used_now
from pipeline.inputs.fingerprint import model_digest
from pipeline.inputs.loaders import MODEL, BaseModel, load_input_statistics
from pipeline.s3.client import S3Address
from pipeline.scrub import one_line, scrub_text
from pipeline.settings.definitions import validate_settings
from pipeline.settings.sections import Settings, storage_settings
from pipeline.store.publish import retrieve
from pipeline.store.store import Artifact, default_store
from pipeline.tracking.server import place_of_runs, require_server

ARTIFACTS = ("base", "benchmark", "tables", "bundle")


def read_run(folder: Path) -> tuple[Settings, dict[str, Artifact]]:
    """Settings of a finished run, and its `ARTIFACTS`."""
    file = folder / "run.json"
    if not file.is_file():
        raise CoaloraError(
            f"{folder} is no run folder: it holds no run.json",
            remedy="Name one such as runs/demo/latest, or run the pipeline first (`coalora run demo`)",
        )
    record: Any = read_json(file)
    try:
        settings = validate_settings(record["settings"], str(file))
        return settings, {n: Artifact.model_validate(record[n]) for n in ARTIFACTS}
    except CoaloraError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        reason = "artifacts that do not fit" if isinstance(error, ValidationError) else repr(error)
        raise CoaloraError(
            f"{file} is no record of a finished run of this version ({reason})",
            remedy="Run the pipeline again, which writes it anew",
        ) from error


def open_run(folder: Path) -> Source:
    """The bundle of a run's folder; base model and statistics from the store, where they are there."""
    _, artifacts = read_run(folder)
    found, store = sources.open_run(folder), default_store()
    if not found.bundle.carries_statistics and not store.problems(artifacts["tables"]):
        found.bundle.statistics = load_input_statistics(artifacts["tables"], found.bundle.tables)
    if store.problems(artifacts["base"]):
        return found
    base = BaseModel(artifacts["base"])
    return replace(found, base=base.path, trust_remote_code=base.trusted)


def open_bucket(address: str) -> Source:
    """The bundle of a published run, `s3://BUCKET/PREFIX/runs/PIPELINE/RUN`; only its files are fetched."""
    folder = _downloads(address)
    found = retrieve(S3Address.parse(address), folder, storage_settings(None, {}), only=["run.json", "bundle/*"])
    if not found.n_files:
        raise CoaloraError(f"{address} holds no bundle", remedy="Publish the run again with `coalora upload`")
    return _at_home(sources.open_run(folder))


def open_registered(address: str) -> Source:
    """The bundle of a registered version, `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
    from mlflow.artifacts import download_artifacts

    client, version = registered_version(address)
    uri = place_of_runs()
    folder = _downloads(f"{scrub_text(uri)} {version.name} {version.version} {version.run_id}")
    if not (folder / HEADER).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = client.get_model_version_download_uri(version.name, version.version)
        if place.startswith("models:/"):  # a server's; a database names the folder
            place = client.get_logged_model(place.removeprefix("models:/")).artifact_location
        place = place.rstrip("/")
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:

            def fetch(name: str) -> Path:
                return Path(download_artifacts(artifact_uri=f"{place}/{name}", dst_path=scratch, tracking_uri=uri))

            got = fetch(_bundle_of(fetch("MLmodel"), address))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(got, folder)
    found = sources.open_source(folder)
    run = {"mlflow_run_id": version.run_id, "registered": f"{version.name}/{version.version}"}
    return _at_home(replace(found, about={"run": run}))


def _bundle_of(description: Path, address: str) -> str:
    """Path of the bundle among a version's files, as its `MLmodel` names it."""
    content = parse_yaml(description.read_text(encoding="utf-8"), f"MLmodel of {address}")
    try:
        path = content["flavors"]["python_function"]["artifacts"]["bundle"]["path"]
    except (KeyError, TypeError):
        path = None
    if not (isinstance(path, str) and re.fullmatch(r"artifacts/[\w-][\w.-]*", path)):
        raise CoaloraError(
            f"{address} is no version of ours: it has no bundle", remedy="Name one that a run registered"
        )
    return path


def _at_home(found: Source) -> Source:
    """With the folder of its base model, where a run made or unpacked it at this home."""
    for folder in default_store().folder.glob(f"*/*/{MODEL}"):
        if model_digest(folder) == found.bundle.tables.base_digest:
            return replace(found, base=folder)
    return found


def open_address(address: str) -> Source:
    """The bundle at any address that a checkout knows."""
    return sources.open_source(address, {"run": open_run, "s3": open_bucket, "models": open_registered})


def registered_version(address: str) -> tuple[Any, Any]:
    """(client, version) of `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri, name = place_of_runs(), address.removeprefix("models:/")
    if "@" not in name and name.count("/") != 1:
        raise CoaloraError(
            f"{address} is no address of a registered version",
            remedy="Write models:/NAME@champion or models:/NAME/3",
        )
    require_server(uri, existing=True)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        if "@" in name:
            return client, client.get_model_version_by_alias(*name.split("@", 1))
        return client, client.get_model_version(*name.split("/"))
    except MlflowException as error:
        raise CoaloraError(
            f"MLflow at {scrub_text(uri)} gives no {address} ({scrub_text(one_line(error))[:300]})",
            remedy="Look the name up on MLflow's page of models, and set MLFLOW_TRACKING_URI to its server",
        ) from error


def _downloads(address: str) -> Path:
    return used_now(coalora_home() / "downloads" / digest(address)[:16])
