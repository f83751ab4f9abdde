"""Blocks of llama.cpp's quantization types, as GGUF files hold them, and their weights.

A row of a weight is cut into blocks of 32 or 256 weights, each a run of bytes with its own scales. All types have one
form, a code c of each weight, a scale of its group and of some types a minimum:

    w = s c          of Q2_K, Q4_1, Q4_K, Q5_1 and Q5_K:    w = s c - m

where s and m are a block's fp16 numbers times small integers, one for each group of 16 or 32 weights. `IQ4_*` looks
codes up in a book of 16 values; `IQ2_S` and `IQ3_XXS` look up 8 and 4 of them at a time, absolute values in a lattice
(`_GRIDS`) and signs beside it. Layouts: `ggml-common.h` and `ggml-quants.c` of llama.cpp (MIT), whose arithmetic in
float32 this is, bit for bit. In plain torch, on any device, with no other package: a packed base loads where nothing
else is installed.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**17  # weights, on a CPU: temporaries of so many stay in its cache
Decoded = tuple[Tensor, Tensor, Tensor | None]  # codes (n, G, g), and scales and minima float32 (n, G, 1)


@dataclass(frozen=True)
class BlockType:
    """One type: `nbytes` bytes for every `n_weights` weights of a row, and what they say.

    Attributes:
        decode: blocks uint8 (n, nbytes) -> codes, scales and minima.
    """

    n_weights: int
    nbytes: int
    decode: Callable[[Tensor], Decoded]

    @property
    def bits(self) -> float:
        """Bits a weight, exactly."""
        return 8 * self.nbytes / self.n_weights


def decode_rows(rows: Tensor, kind: BlockType, out: Tensor) -> Tensor:
    """Write the weights of `rows`, uint8 (out, bytes a row), into `out` (out, in), computed in float32; `out` itself.

    Example:
        >>> import torch
        >>> from coalora.quant.gguf.blocks import TYPES, decode_rows
        >>> row = torch.tensor([[0, 60, *range(32)]], dtype=torch.uint8)  # a scale of 1 in fp16, and codes
        >>> decode_rows(row, TYPES["Q8_0"], torch.empty(1, 32))[0, :4].tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    step = len(rows) if rows.device.type != "cpu" else max(1, CHUNK // out.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        codes, scales, minima = kind.decode(part.reshape(-1, kind.nbytes))
        values = codes.to(torch.float32).mul_(scales)
        if minima is not None:
            values.sub_(minima)
        out[start : start + step] = values.view(len(part), -1)
    return out


def _halves(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of every block, float32 (n, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def _fields(data: Tensor, bits: int) -> Tensor:
    """The 8 / bits fields of every byte, the lowest first, each of them for all of a run: (n, runs, k) uint8 ->
    (n, runs, 8 / bits, k)."""
    parts = [(data >> shift).bitwise_and_((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=2)


def _bits(data: Tensor) -> Tensor:
    """The bits of little-endian words (n, bytes), each by itself: (n, 8 bytes)."""
    return _fields(data.unsqueeze(2), 1).view(len(data), -1)


def _nibbles(data: Tensor, run: int = 16) -> Tensor:
    """4-bit codes (n, 2 bytes) of runs of bytes, first the lower halves of a run and then the upper ones."""
    return _fields(data.view(len(data), -1, run), 4).view(len(data), -1)


def _signed(codes: Tensor, offset: int) -> Tensor:
    return codes.view(torch.int8).sub_(offset)


def _groups(codes: Tensor, scales: Tensor, minima: Tensor | None = None) -> Decoded:
    """Codes in as many groups as there are scales (n, G)."""
    n, count = scales.shape
    return codes.reshape(n, count, -1), scales.unsqueeze(2), None if minima is None else minima.unsqueeze(2)


def _q4_0(b: Tensor) -> Decoded:
    return _groups(_signed(_nibbles(b[:, 2:]), 8), _halves(b, 0))


def _q4_1(b: Tensor) -> Decoded:
    return _groups(_nibbles(b[:, 4:]), _halves(b, 0), -_halves(b, 2))


def _q5_0(b: Tensor) -> Decoded:
    return _groups(_signed(_nibbles(b[:, 6:]) | _bits(b[:, 2:6]) << 4, 16), _halves(b, 0))


def _q5_1(b: Tensor) -> Decoded:
    return _groups(_nibbles(b[:, 8:]) | _bits(b[:, 4:8]) << 4, _halves(b, 0), -_halves(b, 2))


def _q8_0(b: Tensor) -> Decoded:
    return _groups(b[:, 2:].contiguous().view(torch.int8), _halves(b, 0))


def _iq4_nl(b: Tensor) -> Decoded:
    return _groups(_booked(_nibbles(b[:, 2:])), _halves(b, 0))


def _q2_k(b: Tensor) -> Decoded:
    scales = b[:, :16]
    codes = _fields(b[:, 16:80].view(len(b), 2, 32), 2)
    return _groups(codes, _halves(b, 80) * (scales & 15), _halves(b, 82) * (scales >> 4))


def _q3_k(b: Tensor) -> Decoded:
    low, high = b[:, 96:104], b[:, 104:108]
    scales = _fields(low.unsqueeze(1), 4).view(len(b), 16) | _fields(high.unsqueeze(1), 2).view(len(b), 16) << 4
    codes = _fields(b[:, 32:96].view(len(b), 2, 32), 2).view(len(b), 256)
    lifted = _fields(b[:, :32].unsqueeze(1), 1).view(len(b), 256)
    return _groups(_signed(codes | lifted << 2, 4), _halves(b, 108) * _signed(scales, 32))


def _k_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima float32 (n, 8) of Q4_K and Q5_K: 16 numbers of 6 bits in 12 bytes."""
    first, second, third = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=1)
    return _halves(b, 0) * scales, _halves(b, 2) * minima


def _q4_k(b: Tensor) -> Decoded:
    return _groups(_nibbles(b[:, 16:], 32), *_k_scales(b))


def _q5_k(b: Tensor) -> Decoded:
    high = _fields(b[:, 16:48].unsqueeze(1), 1).view(len(b), 256)
    return _groups(_nibbles(b[:, 48:], 32) | high << 4, *_k_scales(b))


def _q6_k(b: Tensor) -> Decoded:
    high = _fields(b[:, 128:192].view(len(b), 2, 32), 2).view(len(b), 256)
    codes = _signed(_nibbles(b[:, :128], 64) | high << 4, 32)
    return _groups(codes, _halves(b, 208) * b[:, 192:208].view(torch.int8))


def _iq4_xs(b: Tensor) -> Decoded:
    high = _fields(b[:, 2:4].unsqueeze(2), 2).view(len(b), 8)
    low = _fields(b[:, 4:8].unsqueeze(2), 4).view(len(b), 8)
    return _groups(_booked(_nibbles(b[:, 8:])), _halves(b, 0) * _signed(low | high << 4, 32))


def _iq2_s(b: Tensor) -> Decoded:
    high = _fields(b[:, 66:74].unsqueeze(2), 2).view(len(b), 32)
    codes = _grid("IQ2_S", b.device)[b[:, 2:34].to(torch.int32) | high.to(torch.int32) << 8]
    signs = _signs(b.device)[b[:, 34:66].to(torch.int32)]
    scales = _fields(b[:, 74:82].unsqueeze(2), 4).view(len(b), 16)
    return _groups(_flipped(codes, signs), _halves(b, 0) * (scales + 0.5) * 0.25)


def _iq3_xxs(b: Tensor) -> Decoded:
    codes = _grid("IQ3_XXS", b.device)[b[:, 2:66].to(torch.int32)]
    words = b[:, 66:98].contiguous().view(torch.int32)
    seven = torch.stack([(words >> shift) & 127 for shift in (0, 7, 14, 21)], dim=2)
    signs = _signs(b.device)[seven | _odd(b.device)[seven] << 7].view(len(b), 32)
    return _groups(_flipped(codes, signs), _halves(b, 0) * (((words >> 28) & 15) + 0.5) * 0.5)


def _booked(codes: Tensor) -> Tensor:
    """Values int8 of 4-bit codes of IQ4."""
    return _book(codes.device)[codes.to(torch.int32)]


def _flipped(codes: Tensor, signs: Tensor) -> Tensor:
    """Values int8 (n, 256) of words of absolute values, negative where the bytes of `signs` are -1."""
    minus = signs.view(torch.int8)
    return codes.view(torch.int8).bitwise_xor(minus).sub_(minus)


@cache
def _book(device: torch.device) -> Tensor:
    values = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    return torch.tensor(values, dtype=torch.int8, device=device)


@cache
def _grid(name: str, device: torch.device) -> Tensor:
    """The vectors of a lattice, each as one word: int64 (1024,) of eight values int8, or int32 (256,) of four."""
    values, width, members = _GRIDS[name]
    number = np.flatnonzero(np.unpackbits(np.frombuffer(zlib.decompress(base64.b85decode(members)), np.uint8),
                                          bitorder="little"))  # fmt: skip
    digits = number[:, None] // len(values) ** np.arange(width) % len(values)
    words = np.array(values, dtype=np.int8)[digits].view(f"<i{width}")
    return torch.from_numpy(words.ravel()).to(device)


@cache
def _signs(device: torch.device) -> Tensor:
    """By a byte of sign bits, its eight signs as one word int64 (256,): -1 for a minus, 0 for none."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy((-bits.astype(np.int8)).view("<i8").ravel()).to(device)


@cache
def _odd(device: torch.device) -> Tensor:
    """By seven sign bits, the eighth, int32 (128,): signs are even in number."""
    return torch.tensor([number.bit_count() & 1 for number in range(128)], dtype=torch.int32, device=device)


# Values of a coordinate, coordinates, and which of all such vectors belong to it: a bit for each, numbered with the
# first coordinate as the lowest digit (zlib, base 85).
_GRIDS = {
    "IQ2_S": (
        (8, 25, 43),
        8,
        b"c-n1JU5W-F3~NE(E9iYHjPDBe{#V(wI=kPpE5rQ7#3X8F%Z9aF@G^(h-0EI3Em0|W3^QwctZ7zp0a8G#rYWS&oF&YfEj@sgh^u5FBBgC>L"
        b"AkBEEtarKv-X}c)kMD5E9g)N*35uFS6j&;COQ!QC2=T0oAzp}=fs8f?3xctXeG?g^dQAA!2(KVP=j1x!<Qgx@l7F)Pu!TMd$m>{ZzEray("
        b"N$AzRb24)#*U9zYZZF^+2!@EVQ9?ARiEH!J<ErE8usn4?()-BQhW*1pE<<S|Z6aT82aQO}QP4+el6zUY~*z7~Sl6pK?p!Q_DMIhH4w7?jo"
        b"IO9P^#Dw9CRS7mu8OBC|vDii4FoWN_zK9m?6y$}qXC*pyH_2f!)+bXep&HXz~CYasM7Fd3(JhmM~KIbkHJ7yU4;E692~{FNElHOf~Fzm+T"
        b"Bn!W(JyjC6",
    ),
    "IQ3_XXS": (
        (4, 12, 20, 28, 36, 44, 52, 62),
        4,
        b"c-l=-F%H5o3_M%0RAmZ7_lgPeigaLyA4Q!IuVCbv_?)J2Rn;aw-<^~BWtxCXwzFx0%xW)eST<YW5KL&L;j#hAAHoX-c)&}FY<X@1m|7IGs"
        b"jrX>q7@bAuHrcP3L2_`6x)_>^v5;&o?@Fdagv_Uo9H*utGOGEJ93R6P|L2rgx{U}Y-UnrS3sKYtPIbF!WdDS7|dsT<9UQCqzhJe8+4kK5k"
        b"m%XvHjm=J(sMgqk-e3v^zjTJayVggoDWMJzTWE4a0T)3l-9P!ydlNePrBA?Xny*@kmBo4W|8$?wEo20v5Uy_5",
    ),
}

TYPES = {  # by rising bits
    "IQ2_S": BlockType(256, 82, _iq2_s),
    "Q2_K": BlockType(256, 84, _q2_k),
    "IQ3_XXS": BlockType(256, 98, _iq3_xxs),
    "Q3_K": BlockType(256, 110, _q3_k),
    "IQ4_XS": BlockType(256, 136, _iq4_xs),
    "Q4_0": BlockType(32, 18, _q4_0),
    "IQ4_NL": BlockType(32, 18, _iq4_nl),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q6_K": BlockType(256, 210, _q6_k),
    "Q8_0": BlockType(32, 34, _q8_0),
}
