"""Run by test_triton.py: on a GPU as it is, elsewhere in a process of its own under Triton's interpreter."""

from __future__ import annotations

import torch

from coalora.quant.nf.scheme import NFChoice, NFScheme
from coalora.quant.nf.triton import dequantize_packed_many
from coalora.quant.scheme import Scheme

NF = NFScheme()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 1), (13, 37), (40, 61)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHOICES = [
    NFChoice(2, 2, "bf16", 16, 16),
    NFChoice(3, 3, "fp16", 32, 64),
    NFChoice(4, 8, "fp32", 64, 256),
    NFChoice(8, 4, "bf16", 16, 64),
    NFChoice(3, 3, "fp32", 16, 16),
    NFChoice(2, 8, "fp16", 64, 16),
]


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
    w[0, :] *= 1e-3
    w[-1, : shape[1] // 2] = 0
    return w.to(DEVICE, dtype)


def layers() -> list[tuple[torch.Tensor, NFChoice, torch.Tensor]]:
    """Every shape with every choice, one dtype or another: (weight, choice, out)."""
    made = []
    for i, (shape, choice) in enumerate((shape, choice) for shape in SHAPES for choice in CHOICES):
        # Six choices: the turn of a dtype moves on by one from shape to shape.
        w = weight(shape, DTYPES[(i + i // len(CHOICES)) % 3])
        made.append((w, choice, torch.full_like(w, 9.0)))
    return made


def test_dequantizing_layers_of_all_kinds_in_one_launch_equals_the_plain_path() -> None:
    jobs, expected = [], []
    for w, choice, out in layers():
        packed = NF.pack(NF.quantize(w, choice), choice, w.shape)
        plain = torch.empty_like(out)
        Scheme.dequantize_packed(NF, packed, choice, w.shape, plain)
        jobs.append((packed, choice, out))
        expected.append(plain)
    dequantize_packed_many(jobs)
    for (_, choice, out), plain in zip(jobs, expected, strict=True):
        assert torch.equal(out, plain), (choice, out.shape, out.dtype)


def test_quantizing_layers_of_all_kinds_together_equals_the_plain_path() -> None:
    jobs = layers()
    for (w, choice, out), packed in zip(jobs, NF._quantized_by_kernels(jobs), strict=True):
        state = NF.quantize(w, choice)
        expected = NF.pack(state, choice, w.shape)
        assert packed.keys() == expected.keys()
        for name, tensor in packed.items():
            assert torch.equal(tensor, expected[name]), (name, choice, w.shape, w.dtype)
        # Not fake_quantize: on a GPU that is the kernel itself.
        assert torch.equal(out, NF.dequantize(state, choice, w.shape, w.dtype)), (choice, w.shape, w.dtype)


def test_the_arguments_of_one_layer_are_those_of_the_scheme_interface() -> None:
    w, choice = weight((24, 40)), CHOICES[1]
    out = torch.empty_like(w)
    (packed,) = NF._quantized_by_kernels([(w, choice, None)])
    dequantize_packed_many([(packed, choice, out)])
    assert torch.equal(out, NF.fake_quantize(w, choice))
