"""Switches from rows that are held: what the host does for one, counted, with launches that do nothing."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from coalora.models.switching import quantized
from coalora.models.switching.quantized import QuantizedBase
from coalora.models.switching.tables import HeldRows
from coalora.models.targets import TargetLayer
from coalora.quant.space import ChoiceSpace

FIELDS = {"scale_bits": [8], "scale_dtype": ["bf16"], "block_size": [16], "scale_block_size": [64]}


def _base(n_layers: int, monkeypatch: pytest.MonkeyPatch, launched: list) -> tuple[QuantizedBase, list[np.ndarray]]:
    """A model whose members are all held, on rows as on a GPU."""
    space = ChoiceSpace("nf", bits=[2, 3, 4, 8], **FIELDS)
    model = nn.ModuleDict({f"l{i}": nn.Linear(16, 4, bias=False) for i in range(n_layers)}).requires_grad_(False)
    layers = [TargetLayer(f"l{i}", "l", i, (4, 16), False) for i in range(n_layers)]
    scheme = type(space.scheme)
    monkeypatch.setattr(quantized, "use_triton", lambda tensor: True)
    monkeypatch.setattr(scheme, "kernel_rows", lambda self, jobs: torch.arange(len(jobs))[:, None].repeat(1, 12))
    monkeypatch.setattr(scheme, "dequantize_rows", lambda self, rows, n_weights: launched.append(len(rows)))
    base = QuantizedBase(model, layers, space)
    members = [(np.arange(n_layers) + shift) % 4 for shift in range(4)]
    for member in members:
        base.switch(member)
    return base, members


def _calls(function, *arguments) -> int:
    """Functions, of Python and of C, that a call comes to."""
    count = 0

    def see(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return count


def test_a_held_switch_is_one_launch_and_no_more_calls_for_more_layers(monkeypatch) -> None:
    counted = []
    for n_layers in (4, 64):
        launched: list[int] = []
        base, members = _base(n_layers, monkeypatch, launched)
        launched.clear()
        counted.append(_calls(base.switch, members[0]))
        assert launched == [n_layers]
        assert (base.configuration == members[0]).all()
        _calls(base.switch, members[0])
        assert launched == [n_layers]  # nothing changed, nothing is launched
    assert counted[0] == counted[1] <= 40


def test_rows_are_gathered_as_they_were_put_and_forgotten_where_they_are_dropped() -> None:
    rows = HeldRows(3, 4, torch.device("cpu"))
    layers, choices = np.array([0, 1, 2]), np.array([3, 0, 2])
    assert rows.use(layers, choices).tolist() == [-1, -1, -1]
    table = torch.arange(6).view(3, 2)
    rows.put("nf", layers, choices, table)
    places = rows.use(layers, choices)
    assert torch.equal(rows.gather("nf", places), table)
    assert torch.equal(rows.gather("nf", places[[2, 0]]), table[[2, 0]])
    rows.drop("nf", 1, 0)
    assert (rows.use(layers, choices) >= 0).tolist() == [True, False, True]
    rows.put("nf", layers[1:2], np.array([1]), 10 + table[:1])  # in the place that has become free
    assert rows.gather("nf", rows.use(layers[1:2], np.array([1]))).tolist() == [[10, 11]]
    rows.put("nf", layers[1:], np.array([3, 3]), 20 + table[:2])
    assert torch.equal(rows.gather("nf", rows.use(layers[[0, 2]], choices[[0, 2]])), table[[0, 2]])
    assert rows.used[0, 3] > rows.used[1, 0] > 0
