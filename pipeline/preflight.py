"""Checks of settings against files, shapes and servers, made before anything runs: no typing error costs hours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel

from coalora.calibrate.tables import calibration_tables
from coalora.data.classification import read_header
from coalora.errors import CoaloraError
from coalora.evaluate.harness import check_tasks
from coalora.method.initial import given_set
from coalora.models.files import model_files
from coalora.models.loading import check_causal, load_config, meta_model, small_model
from coalora.models.targets import TargetLayer, find_target_layers
from coalora.train.pretrain import llama_config
from pipeline.inputs.choices import choices_of, priced_tables
from pipeline.inputs.corpus import input_files
from pipeline.inputs.loaders import read_set_file
from pipeline.settings.sections import Settings
from pipeline.tracking.server import place_of_runs, require_server
from pipeline.workers.pool import check_runner


@dataclass(frozen=True)
class Preflight:
    """Sizes that the settings amount to: N layers, P weights, K choices, and the bits and costs that can be had."""

    layers: list[TargetLayer]
    n_choices: int
    bits_range: tuple[float, float]
    cost_range: tuple[float, float]
    cost_words: str

    @property
    def n_weights(self) -> int:
        return sum(layer.n_weights for layer in self.layers)


def preflight(settings: Settings, *, root: Path | None = None) -> Preflight:
    """Check files, columns, choice space and its packages, lengths, target layers, budgets, DVC, MLflow and S3.

    Args:
        root: where DVC must be initialised, MLflow's server answer, and S3 be reachable where a run is published;
            None leaves all three out.

    Raises:
        CoaloraError: the first thing that is wrong.
    """
    _check_files(settings)
    model = shapes_of_model(settings)
    _check_sizes(settings, model)
    layers = find_target_layers(model, settings.target_modules)
    space, allowed = choices_of(settings.choices, layers)
    for scheme in space.schemes:
        scheme.require_packages()
    # All but the errors, which take the weights.
    tables = priced_tables(calibration_tables(layers, space, np.zeros(allowed.shape), "", allowed), settings.cost)
    if settings.initial_set.file is not None:
        given_set(read_set_file(settings.initial_set.file), tables)
    _check_budgets(settings, tables.cost_range(), tables.cost_unit.unit)
    _check_adapter(settings, layers)
    _check_objective(settings)
    _check_harness(settings)
    check_runner(settings.evaluation.runner)
    if root is not None and settings.versioning.enabled and not (root / ".dvc").is_dir():
        raise CoaloraError(
            f"Configuration sets are to be versioned, but {root} has no .dvc",
            remedy="Run `dvc init` (or `dvc init --no-scm` without git), or set versioning.enabled=false",
        )
    if root is not None:
        require_server(place_of_runs(settings.tracking.tracking_uri))
    if root is not None and settings.storage.publish:
        from pipeline.s3.client import S3Location  # boto3 is imported where it is wanted alone

        S3Location.of(settings.storage).check()
    return Preflight(layers, len(space), tables.bits_range(), tables.cost_range(), tables.cost_unit.words)


def shapes_of_model(settings: Settings) -> PreTrainedModel:
    """The base model on the meta device: from its architecture alone, without weights."""
    model, task = settings.model, settings.benchmark.task
    if model.pretrain is not None:
        config: PretrainedConfig = llama_config(model.pretrain)
    else:
        source = str(model.name_or_path)
        config = load_config(source, revision=model.revision, trust_remote_code=model.trust_remote_code)
        small = small_model(config, task) if task == "language-modeling" else None
        if small is not None:
            check_causal(small)
    num_labels = settings.benchmark.num_labels if task == "classification" else None
    return meta_model(config, task, num_labels=num_labels, trust_remote_code=model.trust_remote_code)


def positions(model: PreTrainedModel) -> int | None:
    """Tokens that a model tells apart by position; None for any number."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # One entry for padding means that positions are counted from behind it (RoBERTa and its kin).
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    return limit


