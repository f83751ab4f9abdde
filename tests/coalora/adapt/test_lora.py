"""(I + U) A inside PEFT's own layers, equal to the adapter that would be folded and exported by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model

from coalora.adapt.lora import EffectiveLinear, Product, attach, lora_config
from coalora.models.targets import find_target_layers

FAMILIES = ["llama", "qwen2", "mistral", "gpt2"]
IDS = torch.arange(2 * 7).view(2, 7)


def attached(model, layers, *, rank: int = 4, scale: float = 1.5, seed: int = 0):
    config = lora_config(layers, "language-modeling", ranks=[rank] * len(layers), scale=scale)
    return attach(model, layers, config, scale=scale, seed=seed)


def lora_layers(peft_model: torch.nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, m in peft_model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_compute_the_formula(tiny_models, family) -> None:
    """y = W x + bias + s B (I + U) A x, on PEFT's layer itself."""
    model = tiny_models[family]()
    layers = find_target_layers(model)
    peft_model, lora_A, _, terms = attached(model, layers, rank=4, scale=1.5)
    generator = torch.Generator().manual_seed(1)
    terms.set(torch.randn(len(layers), 4, 4, generator=generator))
    for layer, a in zip(layers, lora_A, strict=True):
        module = peft_model.get_base_model().get_submodule(layer.name)
        B = module.lora_B["default"].weight
        B.data = torch.randn(B.shape, generator=generator)
        x = torch.randn(3, layer.shape[1], generator=generator)
        W, bias = layer.matrix(module.base_layer.weight), getattr(module.base_layer, "bias", None)
        y = x @ W.T + (0 if bias is None else bias) + 6 / 4 * x @ a.weight.T @ (torch.eye(4) + terms.U[a.index]).T @ B.T
        torch.testing.assert_close(module(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adjusted_adapter_equals_one_folded_by_hand(tiny_models, family) -> None:
    logits = []
    for by_hand in (False, True):
        model = tiny_models[family]()
        layers = find_target_layers(model)
        peft_model, lora_A, _, terms = attached(model, layers)
        generator = torch.Generator().manual_seed(1)
        U = torch.randn(len(layers), 4, 4, generator=generator)
        for layer, a, u in zip(layers, lora_A, U, strict=True):
            B = peft_model.get_base_model().get_submodule(layer.name).lora_B["default"].weight
            B.data = 0.1 * torch.randn(B.shape, generator=generator)
            if by_hand:
                a.weight.data = (torch.eye(4) + u) @ a.weight.data
        terms.set(None if by_hand else U)
        logits.append(peft_model(IDS).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[0], tiny_models[family]()(IDS).logits, atol=1e-2)


def test_zero_U_gives_exactly_the_plain_adapter(tiny_llama) -> None:
    model = tiny_llama()
    layers = find_target_layers(model)
    peft_model, _, _, terms = attached(model, layers, rank=4, scale=1.5)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    plain = peft_model(IDS).logits
    terms.set(torch.zeros(len(layers), 4, 4))
    assert torch.equal(peft_model(IDS).logits, plain)


def test_exactly_the_target_layers_are_wrapped(tiny_llama) -> None:
    # More than 20 targets, where PEFT shortens the list of names to suffixes of its own.
    model = tiny_llama(num_hidden_layers=4)
    layers = [x for x in find_target_layers(model) if (x.block, x.kind) != (2, "self_attn.q_proj")]
    assert len(layers) == 27
    peft_model, lora_A, _, _ = attached(model, layers, rank=2, scale=1.0)
    assert lora_layers(peft_model) == {layer.name for layer in layers}
    assert [a.in_features for a in lora_A] == [layer.shape[1] for layer in layers]
    assert all(isinstance(a, EffectiveLinear) for a in lora_A)


def test_same_seed_gives_the_same_adapter_and_another_seed_another(tiny_llama) -> None:
    def start(seed: int) -> torch.Tensor:
        model = tiny_llama()
        layers = find_target_layers(model)
        _, lora_A, _, _ = attached(model, layers, seed=seed)
        return torch.cat([a.weight.flatten() for a in lora_A])

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_gradients_of_a_layer_s_function_are_those_of_its_formula(biased, transposed) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x, A, B, bias, W = draw(2, 3, 5), draw(2, 5), draw(4, 2), draw(4) if biased else None, draw(4, 5)
    given = [tensor.requires_grad_() for tensor in (x, A, B)] + ([bias.requires_grad_()] if biased else [])

    def product(x, A, B, bias=None):
        return Product.apply(x, bias, A, B, W.t().contiguous() if transposed else W, None, transposed, 1.5)

    formula = x @ W.T + 1.5 * x @ A.T @ B.T + (bias if biased else 0)
    torch.testing.assert_close(product(*given), formula)
    assert torch.autograd.gradcheck(product, given)


def outputs_and_gradients(peft_model) -> list[torch.Tensor]:
    peft_model.zero_grad()
    out = peft_model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return [out.logits, *(p.grad for name, p in sorted(peft_model.named_parameters()) if "lora_" in name)]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_equal_those_of_stock_peft(tiny_models, family) -> None:
    model = tiny_models[family]()
    layers = find_target_layers(model)
    config = lora_config(layers, "language-modeling", ranks=[4] * len(layers), scale=1.5)
    ours, *_ = attached(model, layers)
    stock = get_peft_model(tiny_models[family](), config)
    assert {type(m).__name__ for m in ours.modules()} - {type(m).__name__ for m in stock.modules()} == {
        "AdaptedLinear", "EffectiveLinear",
    }  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    for (name, own), (stock_name, theirs) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        assert name == stock_name
        if "lora_" in name:
            own.data = 0.1 * torch.randn(own.shape, generator=generator)
            theirs.data = own.data.clone()
    for own, theirs in zip(outputs_and_gradients(ours), outputs_and_gradients(stock), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(tiny_llama, make_adapted) -> None:
    found = []
    for checkpointing in (False, True):
        adapted = make_adapted(tiny_llama(), perturb=0.1)
        adapted.switch(np.arange(14) % 8)
        adapted.peft_model.train()
        if checkpointing:
            adapted.peft_model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        adapted.peft_model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in adapted.named_parameters().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dropout_before_lora_A_works_in_training_alone(tiny_llama, make_adapted) -> None:
    dropped = make_adapted(tiny_llama(), perturb=0.1, lora_dropout=0.5)
    plain = make_adapted(tiny_llama(), perturb=0.1)
    for adapted in (dropped, plain):
        adapted.switch(np.zeros(14, dtype=np.int64))
    assert torch.equal(dropped.peft_model.eval()(IDS).logits, plain.peft_model.eval()(IDS).logits)
    torch.manual_seed(0)
    out = dropped.peft_model.train()(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert not torch.allclose(out.logits, plain.peft_model(IDS).logits, atol=1e-3)
    assert all(bool(p.grad.any()) for p in dropped.named_parameters().values())


def test_a_base_in_bfloat16_has_products_in_bfloat16_and_masters_in_float32(tiny_llama, make_adapted) -> None:
    adapted = make_adapted(tiny_llama().to(torch.bfloat16), perturb=0.1)
    adapted.switch(np.zeros(14, dtype=np.int64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = adapted.peft_model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = list(adapted.named_parameters().values())
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}
    assert adapted.terms.pair(0)[0].dtype == torch.bfloat16
    tokens = IDS.numel()  # inputs of layers are kept once, in the base's type
    of_layers = [t for t in saved if t.dim() == 2 and t.shape[0] == tokens and t.shape[1] in (36, 52)]
    assert len(of_layers) == 14
    assert {t.dtype for t in of_layers} == {torch.bfloat16}
