"""Run by test_triton.py: switches whose layers are written together, from rows that are held on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from coalora.models.switching import quantized
from coalora.models.switching.quantized import QuantizedBase
from coalora.models.targets import TargetLayer
from coalora.quant import grouped
from coalora.quant.nf import scheme as nf
from coalora.quant.space import ChoiceSpace

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(24, 40), (16, 72), (24, 40), (40, 24)]
NF = ChoiceSpace("nf", bits=[2, 4], scale_bits=[8], scale_dtype=["bf16"], block_size=[16, 64], scale_block_size=[64])
INT = ChoiceSpace("int", bits=[2, 4], group_size=[32], mode=["sym", "asym"])
SPACES = {"nf": NF, "int": INT, "mixed": ChoiceSpace.union([NF, INT])}


@pytest.mark.parametrize("limit", [0, 2_500, 1 << 28])
@pytest.mark.parametrize("name", SPACES)
def test_layers_written_together_hold_what_each_alone_would(monkeypatch: pytest.MonkeyPatch, name, limit) -> None:
    space = SPACES[name]
    torch.manual_seed(0)
    model = nn.ModuleDict({f"l{i}": nn.Linear(n, m, bias=False) for i, (m, n) in enumerate(SHAPES)}).to(DEVICE)
    model.requires_grad_(False)
    masters = [model[f"l{i}"].weight.clone() for i in range(len(SHAPES))]
    layers = [TargetLayer(f"l{i}", f"l{i}", 0, shape, False) for i, shape in enumerate(SHAPES)]
    for module in (quantized, grouped, nf):
        monkeypatch.setattr(module, "use_triton", lambda tensor: True)
    base = QuantizedBase(model, layers, space, cache_bytes=limit)
    assert base._rows is not None
    random = np.random.default_rng(0)
    members = [random.integers(len(space), size=len(layers)) for _ in range(3)]
    for member in [*members, *members[::-1]]:
        base.switch(member)
        for index, k in enumerate(member):
            scheme, choice = space.scheme_of(int(k)), space.choices[k]
            state = scheme.quantize(masters[index].cpu(), choice)
            expected = scheme.dequantize(state, choice, SHAPES[index])
            assert torch.equal(model[f"l{index}"].weight.cpu(), expected), (index, choice)
        held = sum(tensor.nbytes for packed in base.cache.values() for tensor in packed.values())
        assert held == base.cache.nbytes <= limit
    base.restore()
    assert all(torch.equal(model[f"l{i}"].weight, master) for i, master in enumerate(masters))
