"""Error feedback against the update written out one feature at a time, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.quant.feedback import DAMPING, Feedback, solve
from coalora.quant.grouped import Grid, Tensors
from coalora.quant.integer.scheme import IntChoice, IntScheme
from coalora.quant.nf.scheme import NFChoice, NFScheme
from coalora.quant.scheme import InputStatistics

NF, INT = NFScheme(), IntScheme()


def correlated(n: int, samples: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(samples, n, generator=generator) @ torch.randn(n, n, generator=generator) / n**0.5
    return x.T @ x / samples


class Halves(Grid):
    """Multiples of a half from -2 to 1.5: parameters that nothing searches."""

    key = "halves"

    def absmax(self, groups: Tensor) -> Tensors:
        return (torch.ones_like(groups[..., :1, :]),)

    def searched(self, groups: Tensor, weighting: Tensor, frame: Tensors = ()) -> Tensors:
        return self.absmax(groups)

    def rounded(self, parameters: Tensors, frame: Tensors) -> tuple[Tensors, Tensors]:
        return parameters, parameters

    def codes(self, weights: Tensor, parameters: Tensors) -> Tensor:
        return ((weights * 2).round().clamp(-4, 3) + 4).to(torch.uint8)

    def values(self, codes: Tensor, parameters: Tensors) -> Tensor:
        return (codes.float() - 4) / 2

    def named(self, stored: Tensors) -> dict[str, Tensor]:
        return {}


def written_out(W: np.ndarray, H: np.ndarray, order: list[int]) -> np.ndarray:
    """Optimal brain surgeon's update, with the inverse of what is left of H taken anew for every feature."""
    W = W.astype(np.float64).copy()
    H = H.astype(np.float64) + DAMPING * np.diag(H).mean() * np.eye(len(H))
    result = np.empty_like(W)
    for at, j in enumerate(order):
        left = order[at:]
        inverse = np.linalg.inv(H[np.ix_(left, left)])
        result[:, j] = np.clip(np.round(W[:, j] * 2), -4, 3) / 2
        W[:, left] -= np.outer((W[:, j] - result[:, j]) / inverse[0, 0], inverse[0])
    return result


@pytest.mark.parametrize("size", [4, 16])
def test_codes_are_those_of_the_update_written_out(size: int) -> None:
    W, H = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), correlated(16)
    diagonal = H.diagonal().view(-1, size)
    groups = diagonal.sum(1).argsort(descending=True).tolist()
    order = [g * size + int(j) for g in groups for j in diagonal[g].argsort(descending=True)]
    codes, _ = solve([Feedback(H)], Halves(), W.T.contiguous().view(1, -1, size, 40), ())
    result = Halves().values(codes.view(16, 40).T, ()).numpy()
    expected = written_out(W.numpy(), H.numpy(), order)
    assert (result == expected).mean() > 0.99  # a weight between two multiples may fall to either
    plain = np.clip(np.round(W.numpy() * 2), -4, 3) / 2
    assert (plain != expected).mean() > 0.1


@pytest.mark.parametrize("columns", [64, 100])
@pytest.mark.parametrize(
    ("scheme", "choice"),
    [(NF, NFChoice(2, 8, "bf16", 32, 64)), (NF, NFChoice(4, 3, "fp16", 64, 16)), (INT, IntChoice(3, 32, "asym"))],
    ids=["nf2", "nf4", "int3"],
)
def test_the_error_that_it_minimises_falls_below_that_of_searched_scales(scheme, choice, columns: int) -> None:
    W, H = torch.randn(48, columns, generator=torch.Generator().manual_seed(0)), correlated(columns)
    errors = []
    for hessian in (None, H):
        E = W - scheme.fake_quantize(W, choice, InputStatistics(H.diagonal().clone(), hessian))
        errors.append(float(((E @ H) * E).sum()))
    assert errors[1] < 0.85 * errors[0]


@pytest.mark.parametrize("bits", [2, 3])
def test_features_far_larger_than_others_do_not_push_scales_out_of_their_stored_range(bits: int) -> None:
    """A down_proj of a real model, where two features are a million times stronger, ended at an error of .32."""
    choice = NFChoice(bits, 8, "bf16", 64, 256)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        W, x = torch.randn(24, 256, generator=generator), torch.randn(400, 256, generator=generator) * 0.1
        W[:, [77, 200]] *= 4
        x[:, [77, 200]] += 100 * torch.randn(400, 2, generator=generator)
        H = x.T @ x / len(x)
        errors = []
        for hessian in (None, H):
            E = W - NF.fake_quantize(W, choice, InputStatistics(H.diagonal().clone(), hessian))
            errors.append(float(((E @ H) * E).sum()))
        assert errors[1] < 3 * errors[0], seed


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    W, h = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), torch.rand(64) + 0.1
    choice = IntChoice(4, 32, "sym")
    # Damping adds as much to every feature's weight.
    searched = INT.quantize(W, choice, InputStatistics(h + DAMPING * h.mean()))
    fed_back = INT.quantize(W, choice, InputStatistics(h, h.diag()))
    assert (fed_back["codes"] == searched["codes"]).float().mean() > 0.99


def test_singular_hessians_are_damped_and_others_refused() -> None:
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))  # fewer samples than features
    x[:, 7] = 0
    choice = IntChoice(4, 32, "asym")
    H = x.T @ x / 3
    assert bool(torch.isfinite(INT.fake_quantize(W, choice, InputStatistics(H.diagonal().clone(), H))).all())
    for bad, message in (
        (torch.full((64, 64), 1e6).fill_diagonal_(1), "No damping makes"),
        (torch.full((64, 64), float("nan")), "NaN or infinite"),
    ):
        with pytest.raises(CoaloraError, match=message):
            INT.quantize(W, choice, InputStatistics(torch.ones(64), bad))
