"""Stage `score-text`: perplexity of a finished run's model, adapted to a budget, on any text."""

from __future__ import annotations

from pathlib import Path

from coalora.data.text import read_text
from coalora.evaluate.perplexity import score_text
from coalora.files import write_json
from pipeline.inputs.exports import ExportInputs
from pipeline.inputs.loaders import TEXT, BaseModel
from pipeline.progress import Progress
from pipeline.stages.runner import stage
from pipeline.store.current import current_store
from pipeline.store.store import Artifact, Scalar

TEXT_SCORE = "score.json"


@stage("score-text", tags=("gpu",))
def score_budget(
    *, export: ExportInputs, text: Artifact, budget: float, max_length: int, stride: int, batch_size: int
) -> Artifact:
    """`score.json`: bits, perplexity, bits per byte and tokens of a text, for the configuration of one budget.

    The text is one document, tokenized without special tokens.
    """
    content = read_text(current_store().path(text) / TEXT)
    tokens = BaseModel(export.base).tokenizer()(content, add_special_tokens=False, verbose=False)["input_ids"]
    with export.device_model(budget) as (model, facts):
        found = score_text(
            model,
            tokens,
            len(content.encode()),
            max_length=max_length,
            stride=stride,
            batch_size=batch_size,
            progress=Progress(f"{text.meta.get('name')} at {budget:g} bits, windows"),
        )
    made = {"average_bits": facts["average_bits"], "digest": facts["digest"]}

    def write(folder: Path) -> dict[str, Scalar]:
        write_json(folder / TEXT_SCORE, {"budget": budget, **made, **found.to_dict()})
        return {"perplexity": found.perplexity}

    return current_store().put("text-score", write)
