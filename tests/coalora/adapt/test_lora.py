"""(I + U) A inside PEFT's own layers, equal to the adapter that would be folded and exported by hand."""

from __future__ import annotations

import pytest
import torch

from coalora.adapt.lora import AdjustedLinear, attach, fold, lora_config
from coalora.models.targets import find_target_layers

FAMILIES = ["llama", "qwen2", "mistral", "gpt2"]
IDS = torch.arange(2 * 7).view(2, 7)


def lora_layers(peft_model: torch.nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, m in peft_model.named_modules() if hasattr(m, "lora_A")}


def test_fold_is_the_formula_and_plain_without_adjustment() -> None:
    generator = torch.Generator().manual_seed(0)
    A, U = torch.randn(3, 5, generator=generator), torch.randn(3, 3, generator=generator)
    torch.testing.assert_close(fold(A, U), (torch.eye(3) + U) @ A)
    assert fold(A, None) is A
    assert torch.equal(fold(A, torch.zeros(3, 3)), A)


def test_fold_keeps_the_type_of_lora_A() -> None:
    assert fold(torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_compute_the_formula(tiny_models, family) -> None:
    """y = W x + bias + s B (I + U) A x, on PEFT's layer itself."""
    model = tiny_models[family]()
    layers = find_target_layers(model)
    peft_model, lora_A, _ = attach(
        model, layers, lora_config(layers, "language-modeling", ranks=[4] * len(layers), scale=1.5), seed=0
    )
    generator = torch.Generator().manual_seed(1)
    for layer, a in zip(layers, lora_A, strict=True):
        module = peft_model.get_base_model().get_submodule(layer.name)
        B = module.lora_B["default"].weight
        B.data = torch.randn(B.shape, generator=generator)
        a.U = torch.randn(4, 4, generator=generator)
        x = torch.randn(3, layer.shape[1], generator=generator)
        W, bias = layer.matrix(module.base_layer.weight), getattr(module.base_layer, "bias", None)
        y = x @ W.T + (0 if bias is None else bias) + 6 / 4 * x @ a.weight.T @ (torch.eye(4) + a.U).T @ B.T
        torch.testing.assert_close(module(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adjusted_adapter_equals_one_folded_by_hand(tiny_models, family) -> None:
    logits = []
    for by_hand in (False, True):
        model = tiny_models[family]()
        layers = find_target_layers(model)
        peft_model, lora_A, _ = attach(
            model, layers, lora_config(layers, "language-modeling", ranks=[4] * len(layers), scale=1.5), seed=0
        )
        generator = torch.Generator().manual_seed(1)
        for layer, a in zip(layers, lora_A, strict=True):
            B = peft_model.get_base_model().get_submodule(layer.name).lora_B["default"].weight
            B.data = 0.1 * torch.randn(B.shape, generator=generator)
            U = torch.randn(4, 4, generator=generator)
            if by_hand:
                a.weight.data = (torch.eye(4) + U) @ a.weight.data
            else:
                a.U = U
        logits.append(peft_model(IDS).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[0], tiny_models[family]()(IDS).logits, atol=1e-2)


def test_zero_U_gives_exactly_the_plain_adapter(tiny_llama) -> None:
    model = tiny_llama()
    layers = find_target_layers(model)
    peft_model, lora_A, _ = attach(
        model, layers, lora_config(layers, "language-modeling", ranks=[4] * len(layers), scale=1.5), seed=0
    )
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    plain = peft_model(IDS).logits
    for a in lora_A:
        a.U = torch.zeros(4, 4)
    assert torch.equal(peft_model(IDS).logits, plain)


def test_exactly_the_target_layers_are_wrapped(tiny_llama) -> None:
    # More than 20 targets, where PEFT shortens the list of names to suffixes of its own.
    model = tiny_llama(num_hidden_layers=4)
    layers = [x for x in find_target_layers(model) if (x.block, x.kind) != (2, "self_attn.q_proj")]
    assert len(layers) == 27
    peft_model, lora_A, _ = attach(
        model, layers, lora_config(layers, "language-modeling", ranks=[2] * len(layers), scale=1.0), seed=0
    )
    assert lora_layers(peft_model) == {layer.name for layer in layers}
    assert [a.in_features for a in lora_A] == [layer.shape[1] for layer in layers]
    assert all(isinstance(a, AdjustedLinear) for a in lora_A)


def test_same_seed_gives_the_same_adapter_and_another_seed_another(tiny_llama) -> None:
    def start(seed: int) -> torch.Tensor:
        model = tiny_llama()
        layers = find_target_layers(model)
        _, lora_A, _ = attach(
            model, layers, lora_config(layers, "language-modeling", ranks=[4] * len(layers), scale=1.0), seed=seed
        )
        return torch.cat([a.weight.flatten() for a in lora_A])

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))
