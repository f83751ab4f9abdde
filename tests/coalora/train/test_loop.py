"""Training: it learns, it repeats, it resumes as if undisturbed, and it stops at numbers that are not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from coalora.errors import CoaloraError
from coalora.recipes import TrainingRecipe
from coalora.train.loop import TrainingState, train
from coalora.train.sampling import Sampler, batch_indices

RECIPE = TrainingRecipe(batch_size=4, lr=1e-2, theta_lr=1e-2, head_lr=1e-2, warmup_steps=2)


@pytest.fixture
def go(tables_for, random_configurations, text_split, class_split):
    """`go(adapted, steps, ...)`: train on 5 configurations of the small space."""

    def run(adapted, steps, *, recipe=RECIPE, seed=0, state=None, **options):
        model = adapted.peft_model.get_base_model()
        split = class_split if "Classification" in type(model).__name__ else text_split
        configurations = np.random.default_rng(4).integers(8, size=(5, len(adapted.layers)))
        bits = np.array([adapted.base.space.nominal_bits[c].mean() for c in configurations])
        options = {"seed": seed, "state": state, "total_steps": max(6, steps), **options}
        return train(adapted, split, configurations, bits, recipe, steps=steps, **options)

    return run


def dropout_bert(tiny_bert_classifier):
    return tiny_bert_classifier(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1)


def assert_same(first: TrainingState, second: TrainingState) -> None:
    assert first.step == second.step
    assert first.tensors.keys() == second.tensors.keys()
    assert [k for k, v in first.tensors.items() if not torch.equal(v, second.tensors[k])] == []


@pytest.mark.parametrize("method", ["coa", "shared"])
def test_training_lowers_the_loss_of_a_language_model(tiny_qwen2, make_adapted, go, method) -> None:
    recipe = replace(RECIPE, batch_size=10, lr=2e-2)
    _, records = go(make_adapted(tiny_qwen2(), method, r=8), 30, recipe=recipe)
    losses = [r["loss"] for r in records]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("method", ["coa", "none"])
def test_training_lowers_the_loss_of_a_classifier(tiny_bert_classifier, make_adapted, go, method) -> None:
    recipe = replace(RECIPE, batch_size=10)
    _, records = go(make_adapted(tiny_bert_classifier(), method), 30, recipe=recipe)
    losses = [r["loss"] for r in records]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_everything_trained_moves_and_the_base_does_not(tiny_bert_classifier, make_adapted, go) -> None:
    adapted = make_adapted(tiny_bert_classifier())
    before = adapted.state_dict()
    frozen = {k: v.clone() for k, v in adapted.peft_model.named_parameters() if not v.requires_grad}
    state, _ = go(adapted, 3)
    assert [k for k, v in before.items() if torch.equal(v, state.tensors[k])] == []
    adapted.full_precision()
    now = dict(adapted.peft_model.named_parameters())
    assert all(torch.equal(v, now[k]) for k, v in frozen.items())
    assert sum(k.endswith("base_layer.bias") for k in frozen) == 12


def test_a_seed_gives_the_same_result_twice_bit_for_bit(tiny_bert_classifier, make_adapted, go) -> None:
    runs = []
    for noise in (1, 2):
        adapted = make_adapted(dropout_bert(tiny_bert_classifier), lora_dropout=0.1)
        torch.manual_seed(noise)  # what ran before must not matter
        runs.append(go(adapted, 4))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_another_seed_gives_another_result(tiny_llama, make_adapted, go) -> None:
    first, second = (go(make_adapted(tiny_llama()), 2, seed=seed)[1] for seed in (0, 1))
    assert [r["loss"] for r in first] != [r["loss"] for r in second]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_three_and_three_steps_equal_six_bit_for_bit(tiny_bert_classifier, make_adapted, go, weight_decay) -> None:
    recipe = replace(RECIPE, weight_decay=weight_decay)

    def fresh():
        return make_adapted(dropout_bert(tiny_bert_classifier), lora_dropout=0.1)

    whole, records = go(fresh(), 6, recipe=recipe)
    half, first = go(fresh(), 3, recipe=recipe)
    kept = {k: v.clone() for k, v in half.tensors.items()}
    # Another model, another process for all it knows: only the state goes over.
    torch.manual_seed(77)
    resumed, second = go(
        make_adapted(dropout_bert(tiny_bert_classifier), lora_dropout=0.1, seed=9), 3, recipe=recipe, state=half
    )
    assert_same(whole, resumed)
    assert records == first + second
    assert all(torch.equal(half.tensors[k], v) for k, v in kept.items())


def test_dropout_is_on_in_training_and_off_afterwards(tiny_bert_classifier, make_adapted, go) -> None:
    first = go(make_adapted(dropout_bert(tiny_bert_classifier)), 1)[1][0]["loss"]
    adapted = make_adapted(tiny_bert_classifier())
    assert first != go(adapted, 1)[1][0]["loss"]
    assert not adapted.peft_model.training


def test_state_holds_parameters_and_both_moments(tiny_llama, make_adapted, go) -> None:
    adapted = make_adapted(tiny_llama())
    state, _ = go(adapted, 2)
    own = adapted.state_dict()
    assert state.step == 2
    assert set(state.tensors) == {f"{prefix}{k}" for k in own for prefix in ("", "exp_avg.", "exp_avg_sq.", "step.")}
    assert all(torch.equal(v, state.tensors[k]) for k, v in own.items())
    adapted.named_parameters()["theta.embedding.weight"].data.zero_()
    assert bool(state.tensors["theta.embedding.weight"].any())


def test_a_first_step_is_adamw_on_the_drawn_batch_and_configuration(tiny_llama, make_adapted, go, text_split) -> None:
    """By hand: Adam's first step moves each entry by lr * g / (|g| + eps), clipped or not."""
    adapted, by_hand = make_adapted(tiny_llama(), perturb=0.05), make_adapted(tiny_llama(), perturb=0.05)
    recipe = replace(RECIPE, warmup_steps=0, lr=1e-3, theta_lr=5e-3, max_grad_norm=1e9, paired=False)
    configurations = np.random.default_rng(4).integers(8, size=(5, 14))
    bits = np.array([adapted.base.space.nominal_bits[c].mean() for c in configurations])
    _, records = go(adapted, 1, recipe=recipe)
    member = Sampler(bits, sampling="low-bits", power=2.5, seed=0).draw(0)
    by_hand.switch(configurations[member])
    loss = by_hand.peft_model(**text_split.batch(batch_indices(10, 4, seed=0, step=0))).loss
    loss.backward()
    assert records == [{"step": 0, "loss": loss.item(), "lr": 1e-3, "bits": bits[member]}]
    after = adapted.named_parameters()
    for name, parameter in by_hand.named_parameters().items():
        lr = 5e-3 if name.startswith("theta.") else 1e-3
        expected = parameter - lr * parameter.grad / (parameter.grad.abs() + 1e-8)
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)


