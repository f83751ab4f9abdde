"""Input statistics of the target layers: the second moment of every input feature, E[x_j^2].

They weight quantization errors by what the layer is fed: E ||(W - q(W)) x||^2 = sum_ij (W - q(W))_ij^2 E[x_j^2] where
features are uncorrelated (the diagonal of the Hessian of GPTQ, arXiv 2210.17323, and the importance matrix of GGUF).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from coalora.data.benchmark import Split
from coalora.errors import CoaloraError
from coalora.models.targets import TargetLayer


@torch.no_grad()
def input_second_moments(
    model: nn.Module,
    layers: Sequence[TargetLayer],
    split: Split,
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """E[x_j^2] over the tokens of `split`, one float32 tensor (in_features,) for each layer; padding is left out.

    A layer that sees one vector an example (a pooler), or only some tokens, is averaged over what it sees.

    Raises:
        CoaloraError: a layer that no example reaches, or activations that are not finite.
    """
    device = next(model.parameters()).device
    sums = [torch.zeros(layer.shape[1], dtype=torch.float64, device=device) for layer in layers]
    counts = [0] * len(layers)
    mask: Tensor | None = None

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].float()
            if mask is not None and mask.shape == x.shape[:-1]:
                x = x[mask]
            elif mask is not None and x.shape[:-1] == (mask.numel(),):  # some models flatten batch and tokens
                x = x[mask.flatten()]
            x = x.flatten(0, -2)
            sums[index] += x.square().sum(0, dtype=torch.float64)
            counts[index] += len(x)

        return add

    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(hook(index)) for index, layer in enumerate(layers)
    ]
    try:
        done = 0
        for batch in split.batches(batch_size, device):
            batch.pop("labels")
            mask = batch["attention_mask"].bool()
            model(**batch)
            done += len(mask)
            if progress:
                progress(done, len(split))
    finally:
        for handle in handles:
            handle.remove()
    moments = [(s / max(count, 1)).float().cpu() for s, count in zip(sums, counts, strict=True)]
    for layer, moment, count in zip(layers, moments, counts, strict=True):
        if count == 0 or not bool(torch.isfinite(moment).all()):
            raise CoaloraError(
                "calibration feeds every target layer finite inputs",
                got=f"{layer.name}: {'no input' if count == 0 else 'NaN or inf'} in {len(split)} examples",
                remedy="leave the layer out of target_modules, or run the base model in a wider dtype",
            )
    return moments
