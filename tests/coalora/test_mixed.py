"""Several schemes in one run, from rules to a base on disk: quantized MLPs, other attention, a head in 16 bits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from coalora.adapt.adapted import AdaptedModel
from coalora.calibrate.tables import CalibrationTables, calibration_tables, error_table
from coalora.configurations import ConfigurationSet, configuration_dict, configuration_digest, read_choices
from coalora.errors import CoaloraError
from coalora.export.base import load_adapted, load_base, write_base
from coalora.export.bundle import Bundle
from coalora.models.architectures import ARCHITECTURES
from coalora.models.choices import Part, Rule, layer_choices
from coalora.models.switching.quantized import QuantizedBase
from coalora.models.targets import find_target_layers
from coalora.quant.scheme import InputStatistics
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe, TrainingRecipe
from coalora.search.budget import best_within, contenders
from coalora.search.knapsack import allocate
from coalora.search.proposals import propose
from coalora.search.surrogate import Surrogate
from coalora.train.loop import train

NF = Part("nf", {"scale_bits": [8], "scale_dtype": ["bf16"], "block_size": [16, 64], "scale_block_size": [64]})
RULES = (
    Rule("*.mlp.*", (Part("int", {"bits": [4, 8], "group_size": [32]}),)),
    Rule("lm_head", (Part("float"),)),
    Rule("v_proj", min_bits=3),
)
IDS = torch.arange(2 * 7).view(2, 7)


@dataclass(frozen=True)
class Mixed:
    make: Any  # the model anew
    tables: CalibrationTables

    def drawn(self, n: int, seed: int = 0) -> np.ndarray:
        """Configurations (n, N) of allowed choices."""
        rng = np.random.default_rng(seed)
        return np.array([[rng.choice(np.flatnonzero(row)) for row in self.tables.allowed] for _ in range(n)])


@pytest.fixture(scope="module")
def mixed(tiny_llama: Any) -> Mixed:
    def make() -> PreTrainedModel:
        return tiny_llama(tie_word_embeddings=False)

    model = make()
    layers = find_target_layers(model, [*ARCHITECTURES["llama"].target_modules, "lm_head"])
    space, allowed = layer_choices(layers, [NF], RULES)
    generator = torch.Generator().manual_seed(0)
    moments = [
        InputStatistics(torch.rand(layer.shape[1], generator=generator) + 0.1, rounding="absmax") for layer in layers
    ]
    weights = [model.get_submodule(layer.name).get_parameter("weight").data for layer in layers]
    err = error_table(weights, moments, space, allowed=allowed)
    return Mixed(make, calibration_tables(layers, space, err, "0" * 64, allowed))


def test_tables_hold_errors_of_allowed_choices_and_finite_stand_ins_for_the_rest(mixed: Mixed) -> None:
    tables = mixed.tables
    assert len(tables.layers) == 15
    assert [scheme.name for scheme in tables.space.schemes] == ["nf", "int", "float"]
    model = mixed.make()
    for layer, row, may in zip(tables.layers, tables.err, tables.allowed, strict=True):
        names = {tables.space.scheme_of(int(k)).name for k in np.flatnonzero(may)}
        assert names == {"int" if "mlp" in layer.name else "float" if layer.name == "lm_head" else "nf"}
        assert (row[~may] == row[may].max()).all()
        W = model.get_submodule(layer.name).get_parameter("weight").data
        for k in np.flatnonzero(may):
            q = tables.space.scheme_of(int(k)).fake_quantize(W, tables.space.choices[k])
            assert (row[k] > 0) == bool((q != W).any())


def test_what_is_not_allowed_is_not_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    space = ChoiceSpace("int", bits=[2, 4], group_size=[32], mode=["sym"])
    seen: list[str] = []
    own = type(space.scheme).quantize_layers

    def spy(scheme: Any, weights: Any, choices: Any, statistics: Any) -> Any:
        seen.extend(map(str, choices))
        return own(scheme, weights, choices, statistics)

    monkeypatch.setattr(type(space.scheme), "quantize_layers", spy)
    allowed = np.array([[True, False], [False, True]])
    error_table([torch.ones(2, 32)] * 2, [InputStatistics(torch.ones(32))] * 2, space, allowed=allowed)
    assert seen == ["int2 g32 sym", "int4 g32 sym"]


def test_the_range_of_bits_is_that_of_allowed_configurations(mixed: Mixed) -> None:
    tables = mixed.tables
    low, high = tables.bits_range()
    bits = tables.average_bits(mixed.drawn(200))
    assert low <= bits.min() < bits.max() <= high
    for end, pick in ((low, np.argmin), (high, np.argmax)):
        fill = np.inf if pick is np.argmin else -np.inf
        best = pick(np.where(tables.allowed, tables.nbytes, fill), axis=1)
        assert end == tables.average_bits(best)


def test_tables_survive_saving_with_their_rules_and_without_rules_write_what_they_always_wrote(
    mixed: Mixed, tmp_path: Path
) -> None:
    mixed.tables.save(tmp_path / "t.safetensors")
    back = CalibrationTables.load(tmp_path / "t.safetensors")
    assert back.space == mixed.tables.space
    np.testing.assert_array_equal(back.allowed, mixed.tables.allowed)
    free = calibration_tables(back.layers, back.space, back.err, "")
    free.save(tmp_path / "free.safetensors")
    assert b"allowed" not in (tmp_path / "free.safetensors").read_bytes()
    assert CalibrationTables.load(tmp_path / "free.safetensors").allowed.all()


def test_allocation_budgets_and_proposals_keep_to_the_rules_and_cross_schemes_where_they_may(mixed: Mixed) -> None:
    tables, layers = mixed.tables, np.arange(len(mixed.tables.layers))
    cost, err = tables.search_cost, tables.err
    low, high = tables.bits_range()
    budgets = np.linspace(low, high, 40)
    found = allocate(err, cost, np.maximum(budgets, low))
    assert tables.allowed[layers, found].all()
    assert (tables.average_bits(found) <= budgets + 1e-9).all()
    for budget in budgets[::8]:
        best = best_within(np.empty((0, len(layers)), dtype=int), [], cost, err, budget)
        assert tables.allowed[layers, contenders(best, cost, err, budget)].all()
    C = np.unique(found, axis=0)
    losses = err[layers, C].sum(1)
    Y = np.column_stack([losses, tables.average_bits(C)])
    proposal = propose(
        Surrogate.fit(err, C, losses, seed=0), C, Y, cost, tables.space.neighbours(1, tables.allowed),
        (2 * losses.max(), 1.01 * high), n_candidates=6, n_restarts=6, max_steps=30, seed=0,
    )  # fmt: skip
    assert len(proposal.configurations) == 6
    assert tables.allowed[layers, proposal.configurations].all()


def test_configurations_name_the_scheme_of_every_choice_and_are_read_back(mixed: Mixed) -> None:
    tables, (C, D) = mixed.tables, mixed.drawn(2)
    content = json.loads(json.dumps(configuration_dict(C, tables)))
    assert content["scheme"] == "mixed"
    assert content["layers"]["lm_head"]["scheme"] == "float"
    read = read_choices(content)
    assert [(s.name, c) for s, c in read.values()] == [
        (tables.space.scheme_of(int(k)).name, tables.space.choices[k]) for k in C
    ]
    assert configuration_digest(content) != configuration_digest(configuration_dict(D, tables))
    members = ConfigurationSet(np.stack([C, D]), np.array([1.0, 2.0]), np.zeros(2, dtype=np.int64))
    back = ConfigurationSet.from_dict(json.loads(json.dumps(members.to_dict(tables))), tables)
    np.testing.assert_array_equal(back.configurations, members.configurations)
    barred = C.copy()
    barred[-1] = 0
    forbidden = ConfigurationSet(barred[None], np.array([1.0]), np.zeros(1, dtype=np.int64)).to_dict(tables)
    with pytest.raises(CoaloraError, match="Member 0 of the set gives lm_head a choice that its rules forbid"):
        ConfigurationSet.from_dict(forbidden, tables)


def test_a_mixed_base_is_trained_exported_and_loaded_with_the_same_weights(
    mixed: Mixed, text_split: Any, tmp_path: Path
) -> None:
    tables, C = mixed.tables, mixed.drawn(4)
    recipe = AdapterRecipe(r=4, lora_alpha=6, compensation_rank=0, expert_bits=0)
    adapted = AdaptedModel(
        mixed.make(), tables.layers, tables.space, "language-modeling", method="coa", recipe=recipe, seed=0
    )
    sampled = TrainingRecipe(batch_size=4, lr=0.05, theta_lr=0.05, warmup_steps=1, sampling="uniform")
    _, records = train(adapted, text_split, C, tables.average_bits(C), sampled, steps=6, total_steps=6, seed=0)
    assert all(np.isfinite(record["loss"]) for record in records)
    assert adapted.theta is not None
    U = [adapted.theta(torch.as_tensor(c)) for c in C]
    assert not torch.equal(U[0], U[1])  # theta tells mixed configurations apart

    members = ConfigurationSet(C, np.linspace(2, 1, 4), np.zeros(4, dtype=np.int64)).sorted(tables)
    Bundle(tables, members, adapted.state_dict(), recipe, "language-modeling").save(tmp_path / "bundle")
    bundle = Bundle.load(tmp_path / "bundle")
    made = bundle.adapt(float(tables.bits_range()[1]))
    bundle.write(made, tmp_path)
    write_base(tmp_path / "base", mixed.make(), tables, made.choices, task="language-modeling")

    model = mixed.make()
    QuantizedBase(model, tables.layers, tables.space).switch(made.choices)
    loaded = load_base(tmp_path / "base", device=torch.device("cpu"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    with (tmp_path / "base" / "quantized.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    stored = (tmp_path / "base" / "quantized.safetensors").stat().st_size
    assert stored - header == tables.total_nbytes(made.choices)
    adapted.peft_model.eval()
    with torch.no_grad():
        adapted.switch(made.choices)
        expected = adapted.peft_model(input_ids=IDS).logits
        got = load_adapted(tmp_path / "base", tmp_path / "adapter", device=torch.device("cpu"))(input_ids=IDS).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
