"""Experts: terms of a layer's own bit-width, beside the shared pair and in no other choice's way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coalora.adapt.compensation import compensating_lora_B, compensation
from coalora.adapt.experts import NO_EXPERT, adjusted_choices, expert_of_choice
from coalora.recipes import AdapterRecipe, TrainingRecipe
from coalora.train.loop import train


def at(adapted, k: int) -> np.ndarray:
    return np.full(len(adapted.layers), k)


def test_choices_up_to_the_limit_have_a_term_for_their_bits(small_space) -> None:
    bits = [choice.bits for choice in small_space.choices]
    numbers = expert_of_choice(small_space, 3)
    assert numbers == [{2: 0, 3: 1}.get(b, NO_EXPERT) for b in bits]
    assert set(expert_of_choice(small_space, 0)) == {NO_EXPERT}


def test_theta_leaves_choices_with_an_expert_alone_where_the_recipe_says_so(small_space) -> None:
    bits = [choice.bits for choice in small_space.choices]
    assert adjusted_choices(small_space, AdapterRecipe(expert_bits=3, theta="others")) == [b > 3 for b in bits]
    assert all(adjusted_choices(small_space, AdapterRecipe(expert_bits=3, theta="all")))
    assert all(adjusted_choices(small_space, AdapterRecipe(theta="others")))  # no experts: theta adjusts everything


def test_high_bits_use_the_leading_ranks_of_the_pair_and_low_bits_all(tiny_llama, make_adapted) -> None:
    adapted = make_adapted(tiny_llama(), perturb=0.3, expert_bits=0, leading_ranks=2)
    for k, choice in enumerate(adapted.base.space.choices):
        adapted.switch(at(adapted, k))
        used = {2: 4, 3: 3}.get(choice.bits, 2)
        U = adapted.theta(torch.as_tensor(at(adapted, k)))
        for index, lora_A in enumerate(adapted.lora_A):
            whole = (torch.eye(4) + U[index]) @ lora_A.weight
            torch.testing.assert_close(adapted.terms.factor(0, index)[:used], whole[:used], rtol=1e-4, atol=1e-5)
            assert not adapted.terms.factor(0, index)[used:].any()


def test_untrained_experts_change_nothing(tiny_llama, make_adapted, text_split) -> None:
    batch = text_split.batch(torch.arange(4))
    losses = []
    for bits in (0, 3):
        adapted = make_adapted(tiny_llama(), expert_bits=bits)
        for lora_B in adapted.lora_B:
            torch.nn.init.normal_(lora_B.weight, generator=torch.Generator().manual_seed(1))
        adapted.switch(at(adapted, 0))
        losses.append(adapted.peft_model(**batch).loss.item())
    assert losses[0] == losses[1]


def test_the_layer_runs_the_formula(tiny_llama, make_adapted) -> None:
    adapted = make_adapted(tiny_llama(), perturb=0.3, expert_bits=3)
    adapted.switch(at(adapted, 0))
    U = adapted.adjustments(at(adapted, 0))
    layer, index = adapted.layers[3], 3
    module = adapted.peft_model.get_base_model().get_submodule(layer.name)
    x = torch.randn(5, layer.shape[1], generator=torch.Generator().manual_seed(0))
    own = adapted.experts
    A = adapted.lora_A[index].weight + own.lora_A[f"{index}_0"]
    B = adapted.lora_B[index].weight + own.lora_B[f"{index}_0"]
    expected = module.base_layer(x) + adapted.recipe.scale * x @ ((torch.eye(4) + U[index]) @ A).T @ B.T
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def test_a_step_trains_the_experts_of_its_bits_alone(tiny_llama, make_adapted, text_split) -> None:
    adapted = make_adapted(tiny_llama(), perturb=0.05, expert_bits=3)
    before = adapted.state_dict()
    recipe = TrainingRecipe(batch_size=4, weight_decay=0.1)
    configurations = at(adapted, 0)[None]  # 2 bits everywhere
    state, _ = train(adapted, text_split, configurations, np.array([2.1]), recipe, steps=2, total_steps=4, seed=0)
    moved = {k for k, v in adapted.state_dict().items() if not torch.equal(v, before[k])}
    experts = {k for k in before if k.startswith("experts.")}
    assert moved & experts == {k for k in experts if k.endswith("_0")}
    assert {int(state.tensors[f"step.{k}"]) for k in experts if k.endswith("_1")} == {0}


def test_steps_of_rare_experts_survive_a_resumed_run_bit_for_bit(tiny_llama, make_adapted, text_split) -> None:
    recipe = TrainingRecipe(batch_size=4, lr=1e-2, warmup_steps=1, sampling="uniform")
    bits = np.array([2.0, 3.0, 4.0])

    def go(steps: int, state=None):
        adapted = make_adapted(tiny_llama(), expert_bits=3)
        configurations = np.stack([at(adapted, k) for k in (0, 2, 4)])
        return train(
            adapted, text_split, configurations, bits, recipe, steps=steps, total_steps=6, seed=1, state=state
        )[0]

    whole, resumed = go(6), go(3, go(3))
    counts = {int(whole.tensors[k]) for k in whole.tensors if k.startswith("step.experts")}
    assert counts != {6}  # some were reached more rarely than others
    assert all(torch.equal(v, resumed.tensors[k]) for k, v in whole.tensors.items())


def test_above_the_limit_the_shared_pair_is_alone_again(tiny_llama, make_adapted) -> None:
    adapted = make_adapted(tiny_llama(), perturb=0.1, expert_bits=3)
    adapted.switch(at(adapted, 0))
    assert all(expert is not None for expert in adapted.terms.experts)
    adapted.switch(at(adapted, 7))  # 8 bits
    assert all(expert is None for expert in adapted.terms.experts)
    adapted.switch(at(adapted, 0))
    adapted.full_precision()
    assert all(expert is None for expert in adapted.terms.experts)


def test_experts_of_the_lowest_bits_start_at_their_compensation(tiny_llama, make_adapted) -> None:
    adapted = make_adapted(tiny_llama(), expert_bits=3, expert_start="compensation")
    adapted.switch(at(adapted, 0))
    for index, known in enumerate(adapted.base._statistics):
        A, B = compensation(adapted.base.residual(index, 0), known, 4)
        pair = adapted.lora_B[index].effective_weight() @ adapted.lora_A[index].effective_weight()
        torch.testing.assert_close(pair * adapted.recipe.scale, B @ A, rtol=1e-2, atol=1e-4)


def test_experts_of_other_bits_start_at_the_best_fit_in_the_same_coordinates(tiny_llama, make_adapted) -> None:
    adapted = make_adapted(tiny_llama(), expert_bits=3, expert_start="compensation")
    rows = [m.weight.detach().clone() for m in adapted.lora_A]
    adapted.switch(at(adapted, 2))  # 3 bits
    for index, known in enumerate(adapted.base._statistics):
        assert torch.equal(adapted.lora_A[index].effective_weight(), rows[index])
        B = compensating_lora_B(adapted.base.residual(index, 2), known, rows[index])
        torch.testing.assert_close(adapted.lora_B[index].effective_weight() * adapted.recipe.scale, B)


def test_above_the_limit_a_start_leaves_an_untrained_pair_with_outputs_of_lora_s_own_size(
    tiny_llama, make_adapted
) -> None:
    started = make_adapted(tiny_llama(), expert_bits=3, expert_start="compensation")
    plain = make_adapted(tiny_llama(), expert_bits=3)
    started.switch(at(started, 4))  # 4 bits
    assert not any(bool(m.effective_weight().any()) for m in started.lora_B)
    for ours, peft, known in zip(started.lora_A, plain.lora_A, started.base._statistics, strict=True):
        assert not torch.equal(ours.weight, peft.weight)
        outputs = (ours.weight.square() * known.second_moment).sum(dim=1)
        wanted = known.second_moment.mean() / 3  # E (a x)^2 of entries uniform within 1 / sqrt(in)
        torch.testing.assert_close(outputs, wanted.expand_as(outputs), rtol=1e-3, atol=0)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_start_is_left_to_the_task(tiny_models, make_adapted, family) -> None:
    started = make_adapted(tiny_models[family](), expert_bits=3, expert_start="auto")
    assert any(bool(p.any()) for p in started.experts.lora_B.values()) == (family == "llama")


def test_a_space_without_low_bits_starts_as_plain_lora(tiny_llama, make_adapted) -> None:
    started = make_adapted(tiny_llama(), expert_bits=1, expert_start="compensation")
    plain = make_adapted(tiny_llama())
    assert not list(started.experts.parameters())
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(started.lora_A, plain.lora_A, strict=True))
