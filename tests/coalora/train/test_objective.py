"""Objectives: task loss, distillation and hidden states, each against its formula written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from coalora.recipes import Objective, TrainingRecipe
from coalora.train.loop import train
from coalora.train.objective import ask_teacher, step_loss


@pytest.fixture
def batch(text_split):
    return text_split.batch(torch.arange(4))


def lowest(adapted) -> np.ndarray:
    return np.zeros(len(adapted.layers), dtype=np.int64)


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.3, 2.0)])
def test_distillation_is_the_divergence_from_full_precision_over_predicted_tokens(
    tiny_llama, make_adapted, batch, weight, temperature
) -> None:
    adapted, plain = make_adapted(tiny_llama(), perturb=0.05), tiny_llama()
    objective = Objective(distillation=weight, temperature=temperature, teacher="base")
    teacher = ask_teacher(adapted, batch, objective)
    adapted.switch(lowest(adapted))
    total, task = step_loss(adapted, batch, objective, teacher)
    with torch.no_grad():
        wanted = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
        own = adapted.peft_model(**batch)
    divergences = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for t in range(length - 1):
            p = torch.softmax(wanted[row, t] / temperature, -1)
            q = torch.log_softmax(own.logits[row, t].double() / temperature, -1)
            divergences.append(float((p * (p.log() - q)).sum()))
    expected = (1 - weight) * float(own.loss) + weight * temperature**2 * np.mean(divergences)
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert float(task) == pytest.approx(float(own.loss))


def test_the_base_teacher_has_no_adapter_and_the_adapted_teacher_has_the_one_of_now(
    tiny_llama, make_adapted, batch
) -> None:
    adapted, plain = make_adapted(tiny_llama(), perturb=0.05), tiny_llama()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    base = ask_teacher(adapted, batch, Objective(1.0, teacher="base")).logits
    torch.testing.assert_close(base, plain(**inputs).logits)
    own = ask_teacher(adapted, batch, Objective(1.0, teacher="adapted")).logits
    adapted.full_precision()
    assert torch.equal(own, adapted.peft_model(**inputs).logits)
    assert not torch.allclose(own, base)
    assert not own.requires_grad


def test_hidden_states_add_their_error_relative_to_the_teacher(tiny_llama, make_adapted, batch) -> None:
    adapted = make_adapted(tiny_llama(), perturb=0.05)
    losses = {}
    for hidden in (0.0, 2.0):
        objective = Objective(1.0, hidden=hidden)
        teacher = ask_teacher(adapted, batch, objective)
        adapted.switch(lowest(adapted))
        losses[hidden] = step_loss(adapted, batch, objective, teacher)[0]
    out = adapted.peft_model(**batch, output_hidden_states=True)
    mask = batch["attention_mask"][..., None].bool()
    errors = [
        float((own - wanted).masked_fill(~mask, 0).square().sum() / wanted.masked_fill(~mask, 0).square().sum())
        for own, wanted in zip(out.hidden_states[1:], teacher.hidden_states[1:], strict=True)
    ]
    assert float(losses[2.0] - losses[0.0]) == pytest.approx(2 * np.mean(errors), rel=1e-4)


def test_the_last_hidden_state_alone_may_be_compared(tiny_llama, make_adapted, batch) -> None:
    adapted = make_adapted(tiny_llama(), perturb=0.05)
    objective = Objective(0.5, hidden=3.0, states="last", outputs=0.0)
    teacher = ask_teacher(adapted, batch, objective)
    adapted.switch(lowest(adapted))
    total, task = step_loss(adapted, batch, objective, teacher)
    own = adapted.peft_model(**batch, output_hidden_states=True).hidden_states[-1]
    mask, wanted = batch["attention_mask"][..., None], teacher.hidden_states[-1]
    error = ((own - wanted).square() * mask).sum() / (wanted.square() * mask).sum()
    assert float(total) == pytest.approx(float(0.5 * task + 1.5 * error), rel=1e-4)


def test_distillation_alone_brings_the_student_to_its_teacher(tiny_llama, make_adapted, batch) -> None:
    adapted = make_adapted(tiny_llama(), r=8)
    objective = Objective().resolved("recover")
    optimizer = torch.optim.AdamW(adapted.named_parameters().values(), lr=1e-2)
    distances = []
    for _ in range(25):
        teacher = ask_teacher(adapted, batch, objective)
        adapted.switch(lowest(adapted))
        loss, _ = step_loss(adapted, batch, objective, teacher)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        distances.append(float(loss))
    assert distances[-1] < 0.5 * distances[0]


def test_a_classifier_is_taught_by_its_adapted_self(tiny_bert_classifier, make_adapted, class_split) -> None:
    adapted = make_adapted(tiny_bert_classifier(), perturb=0.05)
    batch = class_split.batch(torch.arange(6))
    objective = Objective(0.5, teacher="adapted")
    teacher = ask_teacher(adapted, batch, objective)
    adapted.switch(lowest(adapted))
    total, task = step_loss(adapted, batch, objective, teacher)
    own = torch.log_softmax(adapted.peft_model(**batch).logits.detach(), -1)
    wanted = torch.log_softmax(teacher.logits, -1)
    divergence = float((wanted.exp() * (wanted - own)).sum(-1).mean())
    assert float(total) == pytest.approx(0.5 * float(task) + 0.5 * divergence, rel=1e-4)


def test_the_goal_decides_what_is_left_open() -> None:
    assert Objective().resolved("recover") == Objective(1.0, teacher="base")
    assert Objective().resolved("fine-tune") == Objective(0.0, teacher="adapted") == Objective().resolved()
    own = Objective(0.3, teacher="adapted")
    assert own.resolved("recover") == own
    given = TrainingRecipe(objective=own, paired=True, theta_lr=1e-2)
    assert given.resolved("recover") == given.resolved("fine-tune", "classification") == given
    assert TrainingRecipe().resolved("fine-tune").paired
    assert not TrainingRecipe().resolved("recover").paired
    assert not TrainingRecipe(sampling="adaptive").resolved().paired
    assert not TrainingRecipe(batch_size=3).resolved().paired
    assert TrainingRecipe().resolved().theta_lr == 3e-4
    classifier = TrainingRecipe().resolved("fine-tune", "classification")
    assert (classifier.theta_lr, classifier.paired) == (1e-5, False)


def test_without_distillation_no_teacher_is_asked(tiny_llama, make_adapted, batch) -> None:
    adapted = make_adapted(tiny_llama())
    adapted.switch(lowest(adapted))
    assert ask_teacher(adapted, batch, Objective()) is None
    assert (adapted.base.configuration == 0).all()  # and the base was not switched for nothing


def test_training_with_distillation_and_checkpointing_runs_and_is_finite(tiny_llama, make_adapted, text_split) -> None:
    losses = {}
    for checkpointing in (False, True):
        adapted = make_adapted(tiny_llama())
        recipe = TrainingRecipe(
            batch_size=4,
            objective=Objective(0.5),
            gradient_checkpointing=checkpointing,
        )
        configurations = np.arange(3)[:, None].repeat(len(adapted.layers), 1)
        _, records = train(
            adapted, text_split, configurations, np.array([2.0, 3.0, 4.0]), recipe, steps=4, total_steps=4, seed=0
        )
        losses[checkpointing] = [r["loss"] for r in records]
    assert all(map(math.isfinite, losses[True]))
    # Recomputing activations changes memory, not numbers.
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
