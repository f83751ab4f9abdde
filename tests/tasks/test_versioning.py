"""Claims of tasks/versioning.py, on real DVC and git repositories."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from coalora.errors import CoaloraError
from tasks.versioning import remove_stale_sets, version_file, write_set

CHECKOUT = Path(__file__).resolve().parents[2]


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture(autouse=True)
def _own_dvc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DVC's site cache and settings of the user stay out of the tests."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "dvc-settings"))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with DVC in it."""
    from dvc.repo import Repo

    root = tmp_path / "checkout"
    root.mkdir()
    _git(root, "init", "--quiet")
    Repo.init(str(root)).close()
    return root


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_a_set_is_canonical_and_left_untouched_if_identical(tmp_path: Path) -> None:
    path = write_set("demo", 3, {"b": [1], "a": {"d": 1, "c": 2}}, tmp_path)
    assert path == tmp_path / "configurations" / "demo" / "round-03.json"
    text = path.read_text()
    assert text.endswith("}\n")
    assert text.index('"a"') < text.index('"b"')
    os.utime(path, ns=(1, 1))
    assert write_set("demo", 3, {"a": {"c": 2, "d": 1}, "b": [1]}, tmp_path) == path
    assert path.stat().st_mtime_ns == 1
    write_set("demo", 3, {"a": 1}, tmp_path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["round-03.json"]


def test_a_changed_set_replaces_a_link_and_leaves_its_target_alone(tmp_path: Path) -> None:
    path = write_set("demo", 0, {"a": 1}, tmp_path)
    cached = tmp_path / "cached"
    path.rename(cached)
    path.symlink_to(cached)
    write_set("demo", 0, {"a": 2}, tmp_path)
    assert json.loads(cached.read_text()) == {"a": 1}
    assert json.loads(path.read_text()) == {"a": 2}


@pytest.mark.parametrize("pipeline", ["", "../up", "a/b", ".hidden"])
def test_a_pipeline_name_cannot_leave_its_folder(tmp_path: Path, pipeline: str) -> None:
    with pytest.raises(CoaloraError, match="plain name"):
        write_set(pipeline, 0, {}, tmp_path)


def test_a_payload_that_is_not_json_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    for payload in ({"loss": float("nan")}, {"path": tmp_path}):
        with pytest.raises(CoaloraError, match="JSON"):
            write_set("demo", 0, payload, tmp_path)
    with pytest.raises(CoaloraError, match="counted from 0"):
        write_set("demo", -1, {}, tmp_path)
    assert not (tmp_path / "configurations").exists()


def test_adding_records_the_md5_and_keeps_the_bytes(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # nothing may depend on the working directory
    path = write_set("demo", 0, {"a": 1}, repository)
    record = version_file(path, repository)
    assert record.added
    assert record.md5 == _md5(path)
    assert (record.path.as_posix(), record.dvc_file.as_posix()) == (
        "configurations/demo/round-00.json",
        "configurations/demo/round-00.json.dvc",
    )
    (out,) = yaml.safe_load((repository / record.dvc_file).read_text())["outs"]
    assert (out["md5"], out["path"]) == (record.md5, "round-00.json")
    cached = repository / ".dvc" / "cache" / "files" / "md5" / record.md5[:2] / record.md5[2:]
    assert cached.read_bytes() == path.read_bytes()
    ignored = _git(repository, "status", "--porcelain", "--ignored", "-uall", "configurations").splitlines()
    assert "!! configurations/demo/round-00.json" in ignored
    assert capfd.readouterr() == ("", "")

    # Another round's content in the same file is added again, and the first stays in the cache.
    write_set("demo", 0, {"a": 2}, repository)
    changed = version_file(Path("configurations/demo/round-00.json"), repository)
    assert changed.added
    assert changed.md5 == _md5(path) != record.md5
    assert cached.is_file()


def test_a_second_call_is_a_no_op_that_does_not_import_dvc(repository: Path) -> None:
    path = write_set("demo", 0, {"a": 1}, repository)
    first = version_file(path, repository)
    before = (repository / first.dvc_file).stat().st_mtime_ns
    script = """
        import sys
        from pathlib import Path
        from tasks.versioning import version_file
        record = version_file(Path(sys.argv[1]), Path(sys.argv[2]))
        print(record.added, record.md5, "dvc" in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path), str(repository)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", first.md5, "False"]
    assert (repository / first.dvc_file).stat().st_mtime_ns == before


def test_adding_works_inside_a_running_stage(repository: Path) -> None:
    script = repository / "stage.py"
    script.write_text(
        textwrap.dedent("""
            from pathlib import Path
            from tasks.versioning import remove_stale_sets, version_file, write_set
            root = Path.cwd()
            old = version_file(write_set("demo", 5, {"old": 1}, root), root)
            record = version_file(write_set("demo", 1, {"in": "stage"}, root), root)
            assert record.added and old.added
            remove_stale_sets("demo", 1, root)
            Path("out.txt").write_text(record.md5)
        """)
    )
    stage = {"cmd": f"{sys.executable} stage.py", "deps": ["stage.py"], "outs": ["out.txt"]}
    (repository / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"search": stage}}))
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    path = repository / "configurations" / "demo" / "round-01.json"
    assert (repository / "out.txt").read_text() == _md5(path)
    (out,) = yaml.safe_load(path.with_name("round-01.json.dvc").read_text())["outs"]
    assert out["md5"] == _md5(path)
    assert not list(path.parent.glob("round-05*"))


def test_adding_works_without_git(tmp_path: Path) -> None:
    from dvc.repo import Repo

    Repo.init(str(tmp_path), no_scm=True).close()
    path = write_set("demo", 0, {"a": 1}, tmp_path)
    record = version_file(path, tmp_path)
    assert record.added
    assert (tmp_path / record.dvc_file).is_file()
    assert not list(path.parent.glob(".gitignore"))


def test_a_folder_without_dvc_says_what_to_run(tmp_path: Path) -> None:
    path = write_set("demo", 0, {"a": 1}, tmp_path)
    with pytest.raises(CoaloraError, match=r"dvc init.*versioning.enabled=false"):
        version_file(path, tmp_path)


def test_what_dvc_cannot_add_is_refused_with_a_remedy(repository: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    with pytest.raises(CoaloraError, match="inside its root"):
        version_file(outside, repository)
    with pytest.raises(CoaloraError, match="exists"):
        version_file(repository / "missing.json", repository)
    tracked = repository / "tracked.json"
    tracked.write_text("{}")
    _git(repository, "add", "tracked.json")
    with pytest.raises(CoaloraError, match=r"DVC refused.*tracked.*dvc add tracked\.json"):
        version_file(tracked, repository)
    broken = repository / "broken.json"
    broken.write_text("{}")
    broken.with_name("broken.json.dvc").write_text("outs: []\n")
    with pytest.raises(CoaloraError, match="names one output"):
        version_file(broken, repository)


def test_sets_of_later_rounds_are_removed_with_every_trace(repository: Path) -> None:
    for index in (0, 1, 2, 10):
        version_file(write_set("demo", index, {"round": index}, repository), repository)
    write_set("demo", 11, {"never": "added"}, repository)
    other = write_set("other", 9, {"a": 1}, repository)
    folder = repository / "configurations" / "demo"
    (folder / "round-2.json").write_text("of somebody else")
    removed = remove_stale_sets("demo", 1, repository)
    assert [p.name for p in removed] == ["round-02.json", "round-10.json", "round-11.json"]
    assert sorted(p.name for p in folder.iterdir()) == [
        ".gitignore",
        "round-00.json",
        "round-00.json.dvc",
        "round-01.json",
        "round-01.json.dvc",
        "round-2.json",
    ]
    assert (folder / ".gitignore").read_text().split() == ["/round-00.json", "/round-01.json"]
    assert other.is_file()
    assert remove_stale_sets("demo", 1, repository) == []
    assert remove_stale_sets("never-run", 0, repository) == []


def test_a_stale_dvc_file_without_its_set_is_removed_too(repository: Path) -> None:
    path = write_set("demo", 4, {"a": 1}, repository)
    version_file(path, repository)
    path.unlink()  # a fresh clone before `dvc pull`
    assert [p.name for p in remove_stale_sets("demo", 3, repository)] == ["round-04.json"]
    assert not list(path.parent.glob("round-*"))
