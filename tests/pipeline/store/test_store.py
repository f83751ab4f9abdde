"""The store keeps what it was given, notices every change of it, and survives kills and races."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coalora.errors import CoaloraError
from pipeline.store.store import MANIFEST, MARKER, Artifact, Store, default_store
from tests import preloaded

ROOT = Path(__file__).resolve().parents[3]


def writer(**files: str) -> Callable[[Path], dict[str, int]]:
    """A build function; `a__b="x"` writes `a/b.txt`."""

    def build(folder: Path) -> dict[str, int]:
        for name, text in files.items():
            path = folder / (name.replace("__", "/") + ".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return {"files": len(files)}

    return build


def unlock(path: Path) -> Path:
    path.chmod(0o644)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def artifact(store: Store) -> Artifact:
    return store.put("table", writer(a="alpha", sub__b="beta"))


def leftovers(store: Store) -> list[str]:
    return sorted(p.name for p in (store.folder / ".tmp").iterdir())


def test_identical_content_has_one_digest_whatever_its_kind_order_and_meta(store: Store) -> None:
    first = store.put("table", writer(a="alpha", sub__b="beta"))

    def other_order(folder: Path) -> dict[str, str]:
        (folder / "empty").mkdir()
        writer(sub__b="beta")(folder)
        writer(a="alpha")(folder)
        return {"note": "other"}

    second = store.put("copy", other_order)
    assert first.digest == second.digest
    assert first.nbytes == second.nbytes == 9
    assert second.meta == {"note": "other"}
    assert store.put("table", writer(a="alpha", c="beta")).digest != first.digest
    assert store.put("table", writer(a="alphb", sub__b="beta")).digest != first.digest


def test_files_lie_under_their_digest_and_are_read_only(store: Store, artifact: Artifact) -> None:
    folder = store.path(artifact)
    assert folder == store.root / "store" / artifact.digest[:2] / artifact.digest
    assert (folder / "sub" / "b.txt").read_text() == "beta"
    assert all(p.stat().st_mode & 0o777 == 0o444 for p in folder.rglob("*") if p.is_file())
    assert store.verify(artifact) == []
    assert leftovers(store) == []


def test_default_home_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COALORA_HOME", raising=False)
    assert default_store().root == tmp_path / ".coalora"
    monkeypatch.setenv("COALORA_HOME", str(tmp_path / "elsewhere"))
    assert default_store().root == tmp_path / "elsewhere"


def _alter(folder: Path) -> None:
    unlock(folder / "a.txt").write_text("alphA")  # same size


def _delete(folder: Path) -> None:
    (folder / "sub" / "b.txt").unlink()


def _add(folder: Path) -> None:
    (folder / "sub" / "c.txt").write_text("extra")


def _link(folder: Path) -> None:
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(folder / "sub" / "b.txt")


def _manifest(folder: Path) -> None:
    manifest = unlock(folder / MANIFEST)
    manifest.write_text(manifest.read_text().replace("a.txt", "z.txt"))


def _half_manifest(folder: Path) -> None:
    unlock(folder / MANIFEST).write_text('{"digest": ')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_alter, "a.txt: altered"),
        (_delete, "sub/b.txt: missing"),
        (_add, "sub/c.txt: extra"),
        (_link, "a.txt: altered (a link)"),
        (_manifest, f"{MANIFEST} is altered"),
        (_half_manifest, f"{MANIFEST} is unreadable"),
    ],
)
def test_damage_is_named_and_replaced_by_the_next_put(
    store: Store, artifact: Artifact, damage: Callable[[Path], None], said: str
) -> None:
    damage(store.path(artifact))
    problems = store.verify(artifact)
    assert len(problems) == 1
    assert said in problems[0]
    assert store.put("table", writer(a="alpha", sub__b="beta")) == artifact
    assert store.verify(artifact) == []
    assert leftovers(store) == []


def test_an_absent_artifact_is_a_problem_not_an_exception(store: Store) -> None:
    (problem,) = store.verify(Artifact(kind="table", digest="0" * 64, nbytes=1))
    assert "not in the store" in problem


def test_a_second_put_of_whole_content_leaves_the_first_in_place(store: Store, artifact: Artifact) -> None:
    inode = (store.path(artifact) / "a.txt").stat().st_ino
    store.put("table", writer(a="alpha", sub__b="beta"))
    assert (store.path(artifact) / "a.txt").stat().st_ino == inode


def test_an_exception_in_build_leaves_nothing(store: Store) -> None:
    def build(folder: Path) -> None:
        (folder / "half.bin").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(CoaloraError, match=r"disk.*full"):
        store.put("table", build)
    assert [p for p in store.folder.rglob("*") if p.is_file() and p.name != ".lock"] == []


def _writes_nothing(folder: Path) -> None:
    (folder / "empty").mkdir()


def _writes_a_link(folder: Path) -> None:
    (folder / "link").symlink_to("/nowhere")


def _writes_a_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{}")


def _returns_nan(folder: Path) -> dict[str, float]:
    (folder / "a").write_text("a")
    return {"loss": float("nan")}


def _returns_an_object(folder: Path) -> dict[str, object]:
    (folder / "a").write_text("a")
    return {"loss": [1, 2]}


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (_writes_nothing, "made without a file"),
        (_writes_a_link, "is a link"),
        (_writes_a_manifest, "manifest's own name"),
        (_returns_nan, "finite JSON scalars"),
        (_returns_an_object, "finite JSON scalars"),
    ],
)
def test_what_cannot_be_kept_is_refused(store: Store, build: Callable, said: str) -> None:
    with pytest.raises(CoaloraError, match=said):
        store.put("table", build)
    assert leftovers(store) == []


_KILLED = """
import os, sys
from pathlib import Path
from pipeline.store.store import Store, default_store
def build(folder: Path) -> None:
    (folder / "half.bin").write_bytes(b"x" * 1000)
    os._exit(9)
