"""Every pipeline that the two files promise: its settings parse, its deployment builds, its model has the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import prefect
import pytest
import yaml
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.schema_tools import validate

from coalora.export.profile import DeviceProfile
from flows.devices import devices
from flows.main import pipeline
from pipeline.orchestration.server import FILE_VARIABLE, check_deployment
from pipeline.preflight import preflight
from pipeline.settings.definitions import load_settings, read_pipelines
from pipeline.settings.sections import Settings
from tasks.register import EVENT, RESOURCE
from tests.flows.architectures import ARCHITECTURES, write_model

ROOT = Path(__file__).parents[2]
OWN, PAPER = ROOT / "pipelines.yaml", ROOT / "pipelines-paper.yaml"
CONTENT: dict[Path, Any] = {file: yaml.safe_load(file.read_text(encoding="utf-8")) for file in (OWN, PAPER)}
DEPLOYMENTS = {d["name"]: d for content in CONTENT.values() for d in content["deployments"]}
FILES = {name: file for file in CONTENT for name in read_pipelines(file)}
NAMES = sorted(FILES)


@pytest.fixture(scope="module")
def flow() -> prefect.Flow[..., Any]:
    """The flow as a worker loads it: from the entrypoint, in the checkout's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return load_flow_from_entrypoint(DEPLOYMENTS["demo"]["entrypoint"])


def on_this_machine(name: str, folder: Path) -> Settings:
    """Settings of a pipeline with a local config in place of the hub's model."""
    settings = load_settings(name, file=FILES[name])
    if settings.model.name_or_path is None:
        return settings
    model = write_model(folder, ARCHITECTURES[settings.model.name_or_path].config)
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"name_or_path": str(model), "gguf_file": None}),
            "target_modules": None,
        }
    )


def test_definitions_and_deployments_correspond() -> None:
    for file, content in CONTENT.items():
        trainings = [d["name"] for d in content["deployments"] if d["entrypoint"] == "flows/main.py:pipeline"]
        assert sorted(trainings) == sorted(read_pipelines(file))
    assert set(read_pipelines(PAPER)) == {
        "roberta-large-sst2", "roberta-large-qnli", "roberta-large-mnli", "roberta-large-qqp",
        "qwen-1-5b-c4", "qwen-3b-c4", "llama-2-7b-c4",
    }  # fmt: skip


def test_repro_names_a_pipeline() -> None:
    assert CONTENT[OWN]["definitions"]["repro"] in read_pipelines(OWN)


