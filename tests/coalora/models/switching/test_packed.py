"""Packed layers: the same numbers as ordinary ones, in forward and backward, from a fraction of the memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from coalora.adapt.adapted import AdaptedModel
from coalora.cache import nbytes
from coalora.errors import CoaloraError
from coalora.models.switching.packed import pack_layer
from coalora.models.switching.quantized import QuantizedBase
from coalora.models.targets import find_target_layers
from coalora.recipes import AdapterRecipe

CPU = torch.device("cpu")
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])


def configurations(n_layers: int, n_choices: int) -> np.ndarray:
    return np.random.default_rng(5).integers(n_choices, size=(2, n_layers))


def adapted(model: nn.Module, space, **memory) -> AdaptedModel:
    layers = find_target_layers(model)
    task = "classification" if "Classification" in type(model).__name__ else "language-modeling"
    made = AdaptedModel(
        model,
        layers,
        space,
        task,
        method="coa",
        recipe=AdapterRecipe(r=4, lora_alpha=6, compensation_rank=0, expert_bits=0),
        seed=0,
        **memory,
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in made.named_parameters().values():  # lora_B and theta's last layer start at zero
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    made.peft_model.train()
    return made


def loss_of(model: AdaptedModel) -> torch.Tensor:
    ids = torch.arange(12).view(2, 6) + 5
    is_classifier = "Classification" in type(model.peft_model.get_base_model()).__name__
    return model.peft_model(input_ids=ids, labels=torch.tensor([0, 1]) if is_classifier else ids).loss


@FAMILIES
@pytest.mark.parametrize("master", ["device", "cpu"])
def test_losses_and_gradients_are_bit_for_bit_those_of_dequantized_weights(
    tiny_models, small_space, family: str, master: str
) -> None:
    plain = adapted(tiny_models[family](), small_space)
    packed = adapted(tiny_models[family](), small_space, weights="packed", master=master)
    for C in configurations(len(plain.layers), len(small_space)):
        values = []
        for model in (plain, packed):
            model.switch(C)
            loss = loss_of(model)
            loss.backward()
            values.append(loss.detach())
        assert torch.equal(*values)
    gradients = [{k: p.grad for k, p in model.named_parameters().items()} for model in (plain, packed)]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert bool(gradient.abs().max() > 0), name


@FAMILIES
def test_restoring_gives_the_full_precision_model(tiny_models, small_space, family: str) -> None:
    original, model = tiny_models[family](), tiny_models[family]()
    base = QuantizedBase(model, find_target_layers(model), small_space, weights="packed")
    ids = torch.arange(12).view(2, 6) + 5
    C = configurations(len(base.layers), len(small_space))[0]
    with torch.no_grad():
        expected = original(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
        base.switch(C)
        assert not torch.equal(model(input_ids=ids).logits, expected)
        base.restore()
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_switch_between_forward_and_backward_does_not_change_the_gradient(tiny_llama, small_space) -> None:
    gradients = []
    for disturbed in (False, True):
        model = adapted(tiny_llama(), small_space, weights="packed", cache_bytes=0)
        first, second = configurations(len(model.layers), len(small_space))
        model.switch(first)
        loss = loss_of(model)
        if disturbed:
            model.base.switch(second)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.named_parameters().values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_autograd_keeps_no_dequantized_weight(tiny_llama, small_space) -> None:
    shapes = []
    for memory in ({}, {"weights": "packed"}):
        model = adapted(tiny_llama(), small_space, **memory)
        model.switch(configurations(len(model.layers), len(small_space))[0])
        targets = {layer.shape for layer in model.layers} | {layer.shape[::-1] for layer in model.layers}
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved: kept.append(t) or t, lambda t: t):
            loss_of(model)
        shapes.append([tuple(t.shape) for t in saved if tuple(t.shape) in targets])
    ordinary, packed = shapes
    assert len(ordinary) == len(model.layers)
    assert packed == []


@pytest.mark.parametrize("master", ["device", "cpu"])
def test_held_bytes_are_those_of_the_configuration_and_the_cache_limit(tiny_llama, small_space, master: str) -> None:
    model = tiny_llama()
    layers = find_target_layers(model)
    limit = 20_000
    base = QuantizedBase(model, layers, small_space, weights="packed", master=master, cache_bytes=limit)
    hollow = nbytes(model.get_submodule(layer.name).weight for layer in layers)
    assert hollow == 4 * len(layers)
    masters = sum(layer.n_weights * 4 for layer in layers)
    for k in range(len(small_space)):
        base.switch(np.full(len(layers), k))
        stored = sum(small_space.scheme.packed_nbytes(small_space.choices[k], layer.shape) for layer in layers)
        held = nbytes(base.held()) - masters
        assert stored <= held <= stored + limit
    assert base.cache.nbytes > limit / 2  # the limit was what held it back


def test_the_hollow_weight_is_nan_for_whoever_computes_with_it(tiny_llama, small_space) -> None:
    model = tiny_llama()
    layers = find_target_layers(model)
    QuantizedBase(model, layers, small_space, weights="packed")
    weight = model.get_submodule(layers[0].name).weight
    assert weight.shape == layers[0].shape
    assert bool(torch.isnan(weight).all())


def test_biases_that_are_trained_get_their_gradients() -> None:
    for module in (nn.Linear(5, 3), Conv1D(3, 5)):
        weight = module.weight.detach().clone()
        module.weight.requires_grad_(False)
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
        module(x).square().sum().backward()
        expected, module.bias.grad = module.bias.grad, None
        pack_layer(module, lambda kept=weight: lambda: kept, CPU)
        module(x).square().sum().backward()
        torch.testing.assert_close(module.bias.grad, expected)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(CoaloraError, match="Bilinear cannot be packed"):
        pack_layer(nn.Bilinear(2, 2, 2), lambda: lambda: torch.zeros(2, 2), CPU)
    with pytest.raises(CoaloraError, match="requires a gradient"):
        pack_layer(nn.Linear(2, 2), lambda: lambda: torch.zeros(2, 2), CPU)
