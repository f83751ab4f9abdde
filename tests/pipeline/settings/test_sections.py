"""Settings explain themselves (they are the form in Prefect's UI) and cannot be changed by accident.

The messages for wrong values are tested in tests/pipeline/settings/test_definitions.py, as users see them.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError

from coalora.errors import CoaloraError
from pipeline.settings.data import BenchmarkSettings, ModelSettings
from pipeline.settings.sections import AdapterSettings, EvaluationSettings, RuntimeSettings, Settings
from pipeline.settings.storage import StorageSettings, storage_settings

MINIMAL: dict[str, Any] = {
    "model": {"name_or_path": "m"},
    "benchmark": {"name": "b", "task": "language-modeling", "builtin": "pydoc-topics"},
}


def sections(model: type[BaseModel] = Settings, path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield path or "settings", model
    for name, field in model.model_fields.items():
        for option in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from sections(option, f"{path}.{name}".lstrip("."))


SECTIONS = dict(sections())


def test_the_walk_finds_nested_and_optional_sections() -> None:
    assert {"settings", "model.pretrain", "benchmark.files", "benchmark.hub", "search", "runtime"} <= set(SECTIONS)


@pytest.mark.parametrize("path", SECTIONS)
def test_every_field_says_what_it_is(path: str) -> None:
    model = SECTIONS[path]
    assert model.__doc__
    for name, field in model.model_fields.items():
        assert field.description, f"{path}.{name}"
        assert field.description.endswith("."), f"{path}.{name}: {field.description}"


@pytest.mark.parametrize("path", SECTIONS)
def test_every_section_refuses_unknown_keys_and_changes(path: str) -> None:
    model = SECTIONS[path]
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["frozen"] is True
    # Infinity is larger than every lower bound, so that bounds alone let it through.
    assert model.model_config["allow_inf_nan"] is False


def test_settings_cannot_be_assigned_to() -> None:
    settings = Settings.model_validate(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        settings.search.rounds = 5  # type: ignore[misc]


def test_the_json_schema_builds_and_carries_descriptions_units_and_ranges() -> None:
    schema = json.loads(json.dumps(Settings.model_json_schema()))
    search = schema["$defs"]["SearchSettings"]
    assert search["additionalProperties"] is False
    assert search["properties"]["rounds"] == {
        "default": 2, "description": "Search rounds, each followed by training. [at least 0]", "minimum": 0,
        "title": "Rounds", "type": "integer",
    }  # fmt: skip
    titles = {name: field.get("title") for name, field in schema["$defs"]["TrainingSettings"]["properties"].items()}
    assert (titles["lr"], titles["batch_size"]) == ("Learning rate", "Batch size")
    assert schema["$defs"]["InitialSetSettings"]["title"] == "Initial set"
    ranges = {name: schema["$defs"]["EvaluationSettings"]["properties"][name]["description"].partition("[")[2]
              for name in ("workers", "budgets", "harness_limit")}  # fmt: skip
    assert ranges == {"workers": "at least 1, at most 64]", "budgets": "each above 0]", "harness_limit": "at least 1]"}
    assert schema["$defs"]["AdapterSettings"]["properties"]["lora_dropout"]["exclusiveMaximum"] == 1
    assert schema["required"] == ["model", "benchmark"]
    assert all("description" in field for part in schema["$defs"].values() for field in part["properties"].values())


def test_what_an_adapter_leaves_open_is_what_won_for_its_task() -> None:
    def parts(task: str, **given: Any) -> tuple[int, int, str]:
        recipe = AdapterSettings(**given).recipe(task)
        return recipe.compensation_rank, recipe.expert_bits, recipe.theta

    assert parts("language-modeling") == (0, 3, "others")
    assert parts("classification") == (8, 0, "others")
    assert parts("classification", r=12, rank_pattern={"query": 5}) == (2, 0, "others")  # less than the smallest rank
    assert parts("classification", compensation_rank=0, expert_bits=2, theta="none") == (0, 2, "none")
    assert parts("language-modeling", compensation_rank=4, expert_bits=0) == (4, 0, "others")


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
    assert ModelSettings(name_or_path="m", trust_remote_code=value).trust_remote_code is value


@pytest.mark.parametrize("budgets", [[3.0, 3], [2.5, 2.5000001]])
def test_budgets_that_would_share_a_folder_are_refused(budgets: list[float]) -> None:
    with pytest.raises(ValidationError, match="budgets must differ"):
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
        (False, {"device": "cuda"}, ("cuda", "bfloat16")),
    ],
)
def test_auto_becomes_what_the_machine_has_and_what_was_asked_for_stays(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, asked: dict[str, Any], found: tuple[str, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    runtime = RuntimeSettings(cache_mib=7, **asked)
    resolved = runtime.resolved()
    assert (resolved.device, resolved.dtype, resolved.cache_mib) == (*found, 7)
    assert resolved.resolved() == resolved
    assert (runtime.device, runtime.dtype) == (asked.get("device", "auto"), asked.get("dtype", "auto"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"layers": "*"}, "a rule changes something"),
        ({"layers": "*", "also": [{"scheme": "int"}]}, "names its first scheme"),
        ({"layers": "*", "min_bits": 8, "max_bits": 4}, "min_bits 8 is at most max_bits 4"),
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
