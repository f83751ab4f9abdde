"""Stage `benchmark`: the data, split and tokenized."""

from __future__ import annotations

from pathlib import Path

from coalora.data import build
from coalora.errors import CoaloraError
from pipeline.inputs.corpus import documents, examples
from pipeline.inputs.loaders import BaseModel
from pipeline.settings.sections import BenchmarkSettings
from pipeline.stages.runner import stage
from pipeline.store.current import current_store
from pipeline.store.store import Artifact, Scalar


@stage("benchmark")
def prepare_benchmark(*, base: Artifact, benchmark: BenchmarkSettings, content: str | None) -> Artifact:
    """The benchmark, split and tokenized. `content` is the digest of its local files."""
    tokenizer = BaseModel(base).tokenizer()
    limits = {
        "train": benchmark.n_train,
        "search": benchmark.n_search,
        "validation": benchmark.n_validation,
    }

    def write(folder: Path) -> dict[str, Scalar]:
        if benchmark.task == "language-modeling":
            made = build.language_modeling(
                benchmark.name,
                tokenizer,
                documents(benchmark),
                max_length=benchmark.max_length,
                limits=limits,
            )
        else:
            parts = examples(benchmark)
            if parts["train"] is None or parts["validation"] is None:
                raise CoaloraError(
                    f"Benchmark {benchmark.name!r} has no training or no validation examples",
                    remedy="Give it both: benchmark.files, or splits of benchmark.hub",
                )
            made = build.classification(
                benchmark.name,
                tokenizer,
                parts["train"],
                parts["validation"],
                search=parts["search"],
                n_search=benchmark.n_search,
                max_length=benchmark.max_length,
                num_labels=benchmark.num_labels,
                limits=limits,
                seed=benchmark.split_seed,
            )
        made.save(folder)
        return {
            "n_train": len(made.train),
            "n_search": len(made.search),
            "n_validation": len(made.validation),
        }

    return current_store().put("benchmark", write)