def test_a_paired_step_takes_the_mean_gradient_of_two_configurations(tiny_llama, make_adapted, go, text_split) -> None:
    adapted, plain = make_adapted(tiny_llama(), "shared"), make_adapted(tiny_llama(), "shared")
    recipe = replace(RECIPE, paired=True, max_grad_norm=1e9)
    state, records = go(adapted, 1, recipe=recipe)
    configurations = np.random.default_rng(4).integers(8, size=(5, len(plain.layers)))
    bits = np.array([plain.base.space.nominal_bits[c].mean() for c in configurations])
    sampler = Sampler(bits, sampling="low-bits", power=2.5, seed=0)
    assert records[0]["bits"] == np.mean([bits[sampler.draw(0, opposite=side)] for side in (False, True)])
    gradients = []
    for part, opposite in zip(batch_indices(len(text_split), 4, seed=0, step=0).chunk(2), (False, True), strict=True):
        plain.switch(configurations[sampler.draw(0, opposite=opposite)])
        loss = plain.peft_model(**text_split.batch(part)).loss
        names = [name for name in plain.named_parameters() if ".lora_B." in name]
        gradients.append(torch.autograd.grad(loss, [plain.named_parameters()[name] for name in names]))
    for name, one, other in zip(names, *gradients, strict=True):
        mean = (one + other) / 2
        torch.testing.assert_close(state.tensors[f"exp_avg.{name}"], 0.1 * mean, rtol=1e-4, atol=1e-7)


def test_one_configuration_is_no_pair(tiny_llama, make_adapted, text_split) -> None:
    configuration, bits = np.zeros((1, 14), dtype=np.int64), np.array([2.0])
    states = []
    for paired in (None, False):
        recipe = replace(RECIPE, paired=paired)
        adapted = make_adapted(tiny_llama(), "shared")
        states.append(train(adapted, text_split, configuration, bits, recipe, steps=2, seed=0, total_steps=2)[0])
    assert_same(*states)


def test_the_learning_rate_follows_the_bits_where_it_is_asked_to(tiny_llama, make_adapted, go) -> None:
    steps = {}
    for power in (0.0, 1.0):
        adapted = make_adapted(tiny_llama(), "shared")
        before = adapted.state_dict()
        state, records = go(adapted, 1, recipe=replace(RECIPE, lr_by_bits=power))
        steps[power] = max(float((state.tensors[name] - start).abs().max()) for name, start in before.items())
    configurations = np.random.default_rng(4).integers(8, size=(5, len(adapted.layers)))
    bits = np.array([adapted.base.space.nominal_bits[c].mean() for c in configurations])
    assert steps[1.0] / steps[0.0] == pytest.approx(records[0]["bits"] / bits.mean(), rel=1e-3)


@pytest.mark.parametrize("change", [{"sampling": "adaptive"}, {"batch_size": 1}])
def test_two_configurations_a_step_need_two_examples_and_draws_that_observe_nothing(change) -> None:
    with pytest.raises(CoaloraError, match="Two configurations a step"):
        TrainingRecipe(paired=True, **change)


