"""The gguf scheme: llama.cpp's bytes, found with what calibration knows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from coalora.calibrate.tables import calibration_tables, error_table
from coalora.errors import CoaloraError
from coalora.models.choices import Part, fitting, layer_choices
from coalora.models.targets import TargetLayer
from coalora.quant.gguf import scheme as module
from coalora.quant.gguf.blocks import TYPES, decode_rows
from coalora.quant.gguf.scheme import GGUFChoice, GGUFScheme
from coalora.quant.scheme import InputStatistics
from coalora.quant.space import ChoiceSpace
from coalora.search.knapsack import allocate

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")
libgguf = pytest.importorskip("libgguf", reason="needs the extra [gguf]")

GGUF = GGUFScheme()
EVERY = pytest.mark.parametrize("choice", GGUF.choices(), ids=str)
SHAPE = (24, 1024)


def weight(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.fixture(scope="module")
def hessians() -> tuple[Tensor, Tensor]:
    """E[x x^T] of correlated inputs, and that of other inputs of the same distribution."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(64, SHAPE[1], generator=generator) * torch.rand(SHAPE[1], generator=generator).square()
    x = torch.randn(2, 4096, 64, generator=generator) @ mixing + 0.3 * torch.randn(
        2, 4096, SHAPE[1], generator=generator
    )
    first, second = x.transpose(1, 2) @ x / 4096
    return first, second


def known(hessian: Tensor, rounding: str | None = None, **packed: object) -> InputStatistics:
    return InputStatistics(hessian.diagonal().clone(), hessian, rounding, **packed)  # type: ignore[arg-type]


def error(made: Tensor, hessian: Tensor) -> float:
    E = made - weight()
    return float((E @ hessian * E).sum() / (weight() @ hessian * weight()).sum())


@EVERY
def test_blocks_without_statistics_are_those_of_llama_cpp_without_an_importance_matrix(choice: GGUFChoice) -> None:
    made = GGUF.quantize_packed(weight(), choice)["blocks"].numpy()
    assert np.array_equal(made, libgguf.quantize_rows(weight().numpy(), libgguf.GGMLQuantizationType[choice.type]))
    assert made.nbytes == GGUF.packed_nbytes(choice, SHAPE)
    assert made.nbytes * 8 / weight().numel() == GGUF.nominal_bits(choice)


@EVERY
def test_searched_takes_second_moments_as_importance(choice: GGUFChoice, hessians: tuple[Tensor, Tensor]) -> None:
    known_here = known(hessians[0], "searched")
    made = GGUF.quantize_packed(weight(), choice, known_here)["blocks"].numpy()
    moment = known_here.second_moment
    importance = (moment + 1e-6 * moment.mean()).numpy()
    kind = libgguf.GGMLQuantizationType[choice.type]
    assert np.array_equal(made, libgguf.quantize_rows(weight().numpy(), kind, importance))
    plain, searched = GGUF.fake_quantize(weight(), choice), GGUF.fake_quantize(weight(), choice, known_here)
    diagonal = torch.diag(moment)
    if choice.type != "Q8_0":  # has nothing to search
        assert error(searched, diagonal) < error(plain, diagonal)


@EVERY
def test_error_feedback_between_blocks_lowers_the_error_on_other_inputs(
    choice: GGUFChoice, hessians: tuple[Tensor, Tensor]
) -> None:
    searched, feedback = (GGUF.fake_quantize(weight(), choice, known(hessians[0], r)) for r in ("searched", "feedback"))
    assert error(feedback, hessians[1]) < 0.8 * error(searched, hessians[1])


def test_error_feedback_moves_a_block_by_what_the_others_leave() -> None:
    """Of two blocks the second is quantized as W_R + (W_B - W^_B) H_BR H_RR^-1, which minimises the output's error."""
    generator = torch.Generator().manual_seed(2)
    W, x = torch.randn(8, 64, generator=generator), torch.randn(512, 64, generator=generator)
    x[:, 32:] += x[:, :32]
    x[:, :32] *= 3  # the first block weighs more and comes first
    H = x.T @ x / 512
    choice, damped = GGUFChoice("Q4_0"), H + 0.01 * H.diagonal().mean() * torch.eye(64)
    importance = (H.diagonal() + 1e-6 * H.diagonal().mean()).numpy()
    first = libgguf.quantize_rows(W[:, :32].numpy(), 2, importance[:32])
    left = W[:, :32] - torch.from_numpy(libgguf.dequantize_rows(first, 2))
    moved = W[:, 32:] + left @ damped[:32, 32:] @ torch.linalg.inv(damped[32:, 32:])
    made = GGUF.fake_quantize(W, choice, known(H, "feedback"))
    assert torch.equal(made[:, :32], torch.from_numpy(libgguf.dequantize_rows(first, 2)))
    second = libgguf.dequantize_rows(libgguf.quantize_rows(moved.numpy(), 2, importance[32:]), 2)
    assert (made[:, 32:] - torch.from_numpy(second)).abs().max() < 1e-4


def test_a_row_of_one_block_has_nothing_to_feed_back(hessians: tuple[Tensor, Tensor]) -> None:
    W, H = weight()[:, :256], hessians[0][:256, :256]
    found = [
        GGUF.quantize(W, GGUFChoice("Q4_K"), known(H, rounding))["blocks"] for rounding in ("searched", "feedback")
    ]
    assert torch.equal(*found)


