"""Input statistics: equal to computing them one example at a time, without padding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from coalora.calibrate.statistics import collect_statistics, load_statistics, save_statistics
from coalora.calibrate.tables import error_table
from coalora.data.benchmark import Split, pad
from coalora.errors import CoaloraError
from coalora.models.targets import find_target_layers

LENGTHS = (3, 11, 7, 1, 5)


@pytest.fixture(scope="module")
def split() -> Split:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 320, (n,), generator=generator).tolist() for n in LENGTHS]
    return pad(sequences, 1, [0, 1, 0, 1, 0])


@torch.no_grad()
def _naive(model, layers, split: Split) -> list[torch.Tensor]:
    """One unpadded example at a time, every input kept."""
    inputs: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, x, rows=rows: rows.append(x[0].double().flatten(0, -2))
        )
        for name, rows in inputs.items()
    ]
    for row, n in zip(split.input_ids, split.lengths, strict=True):
        model(input_ids=row[None, :n])
    for handle in handles:
        handle.remove()
    return [torch.cat(inputs[layer.name]).square().mean(0) for layer in layers]


def _moments(model, layers, split: Split, batch_size: int) -> list[torch.Tensor]:
    return [known.second_moment for known in collect_statistics(model, layers, split, batch_size=batch_size)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_moments_are_the_mean_over_tokens_without_padding(
    tiny_models, split: Split, family: str, batch_size: int
) -> None:
    model = tiny_models[family]()
    layers = find_target_layers(model)
    moments = _moments(model, layers, split, batch_size)
    for layer, moment, expected in zip(layers, moments, _naive(model, layers, split), strict=True):
        assert moment.shape == (layer.shape[1],)
        assert moment.dtype == torch.float32
        torch.testing.assert_close(moment.double(), expected, rtol=1e-4, atol=1e-7, msg=f"{family} {layer.name}")


def test_padding_would_have_made_a_difference(tiny_llama, split: Split) -> None:
    model = tiny_llama()
    layers = find_target_layers(model)
    moments = _moments(model, layers, split, 5)
    unmasked = dataclasses.replace(split, lengths=torch.full((5,), 11))
    counted = _moments(model, layers, unmasked, 5)
    assert not torch.allclose(moments[0], counted[0], rtol=0.01)


def test_a_layer_that_sees_one_vector_an_example_is_averaged_over_examples(tiny_bert_classifier, split: Split) -> None:
    model = tiny_bert_classifier()
    layers = find_target_layers(model, ["bert.pooler.dense", "attention.self.query"])
    moments = _moments(model, layers, split, 2)
    for moment, expected in zip(moments, _naive(model, layers, split), strict=True):
        torch.testing.assert_close(moment.double(), expected, rtol=1e-4, atol=1e-7)


def test_hooks_are_gone_afterwards_even_after_an_error(tiny_llama, split: Split) -> None:
    model = tiny_llama()
    layers = find_target_layers(model)
    collect_statistics(model, layers, split, batch_size=5)
    wrong = dataclasses.replace(split, input_ids=split.input_ids + 10_000)
    with pytest.raises(IndexError):
        collect_statistics(model, layers, wrong, batch_size=5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_activations_that_are_not_finite_are_refused_with_the_layer(tiny_llama, split: Split) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.gate_proj.weight.data.fill_(float("nan"))
    with pytest.raises(CoaloraError, match=r"model\.layers\.1\.mlp\.down_proj was fed NaN or infinity"):
        collect_statistics(model, find_target_layers(model), split, batch_size=5)


def test_a_layer_that_no_input_reaches_is_refused(tiny_llama, split: Split) -> None:
    model = tiny_llama()
    model.spare = torch.nn.Linear(4, 4)
    with pytest.raises(CoaloraError, match="spare was fed nothing in 5 examples"):
        collect_statistics(model, find_target_layers(model, ["q_proj", "spare"]), split, batch_size=5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_hessian_has_the_moments_on_its_diagonal_and_is_that_of_one_pass(tiny_models, split, family: str) -> None:
    model = tiny_models[family]()
    layers = find_target_layers(model)
    for known in collect_statistics(model, layers, split, batch_size=2, hessians=True):
        torch.testing.assert_close(known.hessian.diagonal(), known.second_moment, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(known.hessian, known.hessian.T)


def test_statistics_read_back_what_was_saved_and_refuse_layers_they_lack(
    tiny_llama, split: Split, tmp_path, small_space
) -> None:
    model = tiny_llama()
    layers = find_target_layers(model)
    known = collect_statistics(model, layers[:2], split, batch_size=5, hessians=True)
    known = [dataclasses.replace(one, rounding="feedback") for one in known]
    weights = [model.get_submodule(layer.name).weight.data for layer in layers[:2]]
    error_table(weights, known, small_space, keep=True)
    save_statistics(tmp_path, layers[:2], known, small_space)
    for read, saved in zip(load_statistics(tmp_path, layers[:2], small_space), known, strict=True):
        assert torch.equal(read.second_moment, saved.second_moment)
        assert torch.equal(read.hessian, saved.hessian)
        assert read.rounding == "feedback"
        assert len(read.packed) == len(small_space)
        assert list(read.packed) == list(saved.packed)
        for choice, parts in saved.packed.items():
            assert all(torch.equal(read.packed[choice][part], tensor) for part, tensor in parts.items())
    with pytest.raises(CoaloraError, match=r"no statistics of model\.layers\.0"):
        load_statistics(tmp_path, layers, small_space)
