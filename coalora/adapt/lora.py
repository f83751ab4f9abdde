"""PEFT's LoRA layers with what a configuration adds to them: y = W x + s (B + B_b)(I + U)(A + A_b) x + B_c A_c x.

`get_peft_model` builds PEFT's own layers; only classes change (of each LoRA layer and of its `lora_A` and `lora_B`), so
that parameter names, the adapter's file format and everything else of PEFT stay as they are. Base and adapter are one
autograd function, whose products run in the type of the base weight on factors that `coalora.adapt.effective` has made
for all layers: beside the base's own two products it takes six, saves the input once, and casts nothing of its size.
What the function does not know (dropout in training, autocast, quantized layers of other libraries, several adapters)
takes PEFT's own path, on the same factors.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coalora.adapt.effective import Terms
from coalora.models.switching.packed import PackedConv1D, PackedLinear
from coalora.models.targets import TargetLayer
from coalora.recipes import Task

ADAPTER = "default"
_TASK_TYPES = {"classification": TaskType.SEQ_CLS, "language-modeling": TaskType.CAUSAL_LM}
_PACKED, _TRANSPOSED = (PackedLinear, PackedConv1D), (Conv1D, PackedConv1D)


class EffectiveLinear(nn.Linear):
    """A `lora_A` (side 0) or `lora_B` (side 1) whose weight is what the terms make of it (`Terms.factor`)."""

    terms: Terms
    index: int
    side: int

    def effective_weight(self) -> Tensor:
        return self.terms.factor(self.side, self.index)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.effective_weight())


class AdaptedLinear(LoraLinear):
    """PEFT's LoRA layer with base and adapter in one autograd function."""

    terms: Terms
    index: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self._fused(x):
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        A, B = self.terms.pair(self.index)
        # A packed layer has no weight to keep: its source makes one in each of the passes.
        source = base.source() if isinstance(base, _PACKED) else None
        weight = base.weight if source is None else None
        transposed = isinstance(base, _TRANSPOSED)
        return cast(Tensor, Product.apply(x, base.bias, A, B, weight, source, transposed, self.terms.scale))

    def _fused(self, x: Tensor) -> bool:
        base = self.base_layer
        return (
            type(base) in (nn.Linear, Conv1D, *_PACKED)
            and base.weight.dtype == x.dtype
            and not (self.disable_adapters or self.merged or base.weight.requires_grad)
            and self.active_adapters == [ADAPTER]
            and not (self.training and isinstance(self.lora_dropout[ADAPTER], nn.Dropout))
            and not (base._forward_hooks or base._forward_pre_hooks)
            and not torch.is_autocast_enabled(x.device.type)
        )


class Product(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T, with gradients for x, b, A (r, in) and B (out, r), and none for W.

    W (out, in), or its transpose where `transposed`, is `weight`, or is made by `source` in each of the passes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        weight: Tensor | None,
        source: Callable[[], Tensor] | None,
        transposed: bool,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        stored = source() if source is not None else cast(Tensor, weight)
        out = F.linear(rows, stored.t() if transposed else stored, bias)
        hidden = rows.mm(A.t())
        out.addmm_(hidden, B.t(), alpha=scale)
        ctx.save_for_backward(rows, A, B, hidden, weight)
        ctx.source, ctx.transposed, ctx.scale, ctx.shape = source, transposed, scale, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, A, B, hidden, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        for_x = for_bias = for_A = for_B = None
        # With beta=0 the first argument is not read: it stands for a result of the right shape.
        for_hidden = torch.addmm(hidden, grad, B, beta=0, alpha=ctx.scale)
        if ctx.needs_input_grad[0]:
            stored = weight if ctx.source is None else ctx.source()
            for_x = grad.mm(stored.t() if ctx.transposed else stored).addmm_(for_hidden, A).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            for_bias = grad.sum(0)
        if ctx.needs_input_grad[2]:
            for_A = for_hidden.t().mm(rows)
        if ctx.needs_input_grad[3]:
            for_B = torch.addmm(B, grad.t(), hidden, beta=0, alpha=ctx.scale)
        return for_x, for_bias, for_A, for_B, None, None, None, None


def lora_config(
    layers: Sequence[TargetLayer],
    task: Task,
    *,
    ranks: Sequence[int],
    scale: float,
    lora_dropout: float = 0.0,
    heads: Sequence[str] = (),
) -> LoraConfig:
    """PEFT's config for the target layers. The task head of a classifier is trained and saved with the adapter.

    Args:
        ranks: (N,) of the layers; where they differ the config has a `rank_pattern`.
        scale: s, the same for every layer: PEFT's lora_alpha / r, by an `alpha_pattern` where ranks differ.
        heads: modules that are trained whole (`head_modules`); PEFT knows those called classifier or score by itself.
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
        modules_to_save=[
            name for name in heads if not any(part.endswith(("classifier", "score")) for part in name.split("."))
        ]
        or None,
    )


def _whole(value: float) -> int:
    # PEFT only divides by the rank; its type says int, and a whole number should look like one in the file.
    return int(value) if float(value).is_integer() else cast(int, value)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Within, PEFT may ask for an attribute that transformers has renamed: nothing that a user could act upon."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def attach(
    model: PreTrainedModel, layers: Sequence[TargetLayer], config: LoraConfig, *, scale: float, seed: int
) -> tuple[PeftModel, list[EffectiveLinear], list[EffectiveLinear], Terms]:
    """Wrap `model` with PEFT and return it with the N `lora_A`, the N `lora_B` layers and the terms that they share.

    The pairs of all layers are made anew, together, at the start of every forward pass of the model. `scale` is that of
    `config`. The same seed gives the same initial adapter.
    """
    torch.manual_seed(seed)
    with quiet_peft():
        peft_model = cast(PeftModel, get_peft_model(model, config))
    base = peft_model.get_base_model()
    modules = cast(list[AdaptedLinear], [base.get_submodule(layer.name) for layer in layers])
    sides = [[cast(EffectiveLinear, side[ADAPTER]) for side in (m.lora_A, m.lora_B)] for m in modules]
    lora_A, lora_B = map(list, zip(*sides, strict=True))
    dtypes = [module.base_layer.get_parameter("weight").dtype for module in modules]
    terms = Terms(lora_A, lora_B, dtypes, scale)
    for index, (module, pair) in enumerate(zip(modules, sides, strict=True)):
        parts: tuple[Any, ...] = (module, *pair)
        for part in parts:
            if type(part) in (LoraLinear, nn.Linear):
                part.__class__ = AdaptedLinear if part is module else EffectiveLinear
            part.terms, part.index = terms, index
        for side, part in enumerate(pair):
            part.side = side

    def make(*_: object) -> None:
        if not modules[0].disable_adapters:
            terms.make()

    base.register_forward_pre_hook(make)
    return peft_model, lora_A, lora_B, terms
