"""Ties: layers that take one choice, through everything that makes configurations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix, vstack
from transformers import BertConfig, GPT2Config, LlamaConfig

from coalora import CoaLoraConfig, CoaLoraModel
from coalora.calibrate.tables import CalibrationTables, calibration_tables
from coalora.configurations import ConfigurationSet, configuration_dict
from coalora.errors import CoaloraError
from coalora.export.bundle import Bundle
from coalora.method.initial import given_set, initial_set
from coalora.method.search import search_round
from coalora.method.selection import select_budgets
from coalora.models.choices import Part, Rule, layer_choices
from coalora.models.loading import meta_model
from coalora.models.targets import find_target_layers, tied_groups
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe, InitialSetRecipe, SearchRecipe
from coalora.search.knapsack import allocate

SPACE = ChoiceSpace("int", bits=[2, 3, 4, 8], group_size=[32, 64], mode=["asym"])
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
)
LAYERS = find_target_layers(meta_model(CONFIG, "language-modeling"))


def _tables(seed: int = 0, allowed: np.ndarray | None = None, space: ChoiceSpace = SPACE) -> CalibrationTables:
    rng = np.random.default_rng(seed)
    err = np.exp(rng.normal(size=(len(LAYERS), 1))) * 4.0**-space.nominal_bits
    err *= np.exp(0.1 * rng.normal(size=err.shape))
    return calibration_tables(LAYERS, space, err, "0" * 64, allowed, tie="fused")


def _of(configuration: np.ndarray, block: int, *names: str) -> list[int]:
    found = {layer.name: int(k) for layer, k in zip(LAYERS, configuration, strict=False)}
    return [found[f"model.layers.{block}.{name}"] for name in names]


def is_tied(configurations: np.ndarray, blocks: int = CONFIG.num_hidden_layers) -> bool:
    """By the layers' names, written out: nothing of the code under test."""
    return all(
        len(set(_of(row, block, *names))) == 1
        for row in configurations
        for block in range(blocks)
        for names in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        )
    )


def _measure(tables: CalibrationTables, curved: float = 0.3):
    rows = np.arange(len(LAYERS))
    return lambda C, what: 1 + tables.err[rows, C].sum(1) + curved * np.sin(C @ rows)


def test_groups_follow_the_names_of_layers_that_read_one_input() -> None:
    assert len(set(tied_groups(LAYERS, "fused").tolist())) == 3 * 4
    assert tied_groups(LAYERS, "none").tolist() == list(range(21))
    small = {"num_hidden_layers": 2, "vocab_size": 64}
    bert = find_target_layers(meta_model(BertConfig(hidden_size=24, intermediate_size=32, **small), "classification"))
    assert tied_groups(bert, "fused").tolist() == [0, 0, 0, 1, 2, 3, 4, 4, 4, 5, 6, 7]
    gpt = find_target_layers(meta_model(GPT2Config(n_embd=24, n_layer=2, vocab_size=64), "language-modeling"))
    assert tied_groups(gpt, "fused").tolist() == list(range(len(gpt)))  # one layer makes query, key and value already


def test_without_ties_the_search_sees_the_tables_themselves() -> None:
    tables = replace(_tables(), tie="none")
    assert np.array_equal(tables.search_err, tables.err)
    assert np.array_equal(tables.search_cost, tables.cost)
    assert np.array_equal(tables.search_allowed, tables.allowed)
    C = np.random.default_rng(0).integers(len(SPACE), size=(5, len(LAYERS)))
    assert np.array_equal(tables.expand(C), C)
    assert np.array_equal(tables.of_groups(C), C)


def _exact(tables: CalibrationTables, budget: float) -> float:
    """Least total error of the layers' problem with equalities between tied layers, by an exact solver."""
    N, K = tables.err.shape
    one = coo_matrix((np.ones(N * K), (np.repeat(np.arange(N), K), np.arange(N * K))))
    equal = []
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for block in range(CONFIG.num_hidden_layers):
            first, *others = (
                i for i, layer in enumerate(LAYERS) if layer.block == block and layer.name.endswith(names)
            )
            equal += [(first * K + k, other * K + k) for other in others for k in range(K)]
    rows = np.repeat(np.arange(len(equal)), 2)
    ties = coo_matrix((np.tile([1.0, -1.0], len(equal)), (rows, np.ravel(equal))), shape=(len(equal), N * K))
    scale = 1e3 / tables.err.sum()
    solved = milp(
        tables.err.ravel() * scale,
        integrality=np.ones(N * K),
        bounds=Bounds(0, np.where(tables.allowed.ravel(), 1, 0)),
        constraints=[
            LinearConstraint(vstack([one, ties]).tocsr(), [1] * N + [0] * len(equal), [1] * N + [0] * len(equal)),
            LinearConstraint(tables.bits.ravel()[None], -np.inf, budget),
        ],
        options={"mip_rel_gap": 1e-6, "time_limit": 60},
    )
    return float(solved.mip_dual_bound) / scale


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_allocations_under_ties_are_within_a_thousandth_of_the_exact_optimum(seed: int) -> None:
    tables = _tables(seed)
    low, high = tables.cost_range()
    budgets = low + (high - low) * np.array([0.05, 0.3, 0.7])
    found = tables.expand(allocate(tables.search_err, tables.search_cost, budgets))
    assert is_tied(found)
    assert (tables.average_bits(found) <= budgets * (1 + 1e-11)).all()
    for C, budget in zip(found, budgets, strict=True):
        total = tables.err[np.arange(len(LAYERS)), C].sum()
        assert total <= 1.001 * _exact(tables, budget)


