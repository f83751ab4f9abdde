"""Full-precision model that quantized ones are held against: KL divergence and top-1 agreement.

KL(p || q), nats a predicted token, p the reference's distribution and q the measured model's; top-1 agreement is the
share of tokens where both find the same token most likely ("flips" are what is missing to 1; Dutta et al., NeurIPS
2024, arXiv 2407.09141: accuracy can stay as it was while answers flip). Neither asks for the text to be good, and both
are far less noisy than a loss, since the text's own surprise is in neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coalora.adapt.adapted import AdaptedModel

_TOGETHER = 2**19  # numbers at a time on a CPU, which stay in its cache
_HELD = 2**30  # bytes of the reference's predictions, at least, that are kept for all configurations


@dataclass(frozen=True, eq=False)
class Predictions:
    """Log-probabilities of the next token, float32 (n, V)."""

    log_probabilities: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Predictions:
        """Those of a model's logits (n, L, V), the last of each row left out: (n (L - 1), V)."""
        n, length, size = logits.shape
        made = torch.empty((n, length - 1, size), dtype=torch.float32, device=logits.device)
        for own, row in zip(made, logits.detach(), strict=True):  # the whole of them would be copied first
            torch.log_softmax(row[:-1].float(), -1, out=own)
        return cls(made.flatten(0, 1))

    @cached_property
    def top(self) -> Tensor:
        """Most likely token of each row (n,)."""
        return self.log_probabilities.argmax(-1)


def divergence(own: Predictions, reference: Predictions, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Summed KL(reference || own), and the number of equal most likely tokens, both float64 scalars.

    In pieces: beside the predictions little memory is needed, however large the vocabulary.

    Args:
        counted: bool (n,), the rows that count.

    Example:
        >>> from coalora.evaluate.reference import Predictions, divergence
        >>> found = Predictions.of(torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]]]))
        >>> [float(x) for x in divergence(found, found, torch.tensor([True, True]))]
        [0.0, 2.0]
    """
    q, p = own.log_probabilities, reference.log_probabilities
    nats = torch.zeros((), dtype=torch.float64, device=q.device)
    rows = max(1, (_TOGETHER if q.device.type == "cpu" else _TOGETHER << 5) // q.shape[-1])
    scratch = torch.empty((2, min(rows, len(q)), q.shape[-1]), device=q.device)  # fresh pages would cost most of it
    for q_rows, p_rows, counts in zip(q.split(rows), p.split(rows), counted.split(rows), strict=True):
        shares, gaps = scratch[:, : len(q_rows)]
        torch.exp(p_rows, out=shares)
        torch.sub(p_rows, q_rows, out=gaps)
        # A product instead of an index: indexing by a mask would wait for the device.
        nats += (torch.bmm(shares[:, None], gaps[..., None]).flatten().double() * counts).sum()
    return nats, ((own.top == reference.top) & counted).sum().double()


@dataclass(frozen=True, eq=False)
class Reference:
    """The base in full precision, alone or with a plain LoRA adapter of its own.

    Attributes:
        pairs: (A (r, in), B (out, r)) of every target layer; None: the base alone.
        scale: s of y = W x + s B A x.
    """

    pairs: Sequence[tuple[Tensor, Tensor]] | None = None
    scale: float = 1.0

    @contextmanager
    def held_by(self, adapted: AdaptedModel) -> Iterator[Any]:
        """Within, `adapted` computes as the reference does; afterwards switch it."""
        with ExitStack() as stack:
            model = stack.enter_context(adapted.in_full_precision(adapter=False))
            for layer, (A, B) in zip(adapted.layers, self.pairs or (), strict=False):

                def add(_: object, inputs: tuple[Tensor, ...], out: Tensor, A: Tensor = A, B: Tensor = B) -> Tensor:
                    x = inputs[0]
                    return out + self.scale * F.linear(F.linear(x, A.to(x)), B.to(x))

                hook = model.get_base_model().get_submodule(layer.name).register_forward_hook(add)
                stack.callback(hook.remove)
            yield model

    def with_predictions(
        self, adapted: AdaptedModel, batches: Iterator[dict[str, Tensor]]
    ) -> list[tuple[dict[str, Tensor], Predictions | None]]:
        """The next batches with the reference's predictions, at least one: as many as take `_HELD` bytes, or an eighth
        of a GPU's free memory. Configurations are switched to once for them all."""
        found: list[tuple[dict[str, Tensor], Predictions | None]] = []
        nbytes, most = 0, _HELD
        if adapted.device.type == "cuda":
            most = max(most, torch.cuda.mem_get_info(adapted.device)[0] // 8)
        with self.held_by(adapted) as model:
            for batch in batches:
                own = Predictions.of(model(**{k: v for k, v in batch.items() if k != "labels"}).logits)
                found.append((batch, own))
                nbytes += own.log_probabilities.nbytes
                if nbytes >= most:
                    break
        return found
