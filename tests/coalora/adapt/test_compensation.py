"""Compensation: the optimum of its weighted least squares, by an independent route, and its place in the adapter."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from coalora.adapt.adapted import AdaptedModel
from coalora.adapt.compensation import CompensationTable, as_large_as_lora, compensating_lora_B, compensation
from coalora.calibrate.statistics import collect_statistics
from coalora.errors import CoaloraError
from coalora.models.targets import find_target_layers
from coalora.quant.scheme import InputStatistics
from coalora.recipes import AdapterRecipe


def problem(out: int = 20, n_in: int = 14, seed: int = 0) -> tuple[torch.Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, n_in, generator=generator) @ torch.randn(n_in, n_in, generator=generator)
    H = x.T @ x / len(x)
    return torch.randn(out, n_in, generator=generator), InputStatistics(H.diagonal().clone(), H)


def error(E: torch.Tensor, A: torch.Tensor, B: torch.Tensor, H: np.ndarray) -> float:
    rest = (E - B @ A).double().numpy()
    return float(np.trace(rest @ H @ rest.T))


@pytest.mark.parametrize("r", [1, 3, 14])
@pytest.mark.parametrize("weighting", ["hessian", "diagonal"])
def test_the_product_is_the_optimum_that_a_weighted_svd_finds(r: int, weighting: str) -> None:
    """Eckart and Young: the least error is the sum of the squared singular values of E H^(1/2) behind the r-th."""
    E, known = problem()
    H = known.hessian.double().numpy() if weighting == "hessian" else np.diag(known.second_moment.double().numpy())
    given = known if weighting == "hessian" else InputStatistics(known.second_moment)
    A, B = compensation(E, given, r)
    assert A.shape == (r, 14)
    assert B.shape == (20, r)
    singular = np.linalg.svd(E.double().numpy() @ scipy.linalg.sqrtm(H).real, compute_uv=False)
    assert error(E, A, B, H) == pytest.approx(float((singular[r:] ** 2).sum()), rel=1e-3, abs=1e-3 * singular[0])


def test_the_whole_hessian_beats_its_diagonal_where_inputs_are_correlated() -> None:
    E, known = problem()
    H = known.hessian.double().numpy()
    whole, diagonal = compensation(E, known, 3), compensation(E, InputStatistics(known.second_moment), 3)
    assert error(E, *whole, H) < 0.9 * error(E, *diagonal, H)


@pytest.mark.parametrize("weighting", ["hessian", "diagonal"])
def test_lora_b_for_given_rows_is_the_least_squares_fit(weighting: str) -> None:
    E, known = problem()
    H = known.hessian.double().numpy() if weighting == "hessian" else np.diag(known.second_moment.double().numpy())
    given = known if weighting == "hessian" else InputStatistics(known.second_moment)
    A = torch.randn(4, 14, generator=torch.Generator().manual_seed(2))
    root = scipy.linalg.sqrtm(H).real
    expected, *_ = np.linalg.lstsq(root @ A.double().numpy().T, root @ E.double().numpy().T, rcond=None)
    np.testing.assert_allclose(compensating_lora_B(E, given, A).numpy(), expected.T, rtol=1e-4, atol=1e-5)


def test_lora_b_for_the_optimal_rows_is_the_optimal_one() -> None:
    E, known = problem()
    A, B = compensation(E, known, 3)
    torch.testing.assert_close(compensating_lora_B(E, known, A), B, rtol=1e-2, atol=1e-3)


def test_rows_that_repeat_themselves_still_have_a_fit() -> None:
    E, known = problem()
    A = torch.randn(2, 14, generator=torch.Generator().manual_seed(2))
    B, whole = compensating_lora_B(E, known, torch.cat([A, A])), compensating_lora_B(E, known, A)
    torch.testing.assert_close(B @ torch.cat([A, A]), whole @ A, rtol=1e-4, atol=1e-4)


def test_rows_are_scaled_to_the_output_of_lora_s_random_ones() -> None:
    E, known = problem(n_in=14)
    assert known.hessian is not None
    A, _ = compensation(E, known, 4)
    usual = torch.empty(4000, 14).uniform_(-(14**-0.5), 14**-0.5, generator=torch.Generator().manual_seed(0))
    of_random = ((usual @ known.hessian) * usual).sum(dim=1).mean()
    scaled = as_large_as_lora(A, usual[:4], known)
    outputs = ((scaled @ known.hessian) * scaled).sum(dim=1)
    torch.testing.assert_close(outputs, of_random.expand(4), rtol=0.05, atol=0)
    torch.testing.assert_close(torch.nn.functional.normalize(scaled), torch.nn.functional.normalize(A))


def test_rows_without_output_stay_random() -> None:
    E, known = problem()
    A, _ = compensation(E, known, 3)
    A[2] = 0
    usual = torch.ones(3, 14)
    scaled = as_large_as_lora(A, usual, known)
    assert torch.equal(scaled[2], usual[2])
    assert not torch.equal(scaled[:2], usual[:2])


def test_a_singular_hessian_needs_no_damping() -> None:
    E, _ = problem()
    x = torch.randn(5, 14, generator=torch.Generator().manual_seed(3))
    H = x.T @ x / 5
    A, B = compensation(E, InputStatistics(H.diagonal().clone(), H), 5)
    assert bool(torch.isfinite(A).all() & torch.isfinite(B).all())
    # The inputs span five directions: rank five mends all that they can show.
    assert error(E, A, B, H.double().numpy()) < 1e-4 * error(E, A * 0, B, H.double().numpy())


def test_factors_are_the_same_twice_and_survive_half_precision() -> None:
    E, known = problem()
    first, second = compensation(E, known, 4), compensation(E.clone(), known, 4)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one.half().float(), one)


def test_the_iteration_for_large_layers_comes_within_a_percent_of_the_optimum(monkeypatch) -> None:
    E, known = problem(out=90, n_in=60)
    H = known.hessian.double().numpy()
    exact = error(E, *compensation(E, known, 8), H)
    monkeypatch.setattr("coalora.adapt.compensation._EXACT", 10)
    found = compensation(E, known, 8)
    assert error(E, *found, H) <= 1.01 * exact
    assert all(torch.equal(a, b) for a, b in zip(found, compensation(E, known, 8), strict=True))


@pytest.mark.parametrize("r", [0, 15])
def test_a_rank_outside_of_the_layer_is_refused(r: int) -> None:
    with pytest.raises(CoaloraError, match=f"no compensation of rank {r}"):
        compensation(*problem(), r)


def test_the_table_computes_once_and_stays_below_its_limit() -> None:
    E, known = problem()
    calls = []

    def residual(layer: int, choice: int) -> torch.Tensor:
        calls.append((layer, choice))
        return E * (1 + layer + choice)

    size = 4 * 2 * (20 + 14)
    table = CompensationTable(residual, [known, known], [2, 2], cache_bytes=2 * size)
    for key in [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (0, 1)]:
        table(*key)
    assert calls == [(0, 0), (0, 1), (1, 0)]
    assert table._cache.nbytes <= 2 * size
    table(0, 0)
    assert calls[-1] == (0, 0)


@pytest.fixture
def compensated(tiny_llama, tables_for, text_split):
    """`compensated(method="coa", **recipe)`: a tiny model with the Hessians of its own inputs."""

    def make(method: str = "coa", **recipe: object) -> AdaptedModel:
        model = tiny_llama()
        tables = tables_for(model)
        known = collect_statistics(model, find_target_layers(model), text_split, batch_size=5, hessians=True)
        sizes = {"r": 6, "lora_alpha": 9, "compensation_rank": 4, "expert_bits": 0, **recipe}
        return AdaptedModel(
            model,
            tables.layers,
            tables.space,
            "language-modeling",
            method=method,
            recipe=AdapterRecipe(**sizes),
            seed=0,
            statistics=known,
        )

    return make


def outputs(adapted: AdaptedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return adapted.peft_model(**batch).logits


def test_at_two_bits_compensation_brings_the_outputs_nearer_to_full_precision(compensated, text_split) -> None:
    batch = {k: v for k, v in text_split.batch(torch.arange(10)).items() if k != "labels"}
    adapted, plain = compensated(), compensated("shared")
    exact = outputs(adapted, batch)
    lowest = np.zeros(len(adapted.layers), dtype=np.int64)
    adapted.switch(lowest)
    plain.switch(lowest)
    # lora_B is zero at the start: all that differs is the compensation.
    assert (outputs(adapted, batch) - exact).norm() < 0.8 * (outputs(plain, batch) - exact).norm()
    adapted.full_precision()
    assert torch.equal(outputs(adapted, batch), exact)


def test_trained_and_compensating_ranks_share_the_total(compensated) -> None:
    adapted = compensated(rank_pattern={"mlp.down_proj": 9})
    adapted.switch(np.zeros(len(adapted.layers), dtype=np.int64))
    for layer, lora_A, lora_B in zip(adapted.layers, adapted.lora_A, adapted.lora_B, strict=True):
        total = 9 if layer.kind == "mlp.down_proj" else 6
        assert lora_A.weight.shape[0] == total - 4
        assert lora_A.effective_weight().shape == (total, layer.shape[1])
        assert lora_B.effective_weight().shape == (layer.shape[0], total)


def test_lq_lora_starts_at_the_compensation_of_its_configuration(compensated) -> None:
    adapted, reference = compensated("lq-lora"), compensated()
    lowest = np.zeros(len(adapted.layers), dtype=np.int64)
    adapted.start_from_compensation(lowest)
    for index, rank in enumerate(adapted.ranks):
        A, B = compensation(reference.base.residual(index, 0), adapted.base._statistics[index], rank)
        product = adapted.lora_B[index].weight @ adapted.lora_A[index].weight * adapted.recipe.scale
        torch.testing.assert_close(product, B @ A, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"compensation_rank": 6}, "Rank 6 of model.* beside compensation_rank 6"),
        ({"rank_pattern": {"*.nothing": 4}}, r"'\*\.nothing' matches no target layer"),
        (
            {"rank_pattern": {"self_attn.q_proj": 3}},
            "Rank 3 of model.layers.0.self_attn.q_proj leaves nothing to train beside compensation_rank 4",
        ),
    ],
)
def test_ranks_that_leave_nothing_to_train_or_match_no_layer_are_refused(compensated, recipe, message) -> None:
    with pytest.raises(CoaloraError, match=message):
        compensated(**recipe)


def test_compensation_without_statistics_is_refused(tiny_llama, tables_for) -> None:
    model = tiny_llama()
    tables, recipe = tables_for(model), AdapterRecipe(r=4, compensation_rank=2, expert_bits=0)
    with pytest.raises(CoaloraError, match="no statistics of the layers"):
        AdaptedModel(model, tables.layers, tables.space, "language-modeling", method="coa", recipe=recipe, seed=0)
