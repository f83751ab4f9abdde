"""Runs of a real server and worker: deployed, cancelled and resumed, limited by GPU, refused when stale."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import pytest
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLeaseHolder, FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker

from coalora.cli import main
from coalora.recipes import Sampling
from infra.processes import free_port
from infra.server import set_limits
from pipeline.store.store import MARKER
from tests.commands import refused
from tests.flows.checkout import PROJECT, Checkout, computed
from tests.servers import Server, prefect_server

pytestmark = pytest.mark.servers

STEPS = 300  # seconds, in which the cancellation arrives
CHANGES = {
    "settings": {"training": {"initial_steps": STEPS}, "search": {"rounds": 1}, "evaluation": {"budgets": [2.75]}}
}
SAME_BY_HAND = (f"training.initial_steps={STEPS}", "search.rounds=1", "evaluation.budgets=[2.75]")
DEPLOYMENT = "pipeline/tiny"


@pytest.fixture(scope="module")
def server(prefect_home: Path) -> Iterator[Server]:
    with prefect_server(prefect_home) as started:
        yield started


@pytest.fixture(scope="module")
def checkout(make_checkout: Callable[[str], Checkout], server: Server) -> Iterator[Checkout]:
    """A checkout that is deployed, with a worker."""
    made = make_checkout("deployed")
    template = ProcessWorker.get_default_base_job_template()
    server.client.create_work_pool(WorkPoolCreate(name="coalora", type="process", base_job_template=template))
    server.deploy(made.root)
    with server.worker(made.root):
        yield made


def test_a_deployment_has_pool_tags_description_limit_and_a_schedule_that_is_off(
    server: Server, checkout: Checkout
) -> None:
    found = server.client.read_deployment_by_name(DEPLOYMENT)
    assert (found.work_pool_name, set(found.tags)) == ("coalora", {"coalora", "cpu"})
    assert found.description == "Seconds on a CPU."
    assert found.global_concurrency_limit is not None
    assert found.global_concurrency_limit.limit == 1
    (schedule,) = found.schedules
    assert (schedule.active, schedule.schedule.cron) == (False, "0 2 * * *")


def test_the_form_has_titles_descriptions_defaults_ranges_and_choices(server: Server, checkout: Checkout) -> None:
    schema: dict[str, Any] = server.client.read_deployment_by_name(DEPLOYMENT).parameter_openapi_schema or {}
    sections = schema["definitions"]
    for section, content in sections.items():
        assert content["title"], section
        for key, field in content["properties"].items():
            assert field.get("title") or "$ref" in field or "anyOf" in field, f"{section}.{key}"
            assert field.get("description"), f"{section}.{key}"
    rounds = sections["SearchRecipe"]["properties"]["rounds"]
    assert (rounds["title"], rounds["default"], rounds["minimum"]) == ("Search rounds", 2, 0)
    assert rounds["description"].endswith("[at least 0, at most 1000]")
    assert sections["TrainingRecipe"]["properties"]["sampling"]["enum"] == list(get_args(Sampling))
    assert "train" in schema["properties"]["refresh"]["items"]["enum"]
    assert schema["properties"]["changes"]["default"] == []


def test_what_does_not_fit_the_form_is_refused_before_a_run_is_made(server: Server, checkout: Checkout) -> None:
    with pytest.raises(Exception, match=r"settings.search.rounds.*-1 is less than the minimum of 0"):
        server.start(DEPLOYMENT, {"settings": {"search": {"rounds": -1}}})


@pytest.fixture(scope="module")
def resumed(server: Server, checkout: Checkout) -> tuple[str, FlowRun]:
    """What a run that was cancelled in mid-training said last, and the run after it."""
    first = server.start(DEPLOYMENT, CHANGES)
    server.wait_for_worker(checkout.root, "training coa, round 0: ")
    server.cancel(first)
    kept = server.wait_for_log(first, "a checkpoint is kept for the next run")
    assert server.wait(first) == "Cancelled"
    second = server.start(DEPLOYMENT, {"changes": list(SAME_BY_HAND)})  # as from the command line: the same run
    assert server.wait(second) == "Completed"
    return kept, second


def test_a_run_goes_on_at_the_step_where_the_one_before_it_was_cancelled(
    server: Server, checkout: Checkout, resumed: tuple[str, FlowRun]
) -> None:
    kept, run = resumed
    words = server.wait_for_log(run, "resumed from the checkpoint")
    # "stopped at step 40 of 300; ..." and "resumed from the checkpoint at step 40 of 300"
    assert kept.split(" at ")[1].split(";")[0] == words.split(" at ")[1]
    assert not list(checkout.root.glob(".coalora/checkpoints/*"))
    assert (checkout.latest / "export" / "2.75-bits" / "adapter").is_dir()  # the budget that the form was given


def test_its_states_are_those_of_an_undisturbed_run(checkout: Checkout, resumed: tuple[str, FlowRun]) -> None:
    undisturbed = Checkout(checkout.root, checkout.environment | {"COALORA_HOME": str(checkout.root / "another")})
    assert "train" in computed(undisturbed.stage("training", *SAME_BY_HAND))
    for method in ("coa", "shared"):
        digest = json.loads((checkout.root / "outputs" / "training" / method / MARKER).read_text())["digest"]
        for home in (".coalora", "another"):
            assert (checkout.root / home / "store" / digest[:2] / digest).is_dir()


def test_a_person_finds_stages_in_words_the_front_of_every_round_and_the_result(
    server: Server, resumed: tuple[str, FlowRun]
) -> None:
    names = {task.name for task in server.task_runs(resumed[1])}
    assert {"train CoA-LoRA, round 0", "Pareto search, round 1", "version the set with DVC, round 1"} <= names
    assert any(name.startswith("evaluate Shared-LoRA, configurations 1 to") for name in names)
    history = sorted(server.artifacts("tiny-pareto-front"), key=lambda artifact: artifact.created)
    assert [a.description for a in history] == [
        f"Picture of round {i}, beside those before" for i in (0, 0, 1)
    ]  # one was cancelled
    page = str(history[-1].data)
    assert "![Fronts up to round 1](data:image/png;base64,iVBOR" in page
    assert "| average bits per weight | loss, nats per token ↓ |" in page
    assert server.artifacts("tiny-pareto-front-table")
    (result,) = server.artifacts("tiny-result")
    for words in ("Hypervolume", "report.html", "mlflow ui --backend-store-uri", "coalora-tiny, version 1"):
        assert words in str(result.data)


def test_a_gpu_task_without_a_free_slot_waits_and_says_so(server: Server, checkout: Checkout) -> None:
    assert set_limits(server.client, 1) == ["tag gpu: 1 at a time"]
    holder = ConcurrencyLeaseHolder(type="task_run", id=uuid4())
    lease = server.client.increment_concurrency_slots_with_lease(
        names=["tag:gpu"], slots=1, mode="concurrency", lease_duration=120, holder=holder
    ).json()["lease_id"]
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "tests/flows/gpu_task.py")], cwd=checkout.root, text=True,
        env=server.environment | {"PYTHONPATH": str(checkout.root)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "waits for a free GPU" in line:
            break
    else:
        raise AssertionError("".join(lines))
    # The task on the CPU took no slot, and went before.
    assert sum("hold: computed" in line for line in lines) == 1
    assert f"the limit of tag 'gpu' is 1 at a time, taken by task run {holder.id}" in lines[-1]
    time.sleep(1)
    assert process.poll() is None
    server.client.release_concurrency_slots_with_lease(lease)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 0, rest
    assert "hold: got a slot after" in rest
    assert "hold: reused" in rest  # what is there already needs no GPU
    assert not server.artifacts("gpu-test-training-coa")  # a loop that is done stands between no results


def test_a_deployment_without_its_pipeline_is_refused_found_and_removed(
    server: Server, checkout: Checkout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkout.root / "pipelines.yaml"
    file.write_text(file.read_text().replace("    tiny: &tiny", "    renamed: &tiny"))
    run = server.start(DEPLOYMENT)
    assert server.wait(run) == "Failed"
    message = server.client.read_flow_run(run.id).state.message or ""
    assert "Deployment 'pipeline/tiny' is left over: pipelines.yaml defines no 'tiny' any more" in message
    assert "coalora deployments --file pipelines.yaml --remove" in message
    monkeypatch.chdir(checkout.root)
    with temporary_settings({PREFECT_API_URL: server.api}):
        for arguments in ([], ["--remove"], []):
            assert main(["deployments", *arguments]) == 0
    first, remark, removed, last = capsys.readouterr().out.splitlines()
    assert first == "pipeline/tiny: its pipeline is not in pipelines.yaml"
    assert "--remove" in remark
    assert removed == "pipeline/tiny: removed"
    assert last.startswith("every deployment")


@pytest.mark.parametrize("command", ["run", "limits", "deployments"])
def test_a_server_that_is_not_running_is_named_with_what_to_do(
    command: str,
) -> None:
    file = str(PROJECT / "tests/flows/tiny.yaml")
    arguments = {
        "run": ["tiny", "--file", file, "--set", "versioning.enabled=false"],
        "limits": ["--gpus", "1"],
        "deployments": ["--file", file],
    }[command]
    address = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: address}):
        words = refused(command, *arguments)
    for part in ("No Prefect server answers at", address, "prefect server start"):
        assert part in words
