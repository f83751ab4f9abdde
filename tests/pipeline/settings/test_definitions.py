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
    (["serch.rounds=3"], ["serch is an unknown key (did you mean 'search'?)"]),
    (["adapter.rank_pattern={query: 0}"], ["adapter: rank_pattern gives 'query' the rank 0. Set it to an integer"]),
    (["adapter.r=yes"], ["adapter.r is True: true and false are no value of this key"]),
    (["training.objective.distilation=1"], ["training.objective.distilation is an unknown key (did you mean 'dist"]),
    (
        ["choices.scheme=nf4"],
        ["choices.scheme is 'nf4': There is no quantization scheme 'nf4'", "nf, int, gptq, gguf, float"],
    ),
    (["search.strategy=ehvy"], ["search: There is no search strategy 'ehvy' (did you mean 'ehvi'?)"]),
    (["choices.also=[{scheme: int9}]"], ["choices.also.0.scheme is 'int9': There is no quantization scheme"]),
    (["baselines.methods=[shared, paprika]"], ["no method 'paprika'", "paper"]),
    (["baselines.methods=[shared, qlora]"], ["move qlora to per_budget"]),
    (["baselines.methods=[shared, coa]"], ["leave coa out"]),
    (["epochs=3"], ["epochs is an unknown key (known: adapter, baselines, benchmark"]),
    (["search.round=3"], ["search.round is an unknown key (did you mean 'rounds'?)"]),
    (["training.epochs=3"], ["training.epochs is an unknown key (known: batch_size, gradient_checkpointing"]),
    (["model.pretrain.hiden_size=64"], ["model.pretrain.hiden_size is an unknown key (did you mean 'hidden_size'?)"]),
    ([*HUB, "benchmark.hub.split=train"], ["benchmark.hub.split is an unknown key", "train_split"]),
    # Wrong types.
    (["search.rounds=three"], ["search.rounds is 'three': it should be a valid integer"]),
    (["search.rounds=2.5"], ["search.rounds is 2.5: it should be a valid integer"]),
    (["search.rounds=1e3"], ["search.rounds is '1e3': it should be a valid integer"]),
    (["search.rounds=yes"], ["search.rounds is True: true and false are no value of this key"]),
    (["training.lr=true"], ["training.lr is True: true and false are no value of this key"]),
    (["evaluation.budgets=[2.5, true]"], ["evaluation.budgets.1 is True: true and false are no value of this key"]),
    (["export.formats=[peft, packt]"], ["export format 'packt'", "packed"]),
    (["model.pretrain=128"], ["model.pretrain is 128: it should be a mapping"]),
    (["search=null"], ["search is None: it should be a mapping"]),
    (["search.rounds="], ["search.rounds is None: it should be a valid integer"]),
    (["evaluation.budgets=3"], ["evaluation.budgets is 3: it should be a valid list"]),
    (["evaluation.budgets=[2, low]"], ["evaluation.budgets.1 is 'low': write average bits as 2.5"]),
    (["target_modules=q_proj"], ["target_modules is 'q_proj': it should be a valid list"]),
    (["choices.allow={bits: 3}"], ["choices.allow.bits is 3: it should be a valid list"]),
    (["choices.allow={bits: [2.5]}"], ["choices.allow.bits.0 is 2.5: it should be a valid integer"]),
    (["search={1: 2}"], ["search.1 is 1: keys should be strings"]),
    (["tracking.experiment=''"], ["tracking.experiment is '': string should have at least 1 character"]),
    # Out of range.
    (["search.rounds=-1"], ["search.rounds is -1: it should be greater than or equal to 0"]),
    (["adapter.r=0"], ["adapter.r is 0: it should be greater than or equal to 1"]),
    (["training.lr=0"], ["training.lr is 0: it should be greater than 0"]),
    (["training.lr=.inf"], ["training.lr is inf: it should be a finite number"]),
    (["training.lr=.nan"], ["training.lr is nan: it should be a finite number"]),
    (["adapter.lora_dropout=1.0"], ["adapter.lora_dropout is 1.0: it should be less than 1"]),
    (["benchmark.search_fraction=1.5"], ["benchmark.search_fraction is 1.5: it should be less than 1"]),
    (["benchmark.search_fraction=0.95"], ["benchmark.search_fraction and benchmark.validation_fraction", "lower"]),
    (["evaluation.budgets=[]"], ["evaluation.budgets is []: list should have at least 1 item"]),
    (["evaluation.budgets=[3, 3.0]"], ["evaluation.budgets is [3, 3.0]: two budgets have the same first six digits"]),
    (["seed=4294967296"], ["seed is 4294967296: it should be less than 2147483648"]),
    (["runtime.device=tpu"], ["runtime.device is 'tpu': it should be 'auto', 'cpu' or 'cuda'"]),
    (
        ["export.adapter_dtype=int2"],
        ["export.adapter_dtype is 'int2': it should be 'float32', 'float16', 'bfloat16', 'int8' or 'int4'"],
    ),
    (["tracking.registered_model=a/b"], ["tracking.registered_model is 'a/b': string should match pattern"]),
    (
        ["tracking.tracking_uri=./mlruns"],
        ["tracking.tracking_uri is './mlruns': MLflow keeps no runs in folders", "sqlite:////"],
    ),
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
    ([*FILES, "benchmark.files.validation=a.csv"], ["benchmark.files.train is missing"]),
    ([*HUB, "benchmark.n_train=null"], ["a streamed corpus needs limits: set benchmark.n_train"]),
    (["benchmark.text_columns=[a, b]"], ["language-modeling reads one column"]),
    (["benchmark.text_columns=[]"], ["benchmark.text_columns is []: list should have at least 1 item"]),
    # Changes that are none.
    (
        ["search.rounds"],
        ["The change 'search.rounds' is not section.key=value", "Write for example --set search.rounds=2"],
    ),
    (["=3"], ["is not section.key=value"]),
    (["search..rounds=3"], ["is not section.key=value"]),
    (
        ["search.rounds.max=3"],
        ["search.rounds of the change", "is no section", "--set search.rounds=VALUE"],
    ),
    (
        ["evaluation.budgets.0=3"],
        ["evaluation.budgets of the change", "--set evaluation.budgets=VALUE"],
    ),
    (["evaluation.budgets=[2"], ["The value of the change 'evaluation.budgets=[2' is not YAML", "Close every bracket"]),
]


