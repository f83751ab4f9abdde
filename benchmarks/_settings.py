"""Settings of the recovery benchmark: base model, data, statistics and tables, made once and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from coalora.calibrate.calibrate import calibrate
from coalora.calibrate.statistics import load_statistics, save_statistics
from coalora.calibrate.tables import CalibrationTables
from coalora.data.benchmark import Benchmark
from coalora.data.build import classification, language_modeling
from coalora.data.classification import read_table
from coalora.data.text import pydoc_topics, split_documents, text_file
from coalora.errors import CoaloraError
from coalora.files import digest, file_sha256
from coalora.models.loading import default_device, load_model, load_tokenizer
from coalora.models.targets import find_target_layers
from coalora.quant.scheme import InputStatistics
from coalora.quant.space import ChoiceSpace
from coalora.recipes import CalibrationRecipe, PretrainRecipe, Rounding
from coalora.train.pretrain import pretrain

CACHE = Path(__file__).parent / ".cache"
# NF choices of a layer, by name. One for each bit-width: what a device's kernels offer, and what an adapter meets
# often enough to learn. All 432: the paper's space.
SPACES: dict[str, dict[str, list[int | str]]] = {
    "bits": {"scale_bits": [8], "scale_dtype": ["bf16"], "block_size": [64], "scale_block_size": [256]},
    "all": {},
}
DECODER = PretrainRecipe(steps=1000, batch_size=4, lr=5e-3)  # that of pipeline `tiny`


@dataclass(frozen=True)
class Size:
    """How much of everything a setting takes.

    Attributes:
        steps: S, those of an adapter for one configuration alone.
        length: tokens of a block.
        search, validation: blocks or examples that guide a search, and that are measured.
        searches: configurations that the search of the one run for all measures.
    """

    steps: int
    batch_size: int
    lr: float
    length: int = 128
    search: int = 32
    validation: int | None = 64
    samples: int = 64
    searches: int = 64


SIZES = {
    "decoder": Size(80, 4, 3e-3, search=16),
    "sst2": Size(100, 32, 1e-3, length=64, search=256, validation=None),
    "cpu": Size(60, 4, 1e-3, search=4, searches=24),
    "gpu": Size(50, 8, 1e-3, length=512, search=4, validation=96, samples=32, searches=24),
}
DECODERS = ("pydoc", "tinyshakespeare")  # texts that a decoder is pre-trained on
# Setting -> (text of the base, text that it is adapted to).
TEXTS = {name: (name, name) for name in DECODERS} | {
    f"{a}-to-{b}": (a, b) for a in DECODERS for b in DECODERS if a != b
}


@dataclass(frozen=True)
class Setting:
    """A base model with its data and tables; `identity` changes with anything that decides a result."""

    identity: str
    model: str
    benchmark: Benchmark
    tables: CalibrationTables
    statistics: list[InputStatistics]
    size: Size

    def load(self) -> PreTrainedModel:
        """The base model anew, in full precision."""
        return _load(self.model, self.benchmark)


def prepare(
    name: str,
    files: Mapping[str, Path | None],
    model: str | None,
    size: Size,
    space: str = "bits",
    rounding: Rounding = "feedback",
) -> Setting:
    """The setting `name` with the choices `SPACES[space]`; a decoder is pre-trained where it has no base of its own.

    Args:
        files: `text` of tinyshakespeare or folder of SST-2; `train` and `test` of smollm2.

    Raises:
        CoaloraError: the setting reads a file or a model that was not named.
    """
    wanted: dict[str, tuple[str, ...]] = {"pydoc": (), "smollm2": ("train", "test")}
    named = {part: path for part in wanted.get(name, ("text",)) if (path := files.get(part))}
    if missing := [f"--{part}" for part in wanted.get(name, ("text",)) if part not in named]:
        raise CoaloraError(f"Setting {name} reads files", remedy=f"Name them with {' and '.join(missing)}")
    if name not in TEXTS and model is None:
        raise CoaloraError(f"Setting {name} adapts a model of yours", remedy="Name it with --model")
    content = {part: [file_sha256(p) for p in sorted(at.rglob("*.tsv")) or [at]] for part, at in named.items()}
    identity = digest([name, content, model, vars(DECODER), vars(replace(size, steps=0)), SPACES[space], rounding])
    folder = CACHE / f"{name}-{identity[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    where = _decoder(TEXTS[name][0], named.get("text")) if name in TEXTS else str(model)
    if name == "sst2":
        made = _sst2(named["text"], where, size)
    else:
        if name == "smollm2":
            parts = {**_split(text_file(named["train"]), "search"), "validation": text_file(named["test"])}
        else:
            parts = _texts(TEXTS[name][1], named.get("text"))
        limits = {"train": None, "search": size.search, "validation": size.validation}
        made = language_modeling(name, load_tokenizer(where), parts, max_length=size.length, limits=limits)
    if not (folder / "tables.safetensors").is_file():
        base, choices = _load(where, made), ChoiceSpace("nf", **SPACES[space])
        recipe = CalibrationRecipe(rounding=rounding, n_samples=min(size.samples, len(made.train)), batch_size=4)
        layers = find_target_layers(base)
        tables, statistics = calibrate(base, layers, made.train, choices, recipe, base_digest=identity)
        save_statistics(folder, layers, statistics, choices)
        tables.save(folder / "tables.safetensors")
    tables = CalibrationTables.load(folder / "tables.safetensors")
    return Setting(identity, where, made, tables, load_statistics(folder, tables.layers, tables.space), size)


def _split(texts: Sequence[str], *parts: str) -> dict[str, list[str]]:
    return split_documents(texts, dict.fromkeys(parts, 0.1), seed=0)


def _texts(name: str, file: Path | None) -> dict[str, list[str]]:
    texts = pydoc_topics() if name == "pydoc" else text_file(file) if file else []
    return _split(texts, "search", "validation")


def _decoder(name: str, file: Path | None) -> str:
    """Folder of the decoder that is pre-trained on a text; where it does not exist yet, it is made."""
    content = "" if name == "pydoc" or file is None else file_sha256(file)
    folder = CACHE / f"decoder-{name}-{digest([content, vars(DECODER)])[:12]}"
    if not (folder / "model.safetensors").is_file():
        print(f"{name}: pre-training the base model ({DECODER.steps} steps)", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        pretrain(_texts(name, file)["train"], DECODER, folder, seed=0, device=torch.device("cpu"))
    return str(folder)


def _load(model: str, benchmark: Benchmark) -> PreTrainedModel:
    torch.manual_seed(0)
    return load_model(
        model, benchmark.task, num_labels=benchmark.num_labels, device=default_device(), dtype=torch.float32
    )


def _sst2(folder: Path, model: str, size: Size) -> Benchmark:
    train, validation = (read_table(folder / f"{part}.tsv", ["sentence"], "label") for part in ("train", "dev"))
    return classification(
        "sst2", load_tokenizer(model), train, validation, search=None, n_search=size.search, max_length=size.length,
        num_labels=2, limits={"train": None, "search": size.search, "validation": size.validation}, seed=0,
    )  # fmt: skip
