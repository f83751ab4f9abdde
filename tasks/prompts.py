"""Stage `prompts`: texts that a language model goes on with, quantized without and with the adapter, and whole."""

import torch

from coalora.evaluate.generation import continue_prompts
from pipeline.inputs.adapted import ModelInputs
from pipeline.inputs.loaders import load_selected
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, current_store

CONTINUED = "continued.json"


@stage("prompts", tags=("gpu",))
def continue_at_budget(
    *, model: ModelInputs, selection: Artifact, state: Artifact, prompts: list[str], index: int, new_tokens: int
) -> Artifact:
    """`continued.json`: for every prompt its continuations at the budget number `index` of the selection."""
    configuration = load_selected(selection, model.measured)[index]
    tokenizer = model.source.tokenizer()

    def go_on(with_adapter: bool) -> list[str]:
        return continue_prompts(adapted, tokenizer, prompts, new_tokens=new_tokens, with_adapter=with_adapter)

    with model.adapted("coa", state) as adapted:
        with torch.no_grad():
            adapted.switch(configuration)
        without, adapted_texts = go_on(False), go_on(True)
        adapted.full_precision()
        whole = go_on(False)
    rows = zip(prompts, whole, without, adapted_texts, strict=True)
    content = [dict(zip(("prompt", "full_precision", "none", "coa"), row, strict=True)) for row in rows]
    return current_store().put_json("prompts", {CONTINUED: content}, {"n_prompts": len(prompts)})
