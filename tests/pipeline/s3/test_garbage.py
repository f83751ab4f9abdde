"""What no published run refers to goes; what any refers to, or may be under way, stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coalora.errors import CoaloraError
from flows.prune import main
from pipeline.s3.client import S3Location
from pipeline.s3.garbage import delete_left_over, left_over, withdraw
from pipeline.s3.publication import publish
from pipeline.s3.retrieval import retrieve

pytestmark = pytest.mark.servers


def make_run(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"pipeline": "demo", "run": folder.name}))
    for name, content in files.items():
        (folder / f"{name}.txt").write_text(content)
    return folder


@pytest.fixture
def two(place: S3Location, tmp_path: Path) -> S3Location:
    """Runs `a` and `b`, published; they share the file `base`."""
    publish(make_run(tmp_path / "a", base="shared", adapter="of a"), place)
    publish(make_run(tmp_path / "b", base="shared", adapter="of b"), place)
    return place


def objects(place: S3Location) -> set[str]:
    return {place.name_of(o) for o in place.list("objects/")}


def test_nothing_is_left_over_while_every_run_is_wanted(two: S3Location) -> None:
    assert len(objects(two)) == 5  # two records, two adapters, one base
    assert left_over(two, older_than=0) == []


def test_a_withdrawn_run_leaves_what_it_alone_referred_to(two: S3Location, tmp_path: Path) -> None:
    withdraw(two, "demo", "b")
    found = left_over(two, older_than=0)
    assert len(found) == 2
    assert len(delete_left_over(two, found, older_than=0)) == 2
    got = retrieve(two.address.below("runs/demo/a"), tmp_path / "got", two.settings)
    assert (got.run, (tmp_path / "got/base.txt").read_text()) == ("a", "shared")
    with pytest.raises(CoaloraError, match="must be published before it is downloaded"):
        retrieve(two.address.below("runs/demo/latest"), tmp_path / "none", two.settings)  # it was b


def test_what_is_young_stays(two: S3Location) -> None:
    withdraw(two, "demo", "b")
    assert left_over(two, older_than=3600) == []


def test_what_a_run_needs_again_meanwhile_stays(two: S3Location, tmp_path: Path) -> None:
    withdraw(two, "demo", "b")
    found = left_over(two, older_than=0)
    publish(tmp_path / "b", two)
    before = objects(two)
    assert delete_left_over(two, found, older_than=0) == []
    assert objects(two) == before


def test_a_damaged_manifest_stops_the_search(two: S3Location) -> None:
    two.put_bytes("runs/demo/b/manifest.json", b"{}")
    with pytest.raises(CoaloraError, match="manifest is of the form"):
        left_over(two, older_than=0)


def test_a_run_that_is_not_there_cannot_be_withdrawn(two: S3Location) -> None:
    with pytest.raises(CoaloraError, match="demo/a, demo/b"):
        withdraw(two, "demo", "c")


def test_the_command_shows_first_and_removes_when_told_to(two: S3Location, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["--published", str(two), "--endpoint-url", two.endpoint, "--older-than", "0"]
    before = objects(two)
    assert main([*said, "--withdraw", "demo/a"]) == 0
    shown = capsys.readouterr().out
    assert "1 runs that stay, 1 withdrawn" in shown
    assert "in 2 objects" in shown
    assert objects(two) == before
    assert main([*said, "--withdraw", "demo/a", "--delete"]) == 0
    assert "Removed 2 of 2" in capsys.readouterr().out
    assert len(objects(two)) == 3


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        (["--withdraw", "demo/a"], "names a published run"),
        (["--published", "PLACE", "--withdraw", "a"], "PIPELINE/RUN"),
    ],
)
def test_the_command_refuses_what_it_cannot_mean(two: S3Location, said: list[str], rule: str) -> None:
    said = [str(two) if word == "PLACE" else word for word in said]
    with pytest.raises(CoaloraError, match=rule):
        main([*said, "--endpoint-url", two.endpoint])
