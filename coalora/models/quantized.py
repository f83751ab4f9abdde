"""Weight switching: one resident model that takes any configuration without being loaded again.

The full-precision weights of the target layers stay resident as masters. Switching writes dequant(q(W_l, c_l)) into
the layers whose choice changed; a byte-limited cache keeps the tensors that were used last, so that a training set
whose members share choices pays for quantization once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from coalora.errors import CoaloraError
from coalora.models.targets import TargetLayer
from coalora.quant.packed_cache import CachedLayer
from coalora.quant.scheme import InputStatistics
from coalora.quant.space import ChoiceSpace

FULL_PRECISION = -1


class QuantizedBase:
    """The target layers of a model, and the configuration that they hold now.

    Args:
        model: the base model, before or after PEFT has wrapped it (layers are found by name, once).
        layers: its N target layers.
        space: the K choices; a configuration is an int array (N,) of indices into it.
        statistics: of the layers' inputs, for calibrated schemes.
        cache_bytes: limit of the cache of dequantized weights; 0 turns it off.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[TargetLayer],
        space: ChoiceSpace,
        *,
        statistics: Sequence[InputStatistics] | None = None,
        cache_bytes: int = 1 << 28,
    ) -> None:
        if space.scheme.needs_statistics and statistics is None:
            raise CoaloraError(
                "a calibrated scheme quantizes with the statistics of the layers' inputs",
                got=f"scheme {space.scheme.name!r} without statistics",
                remedy="collect them with coalora.calibrate.statistics.collect_statistics(hessians=True)",
            )
        self._statistics = list(statistics) if statistics is not None else [None] * len(layers)
        self.layers = list(layers)
        self.space = space
        self.cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        weights = [model.get_submodule(layer.name).get_parameter("weight") for layer in self.layers]
        self._weights = [layer.matrix(w.data) for layer, w in zip(self.layers, weights, strict=True)]
        self._masters = [w.clone(memory_format=torch.contiguous_format) for w in self._weights]
        # Calibrated schemes take long: their packed codes outlive the dequantized weights of the cache.
        self._calibrated = [CachedLayer(w, s) for w, s in zip(self._masters, self._statistics, strict=True)]
        self.configuration = np.full(len(self.layers), FULL_PRECISION, dtype=np.int64)

    @property
    def masters(self) -> list[Tensor]:
        """The full-precision weights, out x in, in layer order; not to be written to."""
        return self._masters

    def switch(self, configuration: np.ndarray) -> None:
        """Write the weights of `configuration` (N,) into the model; only layers that change are touched.

        Raises:
            CoaloraError: wrong length or an index outside the space.
        """
        target = check_configuration(configuration, len(self.layers), len(self.space.choices))
        for index in np.flatnonzero(target != self.configuration):
            self._weights[index].copy_(self._dequantized(int(index), int(target[index])))
        self.configuration = target.copy()

    def restore(self) -> None:
        """Write the full-precision weights back."""
        for index in np.flatnonzero(self.configuration != FULL_PRECISION):
            self._weights[index].copy_(self._masters[index])
        self.configuration = np.full(len(self.layers), FULL_PRECISION, dtype=np.int64)

    def _dequantized(self, index: int, choice: int) -> Tensor:
        key = (index, choice)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        master, scheme, wanted = self._masters[index], self.space.scheme, self.space.choices[choice]
        if scheme.needs_statistics:
            weight = self._calibrated[index].fake_quantize(scheme, wanted)
        else:
            weight = scheme.fake_quantize(master, wanted, self._statistics[index])
        weight = weight.to(master.dtype)
        if weight.nbytes <= self.cache_bytes:
            self._cache[key] = weight
            self._cached_bytes += weight.nbytes
            while self._cached_bytes > self.cache_bytes:
                _, dropped = self._cache.popitem(last=False)
                self._cached_bytes -= dropped.nbytes
        return weight


def check_configuration(configuration: np.ndarray, n_layers: int, n_choices: int) -> np.ndarray:
    """`configuration` as an int64 array (N,), or an error that says what is wrong with it."""
    array = np.asarray(configuration)
    if array.shape != (n_layers,) or not np.issubdtype(array.dtype, np.integer):
        raise CoaloraError(
            "a configuration holds one choice index for every target layer",
            got=f"shape {array.shape}, dtype {array.dtype}",
            expected=f"integers of shape ({n_layers},)",
        )
    if array.min() < 0 or array.max() >= n_choices:
        raise CoaloraError(
            "a configuration's choice indices lie inside the choice space",
            got=f"{array.min()} to {array.max()}",
            expected=f"0 to {n_choices - 1}",
        )
    return array.astype(np.int64)
