"""What a CUDA graph captures, run without one: the same losses and gradients as a plain step. Captures await a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from coalora.config import CoaLoraConfig
from coalora.errors import CoaloraError
from coalora.models.loading import resolved
from coalora.recipes import TrainingRecipe
from coalora.train.graph import GraphedGradients, GraphedTeacher, captured, eager_gradients, eager_teacher
from coalora.train.objective import Objective

ON_GPU = torch.cuda.is_available()


def gradients_of(adapted, split, objective, teach, take, passes=((0, [0, 5]), (4, [0, 5]), (0, [2, 8])), each=True):
    """Of passes (choice, rows): by default of two shapes, with experts and without; `each`: not their sum."""
    found: list[torch.Tensor | None] = []
    for k, rows in passes:
        batch = split.batch(torch.tensor(rows), adapted.device)
        teacher = teach(batch)
        adapted.switch(np.full(len(adapted.layers), k))
        loss, task_loss = take(batch, teacher)
        found += [loss.detach().clone(), task_loss.clone()]
        for parameter in adapted.named_parameters().values():
            found.append(None if parameter.grad is None else parameter.grad.clone())
            if each:
                parameter.grad = None
    return found


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize(
    "objective",
    [Objective(), Objective(distillation=0.5, hidden=1.0), Objective(distillation=1.0, teacher="base")],
)
@pytest.mark.parametrize("capture", [False, pytest.param(True, marks=pytest.mark.skipif(not ON_GPU, reason="a GPU"))])
def test_losses_and_gradients_are_those_of_a_plain_step(
    tiny_models, make_adapted, text_split, class_split, family, objective, capture
) -> None:
    split, found = text_split if family == "llama" else class_split, []
    for graphed in (False, True):
        model = tiny_models[family]()
        adapted = make_adapted(model.cuda() if capture else model, perturb=0.1, expert_bits=3)
        if graphed:
            teach = GraphedTeacher(adapted, objective, capture=capture)
            take = GraphedGradients(adapted, objective, capture=capture)
        else:
            teach, take = eager_teacher(adapted, objective), eager_gradients(adapted, objective)
        found.append(gradients_of(adapted, split, objective, teach, take))
        # Of one shape, so that a graph overwrites what it returned: what two configurations a step add up.
        passes = ((0, [0, 5]), (4, [0, 7]), (2, [5, 8]), (4, [0, 5]))
        found[-1] += gradients_of(adapted, split, objective, teach, take, passes, each=False)
    for plain, graphed in zip(*found, strict=True):
        assert (plain is None) == (graphed is None)
        if plain is not None:
            torch.testing.assert_close(graphed, plain, rtol=1e-5, atol=1e-6)


def test_a_teacher_is_captured_on_the_masters_and_no_weight_is_written_for_it(
    tiny_llama, make_adapted, text_split, monkeypatch
) -> None:
    """A graph replays addresses: a teacher's pass that read others than the masters' would replay stale weights."""
    adapted = make_adapted(tiny_llama(), perturb=0.1)
    teach = GraphedTeacher(adapted, Objective(distillation=1.0, teacher="base"), capture=False)
    read: list[set[int]] = [set()]
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, W, *bias: (read[-1].add(W.data_ptr()), linear(x, W, *bias))[1]
    )
    masters = {master.data_ptr() for master in adapted.base.masters}
    for k in (0, 3):
        adapted.switch(np.full(len(adapted.layers), k))
        held = [adapted.base.weight(i).clone() for i in range(len(adapted.layers))]
        read.append(set())  # of the teacher alone
        teach(text_split.batch(torch.tensor([0, 5])))
        assert masters <= read[-1]
        assert all(torch.equal(adapted.base.weight(i), weight) for i, weight in enumerate(held))
        assert (adapted.base.configuration == k).all()
        read.append(set())
    assert read[1] == read[3]


def test_a_graph_follows_parameters_that_are_trained_in_place(tiny_llama, make_adapted, text_split) -> None:
    adapted = make_adapted(tiny_llama(), perturb=0.1)
    objective = Objective(distillation=1.0, teacher="adapted")
    teach, plain = GraphedTeacher(adapted, objective, capture=False), eager_teacher(adapted, objective)
    batch = text_split.batch(torch.tensor([0, 5]))
    before = teach(batch).logits.clone()
    for parameter in adapted.named_parameters().values():
        parameter.data.mul_(1.5)
    torch.testing.assert_close(teach(batch).logits, plain(batch).logits, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(teach(batch).logits, before, rtol=1e-2)


def _as_on_a_gpu(adapted, monkeypatch):
    monkeypatch.setattr(adapted, "device", torch.device("cuda"))
    return adapted


def test_auto_captures_on_a_gpu_where_shapes_are_static_and_nothing_stands_against_it(
    tiny_llama, make_adapted, text_split, monkeypatch
) -> None:
    blocks = replace(text_split, lengths=torch.full_like(text_split.lengths, 16))
    recipe = TrainingRecipe()
    cpu = make_adapted(tiny_llama())
    assert not captured("auto", cpu, blocks, recipe)
    gpu = _as_on_a_gpu(make_adapted(tiny_llama()), monkeypatch)
    assert captured("auto", gpu, blocks, recipe)
    assert not captured("none", gpu, blocks, recipe)
    assert not captured("auto", gpu, text_split, recipe)
    assert captured("cuda-graph", gpu, text_split, recipe)
    assert not captured("auto", gpu, blocks, replace(recipe, gradient_checkpointing=True))


def test_what_cannot_be_captured_is_refused(tiny_llama, make_adapted, text_split, monkeypatch) -> None:
    recipe = TrainingRecipe()
    with pytest.raises(CoaloraError, match="with a model on cpu"):
        captured("cuda-graph", make_adapted(tiny_llama()), text_split, recipe)
    gpu = _as_on_a_gpu(make_adapted(tiny_llama(), lora_dropout=0.1), monkeypatch)
    with pytest.raises(CoaloraError, match="with LoRA dropout"):
        captured("cuda-graph", gpu, text_split, recipe)
    gpu = _as_on_a_gpu(make_adapted(tiny_llama()), monkeypatch)
    with pytest.raises(CoaloraError, match="with gradient checkpointing"):
        captured("cuda-graph", gpu, text_split, replace(recipe, gradient_checkpointing=True))
    for changes in ({"weights": "packed"}, {"lora_dropout": 0.1}, {"device": "cpu"}):
        with pytest.raises(CoaloraError, match=r"runtime\.compile is cuda-graph, beside"):
            CoaLoraConfig(compile="cuda-graph", **changes)
    if not ON_GPU:
        with pytest.raises(CoaloraError, match="the run is on a CPU"):
            resolved(CoaLoraConfig(compile="cuda-graph"))
