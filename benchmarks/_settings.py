"""Settings of the recovery benchmark: base model, data, statistics and tables, made once and kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from coalora.adapt.adapted import AdaptedModel
from coalora.calibrate.calibrate import calibrate
from coalora.calibrate.statistics import load_statistics, save_statistics
from coalora.calibrate.tables import CalibrationTables
from coalora.data.benchmark import Benchmark
from coalora.data.build import classification, language_modeling
from coalora.data.classification import read_table
from coalora.data.text import pydoc_topics, split_documents, text_file
from coalora.errors import CoaloraError
from coalora.evaluate.losses import score
from coalora.files import digest, file_sha256
from coalora.models.loading import default_device, load_model, load_tokenizer
from coalora.models.targets import find_target_layers
from coalora.quant.scheme import InputStatistics
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe, CalibrationRecipe, PretrainRecipe, Rounding, Teacher
from coalora.train.pretrain import pretrain

CACHE = Path(__file__).parent / ".cache"
# NF choices of a layer, by name. One for each bit-width: what a device's kernels offer, and what an adapter meets
# often enough to learn. All 432: the paper's space.
SPACES: dict[str, dict[str, list[int | str]]] = {
    "bits": {"scale_bits": [8], "scale_dtype": ["bf16"], "block_size": [64], "scale_block_size": [256]},
    "all": {},
}
DECODER = PretrainRecipe(steps=1400, batch_size=8, lr=4e-3)


@dataclass(frozen=True)
class Setting:
    """A base model with its data and tables; `identity` changes with anything that decides a result."""

    identity: str
    model: str
    benchmark: Benchmark
    tables: CalibrationTables
    statistics: list[InputStatistics]
    batch_size: int
    lr: float
    theta_lr: float
    teacher: Teacher

    def load(self) -> PreTrainedModel:
        """The base model anew, in full precision."""
        return _load(self.model, self.benchmark)

    def full_precision(self) -> float:
        """The metric of the base without quantization and adapter."""
        tables = self.tables
        adapted = AdaptedModel(
            self.load(), tables.layers, tables.space, self.benchmark.task, method="none", recipe=AdapterRecipe(), seed=0
        )
        return score(adapted, self.benchmark.validation, batch_size=64).metric


def prepare(
    name: str, source: Path | None, model: str | None, space: str = "bits", rounding: Rounding = "feedback"
) -> Setting:
    """The setting `name` with the choices `SPACES[space]`; a decoder is pre-trained where it has no base of its own.

    Raises:
        CoaloraError: the setting reads a file or a model that was not named.
    """
    CACHE.mkdir(exist_ok=True)
    if name != "pydoc" and source is None:
        raise CoaloraError(f"Setting {name} reads a file", remedy="Name it with --text")
    if name == "sst2" and model is None:
        raise CoaloraError("Setting sst2 adapts an encoder", remedy="Name it with --model")
    content = [file_sha256(p) for p in sorted(source.rglob("*.tsv")) or [source]] if source is not None else []
    base = digest([name, content, model, vars(DECODER)])
    identity = digest([base, SPACES[space], rounding])
    folder = CACHE / f"{name}-{base[:12]}"
    folder.mkdir(exist_ok=True)
    language = name != "sst2"
    where = str(folder / "model") if language else str(model)
    if language:
        texts = pydoc_topics() if source is None else text_file(source)
        parts = split_documents(texts, {"search": 0.1, "validation": 0.1}, seed=0)
        if not (folder / "model" / "model.safetensors").is_file():
            print(f"{name}: pre-training the base model ({DECODER.steps} steps)", flush=True)
            (folder / "model").mkdir(exist_ok=True)
            pretrain(parts["train"], DECODER, folder / "model", seed=0, device=torch.device("cpu"))
        limits = {"train": None, "search": 32, "validation": 96}
        made = language_modeling(name, load_tokenizer(where), parts, max_length=128, limits=limits)
    else:
        assert source is not None
        made = _sst2(source, where)
    tables, statistics = _calibrated(folder, _load(where, made), made, identity, space, rounding)
    return Setting(
        identity, where, made, tables, statistics, 8 if language else 32, 3e-3 if language else 1e-3, 3e-4,
        "base" if language else "adapted",
    )  # fmt: skip


def _load(model: str, benchmark: Benchmark) -> PreTrainedModel:
    torch.manual_seed(0)
    return load_model(
        model, benchmark.task, num_labels=benchmark.num_labels, device=default_device(), dtype=torch.float32
    )


def _sst2(folder: Path, model: str) -> Benchmark:
    train, validation = (read_table(folder / f"{part}.tsv", ["sentence"], "label") for part in ("train", "dev"))
    return classification(
        "sst2", load_tokenizer(model), train, validation, search=None, n_search=256, max_length=64, num_labels=2,
        limits={"train": None, "search": 256, "validation": None}, seed=0,
    )  # fmt: skip


def _calibrated(
    folder: Path, model: PreTrainedModel, benchmark: Benchmark, identity: str, space: str, rounding: Rounding
) -> tuple[CalibrationTables, list[InputStatistics]]:
    kept = folder / f"{space}-{rounding}"
    if not (kept / "tables.safetensors").is_file():
        layers, choices = find_target_layers(model), ChoiceSpace("nf", **SPACES[space])
        recipe = CalibrationRecipe(rounding=rounding)
        tables, statistics = calibrate(model, layers, benchmark.train, choices, recipe, base_digest=identity)
        kept.mkdir(exist_ok=True)
        save_statistics(kept, layers, statistics, choices)
        tables.save(kept / "tables.safetensors")
    tables = CalibrationTables.load(kept / "tables.safetensors")
    return tables, load_statistics(kept, tables.layers, tables.space)
