"""llama.cpp's quantization types: the ``gguf`` scheme, whose packed weights are the very bytes of a GGUF file.

A choice is a type (`coalora.quant.gguf.blocks`), 2.56 to 8.5 bits a weight. Types of blocks of 256 take rows of a
multiple of 256 input features, the others rows of a multiple of 32: a layer has the types that its rows allow. Blocks
are quantized by libgguf (Apache-2.0), llama.cpp's own quantizers, which search a block's scales by least squares:

    absmax    weighted by the weights alone, as llama.cpp does without an importance matrix
    searched  weighted by E[x_j^2], as with one                                                       second moments
    feedback  blocks of a row one after the other, what is left of the row making up for the error     Hessian E[x x^T]
              so far (`coalora.quant.feedback`), each block weighted by E[x_j^2]

For a whole block B of features the step of GPTQ is, with U the upper Cholesky factor of H^-1 = U^T U in the order of
work and R the features that are still to come,

    W_R -= (W_B - W^_B) U_BB^-1 U_BR

Within a block libgguf rounds by itself, so that a row of one block gains nothing. Of SmolLM2's output error with
`searched`, on text that calibration did not see, a half to a quarter is left in q_proj (18 blocks of 32) and nine
tenths to three quarters in down_proj (6 blocks of 256). llama.cpp reads such weights as any others.

libgguf is needed to quantize alone (extra `gguf`); where it is installed it also decodes on a CPU, up to ten times
faster than torch and bit for bit the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.quant.feedback import Feedback
from coalora.quant.gguf.blocks import TYPES, BlockType, decode_rows
from coalora.quant.scheme import Choice, InputStatistics, Scheme, check_tensors, check_weight, not_finite, own_choice

BLOCKS = "blocks"  # the packed weight: uint8 (out, bytes a row)


@dataclass(frozen=True)
class GGUFChoice(Choice):
    """One choice: a type by llama.cpp's name."""

    field_values: ClassVar = {"type": tuple(TYPES)}
    type: str

    @property
    def width(self) -> int:
        """Bits of a code, as the type's name has them: 2 of ``IQ2_S``."""
        return int(next(c for c in self.type if c.isdigit()))

    def __str__(self) -> str:
        """For example ``Q4_K``."""
        return self.type