@pytest.mark.parametrize(("changes", "fragments"), WRONG, ids=[" ".join(changes) for changes, _ in WRONG])
def test_wrong_setting_is_refused_with_its_key_and_what_is_accepted(changes: list[str], fragments: list[str]) -> None:
    text = message(*changes)
    for fragment in fragments:
        assert fragment in text


def test_one_message_lists_everything_that_is_wrong_and_where() -> None:
    text = message("search.rounds=x", "adapter.rank=4", "seed=-1")
    assert f"pipeline 'tiny' of {TINY}" in text
    assert all(
        word in text
        for word in ("search.rounds is 'x':", "adapter.rank is an unknown key", "seed is -1:", "Correct them")
    )


def test_a_missing_section_is_named() -> None:
    with pytest.raises(CoaloraError, match=r"Wrong settings in here: model is missing; benchmark is missing\."):
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
        ("export.formats=[peft]", "export.formats", ["peft"]),
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
    with pytest.raises(CoaloraError, match=r"Wrong settings in run of 'demo': search\.rounds is -1"):
        change_settings(same, ["search.rounds=-1"], "run of 'demo'")


def test_an_unknown_pipeline_lists_the_defined_ones() -> None:
    with pytest.raises(CoaloraError) as caught:
        load_settings("tinny", file=TINY)
    assert str(caught.value) == (
        f"{TINY} defines no pipeline 'tinny'. Choose one of tiny, or define it there under definitions.pipelines."
    )


def test_a_missing_file_says_where_to_run_or_how_to_name_it(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(CoaloraError, match="There is no file of pipelines") as caught:
            read_pipelines(path)
        assert "--file" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"definitions: [1", ["is not YAML in UTF-8", "line 1"]),
        (b"a: b: c", ["is not YAML", "mapping values are not allowed"]),
        (b"\xff\xfe\x00", ["pipelines.yaml is not YAML in UTF-8"]),
        (b"", ["definitions.pipelines", "NoneType"]),
        (b"- a\n- b\n", ["definitions.pipelines", "list"]),
        (b"pipelines: {demo: {}}\n", ["definitions.pipelines", "it has the keys pipelines"]),
        (b"definitions: {pipelines: [demo]}\n", ["definitions.pipelines", "NAME: {model"]),
        (b"definitions: {pipelines: {demo: 3}}\n", ["each a mapping of sections"]),
        (
            b"definitions: {pipelines: {../demo: {}}}\n",
            ["'../demo' in ", "is no name of a pipeline", "letters, digits"],
        ),
        (b"definitions: {pipelines: {2024: {}}}\n", ["2024 in ", "is no name of a pipeline", "quote a number"]),
        (b"definitions: {pipelines: {}}\n", ["defines no pipeline 'demo'. Define it there under"]),
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
    with pytest.raises(CoaloraError, match="is no name of a pipeline"):
        check_name(name)
