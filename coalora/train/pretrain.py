"""A small decoder, pre-trained from scratch: the base of pipeline `tiny`, the notebook and tests.

Llama's architecture with a byte-level BPE tokenizer trained on the same text; no download of any kind. The result is an
ordinary model folder that `from_pretrained` reads, so that nothing behind it knows the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from coalora.data.text import blocks
from coalora.errors import CoaloraError
from coalora.models.files import save_model
from coalora.recipes import PretrainRecipe
from coalora.train.sampling import batch_indices

END_OF_TEXT = "<|endoftext|>"


def llama_config(recipe: PretrainRecipe) -> LlamaConfig:
    """The decoder's architecture, with tied embeddings.

    Raises:
        CoaloraError: a hidden size that does not divide into heads.
    """
    if recipe.hidden_size % (2 * recipe.num_attention_heads):
        raise CoaloraError(
            f"hidden_size {recipe.hidden_size} does not divide into {recipe.num_attention_heads} heads of even size",
            remedy="Set model.pretrain.hidden_size to a multiple of 2 x num_attention_heads",
        )
    return LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_attention_heads,
        max_position_embeddings=max(2 * recipe.max_length, 256),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `texts`; token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def pretrain(
    texts: Sequence[str],
    recipe: PretrainRecipe,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    progress: Callable[..., None] | None = None,
) -> list[dict[str, float]]:
    """Train tokenizer and decoder on `texts`, save both to `folder`, and return a record for each step."""
    config = llama_config(recipe)
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    ids, _ = blocks(
        texts,
        lambda batch: tokenizer(batch, add_special_tokens=False)["input_ids"],
        recipe.max_length,
        end_of_text=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, device)  # transformers' own `to` has a signature that type checkers misread
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(recipe.steps // 20, 1)
    records = []
    for step in range(recipe.steps):
        scale = min((step + 1) / warmup, (recipe.steps - step) / max(recipe.steps - warmup, 1))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * scale
        batch = ids[batch_indices(len(ids), recipe.batch_size, seed=seed, step=step)].to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        records.append({"step": step, "loss": float(loss.detach()), "lr": recipe.lr * scale})
        if progress:
            progress(step + 1, recipe.steps, loss=records[-1]["loss"])
    if not math.isfinite(records[-1]["loss"]):
        raise CoaloraError(f"Pre-training ended with a loss of {records[-1]['loss']}", remedy="Lower model.pretrain.lr")
    save_model(model, tokenizer, folder)
    return records
