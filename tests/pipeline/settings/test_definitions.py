"""Wrong settings are refused before anything runs, with a message that says what to write instead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from coalora.errors import CoaloraError
from pipeline.settings.definitions import (
    apply_change,
    change_settings,
    check_name,
    load_settings,
    read_pipelines,
    validate_settings,
)
from pipeline.settings.sections import Settings

TINY = Path(__file__).parents[2] / "flows" / "tiny.yaml"
FILES = ["model.pretrain=null", "model.name_or_path=m", "benchmark.builtin=null", "benchmark.task=classification"]
HUB = ["benchmark.builtin=null", "benchmark.hub={path: allenai/c4, name: en, streaming: true}"]


def tiny(*changes: str) -> Settings:
    return load_settings("tiny", file=TINY, changes=changes)


def message(*changes: str) -> str:
    with pytest.raises(CoaloraError) as caught:
        tiny(*changes)
    return str(caught.value)


WRONG: list[tuple[list[str], Sequence[str]]] = [
    # Unknown keys: at the top, in a section, nested.
    (["serch.rounds=3"], ["serch: unknown key, did you mean 'search'?"]),
    (["baselines.methods=[shared, paprika]"], ["no method 'paprika'", "paper"]),
    (["baselines.methods=[shared, qlora]"], ["move qlora to per_budget"]),
    (["baselines.methods=[shared, coa]"], ["leave coa out"]),
    (["epochs=3"], ["epochs: unknown key, known keys: adapter, baselines, benchmark"]),
    (["search.round=3"], ["search.round: unknown key, did you mean 'rounds'?"]),
    (["training.epochs=3"], ["training.epochs: unknown key, known keys: batch_size, gradient_checkpointing"]),
    (["model.pretrain.hiden_size=64"], ["model.pretrain.hiden_size: unknown key, did you mean 'hidden_size'?"]),
    ([*HUB, "benchmark.hub.split=train"], ["benchmark.hub.split: unknown key", "train_split"]),
    # Wrong types.
    (["search.rounds=three"], ["search.rounds: input should be a valid integer", "(got 'three')"]),
    (["search.rounds=2.5"], ["search.rounds: input should be a valid integer", "(got 2.5)"]),
    (["search.rounds=1e3"], ["search.rounds: input should be a valid integer", "(got '1e3')"]),
    (["search.rounds=yes"], ["search.rounds: true and false are no value of this key"]),
    (["training.lr=true"], ["training.lr: true and false are no value of this key"]),
    (["evaluation.budgets=[2.5, true]"], ["evaluation.budgets: true and false are no value of this key"]),
    (["export.base=maybe"], ["export.base: input should be a valid boolean", "(got 'maybe')"]),
    (["model.pretrain=128"], ["model.pretrain: input should be a valid dictionary (got 128)"]),
    (["search=null"], ["search: input should be a valid dictionary (got None)"]),
    (["search.rounds="], ["search.rounds: input should be a valid integer (got None)"]),
    (["evaluation.budgets=3"], ["evaluation.budgets: input should be a valid list (got 3)"]),
    (["evaluation.budgets=[2, low]"], ["evaluation.budgets.1: input should be a valid number", "(got 'low')"]),
    (["target_modules=q_proj"], ["target_modules: input should be a valid list (got 'q_proj')"]),
    (["choices.allow={bits: 3}"], ["choices.allow.bits: input should be a valid list (got 3)"]),
    (["choices.allow={bits: [2.5]}"], ["choices.allow.bits.0: input should be a valid integer", "(got 2.5)"]),
    (["search={1: 2}"], ["search.1: keys should be strings"]),
    (["tracking.experiment=''"], ["tracking.experiment: string should have at least 1 character"]),
    # Out of range.
    (["search.rounds=-1"], ["search.rounds: input should be greater than or equal to 0 (got -1)"]),
    (["adapter.r=0"], ["adapter.r: input should be greater than or equal to 1 (got 0)"]),
    (["training.lr=0"], ["training.lr: input should be greater than 0 (got 0)"]),
    (["training.lr=.inf"], ["training.lr: input should be a finite number (got inf)"]),
    (["training.lr=.nan"], ["training.lr: input should be", "(got nan)"]),
    (["adapter.lora_dropout=1.0"], ["adapter.lora_dropout: input should be less than 1 (got 1.0)"]),
    (["benchmark.search_fraction=1.5"], ["benchmark.search_fraction: input should be less than 1 (got 1.5)"]),
    (["benchmark.search_fraction=0.95"], ["benchmark.search_fraction and benchmark.validation_fraction", "lower"]),
    (["evaluation.budgets=[]"], ["evaluation.budgets: list should have at least 1 item"]),
    (["evaluation.budgets=[3, 3.0]"], ["evaluation.budgets: budgets must differ"]),
    (["seed=4294967296"], ["seed: input should be less than 2147483648"]),
    (["runtime.device=tpu"], ["runtime.device: input should be 'auto', 'cpu' or 'cuda' (got 'tpu')"]),
    (["export.adapter_dtype=int8"], ["input should be 'float32', 'float16' or 'bfloat16' (got 'int8')"]),
    (["tracking.registered_model=a/b"], ["tracking.registered_model: string should match pattern", "(got 'a/b')"]),
    (["tracking.tracking_uri=./mlruns"], ["tracking.tracking_uri: MLflow keeps no runs in folders", "sqlite:////"]),
    # Sources of model and data.
    (["model.name_or_path=gpt2"], ["model: set exactly one of model.name_or_path and model.pretrain"]),
    (["model.pretrain=null"], ["model: set exactly one of model.name_or_path and model.pretrain"]),
    (
        ["benchmark.files.train=a.txt"],
        ["benchmark: set exactly one of benchmark.builtin, benchmark.files and benchmark.hub"],
    ),
    (
        ["benchmark.builtin=null"],
        ["benchmark: set exactly one of benchmark.builtin, benchmark.files and benchmark.hub"],
    ),
    (["benchmark.task=classification"], ["benchmark.builtin is text: set benchmark.task to language-modeling"]),
    ([*FILES, "benchmark.files.train=a.csv"], ["classification from files needs benchmark.files.validation"]),
    ([*FILES, "benchmark.files.validation=a.csv"], ["benchmark.files.train: is required"]),
    ([*HUB, "benchmark.n_train=null"], ["a streamed corpus needs limits: set benchmark.n_train"]),
    (["benchmark.text_columns=[a, b]"], ["language-modeling reads one column"]),
    (["benchmark.text_columns=[]"], ["benchmark.text_columns: list should have at least 1 item"]),
    # Changes that are none.
    (["search.rounds"], ["a change is written section.key=value; got: search.rounds", "--set search.rounds=2"]),
    (["=3"], ["a change is written section.key=value"]),
    (["search..rounds=3"], ["a change is written section.key=value"]),
    (["search.rounds.max=3"], ["search.rounds is no section", "--set search.rounds=VALUE"]),
    (["evaluation.budgets.0=3"], ["evaluation.budgets is no section", "--set evaluation.budgets=VALUE"]),
    (["evaluation.budgets=[2"], ["the value of a change is YAML; got: evaluation.budgets=[2"]),
]


@pytest.mark.parametrize(("changes", "fragments"), WRONG, ids=[" ".join(changes) for changes, _ in WRONG])
def test_wrong_setting_is_refused_with_its_key_and_what_is_accepted(changes: list[str], fragments: list[str]) -> None:
    text = message(*changes)
    for fragment in fragments:
        assert fragment in text


def test_one_message_lists_everything_that_is_wrong_and_where() -> None:
    text = message("search.rounds=x", "adapter.rank=4", "seed=-1")
    assert f"pipeline 'tiny' of {TINY}" in text
    assert all(word in text for word in ("search.rounds:", "adapter.rank:", "seed:", "remedy: "))


def test_a_missing_section_is_named() -> None:
    with pytest.raises(CoaloraError, match=r"model: is required; benchmark: is required"):
        validate_settings({"seed": 1}, "here")


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("training.lr=1e-3", "training.lr", 1e-3),  # YAML 1.1 reads this as text
        ("training.lr=0.5", "training.lr", 0.5),
        ("evaluation.budgets=[3, 2.25]", "evaluation.budgets", [3.0, 2.25]),
        ("choices.allow={bits: [2], scale_dtype: [bf16]}", "choices.allow", {"bits": [2], "scale_dtype": ["bf16"]}),
        ("benchmark.n_train=null", "benchmark.n_train", None),
        ("benchmark.n_train=", "benchmark.n_train", None),
        ("target_modules=['*.mlp.*']", "target_modules", ["*.mlp.*"]),
        ("export.base=false", "export.base", False),
        ("stages.retries=3", "stages.retries", 3),  # a section that the file leaves out
        ("tracking.tracking_uri=http://host:5000/a=b", "tracking.tracking_uri", "http://host:5000/a=b"),
        (" seed =7", "seed", 7),
    ],
)  # fmt: skip
def test_a_change_takes_a_yaml_value(change: str, path: str, value: object) -> None:
    found: object = tiny(change)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_later_changes_win_and_a_source_can_be_replaced() -> None:
    changes = [*FILES, "benchmark.files.train=a.csv", "benchmark.files.validation=b.csv", "seed=1", "seed=2"]
    settings = tiny(*changes)
    assert settings.benchmark.files is not None
    assert (settings.benchmark.files.train, settings.benchmark.files.validation) == ("a.csv", "b.csv")
    assert (settings.model.name_or_path, settings.model.pretrain, settings.seed) == ("m", None, 2)


def test_a_change_leaves_the_original_as_it_is() -> None:
    original = {"search": {"rounds": 1}}
    assert apply_change(original, "search.rounds=5") == {"search": {"rounds": 5}}
    assert original == {"search": {"rounds": 1}}


def test_changes_of_a_deployed_run_give_the_settings_that_a_file_would(tmp_path: Path) -> None:
    changes = ["evaluation.budgets=[3.5]", "search.rounds=1", "training.objective.distillation=0.25"]
    changed = change_settings(load_settings("demo"), changes, "run of 'demo'")
    assert changed == load_settings("demo", changes=changes)
    same = load_settings("demo")
    assert change_settings(same, [], "run of 'demo'") is same
    with pytest.raises(CoaloraError, match="settings must fit: run of 'demo'"):
        change_settings(same, ["search.rounds=-1"], "run of 'demo'")


def test_an_unknown_pipeline_lists_the_defined_ones() -> None:
    with pytest.raises(CoaloraError) as caught:
        load_settings("tinny", file=TINY)
    assert caught.value.expected == "tiny"
    assert str(TINY) in str(caught.value.remedy)


def test_a_missing_file_says_where_to_run_or_how_to_name_it(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(CoaloraError, match="the file of pipelines must exist") as caught:
            read_pipelines(path)
        assert "--file" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"definitions: [1", ["must be YAML", "line 1"]),
        (b"a: b: c", ["must be YAML", "mapping values are not allowed"]),
        (b"\xff\xfe\x00", ["must be YAML in UTF-8", "pipelines.yaml"]),
        (b"", ["definitions.pipelines", "NoneType"]),
        (b"- a\n- b\n", ["definitions.pipelines", "list"]),
        (b"pipelines: {demo: {}}\n", ["definitions.pipelines", "pipelines.yaml with pipelines"]),
        (b"definitions: {pipelines: [demo]}\n", ["definitions.pipelines", "NAME: {model"]),
        (b"definitions: {pipelines: {demo: 3}}\n", ["each a mapping of sections"]),
        (b"definitions: {pipelines: {../demo: {}}}\n", ["a plain name", "'../demo'", "letters, digits"]),
        (b"definitions: {pipelines: {2024: {}}}\n", ["a plain name", "2024", "quotes"]),
        (b"definitions: {pipelines: {}}\n", ["the pipeline must be defined", "there are none in the file"]),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: bytes, fragments: list[str]) -> None:
    file = tmp_path / "pipelines.yaml"
    file.write_bytes(content)
    with pytest.raises(CoaloraError) as caught:
        load_settings("demo", file=file)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("name", ["../outside", "", "-x", "a b", "x" * 65, 7])
def test_a_name_from_a_form_is_checked_as_one_from_a_file(name: object) -> None:
    with pytest.raises(CoaloraError, match="plain name"):
        check_name(name)
