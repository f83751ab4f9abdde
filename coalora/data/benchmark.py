"""Benchmark: three splits of one data set, tokenized.

`train` is trained on and calibrated with, `search` guides the Pareto search, `validation` is only reported: nothing is
selected on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from coalora.errors import CoaloraError
from coalora.files import read_tensors, write_tensors
from coalora.recipes import Task

IGNORED = -100
SPLITS = ("train", "search", "validation")


def spread(n: int, limit: int | None) -> Tensor:
    """At most `limit` of n neighbours, at equal distances: the first ones of a text may be all of one topic."""
    return torch.arange(n) if limit is None or limit >= n else (torch.arange(limit) * 2 + 1) * n // (2 * limit)


@dataclass(frozen=True)
class Split:
    """Tokenized examples, padded to the longest of the split.

    Attributes:
        input_ids: (n, L) int64.
        lengths: (n,) tokens of each example; the rest of its row is padding.
        labels: (n,) classes, values (float) of a regression, or None for language modelling, where each block predicts
            its own tokens.
        bytes_per_token: UTF-8 bytes a token stands for (language modelling; 1 otherwise).
        pad_token_id: what fills the rows.
        token_type_ids: (n, L) which sentence of a pair a token belongs to, for models that embed it (BERT).

    Example:
        >>> import torch
        >>> from coalora import Split
        >>> split = Split(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 2]), labels=torch.tensor([1, 0]))
        >>> split.batch(torch.tensor([1]))["input_ids"]
        tensor([[8, 9]])
    """

    input_ids: Tensor
    lengths: Tensor
    labels: Tensor | None
    bytes_per_token: float = 1.0
    pad_token_id: int = 0
    token_type_ids: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def batch(self, indices: Tensor, device: torch.device | None = None) -> dict[str, Tensor]:
        """The examples `indices` as a model's keyword arguments, cut to the longest of them."""
        lengths = self.lengths[indices]
        width = int(lengths.max())
        input_ids = self.input_ids[indices, :width]
        mask = torch.arange(width) < lengths[:, None]
        out = {"input_ids": input_ids, "attention_mask": mask.long()}
        if self.token_type_ids is not None:
            out["token_type_ids"] = self.token_type_ids[indices, :width]
        out["labels"] = self.labels[indices] if self.labels is not None else input_ids.masked_fill(~mask, IGNORED)
        return {k: v.to(device) for k, v in out.items()} if device is not None else out

    def batches(self, batch_size: int, device: torch.device | None = None) -> Iterator[dict[str, Tensor]]:
        """All examples once, longest first: little padding, and the largest batch comes (and fails) first."""
        order = torch.argsort(self.lengths, descending=True, stable=True)
        for indices in order.split(batch_size):
            yield self.batch(indices, device)

    def head(self, n: int) -> Split:
        """The first n examples."""
        return self._take(torch.arange(min(n, len(self))))

    def apart(self, n: int) -> Split:
        """n examples at equal distances: those of a text that lie together may be all of one topic."""
        return self._take(spread(len(self), n))

    def _take(self, indices: Tensor) -> Split:
        cut = {name: value[indices] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **cut)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Benchmark:
    """Splits; `num_labels` is 1 for a regression and None for language modelling."""

    name: str
    task: Task
    num_labels: int | None
    train: Split
    search: Split
    validation: Split

    def save(self, folder: Path) -> None:
        """Write the tokenized splits: safetensors, with the rest in its header."""
        for name in SPLITS:
            split: Split = getattr(self, name)
            tensors = {"input_ids": split.input_ids.int(), "lengths": split.lengths.int()}
            if split.labels is not None:
                tensors["labels"] = split.labels if split.labels.is_floating_point() else split.labels.int()
            if split.token_type_ids is not None:
                tensors["token_type_ids"] = split.token_type_ids.to(torch.uint8)
            header = {
                "name": self.name,
                "task": self.task,
                "num_labels": self.num_labels,
                "bytes_per_token": split.bytes_per_token,
                "pad_token_id": split.pad_token_id,
            }
            write_tensors(folder / f"{name}.safetensors", tensors, header)

    @classmethod
    def load(cls, folder: Path) -> Benchmark:
        """Read what `save` wrote."""
        splits: dict[str, Split] = {}
        for name in SPLITS:
            tensors, header = read_tensors(folder / f"{name}.safetensors")
            labels = tensors.get("labels")
            if labels is not None and not labels.is_floating_point():
                labels = labels.long()
            splits[name] = Split(
                tensors["input_ids"].long(),
                tensors["lengths"].long(),
                labels,
                header["bytes_per_token"],
                header["pad_token_id"],
                tensors["token_type_ids"].long() if "token_type_ids" in tensors else None,
            )
        return cls(header["name"], header["task"], header["num_labels"], **splits)


def pad(
    sequences: list[list[int]],
    pad_token_id: int,
    labels: list[int] | list[float] | None = None,
    token_type_ids: list[list[int]] | None = None,
) -> Split:
    """A split of sequences of different lengths.

    Raises:
        CoaloraError: no sequences, or one without tokens.
    """
    if not sequences:
        raise CoaloraError("A split has no examples", remedy="Give at least one")
    lengths = torch.tensor([len(s) for s in sequences])
    if int(lengths.min()) == 0:
        raise CoaloraError(f"Example {int(lengths.argmin()) + 1} has no tokens", remedy="Remove empty texts")
    return Split(
        _rectangle(sequences, pad_token_id),
        lengths,
        None if labels is None else torch.tensor(labels),
        pad_token_id=pad_token_id,
        token_type_ids=None if token_type_ids is None else _rectangle(token_type_ids, 0),
    )


def _rectangle(sequences: list[list[int]], fill: int) -> Tensor:
    return pad_sequence([torch.tensor(s) for s in sequences], batch_first=True, padding_value=fill)
