"""Weight switching: one resident model that takes any configuration without being loaded again.

The full-precision weights of the target layers stay as *masters* (`coalora.models.switching.masters` says where).
Switching quantizes the layers whose choice changed; a byte-limited cache keeps their packed tensors, 4 to 16 times
smaller than float32 weights, so that a training set whose members share choices pays for quantization once. On a CPU,
what the limit leaves is spent on whole weights (`coalora.models.switching.slots`).

Memory of the target layers, in bytes; P weights of w bytes each (4 in float32, 2 in bfloat16), the largest layer
L weights, C = cache_bytes, b = average bits of the configuration held now:

    weights       held on the device                        besides, while a layer is quantized or multiplied
    dequantized   P w + C                                   about 6 L (2 L where the cache is off)
    packed        P b/8 + C                                 about L (w + 4)

    master        held
    device        P w more on the device
    cpu           P w in RAM (none more than the model's own weights had, for `packed`)
    mmap          none (pages of the checkpoint that the system may drop)

K choices never exist side by side: nothing grows with the size of the choice space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from coalora.cache import ByteCache, nbytes, share_of_free_memory
from coalora.errors import CoaloraError
from coalora.models.switching.masters import Masters
from coalora.models.switching.packed import move_rest, pack_layer
from coalora.models.switching.slots import WeightSlots
from coalora.models.switching.tables import HeldRows, Indices
from coalora.models.targets import TargetLayer
from coalora.quant.kernels.available import use_triton
from coalora.quant.registry import get_scheme
from coalora.quant.scheme import Choice, InputStatistics, Scheme
from coalora.quant.space import ChoiceSpace
from coalora.recipes import MasterMode, WeightMode
from coalora.threads import each, n_threads

FULL_PRECISION = -1
_TOGETHER = 1 << 27  # weights that are quantized together: a bound on what exists beside them
_UNFINISHED = -2  # a switch that failed has left the layer in between
Packed = dict[str, Tensor]


class QuantizedBase:
    """The target layers of a model, and the configuration that they hold now.

    Args:
        model: the base model, before or after PEFT has wrapped it (layers are found by name, once).
        layers: its N target layers.
        space: the K choices; a configuration is an int array (N,) of indices into it.
        statistics: of the layers' inputs, for calibrated schemes.
        cache_bytes: limit of the cache of packed layers and, on a CPU, of weights that wait; 0 turns it off. None: a
            quarter of the GPU's memory that is free now; on a CPU an eighth of the RAM that is available now, at most
            2 GiB.
        master: where the full-precision weights live.
        weights: `dequantized` writes weights into the model; `packed` makes its layers dequantize on the fly, forward
            and backward, bit for bit alike.
        checkpoint: for master `mmap`, the folder or file of safetensors that the model was loaded from.
        device: for weights `packed`, where the model shall run: its other tensors are moved there, and its target
            layers never are. None: where it is.

    Attributes:
        cache: packed tensors by (layer, choice); its limit may be changed.
        configuration: (N,) what the layers hold, `FULL_PRECISION` at first.
        masters: the full-precision weights, out x in, in layer order; not to be written to.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[TargetLayer],
        space: ChoiceSpace,
        *,
        statistics: Sequence[InputStatistics] | None = None,
        cache_bytes: int | None = None,
        master: MasterMode = "device",
        weights: WeightMode = "dequantized",
        checkpoint: Path | str | None = None,
        device: torch.device | None = None,
    ) -> None:
        if space.needs_statistics and statistics is None:
            raise CoaloraError(
                f"Scheme {space.scheme_name!r} has no statistics of the layers' inputs to quantize with",
                remedy="Collect them with coalora.calibrate.statistics.collect_statistics(hessians=True)",
            )
        if weights not in get_args(WeightMode):
            raise CoaloraError(
                f"{weights!r} is no way to hold weights", remedy=f"Choose {' or '.join(get_args(WeightMode))}"
            )
        self._statistics = list(statistics) if statistics is not None else [None] * len(layers)
        self.layers = list(layers)
        self.space = space
        self.weight_mode: WeightMode = weights
        modules = [model.get_submodule(layer.name) for layer in self.layers]
        modules = [getattr(module, "base_layer", module) for module in modules]
        stored = [module.get_parameter("weight").data for module in modules]
        self._device = device if device is not None and weights == "packed" else stored[0].device
        limit = share_of_free_memory(self._device) if cache_bytes is None else cache_bytes
        self.cache: ByteCache[tuple[int, int], Packed] = ByteCache(limit, lambda p: nbytes(p.values()), self._forget)
        packed = weights == "packed"
        self.masters = Masters(self.layers, stored, master, device=self._device, own=not packed, checkpoint=checkpoint)
        self._held: list[Packed] | None = [{} for _ in layers] if packed else None
        if packed:
            del stored
            for index, module in enumerate(modules):
                pack_layer(module, _Source(self, index), self._device)
            move_rest(model, {id(module) for module in modules}, self._device)
        self._slots = None if packed else WeightSlots(modules, self.layers, [FULL_PRECISION] * len(layers))
        self.configuration = np.full(len(self.layers), FULL_PRECISION, dtype=np.int64)
        self._rows: HeldRows | None = None
        self._largest = max(layer.n_weights for layer in layers)
        if self._slots is not None and all(scheme.has_kernels for scheme in space.schemes):
            by_kernels = all(use_triton(weight) and weight.is_contiguous() for weight in self._weights)
            self._rows = HeldRows(len(layers), len(space), self._device) if by_kernels else None

    def switch(self, configuration: np.ndarray) -> None:
        """Make the model hold `configuration` (N,); only layers that change are touched.

        Raises:
            CoaloraError: wrong length or an index outside the space.
        """
        target = check_configuration(configuration, len(self.layers), len(self.space.choices))
        if self._rows is not None:
            (changed_layers,) = (target != self.configuration).nonzero()
            self.configuration[changed_layers] = _UNFINISHED
            self._switch_together(self._rows, changed_layers, target[changed_layers])
            self.configuration = target
            return
        changed = [int(index) for index in np.flatnonzero(target != self.configuration)]
        if self._held is not None:
            for index in changed:  # released before the next one is made
                self._held[index] = {}
                self.configuration[index] = FULL_PRECISION
        else:
            self.configuration[changed] = _UNFINISHED
        written = self._not_parked(changed, target)
        parts = [self.cache.get((index, int(target[index]))) for index in written]
        jobs = [(i, int(target[i]), p) for i, p in zip(written, parts, strict=True)]
        made = each(lambda job: self._set(*job), jobs, n_threads(self._device))
        self._write_together(written, target, made)
        for index, known, packed in zip(written, parts, made, strict=True):
            if known is None and packed is not None:
                self.cache.put((index, int(target[index])), packed)
            if self._slots is not None:
                self._slots.holds(index, int(target[index]))
        if self._slots is not None:
            self._slots.shrink(self.cache.limit - self.cache.nbytes)
        self.configuration = target.copy()

    def _switch_together(self, rows: HeldRows, layers: Indices, choices: Indices) -> None:
        """On a GPU: one launch for what is held of a scheme, one group of launches for what is not."""
        places, single = rows.use(layers, choices), len(self.space.schemes) == 1
        owners = None if single else self.space.scheme_index[choices]
        absent: list[tuple[Scheme, Indices, Indices]] = []
        # What is held first: what is quantized then may take its memory.
        for number, scheme in enumerate(self.space.schemes):
            own = places if owners is None else places[owners == number]
            held = own[own >= 0]
            if held.size:
                scheme.dequantize_rows(rows.gather(scheme.name, held), self._largest)
            if held.size < own.size:
                new = (places < 0) & (owners is None or owners == number)
                absent.append((scheme, layers[new], choices[new]))
        for scheme, of, under in absent:
            parts = np.cumsum([self.layers[i].n_weights for i in of]) // _TOGETHER
            for part in np.unique(parts):
                self._quantize_together(rows, scheme, of[parts == part], under[parts == part])

    def _quantize_together(self, rows: HeldRows, scheme: Scheme, layers: Indices, choices: Indices) -> None:
        own = [(self._weights[i], self.space.choices[k]) for i, k in zip(layers, choices, strict=True)]
        made = scheme.quantize_packed_many(
            [(self.masters[i], c, self._statistics[i], out) for i, (out, c) in zip(layers, own, strict=True)]
        )
        if not self.cache.limit:
            return
        rows.put(
            scheme.name, layers, choices, scheme.kernel_rows([(p, c, w) for p, (w, c) in zip(made, own, strict=True)])
        )
        for key in sorted(self.cache, key=lambda key: rows.used[key]):  # what a launch took from its rows was used, too
            self.cache.get(key)
        for index, k, packed in zip(layers, choices, made, strict=True):
            self.cache.put((int(index), int(k)), packed)

    def _forget(self, key: tuple[int, int]) -> None:
        if self._rows is not None:
            self._rows.drop(self.space.scheme_of(key[1]).name, *key)

    def restore(self) -> None:
        """Make the model hold the full-precision weights."""
        changed = [int(index) for index in np.flatnonzero(self.configuration != FULL_PRECISION)]
        if self._rows is not None and changed:
            torch._foreach_copy_([self._weights[i] for i in changed], [self.masters[i] for i in changed])
            changed = []
        target = np.full(len(self.layers), FULL_PRECISION, dtype=np.int64)
        for index in self._not_parked(changed, target):
            if self._slots is None:
                self._held[index] = {}  # type: ignore[index]
            else:
                self._weights[index].copy_(self.masters[index])
                self._slots.holds(index, FULL_PRECISION)
        self.configuration = target

    @property
    def masters_serve(self) -> bool:
        """Whether the model can compute with the masters where they are."""
        return self._held is not None or (
            self.masters.mode == "device" and not any(layer.transposed for layer in self.layers)
        )

    @contextmanager
    def in_full_precision(self) -> Iterator[None]:
        """Within, the model computes with the masters; nothing is to be switched. Where `masters_serve` no weight is
        written, and afterwards it computes with what it held before; otherwise it is left restored.
        """
        before = self.configuration
        if not self.masters_serve:
            self.restore()
            yield
        elif self._slots is None:
            self.configuration = np.full_like(before, FULL_PRECISION)
            try:
                yield
            finally:
                self.configuration = before
        else:
            with self._slots.pointed_at(list(self.masters)):
                yield

    def residual(self, index: int, choice: int) -> Tensor:
        """W - q(W, c) (out, in) of layer `index` under choice `choice`, in float32; nothing is switched."""
        master = self.masters[index]
        quantized = self.space.scheme_of(choice).fake_quantize(
            master, self.space.choices[choice], self._statistics[index]
        )
        return master.float() - quantized.to(master.dtype).float()

    def weight(self, index: int) -> Tensor:
        """The weight (out, in) that layer `index` computes with now; not to be written to."""
        return self._weights[index] if self._held is None else self._maker(index)()

    def _maker(self, index: int) -> Callable[[], Tensor]:
        """Maker of the weight (out, in) that packed layer `index` holds now, whatever is switched to meanwhile."""
        assert self._held is not None
        k, packed = int(self.configuration[index]), self._held[index]
        if k == FULL_PRECISION:
            return lambda: self.masters[index]
        return lambda: self._dequantized(index, k, packed)

    def held(self) -> list[Tensor]:
        """Every tensor that this object keeps, the model's own weights aside: masters, cache, packed layers."""
        packed = [*self.cache.values(), *(self._held or [])]
        parked = [] if self._slots is None else self._slots.parked.values()
        return [*self.masters.held(), *(t for tensors in packed for t in tensors.values()), *parked]

    @property
    def _weights(self) -> list[Tensor]:
        assert self._slots is not None
        return self._slots.weights

    def _not_parked(self, changed: list[int], target: np.ndarray) -> list[int]:
        """The layers whose weights have to be written; the others compute with weights that were waiting."""
        if self._slots is None or self._rows is not None or self._device.type != "cpu":
            return changed
        take, limit = self._slots.take, self.cache.limit - self.cache.nbytes
        return [index for index, k in zip(changed, target[changed].tolist(), strict=True) if not take(index, k, limit)]

    def _set(self, index: int, k: int, packed: Packed | None) -> Packed | None:
        """Put choice `k` into layer `index`, from the cache's tensors where there are some; what was packed for it."""
        scheme, choice = self.space.scheme_of(k), self.space.choices[k]
        if packed is None and (self.cache.limit or self._held is not None):
            packed = scheme.quantize_packed(self.masters[index], choice, self._statistics[index])
        if self._held is not None:
            self._held[index] = packed or {}
        elif packed is not None:
            if self._device.type == "cuda":  # written together
                return packed
            scheme.dequantize_packed(packed, choice, self.layers[index].shape, self._weights[index])
        else:
            self._weights[index].copy_(scheme.fake_quantize(self.masters[index], choice, self._statistics[index]))
        return packed

    def _write_together(self, changed: list[int], target: np.ndarray, made: list[Packed | None]) -> None:
        """On a GPU, the weights of all layers at once: a launch for each layer would cost more than its work."""
        if self._held is not None or self._device.type != "cuda":
            return
        groups: dict[str, list[tuple[Packed, Choice, Tensor]]] = {}
        for index, packed in zip(changed, made, strict=True):
            k = int(target[index])
            if packed is not None:
                job = (packed, self.space.choices[k], self._weights[index])
                groups.setdefault(self.space.scheme_of(k).name, []).append(job)
        for name, jobs in groups.items():
            get_scheme(name).dequantize_packed_many(jobs)

    def _dequantized(self, index: int, k: int, packed: Packed) -> Tensor:
        layer = self.layers[index]
        dtype = self.masters.dtypes[index]
        out = torch.empty(layer.shape, dtype=dtype, device=self._device)
        self.space.scheme_of(k).dequantize_packed(packed, self.space.choices[k], layer.shape, out)
        return out


class _Source:
    """Maker of the weight that a packed layer holds now, as its module stores it."""

    def __init__(self, base: QuantizedBase, index: int) -> None:
        self._base, self._index = base, index

    def __call__(self) -> Callable[[], Tensor]:
        layer, make = self._base.layers[self._index], self._base._maker(self._index)
        return lambda: layer.matrix(make()).contiguous()


def check_configuration(configuration: np.ndarray, n_layers: int, n_choices: int) -> np.ndarray:
    """`configuration` as an int64 array (N,), or an error that says what is wrong with it."""
    array = np.asarray(configuration)
    if array.shape != (n_layers,) or array.dtype.kind not in "iu":
        raise CoaloraError(
            f"A configuration of shape {array.shape} and dtype {array.dtype} does not fit {n_layers} target layers",
            remedy=f"Give integers of shape ({n_layers},): the index of a choice for each layer",
        )
    if array.min() < 0 or array.max() >= n_choices:
        raise CoaloraError(
            f"The configuration's choices {array.min()} to {array.max()} are not all in the choice space",
            remedy=f"Give indices from 0 to {n_choices - 1}",
        )
    return array.astype(np.int64)
