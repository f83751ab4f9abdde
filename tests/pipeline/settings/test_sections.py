"""Settings explain themselves (they are the form in Prefect's UI) and cannot be changed by accident.

The messages for wrong values are tested in tests/pipeline/settings/test_definitions.py, as users see them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import MISSING, FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest
import torch
from prefect.utilities.schema_tools import validate
from pydantic import BaseModel, ValidationError

from coalora.config import CoaLoraConfig
from coalora.errors import CoaloraError
from coalora.models.loading import resolved
from coalora.quant.registry import SCHEMES
from coalora.recipes import (
    AdapterRecipe,
    CalibrationRecipe,
    InitialSetRecipe,
    Objective,
    PretrainRecipe,
    Recipe,
    RuntimeRecipe,
    SearchRecipe,
    TrainingRecipe,
)
from coalora.search.strategies import STRATEGIES
from pipeline.settings.definitions import validate_settings
from pipeline.settings.sections import (
    BenchmarkSettings,
    EvaluationSettings,
    InitialSetSettings,
    RuntimeSettings,
    Settings,
    StorageSettings,
    TrackingSettings,
    storage_settings,
)

MINIMAL: dict[str, Any] = {
    "model": {"name_or_path": "m"},
    "benchmark": {"name": "b", "task": "language-modeling", "builtin": "pydoc-topics"},
}


def sections(section: Any = Settings, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path or "settings", section
    for name, (_, annotation) in declared(section).items():
        for option in (annotation, *typing.get_args(annotation)):
            if is_dataclass(option) or (isinstance(option, type) and issubclass(option, BaseModel)):
                yield from sections(option, f"{path}.{name}".lstrip("."))


def declared(section: Any) -> dict[str, tuple[str, Any]]:
    """(description, type) of the fields of a section or a recipe."""
    if is_dataclass(section):
        return {item.name: (item.metadata["description"], item.type) for item in fields(section)}
    return {name: (item.description or "", item.annotation) for name, item in section.model_fields.items()}


SECTIONS = dict(sections())
SCHEMA = json.loads(json.dumps(Settings.model_json_schema()))


def test_the_walk_finds_nested_and_optional_sections() -> None:
    assert {"settings", "model.pretrain", "benchmark.files", "training.objective", "runtime"} <= set(SECTIONS)


@pytest.mark.parametrize("path", SECTIONS)
def test_every_field_says_what_it_is(path: str) -> None:
    assert SECTIONS[path].__doc__
    for name, (description, _) in declared(SECTIONS[path]).items():
        assert re.fullmatch(r".*\.( \[[^\]]*\])?", description), f"{path}.{name}: {description}"


def test_no_description_says_the_title_again_and_no_range_ends_where_integers_do() -> None:
    for part, section in {"Settings": SCHEMA, **SCHEMA["$defs"]}.items():
        for name, field in section["properties"].items():
            title, told = field.get("title", "").partition(" (")[0].lower(), field["description"].lower()
            assert not (title and re.match(rf"(the |name of the |number of )?{re.escape(title)}\b", told)), (part, name)
            assert not re.search(r"\d{10}|e\+", told), (part, name)


@pytest.mark.parametrize("path", SECTIONS)
def test_every_section_refuses_unknown_keys_and_changes(path: str) -> None:
    section = SECTIONS[path]
    if not is_dataclass(section):
        # Infinity is larger than every lower bound, so that bounds alone let it through.
        wanted = {"extra": "forbid", "frozen": True, "allow_inf_nan": False}
        assert wanted.items() <= section.model_config.items()
        return
    assert section.__dataclass_params__.frozen
    raw = inner = json.loads(json.dumps(MINIMAL))
    for part in path.split("."):
        inner = inner.setdefault(part, {})
    inner["unknown_key"] = 1
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(raw)
    assert any(error["loc"][-1] == "unknown_key" for error in caught.value.errors())


def hyperparameters() -> Iterator[tuple[str, Any, Any]]:
    """(key in the settings, field of the library, schema of the setting) of everything that CoaLoraConfig declares."""
    parts: dict[str, type[Recipe]] = {
        "adapter": AdapterRecipe,
        "runtime": RuntimeRecipe,
        "model.pretrain": PretrainRecipe,
    }
    for item in fields(CoaLoraConfig):
        if isinstance(item.type, type) and issubclass(item.type, Recipe):
            parts[item.name] = item.type
    parts["training.objective"] = Objective
    inside = {item.name for recipe in (AdapterRecipe, RuntimeRecipe) for item in fields(recipe)}
    for item in fields(CoaLoraConfig):
        # The choices of a file are names of schemes and values by field, which become the config's ChoiceSpace.
        if item.name == "tie":  # stands beside the choices there
            yield "choices.tie", item, SCHEMA["$defs"]["ChoiceSettings"]["properties"]["tie"]
        elif item.name not in inside | set(parts) | {"choices"}:
            yield item.name, item, SCHEMA["properties"][item.name]
    for path, recipe in parts.items():
        shown = SCHEMA["$defs"][SECTIONS[path].__name__]["properties"]
        for item in fields(recipe):
            yield f"{path}.{item.name}", item, shown[item.name]


@pytest.mark.parametrize(
    ("item", "shown"), [pytest.param(item, shown, id=key) for key, item, shown in hyperparameters()]
)
def test_a_hyperparameter_is_a_setting_with_the_library_s_default_range_title_and_help(item: Any, shown: Any) -> None:
    if "$ref" not in shown:
        assert (shown["title"], shown["description"]) == (item.metadata["title"], item.metadata["description"])
    if item.default is not MISSING:
        assert shown["default"] == item.default
    number = next((option for option in shown.get("anyOf", []) if option["type"] != "null"), shown)
    names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    assert {key: number[name] for key, name in names.items() if name in number} == {
        key: item.metadata[key] for key in names if key in item.metadata
    }


@pytest.mark.parametrize(
    ("section", "key", "names"), [("SearchRecipe", "strategy", STRATEGIES), ("ChoiceSettings", "scheme", SCHEMES)]
)
def test_a_form_offers_the_registered_names_and_takes_another_one_s(section: str, key: str, names: Any) -> None:
    shown = SCHEMA["$defs"][section]["properties"][key]
    registered, own = shown["anyOf"]
    assert registered["enum"] == list(names)
    assert shown["default"] in registered["enum"]
    assert (own["type"], "enum" in own, "type" in shown) == ("string", False, False)
    for name in (*names, "my_package.mine:Mine"):
        validate({key: name}, {"type": "object", "properties": {key: shown}, "required": [key]}, raise_on_error=True)


def test_the_pipeline_declares_no_field_of_a_recipe_again() -> None:
    for section, recipe in ((RuntimeSettings, RuntimeRecipe), (InitialSetSettings, InitialSetRecipe)):
        assert not set(section.__annotations__) & {item.name for item in fields(recipe)}
    assert {SECTIONS[path] for path in ("adapter", "training", "search", "calibration")} == {
        AdapterRecipe, TrainingRecipe, SearchRecipe, CalibrationRecipe,
    }  # fmt: skip


def test_settings_are_read_without_the_packages_that_take_seconds_to_import() -> None:
    code = (
        "import sys, pipeline.settings.definitions;"
        "print({'torch', 'transformers', 'peft', 'prefect', 'mlflow', 'boto3', 'sklearn', 'scipy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_settings_cannot_be_assigned_to() -> None:
    settings = Settings.model_validate(MINIMAL)
    with pytest.raises(FrozenInstanceError):
        settings.search.rounds = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        settings.evaluation.workers = 5  # type: ignore[misc]


def test_the_form_shows_titles_of_the_field_and_units_and_ranges() -> None:
    search = SCHEMA["$defs"]["SearchRecipe"]
    assert search["additionalProperties"] is False
    assert search["properties"]["rounds"] == {
        "default": 2, "description": "Each is followed by training. [at least 0, at most 1000]",
        "minimum": 0, "maximum": 1000, "title": "Search rounds", "type": "integer",
    }  # fmt: skip
    titles = {f"{part}.{name}": field["title"] for part, section in SCHEMA["$defs"].items()
              for name, field in section["properties"].items() if "$ref" not in field}  # fmt: skip
    # One name, two fields.
    assert titles["StorageSettings.workers"] == "Transfers at a time"
    assert titles["EvaluationSettings.workers"] == "Shards at a time"
    assert (titles["TrainingRecipe.lr"], titles["PretrainRecipe.lr"]) == ("Learning rate of LoRA", "Learning rate")
    assert titles["RuntimeSettings.cache_mib"] == "Cache of layers (MiB)"
    ranges = {name: SCHEMA["$defs"]["EvaluationSettings"]["properties"][name]["description"].partition("[")[2]
              for name in ("workers", "budgets", "harness_limit")}  # fmt: skip
    assert ranges == {"workers": "at least 1, at most 64]", "budgets": "each above 0]",
                      "harness_limit": "at least 1]"}  # fmt: skip
    assert SCHEMA["required"] == ["model", "benchmark"]
    for field in SCHEMA["properties"].values():
        shown = SCHEMA["$defs"].get(field.get("$ref", "").rpartition("/")[2], {}) | field
        assert shown["title"]
        assert field["description"]


def test_settings_survive_json() -> None:
    raw = {**MINIMAL, "evaluation": {"budgets": [2.5, 3]}, "choices": {"allow": {"bits": [2], "scale_dtype": ["bf16"]}}}
    settings = Settings.model_validate(raw)
    again = Settings.model_validate_json(settings.model_dump_json())
    assert again == settings
    assert again.choices.allow == {"bits": [2], "scale_dtype": ["bf16"]}


def test_defaults_are_valid() -> None:
    """pydantic does not check defaults: a bad one would be refused only where somebody writes it out."""
    settings = Settings.model_validate(MINIMAL)
    assert Settings.model_validate(settings.model_dump()) == settings


@pytest.mark.parametrize("value", [True, False])
def test_a_truth_value_is_no_number_and_a_number_is_no_list(value: bool) -> None:
    with pytest.raises(ValidationError, match="true and false are no value"):
        EvaluationSettings(budgets=[2.0, value])
    with pytest.raises(ValidationError, match="true and false are no value"):
        EvaluationSettings(batch_size=value)
    assert TrackingSettings(system_metrics=value).system_metrics is value


@pytest.mark.parametrize("budgets", [[3.0, 3], [2.5, 2.5000001]])
def test_budgets_that_would_share_a_folder_are_refused(budgets: list[float]) -> None:
    with pytest.raises(ValidationError, match="same first six digits"):
        EvaluationSettings(budgets=budgets)
    assert EvaluationSettings(budgets=[2.5, 2.501]).budgets == [2.5, 2.501]


@pytest.mark.parametrize(
    ("sources", "accepted"),
    [
        ({}, False),
        ({"builtin": "pydoc-topics"}, True),
        ({"files": {"train": "a"}}, True),
        ({"hub": {"path": "a"}}, True),
        ({"builtin": "pydoc-topics", "hub": {"path": "a"}}, False),
        ({"files": {"train": "a"}, "hub": {"path": "a"}}, False),
        ({"hub": {"path": "a", "streaming": True}}, False),
        ({"hub": {"path": "a", "streaming": True}, "n_train": 4}, False),
        ({"hub": {"path": "a", "streaming": True}, "n_train": 4, "n_validation": 4}, True),
        ({"builtin": "pydoc-topics", "search_fraction": 0.5, "validation_fraction": 0.5}, False),
        # What has a file of its own is not split off.
        ({"files": {"train": "a", "validation": "b"}, "search_fraction": 0.5, "validation_fraction": 0.5}, True),
        ({"files": {"train": "a", "search": "b"}, "search_fraction": 0.5, "validation_fraction": 0.5}, True),
    ],
)
def test_a_text_benchmark_has_one_source_that_leaves_text_to_train_on(sources: dict[str, Any], accepted: bool) -> None:
    fields = {"name": "b", "task": "language-modeling", **sources}
    if accepted:
        BenchmarkSettings.model_validate(fields)
    else:
        with pytest.raises(ValidationError):
            BenchmarkSettings.model_validate(fields)


@pytest.mark.parametrize(
    ("cuda", "asked", "found"),
    [
        (False, {}, ("cpu", "float32")),
        (True, {}, ("cuda", "bfloat16")),
        (True, {"device": "cpu"}, ("cpu", "float32")),
        (False, {"dtype": "bfloat16"}, ("cpu", "bfloat16")),
        (True, {"dtype": "float32"}, ("cuda", "float32")),
        (True, {"dtype": "fast"}, ("cuda", "bfloat16")),
        (False, {"dtype": "fast"}, ("cpu", "float32")),
    ],
)
def test_auto_becomes_what_the_machine_has_and_what_was_asked_for_stays(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, asked: dict[str, Any], found: tuple[str, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    runtime = RuntimeSettings(cache_mib=7, processes=2, **asked)
    here = resolved(runtime)
    assert (here.device, here.dtype, here.cache_mib, here.processes) == (*found, 7, 2)
    assert resolved(here) == here
    assert (runtime.device, runtime.dtype) == (asked.get("device", "auto"), asked.get("dtype", "auto"))


@pytest.mark.parametrize("instructions", ["_is_amx_tile_supported", "_is_avx512_bf16_supported"])
def test_only_who_asks_for_it_gets_bfloat16_on_a_processor_that_multiplies_it(monkeypatch, instructions: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, instructions, lambda: True)
    assert resolved(RuntimeSettings(dtype="fast")).dtype == "bfloat16"
    assert resolved(RuntimeSettings()).dtype == "float32"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"layers": "*"}, "this rule changes nothing"),
        ({"layers": "*", "also": [{"scheme": "int"}]}, "names its first scheme"),
        ({"layers": "*", "min_bits": 8, "max_bits": 4}, "min_bits 8 is above max_bits 4"),
        ({"scheme": "int"}, "Field required"),
        ({"layers": "*", "min_bits": True}, "true and false are no value"),
    ],
)
def test_rules_that_say_nothing_or_contradict_themselves_are_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings.model_validate({**MINIMAL, "choices": {"rules": [rule]}})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric": "pearson"}, "'pearson' is no metric for text. Choose one of bits_per_byte, perplexity"),
        ({"metrics": ["bits_per_byte", "bleu"]}, "'bleu' is no metric for text"),
    ],
)
def test_a_metric_that_does_not_apply_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        BenchmarkSettings.model_validate(MINIMAL["benchmark"] | changes)


def test_metrics_are_no_input_of_what_reads_examples() -> None:
    plain = BenchmarkSettings.model_validate(MINIMAL["benchmark"])
    asked = BenchmarkSettings.model_validate(MINIMAL["benchmark"] | {"metric": "perplexity", "metrics": []})
    assert asked != plain
    assert asked.data_only() == plain.data_only() == plain


def test_storage_settings_hold_no_credentials_and_are_complete_where_a_run_is_published() -> None:
    assert not StorageSettings().publish
    assert StorageSettings(prefix="/team/models/").prefix == "team/models"
    for wrong in (
        {"publish": True},
        {"endpoint_url": "minio:9000"},
        {"endpoint_url": "https://key:hunter22@s3.example.com"},
        {"endpoint_url": "https://s3.example.com/?X-Amz-Credential=hunter22"},
        {"prefix": "a//b"},
        {"prefix": "../up"},
        {"bucket": "Upper_Case"},
        {"part_mib": 4},
        {"access_key": "hunter22"},
    ):
        with pytest.raises(ValidationError):
            StorageSettings.model_validate(wrong)
        with pytest.raises(CoaloraError) as caught:
            storage_settings(None, wrong)
        assert "hunter22" not in str(caught.value)


def test_where_a_run_is_kept_is_no_part_of_its_result() -> None:
    plain = Settings(**MINIMAL)
    kept = Settings(**MINIMAL, storage={"publish": True, "bucket": "models"}, versioning={"push": True})
    assert kept.of_the_result() == plain.of_the_result()


def test_budgets_take_units_and_a_cost_is_named_by_its_kind_alone() -> None:
    asked = {"cost": "file_bytes", "evaluation": {"budgets": ["1.2GB", 900], "prompt_budget": "1GB"}}
    settings = Settings.model_validate(MINIMAL | asked | {"initial_set": {"min_budget": "800MB"}})
    assert settings.cost.kind == "file_bytes"
    assert (settings.evaluation.budgets, settings.evaluation.prompt_budget) == ([1200, 900], 1000)
    assert settings.initial_set.min_budget == 800
    validate(MINIMAL | asked, SCHEMA)  # the form takes them, too
    with pytest.raises(ValidationError, match=r"cost\.kind: bytes, file_bytes"):
        Settings.model_validate(MINIMAL | {"evaluation": {"budgets": [2.5, "120MB"]}})


TRUSTING: list[dict[str, Any]] = [
    {"model": {"name_or_path": "m", "trust_remote_code": True}},
    {"evaluation": {"harness_include": "tasks"}},
    {"choices": {"scheme": "antigravity:fly"}},
    {"choices": {"also": [{"scheme": "antigravity:fly"}]}},
    {"choices": {"rules": [{"layers": "*", "scheme": "antigravity:fly"}]}},
    {"search": {"strategy": "antigravity:fly"}},
    {"baselines": {"methods": ["shared", "antigravity:fly"]}},
    {"export": {"formats": ["peft", "antigravity:fly"]}},
]


@pytest.mark.parametrize("changes", TRUSTING, ids=str)
def test_settings_that_would_run_code_need_a_variable_of_the_machine(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="COALORA_TRUST_CODE=1"):
        Settings.model_validate(MINIMAL | changes)
    assert "antigravity" not in sys.modules  # it opens a browser


@pytest.mark.parametrize("changes", [c for c in TRUSTING if "baselines" not in c], ids=str)
def test_with_the_variable_they_are_taken(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COALORA_TRUST_CODE", "1")
    assert Settings.model_validate(MINIMAL | changes)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("uri", ["http://me:SECRET@h:5000", "postgresql://me:SEC/RET@h/db", "https://SECRET@h"])
def test_an_address_of_mlflow_holds_no_login_and_no_error_repeats_it(uri: str) -> None:
    for refused in (lambda: TrackingSettings(tracking_uri=uri), lambda: _validated({"tracking_uri": uri})):
        with pytest.raises(ValueError, match="MLFLOW_TRACKING_USERNAME") as error:
            refused()
        assert "SECRET" not in str(error.value)
        assert "RET@" not in str(error.value)


def _validated(tracking: dict[str, Any]) -> Settings:
    return validate_settings(MINIMAL | {"tracking": tracking}, "the form")


def test_the_form_refuses_an_address_with_a_login_before_a_run_is_made() -> None:
    pattern = TrackingSettings.model_json_schema()["properties"]["tracking_uri"]["pattern"]
    assert not re.search(pattern, "http://me:SECRET@h:5000")
    for uri in ("http://h:5000", "sqlite:////a@b/mlflow.db", "http://h/a@b"):
        assert re.search(pattern, uri)
