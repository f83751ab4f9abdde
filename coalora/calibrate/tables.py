"""Per-layer, per-choice tables: what a choice costs (bits) and what it breaks (error).

Error is the relative error of the layer's output, E the residual W_l - q(W_l, k) and H = E[x x^T] of its inputs:
    err[l, k] = tr(E H E^T) / tr(W_l H W_l^T) = E ||E x||^2 / E ||W_l x||^2,
exact over the calibration data where statistics carry H, which is also what GPTQ minimises; otherwise with H's
diagonal alone, sum_ij E_ij^2 E[x_j^2] / sum_ij W_l,ij^2 E[x_j^2], as if features were uncorrelated. Weighted by nothing
else: HIGGS (NAACL 2025) finds a model's loss close to linear in the layers' relative errors.
Bits are counted, not computed from a nominal rule: every byte that packing stores, padding and offsets included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coalora.files import read_tensors, write_tensors
from coalora.models.targets import TargetLayer
from coalora.quant.packed_cache import CachedLayer
from coalora.quant.scheme import InputStatistics
from coalora.quant.space import ChoiceSpace


@dataclass(frozen=True)
class CalibrationTables:
    """What the search knows of the base model.

    Attributes:
        layers: the N target layers.
        space: the K choices.
        nbytes: (N, K) int64, packed bytes of layer l under choice k.
        err: (N, K) float64, relative output error.
        base_digest: digest of the base model's files.
    """

    layers: list[TargetLayer]
    space: ChoiceSpace
    nbytes: np.ndarray
    err: np.ndarray
    base_digest: str

    @property
    def n_weights(self) -> int:
        """P, the weights of all target layers."""
        return sum(layer.n_weights for layer in self.layers)

    @property
    def bits(self) -> np.ndarray:
        """(N, K): each layer's share of the average bits, so that a configuration's average is a sum over layers."""
        return self.nbytes * 8 / self.n_weights

    def average_bits(self, configurations: np.ndarray) -> np.ndarray:
        """Stored bits a weight of configurations (..., N)."""
        return self.total_nbytes(configurations) * 8 / self.n_weights

    def total_nbytes(self, configurations: np.ndarray) -> np.ndarray:
        """Packed bytes of all target layers of configurations (..., N)."""
        return self.nbytes[np.arange(len(self.layers)), configurations].sum(-1)

    def bits_range(self) -> tuple[float, float]:
        """Smallest and largest average bits that a configuration can have."""
        scale = 8 / self.n_weights
        return float(self.nbytes.min(1).sum() * scale), float(self.nbytes.max(1).sum() * scale)

    def save(self, path: Path) -> None:
        header = {
            "layers": [layer.to_dict() for layer in self.layers],
            "space": self.space.to_dict(),
            "base_digest": self.base_digest,
        }
        write_tensors(path, {"nbytes": self.nbytes, "err": self.err}, header)

    @classmethod
    def load(cls, path: Path) -> CalibrationTables:
        tensors, header = read_tensors(path)
        return cls(
            [TargetLayer.from_dict(fields) for fields in header["layers"]],
            ChoiceSpace.from_dict(header["space"]),
            tensors["nbytes"].numpy(),
            tensors["err"].numpy(),
            header["base_digest"],
        )


@torch.no_grad()
def error_table(
    weights: Sequence[Tensor],
    statistics: Sequence[InputStatistics],
    space: ChoiceSpace,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """err (N, K) float64 of the formula above; weights are out x in."""
    err = np.zeros((len(weights), len(space.choices)))
    for index, (weight, known) in enumerate(zip(weights, statistics, strict=True)):
        measure = _OutputNorm(known, weight.device)
        norm = measure(weight.float()) or 1.0
        if space.scheme.needs_statistics:  # what is quantized here is not quantized again when it is used
            results = CachedLayer(weight, known).fake_quantize_many(space.scheme, space.choices)
        else:
            results = space.scheme.fake_quantize_many(weight, space.choices, known)
        for k, quantized in enumerate(results):
            err[index, k] = measure(quantized.float().sub_(weight.float())) / norm
        if progress:
            progress(index + 1, len(weights))
    return err


class _OutputNorm:
    """E ||M x||^2 of matrices M (out, in), float32, over the inputs x that `statistics` describe; M is left as it is.

    A feature that never fires in calibration still counts a little, or its weights could be anything.
    """

    def __init__(self, statistics: InputStatistics, device: torch.device) -> None:
        moment = statistics.second_moment
        floor = 1e-6 * float(moment.mean())
        self._weighting = (moment + floor).to(device)
        self._hessian: Tensor | None = None
        if statistics.hessian is not None:
            self._hessian = statistics.hessian.to(device, torch.float32, copy=True)
            self._hessian.diagonal().add_(floor)

    def __call__(self, matrix: Tensor) -> float:
        if self._hessian is None:
            return float(matrix.square().sum(0) @ self._weighting)
        # By rows, so that rounding does not grow with their number; never below zero but for rounding.
        return max(0.0, float((matrix @ self._hessian).mul_(matrix).sum(1).sum(dtype=torch.float64)))


def calibration_tables(
    layers: Sequence[TargetLayer], space: ChoiceSpace, err: np.ndarray, base_digest: str
) -> CalibrationTables:
    """Join the error table with the exact packed sizes."""
    nbytes = space.packed_nbytes_table([layer.shape for layer in layers])
    return CalibrationTables(list(layers), space, nbytes, err, base_digest)
