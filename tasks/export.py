"""Stage `export`: files for a device, for one budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from coalora.export.bundle import Bundle
from coalora.export.formats import ExportSource
from coalora.export.formats import write_export as write_formats
from coalora.models.loading import load_config
from pipeline.inputs.loaders import (
    BaseModel,
    load_benchmark,
    load_input_statistics,
    load_selected,
    load_tables,
)
from pipeline.settings.sections import ExportSettings, RuntimeSettings
from pipeline.stages.runner import stage
from pipeline.store.current import current_store
from pipeline.store.store import Artifact, Scalar


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

    return current_store().put("export", write)


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
    made = Bundle.load(current_store().path(bundle))
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
