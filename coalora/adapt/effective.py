"""The effective pairs A_eff = (I + U)(A + A_b) and B_eff = B + B_b of all layers, made in a few batched products.

Layers of one shape share a product, so that a step costs a handful of operations for the adapter's construction and not
a handful for each layer; gradients flow through it into lora_A, lora_B, theta and experts. Sums and products are those
of the parameters' type (float32); what layers multiply with is rounded once, to the type of their base weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


class Terms:
    """Terms that the current configuration adds to the N trained pairs; shared by all layers of a model.

    Args:
        lora_A, lora_B: the N layers of PEFT that own the trained pairs, r x in and out x r.
        dtypes: (N,) of the base weights.
        scale: LoRA's s, by which the compensation's B_c is divided: PEFT multiplies every product by it.

    Attributes:
        U: (N, r, r), or None for no adjustment.
        experts: (N,) pairs (A_b, B_b), None where a layer has none.
        compensation: (N,) pairs (A_c, B_c), None where a layer has none.
    """

    def __init__(
        self, lora_A: Sequence[nn.Linear], lora_B: Sequence[nn.Linear], dtypes: Sequence[torch.dtype], scale: float
    ) -> None:
        self._layers = (list(lora_A), list(lora_B))
        self._dtypes = list(dtypes)
        self.scale = scale
        shapes = [[x.weight.shape for x in side] for side in self._layers]
        self._groups = [_groups(zip(side, dtypes, strict=True)) for side in shapes]
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._pairs: list[Pair] | None = None
        self._given = False
        self.set()

    def set(
        self,
        U: Tensor | None = None,
        experts: Sequence[Pair | None] | None = None,
        compensation: Sequence[Pair | None] | None = None,
    ) -> None:
        """Take over the terms of a configuration; those not given are none."""
        nothing: list[Pair | None] = [None] * len(self._dtypes)
        self.U, self.experts, self.compensation = U, experts or nothing, compensation or nothing
        self._pairs = None

    def of_configuration(self) -> tuple[Tensor | None, Sequence[Pair | None], Sequence[Pair | None]]:
        """What `set` was given last."""
        return self.U, self.experts, self.compensation

    def make(self) -> None:
        """Make all pairs of the parameters as they are now; layers use them until the next `make` or `set`."""
        if not self._given:
            self._use(self.stacks())

    def stacks(self) -> list[Tensor]:
        """The factors of every group of layers of one shape: (layers, r, in) and (layers, out, r)."""
        return [self._stack(side, group) for side, groups in enumerate(self._groups) for group in groups]

    def plain_stacks(self) -> list[Tensor]:
        """`stacks` of the trained pairs alone, without gradient."""
        kept = self.of_configuration()
        self.set()
        with torch.no_grad():
            found = self.stacks()
        self.set(*kept)
        return found

    @contextmanager
    def using(self, stacks: Sequence[Tensor]) -> Iterator[None]:
        """Within, layers multiply with the given factors, in the order of `stacks`."""
        self._given = True
        self._use(stacks)
        try:
            yield
        finally:
            self._given, self._pairs = False, None

    def _use(self, stacks: Sequence[Tensor]) -> None:
        sides: tuple[list[Any], list[Any]] = ([None] * len(self._dtypes), [None] * len(self._dtypes))
        groups = [(side, group) for side, groups in enumerate(self._groups) for group in groups]
        for (side, group), stack in zip(groups, stacks, strict=True):
            for index, factor in zip(group, stack.unbind(), strict=True):
                sides[side][index] = factor
        self._pairs = list(zip(*sides, strict=True))

    def pair(self, index: int) -> Pair:
        """(A_eff, B_eff) of a layer, in its base weight's type: what `make` made, or made for this layer alone."""
        if self._pairs is not None:
            return self._pairs[index]
        dtype = self._dtypes[index]
        return self.factor(0, index).to(dtype), self.factor(1, index).to(dtype)

    def factor(self, side: int, index: int) -> Tensor:
        """Side 0: (I + U)(A + A_b) with the rows A_c below; side 1: B + B_b with the columns B_c / s beside it. In the
        parameters' type."""
        expert, compensation = self.experts[index], self.compensation[index]
        made: Tensor = self._layers[side][index].weight
        made = made if expert is None else made + expert[side]
        if side == 0:
            made = fold(made, None if self.U is None else self.U[index])
        if compensation is None:
            return made
        beside = compensation[side].to(made.dtype)
        return torch.cat([made, beside / self.scale if side else beside], dim=side)

    def _stack(self, side: int, group: tuple[int, ...]) -> Tensor:
        stacked = torch.stack([self._layers[side][i].weight for i in group])
        experts = [self.experts[i] for i in group]
        if any(expert is not None for expert in experts):
            nothing = torch.zeros_like(stacked[0])
            stacked = stacked + _Stacked.apply(*(nothing if e is None else e[side] for e in experts))
        if side == 0 and self.U is not None:
            stacked = torch.baddbmm(stacked, self._of_group(self.U, group, stacked), stacked)
        beside = [pair[side] for pair in (self.compensation[i] for i in group) if pair is not None]
        if beside:  # all layers of a model have a compensation, or none has
            further = torch.stack(beside).to(stacked.dtype)
            stacked = torch.cat([stacked, further / self.scale if side else further], dim=1 + side)
        return stacked.to(self._dtypes[group[0]])

    def _of_group(self, U: Tensor, group: tuple[int, ...], like: Tensor) -> Tensor:
        """The leading r x r parts of the group's U, r being the group's rank."""
        if len(group) < len(U):
            if group not in self._indices:
                with torch.inference_mode(False):  # or training could not use what an evaluation has made
                    self._indices[group] = torch.tensor(group, device=U.device)
            U = U.index_select(0, self._indices[group])
        r = like.shape[1]
        return U[:, :r, :r].to(like.dtype)


class _Stacked(torch.autograd.Function):
    """torch.stack whose gradients share no memory with those of what its result is added to.

    Those of `torch.stack` are views of one tensor, which the sum hands to both: clipping in place would scale it twice.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.clone().unbind()


def fold(lora_A: Tensor, U: Tensor | None) -> Tensor:
    """(I + U) A, r x in; A itself where U is None. U may be larger than r: its leading part counts."""
    if U is None:
        return lora_A
    r = lora_A.shape[0]
    return torch.addmm(lora_A, U[:r, :r].to(lora_A.dtype), lora_A)


def _groups(keys: Iterable[object]) -> list[tuple[int, ...]]:
    """Indices of equal keys, in the order of their first."""
    found: dict[object, list[int]] = {}
    for index, key in enumerate(keys):
        found.setdefault(key, []).append(index)
    return [tuple(indices) for indices in found.values()]