def test_schedule_warms_up_and_falls_to_a_tenth(tiny_llama, make_adapted, go) -> None:
    recipe = replace(RECIPE, warmup_steps=4, lr=1.0e-3)
    _, records = go(make_adapted(tiny_llama(), "shared"), 10, recipe=recipe)
    scale = [r["lr"] / 1e-3 for r in records]
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)]
    assert scale == pytest.approx([0.25, 0.5, 0.75, 1.0, *cosine])


def test_methods_see_the_same_batches_and_configurations(
    tiny_bert_classifier, make_adapted, go, class_split, monkeypatch
) -> None:
    seen = {}
    for method in ("coa", "shared", "none"):
        drawn = []
        original = type(class_split).batch

        def spy(self, indices, device=None, drawn=drawn, original=original):
            drawn.append(indices.tolist())
            return original(self, indices, device)

        monkeypatch.setattr(type(class_split), "batch", spy)
        _, records = go(make_adapted(tiny_bert_classifier(), method), 6)
        monkeypatch.undo()
        seen[method] = (drawn, [r["bits"] for r in records], [r["lr"] for r in records])
    assert seen["coa"] == seen["shared"] == seen["none"]
    assert len(set(seen["coa"][1])) > 1


def test_first_loss_of_coa_is_that_of_shared(tiny_llama, make_adapted, go) -> None:
    losses = [go(make_adapted(tiny_llama(), method), 1)[1][0]["loss"] for method in ("coa", "shared")]
    assert losses[0] == losses[1]


def test_the_model_is_left_with_the_adjustment_of_the_trained_theta(tiny_llama, make_adapted, go) -> None:
    adapted = make_adapted(tiny_llama())
    go(adapted, 2)
    U = adapted.adjustments(adapted.base.configuration)
    assert bool(U.any())
    for index, a in enumerate(adapted.lora_A):
        assert torch.equal(a.terms.U[index], U[index])
        assert not a.terms.U.requires_grad
    assert all(p.grad is None for p in adapted.named_parameters().values())


def test_progress_counts_the_steps_of_this_call(tiny_llama, make_adapted, go) -> None:
    calls: list[tuple[int, int]] = []
    adapted = make_adapted(tiny_llama(), "shared")
    state, _ = go(adapted, 2)
    go(adapted, 3, state=state, progress=lambda done, total, **values: calls.append((done, total)))
    assert calls == [(3, 3)]


def test_no_steps_change_nothing(tiny_llama, make_adapted, go) -> None:
    adapted = make_adapted(tiny_llama())
    before = adapted.state_dict()
    state, records = go(adapted, 0)
    assert (state.step, records) == (0, [])
    assert all(torch.equal(v, state.tensors[k]) for k, v in before.items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_it_reaches_a_parameter(tiny_llama, make_adapted, go, value) -> None:
    adapted = make_adapted(tiny_llama())
    adapted.peft_model.get_base_model().lm_head.bias = torch.nn.Parameter(
        torch.full((320,), value), requires_grad=False
    )
    before = adapted.state_dict()
    with pytest.raises(CoaloraError, match=r"at step 0 .* bits") as error:
        go(adapted, 2)
    assert "finite" in str(error.value)
    assert error.value.remedy == "Lower training.lr"
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_even_at_the_last_step(tiny_llama, make_adapted, go) -> None:
    adapted = make_adapted(tiny_llama())
    before = adapted.state_dict()
    adapted.named_parameters()["theta.layers.3.bias"].register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(CoaloraError, match="gradient norm nan at step 0"):
        go(adapted, 1)
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())


def test_nothing_to_train_is_refused(tiny_llama, make_adapted, go) -> None:
    with pytest.raises(CoaloraError, match="Method 'none' has nothing to train"):
        go(make_adapted(tiny_llama(), "none"), 1)


def test_more_steps_than_the_schedule_has_are_refused(tiny_llama, make_adapted, go) -> None:
    adapted = make_adapted(tiny_llama(), "shared")
    state, _ = go(adapted, 5)
    with pytest.raises(CoaloraError, match=r"5 \+ 2 steps are more than the schedule's 6"):
        go(adapted, 2, state=state)


def test_the_state_of_another_method_is_refused(tiny_llama, make_adapted, go) -> None:
    state, _ = go(make_adapted(tiny_llama(), "coa"), 1)
    with pytest.raises(CoaloraError, match="method 'shared'"):
        go(make_adapted(tiny_llama(), "shared"), 1, state=state)


@pytest.mark.parametrize(("n", "n_bits"), [(0, 0), (2, 3)])
def test_a_set_without_members_or_with_other_bits_is_refused(tiny_llama, make_adapted, text_split, n, n_bits) -> None:
    with pytest.raises(CoaloraError, match=f"{n} configurations with {n_bits} average bits"):
        train(
            make_adapted(tiny_llama()),
            text_split,
            np.zeros((n, 14), dtype=np.int64),
            np.ones(n_bits),
            RECIPE,
            steps=1,
            total_steps=1,
            seed=0,
        )
