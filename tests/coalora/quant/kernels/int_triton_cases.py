"""Run by test_triton.py: on a GPU as it is, elsewhere in a process of its own under Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch

from coalora.quant import grouped
from coalora.quant.integer.scheme import IntChoice, IntScheme
from coalora.quant.integer.triton import dequantize_packed_many
from coalora.quant.scheme import Scheme

INT = IntScheme()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Rows that groups divide, that eights divide, that nothing divides; more than one tile of weights; fewer than eight.
SHAPES = [(3, 256), (5, 72), (13, 37), (70, 45), (1, 1)]
CHOICES = [
    IntChoice(2, 32, "asym"),
    IntChoice(3, 64, "sym"),
    IntChoice(3, 128, "asym"),
    IntChoice(4, 32, "sym"),
    IntChoice(8, 64, "asym"),
]


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
    w[0, :] *= 1e-6  # scales below the smallest normal fp16
    w[-1, : shape[1] // 2] = 0
    return w.to(DEVICE, dtype)


def check(given: torch.Tensor, choice: IntChoice, packed: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    expected = INT.pack(INT.quantize(given, choice), choice, given.shape)
    assert packed.keys() == expected.keys()
    for name, tensor in packed.items():
        assert torch.equal(tensor, expected[name]), (name, choice, given.shape)
    assert torch.equal(out, INT.fake_quantize(given, choice).to(out.dtype)), (choice, given.shape)


def layers() -> list[tuple[torch.Tensor, IntChoice, torch.Tensor]]:
    """Every shape with every choice, one dtype or another: (weight, choice, out)."""
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float16])
    pairs = itertools.product(SHAPES, CHOICES)
    weights = [(weight(shape, dtype), choice) for (shape, choice), dtype in zip(pairs, dtypes, strict=False)]
    return [(w, choice, torch.full_like(w, 9.0)) for w, choice in weights]


def test_dequantizing_layers_of_all_kinds_in_one_launch_equals_the_plain_path() -> None:
    jobs, expected = [], []
    for w, choice, out in layers():
        packed = INT.pack(INT.quantize(w, choice), choice, w.shape)
        plain = torch.empty_like(out)
        Scheme.dequantize_packed(INT, packed, choice, w.shape, plain)
        jobs.append((packed, choice, out))
        expected.append(plain)
    dequantize_packed_many(jobs)
    for (_, choice, out), plain in zip(jobs, expected, strict=True):
        assert torch.equal(out, plain), (choice, out.shape, out.dtype)


def test_quantizing_layers_of_all_kinds_together_equals_the_plain_path() -> None:
    jobs = layers()
    for (w, choice, out), packed in zip(jobs, INT._quantized_by_kernels(jobs), strict=True):
        check(w, choice, packed, out)


def test_extreme_weights_are_those_of_the_plain_path() -> None:
    rows = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 12)[:, None]
    whole = torch.arange(-32.0, 32.0).expand(2, 64) / 2  # ties
    largest = (torch.linspace(-1, 1, 64) * 3.4028e38).expand(2, 64)
    w = torch.cat([rows, rows.abs(), -rows.abs(), whole, largest]).to(DEVICE)
    jobs = [(given.contiguous(), c, torch.empty_like(given)) for given in (w, w[:, 3:40].contiguous()) for c in CHOICES]
    for (given, choice, out), packed in zip(jobs, INT._quantized_by_kernels(jobs), strict=True):
        check(given, choice, packed, out)


def test_a_scheme_gives_layers_to_the_kernels_also_transposed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [INT.pack(INT.quantize(weight(shape), CHOICES[2]), CHOICES[2], shape) for shape in SHAPES]
    kept = [INT.dequantize(INT.unpack(p, CHOICES[2], s), CHOICES[2], s) for p, s in zip(plain, SHAPES, strict=True)]
    monkeypatch.setattr(grouped, "use_triton", lambda tensor: True)
    monkeypatch.setattr(IntScheme, "quantize", None)  # the plain path
    monkeypatch.setattr(IntScheme, "dequantize", None)
    monkeypatch.setattr(IntScheme, "fake_quantize", None)
    outs = [torch.full(shape[::-1], 9.0, device=DEVICE).T for shape in SHAPES]
    INT.dequantize_packed_many([(p, CHOICES[2], out) for p, out in zip(plain, outs, strict=True)])
    for shape, packed, out, expected in zip(SHAPES, plain, outs, kept, strict=True):
        assert torch.equal(out, expected)
        made = INT.quantize_packed(weight(shape).T.contiguous().T, CHOICES[2])
        assert all(torch.equal(made[name], tensor) for name, tensor in packed.items())
        INT.dequantize_packed(made, CHOICES[2], shape, out.zero_())
        assert torch.equal(out, expected)
