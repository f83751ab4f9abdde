"""A device's pair: made once, verified, published with its record last, told to the registered version."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coalora.contents import problems
from coalora.errors import CoaloraError
from pipeline.s3.client import S3Address, S3Location
from pipeline.settings.sections import storage_settings
from pipeline.sources import registered_version
from pipeline.tracking.registry import register, tag_pairs
from pipeline.tracking.runs import Tracker
from tasks.pair import make_pair
from tests import shared
from tests.s3_server import bucket
from tests.tiny_run import TinyRun, at_home, tiny_run


@pytest.fixture(scope="module")
def run() -> Iterator[TinyRun]:
    made = tiny_run()
    with at_home(made.home):
        yield made


@pytest.fixture
def phone(tmp_path: Path) -> str:
    (tmp_path / "phone.yaml").write_text("to: [peft, packed]\nmemory: 1GB\n")
    return str(tmp_path / "phone.yaml")


def test_a_pair_is_made_once_and_damage_is_told(run: TinyRun, tmp_path: Path, phone: str) -> None:
    arguments = {"source": str(run.folder), "profile": phone, "folder": str(tmp_path / "out"), "publish": None}
    first = make_pair.fn(**arguments)
    out = Path(first["folder"])
    assert (first["device"], first["formats"], first["address"]) == ("phone", "packed, peft", None)
    assert problems(out)[1] == []
    record = out / "export.json"
    made = record.stat().st_mtime_ns
    time.sleep(0.01)
    assert make_pair.fn(**arguments) == first
    assert record.stat().st_mtime_ns == made
    (out / "base" / "config.json").write_text("{}")
    with pytest.raises(CoaloraError, match="is not whole"):
        make_pair.fn(**arguments)


def test_a_published_pair_is_that_of_the_folder(
    run: TinyRun, tmp_path: Path, phone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bucket(monkeypatch, "models"):
        row = make_pair.fn(
            source=str(run.folder), profile=phone, folder=str(tmp_path / "out"), publish="s3://models/pairs"
        )
        location = S3Location(S3Address.parse(row["address"]), storage_settings(None, {}))
        stored = {found.name for found in location.list()}
        record = location.get("export.json")
    assert stored == {p.relative_to(row["folder"]).as_posix() for p in Path(row["folder"]).rglob("*") if p.is_file()}
    assert record is not None
    assert record.content == (Path(row["folder"]) / "export.json").read_bytes()


def test_a_version_carries_its_pairs(run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(shared.mlflow_database(tmp_path), "tests", tmp_path / "mlartifacts")
    register(
        tracker.open_run("a", "a run"), run.folder / "bundle", "a", "phone",
        hypervolume=1.0, tags={"hypervolume_reference": "x"}, description="a bundle",
    )  # fmt: skip
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.tracking_uri)
    row = {"device": "p", "bits": 3.0, "bytes": 5, "digest": "d", "folder": "f", "address": None}
    assert tag_pairs(*registered_version("models:/phone@champion"), [row]) == "phone version 1"
    _, version = registered_version("models:/phone/1")
    assert version.tags["device.p"] == "3.000 bits, 5 bytes, d, f"
