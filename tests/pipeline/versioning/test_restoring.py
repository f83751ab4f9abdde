"""A round's set comes back by its MLflow run or by a revision, byte for byte, or it is said why not."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from coalora.cli import main
from coalora.errors import CoaloraError
from pipeline.store.store import default_store
from pipeline.versioning.restoring import from_dvc, from_mlflow
from pipeline.versioning.sets import version_file, write_set
from tasks.track_round import track_round
from tests import shared
from tests.commands import refused
from tests.tiny_run import TinyRun, at_home, tiny_run


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def a_set(bits: float) -> dict[str, Any]:
    return {"format": "coalora-configurations/1", "members": [{"average_bits": bits, "round": 0}]}


pytestmark = pytest.mark.usefixtures("own_dvc")


@pytest.fixture
def checkout(repository: Path) -> Path:
    """Two commits: the second has another round 1."""
    root = repository
    for commit, bits in (("first", (2.0, 3.0)), ("second", (2.0, 4.0))):
        for index, value in enumerate(bits):
            version_file(write_set("demo", index, a_set(value), root), root)
        git(root, "add", "--all")
        git(root, "commit", "--quiet", "--message", commit)
        git(root, "tag", commit)
    return root


def bits_of(content: bytes) -> float:
    return float(json.loads(content)["members"][0]["average_bits"])


def test_a_revision_gives_the_set_that_it_recorded(checkout: Path) -> None:
    assert bits_of(from_dvc(checkout, rev="first").content) == 3.0
    assert bits_of(from_dvc(checkout, rev="second").content) == 4.0
    assert bits_of(from_dvc(checkout, rev="HEAD~1", round_index=1, pipeline="demo").content) == 3.0
    assert bits_of(from_dvc(checkout, rev="first", round_index=0).content) == 2.0
    assert bits_of(from_dvc(checkout).content) == 4.0
    assert git(checkout, "status", "--porcelain") == ""  # nothing is checked out


def test_a_missing_working_file_comes_from_the_cache(checkout: Path) -> None:
    (checkout / "configurations/demo/round-01.json").unlink()
    assert bits_of(from_dvc(checkout).content) == 4.0


def test_it_works_without_git(tmp_path: Path) -> None:
    from dvc.repo import Repo

    Repo.init(str(tmp_path), no_scm=True).close()
    version_file(write_set("demo", 0, a_set(2.5), tmp_path), tmp_path)
    assert bits_of(from_dvc(tmp_path).content) == 2.5
    with pytest.raises(CoaloraError, match=r"DVC.*"):
        from_dvc(tmp_path, rev="HEAD")


def test_what_dvc_does_not_have_is_answered_with_what_it_has(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(CoaloraError, match=r"no round 7 of configurations/demo at revision first\. Choose from 0, 1"):
        from_dvc(checkout, rev="first", round_index=7)
    with pytest.raises(CoaloraError, match=r"DVC refused.*no-such-revision"):
        from_dvc(checkout, rev="no-such-revision")
    with pytest.raises(CoaloraError, match=r"no configuration set of other at .*only of demo"):
        from_dvc(checkout, pipeline="other")
    version_file(write_set("other", 0, a_set(2.5), checkout), checkout)
    with pytest.raises(CoaloraError, match=r"several pipelines \(demo, other\)\. Add --pipeline"):
        from_dvc(checkout)
    with pytest.raises(CoaloraError, match="dvc init"):
        from_dvc(tmp_path)


def test_bytes_that_are_nowhere_are_told_with_the_way_to_have_them(checkout: Path) -> None:
    shutil.rmtree(checkout / ".dvc" / "cache")
    (checkout / "configurations/demo/round-01.json").unlink()
    with pytest.raises(CoaloraError, match=r"neither in DVC's cache.*dvc push.*dvc remote add"):
        from_dvc(checkout, rev="second")


def test_a_working_file_that_was_edited_is_refused(checkout: Path) -> None:
    path = checkout / "configurations/demo/round-01.json"
    path.unlink()
    path.write_text(json.dumps(a_set(9.0)))
    with pytest.raises(CoaloraError, match="was edited or damaged"):
        from_dvc(checkout)


def test_the_command_writes_a_file_and_never_over_another(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    out = tmp_path / "new" / "start.json"
    for _ in range(2):
        assert main(["restore", "--rev", "first", "--out", str(out)]) == 0
    assert out.read_bytes() == from_dvc(checkout, rev="first").content
    said = capsys.readouterr().out
    assert "1 configurations of round 1, 3.000 to 3.000 average bits, from DVC" in said
    assert f"--set initial_set.file={out}" in said
    assert "is not overwritten" in refused("restore", "--rev", "second", "--out", out)
    assert bits_of(out.read_bytes()) == 3.0


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, str, str, str]:
    """A run whose two sets are logged to MLflow: (run, URI, id of the parent, id of round 1)."""
    from mlflow import MlflowClient

    run, uri = tiny_run(), shared.mlflow_database(tmp_path_factory.mktemp("mlflow"))
    tracking = run.settings.tracking.model_copy(update={"tracking_uri": uri})
    with at_home(run.home):
        ids = [
            track_round.fn(
                pipeline="tiny", settings=run.settings.model_copy(update={"tracking": tracking}), identity="0" * 64,
                round_index=index, configurations=configurations, tables=run.calibrated.tables,
                md5=hashlib.md5(set_bytes(run, index)).hexdigest(),
            )
            for index, configurations in enumerate(run.trained.sets)
        ]  # fmt: skip
    parent = MlflowClient(uri).get_run(ids[0]).data.tags["mlflow.parentRunId"]
    return run, uri, parent, ids[1]


def set_bytes(run: TinyRun, index: int) -> bytes:
    with at_home(run.home):
        return (default_store().path(run.trained.sets[index]) / "configurations.json").read_bytes()


def test_an_mlflow_run_gives_the_sets_that_it_logged(logged: tuple[TinyRun, str, str, str], tmp_path: Path) -> None:
    run, uri, parent, child = logged
    for run_id, index, expected in ((parent, None, 1), (parent, 0, 0), (child, None, 1)):
        found = from_mlflow(run_id, index, tracking_uri=uri, root=tmp_path)
        assert (found.content, found.round_index) == (set_bytes(run, expected), expected)
    with pytest.raises(CoaloraError, match=r"no round 5 of run .*Choose from 0, 1"):
        from_mlflow(parent, 5, tracking_uri=uri, root=tmp_path)
    with pytest.raises(CoaloraError, match=r"does not know run f+.*--tracking-uri"):
        from_mlflow("f" * 32, tracking_uri=uri, root=tmp_path)


def test_where_mlflows_copy_is_gone_dvcs_is_taken(
    logged: tuple[TinyRun, str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc.repo import Repo

    run, uri, parent, _ = logged
    monkeypatch.setattr("mlflow.MlflowClient.download_artifacts", _gone)
    Repo.init(str(tmp_path), no_scm=True).close()
    with pytest.raises(CoaloraError, match="neither in DVC's cache"):
        from_mlflow(parent, tracking_uri=uri, root=tmp_path)
    content = json.loads(set_bytes(run, 1))
    version_file(write_set("tiny", 1, content, tmp_path), tmp_path)
    shutil.rmtree(tmp_path / "configurations")
    found = from_mlflow(parent, tracking_uri=uri, root=tmp_path)
    assert found.content == set_bytes(run, 1)
    assert found.source.startswith("DVC, by the md5")


def _gone(*_: object) -> str:
    raise OSError("no such artifact")


@pytest.mark.parametrize("rev", ["nowhere", "HEAD~9", "0" * 40, "--help", "a..b"])
def test_a_revision_that_there_is_not_is_refused(checkout: Path, rev: str) -> None:
    with pytest.raises(CoaloraError, match=r"DVC refused|cannot be read|unknown"):
        from_dvc(checkout, rev=rev)


@pytest.mark.parametrize("content", ["", "outs: []\n", "5\n", "outs:\n- md5: x\n"])
def test_an_empty_record_is_not_passed_over_for_an_earlier_round(checkout: Path, content: str) -> None:
    (checkout / "configurations/demo/round-01.json").unlink()
    (checkout / "configurations/demo/round-01.json.dvc").write_text(content)
    with pytest.raises(CoaloraError, match=r"round-01\.json\.dvc|damaged"):
        from_dvc(checkout)
    assert content or bits_of(from_dvc(checkout, round_index=0).content) == 2.0
