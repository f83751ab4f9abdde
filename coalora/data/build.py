"""Benchmarks from texts: split, tokenize, cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from coalora.data.benchmark import SPLITS, Benchmark, Split, pad
from coalora.data.classification import Examples, check_classes
from coalora.data.text import blocks
from coalora.errors import CoaloraError


def text_split(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int, limit: int | None = None
) -> Split:
    """Blocks of joined texts, each of which ends in the end of text.

    Args:
        max_length: predicted tokens a block (its rows hold one more).
        limit: at most so many blocks.

    Raises:
        CoaloraError: not enough text for one block.
    """

    def encode(batch: list[str]) -> list[list[int]]:
        return tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]

    ids, bytes_per_token = blocks(texts, encode, max_length, end_of_text=tokenizer.eos_token_id, limit=limit)
    return Split(ids, torch.full((len(ids),), max_length + 1), None, bytes_per_token, tokenizer.pad_token_id or 0)


def example_split(examples: Examples, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Split:
    """Texts (of a pair, the longer first) cut to `max_length` tokens, with their labels.

    Raises:
        CoaloraError: a tokenizer with nothing to pad with.
    """
    check_pads(tokenizer)
    columns = list(zip(*examples.texts, strict=True))
    encoded = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
    # Only tokenizers of models that embed them return token types.
    types = encoded.get("token_type_ids")
    return pad(encoded["input_ids"], tokenizer.pad_token_id, examples.labels, types)


def check_pads(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot fill rows of different lengths."""
    if tokenizer.pad_token_id is None:
        raise CoaloraError(
            "The tokenizer has neither a padding nor an end-of-text token inside of the model's embedding",
            remedy="Set tokenizer.pad_token to a token that it has, and save it to the model's folder",
        )


def language_modeling(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    documents: Mapping[str, Iterable[str]],
    *,
    max_length: int,
    limits: Mapping[str, int | None],
) -> Benchmark:
    """A language-modelling benchmark.

    Args:
        documents: texts of `train`, `search` and `validation`.
        max_length: predicted tokens a block (its rows hold one more).
        limits: at most so many blocks of each split.
    """
    splits = {
        part: text_split(documents[part], tokenizer, max_length=max_length, limit=limits.get(part)) for part in SPLITS
    }
    return Benchmark(name, "language-modeling", None, **splits)


def classification(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    train: Examples,
    validation: Examples,
    *,
    search: Examples | None,
    n_search: int,
    max_length: int,
    num_labels: int,
    limits: Mapping[str, int | None],
    seed: int = 0,
) -> Benchmark:
    """A classification benchmark; without a `search` split, `n_search` training examples are set aside for it.

    One label makes it a regression on values, as in transformers (GLUE's STS-B).

    Texts are cut to `max_length` tokens (of a pair, the longer first); `limits` keep at most so many examples.

    Raises:
        CoaloraError: a label that is not below `num_labels`, or a split that would be empty.
    """
    for part, examples in {"train": train, "validation": validation, "search": search}.items():
        if examples is not None:
            check_classes(examples, num_labels, part)
    order = torch.randperm(len(train.texts), generator=torch.Generator().manual_seed(seed)).tolist()
    if search is None:
        if not 0 < n_search < len(order):
            raise CoaloraError(
                f"{n_search} examples for the search cannot be set aside from {len(order)} training examples",
                remedy=f"Set benchmark.n_search to 1 to {len(order) - 1}",
            )
        search, order = _take(train, order[:n_search]), order[n_search:]
    parts = {"train": _take(train, order), "search": search, "validation": validation}
    splits = {}
    for part, examples in parts.items():
        examples = _take(examples, range(len(examples.texts))[: limits.get(part)])
        if not examples.texts:
            raise CoaloraError(
                f"A limit of {limits.get(part)} leaves {part} without examples", remedy="Raise it to at least 1"
            )
        splits[part] = example_split(examples, tokenizer, max_length=max_length)
    return Benchmark(name, "classification", num_labels, **splits)


def _take(examples: Examples, indices: Iterable[int]) -> Examples:
    indices = list(indices)
    labels: list[Any] = [examples.labels[i] for i in indices]
    return Examples([examples.texts[i] for i in indices], labels)
