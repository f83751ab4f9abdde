"""The reported numbers are those that were measured: recomputed here from the artifacts by other means."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from coalora.configurations import ConfigurationSet
from coalora.evaluate.losses import measure_configurations
from coalora.evaluate.losses import score as measure
from coalora.models.switching.quantized import FULL_PRECISION
from coalora.quant.space import ChoiceSpace
from coalora.train.loop import train
from pipeline.inputs.adapted import reference_of
from pipeline.inputs.loaders import load_benchmark, load_selected, load_set, load_tables
from pipeline.store.store import default_store
from tasks.ceiling import CEILING, train_ceiling
from tasks.result import assemble
from tests.tiny_run import TinyRun, at_home

METHODS = ("none", "shared", "paper", "coa")


@pytest.fixture(scope="module")
def result(run: TinyRun) -> dict[str, Any]:
    return json.loads((default_store().path(run.exported.result) / "result.json").read_text())


@pytest.fixture(scope="module")
def scores(run: TinyRun) -> dict[str, Any]:
    store = default_store()
    return {m: json.loads((store.path(a) / "scores.json").read_text()) for m, a in run.evaluated.scores.items()}


@pytest.fixture(scope="module")
def members(run: TinyRun) -> ConfigurationSet:
    return load_set(run.evaluated.selection, load_tables(run.calibrated.tables))


def test_members_carry_every_methods_measures_in_the_sets_order(
    result: dict[str, Any], scores: dict[str, Any], members: ConfigurationSet
) -> None:
    assert len(result["members"]) == len(members) > 2
    for i, row in enumerate(result["members"]):
        assert row["round"] == members.joined[i]
        for method in METHODS:
            assert row["loss"][method] == scores[method]["members"]["loss"][i]
            assert row["metric"][method] == scores[method]["members"]["metrics"]["bits_per_byte"][i]


def test_average_bits_are_recounted_from_the_choices(
    run: TinyRun, result: dict[str, Any], members: ConfigurationSet
) -> None:
    tables = load_tables(run.calibrated.tables)
    space = ChoiceSpace("nf", **run.settings.choices.allow)
    for row, configuration in zip(result["members"], members.configurations, strict=True):
        nbytes = [
            space.scheme.packed_nbytes(space.choices[k], layer.shape)
            for layer, k in zip(tables.layers, configuration, strict=True)
        ]
        assert row["nbytes"] == sum(nbytes)
        assert row["average_bits"] == pytest.approx(8 * sum(nbytes) / result["model"]["n_weights"], rel=1e-12)


def test_a_budgets_row_is_its_configuration_and_its_files(
    run: TinyRun, result: dict[str, Any], scores: dict[str, Any]
) -> None:
    tables = load_tables(run.calibrated.tables)
    chosen = load_selected(run.evaluated.selection, tables)
    assert [row["budget"] for row in result["budgets"]] == run.settings.evaluation.budgets == [2.5, 3.0]
    for i, (row, export) in enumerate(zip(result["budgets"], run.exported.exports, strict=True)):
        assert row["average_bits"] == pytest.approx(tables.average_bits(chosen[i]))
        assert row["average_bits"] <= row["budget"] + 1e-9
        folder = default_store().path(export)
        base, adapter = (
            sum(p.stat().st_size for p in (folder / part).rglob("*") if p.is_file()) for part in ("base", "adapter")
        )
        assert (folder / "base" / "tokenizer.json").is_file()  # a device holds it, too
        assert (row["base_bytes"], row["adapter_bytes"], row["total_bytes"]) == (base, adapter, base + adapter)
        bits = Counter(tables.space.choices[k].as_dict()["bits"] for k in chosen[i])
        assert {float(b): n for b, n in row["n_layers_by_bits"].items()} == dict(bits)
        for method in METHODS:
            assert row["loss"][method] == scores[method]["budgets"]["loss"][i]
            assert row["metric"][method] == scores[method]["budgets"]["metrics"]["bits_per_byte"][i]
            assert row["metrics"]["perplexity"][method] == pytest.approx(math.exp(row["loss"][method]))
        assert result["exports"][i]["digest"] == json.loads((folder / "configuration.json").read_text())["digest"]
        assert result["exports"][i]["folder"] == f"export/{row['budget']:g}-bits"
        average = np.average(result["heatmap"]["bits"][i], weights=[layer.n_weights for layer in tables.layers])
        assert average == pytest.approx(row["average_bits"])


def test_hypervolumes_are_the_area_that_members_dominate(run: TinyRun, result: dict[str, Any]) -> None:
    volume = result["hypervolume"]
    low, high = load_tables(run.calibrated.tables).bits_range()
    vocabulary = run.settings.model.pretrain.vocab_size  # type: ignore[union-attr]
    assert volume["ideal"] == [0.0, low]
    assert volume["ref_point"][1] == high
    # The tokenizer may find fewer tokens than it is asked for.
    assert 260 < math.exp(volume["ref_point"][0]) <= vocabulary + 1e-6
    for method in METHODS:
        points = [(m["loss"][method], m["average_bits"]) for m in result["members"]]
        edges = sorted({b for _, b in points} | {high})
        area = 0.0
        for left, right in pairwise(edges):  # between two sizes the best loss so far counts
            best = min(loss for loss, b in points if b <= left)
            area += (right - left) * max(0.0, volume["ref_point"][0] - best)
        expected = area / (volume["ref_point"][0] * (high - low))
        assert volume["values"][method] == pytest.approx(expected, rel=1e-9)


def test_each_budget_shows_what_an_adapter_for_it_alone_reaches(run: TinyRun, result: dict[str, Any]) -> None:
    store = default_store()
    assert set(result["references"]) == {"qlora", "lq-lora"}
    assert {arm["n_steps"] for arm in result["references"].values()} == {2}
    for method, made in run.evaluated.references.items():
        scores = [json.loads((store.path(artifact) / "score.json").read_text()) for artifact in made]
        for row, score in zip(result["budgets"], scores, strict=True):
            assert row["reference_loss"][method] == score["loss"]
            assert row["reference_metric"][method] == score["metrics"]["bits_per_byte"]
    # Two steps from different starts: the same numbers would mean that the start is not used.
    assert result["budgets"][0]["reference_loss"]["qlora"] != result["budgets"][0]["reference_loss"]["lq-lora"]


def test_arms_model_and_benchmark_are_described(run: TinyRun, result: dict[str, Any]) -> None:
    steps = run.settings.training.initial_steps + run.settings.search.rounds * run.settings.training.round_steps
    assert {m: a["n_steps"] for m, a in result["arms"].items()} == {
        "none": 0, "shared": steps, "paper": steps, "coa": steps
    }  # fmt: skip
    assert {m: a["label"] for m, a in result["arms"].items()} == {
        "none": "no adapter", "shared": "Shared-LoRA", "paper": "CoA-LoRA as in the paper", "coa": "CoA-LoRA"
    }  # fmt: skip
    assert (result["model"]["n_layers"], result["model"]["n_weights"]) == (14, 2 * (4 * 32 * 32 + 3 * 32 * 64))
    assert result["model"]["digest"] == load_tables(run.calibrated.tables).base_digest
    benchmark = load_benchmark(run.calibrated.benchmark)
    assert result["benchmark"]["n_validation"] == len(benchmark.validation) == 8
    assert result["full_precision"]["bits"] == 32.0


def test_curves_cover_every_step_of_the_methods_that_train(run: TinyRun, result: dict[str, Any]) -> None:
    assert set(result["curves"]) == {"shared", "paper", "coa"}
    for rows in result["curves"].values():
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert [row["round"] for row in rows] == [0, 0, 1]


def test_rounds_are_those_of_the_search(run: TinyRun, result: dict[str, Any]) -> None:
    (row,) = result["rounds"]
    assert row["round"] == 1
    assert row["n_members"] == run.trained.sets[1:][0].meta["n_members"]
    assert row["hypervolume_after"] >= row["hypervolume_before"]


def test_time_is_counted_by_stage_and_training_by_method(run: TinyRun, result: dict[str, Any]) -> None:
    seconds = result["seconds"]
    assert {"base", "benchmark", "calibrate", "search", "select", "evaluate", "export"} <= set(seconds)
    assert {"train coa", "train shared", "train none"} <= set(seconds)
    trained = sum(float(a.meta["seconds"] or 0) for a in run.trained.states["coa"])
    assert seconds["train coa"] == pytest.approx(trained, abs=0.006)


def test_a_methods_scores_cannot_be_left_out(run: TinyRun) -> None:
    with pytest.raises(KeyError):
        assemble(
            pipeline="tiny", settings=run.settings, **run.calibrated.inputs(), searches=run.trained.sets[1:],
            selection=run.evaluated.selection, states=run.trained.states,
            scores={"coa": run.evaluated.scores["coa"]}, exports=run.exported.exports,
            references={},
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"shorter|longer"):
        assemble(
            pipeline="tiny", settings=run.settings, **run.calibrated.inputs(), searches=run.trained.sets[1:],
            selection=run.evaluated.selection, states=run.trained.states, scores=run.evaluated.scores,
            exports=run.exported.exports[:1], references={},
        )  # fmt: skip


def test_prompts_go_on_as_the_model_of_their_budget_does(run: TinyRun, result: dict[str, Any]) -> None:
    (text,) = result["continued"]
    assert (text["prompt"], text["budget"]) == ("A list is", 2.5)
    model = run.model
    tokenizer, tables = model.source.tokenizer(), load_tables(run.calibrated.tables)
    with at_home(run.home), model.adapted("coa", run.trained.states["coa"][-1]) as adapted:
        adapted.switch(load_selected(run.evaluated.selection, tables)[0])
        ids = tokenizer("A list is", return_tensors="pt")["input_ids"]
        for _ in range(5):  # the most likely token, one at a time, without a cache
            with torch.no_grad():
                ids = torch.cat([ids, adapted.peft_model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert text["coa"] == tokenizer.decode(ids[0, -5:], skip_special_tokens=True)


def test_an_adapter_of_its_own_in_full_precision_gives_the_ceiling(run: TinyRun, result: dict[str, Any]) -> None:
    with at_home(run.home):
        training = replace(run.settings.training, initial_steps=3)
        made = train_ceiling.task.fn(model=run.model, training=training, steps=3, batch_size=4, own=True)
        score = json.loads((default_store().path(made) / CEILING).read_text())
        adapted = run.model.build("shared")
        full = np.full((1, result["model"]["n_layers"]), FULL_PRECISION)
        train(
            adapted, run.model.data.train, full, np.array([16.0]), training, steps=3, total_steps=3,
            seed=run.settings.seed,
        )  # fmt: skip
        adapted.full_precision()
        own = measure(adapted, run.model.data.validation, batch_size=4)
        # The reference is this very model: nothing between them but rounding.
        assert score["metrics"].pop("kl_divergence") == pytest.approx(0, abs=1e-6)
        assert score["metrics"].pop("top1_agreement") == 1
        (again,) = measure_configurations(
            adapted, run.model.data.validation, full, batch_size=4, reference=reference_of(run.model, made)
        )
    assert again.metrics["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert score == {"loss": own.loss, "metrics": own.metrics}
    assert score["loss"] != result["full_precision"]["loss"]
