"""The interface of a quantization scheme, and the registry of schemes.

A scheme is a finite, ordered list of *choices* (one of which each target layer gets: the configuration ``C``
assigns one choice to each of ``N`` layers), a bits-per-weight rule, and the four maps

    weight --quantize--> state --pack--> tensors on disk --unpack--> state --dequantize--> weight

Average bits count every stored byte, so ``packed_nbytes`` is exact and ``nominal_bits`` only the formula that
papers quote. A further scheme (integer, GPTQ, GGUF) is one module: subclass `Scheme`, decorate it with
`register_scheme`, and import it in `get_scheme`.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from coalora.errors import CoaloraError

FieldValue = int | str


@dataclass(frozen=True)
class InputStatistics:
    """What calibration saw of a layer's inputs x (in_features,).

    Attributes:
        second_moment: float32 (in,), E[x_j^2].
        hessian: float32 (in, in), E[x x^T], the Hessian of the layer's output error up to a factor; None where
            nothing in the run asks for it.
    """

    second_moment: Tensor
    hessian: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """One way to quantize one layer; a subclass has one dataclass field per field of its scheme."""

    def as_dict(self) -> dict[str, FieldValue]:
        """Field values by name, JSON-able, in the scheme's field order."""
        return asdict(self)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.as_dict().items())


class Scheme(ABC):
    """A list of choices with its storage rule and arithmetic; stateless, one instance per process.

    Attributes:
        name: the registry key.
        choice_type: the `Choice` subclass of this scheme.
        field_values: ordered values of every field (neighbours in the search are adjacent values); insertion
            order is field order.
        needs_statistics: whether `quantize` reads the Hessian of the layer's inputs (calibrated schemes).
    """

    needs_statistics: ClassVar[bool] = False
    name: ClassVar[str]
    choice_type: ClassVar[type[Choice]]
    field_values: ClassVar[Mapping[str, tuple[FieldValue, ...]]]

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

    @abstractmethod
    def packed_nbytes(self, choice: Choice, shape: Sequence[int]) -> int:
        """Exact bytes of the tensors that `pack` returns for a weight of ``shape``; arithmetic only."""

    @abstractmethod
    def quantize(self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None) -> dict[str, Tensor]:
        """Quantize ``weight`` (out, in) to unpacked codes and their scales.

        Args:
            statistics: of the layer's inputs; read by calibrated schemes alone.

        Raises:
            CoaloraError: the weight is empty, not floating point, or not finite.
        """

    def quantize_many(
        self, weight: Tensor, choices: Sequence[Choice], statistics: InputStatistics | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """`quantize` for every choice in turn, exactly, sharing work between choices where a scheme can."""
        for choice in choices:
            yield self.quantize(weight, choice, statistics)

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

    def measure(self, weight: Tensor) -> Tensor | None:
        """A small tensor that depends on the weight alone and that `quantize` takes as ``measured`` to be faster.

        None (the default) where there is nothing to gain; `quantize` need not take ``measured`` then.
        """
        return None

    def quantize_packed(
        self,
        weight: Tensor,
        choice: Choice,
        statistics: InputStatistics | None = None,
        measured: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``pack(quantize(weight))``, or a faster equal; ``measured`` is what `measure` returned for the weight."""
        known = {} if measured is None else {"measured": measured}
        return self.pack(self.quantize(weight, choice, statistics, **known), choice, weight.shape)

    def dequantize_packed(
        self, packed: Mapping[str, Tensor], choice: Choice, shape: Sequence[int], out: Tensor
    ) -> None:
        """Write ``dequantize(unpack(packed))``, rounded to its dtype, into ``out`` (out, in); or do a faster equal."""
        out.copy_(self.dequantize(self.unpack(packed, choice, shape), choice, shape))

    def dequantize_packed_many(self, layers: Sequence[tuple[Mapping[str, Tensor], Choice, Tensor]]) -> None:
        """`dequantize_packed` for every (packed, choice, out); a scheme with a GPU kernel makes it one launch."""
        for packed, choice, out in layers:
            self.dequantize_packed(packed, choice, out.shape, out)

    def requantize(
        self,
        weight: Tensor,
        choice: Choice,
        statistics: InputStatistics | None = None,
        *,
        out: Tensor,
        measured: Tensor | None = None,
    ) -> None:
        """Write `fake_quantize` of ``weight``, rounded to its dtype, into ``out`` (out, in)."""
        out.copy_(self.fake_quantize(weight, choice, statistics))

    def fake_quantize(self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None) -> Tensor:
        """``dequantize(quantize(weight))`` in float32 on the weight's device, or a faster equal."""
        return self.dequantize(self.quantize(weight, choice, statistics), choice, weight.shape)

    def fake_quantize_many(
        self, weight: Tensor, choices: Sequence[Choice], statistics: InputStatistics | None = None
    ) -> Iterator[Tensor]:
        """`fake_quantize` for every choice in turn, exactly, sharing work between choices where a scheme can.

        One result exists at a time unless the caller keeps them.
        """
        for choice in choices:
            yield self.fake_quantize(weight, choice, statistics)


_SCHEMES: dict[str, Scheme] = {}
SchemeType = TypeVar("SchemeType", bound=type[Scheme])


def register_scheme(cls: SchemeType) -> SchemeType:
    """Class decorator: make a scheme available to `get_scheme` under its ``name``."""
    registered = _SCHEMES.get(cls.name)
    # A module that is reloaded registers the same class again; two classes under one name are a mistake.
    if registered is not None and type(registered).__qualname__ != cls.__qualname__:
        raise CoaloraError(
            "a scheme name is registered once", got=cls.name, expected=f"a name other than {sorted(_SCHEMES)}"
        )
    _SCHEMES[cls.name] = cls()
    return cls


def get_scheme(name: str) -> Scheme:
    """The scheme registered under ``name``.

    Raises:
        CoaloraError: no such scheme.
    """
    # Written as a plain import, not importlib: source digests follow import statements. Here and not at the
    # top, because a scheme's module imports this one.
    import coalora.quant.float16
    import coalora.quant.gptq.scheme
    import coalora.quant.integer.scheme
    import coalora.quant.nf.scheme  # noqa: F401

    if name not in _SCHEMES:
        raise CoaloraError("unknown quantization scheme", got=name, expected=f"one of {sorted(_SCHEMES)}")
    return _SCHEMES[name]
