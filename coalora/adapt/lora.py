"""PEFT's LoRA layers with what a configuration adds to them: y = W x + s (B + B_b)(I + U)(A + A_b) x + B_c A_c x.

`get_peft_model` builds PEFT's own layers; only the classes of each `lora_A` and `lora_B` linear change, so that
parameter names, the adapter's file format and everything else of PEFT stay as they are. Folding U costs r*r*in a layer,
whatever the number of tokens; the compensation (A_c, B_c) of the layer's choice is joined to the trained pair as
further rows and columns. Both are the same expressions that the export writes to disk: one plain LoRA.
"""

from __future__ import annotations

import warnings
from collections import Counter
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
    """A `lora_A` whose effective weight is (I + U)(A + A_b) with the rows A_c below; None for what a choice lacks."""

    U: Tensor | None = None
    expert: Tensor | None = None
    compensation: Tensor | None = None

    def effective_weight(self) -> Tensor:
        folded = fold(self.weight if self.expert is None else self.weight + self.expert, self.U)
        return folded if self.compensation is None else torch.cat([folded, self.compensation.to(folded.dtype)])

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.effective_weight())


class ExtendedLinear(nn.Linear):
    """A `lora_B` whose effective weight is B + B_b with the columns B_c / s beside it, s being LoRA's scale."""

    expert: Tensor | None = None
    compensation: Tensor | None = None

    def effective_weight(self) -> Tensor:
        weight = self.weight if self.expert is None else self.weight + self.expert
        return weight if self.compensation is None else torch.cat([weight, self.compensation.to(weight.dtype)], dim=1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.effective_weight())


def fold(lora_A: Tensor, U: Tensor | None) -> Tensor:
    """(I + U) A, r x in; A itself where U is None. U may be larger than r: its leading part counts."""
    if U is None:
        return lora_A
    r = lora_A.shape[0]
    return torch.addmm(lora_A, U[:r, :r].to(lora_A.dtype), lora_A)


def lora_config(
    layers: Sequence[TargetLayer],
    task: Task,
    *,
    ranks: Sequence[int],
    scale: float,
    lora_dropout: float = 0.0,
) -> LoraConfig:
    """PEFT's config for the target layers. The task head of a classifier is trained and saved with the adapter.

    Args:
        ranks: (N,) of the layers; where they differ the config has a `rank_pattern`.
        scale: s, the same for every layer: PEFT's lora_alpha / r, by an `alpha_pattern` where ranks differ.
    """
    r = Counter(ranks).most_common(1)[0][0]
    others = {layer.name: rank for layer, rank in zip(layers, ranks, strict=True) if rank != r}
    return LoraConfig(
        task_type=_TASK_TYPES[task],
        r=r,
        lora_alpha=_whole(scale * r),
        rank_pattern=others,
        alpha_pattern={name: _whole(scale * rank) for name, rank in others.items()},
        lora_dropout=lora_dropout,
        target_modules=[layer.name for layer in layers],
        fan_in_fan_out=any(layer.transposed for layer in layers),
        bias="none",
    )


def _whole(value: float) -> int:
    # PEFT only divides by the rank; its type says int, and a whole number should look like one in the file.
    return int(value) if float(value).is_integer() else cast(int, value)


def attach(
    model: PreTrainedModel, layers: Sequence[TargetLayer], config: LoraConfig, *, seed: int
) -> tuple[PeftModel, list[AdjustedLinear], list[ExtendedLinear]]:
    """Wrap `model` with PEFT and return it with the N `lora_A` and the N `lora_B` layers, in the order of `layers`.

    The same seed gives the same initial adapter.
    """
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # PEFT asks for an attribute that transformers has renamed; nothing that a user could act upon.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        peft_model = get_peft_model(model, config)
    adjusted, extended = [], []
    for layer in layers:
        module = peft_model.get_base_model().get_submodule(layer.name)
        lora_A: AdjustedLinear = module.lora_A[ADAPTER]  # type: ignore[index, assignment]
        lora_B: ExtendedLinear = module.lora_B[ADAPTER]  # type: ignore[index, assignment]
        lora_A.__class__, lora_B.__class__ = AdjustedLinear, ExtendedLinear
        adjusted.append(lora_A)
        extended.append(lora_B)
    return cast(PeftModel, peft_model), adjusted, extended
