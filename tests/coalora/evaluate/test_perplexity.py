"""Windows predict every token once; a text's score is the sum over its tokens, and that of a benchmark's blocks."""

from __future__ import annotations

import math

import pytest
import torch

from coalora.data.benchmark import Split
from coalora.data.text import blocks
from coalora.errors import CoaloraError
from coalora.evaluate.losses import score
from coalora.evaluate.perplexity import score_text, windows


def tokens(n: int) -> list[int]:
    return torch.randint(1, 320, (n,), generator=torch.Generator().manual_seed(n)).tolist()


@pytest.mark.parametrize(("max_length", "stride"), [(8, 7), (8, 4), (8, 1), (2, 1), (100, 50)])
@pytest.mark.parametrize("n_tokens", [2, 7, 8, 9, 15, 16, 40])
def test_every_token_but_the_first_is_predicted_once_with_enough_before_it(
    n_tokens: int, max_length: int, stride: int
) -> None:
    predicted = []
    for begin, first, end in windows(n_tokens, max_length, stride):
        assert end - begin <= max_length
        assert first - begin >= min(max_length - stride, first)
        predicted += range(first, end)
    assert predicted == list(range(1, n_tokens))


@pytest.mark.parametrize(("max_length", "stride"), [(8, 3), (6, 5), (64, 32)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_score_sums_what_each_window_says_of_its_tokens(tiny_models, max_length, stride, batch_size) -> None:
    model, ids = tiny_models["llama"](), tokens(21)
    nats = 0.0
    with torch.no_grad():
        for position in range(1, 21):
            begin = 0 if position < max_length else ((position - max_length) // stride + 1) * stride
            logits = model(input_ids=torch.tensor([ids[begin:position]])).logits[0, -1]
            nats -= float(logits.double().log_softmax(-1)[ids[position]])
    found = score_text(model, ids, 50, max_length=max_length, stride=stride, batch_size=batch_size)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert (found.tokens, found.nbytes) == (20, 50 * 20 / 21)
    assert found.perplexity == pytest.approx(math.exp(nats / 20), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.nbytes, rel=1e-5)


def test_a_reference_is_compared_on_every_predicted_token(tiny_llama) -> None:
    """With overlap, so that most tokens of a window are predicted by the one before it."""
    ids = torch.randint(1, 300, (21,), generator=torch.Generator().manual_seed(1)).tolist()
    model, reference = tiny_llama(0), tiny_llama(1)
    found = score_text(model, ids, 50, max_length=8, stride=4, batch_size=2, reference=reference)
    nats, same = 0.0, 0
    for position in range(1, 21):
        begin = 0 if position < 8 else ((position - 8) // 4 + 1) * 4
        with torch.no_grad():
            p, q = (
                m(input_ids=torch.tensor([ids[begin:position]])).logits[0, -1].double().softmax(-1)
                for m in (reference, model)
            )
        nats += float((p * (p.log() - q.log())).sum())
        same += int(p.argmax() == q.argmax())
    assert found.kl == pytest.approx(nats / 20, rel=1e-4)
    assert found.agreement == same / 20
    alone = score_text(model, ids, 50, max_length=8, stride=4, batch_size=2)
    assert (alone.nats, alone.kl) == (found.nats, None)


def test_windows_that_only_touch_are_a_benchmarks_blocks(tiny_llama, tiny_tokenizer, make_adapted) -> None:
    text = "the quick brown fox reads what the large one wrote, naïve or not. " * 4
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    length = (len(ids) - 1) // 5
    ids = ids[: 5 * length + 1]
    rows, per_token = blocks([text], lambda _: [ids], length, end_of_text=None)
    adapted = make_adapted(tiny_llama())
    expected = score(adapted, Split(rows, torch.full((5,), length + 1), None, per_token), batch_size=5)
    found = score_text(adapted.peft_model, ids, len(text.encode()), max_length=length + 1, stride=length, batch_size=5)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(expected.metrics["bits_per_byte"], rel=1e-6)


def test_more_context_helps_a_model_that_uses_it(tiny_llama) -> None:
    class Copies(torch.nn.Module):
        """Predicts the token of 4 places ago, where it sees it."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            logits = torch.zeros(*input_ids.shape, 10)
            logits[:, 3:] = 5 * torch.nn.functional.one_hot(input_ids[:, :-3], 10).float()
            return type("Output", (), {"logits": logits})

    ids = [1, 2, 3, 4] * 10
    short, long = (score_text(Copies(), ids, 40, max_length=8, stride=s, batch_size=3).loss for s in (7, 1))
    assert long < short


@pytest.mark.parametrize(("max_length", "stride"), [(8, 8), (8, 0), (1, 1)])
def test_a_stride_that_leaves_tokens_out_is_refused(max_length: int, stride: int) -> None:
    with pytest.raises(CoaloraError, match=f"A stride of {stride} .* windows of {max_length}"):
        windows(10, max_length, stride)


def test_a_single_token_cannot_be_predicted() -> None:
    with pytest.raises(CoaloraError, match="text of 1 tokens has none to predict"):
        windows(1, 8, 4)
