"""Interface of a quantization scheme.

A scheme is a finite, ordered list of *choices* (one of which each target layer gets: the configuration ``C``
assigns one choice to each of ``N`` layers), a bits-per-weight rule, and the four maps

    weight --quantize--> state --pack--> tensors on disk --unpack--> state --dequantize--> weight

Average bits count every stored byte, so ``packed_nbytes`` is exact and ``nominal_bits`` only the formula that
papers quote. A further scheme is one module that subclasses `Scheme` (docs/extending.md), registered in
`coalora.quant.registry`, by an entry point, or not at all: ``module:name`` names it as well.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.recipes import Rounding

FieldValue = int | str


@dataclass(frozen=True)
class Choice:
    """One way to quantize one layer; a subclass has one dataclass field per field of its scheme.

    Attributes:
        field_values: ordered values of every field (neighbours in the search are adjacent values); insertion order is
            field order.

    Raises:
        CoaloraError: a value that the field does not have.
    """

    field_values: ClassVar[Mapping[str, tuple[FieldValue, ...]]]

    def __post_init__(self) -> None:
        for name, value in self.as_dict().items():
            known = self.field_values[name]
            if value not in known:
                raise CoaloraError(
                    f"{type(self).__name__} has no {name} {value!r}",
                    remedy=f"Take one of {', '.join(map(repr, known))}",
                )
            # NumPy integers, whole floats and bools become the plain value, or as_dict would not be JSON-able.
            object.__setattr__(self, name, known[known.index(value)])

    @property
    def width(self) -> int | None:
        """Bits of a code, by which limits on bits and pairs for low bits go: the field `bits`, where there is one."""
        bits = self.as_dict().get("bits")
        return bits if isinstance(bits, int) else None

    def as_dict(self) -> dict[str, FieldValue]:
        """Field values by name, JSON-able, in the scheme's field order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.as_dict().items())


