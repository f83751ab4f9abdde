"""theta maps a configuration to all adjustments in one call, each layer by its own choice, kind and block alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from coalora.adapt.theta import ConfigurationAwareModel
from coalora.models.architectures import ARCHITECTURES
from coalora.models.targets import TargetLayer
from coalora.quant.space import ChoiceSpace


def roberta_large_layers() -> list[TargetLayer]:
    kinds = ARCHITECTURES["roberta"].target_modules
    return [TargetLayer(f"l.{b}.{kind}", kind, b, (8, 8), False) for b in range(24) for kind in kinds]


@pytest.fixture
def theta(small_space: ChoiceSpace) -> ConfigurationAwareModel:
    """r=3 over 2 blocks x 6 kinds, moved away from its zero start."""
    torch.manual_seed(0)
    theta = ConfigurationAwareModel(small_space, roberta_large_layers()[:12], 3)
    with torch.no_grad():
        for parameter in theta.parameters():
            parameter += 0.5 * torch.randn(parameter.shape)
    return theta


def naive(theta: ConfigurationAwareModel, space: ChoiceSpace, layer: TargetLayer, choice: int) -> Tensor:
    """U (r, r) of one layer, spelled out: one table of embeddings for each field, kind and block after one another."""
    kinds, blocks = sorted(ARCHITECTURES["roberta"].target_modules), [0, 1]
    tables = theta.embedding.weight.split([*space.field_sizes, len(kinds), len(blocks)])
    values = [*space.fields[choice], kinds.index(layer.kind), blocks.index(layer.block)]
    Q = torch.cat([table[int(value)] for table, value in zip(tables, values, strict=True)])
    norm, first, _, last = theta.layers
    hidden = torch.nn.functional.silu(first(norm(Q)))
    return last(hidden).view(theta.r, theta.r)


def test_batched_call_equals_evaluating_layer_by_layer(
    theta: ConfigurationAwareModel, small_space: ChoiceSpace
) -> None:
    configuration = np.random.default_rng(0).integers(len(small_space), size=12)
    U = theta(torch.as_tensor(configuration))
    expected = [
        naive(theta, small_space, layer, int(k))
        for layer, k in zip(roberta_large_layers(), configuration, strict=False)
    ]
    assert U.shape == (12, 3, 3)
    torch.testing.assert_close(U, torch.stack(expected))


def test_choices_that_are_left_out_have_no_adjustment_and_teach_theta_nothing(
    theta: ConfigurationAwareModel, small_space: ChoiceSpace
) -> None:
    adjusted = [choice.bits > 3 for choice in small_space.choices]
    masked = ConfigurationAwareModel(small_space, roberta_large_layers()[:12], 3, adjusted=adjusted)
    masked.load_state_dict(theta.state_dict())  # the mask is no part of the state
    low, high = adjusted.index(False), adjusted.index(True)
    configuration = torch.tensor([low, high] * 6)
    expected = theta(configuration) * torch.tensor([0.0, 1.0] * 6)[:, None, None]
    torch.testing.assert_close(masked(configuration), expected, rtol=0, atol=0)
    masked(torch.full((12,), low)).sum().backward()
    assert all(not parameter.grad.any() for parameter in masked.parameters())


def test_all_adjustments_come_from_one_call_of_the_network(theta: ConfigurationAwareModel) -> None:
    shapes: list[tuple[int, ...]] = []
    theta.layers[1].register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    theta(torch.zeros(12, dtype=torch.int64))
    assert shapes == [(12, 56)]


def test_has_half_a_million_parameters_at_rank_64_with_the_full_nf_space() -> None:
    theta = ConfigurationAwareModel(ChoiceSpace("nf"), roberta_large_layers(), 64)
    own = {name: p.numel() for name, p in theta.named_parameters()}
    # Fields 4+4+3+3+3, 6 kinds and 24 blocks: 47 embeddings of 8.
    assert own.pop("embedding.weight") == 47 * 8
    assert sum(own.values()) == 2 * 56 + (56 + 1) * 128 + (128 + 1) * 64 * 64
    assert round(sum(p.numel() for p in theta.parameters()) / 1e6, 2) == 0.54


def test_starts_at_zero_for_every_configuration(small_space: ChoiceSpace) -> None:
    theta = ConfigurationAwareModel(small_space, roberta_large_layers(), 5)
    for k in range(len(small_space)):
        assert not theta(torch.full((144,), k)).any()


def test_zero_start_still_has_a_gradient_and_reaches_every_parameter_after_one_step(small_space: ChoiceSpace) -> None:
    torch.manual_seed(0)
    theta = ConfigurationAwareModel(small_space, roberta_large_layers()[:12], 3)
    target, configuration = torch.randn(12, 3, 3), torch.arange(12) % len(small_space)
    optimizer = torch.optim.SGD(theta.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = (theta(configuration) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[1] < losses[0]
    assert all(p.grad is not None and bool(p.grad.any()) for p in theta.parameters())


def test_a_layers_adjustment_depends_on_its_own_choice_only(theta: ConfigurationAwareModel) -> None:
    first = torch.zeros(12, dtype=torch.int64)
    second = first.clone()
    second[5] = 3
    changed = (theta(first) != theta(second)).flatten(1).any(1)
    assert changed.tolist() == [i == 5 for i in range(12)]


def test_kind_and_block_tell_layers_of_equal_choice_apart(theta: ConfigurationAwareModel) -> None:
    U = theta(torch.zeros(12, dtype=torch.int64)).flatten(1)
    assert len(torch.unique(U, dim=0)) == 12


def test_every_field_of_a_choice_matters() -> None:
    torch.manual_seed(1)
    space = ChoiceSpace("nf")
    theta = ConfigurationAwareModel(space, roberta_large_layers()[:1], 2)
    torch.nn.init.normal_(theta.layers[-1].weight)
    base = theta(torch.tensor([0]))
    for field in range(5):
        other = next(k for k, row in enumerate(space.fields) if row[field] == 1 and row.sum() == 1)
        assert not torch.allclose(base, theta(torch.tensor([other])))


def test_lookup_tables_are_not_saved_with_the_parameters(theta: ConfigurationAwareModel) -> None:
    assert set(theta.state_dict()) == {name for name, _ in theta.named_parameters()}
