"""The whole chain under Prefect, and what it leaves: report, exports, MLflow run, registered version, DVC files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel

from coalora.errors import CoaloraError
from coalora.export.base import load_adapted, load_base
from coalora.export.bundle import Bundle
from tests.flows.checkout import Checkout, computed, files, reused

BUDGETS = ("2.5", "3")


def test_the_terminal_ends_with_the_table_and_the_next_commands(finished: tuple[Checkout, str]) -> None:
    _, output = finished
    for words in ("no adapter", "Shared-LoRA", "CoA-LoRA", "hypervolume", "2.50", "3.00"):
        assert words in output
    for command in ("coalora adapt runs/tiny/latest", "mlflow ui", "prefect server start"):
        assert command in output
    assert "training coa, round 0" in output  # progress was shown


def test_every_stage_ran_once_for_each_of_its_inputs(finished: tuple[Checkout, str]) -> None:
    stages = computed(finished[1])
    assert reused(finished[1]) == []
    # Three rounds of two methods, and the method without parameters once.
    assert [stages.count(s) for s in ("train", "search", "evaluate-shard", "evaluate", "export")] == [7, 2, 3, 3, 2]


def test_report_and_picture_lie_under_the_run_folder(finished: tuple[Checkout, str]) -> None:
    report = finished[0].latest / "report"
    assert (report / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (report / "report.html").read_text() or "data:image" in (report / "report.html").read_text()


def test_metrics_agree_with_the_result(finished: tuple[Checkout, str]) -> None:
    report = finished[0].latest / "report"
    result, metrics = (json.loads((report / name).read_text()) for name in ("result.json", "metrics.json"))
    assert metrics["hypervolume"] == result["hypervolume"]["values"]
    for row in result["budgets"]:
        assert row["average_bits"] <= row["budget"] + 1e-9
        assert metrics["bits_per_byte"][f"{row['budget']:g}"] == row["metric"]["coa"]


@pytest.mark.parametrize("budget", BUDGETS)
def test_exported_adapter_runs_on_its_base_through_stock_peft(finished: tuple[Checkout, str], budget: str) -> None:
    folder = finished[0].latest / "export" / f"{budget}-bits"
    ids = torch.arange(1, 17)[None]
    stock = PeftModel.from_pretrained(load_base(folder / "base"), str(folder / "adapter")).eval()
    ours = load_adapted(folder / "base", folder / "adapter")
    with torch.no_grad():
        assert torch.equal(stock(input_ids=ids).logits, ours(input_ids=ids).logits)
        plain = load_base(folder / "base")(input_ids=ids).logits
        assert not torch.equal(ours(input_ids=ids).logits, plain)  # the adapter does something


def test_adapter_of_another_configuration_is_refused_with_both_digests(
    finished: tuple[Checkout, str], tmp_path: Path
) -> None:
    exported = finished[0].latest / "export" / f"{BUDGETS[0]}-bits"
    bundle = Bundle.load(finished[0].latest / "bundle")
    own = bundle.adapt(float(BUDGETS[0]))
    other = bundle.adapt_to((own.choices + 1) % len(bundle.tables.space))
    other.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CoaloraError) as caught:
        load_adapted(exported / "base", tmp_path / "adapter")
    for digest in (other.digest, json.loads((exported / "configuration.json").read_text())["digest"]):
        assert digest in str(caught.value)


def test_reported_bits_are_the_bytes_on_disk(finished: tuple[Checkout, str]) -> None:
    checkout, _ = finished
    result = json.loads((checkout.latest / "report" / "result.json").read_text())
    for row, export in zip(result["budgets"], result["exports"], strict=True):
        packed = checkout.latest / export["folder"] / "base" / "quantized.safetensors"
        with packed.open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        stored = (packed.stat().st_size - header) * 8 / result["model"]["n_weights"]
        assert stored == pytest.approx(row["average_bits"], rel=0.01)


def test_every_rounds_set_is_versioned_with_dvc(finished: tuple[Checkout, str]) -> None:
    folder = finished[0].root / "configurations" / "tiny"
    assert sorted(p.name for p in folder.glob("*.dvc")) == [f"round-0{i}.json.dvc" for i in range(3)]
    for pointer in folder.glob("*.dvc"):
        (out,) = yaml.safe_load(pointer.read_text())["outs"]
        content = (folder / out["path"]).read_bytes()
        assert out["md5"] == hashlib.md5(content, usedforsecurity=False).hexdigest()
        assert json.loads(content)["members"]


def test_mlflow_holds_params_curves_sets_and_the_registered_champion(finished: tuple[Checkout, str]) -> None:
    checkout, _ = finished
    asked = """
