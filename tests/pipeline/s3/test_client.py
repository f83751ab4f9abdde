"""Objects arrive whole or not at all; faults end in a retry that succeeds or in an error that says what to do."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import socket
from pathlib import Path

import pytest

from coalora.errors import CoaloraError
from coalora.files import file_sha256
from pipeline.s3.client import Megabytes, S3Address, S3Location, Transfer
from pipeline.s3.errors import StorageError
from pipeline.settings.sections import StorageSettings
from tests.s3_server import ACCESS_KEY, SECRET_KEY, SESSION_TOKEN, FaultProxy

pytestmark = pytest.mark.servers

MIB = 1 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of three parts."""
    path = tmp_path_factory.mktemp("large") / "quantized.safetensors"
    path.write_bytes(os.urandom(11 * MIB))
    return path


def send(place: S3Location, path: Path, name: str = "x/large", sha256: str | None = None) -> None:
    place.put_files([Transfer(path, name, path.stat().st_size, sha256 or file_sha256(path))], "uploading")


def fetch(place: S3Location, source: Path, target: Path, name: str = "x/large") -> None:
    place.get_files([Transfer(target, name, source.stat().st_size, file_sha256(source))], "downloading")


def content(place: S3Location, name: str) -> bytes | None:
    found = place.get(name)
    return None if found is None else found.content


def test_a_small_object_comes_back_with_its_digest(place: S3Location) -> None:
    etag = place.put_bytes("x/a.json", b"content")
    found = place.head("x/a.json")
    assert found is not None
    assert (found.name, found.size, found.etag) == ("x/a.json", 7, etag)
    assert found.sha256 == "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    read = place.get("x/a.json")
    assert read is not None
    assert (read.content, read.etag) == (b"content", etag)
    assert 0 <= read.age < 60
    assert place.head("x/b.json") is None
    assert place.get("x/b.json") is None


def test_listing_is_below_the_prefix_and_deleting_what_is_gone_is_no_error(place: S3Location) -> None:
    for name in ("x/1", "x/2", "y"):
        place.put_bytes(name, b"")
    S3Location(S3Address(place.address.bucket, "team/models-of-others"), place.settings).put_bytes("z", b"")
    assert [o.name for o in place.list()] == ["x/1", "x/2", "y"]
    assert [o.name for o in place.list("x/")] == ["x/1", "x/2"]
    place.delete(["x/1", "never-there"])
    assert [o.name for o in place.list()] == ["x/2", "y"]


def test_a_lock_is_given_once(place: S3Location) -> None:
    assert place.put_bytes("lock", b"holder 1", if_absent=True) is not None
    assert place.put_bytes("lock", b"holder 2", if_absent=True) is None
    assert content(place, "lock") == b"holder 1"


def test_a_lock_is_taken_over_by_one_of_two(place: S3Location) -> None:
    etag = place.put_bytes("lock", b"dead holder", if_absent=True)
    assert place.put_bytes("lock", b"first", if_match=etag) is not None
    assert place.put_bytes("lock", b"second", if_match=etag) is None
    assert place.put_bytes("never-there", b"x", if_match=etag) is None
    assert content(place, "lock") == b"first"


def test_a_lock_whose_answer_was_lost_is_still_its_callers(place: S3Location, proxy: FaultProxy) -> None:
    fault = proxy.fail("PUT .*lock", "lost-answer")
    assert place.put_bytes("lock", b"holder 1, token 4711", if_absent=True) is not None
    assert fault.met == 1
    assert place.put_bytes("lock", b"holder 2, token 4712", if_absent=True) is None


def test_a_large_file_travels_in_parts_and_comes_back(
    place: S3Location, proxy: FaultProxy, large: Path, tmp_path: Path
) -> None:
    send(place, large)
    parts = [r for r in proxy.requests if "partNumber" in r]
    assert len(parts) == 3
    found = place.head("x/large")
    assert found is not None
    assert (found.size, found.sha256) == (11 * MIB, file_sha256(large))
    target = tmp_path / "new folder" / "got"
    fetch(place, large, target)
    assert target.read_bytes() == large.read_bytes()
    assert [p.name for p in target.parent.iterdir()] == ["got"]


@pytest.mark.parametrize("kind", ["cut-request", "close", "busy", "lost-answer"])
def test_a_part_that_fails_is_sent_again(place: S3Location, proxy: FaultProxy, large: Path, kind: str) -> None:
    fault = proxy.fail("partNumber=2", kind, times=2)
    send(place, large)
    assert fault.met == 2
    assert len([r for r in proxy.requests if "partNumber" in r]) == 5
    found = place.head("x/large")
    assert found is not None
    assert found.size == 11 * MIB


