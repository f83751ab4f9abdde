"""Calibration tables: cost (bits) and error of every choice for every target layer.

Error is the relative error of the layer's output, E the residual W_l - q(W_l, k) and H = E[x x^T] of its inputs:
    err[l, k] = tr(E H E^T) / tr(W_l H W_l^T) = E ||E x||^2 / E ||W_l x||^2,
exact over the calibration data where statistics carry H, which is also what GPTQ minimises; otherwise with H's
diagonal alone, sum_ij E_ij^2 E[x_j^2] / sum_ij W_l,ij^2 E[x_j^2], as if features were uncorrelated. Weighted by nothing
else: HIGGS (NAACL 2025) finds a model's loss close to linear in the layers' relative errors.
Bits are counted, not computed from a nominal rule: every byte that packing stores, padding and offsets included.

Layers may be tied: whatever chooses (allocation, search, selection) works on G groups of layers, whose errors and costs
are sums over a group, and `expand` makes a configuration of the layers of it. Without ties a group is a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from coalora.calibrate.costs import UNITS, CostKind, CostUnit
from coalora.errors import CoaloraError
from coalora.files import folder_nbytes, json_bytes, read_tensors, stored_nbytes, write_tensors
from coalora.models.choices import fitting
from coalora.models.targets import TargetLayer, head_modules, other_tensors, tied_groups
from coalora.quant.scheme import Choice, InputStatistics
from coalora.quant.space import ChoiceSpace
from coalora.recipes import Rounding, Tie
from coalora.threads import each, n_threads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COUNTED = ("rest_nbytes", "head_size", "adapter_nbytes")
_FACTS = 1000  # of configuration.json beside the layers: digests and numbers
_HEADER = 110  # of a tensor in a file's header, beside its layer's name: part, type, shape and offsets

# At most so many layers are quantized together, with so many weights and entries of Hessians; so many in all threads,
# each of which takes about 20 bytes meanwhile.
_TOGETHER, _ELEMENTS, _IN_WORK = 32, 2**26, 2**27


@dataclass(frozen=True)
class CalibrationTables:
    """Errors and sizes of every layer under every choice, as the search knows them.

    Attributes:
        layers: the N target layers.
        space: the K choices.
        nbytes: (N, K) int64, packed bytes of layer l under choice k.
        err: (N, K) float64, relative output error; the layer's largest where not `allowed`.
        base_digest: digest of the base model's files.
        allowed: (N, K) bool, the choices that a layer may take; at least one each.
        cost_kind: what budgets and the search count (`coalora.calibrate.costs`).
        latency: (N, K) float64 microseconds where that is the cost.
        rest_nbytes: size of the files of all other tensors of the base, its config and its tokenizer, as format packed
            writes them; None: not counted.
        head_size: numbers of a classifier's head, which its adapter holds.
        adapter_nbytes: size of the adapter's folder where the cost is `file_bytes` (`of_files`).
        rounding: how weights were quantized (`CalibrationRecipe.rounding`); they are never quantized otherwise.
        tie: which layers take one choice (`coalora.models.targets.tied_groups`).

    Example:
        >>> # tables: what `CoaLoraModel.calibrate` returned
        >>> C = tables.expand(allocate(tables.search_err, tables.search_cost, [3.0, 4.0]))
        >>> bool((tables.average_bits(C) <= [3.0, 4.0]).all())
        True
    """

    layers: list[TargetLayer]
    space: ChoiceSpace
    nbytes: np.ndarray
    err: np.ndarray
    base_digest: str
    allowed: np.ndarray
    cost_kind: CostKind = "average_bits"
    latency: np.ndarray | None = None
    rounding: Rounding = "absmax"
    rest_nbytes: int | None = None
    head_size: int = 0
    adapter_nbytes: int | None = None
    tie: Tie = "none"

    @property
    def n_weights(self) -> int:
        """P, the weights of all target layers."""
        return sum(layer.n_weights for layer in self.layers)

    @property
    def bits(self) -> np.ndarray:
        """(N, K): each layer's share of the average bits, so that a configuration's average is a sum over layers."""
        return self.nbytes * 8 / self.n_weights

    @property
    def cost(self) -> np.ndarray:
        """(N, K): each layer's share of a configuration's cost, in `cost_unit`."""
        if self.cost_kind == "average_bits":
            return self.bits
        if self.latency is None:
            share = np.array([layer.n_weights for layer in self.layers]) / self.n_weights
            return (self.nbytes + self.beside * share[:, None]) / 1e6
        return self.latency

    @cached_property
    def beside(self) -> int:
        """Bytes that every configuration costs beside its packed layers: of base and adapter for `file_bytes`, where
        the header of the layers' file is counted with four tensors a layer, and the file that names the layers' choices
        with the longest of them; none for other costs."""
        if self.cost_kind != "file_bytes":
            return 0
        headers = sum(4 * (len(layer.name) + _HEADER) for layer in self.layers)
        longest = max((self.space.choice_dict(k) for k in range(len(self.space))), key=lambda c: len(json_bytes(c)))
        told = {
            "layers": {layer.name: longest for layer in self.layers},
            "shapes": {layer.name: layer.shape for layer in self.layers},
            "transposed": [layer.name for layer in self.layers if layer.transposed],
        }
        return headers + len(json_bytes(told)) + _FACTS + (self.rest_nbytes or 0) + (self.adapter_nbytes or 0)

    def of_files(self, adapter_nbytes: int) -> CalibrationTables:
        """The same with all bytes that a device holds as their cost: budgets are megabytes of base and adapter.

        Args:
            adapter_nbytes: size of the adapter's folder (`coalora.export.adapter.adapter_nbytes`).

        Raises:
            CoaloraError: nobody has counted the base's other tensors.
        """
        if self.rest_nbytes is None:
            raise CoaloraError(
                "These calibration tables say nothing of the base's other tensors", remedy="Calibrate the model again"
            )
        return replace(self, cost_kind="file_bytes", latency=None, adapter_nbytes=adapter_nbytes)

    @property
    def cost_unit(self) -> CostUnit:
        return UNITS[self.cost_kind]

    def costs(self, configurations: np.ndarray) -> np.ndarray:
        """Cost of configurations (..., N)."""
        if self.cost_kind == "average_bits":
            return self.average_bits(configurations)
        if self.latency is None:
            return (self.total_nbytes(configurations) + self.beside) / 1e6
        return self.latency[np.arange(len(self.layers)), configurations].sum(-1)

    def cost_range(self) -> tuple[float, float]:
        """Smallest and largest cost that a configuration can have."""
        if self.cost_kind == "average_bits":
            return self.bits_range()
        if self.latency is None:
            low, high = self._extremes(self.nbytes)
            return float((low + self.beside) / 1e6), float((high + self.beside) / 1e6)
        low, high = self._extremes(self.latency)
        return float(low), float(high)

    @cached_property
    def groups(self) -> np.ndarray:
        """(N,): the group of each layer, 0 to G-1."""
        return tied_groups(self.layers, self.tie)

    def expand(self, choices: np.ndarray) -> np.ndarray:
        """Configurations (..., N) of the choices (..., G) of groups."""
        return choices[..., self.groups]

    def of_groups(self, configurations: np.ndarray) -> np.ndarray:
        """Choices (..., G) of the groups, for configurations (..., N): the inverse of `expand`.

        Raises:
            CoaloraError: tied layers take different choices; with their names.
        """
        choices = self.firsts(configurations)
        broken = (self.expand(choices) != configurations).reshape(-1, len(self.layers)).any(0)
        if broken.any():
            group = self.groups[broken.argmax()]
            names = [layer.name for layer, own in zip(self.layers, self.groups, strict=True) if own == group]
            raise CoaloraError(
                f"{', '.join(names)} take different choices in a configuration, and they are tied ({self.tie})",
                remedy="Give them one choice, or set choices.tie to none",
            )
        return choices

    def firsts(self, configurations: np.ndarray) -> np.ndarray:
        """Choices (..., G) of the first layer of each group, for configurations (..., N)."""
        return configurations[..., np.unique(self.groups, return_index=True)[1]]

    @property
    def search_allowed(self) -> np.ndarray:
        """(G, K) bool: the choices that all layers of a group may take."""
        allowed = np.ones((self.groups.max() + 1, len(self.space)), dtype=np.bool_)
        np.logical_and.at(allowed, self.groups, self.allowed)
        return allowed

    @property
    def search_err(self) -> np.ndarray:
        """(G, K): `err` of groups."""
        return self._summed(self.err)

    @property
    def search_cost(self) -> np.ndarray:
        """(G, K): `cost` of groups, and where a choice is not allowed more than any configuration's.

        Together with the layer's largest error this makes such a choice dominated: no allocation, budget or proposal
        inside the range of costs ever takes it.
        """
        cost, allowed = self._summed(self.cost), self.search_allowed
        return cost if allowed.all() else np.where(allowed, cost, 2 * extremes(cost, allowed)[1])

    def _summed(self, table: np.ndarray) -> np.ndarray:
        """Sums (G, K) over the layers of each group of a table (N, K)."""
        sums = np.zeros((self.groups.max() + 1, table.shape[1]), dtype=table.dtype)
        np.add.at(sums, self.groups, table)
        return sums

    def _extremes(self, table: np.ndarray) -> tuple[float, float]:
        return extremes(self._summed(table), self.search_allowed)

    def average_bits(self, configurations: np.ndarray) -> np.ndarray:
        """Stored bits a weight of configurations (..., N)."""
        return self.total_nbytes(configurations) * 8 / self.n_weights

    def total_nbytes(self, configurations: np.ndarray) -> np.ndarray:
        """Packed bytes of all target layers of configurations (..., N)."""
        return self.nbytes[np.arange(len(self.layers)), configurations].sum(-1)

    def bits_range(self) -> tuple[float, float]:
        """Smallest and largest average bits that a configuration can have."""
        low, high = self._extremes(self.nbytes)
        return float(low * 8 / self.n_weights), float(high * 8 / self.n_weights)

    def fixed(self, configuration: np.ndarray) -> CalibrationTables:
        """The tables where each layer may take its choice of a configuration (N,) alone."""
        return replace(self, allowed=np.arange(len(self.space)) == np.asarray(configuration)[:, None])

    def save(self, path: Path) -> None:
        header: dict[str, Any] = {
            "layers": [layer.to_dict() for layer in self.layers],
            "space": self.space.to_dict(),
            "base_digest": self.base_digest,
        }
        # What is as it usually is takes no room.
        tensors = {"nbytes": self.nbytes, "err": self.err}
        tensors |= {} if self.allowed.all() else {"allowed": self.allowed}
        tensors |= {} if self.latency is None else {"latency": self.latency}
        header |= {} if self.cost_kind == "average_bits" else {"cost": self.cost_kind}
        header |= {} if self.rounding == "absmax" else {"rounding": self.rounding}
        header |= {name: n for name in _COUNTED if (n := getattr(self, name))}
        header |= {} if self.tie == "none" else {"tie": self.tie}
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: Path) -> CalibrationTables:
        tensors, header = read_tensors(path)
        return cls(
            [TargetLayer.from_dict(fields) for fields in header["layers"]],
            ChoiceSpace.from_dict(header["space"]),
            tensors["nbytes"].numpy(),
            tensors["err"].numpy(),
            header["base_digest"],
            tensors["allowed"].numpy() if "allowed" in tensors else np.ones(tensors["err"].shape, dtype=np.bool_),
            header.get("cost", "average_bits"),
            tensors["latency"].numpy() if "latency" in tensors else None,
            header.get("rounding", "absmax"),
            tie=header.get("tie", "none"),
            **{name: header[name] for name in _COUNTED if name in header},
        )


def extremes(table: np.ndarray, allowed: np.ndarray) -> tuple[float, float]:
    """Smallest and largest sum over the rows of a table (N, K), each taking one of its allowed (N, K) choices."""
    low = np.where(allowed, table, table.max()).min(1).sum()
    return low, np.where(allowed, table, table.min()).max(1).sum()


@torch.no_grad()
def error_table(
    weights: Sequence[Tensor],
    statistics: Sequence[InputStatistics],
    space: ChoiceSpace,
    *,
    allowed: np.ndarray | None = None,
    keep: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """err (N, K) float64 of the formula above; weights are out x in.

    What is not `allowed` (N, K) is not quantized, and has the layer's largest error: finite, and never worth taking.

    Args:
        keep: put the packed weights into each layer's `InputStatistics.packed`.
        progress: listener (done, total), counting layers times choices.
    """
    err = np.zeros((len(weights), len(space.choices)))
    may = np.ones(err.shape, dtype=np.bool_) if allowed is None else allowed
    pairs, done, lock, stopped = list(zip(weights, statistics, strict=True)), 0, Lock(), Event()

    def measure(batch: list[int]) -> None:
        nonlocal done
        own, known = zip(*(pairs[i] for i in batch), strict=True)
        measures = [_OutputNorm(of_layer, weight.device) for weight, of_layer in zip(own, known, strict=True)]
        norms = [measure(weight.float()) or 1.0 for weight, measure in zip(own, measures, strict=True)]
        for k, states in space.quantize_layers(own, np.flatnonzero(may[batch[0]]).tolist(), known):
            scheme, choice = space.scheme_of(k), space.choices[k]
            for at, (i, state) in enumerate(zip(batch, states, strict=True)):
                weight = own[at]
                quantized = scheme.dequantize(state, choice, weight.shape)
                err[i, k] = measures[at](quantized.sub_(weight.float())) / norms[at]
                if keep:
                    packed = scheme.pack(state, choice, weight.shape)
                    cast(dict[Choice, Any], known[at].packed)[choice] = {n: t.cpu() for n, t in packed.items()}
            with lock:
                if stopped.is_set():
                    return
                done += len(batch)
                try:
                    if progress:
                        progress(done, int(may.sum()))
                except BaseException:
                    stopped.set()
                    raise
        for i in batch:
            err[i, ~may[i]] = err[i].max()

    try:
        if pairs:
            threads = n_threads(weights[0].device)
            batches = _batches(weights, may, threads)
            most = max(_elements(weights[batch[0]]) * len(batch) for batch in batches)
            each(measure, batches, max(1, min(threads, _IN_WORK // most)), wait=False)
    finally:
        stopped.set()
    return err


def _batches(weights: Sequence[Tensor], may: np.ndarray, threads: int) -> list[list[int]]:
    """Layers of one shape with the same choices, at most so many that they and their Hessians are small in memory, and
    so few that there is work for all threads; the longest work first.

    Error feedback takes a layer's features one by one, and is quicker the more weights take each step together.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, weight in enumerate(weights):
        alike.setdefault((*weight.shape, weight.device, may[i].tobytes()), []).append(i)
    batches = []
    for found in alike.values():
        step = max(1, min(_TOGETHER, _ELEMENTS // _elements(weights[found[0]]), -(-len(found) // threads)))
        batches += [found[start : start + step] for start in range(0, len(found), step)]
    return sorted(batches, key=lambda batch: -sum(weights[i].numel() for i in batch))


def _elements(weight: Tensor) -> int:
    """Entries of a weight (out, in) and of its inputs' Hessian."""
    rows, columns = weight.shape
    return columns * (rows + columns)


class _OutputNorm:
    """E ||M x||^2 of matrices M (out, in), float32, over the inputs x that `statistics` describe; M is left as it is.

    A feature that never fires in calibration still counts a little, or its weights could be anything.
    """

    def __init__(self, statistics: InputStatistics, device: torch.device) -> None:
        moment = statistics.second_moment
        floor = 1e-6 * float(moment.mean())
        self._weighting = (moment + floor).to(device)
        self._hessian: Tensor | None = None
        if statistics.hessian is not None:
            self._hessian = statistics.hessian.to(device, torch.float32, copy=True)
            self._hessian.diagonal().add_(floor)

    def __call__(self, matrix: Tensor) -> float:
        if self._hessian is None:
            return float(matrix.square().sum(0) @ self._weighting)
        # By rows, so that rounding does not grow with their number; never below zero but for rounding.
        return max(0.0, float((matrix @ self._hessian).mul_(matrix).sum(1).sum(dtype=torch.float64)))


def counted(
    tables: CalibrationTables,
    model: nn.Module,
    rest_dtype: torch.dtype | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CalibrationTables:
    """The tables with the sizes of what `model` (also on the meta device) has beside its target layers."""
    rest = stored_nbytes(other_tensors(model, [layer.name for layer in tables.layers], rest_dtype))
    with TemporaryDirectory() as folder:
        for told in (getattr(model, "config", None), tokenizer):
            if told is not None:
                told.save_pretrained(folder)
        rest += folder_nbytes(Path(folder))
    heads = [model.get_submodule(name) for name in head_modules(model)]
    return replace(tables, rest_nbytes=rest, head_size=sum(p.numel() for head in heads for p in head.parameters()))


def calibration_tables(
    layers: Sequence[TargetLayer],
    space: ChoiceSpace,
    err: np.ndarray,
    base_digest: str,
    allowed: np.ndarray | None = None,
    rounding: Rounding = "absmax",
    tie: Tie = "none",
) -> CalibrationTables:
    """Join the error table with the exact packed sizes; `allowed` None lets every layer take what fits."""
    nbytes = space.packed_nbytes_table([layer.shape for layer in layers])
    may = fitting(layers, space, allowed)
    return CalibrationTables(list(layers), space, nbytes, err, base_digest, may, rounding=rounding, tie=tie)