@pytest.mark.parametrize("ruled", [False, True])
@pytest.mark.parametrize("strategy", ["ehvi", "random", "frozen"])
def test_every_configuration_that_is_made_is_tied(strategy: str, ruled: bool) -> None:
    rules = [Rule("v_proj", min_bits=3), Rule("*.1.mlp.gate_proj", max_bits=4)] if ruled else []
    space, allowed = layer_choices(LAYERS, [Part("int", {"mode": ["asym"], "group_size": [32, 64]})], rules, "fused")
    tables = _tables(1, allowed, space)
    members = initial_set(tables, InitialSetRecipe(size=8))
    assert is_tied(members.configurations)
    assert members.configurations[0].tolist() != members.configurations[-1].tolist()
    recipe = SearchRecipe(strategy=strategy, candidates=6, restarts=3)
    for round_index in (1, 2):
        members, record = search_round(
            _measure(tables), members, tables, recipe, round_index=round_index, seed=3, ref_point=None
        )
        assert record["n_candidates"] == (0 if strategy == "frozen" else 6)
        assert is_tied(members.configurations)
    low, high = tables.cost_range()
    budgets = [low, low + 0.31 * (high - low), high]
    final, chosen = select_budgets(_measure(tables), members, tables, budgets)
    assert is_tied(chosen.configurations)
    assert (tables.costs(chosen.configurations) <= np.array(budgets) * (1 + 1e-9)).all()
    for made in (members.configurations, chosen.configurations):
        assert allowed[np.arange(len(LAYERS)), made].all()
    bundle = Bundle(tables, final.take(np.array([-1])), {}, AdapterRecipe(), "language-modeling")
    asked = [bundle.select(budget) for budget in (low, high)]  # no member fits the first
    assert is_tied(np.stack(asked))
    if ruled:  # min_bits of v_proj holds for the layers that are tied to it
        bits = np.array([choice.bits for choice in space.choices])
        assert min(bits[_of(row, 0, "self_attn.q_proj")[0]] for row in members.configurations) == 3


def test_the_range_of_costs_is_that_of_tied_configurations() -> None:
    _, allowed = layer_choices(LAYERS, [Part("int")], [Rule("self_attn.k_proj", min_bits=4)])
    tables = calibration_tables(LAYERS, ChoiceSpace("int"), np.ones(allowed.shape), "", allowed, tie="fused")
    low, high = tables.cost_range()
    assert low > replace(tables, tie="none").cost_range()[0]  # q and v cannot go below k
    assert low == tables.average_bits(tables.expand(allocate(tables.search_err, tables.search_cost, low)[0]))
    assert high == tables.average_bits(np.full(len(LAYERS), tables.nbytes.sum(0).argmax()))


def test_a_set_that_breaks_a_tie_is_refused_with_the_layers() -> None:
    tables = _tables()
    C = np.zeros((2, len(LAYERS)), dtype=np.int64)
    C[1] = 2
    C[1, 8] = 1  # key of the second block
    content = ConfigurationSet.unmeasured(C).to_dict(tables)
    assert len(given_set(content, replace(tables, tie="none"))) == 2
    names = "model.layers.1.self_attn.q_proj, model.layers.1.self_attn.k_proj, model.layers.1.self_attn.v_proj take"
    with pytest.raises(CoaloraError, match=names):
        given_set(content, tables)
    with pytest.raises(CoaloraError, match=names):
        configuration_dict(C[1], tables)
    assert configuration_dict(C[0], tables)


def test_tied_layers_whose_rules_leave_nothing_in_common_are_refused() -> None:
    rules = [Rule("q_proj", max_bits=2), Rule("k_proj", min_bits=4)]
    with pytest.raises(CoaloraError, match=r"self_attn.q_proj, .*v_proj take one choice .*the rules leave none"):
        layer_choices(LAYERS, [Part("int")], rules, "fused")
    layer_choices(LAYERS, [Part("int")], rules)


def test_tables_keep_their_tie(tmp_path) -> None:
    tables = _tables()
    tables.save(tmp_path / "tables.safetensors")
    assert CalibrationTables.load(tmp_path / "tables.safetensors").tie == "fused"


def test_a_model_of_the_library_is_tied_from_calibration_to_any_budget(tiny_llama, tiny_tokenizer, tmp_path) -> None:
    tiny_llama(hidden_size=64, intermediate_size=192).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    config = CoaLoraConfig(r=2, choices=SPACE, tie="fused", search=SearchRecipe(candidates=3, batch_size=2))
    model = CoaLoraModel.from_pretrained(tmp_path / "base", config, max_length=16)
    texts = ["the quick brown fox jumps over the lazy dog, and back again " * 12]
    model.calibrate(texts)
    model.fit(texts, texts, steps=4, rounds=1, budgets=[3.0])
    model.save_pretrained(tmp_path / "bundle")
    bundle = CoaLoraModel.load_bundle(tmp_path / "bundle")
    made = [*bundle.members.configurations, *(bundle.select(budget) for budget in (2.4, 3.3, 6.0))]
    assert is_tied(np.stack(made), blocks=2)
