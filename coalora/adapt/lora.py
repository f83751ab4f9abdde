"""PEFT's LoRA layers with the adjustment U folded into lora_A: y = W x + s B (I + U) A x.

`get_peft_model` builds PEFT's own layers; only the class of each `lora_A` linear changes, so that parameter names, the
adapter's file format and everything else of PEFT stay as they are. Folding costs r*r*in a layer, whatever the number of
tokens, and is the same expression that the export writes to disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from coalora.models.loading import Task
from coalora.models.targets import TargetLayer

ADAPTER = "default"
_TASK_TYPES = {"classification": TaskType.SEQ_CLS, "language-modeling": TaskType.CAUSAL_LM}


class AdjustedLinear(nn.Linear):
    """A `lora_A` whose effective weight is (I + U) A; U is None for the plain adapter."""

    U: Tensor | None = None

    def effective_weight(self) -> Tensor:
        return fold(self.weight, self.U)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.effective_weight())


def fold(lora_A: Tensor, U: Tensor | None) -> Tensor:
    """(I + U) A, r x in; A itself where U is None."""
    return lora_A if U is None else torch.addmm(lora_A, U.to(lora_A.dtype), lora_A)


def lora_config(
    layers: Sequence[TargetLayer], task: Task, *, r: int, lora_alpha: int, lora_dropout: float = 0.0
) -> LoraConfig:
    """PEFT's config for the target layers. The task head of a classifier is trained and saved with the adapter."""
    return LoraConfig(
        task_type=_TASK_TYPES[task],
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=[layer.name for layer in layers],
        fan_in_fan_out=any(layer.transposed for layer in layers),
        bias="none",
    )


def attach(
    model: PreTrainedModel, layers: Sequence[TargetLayer], config: LoraConfig, *, seed: int
) -> tuple[PeftModel, list[AdjustedLinear]]:
    """Wrap `model` with PEFT and return it with the N `lora_A` layers, in the order of `layers`.

    The same seed gives the same initial adapter.
    """
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # PEFT asks for an attribute that transformers has renamed; nothing that a user could act upon.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        peft_model = get_peft_model(model, config)
    adjusted = []
    for layer in layers:
        module = peft_model.get_base_model().get_submodule(layer.name)
        lora_A: AdjustedLinear = module.lora_A[ADAPTER]  # type: ignore[index, assignment]
        lora_A.__class__ = AdjustedLinear
        adjusted.append(lora_A)
    return cast(PeftModel, peft_model), adjusted
