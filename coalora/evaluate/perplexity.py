"""Perplexity of a causal model on any text, in sliding windows.

A window holds at most `max_length` tokens and the next one starts `stride` tokens later. Each predicts only what the
one before it has not: every token but the very first is predicted exactly once, with at least `max_length - stride`
tokens before it where the text has them. `stride = max_length - 1` is the fastest and predicts in blocks, as
benchmarks do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalora.data.benchmark import IGNORED
from coalora.errors import CoaloraError
from coalora.evaluate.metrics import AGREEMENT, KL, perplexity
from coalora.evaluate.reference import Predictions, divergence


@dataclass(frozen=True)
class TextScore:
    """Score of a model on a text.

    Attributes:
        nats: total negative log-likelihood of the predicted tokens.
        tokens: predicted tokens: all but the first.
        nbytes: UTF-8 bytes that they stand for: the first token counts as the mean one.
        kl: KL divergence from a reference (`coalora.evaluate.reference`), nats a predicted token.
        agreement: share of predicted tokens where both find the same one most likely; None without a reference, as kl.
    """

    nats: float
    tokens: int
    nbytes: float
    kl: float | None = None
    agreement: float | None = None

    @property
    def loss(self) -> float:
        """Nats a predicted token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.nbytes

    def to_dict(self) -> dict[str, float]:
        """The figures of a report."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.nbytes,
            **({} if self.kl is None or self.agreement is None else {KL: self.kl, AGREEMENT: self.agreement}),
        }


def windows(n_tokens: int, max_length: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first, end) of each window: it reads tokens begin to end and predicts first to end.

    Raises:
        CoaloraError: a stride that would leave tokens unpredicted, or nothing to predict.
    """
    if not 1 <= stride < max_length:
        raise CoaloraError(
            f"A stride of {stride} leaves tokens of windows of {max_length} out",
            remedy=f"Set the stride to 1 to {max_length - 1}, or a greater max_length",
        )
    if n_tokens < 2:
        raise CoaloraError(f"A text of {n_tokens} tokens has none to predict", remedy="Give more text")
    found, first, begin = [], 1, 0
    while first < n_tokens:
        end = min(begin + max_length, n_tokens)
        found.append((begin, first, end))
        first, begin = end, begin + stride
    return found


@torch.no_grad()
def score_text(
    model: nn.Module,
    tokens: Sequence[int],
    nbytes: int,
    *,
    max_length: int,
    stride: int,
    batch_size: int,
    reference: nn.Module | None = None,
    progress: Callable[..., None] | None = None,
) -> TextScore:
    """Score a text of `nbytes` bytes, given as tokens, with a model as it is now (in eval mode).

    Args:
        reference: a model of the same tokens on the same device, such as the base in full precision, whose KL
            divergence and agreement are wanted.

    Raises:
        CoaloraError: as `windows` does.
    """
    device = next(model.parameters()).device
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    spans = windows(len(ids), max_length, stride)
    total, kl, same = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
    for start in range(0, len(spans), batch_size):
        batch = spans[start : start + batch_size]
        inputs, targets = (t.to(device) for t in _batch(ids, batch))
        # Causal: what pads a short row on its right changes nothing before it.
        own, labels = Predictions.of(model(input_ids=inputs).logits), targets.flatten()
        total += F.nll_loss(own.log_probabilities, labels, reduction="sum")
        if reference is not None:
            wanted = Predictions.of(reference(input_ids=inputs).logits)
            nats, equal = divergence(own, wanted, labels != IGNORED)
            kl, same = kl + nats, same + equal
        if progress:
            progress(min(start + batch_size, len(spans)), len(spans))
    predicted = len(ids) - 1
    beside = {} if reference is None else {"kl": float(kl) / predicted, "agreement": float(same) / predicted}
    return TextScore(float(total), predicted, nbytes * predicted / len(ids), **beside)


def _batch(ids: Tensor, spans: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """Inputs (n, L) and targets (n, L - 1): -100 (ignored) where another window predicts, or nothing is."""
    width = max(end - begin for begin, _, end in spans)
    inputs = torch.zeros(len(spans), width, dtype=torch.int64)
    targets = torch.full((len(spans), width - 1), -100)
    for row, (begin, first, end) in enumerate(spans):
        inputs[row, : end - begin] = ids[begin:end]
        targets[row, first - begin - 1 : end - begin - 1] = ids[first:end]
    return inputs, targets
