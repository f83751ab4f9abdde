"""A run is published whole or not at all, sent once, and comes back bit for bit, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from coalora.errors import CoaloraError
from coalora.files import file_sha256, json_bytes
from pipeline.s3.client import S3Address, S3Location
from pipeline.s3.errors import StorageError
from pipeline.store.artifacts import MARKER
from pipeline.store.publish import Retrieval, publish, retrieve
from pipeline.store.store import Store
from tests.s3_server import FaultProxy

pytestmark = pytest.mark.servers

MIB = 1 << 20


@pytest.fixture(scope="module")
def large() -> bytes:
    return os.urandom(6 * MIB)


@pytest.fixture
def run(tmp_path: Path, large: bytes) -> Path:
    """A folder in the form of a run's: two budgets share a tokenizer."""
    folder = tmp_path / "runs" / "demo" / "0123abcd"
    files = {
        "run.json": json.dumps({"pipeline": "demo", "identity": "0123abcd" * 8, "mlflow_run_id": "f00"}).encode(),
        "report/report.html": b"<html>",
        "bundle/adapter.safetensors": b"adapter",
        "export/2.5-bits/base/quantized.safetensors": large,
        "export/2.5-bits/base/tokenizer.json": b"tokenizer",
        "export/3-bits/base/tokenizer.json": b"tokenizer",
        "export/3-bits/.coalora-artifact": b"of the local store",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder.parent / "latest").symlink_to("0123abcd")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files if p.name != MARKER}


def visible(place: S3Location) -> list[str]:
    """Runs that somebody who looks would find."""
    return [o.name for o in place.list("runs/")]


def fetch(place: S3Location, folder: Path, run: str = "latest", **more: list[str]) -> Retrieval:
    return retrieve(place.address.below(f"runs/demo/{run}"), folder, place.settings, **more)  # type: ignore[arg-type]


def test_a_published_run_comes_back_bit_for_bit(place: S3Location, run: Path, tmp_path: Path) -> None:
    found = publish(run.parent / "latest", place)
    assert found.address == f"s3://{place.address.bucket}/team/models/runs/demo/0123abcd"
    assert (found.n_files, found.sent_files, found.changed) == (6, 5, True)  # the tokenizer travels once
    assert visible(place) == ["runs/demo/0123abcd/manifest.json", "runs/demo/latest.json"]
    got = fetch(place, tmp_path / "got")
    assert (got.run, got.n_files, got.fetched_files) == ("0123abcd", 6, 6)
    assert contents(tmp_path / "got") == contents(run)
    assert fetch(place, tmp_path / "got", "0123abcd").fetched_files == 0


def test_publishing_again_sends_nothing(place: S3Location, run: Path, proxy: FaultProxy) -> None:
    publish(run, place)
    proxy.clear()
    again = publish(run, place)
    assert (again.sent_files, again.sent_bytes, again.changed) == (0, 0, False)
    assert proxy.puts() == []


def test_a_changed_run_sends_what_changed(place: S3Location, run: Path, proxy: FaultProxy, tmp_path: Path) -> None:
    publish(run, place)
    (run / "report/report.html").write_bytes(b"<html>new")
    (run / "bundle/adapter.safetensors").unlink()
    proxy.clear()
    again = publish(run, place)
    assert (again.sent_files, again.sent_bytes, again.changed) == (1, 9, True)
    assert len(proxy.puts()) == 2  # the object and the manifest; `latest` names the same run
    assert proxy.bytes_sent < 10_000
    fetch(place, tmp_path / "got")
    assert contents(tmp_path / "got") == contents(run)


def test_objects_that_were_lost_are_sent_again(place: S3Location, run: Path, tmp_path: Path) -> None:
    publish(run, place)
    (gone, *_) = [o.name for o in place.list("objects/")]
    place.delete([gone])
    with pytest.raises(StorageError, match="object does not exist"):
        fetch(place, tmp_path / "got")
    again = publish(run, place)
    assert (again.sent_files, again.changed) == (1, False)
    fetch(place, tmp_path / "got")
    assert contents(tmp_path / "got") == contents(run)


