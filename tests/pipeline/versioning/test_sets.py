"""Claims of pipeline/versioning/sets.py, on real DVC and git repositories."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import yaml
import zc.lockfile

from coalora.errors import CoaloraError
from pipeline.versioning.repository import with_repository
from pipeline.versioning.restoring import from_dvc
from pipeline.versioning.sets import push_file, remove_stale_sets, version_file, write_set
from tests import preloaded
from tests.s3_server import SECRET_KEY, create_bucket, s3_server, set_credentials

CHECKOUT = Path(__file__).resolve().parents[3]


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def _dvc(root: Path, *arguments: str) -> str:
    return preloaded.run("-m", "dvc", *arguments, cwd=root)


pytestmark = pytest.mark.usefixtures("own_dvc")


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
        from pipeline.versioning.sets import version_file
        record = version_file(Path(sys.argv[1]), Path(sys.argv[2]))
        print(record.added, record.md5, "dvc" in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path), str(repository)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", first.md5, "False"]
    assert (repository / first.dvc_file).stat().st_mtime_ns == before


def test_a_clone_that_makes_the_set_of_git_s_dvc_file_keeps_its_bytes(repository: Path) -> None:
    path = write_set("demo", 0, {"a": 1}, repository)
    first = version_file(path, repository)
    cached = repository / ".dvc" / "cache" / "files" / "md5" / first.md5[:2] / first.md5[2:]
    cached.chmod(0o644)
    cached.unlink()  # git brings the .dvc file alone
    assert version_file(path, repository).added
    assert cached.read_bytes() == path.read_bytes()
    assert not version_file(path, repository).added


def test_adding_works_inside_a_running_stage(repository: Path) -> None:
    script = repository / "stage.py"
    script.write_text(
        textwrap.dedent("""
            from pathlib import Path
            from pipeline.versioning.sets import remove_stale_sets, version_file, write_set
            root = Path.cwd()
            old = version_file(write_set("demo", 5, {"old": 1}, root), root)
            record = version_file(write_set("demo", 1, {"in": "stage"}, root), root)
            assert record.added and old.added
            remove_stale_sets("demo", 1, root)
            Path("out.txt").write_text(record.md5)
        """)
    )
    stage = {"cmd": f"{os.environ['PRELOADED_PYTHON']} stage.py", "deps": ["stage.py"], "outs": ["out.txt"]}
    (repository / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"search": stage}}))
    preloaded.run("-m", "dvc", "repro", cwd=repository, PYTHONPATH=str(CHECKOUT))
    path = repository / "configurations" / "demo" / "round-01.json"
    assert (repository / "out.txt").read_text() == _md5(path)
    (out,) = yaml.safe_load(path.with_name("round-01.json.dvc").read_text())["outs"]
    assert out["md5"] == _md5(path)
    assert not list(path.parent.glob("round-05*"))


def test_a_set_carries_its_run_and_round_and_dvc_keeps_them(repository: Path) -> None:
    path = write_set("demo", 0, {"a": 1}, repository)
    tags: dict[str, str | int] = {"pipeline": "demo", "run": "0123abcd", "round": 0}
    record = version_file(path, repository, tags)
    dvc_file = repository / record.dvc_file
    assert yaml.safe_load(dvc_file.read_text())["outs"][0]["meta"] == tags
    before = dvc_file.stat().st_mtime_ns
    assert not version_file(path, repository, tags).added
    assert dvc_file.stat().st_mtime_ns == before
    # The same set, made by another run; then another set, added by hand.
    version_file(path, repository, {**tags, "run": "89abcdef"})
    assert yaml.safe_load(dvc_file.read_text())["outs"][0]["meta"]["run"] == "89abcdef"
    path = write_set("demo", 0, {"a": 2}, repository)
    _dvc(repository, "add", str(path))
    (out,) = yaml.safe_load(dvc_file.read_text())["outs"]
    assert (out["md5"], out["meta"]["run"]) == (_md5(path), "89abcdef")
    assert "up to date" in _dvc(repository, "status")


def test_a_lock_that_stays_taken_is_named_and_one_that_is_freed_is_waited_for(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_set("demo", 0, {"a": 1}, repository)
    held = zc.lockfile.LockFile(str(repository / ".dvc" / "tmp" / "lock"))
    with pytest.raises(CoaloraError, match=r"Another DVC command has held.*\.dvc/tmp/lock"):
        with_repository(repository, "dvc add", lambda repo: repo.add([str(path)]), timeout_seconds=0.1)
    threading.Timer(4.0, held.close).start()  # DVC itself gives up after three seconds
    with caplog.at_level(logging.INFO, logger="coalora"):
        assert version_file(path, repository).added
    assert caplog.text.count("waiting for another DVC command") == 1


def test_a_lock_of_a_killed_command_blocks_nobody(repository: Path) -> None:
    script = (
        "import sys, time, zc.lockfile as z; lock = z.LockFile(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(repository / ".dvc" / "tmp" / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    assert version_file(write_set("demo", 0, {"a": 1}, repository), repository).added


def test_a_dirty_lock_file_is_named_with_the_way_out(repository: Path) -> None:
    path = write_set("demo", 0, {"a": 1}, repository)
    stage = {"cmd": "true", "outs": ["out.txt"]}
    (repository / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"s": stage}}))
    (repository / "dvc.lock").write_text("<<<<<<< ours\nschema: '2.0'\n=======\n>>>>>>> theirs\n")
    with pytest.raises(CoaloraError, match=r"dvc\.lock.*damaged.*git could not merge"):
        version_file(path, repository)
    (repository / "dvc.lock").unlink()
    rwlock = repository / ".dvc" / "tmp" / "rwlock"
    rwlock.write_text('{"write": {')
    with pytest.raises(CoaloraError, match=r"record of running commands.*delete .*rwlock"):
        version_file(path, repository)
    rwlock.unlink()
    assert version_file(path, repository).added


def test_without_a_remote_a_push_says_what_is_missing(repository: Path) -> None:
    record = version_file(write_set("demo", 0, {"a": 1}, repository), repository)
    with pytest.raises(CoaloraError, match=r"DVC refused.*remote.*dvc push configurations/demo/round-00\.json\.dvc"):
        push_file(record, repository)


def test_a_set_travels_to_a_remote_in_s3_and_into_another_clone(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_credentials(monkeypatch.setenv)
    path = write_set("demo", 0, {"format": "coalora-configurations/1", "members": [{"average_bits": 2.0}]}, repository)
    with s3_server() as (host, port):
        url = f"http://{host}:{port}"
        create_bucket(url, "sets")
        _dvc(repository, "remote", "add", "--default", "store", "s3://sets/dvc")
        _dvc(repository, "remote", "modify", "store", "endpointurl", url)
        record = version_file(path, repository, {"run": "0123abcd", "round": 0})
        push_file(record, repository)
        push_file(record, repository)
        for name in ("user.name", "user.email"):
            _git(repository, "config", name, "test")
        _git(repository, "add", "--all")
        _git(repository, "commit", "--quiet", "--message", "round 0")
        clone = tmp_path / "clone"
        _git(tmp_path, "clone", "--quiet", str(repository), str(clone))
        found = from_dvc(clone, rev="HEAD")
        assert (found.content, found.round_index) == (path.read_bytes(), 0)
        assert not (clone / record.path).exists()
        assert "1 file fetched and 1 file added" in _dvc(clone, "pull")
        assert (clone / record.path).read_bytes() == path.read_bytes()
        for file in (repository / ".dvc").rglob("*"):
            assert not file.is_file() or SECRET_KEY.encode() not in file.read_bytes()
    # The server is gone.
    moved = write_set("demo", 1, {"a": 2}, repository)
    record = version_file(moved, repository)
    with pytest.raises(CoaloraError, match=r"DVC.*versioning\.(push|enabled)=false"):
        push_file(record, repository)


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
    with pytest.raises(CoaloraError, match="outside of DVC's root"):
        version_file(outside, repository)
    with pytest.raises(CoaloraError, match="does not exist"):
        version_file(repository / "missing.json", repository)
    tracked = repository / "tracked.json"
    tracked.write_text("{}")
    _git(repository, "add", "tracked.json")
    with pytest.raises(CoaloraError, match=r"DVC refused.*tracked.*dvc add tracked\.json"):
        version_file(tracked, repository)
    broken = repository / "broken.json"
    broken.write_text("{}")
    broken.with_name("broken.json.dvc").write_text("outs: []\n")
    with pytest.raises(CoaloraError, match="does not name one output"):
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