class GGUFScheme(Scheme):
    """See the module docstring. State and packed: ``blocks`` uint8 (out, bytes a row).

    Example:
        >>> from coalora import ChoiceSpace
        >>> space = ChoiceSpace("gguf")
        >>> [space.describe(k) for k in (0, len(space) - 1)], space.bits_range()
        (['IQ2_S', 'Q8_0'], (2.5625, 8.5))
        >>> int(space.fits([(576, 576)]).sum()), int(space.fits([(576, 1536)]).sum())  # rows of 576, no multiple of 256
        (6, 14)
    """

    name = "gguf"
    choice_type: ClassVar[type[Any]] = GGUFChoice

    def require_packages(self) -> None:
        if find_spec("libgguf") is None:
            raise CoaloraError(
                "Scheme 'gguf' quantizes by libgguf, not installed here",
                remedy="Install it with `pip install 'coalora[gguf]'`",
            )

    def nominal_bits(self, choice: Choice) -> float:
        return _kind(choice).bits

    def fits(self, choice: Choice, shape: Sequence[int]) -> bool:
        return shape[1] % _kind(choice).n_weights == 0

    def packed_nbytes(self, choice: Choice, shape: Sequence[int]) -> int:
        rows, row_bytes = self._stored(choice, shape)
        return rows * row_bytes

    def quantize(self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None) -> dict[str, Tensor]:
        return next(self.quantize_layers([weight], [choice], [statistics]))[0]

    def quantize_layers(
        self, weights: Sequence[Tensor], choices: Sequence[Choice], statistics: Sequence[InputStatistics | None]
    ) -> Iterator[list[dict[str, Tensor]]]:
        layers = [_Layer(weight, known) for weight, known in zip(weights, statistics, strict=True)]
        for choice in choices:
            states = []
            for layer, weight, known in zip(layers, weights, statistics, strict=True):
                if known is not None and choice in known.packed:
                    state = {name: tensor.to(weight.device) for name, tensor in known.packed[choice].items()}
                    states.append(self.unpack(state, choice, weight.shape))
                else:
                    self.require_packages()
                    self._stored(choice, weight.shape)
                    states.append({BLOCKS: layer.blocks(choice)})
            yield states

    def dequantize(
        self,
        state: Mapping[str, Tensor],
        choice: Choice,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        out = torch.empty(tuple(shape), dtype=dtype, device=state[BLOCKS].device if BLOCKS in state else None)
        self.dequantize_packed(state, choice, shape, out)
        return out

    def dequantize_packed(
        self, packed: Mapping[str, Tensor], choice: Choice, shape: Sequence[int], out: Tensor
    ) -> None:
        self._check(packed, choice, shape)
        decode(packed[BLOCKS], choice, out)

    def pack(self, state: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        self._check(state, choice, shape)
        return {BLOCKS: state[BLOCKS].clone()}

    def unpack(self, tensors: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        self._check(tensors, choice, shape)
        return dict(tensors)

    def _stored(self, choice: Choice, shape: Sequence[int]) -> tuple[int, int]:
        """Rows, and the bytes of each.

        Raises:
            CoaloraError: rows that the type's blocks do not divide.
        """
        kind = _kind(choice)
        if len(shape) != 2 or min(shape) < 1 or not self.fits(choice, shape):
            raise CoaloraError(
                f"A weight of shape {tuple(shape)} does not divide into blocks of {kind.n_weights} along its rows, "
                f"which {choice} has",
                remedy="For rows of a multiple of 32 take Q4_0, IQ4_NL, Q4_1, Q5_0, Q5_1 or Q8_0, else another scheme",
            )
        return shape[0], shape[1] // kind.n_weights * kind.nbytes

    def _check(self, tensors: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> None:
        expected = {BLOCKS: (torch.uint8, self._stored(choice, shape))}
        check_tensors("packed weight", tensors, expected, choice, shape)


def decode(blocks: Tensor, choice: Choice, out: Tensor) -> Tensor:
    """Write the weight of blocks (out, bytes a row) into `out` (out, in), computed in float32; `out` itself."""
    if blocks.device.type != "cpu" or find_spec("libgguf") is None:
        return decode_rows(blocks, _kind(choice), out)
    import libgguf

    whole = out if out.dtype == torch.float32 and out.is_contiguous() else torch.empty(out.shape)
    libgguf.dequantize_rows_into_raw(_number(choice), blocks.contiguous().numpy(), whole.numpy(), *out.shape)
    return out if whole is out else out.copy_(whole)


class _Layer:
    """One weight to be quantized under several choices; blocks are made on the CPU, float32."""

    def __init__(self, weight: Tensor, statistics: InputStatistics | None) -> None:
        check_weight(weight)
        self._weight = weight.detach().to("cpu", torch.float32).contiguous()
        self._finite = bool(torch.isfinite(self._weight.amax()) & torch.isfinite(self._weight.amin()))
        self._device, self._importance = weight.device, None
        self._feedback: Feedback | None = None
        if statistics is not None and statistics.method != "absmax":
            statistics.check(weight.shape[1])
            moment = statistics.second_moment.to("cpu", torch.float32)
            # A feature that never fired counts a little, or its weights could be anything.
            self._importance = moment + 1e-6 * moment.mean() + torch.finfo(torch.float32).tiny
            if statistics.method == "feedback" and statistics.hessian is not None:
                self._feedback = Feedback(statistics.hessian.to("cpu"))

    def blocks(self, choice: Choice) -> Tensor:
        """Uint8 (out, bytes a row), on the weight's device.

        Raises:
            CoaloraError: NaN or infinite weights, or such as fp16 scales do not reach.
        """
        if not self._finite:
            raise not_finite()
        kind, values = _kind(choice), torch.empty_like(self._weight)
        if self._feedback is None or self._weight.shape[1] == kind.n_weights:
            made = _quantized(self._weight, choice, self._importance)
            decode(made, choice, values)
        else:
            made = self._one_by_one(self._feedback, choice, values)
        if not bool(torch.isfinite(values).all()):
            raise CoaloraError(
                f"Weights up to {float(self._weight.abs().max()):.3g} are beyond the fp16 scales of {choice}",
                remedy="Leave the layer out of target_modules, or take a scheme with bf16 scales",
            )
        return made.to(self._device)

    def _one_by_one(self, feedback: Feedback, choice: Choice, values: Tensor) -> Tensor:
        """Blocks with error feedback from one to the next; their weights are written into `values`."""
        assert self._importance is not None
        kind, rows = _kind(choice), len(self._weight)
        size, factor = kind.n_weights, feedback.factor(kind.n_weights)
        work = self._weight[:, (factor.order[:, None] * size + factor.within).view(-1)]
        made = torch.empty((rows, len(factor.order), kind.nbytes), dtype=torch.uint8)
        for at, (block, within) in enumerate(zip(factor.order.tolist(), factor.within, strict=True)):
            own, stored = slice(at * size, (at + 1) * size), slice(block * size, (block + 1) * size)
            weights, result = torch.empty((rows, size)), torch.empty((rows, size))
            weights[:, within] = work[:, own]
            made[:, block] = _quantized(weights, choice, self._importance[stored])
            values[:, stored] = decode(made[:, block], choice, result)
            left = torch.linalg.solve_triangular(
                factor.U[own, own], (weights - result)[:, within], upper=True, left=False
            )
            work[:, own.stop :].addmm_(left, factor.U[own, own.stop :], alpha=-1)
        return made.view(rows, -1)


def _quantized(weight: Tensor, choice: Choice, importance: Tensor | None) -> Tensor:
    """Libgguf's blocks (out, bytes a row) of a float32 weight (out, in); importance (in,)."""
    import libgguf

    weights = None if importance is None else importance.contiguous().numpy()
    return torch.from_numpy(libgguf.quantize_rows(weight.contiguous().numpy(), _number(choice), weights))


def _kind(choice: Choice) -> BlockType:
    return TYPES[own_choice(choice, GGUFChoice).type]


def _number(choice: Choice) -> int:
    """Of the type in libgguf and in GGUF files."""
    import libgguf

    return int(libgguf.GGMLQuantizationType[own_choice(choice, GGUFChoice).type])
