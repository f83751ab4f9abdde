"""Closed-form compensation of the quantization error: the best low-rank term for each (layer, choice), untrained.

For the residual E = W - q(W, c) and inputs of second moment H = E[x x^T], the rank-r term that is nearest in what the
layer puts out,

    min over B (out x r), A (r x in) of  E ||(E - B A) x||^2 = tr((E - B A) H (E - B A)^T),

is B = the leading r eigenvectors of E H E^T and A = B^T E (Eckart and Young on E H^(1/2)). QERA (arXiv 2410.06040),
CLoQ (arXiv 2501.18475) and EoRA (arXiv 2410.21271) reach the same minimum by a singular value decomposition of
E H^(1/2) and a product with H^(-1/2); in this form no root and no inverse of H is needed, so that a singular H needs no
damping. With the diagonal of H alone it is the activation-weighted LoftQ of LQ-LoRA (arXiv 2311.12023, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from coalora.cache import ByteCache, nbytes
from coalora.errors import CoaloraError
from coalora.quant.scheme import InputStatistics

# Output features up to which the eigenvectors are exact; above, an iteration finds them (0.2 s of one core at 1,024).
_EXACT = 2048
_OVERSAMPLING = 16
_ITERATIONS = 12


def compensation(residual: Tensor, statistics: InputStatistics, r: int) -> tuple[Tensor, Tensor]:
    """(lora_A (r, in), lora_B (out, r)) whose product is the best rank-r fit of `residual` (out, in).

    The factors are float32 with values rounded to float16, so that a bundle stores them in half the bytes and gives
    back exactly what was evaluated. Columns of lora_B are orthonormal, in falling order of the error that they take
    away; where the residual has a lower rank than r, the rows of lora_A behind it are zero up to rounding. The sign of
    each column is fixed (its largest entry is positive), so that equal inputs give equal factors on every machine with
    the same arithmetic.

    Raises:
        CoaloraError: r is not between 1 and the smaller side of the residual.

    Example:
        >>> import torch
        >>> from coalora import compensation, dequantize, quantize
        >>> from coalora.quant.scheme import InputStatistics
        >>> weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
        >>> residual = weight - dequantize(quantize(weight, "int", bits=2, group_size=64, mode="sym"))
        >>> lora_A, lora_B = compensation(residual, InputStatistics(torch.ones(64)), r=8)
        >>> bool((residual - lora_B @ lora_A).norm() < 0.8 * residual.norm())
        True
    """
    if not 1 <= r <= min(residual.shape):
        raise CoaloraError(
            f"A layer of shape {tuple(residual.shape)} has no compensation of rank {r}",
            remedy=f"Set compensation_rank between 1 and {min(residual.shape)}",
        )
    E = residual.double()
    H = statistics.second_moment if statistics.hessian is None else statistics.hessian
    B = _leading(E, H.to(E), r)
    largest = B.gather(0, B.abs().argmax(dim=0, keepdim=True))
    B = B * largest.sign()
    return (B.T @ E).half().float(), B.half().float()


def compensating_lora_B(residual: Tensor, statistics: InputStatistics, lora_A: Tensor) -> Tensor:
    """The lora_B (out, r) that makes `lora_B @ lora_A` the best fit of `residual` (out, in) for a given lora_A (r, in).

    Least squares in the inputs' metric: B = E H A^T (A H A^T)^+. With `compensation`'s own lora_A it is its lora_B.
    """
    E, A = residual.double(), lora_A.double()
    H = statistics.hessian
    AH = A * statistics.second_moment.to(E) if H is None else A @ H.to(E)
    gram = torch.linalg.pinv(AH @ A.T, hermitian=True, rtol=1e-10)
    return (E @ AH.T @ gram).float()


def as_large_as_lora(rows: Tensor, usual: Tensor, statistics: InputStatistics) -> Tensor:
    """`rows` (r, in), each scaled to put out as much, in the mean square, as a row of LoRA's initial lora_A does.

    The rows are the inputs' leading directions, where inputs can be hundreds of times larger than elsewhere: with rows
    of the usual length a step of B would be as much larger, and a MiniLM's training diverged. Rows without any output
    stay `usual`: a residual of lower rank has such, of rounding errors.
    """
    H, second_moment = statistics.hessian, statistics.second_moment.to(rows)
    output = (rows @ H.to(rows) * rows if H is not None else rows.square() * second_moment).sum(dim=1)
    # Its entries are uniform within 1 / sqrt(in): of variance 1 / (3 in).
    wanted = second_moment.sum() / (3 * rows.shape[1])
    scaled = rows * (wanted / output.clamp_min(torch.finfo(rows.dtype).tiny)).sqrt()[:, None]
    return torch.where((output > 1e-10 * output.max())[:, None], scaled, usual)


def _leading(E: Tensor, H: Tensor, r: int) -> Tensor:
    """The leading r eigenvectors (out, r) of E H E^T; H (in, in), or its diagonal (in,)."""
    rows, columns = E.shape
    if columns < rows <= _EXACT:
        # E H^(1/2) has them as left singular vectors: the smaller Gram matrix is a fraction of the work.
        if H.dim() == 1:
            half = E * H.sqrt()
        else:
            values, directions = torch.linalg.eigh(H)
            half = (E @ directions) * values.clamp_min(0).sqrt()
        _, vectors = torch.linalg.eigh(half.T @ half)
        return torch.linalg.qr(half @ vectors[:, -r:].flip(1)).Q
    weighted = E * H if H.dim() == 1 else E @ H
    if rows <= _EXACT:
        _, vectors = torch.linalg.eigh(weighted @ E.T)
        return vectors[:, -r:].flip(1)
    # Subspace iteration (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4): the matrix of out x out is never formed.
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(E.shape[0], min(r + _OVERSAMPLING, E.shape[0]), generator=generator, dtype=E.dtype).to(E.device)
    for _ in range(_ITERATIONS):
        Q = torch.linalg.qr(weighted @ (E.T @ Q)).Q
    _, vectors = torch.linalg.eigh(Q.T @ (weighted @ (E.T @ Q)))
    return Q @ vectors[:, -r:].flip(1)


class CompensationTable:
    """Compensation of any (layer, choice), computed when first asked for and kept within a byte limit.

    Args:
        residual: (layer index, choice index) -> W - q(W) (out, in).
        statistics: of the N layers' inputs.
        ranks: rank (N,) of each layer's term; 0 for none.
        cache_bytes: limit of what is kept.
        known: factors that are given instead of computed, by (layer, choice); never dropped.
    """

    def __init__(
        self,
        residual: Callable[[int, int], Tensor],
        statistics: Sequence[InputStatistics],
        ranks: Sequence[int],
        *,
        cache_bytes: int = 1 << 28,
        known: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self._residual, self._statistics, self._ranks = residual, statistics, ranks
        self._known = dict(known or {})
        self._cache: ByteCache[tuple[int, int], tuple[Tensor, Tensor]] = ByteCache(cache_bytes, nbytes)

    def __call__(self, layer: int, choice: int) -> tuple[Tensor, Tensor]:
        """(lora_A (r, in), lora_B (out, r)) of choice `choice` in layer `layer`, on the residual's device."""
        key = (layer, choice)
        if key in self._known:
            return self._known[key]
        made = self._cache.get(key)
        if made is None:
            made = compensation(self._residual(layer, choice), self._statistics[layer], self._ranks[layer])
            self._cache.put(key, made)
        return made

    def factors(self, configurations: np.ndarray) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """The factors of every (layer, choice) that occurs in `configurations` (n, N), on the CPU."""
        pairs = sorted({(index, int(k)) for row in configurations for index, k in enumerate(row)})
        return {pair: (A.cpu(), B.cpu()) for pair in pairs for A, B in [self(*pair)]}