@pytest.mark.parametrize(
    ("pattern", "kind", "code", "error", "said"),
    [
        ("partNumber=2", "cut-request", "", StorageError, "cannot be reached"),
        ("partNumber=2", "busy", "", StorageError, "is overloaded"),
        ("PUT .*/objects/", "forbidden", "ExpiredToken", StorageError, "does not know the credentials"),
        ("PUT .*manifest", "busy", "", StorageError, "is overloaded"),
    ],
)
def test_a_publication_that_fails_shows_nothing_and_is_finished_by_the_next(
    place: S3Location, run: Path, proxy: FaultProxy, tmp_path: Path,
    pattern: str, kind: str, code: str, error: type[Exception], said: str,
) -> None:  # fmt: skip
    proxy.fail(pattern, kind, times=99, code=code)
    with pytest.raises(error, match=said):
        publish(run, place)
    assert visible(place) == []
    with pytest.raises(CoaloraError, match="There is no run demo/latest"):
        fetch(place, tmp_path / "got")
    proxy.clear()
    sent_before = {o.name for o in place.list("objects/")}
    found = publish(run, place)
    assert found.sent_files == 5 - len(sent_before)
    fetch(place, tmp_path / "got")
    assert contents(tmp_path / "got") == contents(run)


def test_a_republication_that_fails_leaves_the_former_one_whole(
    place: S3Location, run: Path, proxy: FaultProxy, tmp_path: Path
) -> None:
    publish(run, place)
    before = contents(run)
    (run / "export/2.5-bits/base/quantized.safetensors").write_bytes(os.urandom(7 * MIB))
    (run / "report/report.html").write_bytes(b"<html>new")
    proxy.fail("partNumber=2", "busy", times=99)
    with pytest.raises(StorageError):
        publish(run, place)
    proxy.clear()
    fetch(place, tmp_path / "got")
    assert contents(tmp_path / "got") == before


def test_an_interrupted_download_keeps_whole_files_and_is_marked_until_all_are(
    place: S3Location, run: Path, proxy: FaultProxy, tmp_path: Path
) -> None:
    publish(run, place)
    target, large = tmp_path / "got", run / "export/2.5-bits/base/quantized.safetensors"
    sizes = {p.stat().st_size for p in run.rglob("*") if p.is_file()}
    assert max(sizes) == large.stat().st_size
    proxy.fail(f"GET .*objects/.*{file_sha256(large)}", "cut-answer")
    proxy.fail(f"GET .*objects/.*{file_sha256(large)}", "close", times=99)
    with pytest.raises(StorageError):
        fetch(place, target)
    assert json.loads((target / MARKER).read_text())["complete"] is False
    assert not (target / large.relative_to(run)).exists()
    assert not list(target.rglob("*.part*"))
    proxy.clear()
    there = sum(1 for p in target.rglob("*") if p.is_file() and not p.name.startswith("."))
    got = fetch(place, target)
    assert got.fetched_files == got.n_files - there
    assert json.loads((target / MARKER).read_text())["complete"] is True
    assert contents(target) == contents(run)


def test_bytes_that_change_on_the_way_down_are_fetched_again(
    place: S3Location, run: Path, proxy: FaultProxy, tmp_path: Path
) -> None:
    publish(run, place)
    sha = file_sha256(run / "bundle/adapter.safetensors")
    fault = proxy.fail(f"GET .*{sha}", "flip-answer")
    fetch(place, tmp_path / "got")
    assert fault.met == 1
    assert contents(tmp_path / "got") == contents(run)


def test_a_part_of_a_run_and_another_part_later(place: S3Location, run: Path, tmp_path: Path) -> None:
    publish(run, place)
    target = tmp_path / "got"
    assert fetch(place, target, only=["export/3-bits/*"]).n_files == 1
    assert set(contents(target)) == {"export/3-bits/base/tokenizer.json"}
    fetch(place, target, only=["bundle/*", "run.json"])
    assert set(contents(target)) == {"bundle/adapter.safetensors", "run.json"}
    with pytest.raises(CoaloraError, match=r"export/9-bits.*fits no file.*export/3-bits/base"):
        fetch(place, target, only=["export/9-bits/*"])


def test_another_run_takes_the_place_of_the_one_before(place: S3Location, run: Path, tmp_path: Path) -> None:
    publish(run, place)
    fetch(place, tmp_path / "got")
    other = run.with_name("89abcdef")
    shutil.copytree(run, other)
    (other / "export/3-bits/base/tokenizer.json").unlink()
    (other / "report/report.html").write_bytes(b"other")
    assert publish(other, place).sent_files == 1
    assert fetch(place, tmp_path / "got").run == "89abcdef"
    assert contents(tmp_path / "got") == contents(other)
    fetch(place, tmp_path / "got", "0123abcd")
    assert contents(tmp_path / "got") == contents(run)


