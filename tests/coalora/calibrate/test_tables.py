"""Tables: errors equal the formula, bits equal what packing stores."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from coalora.calibrate.tables import CalibrationTables, calibration_tables, error_table
from coalora.files import file_sha256
from coalora.models.switching.quantized import QuantizedBase
from coalora.models.targets import find_target_layers
from coalora.quant.scheme import InputStatistics
from coalora.quant.space import ChoiceSpace


@pytest.fixture(scope="module")
def tables(tiny_gpt2, tables_for) -> CalibrationTables:
    return tables_for(tiny_gpt2())


def test_errors_equal_the_formula_written_out(tiny_gpt2, small_space: ChoiceSpace) -> None:
    model = tiny_gpt2()
    layers = find_target_layers(model)
    weights = [layer.matrix(model.get_submodule(layer.name).weight.data) for layer in layers]
    moments = [torch.rand(layer.shape[1], generator=torch.Generator().manual_seed(1)) + 0.1 for layer in layers]
    err = error_table(weights, [InputStatistics(m, rounding="absmax") for m in moments], small_space)
    base = QuantizedBase(model, layers, small_space)
    for k in range(len(small_space)):
        base.switch(np.full(len(layers), k))
        for index, layer in enumerate(layers):
            W = base.masters[index].double().numpy()
            q = layer.matrix(model.get_submodule(layer.name).weight.data).double().numpy()
            m = moments[index].double().numpy()
            naive = ((W - q) ** 2 * m).sum() / (W**2 * m).sum()
            assert err[index, k] == pytest.approx(naive, rel=1e-4)


def test_errors_predict_the_output_error_for_uncorrelated_inputs(small_space: ChoiceSpace) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(24, 40, generator=generator)
    scale = torch.rand(40, generator=generator) * 3
    x = torch.randn(20_000, 40, generator=generator) * scale
    err = error_table([W], [InputStatistics(x.square().mean(0), rounding="absmax")], small_space)[0]
    for k, choice in enumerate(small_space.choices):
        residual = x @ (W - small_space.scheme.fake_quantize(W, choice)).T
        assert err[k] == pytest.approx(float(residual.square().mean() / (x @ W.T).square().mean()), rel=0.1)


def _correlated(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4000, n, generator=generator) @ torch.randn(n, n, generator=generator)


def test_with_a_hessian_errors_are_those_of_the_output_itself_however_inputs_correlate(small_space) -> None:
    W, x = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)), _correlated(40)
    moment = x.square().mean(0)
    err = error_table([W], [InputStatistics(moment, x.T @ x / len(x), "absmax")], small_space)[0]
    diagonal = error_table([W], [InputStatistics(moment, rounding="absmax")], small_space)[0]
    for k, choice in enumerate(small_space.choices):
        residual = x.double() @ (W - small_space.scheme.fake_quantize(W, choice)).double().T
        exact = float(residual.square().mean() / (x.double() @ W.double().T).square().mean())
        assert err[k] == pytest.approx(exact, rel=1e-4)
    assert np.abs(diagonal / err - 1).max() > 0.01


def test_a_diagonal_hessian_gives_the_error_of_the_moments_alone(small_space: ChoiceSpace) -> None:
    W = torch.randn(24, 40, generator=torch.Generator().manual_seed(6))
    moment = torch.rand(40, generator=torch.Generator().manual_seed(7))
    moment[3] = 0  # counts a little in both
    err = error_table([W, W], [InputStatistics(moment, H, "absmax") for H in (None, moment.diag())], small_space)
    np.testing.assert_allclose(err[1], err[0], rtol=1e-5)


def test_measuring_errors_changes_neither_weights_nor_statistics(small_space: ChoiceSpace) -> None:
    W, x = torch.randn(8, 40, generator=torch.Generator().manual_seed(8)), _correlated(40)
    known = InputStatistics(x.square().mean(0), x.T @ x)
    before = W.clone(), known.second_moment.clone(), known.hessian.clone()
    error_table([W], [known], small_space)
    assert all(torch.equal(a, b) for a, b in zip(before, (W, known.second_moment, known.hessian), strict=True))


def test_errors_are_those_of_the_weights_that_are_kept_whatever_the_rounding(small_space: ChoiceSpace) -> None:
    W, x = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)), _correlated(40)
    errors = {}
    for rounding in ("absmax", "searched", "feedback"):
        known = InputStatistics(x.square().mean(0), x.T @ x / len(x), rounding)
        errors[rounding] = error_table([W], [known], small_space, keep=True)[0]
        assert list(known.packed) == list(small_space.choices)
        for k, choice in enumerate(small_space.choices):
            scheme = small_space.scheme
            kept = scheme.dequantize(scheme.unpack(known.packed[choice], choice, W.shape), choice, W.shape)
            exact = float((x @ (W - kept).T).square().mean() / (x @ W.T).square().mean())
            assert errors[rounding][k] == pytest.approx(exact, rel=1e-3)
            # What is kept is read, not made again: a zero weight would give zeros.
            assert torch.equal(scheme.fake_quantize(torch.zeros_like(W), choice, known), kept)
    low = [k for k, choice in enumerate(small_space.choices) if choice.bits < 8]  # type: ignore[attr-defined]
    assert (errors["searched"][low] < errors["absmax"][low]).mean() > 0.9
    assert (errors["feedback"][low] < errors["searched"][low]).all()


def test_errors_fall_with_bits_and_rise_with_block_size(tables: CalibrationTables) -> None:
    by = {(c.bits, c.block_size): tables.err[:, k] for k, c in enumerate(tables.space.choices)}  # type: ignore[attr-defined]
    for block_size in (16, 64):
        for low, high in ((2, 3), (3, 4), (4, 8)):
            assert np.all(by[low, block_size] > by[high, block_size])
    for bits in (2, 3, 4):
        assert np.all(by[bits, 64] > by[bits, 16])


def test_the_error_is_relative_and_does_not_depend_on_units(small_space: ChoiceSpace) -> None:
    W = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    moment = torch.rand(32, generator=torch.Generator().manual_seed(3))
    err = error_table([W, W * 4, W], [InputStatistics(m) for m in (moment, moment, moment * 1000)], small_space)
    np.testing.assert_allclose(err[1], err[0], rtol=1e-2)
    np.testing.assert_allclose(err[2], err[0], rtol=1e-5)


def test_a_feature_that_never_fires_still_counts_a_little(small_space: ChoiceSpace) -> None:
    # One dead column beside live ones that quantize exactly (all zero): its error is all there is.
    W = torch.zeros(8, 16)
    W[:, 0] = torch.randn(8, generator=torch.Generator().manual_seed(4))
    moment = torch.ones(16)
    moment[0] = 0
    err = error_table([W], [InputStatistics(moment)], ChoiceSpace("nf", bits=[2], block_size=[64], scale_bits=[2]))
    assert np.all(err > 0)


def test_a_layer_of_zeros_has_no_error(small_space: ChoiceSpace) -> None:
    assert np.all(error_table([torch.zeros(4, 16)], [InputStatistics(torch.ones(16))], small_space) == 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_bytes_are_those_of_the_packed_tensors(tiny_models, tables_for, small_space: ChoiceSpace, family: str) -> None:
    model = tiny_models[family]()
    tables = tables_for(model)
    scheme = small_space.scheme
    for index, layer in enumerate(tables.layers):
        W = layer.matrix(model.get_submodule(layer.name).weight.data).contiguous()
        for k, choice in enumerate(small_space.choices):
            packed = scheme.pack(scheme.quantize(W, choice), choice, layer.shape)
            assert tables.nbytes[index, k] == sum(tensor.nbytes for tensor in packed.values())


def test_average_bits_are_bytes_over_weights_and_a_sum_over_layers(
    tables: CalibrationTables, random_configurations
) -> None:
    C = random_configurations(tables, 12).reshape(3, 4, -1)
    P = sum(layer.shape[0] * layer.shape[1] for layer in tables.layers)
    assert tables.n_weights == P
    bits = tables.average_bits(C)
    assert bits.shape == (3, 4)
    for i, j in np.ndindex(3, 4):
        nbytes = sum(int(tables.nbytes[index, k]) for index, k in enumerate(C[i, j]))
        assert tables.total_nbytes(C)[i, j] == nbytes
        assert bits[i, j] == nbytes * 8 / P
        assert sum(tables.bits[index, k] for index, k in enumerate(C[i, j])) == pytest.approx(bits[i, j], rel=1e-12)


def test_the_range_of_bits_is_reached_by_the_cheapest_and_the_dearest_choices(tables: CalibrationTables) -> None:
    low, high = tables.bits_range()
    assert low == tables.average_bits(tables.nbytes.argmin(1))
    assert high == tables.average_bits(tables.nbytes.argmax(1))
    assert 2 < low < high < 9


def test_tables_round_trip_with_stable_bytes(tmp_path: Path, tables: CalibrationTables) -> None:
    tables.save(tmp_path / "a.safetensors")
    back = CalibrationTables.load(tmp_path / "a.safetensors")
    assert (back.layers, back.space, back.base_digest) == (tables.layers, tables.space, tables.base_digest)
    for name in ("nbytes", "err"):
        np.testing.assert_array_equal(getattr(back, name), getattr(tables, name))
        assert getattr(back, name).dtype == getattr(tables, name).dtype
    back.save(tmp_path / "b.safetensors")
    assert file_sha256(tmp_path / "a.safetensors") == file_sha256(tmp_path / "b.safetensors")
    dataclasses.replace(tables, base_digest="1").save(tmp_path / "b.safetensors")
    assert file_sha256(tmp_path / "a.safetensors") != file_sha256(tmp_path / "b.safetensors")


def test_layers_weights_and_moments_must_be_as_many(small_space: ChoiceSpace) -> None:
    with pytest.raises(ValueError, match="zip"):
        error_table([torch.ones(2, 16)], [], small_space)


def test_progress_counts_layers_and_choices(small_space: ChoiceSpace) -> None:
    seen: list[tuple[int, int]] = []
    error_table(
        [torch.ones(2, 16), torch.ones(3, 16)],
        [InputStatistics(torch.ones(16))] * 2,
        small_space,
        progress=lambda *x: seen.append(x),
    )
    total = 2 * len(small_space)
    assert seen == [(i + 1, total) for i in range(total)]


def _to_quantize() -> tuple[list[torch.Tensor], list[InputStatistics]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 32, generator=generator) for rows in (8, 8, 8, 24, 24, 8)]
    inputs = [torch.randn(64, 32, generator=generator) for _ in weights]
    return weights, [InputStatistics(x.square().mean(0), x.T @ x / len(x), "feedback") for x in inputs]


def test_threads_change_neither_errors_nor_what_is_stored(small_space: ChoiceSpace, two_threads, monkeypatch) -> None:
    found = []
    for threads in (2, 1):
        monkeypatch.setattr("coalora.calibrate.tables.n_threads", lambda device, threads=threads: threads)
        weights, known = _to_quantize()
        found.append((error_table(weights, known, small_space, keep=True), [one.packed for one in known]))
    (err, packed), (alone, packed_alone) = found
    assert np.array_equal(err, alone)
    for own, other in zip(packed, packed_alone, strict=True):
        assert own.keys() == other.keys() == set(small_space.choices)
        for choice in own:
            assert all(torch.equal(own[choice][part], other[choice][part]) for part in own[choice])


def test_an_interrupt_ends_all_threads_at_their_next_choice(small_space: ChoiceSpace, two_threads) -> None:
    told: list[int] = []

    def interrupted(done: int, total: int) -> None:
        told.append(done)
        if len(told) == 2:
            raise KeyboardInterrupt

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        error_table(*_to_quantize(), small_space, progress=interrupted)
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    assert len(told) == 2


def test_joining_keeps_errors_and_digest(tiny_llama, small_space: ChoiceSpace) -> None:
    layers = find_target_layers(tiny_llama())
    err = np.random.default_rng(0).random((len(layers), len(small_space)))
    tables = calibration_tables(layers, small_space, err, "abc")
    assert tables.err is err
    assert tables.base_digest == "abc"
    assert tables.nbytes.shape == err.shape
    assert tables.nbytes.dtype == np.int64