def test_deploying_one_s_own_file_brings_none_of_the_paper_s_and_its_runs_know_their_file() -> None:
    assert not set(read_pipelines(OWN)) & set(read_pipelines(PAPER))
    for name in read_pipelines(PAPER):
        env = DEPLOYMENTS[name]["work_pool"]["job_variables"]["env"]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setenv(FILE_VARIABLE, env[FILE_VARIABLE])
            check_deployment(name, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_deployment_runs_the_definition_of_its_name(name: str) -> None:
    deployment, definitions = DEPLOYMENTS[name], CONTENT[FILES[name]]["definitions"]
    assert deployment["parameters"]["name"] == name
    # Identity, not equality: an anchor. A copy would be written twice and drift apart.
    assert deployment["parameters"]["settings"] is definitions["pipelines"][name]
    assert deployment["work_pool"] is definitions["work_pool"]
    assert deployment["description"]
    assert deployment["entrypoint"] == "flows/main.py:pipeline"
    # Nothing starts by itself, and no pipeline twice at a time.
    assert [(schedule["active"], len(schedule["cron"].split())) for schedule in deployment["schedules"]] == [(False, 5)]
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


def test_pairs_for_devices_follow_the_champion() -> None:
    found = DEPLOYMENTS["demo-devices"]
    assert found["parameters"]["source"] == "models:/coalora-demo@champion"
    assert all(DeviceProfile.load(name).to for name in found["parameters"]["profiles"])
    validate(found["parameters"], devices.parameters.model_dump(), raise_on_error=True)
    (trigger,) = (DeploymentEventTrigger.model_validate(trigger) for trigger in found["triggers"])
    assert trigger.expect == {EVENT}
    assert trigger.match.root == {"prefect.resource.id": f"{RESOURCE}.coalora-demo"}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_a_deployment_fit_the_flow(name: str, flow: prefect.Flow[..., Any]) -> None:
    parameters = DEPLOYMENTS[name]["parameters"]
    validated = flow.validate_parameters(parameters)
    assert type(validated["settings"]).__name__ == "Settings"
    assert validated["settings"].model_dump() == load_settings(name, file=FILES[name]).model_dump()
    # The server checks them against the schema of the flow, where text such as 1e-3 is no number.
    schema = flow.parameters.model_dump()
    validate(parameters, schema, raise_on_error=True)


@pytest.mark.parametrize("wrong", [{"settings": {"seed": 1}}, {"name": "x"}, {"refresh": 3}])
def test_parameters_that_do_not_fit_are_refused_by_flow_and_schema(wrong: dict[str, Any]) -> None:
    good = DEPLOYMENTS["demo"]["parameters"]
    parameters = {**wrong} if set(wrong) == {"name"} else {**good, **wrong}
    with pytest.raises(prefect.exceptions.ParameterTypeError):
        pipeline.validate_parameters({"settings": None, **parameters})
    with pytest.raises(Exception, match=r"required|not of type|is not"):
        validate(parameters, pipeline.parameters.model_dump(), raise_on_error=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_deployment_builds(name: str) -> None:
    described = DEPLOYMENTS[name]
    built = pipeline.to_deployment(
        name, parameters=described["parameters"], tags=described["tags"], description=described["description"],
        work_pool_name=described["work_pool"]["name"], job_variables=described["work_pool"].get("job_variables"),
    )  # fmt: skip
    assert isinstance(built, RunnerDeployment)  # and no coroutine
    assert (built.name, built.flow_name, built.enforce_parameter_schema) == (name, "pipeline", True)
    assert str(built.entrypoint).endswith("flows/main.py:pipeline")


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_passes_every_check_that_needs_no_data(name: str, tmp_path: Path) -> None:
    settings = on_this_machine(name, tmp_path / "model")
    found = preflight(settings, root=None)
    source = load_settings(name, file=FILES[name]).model.name_or_path
    if source is not None:
        assert (len(found.layers), found.n_weights) == (ARCHITECTURES[source].n_layers, ARCHITECTURES[source].n_weights)
    low, high = found.bits_range
    assert all(low <= budget <= high for budget in settings.evaluation.budgets)


@pytest.mark.parametrize("name", read_pipelines(PAPER))
def test_the_papers_settings_are_the_papers(name: str) -> None:
    s = load_settings(name, file=PAPER)
    assert (s.adapter.r, s.training.lr, s.training.theta_lr) == (64, 1e-4, 1e-4)
    recipe = s.adapter.resolved(s.benchmark.task)  # theta for all choices, and nothing beside the pair
    assert (recipe.compensation_rank, recipe.expert_bits, recipe.theta) == (0, 0, "others")
    assert (s.initial_set.size, s.initial_set.min_budget, s.initial_set.max_budget) == (50, 2.25, 7.25)
    assert (s.search.segments, s.search.delta, s.training.sampling, s.training.paired) == (40, 1, "uniform", False)
    assert s.choices.allow == {}  # all 432
    length, epochs, n_train = {
        "sst2": (128, 10, 67_349), "qnli": (128, 10, 104_743), "mnli": (128, 10, 392_702), "qqp": (128, 10, 363_846),
        "c4": (1024, 5, s.benchmark.n_train),
    }[s.benchmark.name]  # fmt: skip
    assert s.benchmark.max_length == length
    assert n_train is not None
    steps = s.training.initial_steps + s.search.rounds * s.training.round_steps
    assert steps * s.training.batch_size / n_train == pytest.approx(epochs, rel=0.002)
