"""What files and shapes can tell is told before anything runs, and the paper's models have the sizes it states."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from coalora.errors import CoaloraError
from coalora.models.targets import find_target_layers
from coalora.quant.space import ChoiceSpace
from pipeline.inputs.corpus import HubSplit
from pipeline.preflight import preflight, shapes_of_model
from pipeline.settings.definitions import load_settings
from pipeline.settings.sections import Settings
from tests.flows.architectures import ARCHITECTURES, write_model

TINY = Path(__file__).parents[1] / "flows" / "tiny.yaml"
ROBERTA = {
    "model_type": "roberta", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 300, "max_position_embeddings": 66, "pad_token_id": 1,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 300, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def tiny(*changes: str) -> Settings:
    return load_settings("tiny", file=TINY, changes=changes)


def refused(settings: Settings, **options: Any) -> str:
    with pytest.raises(CoaloraError) as caught:
        preflight(settings, **options)
    return str(caught.value)


def classifier(
    folder: Path, *changes: str, config: dict[str, Any] = ROBERTA, rows: str = "text,label\n" + "a,0\nb,1\n" * 10
) -> Settings:
    """Settings of a classifier with local files."""
    model = write_model(folder / "model", config)
    for part in ("train", "validation"):
        (folder / f"{part}.csv").write_text(rows)
    return tiny(
        "model.pretrain=null", f"model.name_or_path={model}", "benchmark.builtin=null",
        "benchmark.task=classification", f"benchmark.files.train={folder}/train.csv",
        f"benchmark.files.validation={folder}/validation.csv", *changes,
    )  # fmt: skip


def test_tied_layers_share_their_rules_and_a_rule_that_parts_them_is_told() -> None:
    rules = ["choices.rules=[{layers: k_proj, min_bits: 4}]", "evaluation.budgets=[3, 4]"]
    free, tied = (preflight(tiny(*rules, f"choices.tie={tie}")).bits_range[0] for tie in ("none", "fused"))
    assert tied > free  # query and value go up with the key
    parted = tiny("choices.rules=[{layers: k_proj, min_bits: 4}, {layers: q_proj, max_bits: 3}]", "choices.tie=fused")
    assert "q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj take one choice" in refused(parted)


def test_export_formats_that_cannot_hold_the_choices_are_refused_before_anything_runs() -> None:
    asked = "export.formats=[peft, compressed-tensors, mlx]"
    assert "layers.0.self_attn.q_proj may take nf2" in (told := refused(tiny(asked)))
    assert "Train with choices.scheme: int" in told
    integers = "choices={scheme: int, allow: {group_size: [32], mode: [sym]}, tie: %s}"
    assert "Train with choices.tie: fused" in refused(tiny(asked, integers % "none", "evaluation.budgets=[3, 4]"))
    assert preflight(tiny(asked, integers % "fused", "evaluation.budgets=[3, 4]")).n_choices == 4


def test_what_it_finds_is_counted_from_the_shapes() -> None:
    found = preflight(tiny())
    assert len(found.layers) == 14
    assert found.n_weights == 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert found.n_choices == 6
    low, high = found.bits_range
    # bits + 8 / block_size + 16 / (block_size x 64), and a constant for each layer.
    assert 2 + 8 / 64 + 16 / 4096 < low < 2.3
    assert 4 + 8 / 32 + 16 / 2048 < high < 4.35


def test_files_of_a_classifier_are_accepted(tmp_path: Path) -> None:
    assert len(preflight(classifier(tmp_path)).layers) == 12


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    settings = classifier(tmp_path)
    (tmp_path / "validation.csv").unlink()
    text = refused(settings)
    assert "There is no benchmark file" in text
    assert str(tmp_path / "validation.csv") in text
    missing_search = classifier(tmp_path, "benchmark.files.search=nowhere.csv")
    assert "nowhere.csv" in refused(missing_search)


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    text = refused(classifier(tmp_path, "benchmark.text_columns=[premise, text]"))
    assert "'premise'" in text
    assert "'text', 'label'" in text
    assert "benchmark.text_columns" in text


def test_an_unknown_ending_lists_the_formats(tmp_path: Path) -> None:
    settings = classifier(tmp_path, "benchmark.files.train=train.xlsx")
    (tmp_path / "train.xlsx").write_text("x")
    text = refused(settings)
    assert "train.xlsx" in text
    assert ".csv, .tsv, .jsonl, .parquet" in text


def test_text_needs_no_ending(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text("\n".join(f"some words in row {i}" for i in range(1000)))
    preflight(tiny("benchmark.builtin=null", "benchmark.files.train=corpus"))


@pytest.mark.parametrize("files", [{}, {"config.json": "{}"}, {"config.json": "{}", "pytorch_model.bin": "x"}])
def test_a_model_folder_without_safetensors_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    text = refused(tiny("model.pretrain=null", f"model.name_or_path={folder}"))
    assert "has no config.json or no safetensors weights" in text
    assert "pickled weights are not read" in text


@pytest.mark.parametrize("name", ["no/such-model", "./models/none", "a/b/c"])
def test_a_model_that_is_nowhere_is_refused(name: str) -> None:
    text = refused(tiny("model.pretrain=null", f"model.name_or_path={name}"))
    assert name in text
    assert "to a hub id" in text


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        (["target_modules=[no_such_proj]"], ["of target_modules matches no linear layer", "'no_such_proj'", "q_proj"]),
        (["target_modules=[q_proj, qproj]"], ["'qproj' of target_modules matches no"]),
        (["target_modules=[]"], ["target_modules is []", "all-linear"]),
        (["target_modules=[lm_head]"], ["share one tensor", "lm_head.weight", "embed_tokens.weight"]),
        (["target_modules=[self_attn]"], ["not a linear layer", "LlamaAttention"]),
        (["choices.allow={bit: [2]}"], ["Scheme 'nf' has no field", "bits, scale_bits"]),
        (["choices.allow={bits: [2, 5]}"], ["Field 'bits' of scheme 'nf'", "[5]", "[2, 3, 4, 8]"]),
        (["choices.allow={bits: ['2']}"], ["Field 'bits' of scheme 'nf'", "['2']"]),
        (["choices.allow={bits: []}"], ["at least one value"]),
        (["choices.rules=[{layers: '*.mpl.*', scheme: int}]"], ["'*.mpl.*' matches no target layer", "choices.rules"]),
        (["choices.rules=[{layers: q_proj, scheme: int, allow: {block: [64]}}]"], ["Scheme 'int' has no field"]),
        (["choices.rules=[{layers: '*', max_bits: 3}, {layers: v_proj, min_bits: 4}]"], ["leaves", "v_proj"]),
        (["choices.rules=[{layers: '*', min_bits: 3}]"], ["evaluation.budgets 2.5 bits", "budgets to 3.2"]),
        (["evaluation.budgets=[2.0]"], ["evaluation.budgets 2 bits", "budgets to 2.2", "choices.allow"]),
        (["evaluation.budgets=[3, 7.5]"], ["evaluation.budgets 7.5 bits", "to 4.28"]),
        (["initial_set.min_budget=1"], ["initial_set.min_budget 1 bits", "Set initial_set.min_budget to 2.2"]),
        (["initial_set.max_budget=9"], ["initial_set.max_budget 9 bits"]),
        (["initial_set.min_budget=3.5", "initial_set.max_budget=3"], ["3.5 is not below initial_set.max_budget 3"]),
        (["initial_set.min_budget=3", "initial_set.max_budget=3"], ["is not below"]),
        (["calibration.n_samples=65"], ["calibration.n_samples 65 is more than benchmark.n_train 64"]),
        (["benchmark.max_length=257"], ["benchmark.max_length 257 is more", "at most 255"]),
        (["model.pretrain.hidden_size=34", "model.pretrain.num_attention_heads=4"], ["model.pretrain.hidden_size"]),
    ],
)  # fmt: skip
def test_what_the_shapes_contradict_is_refused(changes: list[str], fragments: Sequence[str]) -> None:
    text = refused(tiny(*changes))
    for fragment in fragments:
        assert fragment in text


def test_choices_may_differ_by_layer() -> None:
    rules = "[{layers: '*.mlp.*', scheme: int, allow: {bits: [4, 8]}}, {layers: v_proj, scheme: float}]"
    found = preflight(tiny(f"choices.rules={rules}", "evaluation.budgets=[5, 8]"))
    assert found.n_choices == 6 + 12 + 2
    joined = preflight(tiny("choices.also=[{scheme: int, allow: {bits: [8], mode: [sym]}}]"))
    assert joined.n_choices == 6 + 3
    assert joined.bits_range[1] > preflight(tiny()).bits_range[1]


def test_a_scheme_whose_package_is_absent_is_refused_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalora.quant.gptq.solver.find_spec", lambda name: None)
    assert "pip install 'coalora[gptq]'" in refused(tiny("choices.scheme=gptq", "choices.allow={}"))


def test_a_space_of_one_choice_has_no_range_for_the_initial_set() -> None:
    one: dict[str, list[int | str]] = {
        "bits": [3],
        "scale_bits": [8],
        "scale_dtype": ["bf16"],
        "block_size": [64],
        "scale_block_size": [64],
    }
    layers = find_target_layers(shapes_of_model(tiny()))
    nbytes = ChoiceSpace("nf", **one).packed_nbytes_table([layer.shape for layer in layers]).sum()
    only = float(nbytes * 8 / sum(layer.n_weights for layer in layers))
    text = refused(tiny(f"choices.allow={one}", f"evaluation.budgets=[{only!r}]"))
    assert "Every configuration costs" in text
    assert "Allow more choices (choices.allow) where there is only one" in text


def test_the_ends_of_the_space_that_the_message_names_are_accepted() -> None:
    text = refused(tiny("evaluation.budgets=[1]"))
    low, high = text.split("Set evaluation.budgets to ")[1].split(" bits")[0].split(" to ")
    preflight(tiny(f"evaluation.budgets=[{low}, {high}]"))


def test_an_encoder_counts_its_positions_from_behind_the_padding(tmp_path: Path) -> None:
    preflight(classifier(tmp_path, "benchmark.max_length=64"))
    assert "at most 64" in refused(classifier(tmp_path, "benchmark.max_length=65"))


def test_a_model_of_any_architecture_takes_all_its_linear_layers(tmp_path: Path) -> None:
    config = {"model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 2, "vocab_size": 300, "max_position_embeddings": 64}  # fmt: skip
    model = write_model(tmp_path / "neox", config)
    changes = ["model.pretrain=null", f"model.name_or_path={model}"]
    assert [layer.kind for layer in preflight(tiny(*changes)).layers] == [
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ]
    found = preflight(tiny(*changes, "target_modules=[dense_h_to_4h, dense_4h_to_h]"))
    assert [layer.shape for layer in found.layers] == [(64, 32), (32, 64)]


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "encoder", ROBERTA)
    assert "causal decoder" in refused(tiny("model.pretrain=null", f"model.name_or_path={model}"))


def test_dvc_must_be_initialised_unless_versioning_is_off(tmp_path: Path) -> None:
    text = refused(tiny(), root=tmp_path)
    assert "dvc init" in text
    assert "versioning.enabled=false" in text
    preflight(tiny("versioning.enabled=false"), root=tmp_path)
    (tmp_path / ".dvc").mkdir()
    assert "no git around it" in refused(tiny(), root=tmp_path)
    (tmp_path / ".git").mkdir()
    preflight(tiny(), root=tmp_path)
    assert "DVC has no default remote" in refused(tiny("versioning.push=true"), root=tmp_path)
    (tmp_path / ".dvc" / "config").write_text("[core]\n    remote = there\n")
    preflight(tiny("versioning.push=true"), root=tmp_path)


def test_checks_write_nothing_and_make_the_home_alone(tmp_path: Path) -> None:
    preflight(tiny("versioning.enabled=false"), root=tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [".coalora"]


def test_a_hub_data_set_with_too_few_examples_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"train": HubSplit(8), "validation": HubSplit(4)}
    monkeypatch.setattr("pipeline.preflight.look_at_hub", lambda benchmark, n_samples: told)
    changes = ["benchmark.files=null", "benchmark.hub.path=a/b", "benchmark.n_search=5", "calibration.n_samples=4"]
    settings = classifier(tmp_path, *changes)
    assert "8 training examples leave 3 beside the search's, and calibration.n_samples is 4" in refused(settings)


def test_a_hub_text_with_too_few_blocks_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, more = ([f"some words in row {i}" for i in range(n)] for n in (20, 200))
    changes = ["model.pretrain=null", f"model.name_or_path={write_model(tmp_path / 'model', LLAMA)}"]
    settings = tiny(*changes, "benchmark.builtin=null", "benchmark.hub.path=a/b", "benchmark.search_fraction=0.2")

    def told(train: list[str] | None, validation: list[str] | None) -> None:
        seen = {"train": HubSplit(None, train), "validation": HubSplit(None, validation)}
        monkeypatch.setattr("pipeline.preflight.look_at_hub", lambda benchmark, n_samples: seen)

    told(few, None)
    assert "The train text makes 5 blocks of 32 tokens, and calibration.n_samples is 8" in refused(settings)
    told(None, few[:1])
    assert "The validation text is too short" in refused(settings)
    for train, validation in ((more, few), (None, None)):
        told(train, validation)
        preflight(settings)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_models_of_the_pipelines_have_the_layers_and_weights_that_are_stated(tmp_path: Path, name: str) -> None:
    known = ARCHITECTURES[name]
    model = write_model(tmp_path / "model", known.config)
    changes = ["model.pretrain=null", f"model.name_or_path={json.dumps(str(model))}"]
    if known.config["model_type"] in ("bert", "roberta"):
        changes += ["benchmark.builtin=null", "benchmark.task=classification", "benchmark.hub.path=nyu-mll/glue"]
    layers = find_target_layers(shapes_of_model(tiny(*changes)))
    assert len(layers) == known.n_layers
    assert sum(layer.n_weights for layer in layers) == known.n_weights


def test_harness_tasks_without_the_extra_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("coalora.evaluate.harness.version", missing)
    preflight(tiny())
    assert "pip install 'coalora[eval]'" in refused(tiny("evaluation.harness_tasks=[hellaswag]"))


def test_harness_tasks_are_for_language_models(tmp_path: Path) -> None:
    settings = classifier(tmp_path, "evaluation.harness_tasks=[hellaswag]")
    assert "need a language model" in refused(settings)


@pytest.mark.parametrize(("runner", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_runner_without_its_extra_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, runner: str, package: str
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        "pipeline.workers.pool.find_spec", lambda name, *a: None if name == package else original(name, *a)
    )
    assert f"pip install 'coalora[{runner}]'" in refused(tiny(f"evaluation.runner={runner}"))
    preflight(tiny("evaluation.runner=processes"))


def test_an_adapter_that_follows_no_configuration_is_refused() -> None:
    text = refused(tiny("adapter.theta=none", "adapter.expert_bits=0"))
    assert "it is Shared-LoRA" in text
    assert "Set adapter.theta=others" in text
    preflight(tiny("adapter.theta=none", "adapter.expert_bits=2"))
