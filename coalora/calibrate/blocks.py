"""A model computed part by part: some transformer blocks at a time, hidden states handed on from part to part.

Statistics of all layers at once take 4 in^2 bytes a layer (28 GB for Llama-2-7B); those of a part are measured, used
and put away before the next part runs. Of no block is anything known but that it takes its hidden states first and
returns them: every part is a run of the model's own forward pass in which blocks before the part hand on what they are
given, the part starts from what the part before it has put out, and the pass ends behind the part. So each block gets
the masks, positions and rotary factors that the model itself makes for it. What is computed is what one pass over the
whole model computes, bit for bit.

Blocks are the children, all of one class, of the module list that holds most target layers. One part is a model without
any, one whose blocks hand on more than their hidden states (T5's hand on the positions' bias), and one whose statistics
are small enough.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coalora.errors import CoaloraError
from coalora.models.targets import TargetLayer

Batches = Callable[[], Iterator[dict[str, Tensor]]]


@dataclass(frozen=True)
class Part:
    """Blocks `first` to `last - 1`, or for (0, None) the whole model; `layers`: indices of the target layers that run
    with them. Those outside of blocks belong to the first part, or where only blocks lead to them, to one of no blocks
    behind the last."""

    first: int
    last: int | None
    layers: tuple[int, ...]


def transformer_blocks(model: nn.Module, layers: Sequence[TargetLayer]) -> tuple[str, list[nn.Module]]:
    """Name of the module list of a model's transformer blocks, and the blocks; no blocks where it has none.

    Example:
        >>> from transformers import OPTConfig
        >>> from coalora.calibrate.blocks import transformer_blocks
        >>> from coalora.models.loading import meta_model
        >>> from coalora.models.targets import find_target_layers
        >>> config = OPTConfig(hidden_size=64, word_embed_proj_dim=64, num_attention_heads=4, num_hidden_layers=3)
        >>> model = meta_model(config, "language-modeling")
        >>> name, blocks = transformer_blocks(model, find_target_layers(model))
        >>> name, len(blocks)
        ('model.decoder.layers', 3)
    """
    found: tuple[str, list[nn.Module]] = "", []
    most = 0
    for name, module in model.named_modules():
        inside = sum(_in(layer, name) for layer in layers)
        # Parents come first: of nested lists (experts inside of blocks) the outer one wins.
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1 and inside > most:
            found, most = (name, list(module)), inside
    return found if len(found[1]) > 1 else ("", [])


class BlockWise:
    """The parts of a model, one after the other.

    Args:
        model: in eval mode.
        layers: its target layers.
        batches: makes the same batches anew for every part, as keyword arguments of the model.
        device: where parts are computed; what is not there comes for the time that it is needed.
        most: bytes of a part's Hessians, beyond which it gets no further block; None: none are collected.
        single: make every block a part of its own, however small its Hessians.

    Attributes:
        parts: in the order of work.
        hidden: what the last part has put out, on the CPU, a tensor for each batch; may be replaced by equal ones.

    Raises:
        CoaloraError: `single`, and a model that cannot be cut between its blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[TargetLayer],
        batches: Batches,
        device: torch.device,
        *,
        most: int | None,
        single: bool = False,
    ) -> None:
        self._model, self._batches, self._device = model, batches, device
        name, self._blocks = transformer_blocks(model, layers)
        self.hidden: list[Tensor] = []
        at = [int(layer.name[len(name) + 1 :].split(".")[0]) if _in(layer, name) else -1 for layer in layers]
        self.parts = [Part(0, None, tuple(range(len(layers))))]
        limit = sys.maxsize if most is None else most
        if not self._blocks or not (single or _hessian_nbytes(layers) > limit):
            return
        self._others = 0  # what a block returns behind its hidden states, all None
        try:
            early = self._probe(layers, [i for i, block in enumerate(at) if block < 0])
        except _Whole as whole:
            if single:
                raise CoaloraError(
                    f"A block of {name} {whole}, so that its inputs cannot be handed to it",
                    remedy="Set calibration.inputs to original",
                ) from whole
            return
        starts, nbytes = [0], 0
        for block in range(len(self._blocks)):
            own = _hessian_nbytes(layer for layer, of in zip(layers, at, strict=True) if of == block)
            if block and (single or nbytes + own > limit):
                starts, nbytes = [*starts, block], 0
            nbytes += own
        n = len(self._blocks)
        # Behind the last block: of no blocks, where layers are left.
        for first, last in zip([*starts, n], [*starts[1:], n, n], strict=True):
            inside = [i for i, of in enumerate(at) if first <= of < last or (first == 0 and i in early)]
            late = [i for i, of in enumerate(at) if first == n and of < 0 and i not in early]
            self.parts += [Part(first, last, tuple(inside or late))] if inside or late else []
        del self.parts[0]

    @torch.no_grad()
    def run(self, part: Part, each: Callable[[dict[str, Tensor]], None] = lambda batch: None, *, keep: bool) -> None:
        """Compute a part on all batches; `each` is told a batch before it runs.

        Args:
            keep: put what it puts out in place of `hidden`.
        """
        made: list[Tensor] = []
        with self._there(part), self._cut(part) as given:
            for number, batch in enumerate(self._batches()):
                each(batch)
                given[:] = [self.hidden[number].to(self._device)] if part.first else []
                try:
                    self._model(**batch)
                except _Reached as reached:
                    if keep:
                        made.append(reached.hidden.to("cpu", copy=True))
        if keep:
            self.hidden = made

    def _probe(self, layers: Sequence[TargetLayer], outside: Sequence[int]) -> set[int]:
        """Which of the layers outside of blocks run before the first block ends; on one batch."""
        reached: set[int] = set()
        with ExitStack() as stack:
            for i in outside:
                module = self._model.get_submodule(layers[i].name)
                stack.callback(module.register_forward_pre_hook(lambda *_, i=i: reached.add(i)).remove)
            one, batches = next(self._batches()), self._batches
            self._batches = lambda: iter([one])
            try:
                self.run(Part(0, 1, ()), keep=False)
            finally:
                self._batches = batches
        return reached

    @contextmanager
    def _cut(self, part: Part) -> Iterator[list[Tensor]]:
        """Within, the model runs a part alone; the part starts from what the caller puts into the list."""
        given: list[Tensor] = []
        if part.last is None:
            yield given
            return

        def shortened(index: int, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if not args or not isinstance(args[0], Tensor):
                    raise _Whole(f"takes its hidden states by name, among {', '.join(kwargs)}")
                hidden = args[0]
                if given and index == min(part.first, len(self._blocks) - 1):
                    hidden = given[0]
                if index < part.first:
                    return (hidden, *[None] * self._others) if self._others else hidden
                out = own(hidden, *args[1:], **kwargs)
                first, *others = out if isinstance(out, tuple) else (out,)
                if not isinstance(first, Tensor) or any(other is not None for other in others):
                    raise _Whole("hands on more than its hidden states")
                self._others = len(others)
                if index + 1 == part.last:
                    raise _Reached(first)
                return out

            return forward

        try:
            for index, block in enumerate(self._blocks):
                block.forward = shortened(index, block.forward)
            yield given
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)

    @contextmanager
    def _there(self, part: Part) -> Iterator[None]:
        """Within, the part and what lies outside of blocks are on the device."""
        away = [(tensor, tensor.data) for tensor in self._used(part) if tensor.device != self._device]
        for tensor, data in away:
            tensor.data = data.to(self._device)
        try:
            yield
        finally:
            for tensor, data in away:
                tensor.data = data

    def _used(self, part: Part) -> list[Tensor]:
        """Parameters and buffers of the part, and of what lies outside of blocks."""
        spared = [] if part.last is None else [*self._blocks[: part.first], *self._blocks[part.last :]]
        absent = {id(module) for block in spared for module in block.modules()}
        modules = [module for module in self._model.modules() if id(module) not in absent]
        return [tensor for m in modules for tensor in (*m.parameters(recurse=False), *m.buffers(recurse=False))]


def _in(layer: TargetLayer, name: str) -> bool:
    return bool(name) and layer.name.startswith(f"{name}.")


class _Reached(Exception):
    """The end of a part, with its hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Whole(Exception):
    """Why a model cannot be cut between its blocks."""


def _hessian_nbytes(layers: Iterable[TargetLayer]) -> int:
    return sum(4 * layer.shape[1] ** 2 for layer in layers)
