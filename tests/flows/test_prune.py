"""What nothing refers to goes, after it was shown; what anything refers to, uses or has just made stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from coalora.cli import main
from pipeline import sources
from pipeline.prune.garbage import find_garbage, remove
from pipeline.prune.roots import Journal, Roots
from pipeline.stages.runner import DirectRunner, stage
from pipeline.store.store import Artifact, default_store
from pipeline.versioning.sets import write_set
from tests.commands import refused
from tests.pipeline.store.stores import ROOT

DAY = 24 * 3600.0


@stage("pruned-text")
def text(*, n: int) -> Artifact:
    return default_store().put("text", lambda folder: (folder / "a.txt").write_text(f"{n}" * 1000) and None)


@stage("pruned-set")
def a_set(*, n: int) -> Artifact:
    def build(folder: Path) -> None:
        (folder / "configurations.json").write_text(json.dumps({"n": n}))

    return default_store().put("configuration-set", build)


@dataclass
class Home:
    """A home and a checkout; everything in it is made ten days ago."""

    root: Path
    made: dict[str, Artifact] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.root / "home"

    def journal(self, identity: str, *numbers: int) -> Journal:
        """A run of this identity that has made these results."""
        journal = Journal.of("demo", identity.ljust(64, "0"))
        runner = DirectRunner()
        with journal.in_use():
            for n in numbers:
                made = runner.run(text, n=n)
                self.made[str(n)] = made
                journal.note("pruned-text", runner.history[-1].key, made)
        return journal

    def age(self, days: float = 10) -> None:
        then = time.time() - days * DAY
        for path in [*self.home.rglob("*")]:
            os.utime(path, (then, then))

    def has(self, name: str) -> bool:
        return default_store().place(self.made[name]).is_dir()

    def prune(self, *options: str) -> int:
        return main(["prune", "--root", str(self.root), *options])

    def files(self) -> set[str]:
        return {str(p.relative_to(self.home)) for p in self.home.rglob("*") if p.is_file() and p.suffix != ".lock"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.setenv("COALORA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "home" / "results"}):
        yield Home(tmp_path)


def run_folder(home: Home, identity: str, *artifacts: Artifact) -> None:
    folder = home.root / "runs" / "demo" / identity[:8]
    folder.mkdir(parents=True)
    record = {"identity": identity.ljust(64, "0"), "bundle": artifacts[0].model_dump() if artifacts else None}
    (folder / "run.json").write_text(json.dumps(record))
    latest = folder.parent / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(folder.name)


def test_what_goes_is_shown_first_and_a_run_that_still_exists_keeps_all_its_stages(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    home.journal("aaaa", 1, 2)
    home.journal("bbbb", 2, 3)
    run_folder(home, "aaaa")
    home.age()
    before = home.files()
    assert home.prune() == 0
    shown = capsys.readouterr().out
    assert home.files() == before  # by default nothing is touched
    assert "1 run folders" in shown
    assert home.made["3"].digest in shown
    assert home.made["1"].digest not in shown
    assert "with --delete" in shown
    assert home.prune("--delete") == 0
    assert [home.has(n) for n in "123"] == [True, True, False]
    removed = before - home.files()
    assert len([name for name in removed if name.startswith("results/pruned-text-")]) == 1
    assert {name for name in removed if name.startswith("journals/")} == {
        f"journals/demo-{'bbbb'.ljust(64, '0')}.jsonl"
    }
    runner = DirectRunner()
    runner.run(text, n=1)
    runner.run(text, n=3)  # and what is gone is made again
    assert [record.cached for record in runner.history] == [True, False]
    capsys.readouterr()
    home.age()
    home.prune("--delete")
    assert "Removed" in capsys.readouterr().out


def test_what_was_made_or_used_lately_stays(home: Home) -> None:
    home.journal("aaaa", 1, 2)
    home.age(10)
    runner = DirectRunner()
    runner.run(text, n=1)  # used again, by a run that keeps no journal
    home.prune("--delete")
    assert (home.has("1"), home.has("2")) == (True, False)
    home.age(5)
    home.prune("--delete")
    assert home.has("1")
    home.prune("--delete", "--older-than", "4")
    assert not home.has("1")


def test_what_is_used_between_the_list_and_the_removal_stays(home: Home) -> None:
    home.journal("aaaa", 1)
    home.age()
    store = default_store()
    found = find_garbage(store, Roots(), home.home / "results", older_than=DAY)
    assert DirectRunner().run(text, n=1) == home.made["1"]
    gone = {item.kind: remove(store, item, older_than=DAY) for item in found}
    assert gone["artifact"] is False
    assert store.verify(home.made["1"]) == []


def test_a_run_under_way_keeps_what_it_lists_however_old(home: Home) -> None:
    journal = home.journal("aaaa", 1)
    home.age()
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom pipeline.prune.roots import Journal\n"
        "with Journal(Path(sys.argv[1])).in_use():\n    print('used', flush=True)\n    time.sleep(60)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program, str(journal.path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == "used\n"
        home.prune("--delete")
        assert home.has("1")
    finally:
        run.kill()
        run.wait(30)
    home.age()
    home.prune("--delete")
    assert not home.has("1")


def test_a_run_folder_a_copy_and_a_set_under_dvc_each_keep_what_they_name(home: Home) -> None:
    home.journal("aaaa", 1, 2, 3)
    home.made["set"] = DirectRunner().run(a_set, n=1)
    home.made["other set"] = DirectRunner().run(a_set, n=2)
    run_folder(home, "bbbb", home.made["1"])  # a run of which only the record is left
    default_store().materialize(home.made["2"], home.root / "outputs" / "export")
    file = write_set("demo", 0, {"n": 1}, home.root)
    import hashlib

    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    file.with_name(file.name + ".dvc").write_text(f"outs:\n- md5: {md5}\n  hash: md5\n  path: {file.name}\n")
    home.age()
    home.prune("--delete")
    assert {name: home.has(name) for name in home.made} == {
        "1": True, "2": True, "3": False, "set": True, "other set": False,
    }  # fmt: skip


def test_mlflows_runs_and_versions_keep_their_runs_until_they_are_deleted(home: Home) -> None:
    from pipeline.tracking.runs import open_tracker

    home.journal("aaaa", 1)
    home.journal("bbbb", 2)
    tracker = open_tracker("coalora", None)
    for identity in ("aaaa", "bbbb"):
        tracker.open_run(identity.ljust(64, "0"), "demo").finish()
    (kept,) = [r for r in tracker.client.search_runs([tracker.experiment_id]) if "aaaa" in str(r.data.tags)]
    for run in tracker.client.search_runs([tracker.experiment_id]):
        if run.info.run_id != kept.info.run_id:
            tracker.client.delete_run(run.info.run_id)
    home.age()
    home.prune("--delete")
    assert (home.has("1"), home.has("2")) == (True, False)
    tracker.client.create_registered_model("coalora-demo")
    tracker.client.create_model_version("coalora-demo", "file:///nowhere", run_id=kept.info.run_id)
    tracker.client.delete_run(kept.info.run_id)
    home.age()
    home.prune("--delete")
    assert home.has("1")  # its version is registered
    tracker.client.delete_registered_model("coalora-demo")
    home.age()
    home.prune("--delete")
    assert not home.has("1")


def test_nothing_goes_while_mlflow_cannot_be_asked_or_a_run_folder_cannot_be_read(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.journal("aaaa", 1)
    home.age()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    told = refused("prune", "--root", home.root, "--delete", "--tracking-uri", "http://127.0.0.1:1")
    assert "MLflow at http://127.0.0.1:1 does not say" in told
    folder = home.root / "runs" / "demo" / "0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"identity": "aa')
    assert "cannot be read, so that nothing may be removed" in refused("prune", "--root", home.root, "--delete")
    assert home.has("1")


def test_what_killed_processes_left_goes_and_what_living_ones_work_in_stays(home: Home) -> None:
    scratch = home.home / "store" / ".tmp"
    home.journal("aaaa", 1)
    run_folder(home, "aaaa")
    for name in ("killed", "living"):
        (scratch / name).mkdir(parents=True)
        (scratch / name / "half.bin").write_bytes(b"x" * 1000)
        (scratch / f"{name}.lock").touch()
    download = scratch / f"download-{'0' * 64}"
    checkpoint = home.home / "checkpoints" / f"train-{'1' * 64}"
    for folder in (download, checkpoint):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"x" * 1000)
    home.age()
    import filelock

    with filelock.FileLock(scratch / "living.lock"):
        home.prune()
        assert all(p.exists() for p in (scratch / "killed", scratch / "living", download, checkpoint))
        home.prune("--delete")
    assert [p.exists() for p in (scratch / "killed", scratch / "living", download, checkpoint)] == [
        False, True, False, False,
    ]  # fmt: skip
    assert home.has("1")


def test_a_record_that_cannot_be_read_goes_and_files_of_others_stay(home: Home) -> None:
    results = home.home / "results"
    results.mkdir(parents=True)
    (results / f"train-{'0' * 64}").write_text('{"metadata": {"sto')
    (results / "0123456789abcdef").write_text("a result of another flow")
    home.age()
    home.prune("--delete")
    assert [p.name for p in results.iterdir()] == ["0123456789abcdef"]


def test_what_can_be_had_again_goes_when_it_was_not_used_for_long(home: Home) -> None:
    asked, left = sources._downloads("s3://b/runs/demo/1"), sources._downloads("s3://b/runs/demo/2")
    unpacked, beside = home.home / "gguf" / ("0" * 64), home.home / "other"
    for folder in (asked, left, unpacked, beside):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x")
    home.age()
    sources._downloads("s3://b/runs/demo/1")
    home.prune()
    assert unpacked.exists()
    home.prune("--delete")
    assert [folder.exists() for folder in (asked, left, unpacked, beside)] == [True, False, False, True]
