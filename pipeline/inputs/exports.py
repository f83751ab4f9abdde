"""Export behind artifacts: what decides the files of a device, and their writing for any configuration."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from coalora.data.benchmark import Benchmark
from coalora.export.base import load_adapted
from coalora.export.bundle import Bundle
from coalora.export.device import facts_of, source_for
from coalora.export.formats import EXPORT_FORMATS, write_export
from coalora.files import digest, folder_nbytes
from pipeline.inputs.adapted import hold, release_models
from pipeline.inputs.loaders import BaseModel, load_benchmark, load_input_statistics
from pipeline.settings.sections import ExportSettings, RuntimeSettings
from pipeline.store.store import Artifact, Scalar, current_store


@dataclass(frozen=True)
class ExportInputs:
    """Inputs that decide an export, but for its configuration; one argument of a stage."""

    base: Artifact
    benchmark: Artifact
    tables: Artifact
    bundle: Artifact
    settings: ExportSettings
    runtime: RuntimeSettings
    seed: int

    def __getstate__(self) -> dict[str, Any]:
        """Without what was loaded: other processes load their own."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def loaded(self) -> Bundle:
        """The bundle."""
        return Bundle.load(current_store().path(self.bundle))

    def write(self, folder: Path, configuration: np.ndarray, formats: Sequence[str] | None = None) -> dict[str, Scalar]:
        """Write one configuration (N,) into `folder`; returns its bits, cost, digest and bytes."""
        base, data, tables = BaseModel(self.base), load_benchmark(self.benchmark), self.loaded.tables
        adapted = self.loaded.adapt_to(configuration)
        adapted.config.base_model_name_or_path = base.address  # the base may have moved since the bundle was made
        formats = self.settings.formats if formats is None else formats

        def load_model() -> PreTrainedModel:
            # One for all exports in a row, unless a format may change it.
            kept = all(EXPORT_FORMATS[name].keeps_model for name in formats)
            return self._kept(base, data) if kept else base.load(data, self.runtime, seed=self.seed)

        dtype = getattr(torch, self.settings.adapter_dtype)
        source = replace(
            source_for(self.loaded, adapted, base.path, dtype, trust_remote_code=base.trusted),
            load_model=load_model,
            load_statistics=lambda: load_input_statistics(self.tables, tables),
        )
        write_export(folder, formats, source, facts_of(self.loaded, configuration, base.path))
        return {
            "average_bits": adapted.average_bits,
            "cost": float(tables.costs(configuration)),
            "digest": adapted.digest,
            "adapter_bytes": folder_nbytes(folder / "adapter"),
            "base_bytes": folder_nbytes(folder / "base"),
        }

    def _kept(self, base: BaseModel, data: Benchmark) -> PreTrainedModel:
        key = digest([self.base.digest, self.benchmark.digest, self.runtime.to_dict(), self.seed])
        with hold(key, lambda: base.load(data, self.runtime, seed=self.seed)) as model:
            return model

    @contextmanager
    def device_model(self, budget: float) -> Iterator[tuple[PeftModel, dict[str, Scalar]]]:
        """The model that a device runs for a budget, exported and loaded again; and what `write` returned."""
        with TemporaryDirectory(prefix="coalora-") as name:
            folder = Path(name)
            facts = self.write(folder, self.loaded.select(budget), ["peft", "packed"])
            release_models()  # the base need not fit beside the model
            device, dtype = torch.device(self.runtime.device), getattr(torch, self.runtime.dtype)
            trusted = BaseModel(self.base).trusted
            model = load_adapted(
                folder / "base", folder / "adapter", device=device, dtype=dtype, trust_remote_code=trusted
            )
            yield model, facts
