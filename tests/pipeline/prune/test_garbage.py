"""What no published run refers to goes; what any refers to, or may be under way, stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coalora.cli import main
from coalora.errors import CoaloraError
from pipeline.prune.garbage import Garbage, find_shared_garbage, remove_shared
from pipeline.prune.roots import Roots, Used
from pipeline.s3.client import S3Location
from pipeline.store.publish import publish, retrieve, withdraw
from pipeline.store.shared import SharedStore
from pipeline.store.store import Store
from tests.commands import refused

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


def left_over(place: S3Location, older_than: float = 0, **used: set[str]) -> list[Garbage]:
    return find_shared_garbage(SharedStore(place), Used(**used), Roots(), older_than=older_than)


def delete_left_over(place: S3Location, found: list[Garbage]) -> list[Garbage]:
    return remove_shared(SharedStore(place), found, Used(), Roots(), older_than=0)


def objects(place: S3Location) -> set[str]:
    return {o.name for o in place.list("objects/")}


def test_nothing_is_left_over_while_every_run_is_wanted(two: S3Location) -> None:
    assert len(objects(two)) == 5  # two records, two adapters, one base
    assert left_over(two) == []


def test_a_withdrawn_run_leaves_what_it_alone_referred_to(two: S3Location, tmp_path: Path) -> None:
    withdraw(SharedStore(two), "demo", "b")
    found = left_over(two)
    assert len(found) == 2
    assert len(delete_left_over(two, found)) == 2
    got = retrieve(two.address.below("runs/demo/a"), tmp_path / "got", two.settings)
    assert (got.run, (tmp_path / "got/base.txt").read_text()) == ("a", "shared")
    with pytest.raises(CoaloraError, match="There is no run demo/latest"):
        retrieve(two.address.below("runs/demo/latest"), tmp_path / "none", two.settings)  # it was b


def test_what_is_young_stays(two: S3Location) -> None:
    withdraw(SharedStore(two), "demo", "b")
    assert left_over(two, older_than=3600) == []


def test_what_a_run_needs_again_meanwhile_stays(two: S3Location, tmp_path: Path) -> None:
    withdraw(SharedStore(two), "demo", "b")
    found = left_over(two)
    publish(tmp_path / "b", two)
    before = objects(two)
    assert delete_left_over(two, found) == []
    assert objects(two) == before


def test_a_damaged_manifest_stops_the_search(two: S3Location) -> None:
    two.put_bytes("runs/demo/b/manifest.json", b"{}")
    with pytest.raises(CoaloraError, match="no manifest of this version"):
        left_over(two)


def test_a_run_that_is_not_there_cannot_be_withdrawn(two: S3Location) -> None:
    with pytest.raises(CoaloraError, match="demo/a, demo/b"):
        withdraw(SharedStore(two), "demo", "c")


@pytest.fixture
def store(two: S3Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A machine whose shared store is where the runs are published."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", two.endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return Store(tmp_path / "home", shared_url=str(two))


def test_artifacts_go_by_the_same_rules_with_their_records_and_what_runs_share_stays(
    two: S3Location, store: Store
) -> None:
    kept = store.put("text", lambda folder: (folder / "a").write_text("kept") and None)

    def two_files(folder: Path) -> None:
        (folder / "a").write_text("shared")
        (folder / "b").write_text("own")

    unused = store.put("text", two_files)
    shared = store.shared
    assert shared is not None
    for artifact in (kept, unused):
        store.share(artifact)
        shared.write_record(f"text-{artifact.digest}", artifact)
    two.put_bytes("records/text-broken.json", b"{")
    assert left_over(two, older_than=3600) == []
    found = left_over(two, digests={kept.digest})
    assert sorted((item.kind, item.why) for item in found) == [
        ("artifact", "no run, version or DVC file refers to it"),
        ("object", "no run, version or DVC file refers to it"),
        ("record", "of an artifact that goes or is gone"),
        ("record", "unreadable"),
    ]
    assert len(delete_left_over(two, found)) == 4
    assert shared.record(f"text-{kept.digest}") == kept
    assert shared.record(f"text-{unused.digest}") is None
    assert store.share(unused) == 3  # `shared` is still there for the runs
    assert store.problems(kept) == []


def test_a_lease_that_nobody_holds_any_more_goes(two: S3Location) -> None:
    two.put_bytes("locks/a.json", b"{}")
    assert left_over(two, older_than=3600) == []
    assert [(item.kind, item.place) for item in left_over(two)] == [("lock", "locks/a.json")]


def test_the_command_shows_first_and_removes_when_told_to(
    two: S3Location, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COALORA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said = ["prune", "--at", str(two), "--endpoint-url", two.endpoint, "--older-than", "0", "--root", str(tmp_path)]
    before = objects(two)
    assert main([*said, "--withdraw", "demo/a"]) == 0
    shown = capsys.readouterr().out
    assert "1 runs that stay, 1 withdrawn" in shown
    assert "in 2 to free" in shown
    assert objects(two) == before
    assert main([*said, "--withdraw", "demo/a", "--delete"]) == 0
    assert "Removed 2 of 2" in capsys.readouterr().out
    assert len(objects(two)) == 3


def test_the_command_refuses_what_it_cannot_mean(two: S3Location) -> None:
    assert "names published runs, and no place" in refused("prune", "--withdraw", "demo/a")
    told = refused("prune", "--at", two, "--withdraw", "a", "--endpoint-url", two.endpoint)
    assert "PIPELINE/RUN" in told
    for days in ("nan", "inf", "-1"):
        assert "number of days" in refused("prune", "--older-than", days)
