"""One weight under one choice: `quantize` packs it into the bits that it takes on disk, `dequantize` unpacks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.quant.scheme import Choice, FieldValue, InputStatistics, Scheme
from coalora.quant.space import ChoiceSpace


@dataclass(frozen=True)
class QuantizedWeight:
    """A packed weight.

    Attributes:
        scheme, choice: how it was quantized.
        shape: (out, in).
        tensors: what is stored, by name.

    Example:
        >>> import torch
        >>> from coalora import quantize
        >>> quantized = quantize(torch.randn(8, 64), "int", bits=2, group_size=32, mode="asym")
        >>> quantized.shape, str(quantized.choice)
        ((8, 64), 'int2 g32 asym')
    """

    scheme: Scheme
    choice: Choice
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits(self) -> float:
        """Stored bits a weight."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


def quantize(
    weight: Tensor, scheme: str, *, statistics: InputStatistics | None = None, **fields: FieldValue
) -> QuantizedWeight:
    """Quantize a weight (out, in) under the one choice of a scheme that has these field values.

    Args:
        scheme: a name of `coalora.SCHEMES`, or `module:name`.
        statistics: of the layer's inputs; calibrated schemes (`gptq`) need them.
        **fields: a value of each field that the scheme leaves open, such as bits=4.

    Raises:
        CoaloraError: an unknown scheme, field or value; values that leave more than one choice; a weight that cannot
            be quantized.

    Example:
        >>> import torch
        >>> from coalora import dequantize, quantize
        >>> weight = torch.randn(64, 128)
        >>> quantized = quantize(weight, "int", bits=4, group_size=64, mode="sym")
        >>> quantized.nbytes, quantized.bits
        (4352, 4.25)
        >>> bool((dequantize(quantized) - weight).abs().max() < 0.5)
        True
    """
    space = ChoiceSpace(scheme, **{name: [value] for name, value in fields.items()})
    if len(space) > 1:
        open_fields = {name: values for name, values in space.field_values.items() if len(values) > 1}
        raise CoaloraError(
            f"{scheme} has {len(space)} choices with these values",
            remedy="Choose among " + "; ".join(f"{name}: {', '.join(map(str, v))}" for name, v in open_fields.items()),
        )
    (choice,) = space.choices
    state = space.scheme.quantize(weight, choice, statistics)
    shape = (weight.shape[0], weight.shape[1])
    return QuantizedWeight(space.scheme, choice, shape, space.scheme.pack(state, choice, shape))


def dequantize(quantized: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (out, in) that a quantized one stands for: computed in float32, then cast.

    Example:
        >>> import torch
        >>> from coalora import dequantize, quantize
        >>> quantized = quantize(torch.eye(16), "float", dtype="bf16")
        >>> bool((dequantize(quantized) == torch.eye(16)).all())
        True
    """
    scheme, choice, shape = quantized.scheme, quantized.choice, quantized.shape
    return scheme.dequantize(scheme.unpack(quantized.tensors, choice, shape), choice, shape, dtype)
