"""The real servers, from a schedule to another clone: killed, resumed, registered, restored, reproduced."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Crashed

from coalora.files import read_json
from tests.e2e.site import PIPELINE, Site, site, trained_steps, wait_for_checkpoint, wait_for_files, write_pipelines
from tests.flows.checkout import Checkout, computed, reused

pytestmark = pytest.mark.servers

STEPS = 300
DEPLOYMENT = f"pipeline/{PIPELINE}"


@pytest.fixture(scope="module")
def stack(make_checkout: Callable[[str], Checkout], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(make_checkout("site"), tmp_path_factory.mktemp("stack"), initial_steps=STEPS) as made:
        yield made


@pytest.fixture(scope="module")
def killed(stack: Site) -> FlowRun:
    """The run that a schedule began, and whose worker was killed in mid-training."""
    server = stack.server
    run = server.scheduled(DEPLOYMENT)
    deployment = server.client.read_deployment_by_name(DEPLOYMENT)
    for schedule in deployment.schedules:  # one run is enough
        server.client.update_deployment_schedule(deployment.id, schedule.id, active=False)
    checkpoints = stack.checkout.root / ".coalora" / "checkpoints"
    wait_for_files(checkpoints, "train-*/*")
    server.wait_for_log(run, "training coa, round 0: ")
    # A slow disk gets fewer checkpoints: the kill comes when there is one of what was told.
    wait_for_checkpoint(checkpoints, lambda: max(trained_steps(server.logs(run))))
    stack.kill_worker()
    for other in server.client.read_flow_runs():  # due before the schedule was off, it would go on in this one's place
        if other.id != run.id:
            server.client.delete_flow_run(other.id)
    return run


@pytest.fixture(scope="module")
def resumed(stack: Site, killed: FlowRun) -> FlowRun:
    """The run that a person starts when the worker is back."""
    server = stack.server
    # What Prefect's own watch over heartbeats does after some minutes: the slot of the dead run is free again.
    server.client.set_flow_run_state(killed.id, Crashed(message="its worker is gone"), force=True)
    stack.up()
    run = server.start(DEPLOYMENT)
    assert server.wait(run, timeout=300) == "Completed", "\n".join(server.logs(run)[-40:])
    return run


@pytest.fixture(scope="module")
def undisturbed(make_checkout: Callable[[str], Checkout]) -> Checkout:
    """The same pipeline, run once without any server."""
    checkout = make_checkout("undisturbed")
    write_pipelines(checkout.root, STEPS)
    checkout.pipeline("versioning.enabled=false", "versioning.push=false")
    return checkout


@pytest.fixture(scope="module")
def elsewhere(stack: Site, resumed: FlowRun, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Another clone with nothing in it but what is committed, which reaches the same S3."""
    stack.checkout.git("add", "--all")
    stack.checkout.git("commit", "--quiet", "--message", "The run's sets")
    root = tmp_path_factory.mktemp("elsewhere") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(stack.checkout.root), str(root)], check=True)
    forks = os.environ["PRELOADED_PYTHON"]  # for the stages of `dvc repro`
    path = f"{Path(forks).parent}:{stack.checkout.environment['PATH']}"
    return Checkout(root, stack.checkout.environment | {"PRELOADED_PYTHON": forks, "PATH": path})


def test_the_run_of_a_schedule_goes_on_at_a_step_when_its_worker_was_killed(
    stack: Site, killed: FlowRun, resumed: FlowRun
) -> None:
    reached = max(trained_steps(stack.server.logs(killed)))
    (words,) = [line for line in stack.server.logs(resumed) if "resumed from the checkpoint at step" in line]
    assert reached <= int(words.split("at step ")[1].split()[0]) < STEPS
    assert min(trained_steps(stack.server.logs(resumed))) > reached


def test_it_ends_with_the_result_of_an_undisturbed_run(stack: Site, resumed: FlowRun, undisturbed: Checkout) -> None:
    for file in ("report/metrics.json", "bundle/adapter.safetensors", "bundle/configurations.json"):
        assert (stack.checkout.latest / file).read_bytes() == (undisturbed.latest / file).read_bytes(), file


def test_the_registry_has_the_version_with_its_tags(stack: Site, resumed: FlowRun) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(stack.checkout.environment["MLFLOW_TRACKING_URI"])
    (version,) = client.search_model_versions(f"name='coalora-{PIPELINE}'")
    assert client.get_model_version_by_alias(f"coalora-{PIPELINE}", "champion").version == version.version
    assert {"hypervolume", "average_bits_range", "base_model_digest", "dvc_md5", "git_commit"} <= set(version.tags)
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"


def test_another_clone_restores_the_last_set_from_s3(stack: Site, elsewhere: Checkout) -> None:
    elsewhere.run("-m", "coalora", "restore", "--rev", "HEAD", "--pipeline", PIPELINE, "--out", "set.json")
    restored = json.loads((elsewhere.root / "set.json").read_text())
    assert restored == json.loads((stack.checkout.root / f"configurations/{PIPELINE}/round-01.json").read_text())


def test_repro_in_the_other_clone_computes_nothing_that_s3_holds(stack: Site, elsewhere: Checkout) -> None:
    output = elsewhere.repro()
    assert computed(output) == []
    assert {"train", "search", "calibrate"} <= set(reused(output))
    found = read_json(elsewhere.root / "outputs/report/metrics.json")
    assert found == read_json(stack.checkout.latest / "report/metrics.json")


def test_the_run_in_the_ui_links_report_and_front(stack: Site, resumed: FlowRun) -> None:
    keys = {artifact.key for artifact in stack.server.client.read_artifacts() if artifact.key}
    assert any("front" in key for key in keys), keys


def test_no_key_of_the_store_is_in_a_log(stack: Site, resumed: FlowRun) -> None:
    secret = stack.checkout.environment["AWS_SECRET_ACCESS_KEY"]
    logs: list[Path] = list((stack.folder / "logs").glob("*.log"))
    assert logs
    assert not [log.name for log in logs if secret in log.read_text(errors="replace")]
    assert not [line for line in stack.server.logs(resumed) if secret in line]
