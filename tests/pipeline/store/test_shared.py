"""Machines that share a store in S3 find each other's results, compute each once, and trust no byte unread."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from coalora.errors import CoaloraError
from coalora.files import json_bytes
from pipeline.s3.errors import StorageError
from pipeline.stages.runner import DirectRunner, stage
from pipeline.store.lease import Lease
from pipeline.store.shared import SharedStore, manifest_name, object_name, record_name
from pipeline.store.store import Artifact, default_store
from tests.pipeline.store.stores import Traced, until
from tests.s3_server import FaultProxy, set_credentials

pytestmark = pytest.mark.servers

CALLS: list[str] = []


@stage("shared-text")
def text(*, n: int) -> Artifact:
    CALLS.append("text")

    def build(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("n" * n)
        (folder / "b.txt").write_text("b")

    return default_store().put("text", build)


@stage("shared-reader")
def reader(*, table: Artifact) -> Artifact:
    CALLS.append("reader")
    found = (default_store().path(table) / "sub" / "a.txt").read_text()
    return default_store().put("length", lambda folder: (folder / "n.txt").write_text(str(len(found))) and None)


@stage("shared-place")
def of_this_machine(*, n: int) -> Artifact:
    CALLS.append("place")
    return default_store().put(
        "base", lambda folder: (folder / "a").write_text(str(n)) and {"path": "/on/this/machine"}
    )


@pytest.fixture
def server(proxy: FaultProxy, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Variables that lead to an empty shared store, in this process as well."""
    variables = {"AWS_ENDPOINT_URL": proxy.url, "AWS_DEFAULT_REGION": "us-east-1", "COALORA_STORE": f"s3://{bucket}/a"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    set_credentials(variables.__setitem__)
    return variables


@pytest.fixture
def shared(server: dict[str, str]) -> SharedStore:
    CALLS.clear()
    found = default_store().shared
    assert found is not None
    return found


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """`machine("a")` is a context on which everything local belongs to machine a."""

    class Machine:
        def __init__(self, name: str) -> None:
            self.home = tmp_path / name
            self.settings = temporary_settings({PREFECT_LOCAL_STORAGE_PATH: self.home / "results"})

        def __enter__(self) -> Path:
            monkeypatch.setenv("COALORA_HOME", str(self.home))
            self.settings.__enter__()
            return self.home

        def __exit__(self, *error: object) -> None:
            self.settings.__exit__(*error)

    return Machine


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def names(shared: SharedStore) -> list[str]:
    return [found.name for found in shared.location.list()]


def ran(runner: DirectRunner) -> list[tuple[str, bool]]:
    return [(record.stage, record.cached) for record in runner.history]


def test_a_fresh_machine_finds_what_another_finished_and_downloads_only_what_it_reads(
    shared: SharedStore, machine: type
) -> None:
    with machine("a"):
        first = DirectRunner()
        made = first.run(text, n=5)
        length = first.run(reader, table=made)
    assert set(names(shared)) == {
        *(manifest_name(artifact.digest) for artifact in (made, length)),
        *(object_name(sha(content)) for content in ("nnnnn", "b", "5")),
        *(record_name(record.key) for record in first.history),
    }  # and no lease is left
    with machine("b") as home:
        second = DirectRunner()
        assert second.run(text, n=5) == made  # `meta` and the seconds of the first machine included
        assert second.run(reader, table=made) == length
        assert ran(second) == [("shared-text", True), ("shared-reader", True)]
        assert not list(home.glob("store/*/*"))  # nothing was read, nothing was downloaded
        assert (default_store().path(length) / "n.txt").read_text() == "5"
        assert default_store().verify(length) == []
        assert len(list(home.glob("store/??/*"))) == 1
        assert (default_store().materialize(made, home / "copy") / "sub" / "a.txt").read_text() == "nnnnn"
    assert CALLS == ["text", "reader"]


def test_a_stage_that_runs_gets_its_inputs_from_the_shared_store(shared: SharedStore, machine: type) -> None:
    with machine("a"):
        made = DirectRunner().run(text, n=4)
    with machine("b"):
        runner = DirectRunner()
        length = runner.run(reader, table=runner.run(text, n=4))
        assert (default_store().path(length) / "n.txt").read_text() == "4"
    with machine("a"):
        assert DirectRunner().run(reader, table=made) == length
    assert CALLS == ["text", "reader"]


def test_what_a_machine_made_alone_is_shared_when_it_is_used_again(
    shared: SharedStore, machine: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine("a"):
        with monkeypatch.context() as alone:
            alone.delenv("COALORA_STORE")
            made = DirectRunner().run(text, n=3)
        assert names(shared) == []
        runner = DirectRunner()
        assert runner.run(text, n=3) == made
        assert ran(runner) == [("shared-text", True)]
    with machine("b"):
        assert DirectRunner().run(text, n=3) == made
    assert CALLS == ["text"]


def test_a_reference_to_a_place_on_one_machine_is_made_on_each(shared: SharedStore, machine: type) -> None:
    for name in "ab":
        with machine(name):
            made = DirectRunner().run(of_this_machine, n=1)
            DirectRunner().run(of_this_machine, n=1)
    assert CALLS == ["place", "place"]
    assert shared.manifest(made) is not None  # its files are for workers, its record for nobody
    assert not [name for name in names(shared) if name.startswith("records/")]


def test_a_damaged_copy_here_is_replaced_by_the_shared_one(shared: SharedStore, machine: type) -> None:
    with machine("a"):
        made = DirectRunner().run(text, n=2)
        file = default_store().path(made) / "b.txt"
        file.chmod(0o644)
        file.write_text("altered")
        assert DirectRunner().run(text, n=2) == made
        assert (default_store().path(made) / "b.txt").read_text() == "b"
        assert default_store().verify(made) == []
    assert CALLS == ["text"]


def test_a_damaged_shared_file_is_noticed_and_never_kept(shared: SharedStore, machine: type) -> None:
    with machine("a"):
        made = DirectRunner().run(text, n=2)
    shared.location.put_bytes(object_name(sha("b")), b"B")
    with machine("b") as home:
        with pytest.raises(StorageError, match="not what its manifest says"):
            default_store().path(made)
        assert not list(home.glob("store/??/*"))


def test_a_shared_artifact_that_lost_a_file_is_made_anew_by_the_next_run(shared: SharedStore, machine: type) -> None:
    with machine("a"):
        made = DirectRunner().run(text, n=2)
    shared.location.delete([object_name(sha("b"))])  # as a bucket's lifecycle rule does
    with machine("b"):
        runner = DirectRunner()
        with pytest.raises(StorageError, match="object does not exist"):
            runner.run(reader, table=runner.run(text, n=2))
        again = DirectRunner()
        again.run(reader, table=again.run(text, n=2))
    assert CALLS == ["text", "reader", "text", "reader"]  # the first reader asked for the lost file
    assert shared.manifest(made) is not None


@pytest.mark.parametrize("content", [b"", b'{"artifact": {"kind": "te', b'{"artifact": {"kind": 1}}', b"[]"])
def test_a_truncated_shared_record_is_no_record(shared: SharedStore, machine: type, content: bytes) -> None:
    with machine("a"):
        runner = DirectRunner()
        runner.run(text, n=2)
        shared.location.put_bytes(record_name(runner.history[0].key), content)
    with machine("b"):
        again = DirectRunner()
        again.run(text, n=2)
        assert ran(again) == [("shared-text", False)]
        assert shared.record(again.history[0].key) is not None


def test_an_upload_that_broke_off_is_no_result_and_is_made_whole(
    shared: SharedStore, machine: type, proxy: FaultProxy
) -> None:
    with machine("a"):
        proxy.fail(f"PUT .*{sha('n' * 6)}", "forbidden", times=9, code="AccessDenied")
        with pytest.raises(StorageError):
            DirectRunner().run(text, n=6)
        proxy.clear()
        assert not [name for name in names(shared) if name.startswith(("records/", "artifacts/", "locks/"))]
        DirectRunner().run(text, n=6)  # nothing was lost: it goes up now
    with machine("b"):
        DirectRunner().run(text, n=6)
    assert CALLS == ["text"]


def test_a_file_that_artifacts_have_in_common_is_sent_once(
    shared: SharedStore, machine: type, proxy: FaultProxy
) -> None:
    with machine("a"):
        DirectRunner().run(text, n=6)
        proxy.clear()
        DirectRunner().run(text, n=7)
    assert len([put for put in proxy.puts() if "/objects/" in put]) == 1  # `b.txt` is there


def test_a_read_only_store_is_read_and_never_written(
    shared: SharedStore, machine: type, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine("a"):
        made = DirectRunner().run(text, n=6)
    monkeypatch.setenv("COALORA_STORE_READ_ONLY", "1")
    with machine("b"):
        proxy.clear()
        runner = DirectRunner()
        runner.run(reader, table=runner.run(text, n=6))
        assert ran(runner) == [("shared-text", True), ("shared-reader", False)]
        assert default_store().verify(made) == []
        assert proxy.puts() == []
    assert CALLS == ["text", "reader"]
    monkeypatch.setenv("COALORA_STORE_READ_ONLY", "yes")
    with pytest.raises(CoaloraError, match="COALORA_STORE_READ_ONLY is 'yes'"):
        default_store()


def test_use_is_noted_in_the_bucket_once_a_day(
    shared: SharedStore, machine: type, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine("a"):
        DirectRunner().run(text, n=6)
        proxy.clear()
        DirectRunner().run(text, n=6)
        assert not [put for put in proxy.puts() if "/artifacts/" in put]
        monkeypatch.setattr("pipeline.store.shared.USED_SECONDS", -1.0)
        DirectRunner().run(text, n=6)
        assert len([put for put in proxy.puts() if "/artifacts/" in put]) == 1


HOSTILE = {
    "above": [["../evil", 1, "0" * 64]],
    "absolute": [["/tmp/evil", 1, "0" * 64]],
    "inside out": [["a/../../evil", 1, "0" * 64]],
    "twice": [["a", 1, "0" * 64], ["a", 2, "1" * 64]],
    "a folder": [["a", 1, "0" * 64], ["a/b", 1, "0" * 64]],
    "negative": [["a", -1, "0" * 64]],
    "digest": [["a", 1, "../" * 21 + "0"]],
    "marker": [[".coalora-artifact", 1, "0" * 64]],
    "manifest": [["manifest.json", 1, "0" * 64]],
}


@pytest.mark.parametrize("files", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_manifest_with_the_right_digest_writes_nothing(
    shared: SharedStore, machine: type, tmp_path: Path, files: list[list[Any]]
) -> None:
    digest = sha(json.dumps(sorted(files), separators=(",", ":")))
    rows = [dict(zip(("path", "size", "sha256"), row, strict=True)) for row in files]
    shared.location.put_bytes(manifest_name(digest), json_bytes({"files": rows}))
    for row in rows:
        shared.location.put_bytes(f"objects/{row['sha256'][:2]}/{row['sha256']}".replace("/../", "/"), b"x")
    with machine("b") as home:
        with pytest.raises(CoaloraError, match="neither on this machine nor in"):
            default_store().path(Artifact(kind="text", digest=digest, nbytes=1))
        assert not list(home.glob("store/??/*"))
    assert not [p for p in tmp_path.rglob("*") if "evil" in p.name]
    assert not Path("/tmp/evil").exists()


def test_an_object_that_is_larger_than_stated_is_not_kept(shared: SharedStore, machine: type) -> None:
    with machine("a"):
        made = DirectRunner().run(text, n=2)
    shared.location.put_bytes(object_name(sha("b")), b"b" * 10_000_000)
    with machine("b") as home:
        with pytest.raises(StorageError, match="not what its manifest says"):
            default_store().path(made)
        assert sum(p.stat().st_size for p in home.rglob("*") if p.is_file() and p.suffix != ".lock") < 1_000_000


def test_a_download_that_was_killed_leaves_nothing_that_looks_whole(shared: SharedStore, machine: type) -> None:
    with machine("a"):
        made = DirectRunner().run(text, n=6)
    with machine("b") as home:
        work = home / "store" / ".tmp" / f"download-{made.digest}"
        work.mkdir(parents=True)
        (work / "b.txt").write_text("half")
        assert (default_store().path(made) / "b.txt").read_text() == "b"
        assert not work.exists()


@pytest.mark.parametrize("url", ["bucket/prefix", "https://bucket", "s3://", "s3://user:secret@bucket/prefix"])
def test_an_address_that_is_none_is_said_without_secrets(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COALORA_STORE", url)
    with pytest.raises(CoaloraError, match=r"COALORA_STORE.*s3://BUCKET/PREFIX") as caught:
        default_store().path(Artifact(kind="a", digest="0" * 64, nbytes=0))
    assert "secret" not in str(caught.value)


def lease(shared: SharedStore, ttl: float = 60.0) -> Lease:
    return Lease(shared.location, "locks/a.json", ttl=ttl)


def test_a_lease_has_one_holder_and_is_free_when_it_is_given_back(shared: SharedStore) -> None:
    one, two = lease(shared), lease(shared)
    assert one.try_acquire()
    assert not two.try_acquire()
    assert two.holder().startswith("process ")
    one.release()
    assert names(shared) == []
    assert two.try_acquire()
    two.release()


def test_a_holder_that_lives_keeps_its_lease_beyond_the_ttl(shared: SharedStore) -> None:
    one, two = lease(shared, ttl=2), lease(shared, ttl=2)
    assert one.try_acquire()
    end = time.monotonic() + 4.5
    while time.monotonic() < end:
        assert not two.try_acquire()
        time.sleep(0.2)
    one.release()


def test_an_expired_lease_is_taken_over_by_one_of_many_and_its_old_holder_does_not_free_it(shared: SharedStore) -> None:
    dead = lease(shared, ttl=1)
    assert dead.try_acquire()
    dead._stop.set()  # it is not heard of any more
    heirs = [lease(shared, ttl=1) for _ in range(4)]
    got: list[Lease] = []

    def inherit(heir: Lease) -> None:
        end = time.monotonic() + 4
        while time.monotonic() < end and not got:
            if heir.try_acquire():
                got.append(heir)

    threads = [threading.Thread(target=inherit, args=(heir,)) for heir in heirs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(got) == 1
    got[0]._stop.set()  # no renewal between the two looks below
    assert got[0]._thread is not None
    got[0]._thread.join(30)
    dead.release()
    seen = shared.location.get("locks/a.json")
    assert seen is not None
    assert seen.etag == got[0]._etag
    got[0].release()


def test_machines_wait_for_each_other_and_inherit_from_the_killed(
    server: dict[str, str], shared: SharedStore, tmp_path: Path
) -> None:
    traced = Traced.at(tmp_path / "traced", **server, TTL="3")
    killed, heir, third = (traced.prepare(name, home=name) for name in ("killed", "heir", "third"))
    traced.let("killed")
    until(killed, "begun")
    traced.let("heir")
    assert f"waiting for process {killed.pid} on " in until(heir, "waiting for")
    killed.kill()
    assert killed.wait(30) == -signal.SIGKILL
    assert "taken over from process" in until(heir, "begun")
    traced.let("third")
    until(third, "waiting for")
    shutil.rmtree(tmp_path / "traced" / "killed")
    traced.go()
    assert "False n" in until(heir, "done")
    assert "True n" in until(third, "done")  # computed elsewhere, downloaded, whole
    assert (heir.wait(30), third.wait(30)) == (0, 0)
    assert traced.calls == 2
    assert not [name for name in names(shared) if name.startswith("locks/")]
