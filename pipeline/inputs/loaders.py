"""Loaders of what stages read: base model, benchmark, calibration tables and configuration sets behind artifacts.

Apart from the stages that make them: editing how something is made does not touch the keys of those that read it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from coalora.calibrate.statistics import load_statistics
from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import SET_FORMAT, ConfigurationSet
from coalora.data.benchmark import Benchmark
from coalora.data.text import read_text
from coalora.errors import CoaloraError
from coalora.files import read_json
from coalora.models.loading import load_config, load_model, load_tokenizer
from coalora.quant.scheme import InputStatistics
from coalora.trust import require_trust
from pipeline.inputs.fingerprint import model_digest
from pipeline.settings.sections import RuntimeSettings
from pipeline.store.store import Artifact, Scalar, current_store

REFERENCE = "reference.json"
MODEL = "model"
TABLES = "tables.safetensors"
SET = "configurations.json"
ROUND = "round.json"  # beside the set that a search round made
SELECTED = "selected.json"
TEXT = "text.txt"


@dataclass
class BaseModel:
    """The model behind a `base` artifact."""

    artifact: Artifact

    @property
    def _reference(self) -> dict | None:
        file = current_store().path(self.artifact) / REFERENCE
        return read_json(file) if file.is_file() else None

    @property
    def path(self) -> Path:
        """Folder of config, weights and tokenizer."""
        reference = self._reference
        if reference is None:
            return current_store().path(self.artifact) / MODEL
        path = Path(str(self.artifact.meta["path"]))
        if not path.is_dir() or model_digest(path) != reference["digest"]:
            raise CoaloraError(
                f"The base model {path} is missing, or has changed since the run began",
                remedy="Restore it, or start the pipeline again",
            )
        return path

    @property
    def name(self) -> str:
        return str(self.artifact.meta["name"])

    @property
    def address(self) -> str:
        """What stock PEFT finds it by: its id on the hub, or the absolute path of its folder.

        Of a model that was made or unpacked here it is the name alone: where a store lies is no part of a result.
        """
        reference = self._reference
        return self.name if reference is None or "revision" in reference else str(self.path.resolve())

    @property
    def digest(self) -> str:
        """Digest of the weights' files: the identity that adapters and configurations are bound to."""
        reference = self._reference
        return reference["digest"] if reference else model_digest(self.path)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path, trust_remote_code=self.trusted)

    def load(self, benchmark: Benchmark, runtime: RuntimeSettings, *, seed: int) -> PreTrainedModel:
        """The model for the benchmark's task; `seed` decides a new classification head."""
        return load_model(
            self.path,
            benchmark.task,
            num_labels=benchmark.num_labels,
            dtype=getattr(torch, runtime.dtype),
            device=torch.device(runtime.device),
            seed=seed,
            trust_remote_code=self.trusted,
            pad_token_id=benchmark.train.pad_token_id,
        )

    def config(self) -> PretrainedConfig:
        return load_config(self.path, trust_remote_code=self.trusted)

    @property
    def trusted(self) -> bool:
        reference = self._reference
        found = bool(reference and reference["trust_remote_code"])
        if found:  # another machine may have made the artifact
            require_trust(f"The base model {self.name} would run code that comes with it")
        return found


def load_benchmark(artifact: Artifact) -> Benchmark:
    return Benchmark.load(current_store().path(artifact))


def load_tables(artifact: Artifact) -> CalibrationTables:
    return CalibrationTables.load(current_store().path(artifact) / TABLES)


def load_input_statistics(artifact: Artifact, measured: CalibrationTables) -> list[InputStatistics]:
    """Statistics of the layers' inputs from a calibration artifact, in the order of its layers."""
    return load_statistics(current_store().path(artifact), measured.layers, measured.space)


def put_set(members: ConfigurationSet, measured: CalibrationTables, meta: dict[str, Scalar]) -> Artifact:
    """A configuration set in the store."""
    meta = {"n_members": len(members), **meta}
    return current_store().put_json("configuration-set", {SET: members.to_dict(measured)}, meta)


def read_set_file(file: str | Path) -> dict[str, Any]:
    """The content of a configuration set's file: the start of a run with the set of an earlier one."""
    path = Path(file)
    if not path.is_file():
        raise CoaloraError(
            f"initial_set.file {path} does not exist",
            remedy="Bring a set back with `coalora restore ... --out FILE`, or correct the path",
        )
    content = read_json(path)
    form = content.get("format") if isinstance(content, dict) else type(content).__name__
    if form != SET_FORMAT:
        raise CoaloraError(
            f"{path} is of the form {str(form)[:100]!r}, and no configuration set",
            remedy="Take a file round-*.json of configurations/, or bring one back with `coalora restore`",
        )
    return content


def load_set(artifact: Artifact, measured: CalibrationTables) -> ConfigurationSet:
    return ConfigurationSet.from_dict(read_json(current_store().path(artifact) / SET), measured)


def load_selected(artifact: Artifact, measured: CalibrationTables) -> np.ndarray:
    """Configurations (n_budgets, N) of a selection, in the order of its budgets."""
    return ConfigurationSet.from_dict(read_json(current_store().path(artifact) / SELECTED), measured).configurations


def put_text(path: Path) -> Artifact:
    """A text file in the store, so that what is computed from it goes by its content."""
    text = read_text(path)

    def write(folder: Path) -> dict[str, Scalar]:
        (folder / TEXT).write_text(text, encoding="utf-8", newline="")
        return {"name": path.name}

    return current_store().put("text", write)
