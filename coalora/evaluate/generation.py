"""Continuations of prompts by an adapted language model, for a reader to compare."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from transformers import PreTrainedTokenizerBase

from coalora.adapt.adapted import AdaptedModel


@torch.no_grad()
def continue_prompts(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    with_adapter: bool = True,
) -> list[str]:
    """Most likely continuation of each prompt by the model as it is now (greedy decoding).

    Args:
        new_tokens: at most so many tokens; an end-of-text token ends earlier.
        with_adapter: False leaves the LoRA pairs out.
    """
    model = adapted.peft_model
    model.eval()
    texts = []
    with nullcontext() if with_adapter else model.disable_adapter():
        for prompt in prompts:
            encoded = tokenizer(prompt, return_tensors="pt").to(adapted.device)
            made = model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts.append(str(tokenizer.decode(made[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)))
    return texts
