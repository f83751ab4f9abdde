"""Checks that need files or shapes, made before anything runs: nothing may fail after hours for a typing error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from coalora.data.classification import FORMATS, read_header
from coalora.errors import CoaloraError
from coalora.models.loading import load_config, meta_model
from coalora.models.pretrain import PretrainRecipe, llama_config
from coalora.models.targets import TargetLayer, find_target_layers
from coalora.quant.space import ChoiceSpace
from tasks.corpus import input_files
from tasks.fingerprint import model_files
from tasks.settings import Settings


@dataclass(frozen=True)
class Preflight:
    """What the settings amount to: N layers, P weights, K choices, and the bits that can be had."""

    layers: list[TargetLayer]
    n_choices: int
    bits_range: tuple[float, float]

    @property
    def n_weights(self) -> int:
        return sum(layer.n_weights for layer in self.layers)


def preflight(settings: Settings, *, root: Path | None = None) -> Preflight:
    """Check files, columns, target layers, choice space, budgets and DVC.

    Args:
        root: where DVC must be initialised; None leaves that out.

    Raises:
        CoaloraError: the first thing that is wrong.
    """
    _check_files(settings)
    space = ChoiceSpace(settings.choices.scheme, **settings.choices.allow)
    layers = target_layers(settings)
    nbytes = space.packed_nbytes_table([layer.shape for layer in layers])
    n_weights = sum(layer.n_weights for layer in layers)
    bits_range = (
        float(nbytes.min(1).sum() * 8 / n_weights),
        float(nbytes.max(1).sum() * 8 / n_weights),
    )
    _check_budgets(settings, bits_range)
    if root is not None and settings.versioning.enabled and not (root / ".dvc").is_dir():
        raise CoaloraError(
            "DVC must be initialised where configuration sets are versioned",
            got=f"no .dvc in {root}",
            remedy="run `dvc init` (or `dvc init --no-scm` without git), or set versioning.enabled=false",
        )
    return Preflight(layers, len(space), bits_range)


def target_layers(settings: Settings) -> list[TargetLayer]:
    """The N target layers, from the architecture alone (meta device, no weights)."""
    model, task = settings.model, settings.benchmark.task
    config: PretrainedConfig
    if model.pretrain is not None:
        config = llama_config(PretrainRecipe(**model.pretrain.model_dump()))
    else:
        config = load_config(
            str(model.name_or_path), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    num_labels = settings.benchmark.num_labels if task == "classification" else None
    return find_target_layers(meta_model(config, task, num_labels=num_labels), settings.target_modules)


def _check_files(settings: Settings) -> None:
    model, benchmark = settings.model, settings.benchmark
    if model.name_or_path and Path(model.name_or_path).is_dir():
        model_files(Path(model.name_or_path))
    for path in input_files(benchmark):
        if not path.is_file():
            raise CoaloraError(
                "a benchmark file must exist",
                got=path,
                remedy="correct the path, for example --set benchmark.files.train=PATH",
            )
        if benchmark.task != "classification":
            continue
        if path.suffix.lower() not in FORMATS:
            raise CoaloraError("the file's ending tells its format", got=path.name, expected=", ".join(FORMATS))
        read_header(path, [*benchmark.text_columns, benchmark.label_column])


def _check_budgets(settings: Settings, bits_range: tuple[float, float]) -> None:
    low, high = bits_range
    initial: Sequence[float | None] = (settings.initial_set.min_bits, settings.initial_set.max_bits)
    named = [("evaluation.budgets", b) for b in settings.evaluation.budgets]
    named += [(f"initial_set.{n}_bits", b) for n, b in zip(("min", "max"), initial, strict=True) if b is not None]
    for key, budget in named:
        if not low <= budget <= high:
            raise CoaloraError(
                "budgets lie inside the choice space",
                got=f"{key} {budget:g} bits",
                expected=f"{np.ceil(low * 1000) / 1000:.3f} to {np.floor(high * 1000) / 1000:.3f} bits",
                remedy=f"correct {key}, or allow other choices (choices.allow)",
            )
    if None not in initial and initial[0] >= initial[1]:  # type: ignore[operator]
        raise CoaloraError("initial_set.min_bits lies below initial_set.max_bits", got=f"{initial[0]} and {initial[1]}")
