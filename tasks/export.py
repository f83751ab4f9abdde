"""Stages `export` and `bundle`: what a device gets for a budget, and what answers any other budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from coalora.configurations import ConfigurationSet
from coalora.export.bundle import Bundle
from coalora.export.formats import ExportSource
from coalora.export.formats import write_export as write_formats
from coalora.files import read_json
from coalora.models.loading import load_config
from coalora.recipes import AdapterRecipe
from pipeline.inputs.adapted import build_adapted, parameters
from pipeline.inputs.loaders import (
    SELECTED,
    BaseModel,
    load_benchmark,
    load_input_statistics,
    load_selected,
    load_set,
    load_tables,
)
from pipeline.settings.sections import ExportSettings, RuntimeSettings
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, Store


@stage("bundle")
def make_bundle(
    *,
    base: Artifact,
    benchmark: Artifact,
    tables: Artifact,
    selection: Artifact,
    state: Artifact,
    adapter: AdapterRecipe,
    runtime: RuntimeSettings,
    seed: int,
) -> Artifact:
    """Shared pair, theta, head, compensation, tables and final set, without the base model."""
    measured, data = load_tables(tables), load_benchmark(benchmark)
    # What was measured for the asked budgets answers other budgets as well as a member does.
    members, chosen = load_set(selection, measured), read_json(Store().path(selection) / SELECTED)
    merged = members.merge(ConfigurationSet.from_dict(chosen, measured)).distinct().sorted(measured)
    recipe, factors = adapter.resolved(data.task), None
    if recipe.compensation_rank:
        adapted = build_adapted(
            BaseModel(base), data, tables, method="coa", adapter=adapter, runtime=runtime, seed=seed, state=state
        )
        factors = adapted.compensation.factors(merged.configurations) if adapted.compensation else None
    bundle = Bundle(
        measured,
        merged,
        parameters(state),
        recipe,
        data.task,
        base_model=BaseModel(base).name,
        compensation=factors,
    )

    def write(folder: Path) -> dict[str, Scalar]:
        bundle.save(folder)
        return {"n_members": len(bundle.members)}

    return Store().put("bundle", write)


@stage("export")
def export_budget(
    *,
    base: Artifact,
    benchmark: Artifact,
    tables: Artifact,
    selection: Artifact,
    bundle: Artifact,
    index: int,
    export: ExportSettings,
    runtime: RuntimeSettings,
    seed: int,
) -> Artifact:
    """`configuration.json` and a folder of each format for the budget number `index` of the selection."""
    measured = load_tables(tables)
    configuration = load_selected(selection, measured)[index]

    def write(folder: Path) -> dict[str, Scalar]:
        return write_export(
            folder,
            configuration,
            base=base,
            benchmark=benchmark,
            tables=tables,
            bundle=bundle,
            export=export,
            runtime=runtime,
            seed=seed,
        )

    return Store().put("export", write)


def write_export(
    folder: Path,
    configuration: np.ndarray,
    *,
    base: Artifact,
    benchmark: Artifact,
    tables: Artifact,
    bundle: Artifact,
    export: ExportSettings,
    runtime: RuntimeSettings,
    seed: int,
) -> dict[str, Scalar]:
    """Write one configuration (N,) in the formats asked for into `folder`; returns its bits, bytes and digest."""
    made = Bundle.load(Store().path(bundle))
    adapted = made.adapt_to(configuration)
    of_base, data = BaseModel(base), load_benchmark(benchmark)
    source = ExportSource(
        adapted,
        made.tables,
        data.task,
        load_model=lambda: of_base.load(data, runtime, seed=seed),
        load_tokenizer=of_base.tokenizer,
        load_statistics=lambda: load_input_statistics(tables, made.tables),
        adapter_dtype=getattr(torch, export.adapter_dtype),
        rest_dtype=getattr(load_config(of_base.path), "dtype", None),
    )
    write_formats(folder, export.formats, source)
    return {
        "average_bits": adapted.average_bits,
        "cost": float(made.tables.costs(configuration)),
        "digest": adapted.digest,
        "adapter_bytes": _size(folder / "adapter", "*.safetensors"),
        "base_bytes": _size(folder / "base", "*.safetensors"),
    }


def _size(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))
