"""Group-wise quantization: what schemes share that store a code for each weight and a scale for each group.

Every row of a weight (out, in) is cut along the input dimension into G = ceil(in / g) groups of g neighbours, the last
of which may be short. A subclass of `GroupedScheme` says what is stored (`layout`) and gives the arithmetic of a choice
(`Grid`): how a group's scale follows from its weights, what is stored of it, and the code of a weight under what is
stored. How scales and codes are found is the same for all of them, by what is known of the layer's inputs:

    absmax    scales from the extremes of a group, codes to nearest                      nothing known
    searched  scales that minimise sum_j E[x_j^2] (w_j - w^_j)^2, codes to nearest       second moments
    feedback  columns one after the other, what is left of the weight making up for the  Hessian E[x x^T]
              error so far (`coalora.quant.feedback`); scales searched as a group's turn comes

The last two change neither what is stored nor how it is read. Padding of a short group is arithmetic only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from coalora.errors import CoaloraError
from coalora.quant.feedback import CHUNK, Feedback, solve
from coalora.quant.kernels.available import contiguous, use_triton
from coalora.quant.packing import pack_codes, packed_size, unpack_codes
from coalora.quant.scheme import Choice, InputStatistics, Scheme, check_tensors, check_weight, not_finite, own_choice

C = TypeVar("C", bound=Choice)
Tensors = tuple[Tensor, ...]
# By bits, the parts of a group's range that are tried; each is refitted by least squares, so that few of them do. At 8
# bits there is nothing to gain.
SEARCHED = {2: (1.0, 0.85, 0.7, 0.58, 0.46), 3: (1.0, 0.9, 0.8, 0.7, 0.6), 4: (1.0, 0.95, 0.9, 0.84, 0.76)}


@dataclass(frozen=True)
class Stored:
    """A tensor of a state: ``count`` codes of ``bits`` bits in uint8, or ``count`` numbers of a dtype."""

    count: int
    kind: int | torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.kind if isinstance(self.kind, torch.dtype) else torch.uint8

    @property
    def packed_count(self) -> int:
        return self.count if isinstance(self.kind, torch.dtype) else packed_size(self.count, self.kind)

    @property
    def packed_nbytes(self) -> int:
        return self.packed_count * self.dtype.itemsize


class Grid(ABC):
    """The arithmetic of one choice, elementwise over groups.

    A group's weights lie along the second last dimension: weights are float32 (..., g, R), and what belongs to a group
    (its scale, its zero point: a tuple of float32 tensors, its *parameters*) is (..., 1, R).

    Attributes:
        key: what `absmax` and `searched` depend on; choices of equal keys share what they return.
        has_frame: whether `frame` returns any.
    """

    key: Hashable
    has_frame: ClassVar[bool] = False

    @abstractmethod
    def absmax(self, groups: Tensor) -> Tensors:
        """Parameters from the extremes of every group."""

    @abstractmethod
    def searched(self, groups: Tensor, weighting: Tensor, frame: Tensors = ()) -> Tensors:
        """Parameters of less squared error, weighted by ``weighting`` (..., g, 1); absmax's where none is less. With a
        frame, those that have a stored form in it."""

    def frame(self, parameters: Tensors) -> tuple[Tensors, dict[str, Tensor]]:
        """What the stored form of a group's parameters shares with other groups, from all parameters in the order of
        rows: tensors of their shape, and what a state holds of it."""
        return (), {}

    @abstractmethod
    def rounded(self, parameters: Tensors, frame: Tensors) -> tuple[Tensors, Tensors]:
        """What is stored of parameters (..., 1, R), and the parameters that it stands for."""

    @abstractmethod
    def codes(self, weights: Tensor, parameters: Tensors) -> Tensor:
        """Codes uint8 (..., g, R) of weights under rounded parameters."""

    @abstractmethod
    def values(self, codes: Tensor, parameters: Tensors) -> Tensor:
        """Weights float32 that codes stand for."""

    @abstractmethod
    def named(self, stored: Tensors) -> dict[str, Tensor]:
        """What is stored of all groups (out * G,), in the order of rows, by its names in a state."""


class GroupedScheme(Scheme, Generic[C]):
    """Scheme of codes and groups along a row; see the module docstring.

    State: ``codes`` uint8 (out * in,), row-major, and what else `layout` names; packed: the same, codes bit-packed.
    """

    has_kernels = True
    choice_type: ClassVar[type[Any]]

    @abstractmethod
    def group_size(self, choice: C) -> int:
        """g."""

    @abstractmethod
    def layout(self, choice: C, n_weights: int, n_groups: int) -> dict[str, Stored]:
        """The tensors of a state, by name."""

    @abstractmethod
    def grid(self, choice: C) -> Grid:
        """The arithmetic of a choice."""

    @abstractmethod
    def parameters(self, state: Mapping[str, Tensor], choice: C) -> Tensors:
        """The parameters float32 (out * G,) that a state stands for, in the order of rows."""

    def packed_nbytes(self, choice: Choice, shape: Sequence[int]) -> int:
        return sum(stored.packed_nbytes for stored in self._layout(choice, shape).values())

    def quantize(self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None) -> dict[str, Tensor]:
        return next(self.quantize_layers([weight], [choice], [statistics]))[0]

    def quantize_layers(
        self, weights: Sequence[Tensor], choices: Sequence[Choice], statistics: Sequence[InputStatistics | None]
    ) -> Iterator[list[dict[str, Tensor]]]:
        own = [own_choice(choice, self.choice_type) for choice in choices]
        left = [c for c in own if not all(known is not None and c in known.packed for known in statistics)]
        fresh = self.fresh_states(weights, left, statistics)
        for choice in own:
            made: Sequence[dict[str, Tensor] | None] = next(fresh) if choice in left else [None] * len(weights)
            states = []
            for weight, known, state in zip(weights, statistics, made, strict=True):
                kept = self._kept(weight, choice, known)
                states.append(state if kept is None else self.unpack(kept, choice, weight.shape))
            yield cast(list[dict[str, Tensor]], states)

    def fresh_states(
        self, weights: Sequence[Tensor], choices: Sequence[C], statistics: Sequence[InputStatistics | None]
    ) -> Iterator[list[dict[str, Tensor]]]:
        """`quantize_layers` of what is not packed yet."""
        layers = [_Layer(weight, known) for weight, known in zip(weights, statistics, strict=True)]
        for choice in choices:
            yield _quantized(layers, self.grid(choice), self.group_size(choice))

    def dequantize(
        self,
        state: Mapping[str, Tensor],
        choice: Choice,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        self._check(state, choice, shape, packed=False)
        c = own_choice(choice, self.choice_type)
        rows, columns = shape
        groups = _grouped(state["codes"].view(rows, columns), self.group_size(c))
        grid, parameters = self.grid(c), tuple(p.view(rows, -1, 1, 1) for p in self.parameters(state, c))
        weight = torch.empty((rows, columns), dtype=dtype, device=groups.device)
        for part in _parts(groups):
            values = grid.values(groups[part], tuple(p[part] for p in parameters))
            weight[part] = values.view(len(values), -1)[:, :columns]
        return weight

    def pack(self, state: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        layout = self._check(state, choice, shape, packed=False)
        return {
            name: state[name].clone() if isinstance(stored.kind, torch.dtype) else pack_codes(state[name], stored.kind)
            for name, stored in layout.items()
        }

    def unpack(self, tensors: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        layout = self._check(tensors, choice, shape, packed=True)
        return {
            name: tensors[name]
            if isinstance(stored.kind, torch.dtype)
            else unpack_codes(tensors[name], stored.kind, stored.count)
            for name, stored in layout.items()
        }

    # GPU kernels: module `triton` of a scheme's package has `dequantize_packed_many`, `quantize_packed_many`,
    # `kernel_rows` and `dequantize_rows`. They quantize by absmax alone, and need triton, which CPUs lack.

    @abstractmethod
    def kernels(self) -> ModuleType:
        """The module of its GPU kernels, imported."""

    def quantize_packed(
        self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None
    ) -> dict[str, Tensor]:
        c = own_choice(choice, self.choice_type)
        if self._kernels_quantize(weight, c, statistics):
            return self._quantized_by_kernels([(weight, c, None)])[0]
        kept = self._kept(weight, c, statistics)
        return super().quantize_packed(weight, choice, statistics) if kept is None else kept

    def quantize_packed_many(
        self, layers: Sequence[tuple[Tensor, Choice, InputStatistics | None, Tensor]]
    ) -> list[dict[str, Tensor]]:
        own = [(weight, own_choice(choice, self.choice_type), known, out) for weight, choice, known, out in layers]
        if all(
            self._kernels_quantize(w, c, known) and use_triton(out) and out.is_contiguous() for w, c, known, out in own
        ):
            return self._quantized_by_kernels([(weight, choice, out) for weight, choice, _, out in own])
        return super().quantize_packed_many(layers)

    def dequantize_packed(
        self, packed: Mapping[str, Tensor], choice: Choice, shape: Sequence[int], out: Tensor
    ) -> None:
        if use_triton(out):
            self.dequantize_packed_many([(packed, choice, out)])
        else:
            super().dequantize_packed(packed, choice, shape, out)

    def dequantize_packed_many(self, layers: Sequence[tuple[Mapping[str, Tensor], Choice, Tensor]]) -> None:
        if not all(use_triton(out) for _, _, out in layers):
            super().dequantize_packed_many(layers)
            return
        for packed, choice, out in layers:
            self._check(packed, choice, out.shape, packed=True)
        with contiguous([out for _, _, out in layers]) as written:
            self.kernels().dequantize_packed_many(
                [(packed, choice, own) for (packed, choice, _), own in zip(layers, written, strict=True)]
            )

    def kernel_rows(self, layers: Sequence[tuple[Mapping[str, Tensor], Choice, Tensor]]) -> Tensor:
        return self.kernels().kernel_rows(layers)

    def dequantize_rows(self, rows: Tensor, n_weights: int) -> None:
        self.kernels().dequantize_rows(rows, n_weights)

    def _quantized_by_kernels(self, layers: Sequence[tuple[Tensor, C, Tensor | None]]) -> list[dict[str, Tensor]]:
        made = [self._empty(choice, weight.shape, weight.device) for weight, choice, _ in layers]
        self.kernels().quantize_packed_many(
            [(w, c, packed, out) for (w, c, out), packed in zip(layers, made, strict=True)]
        )
        return made

    def _kernels_quantize(self, weight: Tensor, choice: C, statistics: InputStatistics | None) -> bool:
        """Whether the weight is quantized by kernels; one that is none is left to the plain path, which says so."""
        by_absmax = statistics is None or (choice not in statistics.packed and statistics.method == "absmax")
        return (
            not self.needs_statistics and by_absmax and use_triton(weight) and weight.dim() == 2 and weight.numel() > 0
        )

    def _kept(self, weight: Tensor, choice: C, statistics: InputStatistics | None) -> dict[str, Tensor] | None:
        """What calibration has packed, on the weight's device."""
        if statistics is None or choice not in statistics.packed:
            return None
        packed = {name: tensor.to(weight.device) for name, tensor in statistics.packed[choice].items()}
        self._check(packed, choice, weight.shape, packed=True)
        return packed

    def _empty(self, choice: C, shape: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Packed tensors to be filled."""
        layout = self._layout(choice, shape)
        return {name: torch.empty(s.packed_count, dtype=s.dtype, device=device) for name, s in layout.items()}

    def _layout(self, choice: Choice, shape: Sequence[int]) -> dict[str, Stored]:
        c = own_choice(choice, self.choice_type)
        if len(shape) != 2 or min(shape) < 1:
            raise CoaloraError(f"{tuple(shape)} is no shape of a weight", remedy="Give (out, in), neither of them 0")
        return self.layout(c, shape[0] * shape[1], shape[0] * -(-shape[1] // self.group_size(c)))

    def _check(
        self, tensors: Mapping[str, Tensor], choice: Choice, shape: Sequence[int], *, packed: bool
    ) -> dict[str, Stored]:
        layout = self._layout(choice, shape)
        expected = {
            name: (stored.dtype, (stored.packed_count if packed else stored.count,)) for name, stored in layout.items()
        }
        check_tensors("packed weight" if packed else "state", tensors, expected, choice, shape)
        return layout


class _Layer:
    """One weight to be quantized under several choices, which share what they can; groups are (out, G, g, 1)."""

    def __init__(self, weight: Tensor, statistics: InputStatistics | None) -> None:
        check_weight(weight)
        self._weight = weight.detach().to(torch.float32).contiguous()
        self._finite = bool(torch.isfinite(self._weight.amax()) & torch.isfinite(self._weight.amin()))
        self._method = "absmax" if statistics is None else statistics.method
        self._moment, self.feedback = None, None
        if statistics is not None and self._method != "absmax":
            statistics.check(weight.shape[1])
            moment = statistics.second_moment.to(weight.device, torch.float32)
            # A feature that never fired counts a little, or its weights could be anything.
            self._moment = moment + 1e-6 * moment.mean() + torch.finfo(torch.float32).tiny
            if self._method == "feedback":
                assert statistics.hessian is not None
                self.feedback = Feedback(statistics.hessian.to(weight.device))
        self._fitted: dict[Hashable, Tensors] = {}

    def groups(self, size: int) -> Tensor:
        """The weight's groups (out, G, g, 1).

        Raises:
            CoaloraError: NaN or infinite weights.
        """
        if not self._finite:
            raise not_finite()
        return _grouped(self._weight, size)

    def rounded(self, grid: Grid, size: int) -> dict[str, Tensor]:
        """A state by absmax or searched scales, codes to nearest."""
        groups = self.groups(size)
        fitted = self.fit(grid, size)
        frame, shared = grid.frame(fitted)
        stored, parameters = grid.rounded(fitted, frame)
        codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
        for part in _parts(groups):
            codes[part] = grid.codes(groups[part], tuple(p[part] for p in parameters))
        return self.state(grid, codes, stored, shared)

    def state(self, grid: Grid, codes: Tensor, stored: Tensors, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state of codes and stored parameters of all groups, in the order of rows."""
        rows, columns = self._weight.shape
        return {
            "codes": codes.reshape(rows, -1)[:, :columns].reshape(-1),
            **grid.named(tuple(s.reshape(-1) for s in stored)),
            **shared,
        }

    def fit(self, grid: Grid, size: int) -> Tensors:
        """Parameters (out, G, 1, 1) of all groups."""
        key = (size, grid.key)
        if key not in self._fitted:
            groups = self.groups(size)
            weighting = None if self._moment is None else _grouped(self._moment[None], size)
            parts = [
                grid.absmax(groups[part]) if weighting is None else grid.searched(groups[part], weighting)
                for part in _parts(groups)
            ]
            self._fitted[key] = tuple(torch.cat(of_parts) for of_parts in zip(*parts, strict=True))
        return self._fitted[key]


def _quantized(layers: Sequence[_Layer], grid: Grid, size: int) -> list[dict[str, Tensor]]:
    """States of layers under one choice; error feedback works on all weights of one shape at once."""
    solvers = [layer.feedback for layer in layers if layer.feedback is not None]
    groups = [layer.groups(size) for layer in layers]
    if len(solvers) < len(layers) or len({of_layer.shape for of_layer in groups}) > 1:
        if len(layers) > 1:
            return [state for layer in layers for state in _quantized([layer], grid, size)]
        if not solvers:
            return [layers[0].rounded(grid, size)]
    framed = [grid.frame(layer.fit(grid, size)) if grid.has_frame else ((), {}) for layer in layers]
    frame = tuple(torch.stack([_turned(f) for f in parts]) for parts in zip(*(own for own, _ in framed), strict=True))
    codes, stored = solve(solvers, grid, torch.stack([_turned(of_layer) for of_layer in groups]), frame)
    return [
        layer.state(grid, codes[i].permute(2, 0, 1), tuple(s[i].permute(2, 0, 1) for s in stored), shared)
        for i, (layer, (_, shared)) in enumerate(zip(layers, framed, strict=True))
    ]


def _turned(groups: Tensor) -> Tensor:
    """(G, g, out) of (out, G, g, 1), the order in which the rows of a weight go together."""
    return groups.squeeze(-1).permute(1, 2, 0)


def _grouped(matrix: Tensor, size: int) -> Tensor:
    """(n, G, g, 1) of (n, in), the last group padded with zeros; the same memory where nothing is to be padded."""
    short = -matrix.shape[1] % size
    return (pad(matrix, (0, short)) if short else matrix).view(len(matrix), -1, size, 1)


def _parts(groups: Tensor) -> list[slice]:
    """Rows to work on at a time."""
    rows = len(groups)
    step = rows if groups.device.type != "cpu" else max(1, CHUNK * rows // groups.numel())
    return [slice(start, start + step) for start in range(0, rows, step)]
