"""NormalFloat with double quantization: the ``nf`` scheme, 432 choices.

Guo et al. 2024, LQ-LoRA, arXiv 2311.12023, whose search space of (b, b0, b1, B0, B1) this is; the code books
are in `coalora.quant.nf.book`. Weights are cut, row-major, into blocks of B0 that share an absmax scale s;
the scales in turn are quantized to b0 bits in blocks of B1:

    m = min s        t = s - m        a = max t over B1 scales, stored in b1
    scale code = round(t / a * (2^b0 - 1))        s^ = code / (2^b0 - 1) * a + m
    weight code = nearest entry to w / s^         w^ = entry * s^

Deviation from LQ-LoRA: a weight's code is the nearest entry under the *dequantized* scale s^, the one that
will be multiplied back, and not under the exact s; with 2-bit scales the two differ a lot.
Conventions: a short last block is padded with zeros for arithmetic only, padding is never stored; s^ = 0
gives the code of 0.0; ties go to the lower entry; ``a`` saturates at the largest finite number of its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from coalora.quant.kernels.available import contiguous, use_triton
from coalora.quant.nf import cpu
from coalora.quant.nf.book import nf_lookup
from coalora.quant.nf.choice import NFChoice
from coalora.quant.nf.nearest import IntervalTable
from coalora.quant.nf.scales import (
    FINEST,
    SCALE_DTYPES,
    block_scales,
    coarser,
    dequantize_scales,
    divisor,
    quantize_scales,
)
from coalora.quant.packing import pack_codes, packed_size, unpack_codes
from coalora.quant.scheme import Choice, InputStatistics, Scheme, check_tensors, check_weight, own_choice


def _blocks(weight: Tensor, block_size: int) -> Tensor:
    """Row-major blocks float32 (ceil(n/B0), B0), the last padded with zeros; may alias the weight."""
    check_weight(weight)
    flat = weight.detach().to(torch.float32).reshape(-1)
    short = -flat.numel() % block_size
    return (pad(flat, (0, short)) if short else flat).view(-1, block_size)


def _nearest(blocks: Tensor, safe: Tensor, table: IntervalTable, by_position: Tensor) -> Tensor:
    """``by_position`` (of ``table``) at every w / s^: (n_blocks, B0). Runs on any device; a CPU has `nf_cpu`."""
    normalised = torch.div(blocks, safe[:, None]).clamp_(-1, 1)
    return by_position.index_select(0, table.positions(normalised.view(-1))).view(blocks.shape)


class NFScheme(Scheme):
    """NormalFloat with double quantization; see the module docstring for the arithmetic.

    State: ``codes`` uint8 (n,), ``scale_codes`` uint8 (n_blocks,), ``scale_absmax`` (n_scale_blocks,) in b1,
    ``offset`` float32 (1,). Packed: the same names, both code tensors bit-packed.
    """

    name = "nf"
    has_kernels = True
    choice_type: ClassVar[type[Choice]] = NFChoice

    def nominal_bits(self, choice: Choice) -> float:
        c = own_choice(choice, NFChoice)
        second = SCALE_DTYPES[c.scale_dtype].itemsize * 8
        return c.bits + c.scale_bits / c.block_size + second / (c.block_size * c.scale_block_size)

    def packed_nbytes(self, choice: Choice, shape: Sequence[int]) -> int:
        c = own_choice(choice, NFChoice)
        count, n_blocks, n_scale_blocks = _counts(c, shape)
        second = SCALE_DTYPES[c.scale_dtype].itemsize * n_scale_blocks
        return packed_size(count, c.bits) + packed_size(n_blocks, c.scale_bits) + second + 4

    def measure(self, weight: Tensor) -> Tensor:
        """Exact absmax of blocks of 16, from which the scales of every block size follow: a quarter byte a weight."""
        return block_scales(_blocks(weight, FINEST))

    def quantize(
        self,
        weight: Tensor,
        choice: Choice,
        statistics: InputStatistics | None = None,
        measured: Tensor | None = None,
    ) -> dict[str, Tensor]:
        c = own_choice(choice, NFChoice)
        blocks, state, safe, _ = _prepared(weight, c, measured)
        if blocks.device.type == "cpu":
            codes = cpu.encode(blocks, safe, c.bits)
        else:
            lookup = nf_lookup(c.bits, blocks.device)
            codes = _nearest(blocks, safe, lookup.table, lookup.codes)
        return {"codes": codes.view(-1)[: weight.numel()], **state}

    def dequantize(
        self,
        state: Mapping[str, Tensor],
        choice: Choice,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        c = own_choice(choice, NFChoice)
        _check_state(state, c, shape)
        codes = state["codes"]
        count = len(codes)
        entries = nf_lookup(c.bits, codes.device).book.index_select(0, codes.to(torch.int32))
        blocks = pad(entries, (0, -count % c.block_size)).view(-1, c.block_size)
        return blocks.mul_(dequantize_scales(state, c)[:, None]).view(-1)[:count].view(tuple(shape)).to(dtype)

    def pack(self, state: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        c = own_choice(choice, NFChoice)
        _check_state(state, c, shape)
        return {
            "codes": pack_codes(state["codes"], c.bits),
            "scale_codes": pack_codes(state["scale_codes"], c.scale_bits),
            "scale_absmax": state["scale_absmax"].clone(),
            "offset": state["offset"].clone(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        c = own_choice(choice, NFChoice)
        _check_packed(tensors, c, shape)
        count, n_blocks, _ = _counts(c, shape)
        return {
            "codes": unpack_codes(tensors["codes"], c.bits, count),
            "scale_codes": unpack_codes(tensors["scale_codes"], c.scale_bits, n_blocks),
            "scale_absmax": tensors["scale_absmax"],
            "offset": tensors["offset"],
        }

    def quantize_packed(
        self,
        weight: Tensor,
        choice: Choice,
        statistics: InputStatistics | None = None,
        measured: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if not (use_triton(weight) and weight.numel()):
            return super().quantize_packed(weight, choice, statistics, measured)
        from coalora.quant.nf.jobs import quantize_packed_many  # needs triton, which a CPU build of torch lacks

        return quantize_packed_many([(weight, own_choice(choice, NFChoice), None)])[0]

    def dequantize_packed(
        self, packed: Mapping[str, Tensor], choice: Choice, shape: Sequence[int], out: Tensor
    ) -> None:
        c = own_choice(choice, NFChoice)
        if use_triton(out):
            self.dequantize_packed_many([(packed, c, out)])
        elif out.device.type != "cpu" or not out.is_contiguous():
            super().dequantize_packed(packed, c, shape, out)
        else:
            _check_packed(packed, c, shape)
            state = {**packed, "scale_codes": unpack_codes(packed["scale_codes"], c.scale_bits, _counts(c, shape)[1])}
            cpu.decode(packed["codes"], dequantize_scales(state, c), c.bits, c.block_size, out.view(-1))

    def dequantize_packed_many(self, layers: Sequence[tuple[Mapping[str, Tensor], Choice, Tensor]]) -> None:
        if not all(use_triton(out) for _, _, out in layers):
            super().dequantize_packed_many(layers)
            return
        from coalora.quant.nf.jobs import dequantize_packed_many

        for packed, choice, out in layers:
            _check_packed(packed, own_choice(choice, NFChoice), out.shape)
        with contiguous([out for _, _, out in layers]) as written:
            dequantize_packed_many(
                [(dict(p), own_choice(c, NFChoice), w) for (p, c, _), w in zip(layers, written, strict=True)]
            )

    def quantize_packed_many(
        self, layers: Sequence[tuple[Tensor, Choice, InputStatistics | None, Tensor]]
    ) -> list[dict[str, Tensor]]:
        if not all(use_triton(weight) and use_triton(out) and out.is_contiguous() for weight, _, _, out in layers):
            return super().quantize_packed_many(layers)
        from coalora.quant.nf.jobs import quantize_packed_many

        return quantize_packed_many([(weight, own_choice(choice, NFChoice), out) for weight, choice, _, out in layers])

    def kernel_rows(self, layers: Sequence[tuple[Mapping[str, Tensor], Choice, Tensor]]) -> Tensor:
        from coalora.quant.nf.jobs import kernel_rows

        return kernel_rows([(dict(packed), own_choice(choice, NFChoice), out) for packed, choice, out in layers])

    def dequantize_rows(self, rows: Tensor, n_weights: int) -> None:
        from coalora.quant.nf.triton import dequantize_rows

        dequantize_rows(rows, n_weights)

    def fake_quantize(self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None) -> Tensor:
        """2 to 4 ms for a million weights on one core, without large temporaries."""
        return next(self.fake_quantize_many(weight, [choice]))

    def fake_quantize_many(
        self, weight: Tensor, choices: Sequence[Choice], statistics: InputStatistics | None = None
    ) -> Iterator[Tensor]:
        measured = self.measure(weight) if len(choices) > 1 else None
        for choice in choices:
            out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            self.requantize(weight, choice, measured=measured, out=out)
            yield out

    def requantize(
        self,
        weight: Tensor,
        choice: Choice,
        statistics: InputStatistics | None = None,
        *,
        out: Tensor,
        measured: Tensor | None = None,
    ) -> None:
        c = own_choice(choice, NFChoice)
        if use_triton(weight) and use_triton(out) and out.is_contiguous() and measured is None and weight.numel():
            from coalora.quant.nf.jobs import quantize_packed_many

            quantize_packed_many([(weight, c, out)])
            return
        blocks, _, safe, scales = _prepared(weight, c, measured)
        if blocks.device.type == "cpu" and out.is_contiguous():
            cpu.requantize(blocks, safe, scales, c.bits, out.view(-1))
            return
        lookup = nf_lookup(c.bits, blocks.device)
        entries = _nearest(blocks, safe, lookup.table, lookup.entries).mul_(scales[:, None])
        out.copy_(entries.view(-1)[: weight.numel()].view(weight.shape))


def _prepared(
    weight: Tensor, choice: NFChoice, measured: Tensor | None
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Blocks of the weight, the scale part of the state, the divisor and s^ (both per block)."""
    blocks = _blocks(weight, choice.block_size)
    exact = block_scales(blocks) if measured is None else coarser(measured, choice.block_size)
    state = quantize_scales(exact, choice)
    scales = dequantize_scales(state, choice)
    return blocks, state, divisor(scales), scales


