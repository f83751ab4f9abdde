"""Benchmarks from texts: split, tokenize, cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from coalora.data.benchmark import Benchmark, Split, pad
from coalora.data.classification import Examples
from coalora.data.text import blocks
from coalora.errors import CoaloraError


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

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    splits = {}
    for part in ("train", "search", "validation"):
        ids, bytes_per_token = blocks(
            documents[part],
            encode,
            max_length,
            end_of_text=tokenizer.eos_token_id,
            limit=limits.get(part),
        )
        splits[part] = Split(
            ids, torch.full((len(ids),), max_length + 1), None, bytes_per_token, tokenizer.pad_token_id or 0
        )
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
        if examples is not None and num_labels > 1 and max(examples.labels) >= num_labels:
            raise CoaloraError(
                "labels lie below num_labels",
                got=f"label {max(examples.labels)} in {part}",
                expected=f"0 to {num_labels - 1}",
                remedy="set benchmark.num_labels",
            )
    order = torch.randperm(len(train.texts), generator=torch.Generator().manual_seed(seed)).tolist()
    if search is None:
        if not 0 < n_search < len(order):
            raise CoaloraError(
                "the search split is set aside from the training examples and must leave some",
                got=f"n_search {n_search} of {len(order)}",
                expected=f"1 to {len(order) - 1}",
                remedy="correct benchmark.n_search",
            )
        search, order = _take(train, order[:n_search]), order[n_search:]
    parts = {"train": _take(train, order), "search": search, "validation": validation}
    splits = {}
    for part, examples in parts.items():
        examples = _take(examples, range(len(examples.texts))[: limits.get(part)])
        if not examples.texts:
            raise CoaloraError("a split needs at least one example", got=f"limit {limits.get(part)} for {part}")
        columns = list(zip(*examples.texts, strict=True))
        encoded = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
        # Only tokenizers of models that embed them return token types.
        types = encoded.get("token_type_ids")
        splits[part] = pad(encoded["input_ids"], tokenizer.pad_token_id or 0, examples.labels, types)
    return Benchmark(name, "classification", num_labels, **splits)


def _take(examples: Examples, indices: Iterable[int]) -> Examples:
    indices = list(indices)
    labels: list[Any] = [examples.labels[i] for i in indices]
    return Examples([examples.texts[i] for i in indices], labels)
