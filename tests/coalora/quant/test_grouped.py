"""Searched scales against a dense search written out, and what group-wise schemes do with what is known of inputs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.quant.integer.scheme import IntChoice, IntScheme
from coalora.quant.nf.book import nf_code_book
from coalora.quant.nf.scheme import NFChoice, NFScheme
from coalora.quant.scheme import InputStatistics, Scheme

NF, INT = NFScheme(), IntScheme()
CHOICES = [
    *((NF, NFChoice(bits, 8, "fp32", 32, 64)) for bits in (2, 3, 4)),
    *((INT, IntChoice(bits, 32, mode)) for bits in (2, 3, 4) for mode in ("sym", "asym")),
]
each = pytest.mark.parametrize(("scheme", "choice"), CHOICES, ids=[str(choice) for _, choice in CHOICES])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(1)) ** 4 + 0.01


def weighted_errors(W: Tensor, result: Tensor, h: Tensor) -> np.ndarray:
    """Of every group of 32: (out, in / 32)."""
    return ((W - result).double() ** 2 * h).view(len(W), -1, 32).sum(2).numpy()


def dense(group: np.ndarray, h: np.ndarray, choice: NFChoice | IntChoice) -> float:
    """The least weighted error over 400 ranges of a group, with both signs and all zero points: loops in float64."""
    best = np.inf
    if isinstance(choice, NFChoice):
        book = nf_code_book(choice.bits).astype(np.float64)
        grids = [book, -book] if choice.bits <= 3 else [book]
        widths = np.abs(group).max() * np.linspace(0.2, 1.1, 400)
    else:
        levels = 2**choice.bits - 1
        zeros = range(levels + 1) if choice.mode == "asym" else [2 ** (choice.bits - 1), 2 ** (choice.bits - 1) - 1]
        grids = [np.arange(levels + 1.0) - zero for zero in zeros]
        widths = (group.max() - group.min()) / levels * np.linspace(0.2, 1.1, 400)
        if choice.mode == "sym":
            widths = 2 * np.abs(group).max() / levels * np.linspace(0.2, 1.1, 400)
    for grid in grids:
        values = widths[:, None] * grid
        distance = (group[None, :, None] - values[:, None, :]) ** 2
        best = min(best, (distance.min(2) * h).sum(1).min())
    return best


@each
def test_searched_scales_are_near_those_of_a_dense_search(scheme: Scheme, choice) -> None:
    W, h = gaussian(6, 64), moments(64)
    W[0, 3] = 9.0  # an outlier
    found = weighted_errors(W, scheme.fake_quantize(W, choice, InputStatistics(h)), h)
    absmax = weighted_errors(W, scheme.fake_quantize(W, choice), h)
    least = np.array([[dense(g.numpy(), k.numpy(), choice) for g, k in zip(w.split(32), h.split(32))] for w in W])  # noqa: B905
    assert found.sum() < 1.15 * least.sum()
    assert found.sum() < 0.95 * absmax.sum()


@each
def test_a_search_stores_what_absmax_stores(scheme: Scheme, choice) -> None:
    W = gaussian(5, 70)
    plain = scheme.quantize_packed(W, choice)
    for statistics in (InputStatistics(moments(70)), InputStatistics(moments(70), torch.eye(70) + 0.1)):
        packed = scheme.quantize_packed(W, choice, statistics)
        assert {n: (t.dtype, t.shape) for n, t in packed.items()} == {n: (t.dtype, t.shape) for n, t in plain.items()}
        state = scheme.quantize(W, choice, statistics)
        assert all(torch.equal(scheme.unpack(packed, choice, (5, 70))[name], tensor) for name, tensor in state.items())


@each
def test_weights_that_count_are_kept_and_others_give_way(scheme: Scheme, choice) -> None:
    W, h = gaussian(8, 64), torch.full((64,), 1e-4)
    h[::8] = 1
    plain, found = scheme.fake_quantize(W, choice), scheme.fake_quantize(W, choice, InputStatistics(h))
    assert (W - found)[:, ::8].norm() < 0.7 * (W - plain)[:, ::8].norm()


@pytest.mark.parametrize("rounding", ["absmax", "searched", "feedback"])
@each
def test_many_are_each_alone_and_inputs_stay_as_they_were(scheme: Scheme, choice, rounding: str) -> None:
    W, H = gaussian(7, 70), torch.eye(70) + 0.2
    known = InputStatistics(moments(70), H.clone(), rounding)  # type: ignore[arg-type]
    kept = W.clone()
    both = [choice, dataclasses.replace(choice, bits=8), choice]
    for one, (state,) in zip(both, scheme.quantize_layers([W], both, [known]), strict=True):
        alone = scheme.quantize(W, one, known)
        assert all(torch.equal(state[name], tensor) for name, tensor in alone.items())
    assert torch.equal(W, kept)
    assert known.hessian is not None
    assert torch.equal(known.hessian, H)


def test_zero_weights_and_zero_moments_are_no_obstacle() -> None:
    W = gaussian(4, 64)
    W[1], W[:, 32:40] = 0, 0
    h = moments(64)
    h[:8], h[40:] = 0, 0
    for scheme, choice in CHOICES:
        for H in (None, torch.diag(h)):
            result = scheme.fake_quantize(W, choice, InputStatistics(h, H))
            assert bool(torch.isfinite(result).all())
            assert not result[1].any()
        assert bool(torch.isfinite(scheme.fake_quantize(W, choice, InputStatistics(torch.zeros(64)))).all())


def test_scales_of_few_bits_are_not_mirrored() -> None:
    """Spread over both signs, four levels would leave two for each."""
    W, h = gaussian(64, 256), torch.ones(256)
    for bits, mirrored in ((2, False), (4, False), (8, True)):
        scheme_choice = NFChoice(2, bits, "fp32", 32, 64)
        (scales,) = NF.parameters(NF.quantize(W, scheme_choice, InputStatistics(h)), scheme_choice)
        assert bool((scales < 0).any()) is mirrored


def test_what_is_known_decides_unless_a_rounding_is_asked_for() -> None:
    h, H = torch.ones(4), torch.eye(4)
    assert InputStatistics(h).method == "searched"
    assert InputStatistics(h, H).method == "feedback"
    assert InputStatistics(h, H, "absmax").method == "absmax"
    with pytest.raises(CoaloraError, match=r"no Hessian .*collect_statistics\(hessians=True\)"):
        _ = InputStatistics(h, rounding="feedback").method


def test_statistics_of_another_layer_are_refused() -> None:
    for known in (InputStatistics(torch.ones(32)), InputStatistics(torch.ones(64), torch.eye(32))):
        with pytest.raises(CoaloraError, match=r"are not those of 64 input features"):
            NF.quantize(gaussian(4, 64), CHOICES[0][1], known)


def test_weights_quantized_before_are_checked_before_they_are_read() -> None:
    W, choice = gaussian(4, 64), CHOICES[0][1]
    for shape in ((4, 64), (4, 96)):
        packed = NF.quantize_packed(gaussian(*shape, seed=5), choice)
        known = InputStatistics(torch.ones(64), packed={choice: packed})
        if shape == (4, 64):
            made = NF.quantize_packed(W, choice, known)
            assert all(torch.equal(made[name], tensor) for name, tensor in packed.items())
        else:
            with pytest.raises(CoaloraError, match="packed weight is not that"):
                NF.quantize_packed(W, choice, known)


@pytest.mark.parametrize("rounding", ["absmax", "searched", "feedback"])
@each
def test_layers_together_are_each_alone(scheme: Scheme, choice, rounding: str) -> None:
    weights = [gaussian(7, 70) * (i + 1) for i in range(3)] + [gaussian(5, 70)]
    known = []
    for i in range(4):
        x = torch.randn(200, 70, generator=torch.Generator().manual_seed(i)) @ (torch.eye(70) + 0.05 * i)
        known.append(InputStatistics(x.square().mean(0), x.T @ x / 200, rounding))  # type: ignore[arg-type]
    for same_shape in (weights[:3], weights):
        (states,) = scheme.quantize_layers(same_shape, [choice], known[: len(same_shape)])
        for weight, own, state in zip(same_shape, known, states, strict=False):
            alone = scheme.quantize(weight, choice, own)
            assert all(torch.equal(state[name], tensor) for name, tensor in alone.items())
