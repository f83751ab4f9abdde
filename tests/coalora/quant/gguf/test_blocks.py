"""Blocks decoded in torch equal llama.cpp's in NumPy (package gguf) and in C (libgguf), bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coalora.quant.gguf.blocks import TYPES, decode_rows

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")
libgguf = pytest.importorskip("libgguf", reason="needs the extra [gguf]")

EVERY = pytest.mark.parametrize("name", TYPES)


def blocks_of_any_bytes(name: str, rows: int, columns: int) -> np.ndarray:
    """Random bytes: every code, scale, sign and lattice point comes up; scales and minima are finite numbers."""
    kind = TYPES[name]
    blocks = np.random.default_rng(0).integers(0, 256, (rows * columns // kind.n_weights, kind.nbytes), dtype=np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2)}
    for at in scales.get(name, (0, 2) if name == "Q5_1" else (0,)):
        blocks[:, at + 1] &= 0xBF  # the exponent's highest bit
    return blocks.reshape(rows, -1)


@EVERY
def test_sizes_are_those_of_the_format(name: str) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (TYPES[name].n_weights, TYPES[name].nbytes)


@EVERY
@pytest.mark.parametrize("columns", [256, 1536])
def test_weights_of_any_bytes_are_those_of_llama_cpp(name: str, columns: int) -> None:
    blocks = blocks_of_any_bytes(name, 200, columns)  # more than a chunk
    made = decode_rows(torch.from_numpy(blocks), TYPES[name], torch.empty(200, columns)).numpy()
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert np.isfinite(expected).all()
    assert np.array_equal(made, expected)
    assert np.array_equal(made, libgguf.dequantize_rows(blocks, libgguf.GGMLQuantizationType[name]))


def test_types_are_in_the_order_of_their_bits() -> None:
    bits = [kind.bits for kind in TYPES.values()]
    assert bits == sorted(bits)
    assert (bits[0], bits[-1]) == (2.5625, 8.5)