def _check_files(settings: Settings) -> None:
    model, benchmark = settings.model, settings.benchmark
    if model.name_or_path and Path(model.name_or_path).is_dir():
        model_files(Path(model.name_or_path))
    for path in input_files(benchmark):
        if not path.is_file():
            raise CoaloraError(
                f"There is no benchmark file {path}",
                remedy="Correct the path, for example --set benchmark.files.train=PATH",
            )
        if benchmark.task == "classification":
            read_header(path, [*benchmark.text_columns, benchmark.label_column])


def _check_sizes(settings: Settings, model: PreTrainedModel) -> None:
    benchmark = settings.benchmark
    n_samples, n_train = settings.calibration.n_samples, benchmark.n_train
    if n_train is not None and n_samples > n_train:
        raise CoaloraError(
            f"calibration.n_samples {n_samples} is more than benchmark.n_train {n_train}, whose examples it reads",
            remedy="Lower calibration.n_samples or raise benchmark.n_train",
        )
    limit = positions(model)
    if limit is not None and benchmark.max_length > limit:
        raise CoaloraError(
            f"benchmark.max_length {benchmark.max_length} is more than the base model's {limit} positions",
            remedy=f"Lower benchmark.max_length to at most {limit}",
        )


def _check_adapter(settings: Settings, layers: list[TargetLayer]) -> None:
    recipe = settings.adapter.resolved(settings.benchmark.task)
    recipe.ranks(layers)
    if recipe.theta == "none" and not recipe.expert_bits and not recipe.compensation_rank:
        raise CoaloraError(
            "adapter.theta=none without pairs for low bits and without compensation follows no configuration: it is "
            "Shared-LoRA",
            remedy="Set adapter.theta=others, adapter.expert_bits or adapter.compensation_rank",
        )


def _check_objective(settings: Settings) -> None:
    objective = settings.training.objective
    if objective.distillation and objective.teacher == "base" and settings.benchmark.task == "classification":
        raise CoaloraError(
            "training.objective.teacher base cannot teach a classifier: the base's head is not trained",
            remedy="Set training.objective.teacher=adapted",
        )


def _check_harness(settings: Settings) -> None:
    asked = settings.evaluation
    if not asked.harness_tasks:
        return
    if settings.benchmark.task != "language-modeling":
        raise CoaloraError(
            f"evaluation.harness_tasks need a language model, but benchmark.task is {settings.benchmark.task}",
            remedy="Set evaluation.harness_tasks=[]",
        )
    check_tasks(asked.harness_tasks, asked.harness_include)


def _check_budgets(settings: Settings, cost_range: tuple[float, float], unit: str) -> None:
    low, high = cost_range
    initial: Sequence[float | None] = (settings.initial_set.min_budget, settings.initial_set.max_budget)
    named = [("evaluation.budgets", b) for b in settings.evaluation.budgets]
    named += [(f"initial_set.{n}_budget", b) for n, b in zip(("min", "max"), initial, strict=True) if b is not None]
    for key, budget in named:
        if not low <= budget <= high:
            raise CoaloraError(
                f"{key} {budget:g} {unit} is outside of the choice space",
                remedy=f"Set {key} to {_inside(low, np.ceil)} to {_inside(high, np.floor)} {unit}, or allow other "
                "choices (choices.allow)",
            )
    start, end = (default if asked is None else asked for asked, default in zip(initial, cost_range, strict=True))
    if start >= end:
        raise CoaloraError(
            f"initial_set.min_budget {start:g} is not below initial_set.max_budget {end:g} {unit} (by default the ends "
            f"of the choice space, {low:.6g} and {high:.6g})",
            remedy="Correct initial_set, or allow more choices (choices.allow) where there is only one",
        )


def _inside(value: float, rounding: Callable[[float], float]) -> str:
    """An end of the range with enough digits, rounded into the range: what the message names is accepted."""
    scale = 1000 if value >= 1 else 10.0 ** (3 - np.floor(np.log10(value or 1)))
    return f"{rounding(value * scale) / scale:.{max(3, round(np.log10(scale)))}f}"
