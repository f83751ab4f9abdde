"""Claims of pipeline/tracking/registry.py and pipeline/tracking/registered_model.py, on a real sqlite registry."""

from __future__ import annotations

import base64
import json
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

import pipeline.tracking.registry as registry
from coalora.export.bundle import Bundle
from pipeline.tracking.registry import DECISION, Registered, register, requirements
from pipeline.tracking.runs import TrackedRun, Tracker
from tests import preloaded, shared
from tests.tiny_run import tiny_run

LOAD = """
import json, sys
import mlflow

mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
answers = model.predict([{"budget": 3}, {"budget": 3.5, "format": "inline"}])
answers += model.predict([{"configuration": answers[0]["configuration"]}])
refused = []
wrong = [{}, {"budget": "3"}, {"budget": True}, {"budget": -1}, {"budget": 1}, {"budget": 3, "bugdet": 4}, 3,
         {"budget": 3, "format": "zip"}, {"budget": 3, "configuration": {}}, {"configuration": {"a": {"bits": 3}}},
         {"budget": 3, "format": "link"}]
for request in wrong:
    try:
        model.predict([request])
    except Exception as error:
        refused.append(type(error).__name__)
    else:
        refused.append(None)
print(json.dumps({"answers": answers, "refused": refused}))
"""


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    home = tmp_path_factory.mktemp("home")
    return Tracker(shared.mlflow_database(home), "tests", home / "mlartifacts")


@pytest.fixture
def run(tracker: Tracker, request: pytest.FixtureRequest) -> TrackedRun:
    return tracker.open_run(request.node.name[:100].replace("[", "-").replace("]", ""), "a run")


class Model:
    """One registered model of a test, whose bundles differ by their text."""

    def __init__(self, run: TrackedRun, folder: Path) -> None:
        self.run, self.folder, self.name = run, folder, run.identity[:80]

    def add(self, text: str, hypervolume: float, reference: str = "sst2 (2.0, 8.0)") -> Registered:
        folder = self.folder / "bundle"
        folder.mkdir(exist_ok=True)
        (folder / "bundle.txt").write_text(text)
        return register(
            self.run,
            folder,
            text,
            self.name,
            hypervolume=hypervolume,
            tags={"hypervolume_reference": reference, "git_commit": "abc", "hf_token": "S3CRET"},
            description="a bundle",
        )

    def champion(self) -> int:
        return int(self.run.client.get_model_version_by_alias(self.name, "champion").version)

    def versions(self) -> int:
        return len(self.run.client.search_model_versions(f"name = '{self.name}'"))


@pytest.fixture
def model(run: TrackedRun, tmp_path: Path) -> Model:
    return Model(run, tmp_path)


def test_the_champion_only_moves_to_a_larger_hypervolume(model: Model) -> None:
    first = model.add("a", 0.5)
    assert (first.version, first.champion_moved) == (1, True)
    worse = model.add("b", 0.4)
    assert (worse.version, worse.champion_moved) == (2, False)
    equal = model.add("c", 0.5)
    assert not equal.champion_moved
    assert "not above" in equal.reason
    assert model.champion() == 1
    better = model.add("d", 0.50001)
    assert (better.champion_moved, better.reason) == (True, "hypervolume 0.50001 is above the champion's 0.5")
    assert model.champion() == 4


def test_a_hypervolume_of_another_yardstick_never_moves_the_champion(model: Model) -> None:
    model.add("a", 0.5)
    other = model.add("b", 0.9, reference="mnli (2.0, 8.0)")
    assert not other.champion_moved
    assert "mnli" in other.reason
    assert "sst2" in other.reason
    assert model.champion() == 1


def test_registering_the_same_bundle_again_changes_nothing(model: Model) -> None:
    first = model.add("a", 0.5)
    model.add("b", 0.6)
    again = model.add("a", 0.7)
    assert (again.version, again.champion_moved) == (first.version, False)
    assert again.reason == first.reason
    assert (model.versions(), model.champion()) == (2, 2)


def test_a_call_that_was_cut_short_is_finished_by_the_next(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry, "_crown", cut)
        with pytest.raises(KeyboardInterrupt):
            model.add("a", 0.5)
    assert model.versions() == 1
    second = model.add("a", 0.5)
    assert (second.version, second.champion_moved) == (1, True)
    assert (model.versions(), model.champion()) == (1, 1)


def test_a_version_carries_its_tags_and_no_secret(model: Model) -> None:
    model.add("a", 0.25)
    tags = model.run.client.get_model_version(model.name, "1").tags
    assert (tags["hypervolume"], tags["git_commit"]) == ("0.25", "abc")
    assert DECISION in tags
    assert "S3CRET" not in str(tags)


def test_the_champion_loads_without_the_checkout_and_answers_typed_requests(
    model: Model, tracker: Tracker, tmp_path: Path
) -> None:
    bundle = tiny_run().folder / "bundle"
    shutil.copytree(bundle, model.folder / "bundle")
    model.add("the bundle", 0.5)
    script = tmp_path / "load.py"
    script.write_text(textwrap.dedent(LOAD))
    # Not in the checkout.
    printed = preloaded.run(str(script), tracker.tracking_uri, f"models:/{model.name}@champion", cwd=tmp_path)
    result = json.loads(printed.splitlines()[-1])
    told = model.run.client.get_model_version(model.name, "1").description
    assert told.startswith("a bundle")
    lines = told.partition("```python")[2].partition("```")[0]
    printed = preloaded.run("-c", lines + "print('BITS', answer['average_bits'])", cwd=tmp_path)
    loaded = Bundle.load(bundle)
    assert f"BITS {loaded.adapt(3).average_bits}" in printed
    at_three, inline, again = result["answers"]
    expected = loaded.adapt(3)
    assert at_three == {
        "budget": 3.0,
        "average_bits": expected.average_bits,
        "digest": expected.digest,
        "configuration": expected.configuration,
        "loss": loaded.loss_of(expected.choices),
        "adapter_config": None,
        "adapter_safetensors": None,
        "adapter_url": None,
    }
    assert again == at_three | {"budget": None}
    tensors = load(base64.b64decode(inline["adapter_safetensors"]))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in loaded.adapt(3.5).tensors.items())
    assert json.loads(inline["adapter_config"])["peft_type"] == "LORA"
    assert None not in result["refused"], result["refused"]


def test_requirements_are_exact_and_can_be_installed_from_an_index() -> None:
    pinned = dict(line.split("==") for line in requirements())
    assert set(pinned) == {"mlflow", "torch", "transformers", "peft", "numpy", "scipy", "safetensors", "boto3"}
    assert not any("+" in version for version in pinned.values())


def test_a_failed_upload_leaves_no_version(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(registry, "save_model", fail)
    with pytest.raises(OSError, match="disk full"):
        model.add("a", 0.5)
    assert model.versions() == 0
    found = model.run.client.search_logged_models([model.run.tracker.experiment_id])
    assert [str(m.status) for m in found if m.source_run_id == model.run.run_id] == ["FAILED"]
