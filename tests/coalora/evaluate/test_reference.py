"""KL divergence and agreement equal their definitions, token by token, whatever is computed together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import coalora.evaluate.reference
from coalora.evaluate.losses import LossMeter, measure_configurations, score
from coalora.evaluate.reference import Predictions, Reference, divergence

CONFIGURATIONS = np.arange(3)[:, None].repeat(14, 1)


def direct(own, reference, split) -> tuple[float, float]:
    """(KL in nats a predicted token, share of equal most likely tokens), one unpadded example at a time."""
    nats, same, predicted = 0.0, 0, 0
    for ids, length in zip(split.input_ids, split.lengths.tolist(), strict=True):
        with torch.no_grad():
            p, q = (
                model(input_ids=ids[None, :length]).logits[0, :-1].double().softmax(-1) for model in (reference, own)
            )
        nats += float((p * (p.log() - q.log())).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        predicted += length - 1
    return nats / predicted, same / predicted


@pytest.mark.parametrize("method", ["coa", "none", "shared"])
@pytest.mark.parametrize("held", [1, 2**30])
def test_the_base_is_the_reference_of_every_configuration(
    tiny_llama, make_adapted, text_split, monkeypatch, method, held
) -> None:
    """With logits of one batch at a time, or of all of them."""
    monkeypatch.setattr(coalora.evaluate.reference, "_HELD", held)
    adapted = make_adapted(tiny_llama(), method, perturb=0.05)
    found = measure_configurations(adapted, text_split, CONFIGURATIONS, batch_size=4, reference=Reference())
    for row, one in zip(CONFIGURATIONS, found, strict=True):
        adapted.switch(row)
        plain = score(adapted, text_split, batch_size=4)
        assert {k: one.metrics[k] for k in plain.metrics} == plain.metrics
        kl, agreement = direct(adapted.peft_model, tiny_llama(), text_split)
        assert one.metrics["kl_divergence"] == pytest.approx(kl, rel=1e-4)
        assert one.metrics["top1_agreement"] == pytest.approx(agreement)
    assert len({one.metrics["kl_divergence"] for one in found}) == 3


def test_an_adapter_of_its_own_is_part_of_the_reference(tiny_gpt2, make_adapted, text_split) -> None:
    """Conv1D layers, whose weights are stored the other way round."""
    own = make_adapted(tiny_gpt2(), "shared", seed=3, perturb=0.1)
    own.full_precision()
    pairs = [(a.weight.detach(), b.weight.detach()) for a, b in zip(own.lora_A, own.lora_B, strict=True)]
    adapted, row = make_adapted(tiny_gpt2(), perturb=0.05), np.full((1, 8), 2)
    reference = Reference(pairs, own.recipe.scale)
    (found,) = measure_configurations(adapted, text_split, row, batch_size=4, reference=reference)
    adapted.switch(row[0])
    kl, agreement = direct(adapted.peft_model, own.peft_model, text_split)
    assert found.metrics["kl_divergence"] == pytest.approx(kl, rel=1e-4)
    assert found.metrics["top1_agreement"] == pytest.approx(agreement)
    assert kl != pytest.approx(direct(adapted.peft_model, tiny_gpt2(), text_split)[0], rel=0.01)


def test_full_precision_agrees_with_itself(tiny_llama, make_adapted, text_split) -> None:
    adapted = make_adapted(tiny_llama(), "none")
    (found,) = measure_configurations(adapted, text_split, np.full((1, 14), -1), batch_size=3, reference=Reference())
    assert found.metrics["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert found.metrics["top1_agreement"] == 1


def test_a_method_without_lora_is_left_without_it(tiny_llama, make_adapted, text_split) -> None:
    adapted = make_adapted(tiny_llama(), "none")
    before = score(adapted, text_split, batch_size=4)
    trained = set(adapted.named_parameters())
    measure_configurations(adapted, text_split, CONFIGURATIONS, batch_size=4, reference=Reference())
    adapted.full_precision()
    assert score(adapted, text_split, batch_size=4) == before
    assert set(adapted.named_parameters()) == trained == set()


def test_classes_have_no_reference(tiny_bert_classifier, make_adapted, class_split) -> None:
    adapted = make_adapted(tiny_bert_classifier())
    row = np.zeros((1, 12), dtype=np.int64)
    (found,) = measure_configurations(adapted, class_split, row, batch_size=4, reference=Reference())
    assert "kl_divergence" not in found.metrics


@pytest.mark.parametrize("together", [1, 7 * 500, 2**24])
@pytest.mark.parametrize("apart", [3.0, 0.01])
def test_divergence_is_that_of_double_precision_in_pieces_of_any_size(monkeypatch, together, apart) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, noise = (3 * torch.randn(23, 500, generator=generator, dtype=torch.float64) for _ in range(2))
    own = wanted + apart * noise
    counted = torch.rand(23, generator=generator) < 0.6
    p, q = wanted.softmax(-1), own.softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)[counted].sum()
    same = (p.argmax(-1) == q.argmax(-1))[counted].sum()
    monkeypatch.setattr(coalora.evaluate.reference, "_TOGETHER", together)
    found = (Predictions.of(torch.nn.functional.pad(logits.float(), (0, 0, 0, 1))[None]) for logits in (own, wanted))
    nats, equal = divergence(*found, counted)
    assert float(nats) == pytest.approx(float(kl), rel=1e-5, abs=1e-6)
    assert float(equal) == float(same)


def test_a_meter_with_a_reference_measures_the_divergence(tiny_llama, make_adapted, text_split) -> None:
    adapted = make_adapted(tiny_llama(), perturb=0.05)
    found = measure_configurations(adapted, text_split, CONFIGURATIONS, batch_size=4, reference=Reference())
    measured = LossMeter(adapted, text_split, 4, reference=Reference())(CONFIGURATIONS, "set")
    assert measured.tolist() == [one.metrics["kl_divergence"] for one in found]