@dataclass(frozen=True)
class InputStatistics:
    """Calibration of one layer: its inputs x (in_features,), and what it has quantized already.

    Attributes:
        second_moment: float32 (in,), E[x_j^2].
        hessian: float32 (in, in), E[x x^T], the Hessian of the layer's output error up to a factor; None where
            nothing in the run asks for it.
        rounding: how group-wise schemes find scales and codes (`coalora.quant.grouped`); None: the best that is known
            enough for, `feedback` with a Hessian and `searched` without.
        packed: by choice, the packed weight that was made with these statistics, read in place of quantizing again.
    """

    second_moment: Tensor
    hessian: Tensor | None = None
    rounding: Rounding | None = None
    packed: Mapping[Choice, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def method(self) -> Rounding:
        """`rounding`, decided.

        Raises:
            CoaloraError: error feedback without a Hessian, where there is anything left to quantize.
        """
        if self.rounding == "feedback" and self.hessian is None and not self.packed:
            raise CoaloraError(
                "Error feedback has no Hessian of a layer's inputs to work with",
                remedy="Collect it with coalora.calibrate.statistics.collect_statistics(hessians=True)",
            )
        return self.rounding or ("searched" if self.hessian is None else "feedback")

    def check(self, in_features: int) -> None:
        """Compare sizes with those of a weight.

        Raises:
            CoaloraError: statistics of another number of features.
        """
        for tensor, name in ((self.second_moment, "Second moments"), (self.hessian, "A Hessian")):
            if tensor is not None and tensor.shape != (in_features,) * tensor.dim():
                raise CoaloraError(
                    f"{name} of shape {tuple(tensor.shape)} are not those of {in_features} input features",
                    remedy="Calibrate with this model and these layers",
                )


class Scheme(ABC):
    """A list of choices with its storage rule and arithmetic; stateless, one instance per process.

    Attributes:
        name: its name in the registry.
        choice_type: the `Choice` subclass of this scheme.
        has_kernels: whether `kernel_rows` and `dequantize_rows` are there.
        needs_statistics: whether `quantize` reads the Hessian of the layer's inputs (calibrated schemes).

    Example:
        >>> from coalora import SCHEMES
        >>> scheme = SCHEMES["int"]()
        >>> len(scheme.choices()), scheme.nominal_bits(scheme.choices()[0])
        (24, 2.5)
    """

    needs_statistics: ClassVar[bool] = False
    has_kernels: ClassVar[bool] = False
    name: str
    choice_type: ClassVar[type[Choice]]

    @property
    def field_values(self) -> Mapping[str, tuple[FieldValue, ...]]:
        """Ordered values of every field of `choice_type`."""
        return self.choice_type.field_values

    def choices(self) -> tuple[Choice, ...]:
        """All K choices, last field fastest; a scheme whose fields do not form a product overrides this."""
        names = tuple(self.field_values)
        return tuple(
            self.choice_type(**dict(zip(names, values, strict=True)))
            for values in itertools.product(*self.field_values.values())
        )

    def require_packages(self) -> None:  # noqa: B027 (most schemes need none)
        """Look for what `quantize` imports beyond the wheel's dependencies; cheap, for checks before long work.

        Raises:
            CoaloraError: a package of an extra is absent; names the extra.
        """

    @abstractmethod
    def nominal_bits(self, choice: Choice) -> float:
        """Bits per weight by the literature's formula: no rounding up of short blocks, no constant terms."""

    def fits(self, choice: Choice, shape: Sequence[int]) -> bool:
        """Whether a weight of ``shape`` (out, in) can be quantized under ``choice``; any can, in most schemes."""
        return True

    @abstractmethod
    def packed_nbytes(self, choice: Choice, shape: Sequence[int]) -> int:
        """Exact bytes of the tensors that `pack` returns for a weight of ``shape``; arithmetic only."""

    @abstractmethod
    def quantize(self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None) -> dict[str, Tensor]:
        """Quantize ``weight`` (out, in) to unpacked codes and their scales.

        Args:
            statistics: of the layer's inputs; without them scales are those of the extremes, and calibrated schemes
                refuse.

        Raises:
            CoaloraError: the weight is empty, not floating point, or not finite.
        """

    def quantize_layers(
        self, weights: Sequence[Tensor], choices: Sequence[Choice], statistics: Sequence[InputStatistics | None]
    ) -> Iterator[list[dict[str, Tensor]]]:
        """`quantize` of every weight, for every choice in turn: exactly that, sharing work where a scheme can."""
        for choice in choices:
            yield [self.quantize(weight, choice, known) for weight, known in zip(weights, statistics, strict=True)]

    @abstractmethod
    def dequantize(
        self,
        state: Mapping[str, Tensor],
        choice: Choice,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The weight of ``shape`` (out, in) that ``state`` stands for: computed in float32, then cast."""

    @abstractmethod
    def pack(self, state: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        """The tensors to write to disk, `packed_nbytes` bytes in all."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        """Inverse of `pack`.

        Raises:
            CoaloraError: a tensor is missing, or has not the size or dtype of ``choice`` and ``shape``.
        """

    def quantize_packed(
        self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None
    ) -> dict[str, Tensor]:
        """``pack(quantize(weight))``, or a faster equal."""
        return self.pack(self.quantize(weight, choice, statistics), choice, weight.shape)

    def dequantize_packed(
        self, packed: Mapping[str, Tensor], choice: Choice, shape: Sequence[int], out: Tensor
    ) -> None:
        """Write ``dequantize(unpack(packed))``, rounded to its dtype, into ``out`` (out, in); or do a faster equal."""
        out.copy_(self.dequantize(self.unpack(packed, choice, shape), choice, shape))

    def dequantize_packed_many(self, layers: Sequence[tuple[Mapping[str, Tensor], Choice, Tensor]]) -> None:
        """`dequantize_packed` for every (packed, choice, out); a scheme with a GPU kernel makes it one launch."""
        for packed, choice, out in layers:
            self.dequantize_packed(packed, choice, out.shape, out)

    def quantize_packed_many(
        self, layers: Sequence[tuple[Tensor, Choice, InputStatistics | None, Tensor]]
    ) -> list[dict[str, Tensor]]:
        """`quantize_packed` of every (weight, choice, statistics, out), whose weight is written into ``out`` as well; a
        scheme with GPU kernels makes it one group of launches."""
        made = [self.quantize_packed(weight, choice, statistics) for weight, choice, statistics, _ in layers]
        self.dequantize_packed_many([(p, c, out) for p, (_, c, _, out) in zip(made, layers, strict=True)])
        return made

    def kernel_rows(self, layers: Sequence[tuple[Mapping[str, Tensor], Choice, Tensor]]) -> Tensor:
        """int64 (n, columns), on the host: what `dequantize_rows` reads of every (packed, choice, contiguous out)."""
        raise NotImplementedError

    def dequantize_rows(self, rows: Tensor, n_weights: int) -> None:
        """Write the weights of all rows, on their device, in one launch; ``n_weights``: of the largest layer."""
        raise NotImplementedError

    def fake_quantize(self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None) -> Tensor:
        """``dequantize(quantize(weight))`` in float32 on the weight's device, or a faster equal."""
        return self.dequantize(self.quantize(weight, choice, statistics), choice, weight.shape)


C = TypeVar("C", bound=Choice)


def own_choice(choice: Choice, kind: type[C]) -> C:
    """`choice` as one of a scheme's own.

    Raises:
        CoaloraError: it is one of another scheme.
    """
    if not isinstance(choice, kind):
        raise CoaloraError(f"{choice!r} is no {kind.__name__}", remedy="Use it with the scheme that it belongs to")
    return choice


def check_tensors(
    what: str,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    choice: Choice,
    shape: Sequence[int],
) -> None:
    """Compare a state's or packed weight's tensors, named ``what``, with the dtype and shape that each must have.

    Raises:
        CoaloraError: one is missing, of another dtype or of another shape, or there is one more.
    """
    got = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if wrong := [name for name in {**expected, **got} if got.get(name) != expected.get(name)]:
        described = "; ".join(f"{name}: {got.get(name)}, not {expected.get(name)}" for name in wrong)
        raise CoaloraError(
            f"This {what} is not that of a weight of shape {tuple(shape)} under {choice} ({described})",
            remedy="Use it with the choice and the shape that it was made with, or make it again",
        )


def check_weight(weight: Tensor) -> None:
    """Look at a weight that is to be quantized, but for its values.

    Raises:
        CoaloraError: it is not floating point, no matrix, or empty.
    """
    if not weight.is_floating_point() or weight.numel() == 0 or weight.dim() != 2:
        raise CoaloraError(
            f"A weight of type {weight.dtype} and shape {tuple(weight.shape)} cannot be quantized",
            remedy="Give a floating-point matrix (out, in) with at least one entry",
        )


def not_finite() -> CoaloraError:
    """Error of a weight with NaN or infinite entries in float32."""
    return CoaloraError(
        "A weight to quantize has entries that are NaN or infinite in float32",
        remedy="Look for the layer with torch.isfinite(weight).all() and repair the checkpoint",
    )