import json, mlflow
from mlflow import MlflowClient
client = MlflowClient()
(experiment,) = [e for e in client.search_experiments() if e.name == "coalora"]
runs = client.search_runs([experiment.experiment_id])
parent = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
champion = client.get_model_version_by_alias("coalora-tiny", "champion")
model = mlflow.pyfunc.load_model("models:/coalora-tiny@champion")
answer = model.predict([{"budget": 3}])[0]
print("ANSWER" + json.dumps({
    "children": sorted(r.info.run_name for r in runs if r not in parent),
    "status": [r.info.status for r in parent],
    "params": parent[0].data.params,
    "curve": len(client.get_metric_history(parent[0].info.run_id, "train/loss/coa")),
    "artifacts": [
        a.path for at in ("report", "figures", "figures/rounds")
        for a in client.list_artifacts(parent[0].info.run_id, at)
    ],
    "inputs": {i.dataset.name: json.loads(i.dataset.profile)["num_rows"] for i in parent[0].inputs.dataset_inputs},
    "load": [m for m in parent[0].data.metrics if m.startswith("system/")],
    "newest": client.get_model_version_by_alias("coalora-tiny", "newest").version,
    "signature": mlflow.models.get_model_info("models:/coalora-tiny@champion").signature.to_dict()["inputs"],
    "version": champion.version, "tags": champion.tags,
    "bits": answer["average_bits"], "layers": len(answer["configuration"]),
}))
"""
    code = f"import os; os.environ['MLFLOW_TRACKING_URI'] = 'sqlite:///{checkout.root}/.coalora/mlflow.db'\n{asked}"
    found = json.loads(checkout.run("-c", code).split("ANSWER", 1)[1].splitlines()[0])
    assert found["children"] == ["initial set", "round 1", "round 2"]
    assert found["status"] == ["FINISHED"]
    assert found["params"]["training.initial_steps"] == "6"
    assert found["curve"] == 14
    assert {"report/report.html", "figures/front.png", "figures/rounds/round-02.png"} <= set(found["artifacts"])
    assert found["inputs"] == {"pydoc-topics/train": 64, "pydoc-topics/search": 4, "pydoc-topics/validation": 8}
    assert "system/cpu_utilization_percentage" in found["load"]
    assert int(found["version"]) == int(found["newest"]) == 1
    assert "budget" in found["signature"]
    assert float(found["tags"]["hypervolume"]) > 0
    assert {"average_bits_range", "base_model_digest", "dvc_md5", "pipeline"} <= set(found["tags"])
    assert found["bits"] <= 3
    assert found["layers"] == 14


def test_adapting_a_finished_run_to_a_new_budget_needs_no_training(finished: tuple[Checkout, str]) -> None:
    checkout, _ = finished
    checkout.run("-m", "coalora", "adapt", "runs/tiny/latest", "--bits", "3.6", "--out", "adapted")
    content = json.loads((checkout.root / "adapted" / "configuration.json").read_text())
    assert content["average_bits"] <= 3.6
    load_adapted(checkout.root / "adapted" / "base", checkout.root / "adapted" / "adapter")
    bundle = Bundle.load(checkout.latest / "bundle")
    assert bundle.adapt(3.6).digest == content["digest"]


def test_a_second_run_under_prefect_computes_nothing(finished: tuple[Checkout, str]) -> None:
    checkout, first = finished
    before = files(checkout.latest)
    output = checkout.pipeline()
    assert computed(output) == []
    assert len(reused(output)) == len(computed(first))
    assert files(checkout.latest) == before
    assert "version 1 (" in output  # no second version of the same result
