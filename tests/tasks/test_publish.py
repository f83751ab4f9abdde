"""What a run leaves outside of the store is whole, the same the second time, and tells the code it came from."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.inputs.loaders import load_set, load_tables
from pipeline.report.rounds import round_rows
from pipeline.store.store import Artifact
from pipeline.versioning.git import git_commit
from tasks.publish import remove_stale, track_round, track_run, version_set, write_run_folder
from tests.tiny_run import TinyRun, at_home, tiny_run


@pytest.fixture(scope="module")
def run() -> Iterator[TinyRun]:
    made = tiny_run()
    with at_home(made.home):
        yield made


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


def write(run: TinyRun, folder: Path, exports: dict[str, Artifact] | None = None) -> Path:
    exports = exports if exports is not None else {"export/2.5-bits": run.exported.exports[0]}
    made = write_run_folder.fn(
        folder=str(folder),
        report=run.exported.report,
        bundle=run.exported.bundle,
        exports=exports,
        record={"pipeline": "tiny"},
    )
    return Path(made)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_run_folder_holds_report_bundle_exports_and_record(run: TinyRun, tmp_path: Path) -> None:
    folder = write(run, tmp_path / "runs" / "tiny" / "abc")
    names = set(files(folder))
    assert {"report/report.html", "report/front.png", "report/metrics.json", "report/table.md", "run.json"} <= names
    assert {"bundle/adapter.safetensors", "export/2.5-bits/adapter/adapter_model.safetensors"} <= names
    assert "export/2.5-bits/base/quantized.safetensors" in names
    assert json.loads((folder / "run.json").read_text()) == {"pipeline": "tiny"}
    assert os.readlink(folder.parent / "latest") == "abc"  # relative: the folder may move


def test_writing_it_again_touches_no_result(run: TinyRun, tmp_path: Path) -> None:
    folder = write(run, tmp_path / "runs" / "abc")
    before = files(folder)
    write(run, folder)
    after = files(folder)
    assert {k: v for k, v in after.items() if k != "run.json"} == {k: v for k, v in before.items() if k != "run.json"}
    assert sorted(p.name for p in folder.parent.iterdir()) == ["abc", "latest"]


def test_latest_follows_the_last_run(run: TinyRun, tmp_path: Path) -> None:
    first, second = write(run, tmp_path / "a"), write(run, tmp_path / "b")
    assert (tmp_path / "latest").resolve() == second
    write(run, first)
    assert (tmp_path / "latest").resolve() == first


def test_a_damaged_copy_is_made_whole(run: TinyRun, tmp_path: Path) -> None:
    folder = write(run, tmp_path / "abc")
    target = folder / "report" / "table.md"
    before = target.read_bytes()
    target.chmod(0o644)
    target.write_text("damaged")
    (folder / "report" / "extra.txt").write_text("left over")
    write(run, folder)
    assert target.read_bytes() == before
    assert not (folder / "report" / "extra.txt").exists()


def test_git_commit_tells_the_checkouts_commit_and_whether_it_was_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None  # outside of git
    git(tmp_path, "init", "--quiet")
    assert git_commit() is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert len(commit) == 40
    assert git_commit() == commit
    (tmp_path / "b").write_text("not tracked")
    assert git_commit() == commit
    (tmp_path / "a").write_text("2")
    assert git_commit() == f"{commit}-dirty"


def test_without_the_program_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None


def test_a_rounds_set_is_versioned_once_and_a_stale_one_removed(
    run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".dvc").mkdir()
    subprocess.run(["dvc", "init", "--no-scm", "--force", "--quiet"], cwd=tmp_path, check=True, env=_path())
    sets = run.trained.sets
    common = {"pipeline": "tiny", "identity": "0123abcd" * 8, "root": str(tmp_path)}
    added = [version_set.fn(**common, round_index=i, configurations=s) for i, s in enumerate(sets)]
    assert len(set(added)) == len(sets) == 2
    folder = tmp_path / "configurations" / "tiny"
    before = files(folder)
    again = version_set.fn(**common, round_index=1, configurations=sets[1])
    assert again == added[1]
    assert files(folder) == before
    (out,) = yaml.safe_load((folder / "round-01.json.dvc").read_text())["outs"]
    assert out["meta"] == {"pipeline": "tiny", "run": "0123abcd", "round": 1}
    remove_stale.fn(pipeline="tiny", last_round=0, root=str(tmp_path))
    assert sorted(p.name for p in folder.glob("round-*")) == ["round-00.json", "round-00.json.dvc"]


def test_a_round_is_one_nested_mlflow_run_however_often_it_is_logged(run: TinyRun, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    settings = run.settings.model_copy(
        update={"tracking": run.settings.tracking.model_copy(update={"tracking_uri": uri})}
    )
    ids = [
        track_round.fn(
            pipeline="tiny", settings=settings, identity="0" * 64, round_index=1,
            configurations=run.trained.sets[1], tables=run.calibrated.tables, md5="abc",
        )
        for _ in range(2)
    ]  # fmt: skip
    assert ids[0] == ids[1]
    client = MlflowClient(uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == "coalora")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2  # the pipeline's and the round's
    child = client.get_run(ids[0])
    assert child.data.tags["dvc_md5"] == "abc"
    assert child.data.metrics["search/n_members"] == run.trained.sets[1].meta["n_members"]
    assert child.data.metrics["search/hypervolume_after"] >= child.data.metrics["search/hypervolume_before"]


def test_what_was_not_logged_during_a_run_is_logged_at_its_end_and_only_once(run: TinyRun, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = run.settings.model_copy(
        update={"tracking": run.settings.tracking.model_copy(update={"tracking_uri": uri})}
    )
    ids = {
        track_run.fn(
            pipeline="tiny", settings=settings, identity="1" * 64, benchmark=run.calibrated.benchmark,
            tables=run.calibrated.tables, sets=run.trained.sets, versions=["abc", None], states=run.trained.states,
            report=run.exported.report,
        )
        for _ in range(2)
    }  # fmt: skip
    (run_id,) = ids
    client = MlflowClient(uri)
    found = client.get_run(run_id)
    children = client.search_runs([found.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert {c.info.run_name: c.info.status for c in children} == {"initial set": "FINISHED", "round 1": "FINISHED"}
    steps = [point.step for point in client.get_metric_history(run_id, "train/loss/coa")]
    assert sorted(steps) == [0, 1, 2]
    (second,) = (c for c in children if c.info.run_name == "round 1")
    assert [p.step for p in client.get_metric_history(second.info.run_id, "train/loss/coa")] == [2]
    assert {a.path for a in client.list_artifacts(second.info.run_id, "configurations")} == {
        f"configurations/{name}.json" for name in ("configurations", "round", "table")
    }
    assert found.data.tags["mlflow.note.content"].startswith("| budget |")


def test_the_table_of_a_set_counts_the_layers_at_their_stored_bits(run: TinyRun) -> None:
    measured = load_tables(run.calibrated.tables)
    rows = round_rows(load_set(run.trained.sets[1], measured), measured)
    assert [row["average bits"] for row in rows] == sorted(row["average bits"] for row in rows)
    for row in rows:
        counts = [part.split(" at ") for part in row["layers by bits"].split(", ")]
        assert sum(int(n) for n, _ in counts) == len(measured.layers)
        assert min(float(b) for _, b in counts) <= row["average bits"] + 0.05
        assert max(float(b) for _, b in counts) >= row["average bits"] - 0.05


def _path() -> dict[str, str]:
    import sys

    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