def _counts(choice: NFChoice, shape: Sequence[int]) -> tuple[int, int, int]:
    """Numbers of weights, of blocks and of scale blocks."""
    count = math.prod(shape)
    n_blocks = -(-count // choice.block_size)
    return count, n_blocks, -(-n_blocks // choice.scale_block_size)


def _check_state(state: Mapping[str, Tensor], choice: NFChoice, shape: Sequence[int]) -> None:
    _check(state, choice, shape, "state", lambda number, _: number)


def _check_packed(tensors: Mapping[str, Tensor], choice: NFChoice, shape: Sequence[int]) -> None:
    _check(tensors, choice, shape, "packed weight", packed_size)


def _check(
    tensors: Mapping[str, Tensor], choice: NFChoice, shape: Sequence[int], what: str, size: Callable[[int, int], int]
) -> None:
    count, n_blocks, n_scale_blocks = _counts(choice, shape)
    expected = {
        "codes": (torch.uint8, (size(count, choice.bits),)),
        "scale_codes": (torch.uint8, (size(n_blocks, choice.scale_bits),)),
        "scale_absmax": (SCALE_DTYPES[choice.scale_dtype], (n_scale_blocks,)),
        "offset": (torch.float32, (1,)),
    }
    check_tensors(what, tensors, expected, choice, shape)