def test_a_part_that_is_altered_on_the_way_is_refused_and_nothing_appears(
    place: S3Location, proxy: FaultProxy, large: Path
) -> None:
    proxy.fail("partNumber=2", "flip", times=99)
    with pytest.raises(StorageError, match="altered on the way"):
        send(place, large)
    assert place.head("x/large") is None


def test_an_upload_that_fails_for_good_leaves_no_object_and_no_parts(
    place: S3Location, proxy: FaultProxy, large: Path
) -> None:
    fault = proxy.fail("partNumber=3", "busy", times=99)
    with pytest.raises(StorageError, match=r"overloaded.*SlowDown.*Run the same command again"):
        send(place, large)
    assert fault.met == 3  # settings.attempts, no more
    assert place.head("x/large") is None
    assert place.client.list_multipart_uploads(Bucket=place.address.bucket).get("Uploads", []) == []


def test_a_file_that_changes_while_it_is_sent_is_not_kept(place: S3Location, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"new content")
    with pytest.raises(CoaloraError, match="was changed while it was uploaded"):
        send(place, path, "a", "0" * 64)
    assert place.head("a") is None


def test_a_download_that_is_cut_in_mid_body_is_asked_for_again(
    place: S3Location, proxy: FaultProxy, large: Path, tmp_path: Path
) -> None:
    send(place, large)
    fault = proxy.fail("GET .*large", "cut-answer", times=2)
    fetch(place, large, tmp_path / "got")
    assert fault.met == 2
    assert (tmp_path / "got").read_bytes() == large.read_bytes()


def test_bytes_that_are_altered_on_the_way_down_are_fetched_once_more(
    place: S3Location, proxy: FaultProxy, large: Path, tmp_path: Path
) -> None:
    send(place, large)
    fault = proxy.fail("GET .*large", "flip-answer")
    fetch(place, large, tmp_path / "got")
    assert fault.met == 1
    assert (tmp_path / "got").read_bytes() == large.read_bytes()


def test_a_damaged_object_gets_no_name_and_a_longer_one_is_not_read_to_its_end(
    place: S3Location, proxy: FaultProxy, large: Path, tmp_path: Path
) -> None:
    small = tmp_path / "source" / "small"
    small.parent.mkdir()
    small.write_bytes(b"small")
    for source, content in ((large, b"short"), (large, bytes(11 * MIB)), (small, bytes(9 * MIB))):
        place.put_bytes("x/large", content)
        with pytest.raises(StorageError, match=r"not what its manifest says.*Publish it again"):
            fetch(place, source, tmp_path / "got")
        assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_files_that_are_whole_are_kept_when_another_fails(
    place: S3Location, proxy: FaultProxy, large: Path, tmp_path: Path
) -> None:
    send(place, large)
    empty = tmp_path / "source"
    empty.touch()
    send(place, empty, "x/empty")
    proxy.fail("GET .*large", "cut-answer")
    proxy.fail("GET .*large", "close", times=99)
    files = [
        Transfer(tmp_path / "out" / "a", "x/empty", 0, file_sha256(empty)),
        Transfer(tmp_path / "out" / "b", "x/large", 11 * MIB, file_sha256(large)),
    ]
    with pytest.raises(StorageError, match="cannot be reached"):
        place.get_files(files, "downloading")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a"]


