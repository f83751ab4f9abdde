"""What a CUDA graph captures, run without one: the same losses and gradients as a plain step. Captures await a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coalora.errors import CoaloraError
from coalora.train.graph import GraphedGradients, eager_gradients
from coalora.train.objective import Objective, ask_teacher

ON_GPU = torch.cuda.is_available()


def gradients_of(adapted, split, objective, take) -> list[torch.Tensor | None]:
    found: list[torch.Tensor | None] = []
    for k, rows in ((0, [0, 5]), (4, [0, 5]), (0, [2, 8])):  # two shapes, experts and none
        batch = split.batch(torch.tensor(rows), adapted.device)
        teacher = ask_teacher(adapted, batch, objective)
        adapted.switch(np.full(len(adapted.layers), k))
        loss, task_loss = take(batch, teacher)
        found += [loss.detach().clone(), task_loss.clone()]
        for parameter in adapted.named_parameters().values():
            found.append(None if parameter.grad is None else parameter.grad.clone())
            parameter.grad = None
    return found


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("objective", [Objective(), Objective(distillation=0.5, hidden=1.0)])
@pytest.mark.parametrize("capture", [False, pytest.param(True, marks=pytest.mark.skipif(not ON_GPU, reason="a GPU"))])
def test_losses_and_gradients_are_those_of_a_plain_step(
    tiny_models, make_adapted, text_split, class_split, family, objective, capture
) -> None:
    split, found = text_split if family == "llama" else class_split, []
    for graphed in (False, True):
        model = tiny_models[family]()
        adapted = make_adapted(model.cuda() if capture else model, perturb=0.1, expert_bits=3)
        take = GraphedGradients(adapted, objective, capture=capture) if graphed else eager_gradients(adapted, objective)
        found.append(gradients_of(adapted, split, objective, take))
    for plain, graphed in zip(*found, strict=True):
        assert (plain is None) == (graphed is None)
        if plain is not None:
            torch.testing.assert_close(graphed, plain, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_captured_is_refused(tiny_llama, make_adapted) -> None:
    with pytest.raises(CoaloraError, match="dropout"):
        GraphedGradients(make_adapted(tiny_llama(), lora_dropout=0.1), Objective(), capture=False)
    if not ON_GPU:
        with pytest.raises(CoaloraError, match="on cpu"):
            GraphedGradients(make_adapted(tiny_llama()), Objective())
