"""Dispatched operations of a step, counted on any machine: what a GPU is asked to launch, views left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from coalora.adapt.adapted import AdaptedModel
from coalora.models.targets import find_target_layers
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(function: Callable[[], object]) -> Counter[str]:
    """Dispatched operations of a call by name, views left out."""
    with _Counting() as counting:
        function()
    return counting.operations


def beyond_the_base(
    build: Callable[[], PreTrainedModel], space: ChoiceSpace, method: str, recipe: AdapterRecipe, choice: int = 0
) -> tuple[int, Counter[str]]:
    """N, and the operations that a step's forward and backward passes dispatch beyond the base model's own.

    The base is frozen, with inputs that need a gradient as every layer's but the first do. Theta counts, the optimizer
    and the switch do not.
    """
    base = _ready(build())
    task = "classification" if hasattr(base, "classifier") else "language-modeling"
    ids = torch.arange(2 * 8).view(2, 8)
    inputs = {"input_ids": ids, "labels": ids if task == "language-modeling" else torch.zeros(2, dtype=torch.int64)}
    of_base = operations(lambda: base(**inputs).loss.backward())
    model = _ready(build())
    layers = find_target_layers(model)
    adapted = AdaptedModel(model, layers, space, task, method=method, recipe=recipe, seed=0)  # type: ignore[arg-type]
    configuration = np.full(len(layers), choice)
    adapted.switch(configuration)  # the weights; what the step below switches is the adapter
    adapted.peft_model.train()

    def step() -> None:
        adapted.switch(configuration)
        adapted.peft_model(**inputs).loss.backward()

    of_step = operations(step)
    of_step.subtract(of_base)
    return len(layers), of_step


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False).train()
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model