def test_a_full_disk_is_named(place: S3Location, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send(place, large)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("s3transfer.utils.DeferredOpenFile.write", full)
    with pytest.raises(CoaloraError, match=r"disk is full.*No space left"):
        fetch(place, large, tmp_path / "got")
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_is_too_large_is_not_read(place: S3Location, monkeypatch: pytest.MonkeyPatch) -> None:
    place.put_bytes("a", b"12345")
    monkeypatch.setattr("pipeline.s3.client._SMALL", 4)
    with pytest.raises(StorageError, match="too many to be read"):
        place.get("a")


def test_a_lifecycle_rule_frees_killed_uploads_beside_the_rules_that_are_there(place: S3Location) -> None:
    others = {"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 9}}
    place.client.put_bucket_lifecycle_configuration(
        Bucket=place.address.bucket, LifecycleConfiguration={"Rules": [others]}
    )
    assert "7 days after their start" in place.expire_uploads()
    assert "7 days after their start" in place.expire_uploads()  # once more: it replaces its own
    rules = place.client.get_bucket_lifecycle_configuration(Bucket=place.address.bucket)["Rules"]
    assert {rule["ID"] for rule in rules} >= {"theirs"}
    assert [r["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] for r in rules if r["ID"] != "theirs"] == [7]


def test_whoever_may_set_no_rule_is_told_what_to_ask_for(place: S3Location, proxy: FaultProxy) -> None:
    proxy.fail(r"GET .*\?lifecycle", "forbidden", times=9, code="AccessDenied")
    assert "administrator to add" in place.expire_uploads()


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_wrong_credentials_are_said_at_once(place: S3Location, proxy: FaultProxy, code: str) -> None:
    fault = proxy.fail(".", "forbidden", times=99, code=code)
    with pytest.raises(StorageError, match=f"does not know the credentials.*{code}.*AWS_PROFILE"):
        place.check()
    assert fault.met == 1


def test_credentials_that_allow_too_little_are_told_from_wrong_ones(place: S3Location, proxy: FaultProxy) -> None:
    proxy.fail("PUT", "forbidden", times=99, code="AccessDenied")
    with pytest.raises(StorageError, match=r"do not allow.*s3:PutObject"):
        place.put_bytes("a", b"")


def test_a_missing_bucket_is_named_by_every_method(settings: StorageSettings, tmp_path: Path) -> None:
    gone = S3Location(S3Address("no-such-bucket", "x"), settings)
    (tmp_path / "a").write_bytes(b"a")
    for call in (
        gone.check,
        lambda: gone.head("a"),
        lambda: gone.get("a"),
        lambda: gone.put_bytes("a", b"", if_absent=True),
        lambda: send(gone, tmp_path / "a", "a"),
        lambda: list(gone.list()),
        lambda: gone.delete(["a"]),
        lambda: fetch(gone, tmp_path / "a", tmp_path / "b", "a"),
    ):
        with pytest.raises(StorageError, match=r"bucket does not exist.*no-such-bucket.*storage\.bucket"):
            call()


def test_a_server_that_is_not_there_is_named(settings: StorageSettings) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    place = S3Location.of(settings.model_copy(update={"endpoint_url": url}))
    with pytest.raises(StorageError, match=f"cannot be reached.*{url}.*storage.endpoint_url"):
        place.check()


def test_no_credentials_and_no_profile_are_told_apart(
    settings: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match=r"No credentials.*locate credentials.*never write them"):
        S3Location.of(settings).check()
    with pytest.raises(StorageError, match="profile \\(nobody\\) could not be found"):
        S3Location.of(settings.model_copy(update={"profile": "nobody"}))


def test_what_settings_leave_out_comes_from_the_variables_of_aws(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    place = S3Location(S3Address(bucket))
    assert (place.endpoint, place.client.meta.region_name) == (proxy.url, "eu-central-1")
    place.check()
    assert S3Location(S3Address(bucket), StorageSettings(region="us-west-2")).client.meta.region_name == "us-west-2"
    config = tmp_path / "config"
    config.write_text("[profile lab]\nregion = eu-west-3\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.delenv("AWS_REGION")
    assert S3Location(S3Address(bucket)).client.meta.region_name == "eu-west-3"


def test_no_error_and_no_log_line_holds_a_credential(
    settings: StorageSettings, proxy: FaultProxy, large: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        place = S3Location.of(settings)  # even where all of the process is logged at level DEBUG
        proxy.fail("partNumber=1", "busy")
        send(place, large)
        proxy.fail(".", "forbidden", times=9, code="SignatureDoesNotMatch")
        with pytest.raises(StorageError) as caught:
            place.check()
    said = caplog.text + str(caught.value) + repr(pickle.loads(pickle.dumps(caught.value)))
    for secret in (SECRET_KEY, SESSION_TOKEN, ACCESS_KEY):
        assert secret not in said


@pytest.mark.parametrize(
    "text", ["demo", "http://bucket/a", "s3://", "s3:///a", "s3://Big", "s3://b", "s3://ok//a", "s3://ok/a/../b"]
)
def test_an_address_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(CoaloraError, match="no address in S3"):
        S3Address.parse(text)


def test_an_address_is_read_and_written() -> None:
    address = S3Address.parse("s3://models/team/coalora/")
    assert (address.bucket, address.prefix, str(address)) == ("models", "team/coalora", "s3://models/team/coalora")
    assert (address.key("a/b"), address.below("a/").prefix) == ("team/coalora/a/b", "team/coalora/a")
    assert S3Address.parse("s3://models").key("a") == "a"


def test_the_last_line_of_progress_comes_once_and_counts_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "coalora")
    progress = Megabytes("publishing", 2_400_000 + 20 * 1000)
    progress.add(2_400_000, "large")
    for index in range(20):
        progress.add(1000, f"small-{index}")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0] == "publishing (MB): 2/3, file large"
    assert lines[1].startswith("publishing (MB): 3/3, file small-19")
