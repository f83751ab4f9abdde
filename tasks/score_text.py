"""Stage `score-text`: perplexity of a finished run's model, adapted to a budget, on any text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel

from coalora.data.text import read_text
from coalora.evaluate.perplexity import score_text
from coalora.export.base import load_adapted
from coalora.export.bundle import Bundle
from coalora.files import write_json
from pipeline.inputs.loaders import BaseModel
from pipeline.progress import Progress
from pipeline.settings.sections import ExportSettings, RuntimeSettings
from pipeline.stages.runner import stage
from pipeline.store.current import current_store
from pipeline.store.store import Artifact, Scalar
from tasks.export import write_export

TEXT = "text.txt"
TEXT_SCORE = "score.json"


def put_text(path: Path) -> Artifact:
    """A text file in the store, so that what is computed from it goes by its content.

    Raises:
        CoaloraError: no such file, or not UTF-8.
    """
    text = read_text(path)

    def write(folder: Path) -> dict[str, Scalar]:
        (folder / TEXT).write_text(text, encoding="utf-8", newline="")
        return {"name": path.name}

    return current_store().put("text", write)


@stage("score-text", tags=("gpu",))
def score_budget(
    *,
    base: Artifact,
    benchmark: Artifact,
    tables: Artifact,
    bundle: Artifact,
    text: Artifact,
    budget: float,
    max_length: int,
    stride: int,
    batch_size: int,
    export: ExportSettings,
    runtime: RuntimeSettings,
    seed: int,
) -> Artifact:
    """`score.json`: bits, perplexity, bits per byte and tokens of a text, for the configuration of one budget.

    The text is one document, tokenized without special tokens.
    """
    content = read_text(current_store().path(text) / TEXT)
    tokens = BaseModel(base).tokenizer()(content, add_special_tokens=False, verbose=False)["input_ids"]
    with device_model(base, benchmark, tables, bundle, budget, export, runtime, seed) as (model, facts):
        found = score_text(
            model,
            tokens,
            len(content.encode()),
            max_length=max_length,
            stride=stride,
            batch_size=batch_size,
            progress=Progress(f"{text.meta.get('name')} at {budget:g} bits, windows"),
        )
    record = {
        "budget": budget,
        "average_bits": facts["average_bits"],
        "digest": facts["digest"],
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "bytes": found.nbytes,
    }

    def write(folder: Path) -> dict[str, Scalar]:
        write_json(folder / TEXT_SCORE, record)
        return {"perplexity": found.perplexity}

    return current_store().put("text-score", write)


@contextmanager
def device_model(
    base: Artifact,
    benchmark: Artifact,
    tables: Artifact,
    bundle: Artifact,
    budget: float,
    export: ExportSettings,
    runtime: RuntimeSettings,
    seed: int,
) -> Iterator[tuple[PeftModel, dict[str, Scalar]]]:
    """What a device runs for a budget, exported and loaded again, with its bits, bytes and digest."""
    configuration = Bundle.load(current_store().path(bundle)).select(budget)
    with TemporaryDirectory(prefix="coalora-") as name:
        folder = Path(name)
        facts = write_export(
            folder,
            configuration,
            base=base,
            benchmark=benchmark,
            tables=tables,
            bundle=bundle,
            export=export.model_copy(update={"base": True}),
            runtime=runtime,
            seed=seed,
        )
        device, dtype = torch.device(runtime.device), getattr(torch, runtime.dtype)
        yield load_adapted(folder / "base", folder / "adapter", device=device, dtype=dtype), facts
