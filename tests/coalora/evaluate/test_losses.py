"""Scores equal the naive computation, whatever the batches, and measuring changes nothing."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from coalora.data.benchmark import pad
from coalora.errors import CoaloraError
from coalora.evaluate.losses import LossMeter, measure_configurations, score


def naive_text(model, split) -> tuple[float, float]:
    """(nats a predicted token, bits a byte), one unpadded example at a time."""
    nats, predicted = 0.0, 0
    for ids, length in zip(split.input_ids, split.lengths.tolist(), strict=True):
        row = ids[:length]
        p = model(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1)
        nats -= float(p.gather(1, row[1:, None]).sum())
        predicted += length - 1
    return nats / predicted, nats / math.log(2) / (predicted * split.bytes_per_token)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2"])
def test_text_is_scored_by_the_nats_and_bits_of_every_predicted_token(
    tiny_models, make_adapted, text_split, family
) -> None:
    adapted = make_adapted(tiny_models[family]())
    loss, bits_per_byte = naive_text(tiny_models[family](), text_split)
    result = score(adapted, text_split, batch_size=3)
    assert (result.loss, result.metric) == pytest.approx((loss, bits_per_byte), rel=1e-5)
    assert result.metrics == {"bits_per_byte": result.metric, "perplexity": pytest.approx(math.exp(loss), rel=1e-4)}


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_classes_are_scored_by_cross_entropy_and_accuracy(tiny_models, make_adapted, class_split, family) -> None:
    model = tiny_models[family]()
    split = replace(class_split, pad_token_id=model.config.pad_token_id)
    rows = [ids[:n] for ids, n in zip(split.input_ids, split.lengths.tolist(), strict=True)]
    logits = torch.cat([model(input_ids=row[None]).logits for row in rows]).double()
    right = sum(int(row.argmax()) == int(label) for row, label in zip(logits, split.labels, strict=True))
    loss = -float(logits.log_softmax(-1)[torch.arange(10), split.labels].mean())
    result = score(make_adapted(tiny_models[family]()), split, batch_size=4)
    assert result.metric == right / 10
    assert result.loss == pytest.approx(loss, rel=1e-5)


def test_score_is_the_loss_that_transformers_reports(
    tiny_llama, tiny_bert_classifier, make_adapted, text_split, class_split
) -> None:
    for factory, split in ((tiny_llama, text_split), (tiny_bert_classifier, class_split)):
        adapted = make_adapted(factory(), perturb=0.05)
        adapted.switch(np.arange(len(adapted.layers)) % 8)
        with torch.no_grad():
            expected = adapted.peft_model.eval()(**split.batch(torch.arange(10))).loss
        assert score(adapted, split, batch_size=10).loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_score_does_not_depend_on_the_batch_size(tiny_models, make_adapted, text_split, class_split, family) -> None:
    adapted = make_adapted(tiny_models[family](), perturb=0.05)
    split = class_split if family == "bert" else text_split
    results = [score(adapted, split, batch_size=size) for size in (1, 3, 10, 64)]
    assert [r.loss for r in results] == pytest.approx([results[0].loss] * 4, rel=1e-5)
    assert [r.metric for r in results] == pytest.approx([results[0].metric] * 4, rel=1e-5)


def test_dropout_is_off_while_scoring(tiny_bert_classifier, make_adapted, class_split) -> None:
    adapted = make_adapted(tiny_bert_classifier(hidden_dropout_prob=0.5), lora_dropout=0.5, perturb=0.1)
    adapted.peft_model.train()
    assert score(adapted, class_split, batch_size=4) == score(adapted, class_split, batch_size=4)


def test_configurations_are_scored_each_as_if_alone(
    tiny_llama, make_adapted, text_split, tables_for, random_configurations
) -> None:
    configurations = random_configurations(tables_for(tiny_llama()), 4)
    adapted = make_adapted(tiny_llama(), perturb=0.1)
    scores = measure_configurations(adapted, text_split, configurations, batch_size=4)
    for i in (2, 0, 3, 1):
        alone = make_adapted(tiny_llama(), perturb=0.1)
        alone.switch(configurations[i])
        result = score(alone, text_split, batch_size=4)
        assert scores[i] == result
    losses = [s.loss for s in scores]
    assert len(set(losses)) == 4
    again = LossMeter(adapted, text_split, 4)(configurations[::-1], "losses")
    assert again[::-1].tolist() == losses


def test_scoring_leaves_nothing_behind(tiny_bert_classifier, make_adapted, class_split) -> None:
    adapted = make_adapted(tiny_bert_classifier(), perturb=0.1)
    before = adapted.state_dict()
    torch.manual_seed(0)
    generator = torch.get_rng_state()
    measure_configurations(adapted, class_split, np.zeros((2, 12), dtype=np.int64), batch_size=4)
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())
    assert all(p.grad is None for p in adapted.named_parameters().values())
    assert not adapted.terms.U.requires_grad
    assert torch.equal(torch.get_rng_state(), generator)
    adapted.full_precision()
    fresh = tiny_bert_classifier()
    for layer in adapted.layers:
        module = adapted.peft_model.get_base_model().get_submodule(layer.name)
        assert torch.equal(module.base_layer.weight, fresh.get_submodule(layer.name).weight)


def test_the_losses_of_blocks_are_those_of_each_alone(tiny_llama, make_adapted, text_split) -> None:
    adapted = make_adapted(tiny_llama())
    lowest = np.zeros((1, len(adapted.layers)), dtype=np.int64)
    (found,) = measure_configurations(adapted, text_split, lowest, batch_size=3, by_block=True)
    assert len(found.blocks) == len(text_split)
    with torch.no_grad():
        each = [float(adapted.peft_model(**one).loss) for one in text_split.batches(1)]
    assert found.blocks == pytest.approx(each, rel=1e-5)
    assert score(adapted, text_split, batch_size=3).blocks == ()


def test_no_configurations_give_no_scores(tiny_llama, make_adapted, text_split) -> None:
    meter = LossMeter(make_adapted(tiny_llama()), text_split, 4)
    assert meter(np.zeros((0, 14), dtype=np.int64), "losses").shape == (0,)


def test_progress_reports_every_configuration(tiny_llama, make_adapted, text_split) -> None:
    calls = []
    meter = LossMeter(
        make_adapted(tiny_llama()),
        text_split,
        4,
        progress=lambda what: lambda done, total, loss: calls.append((what, done, total, loss)),
    )
    losses = meter(np.zeros((2, 14), dtype=np.int64), "set")
    assert calls == [("set", 1, 2, losses[0]), ("set", 2, 2, losses[1])]


def test_a_meter_goes_on_from_what_its_memo_knows_and_saves_it_whatever_happens(
    tiny_llama, make_adapted, text_split
) -> None:
    class Kept:
        def __init__(self) -> None:
            self.values, self.saved = [7.0], 0

        def add(self, value: float) -> None:
            self.values = [*self.values, value]
            if len(self.values) == 3:
                raise KeyboardInterrupt

        def save(self) -> None:
            self.saved += 1

    kept = Kept()
    meter = LossMeter(make_adapted(tiny_llama()), text_split, 4, memo=lambda what, most: kept)
    configurations = np.zeros((2, 14), dtype=np.int64)
    losses = meter(configurations, "set")
    assert losses[0] == 7.0
    assert losses[1] == kept.values[1] != 7.0
    with pytest.raises(KeyboardInterrupt):
        meter(np.zeros((3, 14), dtype=np.int64), "set")
    assert kept.saved == 2


def test_text_without_a_predicted_token_is_refused(tiny_llama, make_adapted) -> None:
    with pytest.raises(CoaloraError, match="None of the 2 examples has a second token"):
        score(make_adapted(tiny_llama()), pad([[5], [6]], 0), batch_size=2)


def test_values_are_scored_by_squared_error_and_correlations(tiny_bert_classifier, make_adapted, class_split) -> None:
    values = torch.tensor([0.5, 3.0, 4.25, 1.0, 2.0, 0.0, 5.0, 3.5, 2.5, 1.5])
    split = replace(class_split, labels=values)
    adapted = make_adapted(tiny_bert_classifier(num_labels=1), perturb=0.05)
    adapted.switch(np.arange(12) % 8)
    with torch.no_grad():
        found = adapted.peft_model.eval()(**split.batch(torch.arange(10)))
    result = score(adapted, split, batch_size=4)
    assert result.loss == pytest.approx(float(found.loss), rel=1e-5)  # what training minimises, too
    predictions = found.logits.squeeze(1).numpy()
    assert result.metrics == {
        "pearson": pytest.approx(pearsonr(predictions, values).statistic, rel=1e-4),
        "spearman": pytest.approx(spearmanr(predictions, values).statistic, rel=1e-4),
    }


def test_the_number_of_transfers_to_the_host_does_not_grow_with_the_batches(
    tiny_llama, tiny_bert_classifier, make_adapted, text_split, class_split, monkeypatch
) -> None:
    transfers = []

    def counted(original):
        def call(self, *args, **options):
            if sys._getframe(1).f_code.co_filename.endswith("evaluate/losses.py"):  # models have syncs of their own
                transfers.append(original.__name__)
            return original(self, *args, **options)

        return call

    for name in ("item", "cpu", "tolist", "numpy", "__int__", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    for factory, split in ((tiny_llama, text_split), (tiny_bert_classifier, class_split)):
        adapted = make_adapted(factory())
        counts = []
        for batch_size in (1, 10):
            transfers.clear()
            score(adapted, split, batch_size=batch_size)
            counts.append(len(transfers))
        assert counts[0] == counts[1] > 0