def test_a_folder_of_somebody_else_is_not_touched(place: S3Location, run: Path, tmp_path: Path) -> None:
    publish(run, place)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("unsaved")
    with pytest.raises(CoaloraError, match="that are not ours"):
        fetch(place, mine)
    with pytest.raises(CoaloraError, match="is a file"):
        fetch(place, mine / "thesis.txt")
    assert contents(mine) == {"thesis.txt": b"unsaved"}


@pytest.mark.parametrize(
    "path", ["../../evil", "/etc/evil", "a/../../evil", "", "a\\..\\evil", "a//b", "./a", "a\x1b[2J", "e" * 256, MARKER]
)
def test_a_manifest_cannot_write_outside_of_the_folder(place: S3Location, tmp_path: Path, path: str) -> None:
    file = {"path": path, "size": 1, "sha256": "0" * 64}
    manifest = {
        "format": "coalora-run/2", "pipeline": "demo", "run": "r", "identity": None, "mlflow_run_id": None,
        "files": [file],
    }  # fmt: skip
    place.put_bytes("runs/demo/r/manifest.json", json_bytes(manifest))
    with pytest.raises(CoaloraError, match=r"no manifest of this version: files\.0\.path") as caught:
        fetch(place, tmp_path / "got", "r")
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_run_beside_the_shared_store_sends_what_is_not_there_yet(
    place: S3Location, run: Path, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", place.endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    store, unmarked = Store(tmp_path / "home", shared_url=str(place)), shutil.ignore_patterns(MARKER)
    made = store.put(
        "export", lambda folder: shutil.copytree(run / "export", folder, dirs_exist_ok=True, ignore=unmarked) and None
    )
    assert store.share(made) > 0
    sent = publish(run, place)
    assert (sent.n_files, sent.sent_files) == (6, 3)  # the record, the report and the bundle
    assert proxy.bytes_sent < 7 * MIB


def test_a_run_that_is_not_there_is_answered_with_those_that_are(place: S3Location, run: Path, tmp_path: Path) -> None:
    with pytest.raises(CoaloraError, match=r"There is no run.*nothing is published there"):
        fetch(place, tmp_path / "got")
    publish(run, place)
    with pytest.raises(CoaloraError, match="Name one of demo/0123abcd"):
        fetch(place, tmp_path / "got", "ffffffff")
    with pytest.raises(CoaloraError, match=r"runs/PIPELINE/RUN"):
        retrieve(S3Address.parse("s3://models/demo"), tmp_path / "got", place.settings)


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    place: S3Location, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run, place)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000))  # type: ignore[attr-defined]
    with pytest.raises(CoaloraError, match=r"1,000 bytes free.*--only"):
        fetch(place, tmp_path / "got")
    assert contents(tmp_path / "got") == {}


@pytest.fixture
def no_run(tmp_path: Path) -> Path:
    folder = tmp_path / "nothing"
    folder.mkdir()
    return folder


def test_what_is_no_run_folder_is_refused(place: S3Location, no_run: Path, run: Path, proxy: FaultProxy) -> None:
    with pytest.raises(CoaloraError, match=r"no run folder of a finished pipeline"):
        publish(no_run, place)
    (run / "elsewhere").symlink_to("/etc/hostname")
    with pytest.raises(CoaloraError, match="is a link"):
        publish(run, place)
    assert proxy.puts() == []


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"run": 1}', b'{"run": "../b"}', b'{"run": "a\\u001b[2J"}'])
def test_a_damaged_or_hostile_pointer_to_the_latest_run_is_said(
    place: S3Location, tmp_path: Path, content: bytes
) -> None:
    place.put_bytes("runs/demo/latest.json", content)
    place.put_bytes("runs/demo/\x1b[2J/manifest.json", b"{}")  # is in no list of runs
    with pytest.raises(CoaloraError, match=r"runs/demo/latest\.json names no run"):
        fetch(place, tmp_path / "got")
    with pytest.raises(CoaloraError, match="nothing is published there"):
        fetch(place, tmp_path / "got", "other")
