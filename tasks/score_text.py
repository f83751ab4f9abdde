"""Stage `score-text`: a run's model, adapted to a budget, on any text: perplexity, and distance from the base."""

from coalora.data.text import read_text
from coalora.evaluate.perplexity import score_text
from pipeline.inputs.exports import ExportInputs
from pipeline.inputs.loaders import TEXT, BaseModel, load_benchmark
from pipeline.progress import Progress
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, current_store

TEXT_SCORE = "score.json"


@stage("score-text", tags=("gpu",))
def score_budget(
    *, export: ExportInputs, text: Artifact, budget: float, max_length: int, stride: int, batch_size: int
) -> Artifact:
    """`score.json`: bits, perplexity, bits per byte and tokens of a text, for the configuration of one budget; KL
    divergence and top-1 agreement with the base in full precision.

    The text is one document, tokenized without special tokens.
    """
    base = BaseModel(export.base)
    content = read_text(current_store().path(text) / TEXT)
    tokens = base.tokenizer()(content, add_special_tokens=False, verbose=False)["input_ids"]
    with export.device_model(budget) as (model, facts):
        whole = base.load(load_benchmark(export.benchmark), export.runtime, seed=export.seed).eval()
        found = score_text(
            model,
            tokens,
            len(content.encode()),
            max_length=max_length,
            stride=stride,
            batch_size=batch_size,
            reference=whole,
            progress=Progress(f"{text.meta.get('name')} at {budget:g} bits, windows"),
        )
    made = {name: facts[name] for name in ("average_bits", "digest")}
    scores = {"budget": budget, **made, **found.to_dict()}
    return current_store().put_json("text-score", {TEXT_SCORE: scores}, {"perplexity": found.perplexity})
