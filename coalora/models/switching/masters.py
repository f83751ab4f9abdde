"""The full-precision weights of the target layers, and where they live.

`device`  beside the model: no transfer, one more copy of the target layers on the device.
`cpu`     in RAM, page-locked where the model is on a GPU: a layer at a time crosses the bus when it is quantized.
`mmap`    in the checkpoint's own safetensors files, mapped into memory: the process has no copy of its own; pages are
          read when a layer is quantized, and the system drops them when it needs the memory.

What is fetched is the same number for number in all three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch
from safetensors import safe_open
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.models.targets import TargetLayer
from coalora.recipes import MasterMode


class Masters:
    """The N master weights, out x in, in layer order; `masters[i]` is on the model's device and not to be written to.

    Args:
        layers: the target layers.
        weights: their stored weights in the model (in x out where transposed).
        mode: where the masters live.
        device: where they are used.
        own: the model keeps writing to `weights`, so that masters kept on the same device need a copy.
        checkpoint: for `mmap`, the folder or file of safetensors that the model was loaded from.

    Raises:
        CoaloraError: an unknown mode; `mmap` without a checkpoint, or one that lacks a layer or holds other numbers.
    """

    def __init__(
        self,
        layers: Sequence[TargetLayer],
        weights: Sequence[Tensor],
        mode: MasterMode,
        *,
        device: torch.device,
        own: bool = True,
        checkpoint: Path | str | None = None,
    ) -> None:
        if mode not in get_args(MasterMode):
            raise CoaloraError(
                f"{mode!r} is no place for masters", remedy=f"Choose {' or '.join(get_args(MasterMode))}"
            )
        self.mode = mode
        self.device = device
        self._layers = list(layers)
        self.dtypes = [weight.dtype for weight in weights]
        if mode == "mmap":
            self._stored = _mapped(layers, weights, checkpoint)
        else:
            home = device if mode == "device" else torch.device("cpu")
            self._stored = [_kept(layer, weight, home, own) for layer, weight in zip(layers, weights, strict=True)]
            if mode == "cpu" and device.type == "cuda":
                self._stored = [weight.pin_memory() for weight in self._stored]

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> Tensor:
        layer, stored = self._layers[index], self._stored[index]
        if self.mode != "mmap":
            return stored.to(self.device, non_blocking=True)
        return layer.matrix(stored).to(self.device, self.dtypes[index]).contiguous()

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def held(self) -> list[Tensor]:
        """The tensors that this object keeps in memory of its own: none for `mmap`."""
        return [] if self.mode == "mmap" else list(self._stored)


def _kept(layer: TargetLayer, weight: Tensor, home: torch.device, own: bool) -> Tensor:
    there = layer.matrix(weight.detach()).to(home).contiguous()
    return there.clone() if own and there.data_ptr() == weight.data_ptr() else there


def _mapped(layers: Sequence[TargetLayer], weights: Sequence[Tensor], checkpoint: Path | str | None) -> list[Tensor]:
    """The layers' tensors inside the checkpoint's files, as mapped memory, found by name and checked by value."""
    if checkpoint is None:
        raise CoaloraError(
            "Memory-mapped masters have no checkpoint to be read from",
            remedy="Pass checkpoint=<folder with *.safetensors>, or keep the masters on the cpu",
        )
    path = Path(checkpoint)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    stored = []
    for layer, weight in zip(layers, weights, strict=True):
        tensor = _by_name(found, f"{layer.name}.weight")
        same = (
            tensor is not None
            and tensor.shape == weight.shape
            and torch.equal(tensor.to(weight.dtype), weight.detach().cpu())
        )
        if tensor is None or not same:
            raise CoaloraError(
                f"{layer.name}.weight {'has other numbers' if tensor is not None else 'is missing'} in {path} "
                f"({len(found)} tensors in {len(files)} safetensors files)",
                remedy="Name the checkpoint that the model was loaded from, or keep the masters on the cpu",
            )
        stored.append(tensor)
    return stored


def _by_name(found: dict[str, Tensor], name: str) -> Tensor | None:
    # A checkpoint of the bare body leaves out the prefix of the model around it ("bert.", "model.", "transformer.").
    return found.get(name, found.get(name.split(".", 1)[-1]))
