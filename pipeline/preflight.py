"""Checks of settings against files, shapes and servers, made before anything runs: no typing error costs hours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from coalora.calibrate.calibrate import check_kept
from coalora.calibrate.tables import calibration_tables, counted
from coalora.data.benchmark import Split
from coalora.data.build import check_pads, example_split, text_split
from coalora.data.classification import Examples, check_classes
from coalora.data.text import split_documents
from coalora.errors import CoaloraError
from coalora.evaluate.harness import check_tasks
from coalora.export.formats import EXPORT_FORMATS
from coalora.files import read_header
from coalora.method.initial import given_set
from coalora.models.files import model_files
from coalora.models.loading import (
    check_causal,
    check_padding,
    embedded,
    load_config,
    load_tokenizer,
    meta_model,
    resolved,
    small_model,
)
from coalora.models.targets import TargetLayer, find_target_layers
from coalora.search.strategies import STRATEGIES
from coalora.train.pretrain import llama_config, train_tokenizer
from pipeline.environment import require_home
from pipeline.inputs.base import base_source
from pipeline.inputs.choices import choices_of, priced_tables
from pipeline.inputs.corpus import content_key, documents, examples, look_at_hub
from pipeline.inputs.fingerprint import input_files
from pipeline.inputs.loaders import read_set_file
from pipeline.settings.sections import BenchmarkSettings, Settings
from pipeline.tracking.server import place_of_runs, require_server
from pipeline.versioning.repository import check_repository
from pipeline.workers.pool import check_runner


@dataclass(frozen=True)
class Preflight:
    """Sizes that the settings amount to: N layers, P weights, K choices, and the bits and costs that can be had."""

    layers: list[TargetLayer]
    n_choices: int
    bits_range: tuple[float, float]
    cost_range: tuple[float, float]
    cost_words: str
    kept_mb: float  # packed weights of all layers under all choices, which rounding other than absmax keeps

    @property
    def n_weights(self) -> int:
        return sum(layer.n_weights for layer in self.layers)


def preflight(settings: Settings, *, root: Path | None = None) -> Preflight:
    """Check data, model and tokenizer, choice space and its packages, lengths, target layers, budgets, DVC, MLflow, S3.

    Args:
        root: where DVC must be initialised, MLflow's server answer, and S3 be reachable where a run is published;
            None leaves all three out.

    Raises:
        CoaloraError: the first thing that is wrong.
    """
    resolved(settings.runtime)
    _check_files(settings)
    model = shapes_of_model(settings)
    _check_sizes(settings, model)
    tokenizer = _check_data(settings, model)
    layers = find_target_layers(model, settings.target_modules)
    space, allowed = choices_of(settings.choices, layers)
    for scheme in space.schemes:
        scheme.require_packages()
    kept = check_kept(layers, space, settings.calibration, allowed)
    # All but the errors, which take the weights.
    tables = calibration_tables(layers, space, np.zeros(allowed.shape), "", allowed, tie=settings.choices.tie)
    tables = counted(tables, model, getattr(model.config, "dtype", None), tokenizer)
    tables = priced_tables(tables, settings.cost, settings.adapter, settings.export.adapter_dtype)
    if settings.initial_set.file is not None:
        given_set(read_set_file(settings.initial_set.file), tables)
    _check_budgets(settings, tables.cost_range(), tables.cost_unit.unit)
    _check_adapter(settings, layers)
    _check_objective(settings)
    _check_harness(settings)
    check_runner(settings.evaluation.runner)
    _ = STRATEGIES[settings.search.strategy]
    for name in settings.export.formats:
        EXPORT_FORMATS[name]().check(tables, model.config, settings.benchmark.task)
    if root is not None and settings.versioning.enabled:
        check_repository(root, push=settings.versioning.push)
    if root is not None:
        require_server(place_of_runs(settings.tracking.tracking_uri), experiment=settings.tracking.experiment)
    if root is not None and settings.storage.publish:
        from pipeline.s3.client import S3Location  # boto3 is imported where it is wanted alone

        S3Location.of(settings.storage).check()
    require_home()  # last: a run that is refused makes nothing
    return Preflight(
        layers,
        len(space),
        tables.bits_range(),
        tables.cost_range(),
        tables.cost_unit.words,
        0.0 if settings.calibration.rounding == "absmax" else kept,
    )


def shapes_of_model(settings: Settings) -> PreTrainedModel:
    """The base model on the meta device: from its architecture alone, without weights."""
    model, task = settings.model, settings.benchmark.task
    if model.pretrain is not None:
        config: PretrainedConfig = llama_config(model.pretrain)
    else:
        config = load_config(base_source(model), revision=model.revision, trust_remote_code=model.trust_remote_code)
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
    if model.name_or_path and (folder := Path(base_source(model))).is_dir():
        for file in model_files(folder):
            if file.suffix == ".safetensors":
                read_header(file)
    for path in input_files(benchmark):
        if not path.is_file():
            raise CoaloraError(
                f"There is no benchmark file {path}",
                remedy="Correct the path, for example --set benchmark.files.train=PATH",
            )


def _check_sizes(settings: Settings, model: PreTrainedModel) -> None:
    benchmark = settings.benchmark
    n_samples, n_train = settings.calibration.n_samples, benchmark.n_train
    if n_train is not None and n_samples > n_train:
        raise CoaloraError(
            f"calibration.n_samples {n_samples} is more than benchmark.n_train {n_train}, whose examples it reads",
            remedy="Lower calibration.n_samples or raise benchmark.n_train",
        )
    limit = positions(model)
    # A block holds one token more than it predicts.
    width = benchmark.max_length + (benchmark.task == "language-modeling")
    if limit is not None and width > limit:
        most = benchmark.max_length - (width - limit)
        raise CoaloraError(
            f"benchmark.max_length {benchmark.max_length} is more than the base model's {limit} positions take",
            remedy=f"Lower benchmark.max_length to at most {most}",
        )


def _check_data(settings: Settings, model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """Read local data as the stages will, look at the hub's; refuse too little of it, and another tokenizer.

    Returns the tokenizer; None for one that is trained on a text of the hub.
    """
    source, benchmark = settings.model, settings.benchmark
    tokenizer = None
    if source.pretrain is None:
        tokenizer = load_tokenizer(
            base_source(source), revision=source.revision, trust_remote_code=source.trust_remote_code
        )
        if benchmark.task == "classification":
            check_pads(tokenizer)
            check_padding(model, tokenizer.pad_token_id)
    n_samples = settings.calibration.n_samples
    if benchmark.hub is not None and benchmark.task == "classification":
        n_train = look_at_hub(benchmark, n_samples)["train"].n_rows
        if n_train is not None:
            _check_rest(settings, n_train, benchmark.n_search)
        return tokenizer
    if benchmark.task == "classification":
        train, validation, search = examples(benchmark)
        for part, found in {"train": train, "validation": validation, "search": search}.items():
            if found is not None:
                check_classes(found, benchmark.num_labels, part)
        _check_rest(settings, len(train.texts), benchmark.n_search if search is None else 0)
        splits = (
            {
                "train": example_split(
                    Examples(train.texts[:256], train.labels[:256]), tokenizer, max_length=benchmark.max_length
                )
            }
            if tokenizer
            else {}
        )
    else:
        texts = documents(benchmark) if benchmark.hub is None else _small_hub_texts(benchmark, n_samples)
        if tokenizer is None and source.pretrain is not None:
            if benchmark.hub is not None:
                return None  # its tokenizer is trained on all of the text
            tokenizer = _own_tokenizer(*content_key(benchmark), source.pretrain.vocab_size)
            _blocks("train", texts, tokenizer, source.pretrain.max_length, 1, "model.pretrain.max_length")
        wanted = {"train": n_samples, "search": 1, "validation": 1}
        splits = {
            part: _blocks(part, texts, tokenizer, benchmark.max_length, n, "benchmark.max_length")
            for part, n in wanted.items()
            if part in texts
        }
    highest = max((int(split.input_ids.max()) for split in splits.values()), default=0)
    if highest >= embedded(model):
        raise CoaloraError(
            f"The tokenizer gives token {highest}, and the model embeds {embedded(model)}",
            remedy="Put the model's own tokenizer into its folder",
        )
    return tokenizer


def _small_hub_texts(benchmark: BenchmarkSettings, n_samples: int) -> dict[str, list[str]]:
    """Documents of the parts that the hub has so few of that they may be too few, dealt as the stages deal them."""
    seen = look_at_hub(benchmark, n_samples)
    train, validation = seen["train"].texts, seen["validation"].texts
    parts = {} if validation is None else {"validation": validation}
    if train is not None:
        parts |= split_documents(train, {"search": benchmark.search_fraction}, seed=benchmark.split_seed)
    return parts


def _check_rest(settings: Settings, n_train: int, n_search: int) -> None:
    n_samples, rest = settings.calibration.n_samples, n_train - n_search
    if rest < n_samples:
        raise CoaloraError(
            f"{n_train} training examples leave {max(rest, 0)} beside the search's, and calibration.n_samples is "
            f"{n_samples}",
            remedy="Lower calibration.n_samples or benchmark.n_search, or give more examples",
        )


@lru_cache(maxsize=1)
def _own_tokenizer(benchmark: str, stamps: object, vocab_size: int) -> Any:
    """The tokenizer that a pre-trained decoder will have; a run is checked twice."""
    return train_tokenizer(documents(BenchmarkSettings.model_validate_json(benchmark))["train"], vocab_size)


def _blocks(
    part: str, texts: Mapping[str, Sequence[str]], tokenizer: Any, max_length: int, wanted: int, key: str
) -> Split:
    """The first blocks of a part; refuses fewer than are wanted."""
    try:
        # An iterator: whether there are enough of them takes no more text than that.
        split = text_split(iter(texts[part]), tokenizer, max_length=max_length, limit=wanted)
    except CoaloraError as error:
        raise CoaloraError(
            f"The {part} text is too short: {error.problem}", remedy=f"Give more text, or lower {key}"
        ) from error
    if len(split) < wanted:
        raise CoaloraError(
            f"The {part} text makes {len(split)} blocks of {max_length} tokens, and calibration.n_samples is {wanted}",
            remedy=f"Set calibration.n_samples to at most {len(split)}, give more text, or lower {key}",
        )
    return split


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
    objective = settings.training.resolved(settings.goal).objective
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
    if high - low <= 1e-9 * high:
        raise CoaloraError(
            f"Every configuration costs {low:.6g} {unit}: there is nothing to choose",
            remedy="Allow more choices (choices.allow) where there is only one, or give latencies that differ",
        )
    initial: Sequence[float | None] = (settings.initial_set.min_budget, settings.initial_set.max_budget)
    named = [("evaluation.budgets", b) for b in settings.evaluation.budgets]
    named += [(f"initial_set.{n}_budget", b) for n, b in zip(("min", "max"), initial, strict=True) if b is not None]
    for key, budget in named:
        if not low <= budget <= high:
            least, most = _shown(low, high)
            raise CoaloraError(
                f"{key} {budget:g} {unit} is outside of the choice space",
                remedy=f"Set {key} to {least} to {most} {unit}, or allow other choices (choices.allow)",
            )
    start, end = (default if asked is None else asked for asked, default in zip(initial, cost_range, strict=True))
    if start >= end:
        raise CoaloraError(
            f"initial_set.min_budget {start:g} is not below initial_set.max_budget {end:g} {unit} (by default the ends "
            f"of the choice space, {low:.6g} and {high:.6g})",
            remedy="Correct initial_set",
        )


def _shown(low: float, high: float) -> tuple[str, str]:
    """The ends of the range with enough digits, rounded into it: what the message names is accepted."""
    step = min(0.001 if low >= 1 else 0.001 * (low or 1), (high - low) / 10)
    digits = int(np.ceil(-np.log10(step)))
    scale = 10.0**digits
    return tuple(f"{r(value * scale) / scale:.{digits}f}" for r, value in ((np.ceil, low), (np.floor, high)))  # type: ignore[return-value]
