"""Linear layers whose frozen weight exists only while it is multiplied with.

A packed layer makes its weight in the forward pass and once more in the backward pass; autograd keeps neither, only
what it is made of (so that a switch between the two passes cannot change the gradient). So a layer holds b bits a
weight instead of 16 or 32, and one dequantized layer exists at a time. Outputs and gradients are bit for bit those of
the ordinary layer that holds the same weight: the same products run on the same numbers in the same memory layout.

The class of the model's own layer changes in place, as PEFT's wrappers around it, names and biases must stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from coalora.errors import CoaloraError

Make = Callable[[], Tensor]  # a weight as its layer stores it: out x in (Linear) or in x out (Conv1D)
Source = Callable[[], Make]  # how to make the weight that the layer holds now


class _Product(torch.autograd.Function):
    """x W^T + b with W made anew in both passes; gradients for x and b, none for W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, make: Make, transposed: bool) -> Tensor:
        ctx.make, ctx.transposed, ctx.dtype = make, transposed, x.dtype
        weight = make()
        if not transposed:
            return F.linear(x, weight, bias)
        # transformers' own expression for Conv1D.
        return torch.addmm(cast(Tensor, bias), x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        for_x = for_bias = None
        if ctx.needs_input_grad[0]:
            weight = ctx.make().to(grad.dtype)  # under autocast the products are in 16 bits
            rows = grad.reshape(-1, grad.shape[-1])
            for_x = rows.mm(weight.t() if ctx.transposed else weight).to(ctx.dtype)
            for_x = for_x.view(*grad.shape[:-1], for_x.shape[-1])
        if ctx.needs_input_grad[1]:
            for_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return for_x, for_bias, None, None


class PackedLinear(nn.Linear):
    """`nn.Linear` with a source in place of a weight."""

    source: Source

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(input, self.bias, self.source(), False))


class PackedConv1D(Conv1D):
    """transformers' `Conv1D` (GPT-2) with a source in place of a weight."""

    source: Source

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(x, self.bias, self.source(), True))


def pack_layer(module: nn.Module, source: Source, device: torch.device) -> None:
    """Make `module` a packed layer, in place; its old weight is released.

    `weight` stays a parameter of the same shape and dtype for those who ask for these (PEFT does), made of one NaN in
    memory: whoever computes with it by mistake sees NaN.

    Raises:
        CoaloraError: not a layer that can be packed, or a weight that is to be trained.
    """
    packed = {nn.Linear: PackedLinear, Conv1D: PackedConv1D}.get(type(module))
    if packed is None:
        raise CoaloraError(
            f"A {type(module).__name__} cannot be packed: it is neither torch.nn.Linear nor transformers' Conv1D",
            remedy="Set weights to dequantized",
        )
    weight = cast(Tensor, module.weight)
    if weight.requires_grad:
        raise CoaloraError(
            "A weight that requires a gradient cannot be packed", remedy="Call model.requires_grad_(False) first"
        )
    hollow = torch.full((1,), math.nan, dtype=weight.dtype, device=device).expand(weight.shape)
    module.weight = nn.Parameter(hollow, requires_grad=False)
    if module.bias is not None:
        module.bias = nn.Parameter(
            cast(Tensor, module.bias).detach().to(device), cast(Tensor, module.bias).requires_grad
        )
    module.source = source  # type: ignore[assignment]
    module.__class__ = packed


def move_rest(model: nn.Module, packed: set[int], device: torch.device) -> None:
    """Move every parameter and buffer outside of the packed layers; `model.to` would fill their hollow weights."""
    for module in model.modules():
        if id(module) in packed:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
