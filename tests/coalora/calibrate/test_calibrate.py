"""Calibration by parts: the same tables and weights as of the whole model, resumed where it broke off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coalora.calibrate import calibrate as module
from coalora.calibrate.calibrate import calibrate, stand_ins
from coalora.calibrate.statistics import collect_statistics
from coalora.data.benchmark import Split
from coalora.models.targets import find_target_layers
from coalora.quant.space import ChoiceSpace
from coalora.recipes import CalibrationRecipe

BLOCKS = 3


def _calibrate(model, split: Split, space, *, checkpoint_dir: Path | None = None, progress=None, **recipe: Any):
    recipe = {"n_samples": 6, "batch_size": 3, "hessians_mb": 0, **recipe}
    return calibrate(
        model, find_target_layers(model), split, space, CalibrationRecipe(**recipe), base_digest="0" * 64,
        checkpoint_dir=checkpoint_dir, progress=progress,
    )  # fmt: skip


def _same(one: tuple, other: tuple) -> None:
    np.testing.assert_array_equal(one[0].err, other[0].err)
    for a, b in zip(one[1], other[1], strict=True):
        assert torch.equal(a.second_moment, b.second_moment)
        assert a.hessian is b.hessian is None or torch.equal(a.hessian, b.hessian)
        assert list(a.packed) == list(b.packed)
        for choice in a.packed:
            assert all(torch.equal(tensor, b.packed[choice][name]) for name, tensor in a.packed[choice].items())


@pytest.fixture(scope="module")
def space() -> ChoiceSpace:
    return ChoiceSpace("int", bits=[2, 4], group_size=[32], mode=["asym"])


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=BLOCKS)


@pytest.mark.parametrize("rounding", ["absmax", "feedback"])
def test_tables_statistics_and_weights_are_those_of_the_whole_model(model, text_split, space, rounding) -> None:
    parts = _calibrate(model, text_split, space, rounding=rounding)
    _same(parts, _calibrate(model, text_split, space, rounding=rounding, hessians_mb=1000))


@pytest.mark.parametrize("inputs", ["original", "quantized"])
def test_a_call_that_broke_off_goes_on_with_the_part_behind_the_last_whole_one(
    model, text_split, space, tmp_path, monkeypatch, inputs
) -> None:
    undisturbed = _calibrate(model, text_split, space, inputs=inputs)
    quantized: list[int] = []
    table = module.error_table

    def counting(weights, *arguments, **options):
        if len(quantized) == 2:
            raise KeyboardInterrupt
        quantized.append(len(weights))
        return table(weights, *arguments, **options)

    monkeypatch.setattr(module, "error_table", counting)
    with pytest.raises(KeyboardInterrupt):
        _calibrate(model, text_split, space, inputs=inputs, checkpoint_dir=tmp_path)
    assert len(list(tmp_path.glob("*/hidden.safetensors"))) == 1  # that of the last part alone
    quantized[:] = [0, 0, 0]
    told: list[tuple[int, int]] = []
    resumed = _calibrate(
        model, text_split, space, inputs=inputs, checkpoint_dir=tmp_path,
        progress=lambda what: lambda *done: told.append(done),
    )  # fmt: skip
    assert len(quantized) == 3 + BLOCKS - 2
    assert told == [(n + 1, BLOCKS) for n in range(BLOCKS)]
    _same(resumed, undisturbed)


def test_another_call_does_not_go_on_from_its_parts(model, text_split, space, tmp_path) -> None:
    first = _calibrate(model, text_split, space, checkpoint_dir=tmp_path)
    other = _calibrate(model, text_split, space, checkpoint_dir=tmp_path, n_samples=5)
    assert not torch.equal(first[1][0].second_moment, other[1][0].second_moment)
    _same(other, _calibrate(model, text_split, space, n_samples=5))


def test_quantized_inputs_are_what_the_quantized_blocks_before_put_out(model, text_split, space) -> None:
    layers = find_target_layers(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    original = _calibrate(model, text_split, space)[1]
    tables, found = _calibrate(model, text_split, space, inputs="quantized")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    chosen = stand_ins(layers, space, tables.allowed)
    at = next(i for i, layer in enumerate(layers) if layer.block == 2)
    for i, layer in enumerate(layers[:at]):  # what blocks 0 and 1 are while block 2 is calibrated
        weight = layer.matrix(model.get_submodule(layer.name).weight.data)
        choice = space.choices[chosen[i]]
        weight.copy_(space.scheme.fake_quantize(weight.clone(), choice, found[i]))
    own = [i for i, layer in enumerate(layers) if layer.block == 2]
    expected = collect_statistics(model, [layers[i] for i in own], text_split.apart(6), batch_size=3, hessians=True)
    for i, known in zip(own, expected, strict=True):
        assert torch.equal(found[i].hessian, known.hessian)
    assert torch.equal(found[0].hessian, original[0].hessian)  # nothing stands before the first block
    assert not torch.allclose(found[at].hessian, original[at].hessian, rtol=0.01)


def test_hessians_that_only_the_rounding_needs_are_put_away_with_it(model, text_split, space) -> None:
    _, found = _calibrate(model, text_split, space, hessians=False, rounding="feedback")
    assert all(known.hessian is None and len(known.packed) == len(space) for known in found)
    assert all(known.hessian is not None for known in _calibrate(model, text_split, space)[1])
