"""Bundles behind addresses: a run with its store, a published run, a registered version."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from coalora.errors import CoaloraError
from coalora.export.bundle import Bundle
from coalora.export.device import export_for
from pipeline import sources
from pipeline.s3.client import S3Location
from pipeline.settings.sections import storage_settings
from pipeline.store.publish import publish
from pipeline.tracking.registry import register
from pipeline.tracking.runs import Tracker
from tests import shared
from tests.s3_server import bucket
from tests.tiny_run import TinyRun, at_home, tiny_run


@pytest.fixture(scope="module")
def run() -> Iterator[TinyRun]:
    made = tiny_run()
    with at_home(made.home):
        yield made


def test_a_run_with_its_store_knows_where_the_base_is(run: TinyRun, tmp_path: Path) -> None:
    found = sources.open_run(run.folder)
    assert found.base is not None
    assert found.about["run"]["pipeline"] == "tiny"
    made = export_for(found.bundle, tmp_path / "out", bits=3.0, base=found.base)
    assert made.adapted.digest == Bundle.load(run.folder / "bundle").adapt(3.0).digest


def test_weights_that_a_bundle_lacks_come_from_the_store(run: TinyRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    whole = Bundle.load(folder / "bundle")
    shutil.rmtree(folder / "bundle")
    whole.save(folder / "bundle", quantized=False)
    assert not Bundle.load(folder / "bundle").carries_statistics
    found = sources.open_run(folder)
    export_for(found.bundle, tmp_path / "out", bits=2.5, base=found.base)
    name = "base/quantized.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (run.folder / "export/2.5-bits" / name).read_bytes()


def test_a_published_run_is_fetched_without_its_exports(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bucket(monkeypatch, "models"):
        published = publish(run.folder, S3Location.of(storage_settings(None, {"bucket": "models", "prefix": "p"})))
        found = sources.open_bucket(published.address)
    assert found.bundle.tables.base_digest == Bundle.load(run.folder / "bundle").tables.base_digest
    (folder,) = (run.home / "downloads").iterdir()
    assert not (folder / "export").exists()
    shutil.rmtree(folder)


def test_a_registered_version_is_opened_by_its_alias(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(shared.mlflow_database(tmp_path), "tests", tmp_path / "mlartifacts")
    stored = shutil.copytree(run.folder / "bundle", tmp_path / ("0" * 64))  # as the store names it
    register(
        tracker.open_run("a", "a run"), stored, "a", "phone",
        hypervolume=1.0, tags={"hypervolume_reference": "x"}, description="a bundle",
    )  # fmt: skip
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.tracking_uri)
    found = sources.open_registered("models:/phone@champion")
    assert found.base is not None
    assert found.about["run"]["registered"] == "phone/1"
    assert found.bundle.adapt(3.0).digest == Bundle.load(run.folder / "bundle").adapt(3.0).digest
    assert found.bundle.statistics is not None
    again = sources.open_registered("models:/phone/1")
    assert len(again.bundle.members) == len(found.bundle.members)
    with pytest.raises(CoaloraError, match="gives no models:/phone@nobody"):
        sources.open_registered("models:/phone@nobody")
    with pytest.raises(CoaloraError, match="no address of a registered version"):
        sources.open_registered("models:/phone")
    shutil.rmtree(run.home / "downloads")