Store(sys.argv[1]).put("table", build)
"""


def test_a_killed_build_leaves_the_store_consistent_and_is_swept_after_a_day(store: Store, artifact: Artifact) -> None:
    preloaded.run("-c", _KILLED, str(store.root), cwd=ROOT, expect=9)
    assert store.verify(artifact) == []
    finished = [p.parent.name for p in store.folder.glob("*/*/" + MANIFEST)]
    assert finished == [artifact.digest]
    left = leftovers(store)
    assert len(left) == 2  # workspace and lock

    store.put("table", writer(c="gamma"))
    assert leftovers(store) == left  # not a day old
    old = time.time() - 25 * 3600
    for path in (store.folder / ".tmp").iterdir():
        os.utime(path, (old, old))
    store.put("table", writer(c="gamma"))
    assert leftovers(store) == []


def test_a_build_of_more_than_a_day_that_still_runs_is_not_swept(store: Store) -> None:
    def build(folder: Path) -> None:
        (folder / "a.txt").write_text("slow")
        old = time.time() - 48 * 3600
        for path in folder.parent.iterdir():
            os.utime(path, (old, old))
        store.put("other", writer(b="fast"))
        assert (folder / "a.txt").read_text() == "slow"

    assert store.verify(store.put("table", build)) == []


_RACER = """
import sys, time
from pathlib import Path
from pipeline.store.store import Store, default_store
def build(folder: Path) -> None:
    (folder / "a.txt").write_text("same")
    (Path(sys.argv[1]) / sys.argv[2]).touch()
    while len(list(Path(sys.argv[1]).glob("ready-*"))) < 2:
        time.sleep(0.01)
artifact = Store(sys.argv[1]).put("table", build)
assert Store(sys.argv[1]).verify(artifact) == []
print(artifact.digest)
"""


def test_two_processes_putting_the_same_content_both_succeed(tmp_path: Path) -> None:
    command = ("-c", _RACER, str(tmp_path))
    racers = [preloaded.Process((*command, f"ready-{i}"), ROOT, dict(os.environ)) for i in (0, 1)]
    digests = {racer.read(timeout=60) for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert len(digests) == 1


def contents(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != MARKER
    }


def test_materialize_copies_exactly_the_files_and_does_nothing_the_second_time(
    store: Store, artifact: Artifact, tmp_path: Path
) -> None:
    out = store.materialize(artifact, tmp_path / "out")
    assert contents(out) == {"a.txt": "alpha", "sub/b.txt": "beta"}
    assert (out / "a.txt").stat().st_ino != (store.path(artifact) / "a.txt").stat().st_ino
    assert (out / "a.txt").stat().st_mode & 0o200
    before = {p: p.stat().st_mtime_ns for p in [out, *out.rglob("*")]}
    store.materialize(artifact, out)
    assert {p: p.stat().st_mtime_ns for p in [out, *out.rglob("*")]} == before


def test_materialize_brings_a_marked_folder_up_to_date(store: Store, artifact: Artifact, tmp_path: Path) -> None:
    out = store.materialize(artifact, tmp_path / "out")
    newer = store.put("table", writer(a="alpha", d="delta"))
    (out / "a.txt").write_text("edited")
    (out / "stray.txt").write_text("stray")
    store.materialize(newer, out)
    assert contents(out) == {"a.txt": "alpha", "d.txt": "delta"}
    assert not (out / "sub").exists()


def test_materialize_takes_up_a_copy_that_was_killed(
    store: Store, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.store.store._copy", killed)
        with pytest.raises(KeyboardInterrupt):
            store.materialize(artifact, tmp_path / "out")
    (tmp_path / "out" / "a.txt").write_text("al")
    assert contents(store.materialize(artifact, tmp_path / "out")) == {"a.txt": "alpha", "sub/b.txt": "beta"}


def test_materialize_never_writes_into_a_linked_file(store: Store, artifact: Artifact, tmp_path: Path) -> None:
    out = store.materialize(artifact, tmp_path / "out")
    (out / "a.txt").unlink()
    (tmp_path / "dvc-cache").write_text("older")
    os.link(tmp_path / "dvc-cache", out / "a.txt")
    store.materialize(artifact, out)
    assert (tmp_path / "dvc-cache").read_text() == "older"
    assert (out / "a.txt").read_text() == "alpha"


def test_materialize_refuses_what_is_not_ours(store: Store, artifact: Artifact, tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.mkdir()
    (users / "thesis.txt").write_text("precious")
    with pytest.raises(CoaloraError, match="holds 1 files that are not ours"):
        store.materialize(artifact, users)
    assert contents(users) == {"thesis.txt": "precious"}
    with pytest.raises(CoaloraError, match="is a file"):
        store.materialize(artifact, users / "thesis.txt")
    for inside in (store.folder, store.path(artifact), store.root):
        with pytest.raises(CoaloraError, match="is a folder of the store"):
            store.materialize(artifact, inside)


def test_materialize_refuses_a_damaged_artifact(store: Store, artifact: Artifact, tmp_path: Path) -> None:
    _alter(store.path(artifact))
    with pytest.raises(CoaloraError, match=r"a\.txt: altered"):
        store.materialize(artifact, tmp_path / "out")
    assert "a.txt" not in contents(tmp_path / "out")
