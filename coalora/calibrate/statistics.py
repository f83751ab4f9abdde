"""Input statistics of the target layers: the second moment of every input feature, E[x_j^2], and where asked for
the whole second-moment matrix E[x x^T].

The moments weight quantization errors by what the layer is fed:
    E ||(W - q(W)) x||^2 = sum_ij (W - q(W))_ij^2 E[x_j^2]
where features are uncorrelated (the diagonal of the Hessian of GPTQ, arXiv 2210.17323, and the importance matrix of
GGUF); the whole matrix is what calibrated quantizers and closed-form compensation read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from coalora.data.benchmark import Split
from coalora.errors import CoaloraError
from coalora.files import read_tensors, write_tensors
from coalora.models.targets import TargetLayer
from coalora.quant.scheme import Choice, InputStatistics
from coalora.quant.space import ChoiceSpace

STATISTICS, QUANTIZED = "statistics.safetensors", "quantized.safetensors"


class InputSums:
    """Sums over what layers are fed while it is open; padding of the batch that `see` was told of last is left out.

    Args:
        device: where the model runs.
        hessians: sum x x^T (in, in) as well; 4 in^2 bytes a layer.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[TargetLayer], device: torch.device, *, hessians: bool
    ) -> None:
        self._model, self._layers = model, layers
        self._sums = [torch.zeros(layer.shape[1], dtype=torch.float64, device=device) for layer in layers]
        self._products = [
            torch.zeros(layer.shape[1], layer.shape[1], device=device) if hessians else None for layer in layers
        ]
        self._counts, self._examples = [0] * len(layers), 0
        self._mask: Tensor | None = None

    def __enter__(self) -> Self:
        self._handles = [
            self._model.get_submodule(layer.name).register_forward_pre_hook(self._hook(index))
            for index, layer in enumerate(self._layers)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def see(self, batch: dict[str, Tensor]) -> None:
        """The batch that runs next."""
        self._mask = batch["attention_mask"].bool()
        self._examples += len(self._mask)

    def telling(self, progress: Callable[[int, int], None] | None, total: int) -> Callable[[dict[str, Tensor]], None]:
        """`see` with a listener (examples, total)."""

        def see(batch: dict[str, Tensor]) -> None:
            self.see(batch)
            if progress:
                progress(self._examples, total)

        return see

    def statistics(self) -> list[InputStatistics]:
        """Means over tokens, on the CPU, one for each layer.

        A layer that sees one vector an example (a pooler), or only some tokens, is averaged over what it sees.

        Raises:
            CoaloraError: a layer that no example reaches, or activations that are not finite.
        """
        moments = [(s / max(count, 1)).float().cpu() for s, count in zip(self._sums, self._counts, strict=True)]
        for layer, moment, count in zip(self._layers, moments, self._counts, strict=True):
            if count == 0 or not bool(torch.isfinite(moment).all()):
                fed = "nothing" if count == 0 else "NaN or infinity"
                raise CoaloraError(
                    f"{layer.name} was fed {fed} in {self._examples} examples",
                    remedy="Leave the layer out of target_modules, or run the base model in a wider dtype",
                )
        return [
            InputStatistics(moment, None if product is None else (product / count).cpu())
            for moment, product, count in zip(moments, self._products, self._counts, strict=True)
        ]

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x, mask = inputs[0].float(), self._mask
            if mask is not None and mask.shape == x.shape[:-1]:
                x = x[mask]
            elif mask is not None and x.shape[:-1] == (mask.numel(),):  # some models flatten batch and tokens
                x = x[mask.flatten()]
            x = x.flatten(0, -2)
            self._sums[index] += x.square().sum(0, dtype=torch.float64)
            self._counts[index] += len(x)
            product = self._products[index]
            if product is not None:
                product.addmm_(x.T, x)

        return add


def inputs_of(split: Split, batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The batches of a split as a model's keyword arguments, without labels."""
    for batch in split.batches(batch_size, device):
        del batch["labels"]
        yield batch


@torch.no_grad()
def collect_statistics(
    model: nn.Module,
    layers: Sequence[TargetLayer],
    split: Split,
    *,
    batch_size: int,
    hessians: bool = False,
) -> list[InputStatistics]:
    """Statistics over the tokens of `split` in one pass over the whole model, for every choice of every scheme.

    Args:
        hessians: collect E[x x^T] (in, in) as well; 4 in^2 bytes a layer.

    Raises:
        CoaloraError: as `InputSums.statistics` does.
    """
    device = next(model.parameters()).device
    with InputSums(model, layers, device, hessians=hessians) as sums:
        for batch in inputs_of(split, batch_size, device):
            sums.see(batch)
            model(**batch)
    return sums.statistics()


def save_statistics(
    folder: Path, layers: Sequence[TargetLayer], statistics: Sequence[InputStatistics], space: ChoiceSpace
) -> None:
    """Write `statistics.safetensors` (`<layer>.second_moment`, and `<layer>.hessian` where there is one) and, where
    weights were kept, `quantized.safetensors` (`<layer>.<choice>.<part>`)."""
    tensors: dict[str, Tensor] = {}
    packed: dict[str, Tensor] = {}
    for layer, known in zip(layers, statistics, strict=True):
        tensors[f"{layer.name}.second_moment"] = known.second_moment
        if known.hessian is not None:
            tensors[f"{layer.name}.hessian"] = known.hessian
        for choice, parts in known.packed.items():
            packed |= {f"{layer.name}.{space.index(choice)}.{part}": tensor for part, tensor in parts.items()}
    write_tensors(folder / STATISTICS, tensors, {"rounding": statistics[0].rounding})
    if packed:
        write_tensors(folder / QUANTIZED, packed)


def load_statistics(folder: Path, layers: Sequence[TargetLayer], space: ChoiceSpace) -> list[InputStatistics]:
    """Read `save_statistics`, in the order of `layers`; kept weights are read when they are asked for.

    Raises:
        CoaloraError: a layer has no statistics in the file.
    """
    tensors, header = read_tensors(folder / STATISTICS)
    absent = [layer.name for layer in layers if f"{layer.name}.second_moment" not in tensors]
    if absent:
        raise CoaloraError(
            f"{STATISTICS} has no statistics of {', '.join(absent[:3])} ({len(absent)} of {len(layers)} layers)",
            remedy="Calibrate this model with these target_modules anew",
        )
    packed = _kept(folder / QUANTIZED, space) if (folder / QUANTIZED).exists() else {}
    return [
        InputStatistics(
            tensors[f"{layer.name}.second_moment"],
            tensors.get(f"{layer.name}.hessian"),
            (header or {}).get("rounding"),
            packed.get(layer.name, {}),
        )
        for layer in layers
    ]


class _Kept(Mapping[Choice, Mapping[str, Tensor]]):
    """Packed weights of one layer by choice, in a file that is mapped into memory."""

    def __init__(self, file: Any, names: Mapping[Choice, Mapping[str, str]]) -> None:
        self._file, self._names = file, names

    def __getitem__(self, choice: Choice) -> dict[str, Tensor]:
        return {part: self._file.get_tensor(name) for part, name in self._names[choice].items()}

    def __iter__(self) -> Iterator[Choice]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _kept(path: Path, space: ChoiceSpace) -> dict[str, _Kept]:
    file = safe_open(path, framework="pt")
    names: dict[str, dict[Choice, dict[str, str]]] = {}
    for name in file.keys():  # noqa: SIM118 (no mapping)
        layer, k, part = name.rsplit(".", 2)
        names.setdefault(layer, {}).setdefault(space.choices[int(k)], {})[part] = name
    return {layer: _Kept(file, own) for layer, own in names.items()}
