"""Pairs made for all layers at once equal those made layer by layer, gradients included."""

from __future__ import annotations

import itertools

import pytest
import torch

from coalora.adapt.effective import fold

IDS = torch.arange(2 * 7).view(2, 7)
RECIPES = [
    {},
    {"expert_bits": 3},
    {"expert_bits": 3, "theta": "others"},
    {"rank_pattern": {"*q_proj": 3, "*down_proj": 6}},
    {"compensation_rank": 1},
]


def test_fold_is_the_formula_and_plain_without_adjustment() -> None:
    generator = torch.Generator().manual_seed(0)
    A, U = torch.randn(3, 5, generator=generator), torch.randn(3, 3, generator=generator)
    torch.testing.assert_close(fold(A, U), (torch.eye(3) + U) @ A)
    assert fold(A, None) is A
    assert torch.equal(fold(A, torch.zeros(3, 3)), A)


def test_fold_keeps_the_type_of_lora_A() -> None:
    assert fold(torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(2, 2)).dtype == torch.bfloat16


def mixed(adapted):
    return torch.arange(len(adapted.layers)).numpy() % 8


@pytest.mark.parametrize("recipe", RECIPES)
def test_pairs_and_gradients_are_those_of_each_layer_alone(tiny_llama, make_adapted, recipe) -> None:
    adapted = make_adapted(tiny_llama(), perturb=0.1, **recipe)
    parameters = list(adapted.named_parameters().values())
    found = []
    for together in (True, False):
        adapted.switch(mixed(adapted))
        if together:
            adapted.terms.make()
        pairs = [adapted.terms.pair(i) for i in range(len(adapted.layers))]
        loss = sum((B @ A).square().sum() for A, B in pairs)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append((pairs, gradients))
    for (A, B), (own_A, own_B) in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(A, own_A)
        assert torch.equal(B, own_B)
    for ours, alone in zip(found[0][1], found[1][1], strict=True):
        assert (ours is None) == (alone is None)
        if alone is not None:
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)


def test_gradients_share_no_memory_so_that_clipping_scales_each_once(tiny_llama, make_adapted) -> None:
    adapted = make_adapted(tiny_llama(), perturb=0.1, expert_bits=3)
    adapted.switch(mixed(adapted))
    adapted.peft_model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for p in adapted.named_parameters().values() if p.grad is not None]
    spans = sorted((g.data_ptr(), g.data_ptr() + g.nbytes) for g in gradients)
    assert len(spans) > 2 * len(adapted.layers)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_pairs_follow_parameters_that_have_changed_since_the_switch(tiny_llama, make_adapted) -> None:
    adapted = make_adapted(tiny_llama(), "shared", perturb=0.1)
    adapted.switch(mixed(adapted))
    with torch.no_grad():
        before = adapted.peft_model(IDS).logits
        for parameter in adapted.named_parameters().values():
            parameter.mul_(3)
        after = adapted.peft_model(IDS).logits
        adapted.switch(mixed(adapted))
        assert torch.equal(adapted.peft_model(IDS).logits, after)
    assert not torch.allclose(before, after, atol=1e-2)