@EVERY
def test_decoding_by_libgguf_and_in_torch_is_the_same(choice: GGUFChoice, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = GGUF.quantize_packed(weight(), choice)
    fast = GGUF.dequantize(packed, choice, SHAPE)
    narrow = GGUF.dequantize(packed, choice, SHAPE, torch.bfloat16)
    monkeypatch.setattr(module, "find_spec", lambda name: None)  # as where the extra is not installed
    assert torch.equal(GGUF.dequantize(packed, choice, SHAPE), fast)
    assert torch.equal(narrow, fast.to(torch.bfloat16))
    assert torch.equal(decode_rows(packed["blocks"], TYPES[choice.type], torch.empty(SHAPE)), fast)
    transposed = torch.empty(SHAPE[::-1]).T
    GGUF.dequantize_packed(packed, choice, SHAPE, transposed)
    assert torch.equal(transposed, fast)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_decoding_on_a_gpu_is_the_same() -> None:
    for choice in GGUF.choices():
        packed = GGUF.quantize_packed(weight(), choice)
        there = GGUF.dequantize({"blocks": packed["blocks"].cuda()}, choice, SHAPE)
        assert torch.equal(there.cpu(), GGUF.dequantize(packed, choice, SHAPE))


def test_what_calibration_kept_is_read_and_not_made_again(hessians: tuple[Tensor, Tensor]) -> None:
    choice = GGUFChoice("Q2_K")
    kept = {"blocks": torch.full((24, 4 * 84), 1, dtype=torch.uint8)}
    state = GGUF.quantize(weight(), choice, known(hessians[0], packed={choice: kept}))
    assert torch.equal(state["blocks"], kept["blocks"])


def test_quantizing_twice_gives_the_same_bytes(hessians: tuple[Tensor, Tensor]) -> None:
    choices, statistics = GGUF.choices(), known(hessians[0])
    first, again = ([s["blocks"] for (s,) in GGUF.quantize_layers([weight()], choices, [statistics])] for _ in range(2))
    assert all(map(torch.equal, first, again))


def layer(name: str, rows: int, columns: int) -> TargetLayer:
    return TargetLayer(name, name, 0, (rows, columns), False)


def test_layers_take_the_types_that_their_rows_allow() -> None:
    layers = [layer("narrow", 64, 96), layer("wide", 96, 512)]
    space, allowed = layer_choices(layers, [Part("gguf")])
    assert [space.describe(k) for k in np.flatnonzero(allowed[0])] == ["Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    assert allowed[1].all()
    masters = [torch.randn(of.shape, generator=torch.Generator().manual_seed(3)) for of in layers]
    statistics = [InputStatistics(torch.ones(of.shape[1])) for of in layers]
    err = error_table(masters, statistics, space, allowed=allowed)
    tables = calibration_tables(layers, space, err, "")
    assert np.array_equal(tables.allowed, allowed)
    for C in allocate(tables.err, tables.search_cost, np.linspace(*tables.bits_range(), 9), allowed=tables.allowed):
        assert allowed[[0, 1], C].all()
    assert tables.bits_range()[0] == (64 * 96 * 4.5 + 96 * 512 * 2.5625) / (64 * 96 + 96 * 512)
    near = space.neighbours(1, allowed)
    q4_0, iq4_xs = (space.index(GGUFChoice(name)) for name in ("Q4_0", "IQ4_XS"))
    assert iq4_xs in near[q4_0]
    assert near[q4_0].max() < len(space)


def test_a_layer_that_no_type_fits_is_named() -> None:
    with pytest.raises(CoaloraError, match=r"odd of shape \(8, 40\) can take none of its choices"):
        fitting([layer("even", 8, 64), layer("odd", 8, 40)], ChoiceSpace("gguf"))
    with pytest.raises(CoaloraError, match="does not divide into blocks of 256"):
        GGUF.quantize(torch.randn(8, 96), GGUFChoice("Q2_K"))


def test_types_have_the_width_that_limits_on_bits_go_by() -> None:
    assert [choice.width for choice in GGUF.choices()] == [2, 2, 3, 3, 4, 4, 4, 4, 4, 5, 5, 5, 6, 8]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_weights_that_no_scale_reaches_are_refused(bad: float) -> None:
    W = weight()
    W[3, 5] = bad
    with pytest.raises(CoaloraError, match=r"NaN or infinite|beyond the fp16 scales"):
        GGUF.quantize(W, GGUFChoice("Q4_K"))


def test_features_that_never_fired_do_no_harm() -> None:
    moment = torch.zeros(SHAPE[1])
    moment[:10] = 1.0
    for choice in GGUF.choices():
        made = GGUF.fake_quantize(weight(), choice, InputStatistics(moment))
        assert float((made - weight()).square().mean()) < float(weight().square().mean())
        assert bool(torch.isfinite(GGUF.fake_quantize(torch.zeros(SHAPE), choice, InputStatistics(moment))).all())


def test_without_libgguf_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(CoaloraError, match=r"coalora\[gguf\]"):
        GGUF.require_packages()
    with pytest.raises(CoaloraError, match=r"coalora\[gguf\]"):
        GGUF.quantize(weight(), GGUFChoice("Q4_K"))


def test_blocks_of_another_choice_or_shape_are_refused() -> None:
    packed = GGUF.quantize_packed(weight(), GGUFChoice("Q4_K"))
    for choice, shape in ((GGUFChoice("Q5_K"), SHAPE), (GGUFChoice("Q4_K"), (24, 512))):
        with pytest.raises(CoaloraError, match="packed weight is not that of"):
            GGUF.unpack(packed, choice, shape)
    assert gguf.GGMLQuantizationType["Q4_K"] == libgguf.GGMLQuantizationType["Q4_K"]
