"""Dequantized weights that wait for their next use, so that a switch back to them moves a pointer and no numbers.

On a CPU, writing a weight anew takes longer than any other part of a switch, and the layers of a training set's members
repeat a handful of choices each. What the byte limit of the cache leaves beside the packed tensors is spent on whole
weights here. Not used on a GPU, where one launch writes all layers at the memory's speed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from coalora.cache import ByteCache
from coalora.models.targets import TargetLayer

Key = tuple[int, int]


class WeightSlots:
    """Tensors that the target layers compute with, and those that are parked.

    Args:
        modules: the target layers' modules; their `weight` is pointed at other storage of the same shape and layout.
        layers: the target layers, in the same order.
        choices: what the weights stand for now, an index for each layer.

    Attributes:
        weights: the weights (out, in) that the layers compute with now, as views.
        parked: those that wait, by (layer, choice).
    """

    def __init__(self, modules: Sequence[nn.Module], layers: Sequence[TargetLayer], choices: Sequence[int]) -> None:
        self._parameters = [module.get_parameter("weight") for module in modules]
        self._layers = list(layers)
        self._holds: list[int | None] = list(choices)
        # Its callers set the limit, and what is dropped first is decided here.
        self.parked: ByteCache[Key, Tensor] = ByteCache(sys.maxsize, lambda weight: weight.nbytes)
        self.weights = [layer.matrix(parameter.data) for layer, parameter in zip(layers, self._parameters, strict=True)]

    def take(self, index: int, choice: int, limit: int) -> bool:
        """Point layer `index` at the weight of `choice`, if it waits; otherwise at storage to write it to.

        What the layer computed with is parked, as far as `limit` bytes for all that is parked allow.

        Returns:
            Whether the weight is there already. If not, write it to `weights[index]` and call `holds`.
        """
        found = self.parked.pop((index, choice))
        before, label = self._parameters[index].data, self._holds[index]
        self._holds[index] = None
        spare: Tensor | None = None
        if label is None or before.nbytes > limit:
            spare = before
        else:
            self.parked.put((index, label), before)
            spare = self.shrink(limit, index)
        if found is not None:
            self._point(index, found)
            self._holds[index] = choice
        elif spare is not before:
            self._point(index, spare if spare is not None else self._fresh(before))
        return found is not None

    def holds(self, index: int, choice: int) -> None:
        """Say that the weight of `choice` has been written to `weights[index]`."""
        self._holds[index] = choice

    @contextmanager
    def pointed_at(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Within, the layers compute with other tensors, as they are stored."""
        own = [parameter.data for parameter in self._parameters]
        try:
            for parameter, weight in zip(self._parameters, weights, strict=True):
                parameter.data = weight
            yield
        finally:
            for parameter, weight in zip(self._parameters, own, strict=True):
                parameter.data = weight

    def shrink(self, limit: int, index: int = -1) -> Tensor | None:
        """Drop what is parked above `limit` bytes, and what is layer `index`'s first: a layer keeps its share.

        Returns:
            The tensor of layer `index` that was dropped last, whose memory can serve again.
        """
        spare = None
        while self.parked.nbytes > limit:
            key = next((key for key in self.parked if key[0] == index), next(iter(self.parked)))
            dropped = self.parked.pop(key)
            if key[0] == index:
                spare = dropped
        return spare

    def _fresh(self, like: Tensor) -> Tensor:
        with torch.inference_mode(False):  # or training could not use what an evaluation has made
            return torch.empty_like(like)

    def _point(self, index: int, stored: Tensor) -> None:
        self._parameters[index].data = stored
        self.weights[index] = self._layers[index].matrix(stored)
