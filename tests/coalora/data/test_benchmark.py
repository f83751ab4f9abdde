"""Benchmarks: batches, padding, and a byte-stable round trip."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coalora.data.benchmark import IGNORED, SPLITS, Benchmark, Split, pad
from coalora.errors import CoaloraError
from coalora.files import file_sha256

_SAVE = """
import sys, torch
from pathlib import Path
from coalora.data.benchmark import Benchmark, pad
split = pad([[1, 2, 3], [4]], 9, [0, 1], [[0, 1, 1], [0]])
Benchmark("b", "classification", 2, split, split.head(1), split).save(Path(sys.argv[1]))
"""


@pytest.fixture
def split() -> Split:
    return pad([[5, 6], [7, 8, 9, 5], [6], [7, 7, 7]], 3, [1, 0, 1, 0], [[0, 1], [0, 0, 1, 1], [0], [0, 1, 1]])


def test_padding_fills_rows_to_the_longest(split: Split) -> None:
    assert split.input_ids.tolist() == [[5, 6, 3, 3], [7, 8, 9, 5], [6, 3, 3, 3], [7, 7, 7, 3]]
    assert split.lengths.tolist() == [2, 4, 1, 3]
    assert split.token_type_ids is not None
    assert split.token_type_ids.tolist() == [[0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]


def test_a_batch_is_cut_to_its_own_longest_example(split: Split) -> None:
    batch = split.batch(torch.tensor([2, 0]))
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[6, 3], [5, 6]],
        "attention_mask": [[1, 0], [1, 1]],
        "token_type_ids": [[0, 0], [0, 1]],
        "labels": [1, 1],
    }


def test_language_modelling_predicts_tokens_but_never_padding_even_if_a_token_equals_it() -> None:
    split = pad([[3, 6], [7, 3, 9]], 3)
    batch = split.batch(torch.tensor([0, 1]))
    assert batch["labels"].tolist() == [[3, 6, IGNORED], [7, 3, 9]]
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}


def test_batches_give_every_example_once_longest_first(split: Split) -> None:
    batches = list(split.batches(3))
    assert [len(batch["labels"]) for batch in batches] == [3, 1]
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    assert lengths.tolist() == [4, 3, 2, 1]
    labels = torch.cat([batch["labels"] for batch in batches])
    assert labels.tolist() == [0, 0, 1, 1]


def test_the_head_is_the_first_examples(split: Split) -> None:
    head = split.head(2)
    assert len(head) == 2
    assert head.batch(torch.tensor([1]))["token_type_ids"].tolist() == [[0, 0, 1, 1]]
    assert split.head(99).lengths.tolist() == split.lengths.tolist()


def test_splits_without_examples_or_tokens_are_refused() -> None:
    with pytest.raises(CoaloraError, match="no examples"):
        pad([], 0)
    with pytest.raises(CoaloraError, match="Example 2 has no tokens"):
        pad([[1], [], [2]], 0)


def _same(a: Split, b: Split) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(Split)]
    return all((torch.equal(x, y) and x.dtype == y.dtype) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("task", ["classification", "language-modeling"])
def test_saving_and_loading_gives_everything_back(tmp_path: Path, split: Split, task) -> None:
    if task == "language-modeling":
        split = dataclasses.replace(split, labels=None, token_type_ids=None, bytes_per_token=3.217)
    benchmark = Benchmark("né", task, 2 if task == "classification" else None, split, split.head(1), split.head(3))
    benchmark.save(tmp_path)
    back = Benchmark.load(tmp_path)
    assert (back.name, back.task, back.num_labels) == (benchmark.name, benchmark.task, benchmark.num_labels)
    assert all(_same(getattr(back, name), getattr(benchmark, name)) for name in SPLITS)


def test_saved_bytes_are_the_same_in_two_processes(tmp_path: Path) -> None:
    split = pad([[1, 2, 3], [4]], 9, [0, 1], [[0, 1, 1], [0]])
    digests = []
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        if name == "a":
            Benchmark("b", "classification", 2, split, split.head(1), split).save(folder)
        else:
            subprocess.run([sys.executable, "-c", _SAVE, str(folder)], check=True)
        digests.append([file_sha256(folder / f"{part}.safetensors") for part in SPLITS])
    assert digests[0] == digests[1]


def test_values_of_a_regression_come_back_to_the_last_bit(tmp_path: Path) -> None:
    split = pad([[1, 2], [3]], 0, [0.1, -2.75])
    Benchmark("stsb", "classification", 1, split, split, split).save(tmp_path)
    assert _same(Benchmark.load(tmp_path).train, split)
    assert split.batch(torch.tensor([1]))["labels"].dtype == torch.float32
