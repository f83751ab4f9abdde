"""Stage `benchmark`: the data, split and tokenized."""

from pathlib import Path

from coalora.data import build
from pipeline.inputs.corpus import documents, examples, forget
from pipeline.inputs.loaders import BaseModel
from pipeline.settings.sections import BenchmarkSettings
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, current_store


@stage("benchmark")
def prepare_benchmark(*, base: Artifact, benchmark: BenchmarkSettings, content: str | None) -> Artifact:
    """The benchmark, split and tokenized. `content` is the digest of its local files."""
    tokenizer = BaseModel(base).tokenizer()
    limits = {"train": benchmark.n_train, "search": benchmark.n_search, "validation": benchmark.n_validation}

    def write(folder: Path) -> dict[str, Scalar]:
        if benchmark.task == "language-modeling":
            texts, length = documents(benchmark), benchmark.max_length
            made = build.language_modeling(benchmark.name, tokenizer, texts, max_length=length, limits=limits)
        else:
            train, validation, search = examples(benchmark)
            made = build.classification(
                benchmark.name,
                tokenizer,
                train,
                validation,
                search=search,
                n_search=benchmark.n_search,
                max_length=benchmark.max_length,
                num_labels=benchmark.num_labels,
                limits=limits,
                seed=benchmark.split_seed,
            )
        forget()
        made.save(folder)
        return {f"n_{split}": len(getattr(made, split)) for split in limits}

    return current_store().put("benchmark", write)
