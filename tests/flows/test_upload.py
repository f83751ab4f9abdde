"""A run publishes itself under Prefect, its version says where, and no credential is left behind anywhere."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from coalora.cli import main
from coalora.export.base import load_adapted
from tests.commands import refused
from tests.flows.checkout import Checkout, computed
from tests.s3_server import ACCESS_KEY, SECRET_KEY, SESSION_TOKEN, FaultProxy, create_bucket, set_credentials

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def proxy(s3: FaultProxy) -> FaultProxy:
    create_bucket(s3.url, "models")
    return s3


@pytest.fixture(scope="module")
def published(finished: tuple[Checkout, str], proxy: FaultProxy) -> tuple[Checkout, str]:
    """The finished run once more, now with S3, and what that printed."""
    credentials: dict[str, str] = {}
    set_credentials(credentials.__setitem__)
    checkout = replace(
        finished[0], environment=finished[0].environment | credentials | {"AWS_ENDPOINT_URL_S3": proxy.url}
    )
    return checkout, checkout.pipeline("storage.publish=true", "storage.bucket=models", "storage.prefix=team/coalora")


@pytest.fixture
def here(published: tuple[Checkout, str], monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """This process in the checkout, with its environment."""
    checkout = published[0]
    for name, value in checkout.environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("COALORA_HOME", raising=False)
    monkeypatch.chdir(checkout.root)
    return checkout


def run_name(checkout: Checkout) -> str:
    return os.readlink(checkout.latest)


def test_publishing_computes_nothing_and_tags_the_registered_version(published: tuple[Checkout, str]) -> None:
    checkout, output = published
    address = f"s3://models/team/coalora/runs/tiny/{run_name(checkout)}"
    assert f"Published in S3: {address}" in output
    assert computed(output) == []  # where a run is kept decides no result
    client = MlflowClient(f"sqlite:///{checkout.root / '.coalora' / 'mlflow.db'}")
    version = client.get_model_version_by_alias("coalora-tiny", "champion")
    assert version.tags["s3_address"] == address
    assert client.get_run(str(version.run_id)).data.tags["s3_address"] == address


def test_the_command_sends_nothing_twice_and_another_place_gets_all(
    here: Checkout, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.clear()
    assert main(["upload", str(here.latest)]) == 0  # to the run's own place
    said = capsys.readouterr().out
    assert "published already" in said
    assert "registered model coalora-tiny version 1: tagged" in said
    assert proxy.puts() == []
    assert main(["upload", str(here.latest), "--to", "s3://models/elsewhere"]) == 0
    assert f"s3://models/elsewhere/runs/tiny/{run_name(here)}: " in capsys.readouterr().out
    assert len(proxy.puts()) > 10
    assert main(["upload", str(here.latest), "--to", "s3://models/team/coalora"]) == 0  # the tag names the last one


def test_a_downloaded_run_is_the_run_and_its_adapter_loads(
    here: Checkout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "device"
    assert main(["download", "s3://models/team/coalora/runs/tiny/latest", "--out", str(out)]) == 0
    assert "all verified" in capsys.readouterr().out
    run = here.latest.resolve()
    wanted = {p.relative_to(run) for p in run.rglob("*") if p.is_file() and p.name != ".coalora-artifact"}
    got = {p.relative_to(out) for p in out.rglob("*") if p.is_file() and p.name != ".coalora-artifact"}
    assert got == wanted
    assert all((out / p).read_bytes() == (run / p).read_bytes() for p in wanted)
    model = load_adapted(out / "export/2.5-bits/base", out / "export/2.5-bits/adapter")
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.arange(1, 9)[None]).logits).all()
    no_secret_below(out)


def test_no_credential_is_in_any_log_parameter_or_artifact(published: tuple[Checkout, str], prefect_home: Path) -> None:
    checkout, output = published
    for secret in (SECRET_KEY, SESSION_TOKEN, ACCESS_KEY):
        assert secret not in output
    # MLflow's and Prefect's databases, logs, the store, run folders, DVC's files.
    assert no_secret_below(checkout.root) > 100
    assert no_secret_below(prefect_home) > 0


def no_secret_below(folder: Path) -> int:
    """How many files were searched."""
    searched = 0
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            assert not any(s.encode() in content for s in (SECRET_KEY, SESSION_TOKEN, ACCESS_KEY)), path
            searched += 1
    return searched


def test_a_bucket_that_is_missing_is_said_before_anything_runs(published: tuple[Checkout, str]) -> None:
    output = published[0].run(  # parts that are known need no bucket; the one that publishes says so
        "-m", "coalora", "stage", "registration", "tiny",
        "--set", "storage.publish=true", "storage.bucket=no-such-bucket", expect=2,
    )  # fmt: skip
    assert "The bucket does not exist" in output
    assert "Traceback" not in output
    assert computed(output) == []


def test_wrong_options_are_refused_without_repeating_a_password(here: Checkout, tmp_path: Path) -> None:
    assert "s3://BUCKET/PREFIX" in refused("upload", here.latest, "--to", "models/team")
    told = refused("upload", here.latest, "--to", "s3://models/x", "--endpoint-url", "http://me:hunter22@127.0.0.1:1")
    assert "leave credentials out of the address" in told
    assert "hunter22" not in told
    assert f"{tmp_path} is no run folder" in refused("upload", tmp_path, "--to", "s3://models/x")
