"""From texts to benchmarks."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from coalora.data.benchmark import SPLITS
from coalora.data.build import classification, language_modeling
from coalora.data.classification import Examples
from coalora.errors import CoaloraError

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghij"]
NONE: dict[str, int | None] = {"train": None, "search": None, "validation": None}


@pytest.fixture(scope="module")
def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Words of one letter, with BERT's template and token types."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _examples(n: int, *, pairs: bool = False) -> Examples:
    letters = "abcdefghij"
    texts = [(letters[i % 10] + " a",) + ((letters[i // 10 % 10],) if pairs else ()) for i in range(n)]
    return Examples(texts, [i % 2 for i in range(n)])


def _build(tokenizer, train: Examples, **options):
    arguments = {
        "search": None,
        "n_search": 3,
        "max_length": 8,
        "num_labels": 2,
        "limits": NONE,
        **options,
    }
    validation = arguments.pop("validation", _examples(4))
    return classification("toy", tokenizer, train, validation, **arguments)


def test_bits_per_byte_equals_the_naive_sum_over_the_text(tiny_tokenizer, tiny_llama) -> None:
    text = "the quick brown fox reads what the large one wrote, naïve or not. " * 3
    documents = {part: [text] for part in SPLITS}
    encoded = tiny_tokenizer(text, add_special_tokens=False)["input_ids"] + [0]
    benchmark = language_modeling("toy", tiny_tokenizer, documents, max_length=len(encoded) - 1, limits=NONE)
    split = benchmark.validation
    assert split.input_ids.tolist() == [encoded]
    model = tiny_llama()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([encoded])).logits[0]
    nats = [-float(logits[i].log_softmax(-1)[t]) for i, t in enumerate(encoded[1:])]
    naive = sum(nats) / math.log(2) / len(text.encode())  # bits of all predicted tokens over all bytes
    loss = sum(nats) / len(nats)
    # The first token is given, not predicted: the two differ by its share.
    share = len(nats) / len(encoded)
    assert loss / math.log(2) / split.bytes_per_token == pytest.approx(naive / share, rel=1e-9)


def test_language_blocks_follow_max_length_and_limits(tiny_tokenizer) -> None:
    documents = {part: [f"{part} tokens and bytes " * 60] for part in SPLITS}
    limits = {"train": None, "search": 2, "validation": 3}
    benchmark = language_modeling("toy", tiny_tokenizer, documents, max_length=16, limits=limits)
    assert (len(benchmark.search), len(benchmark.validation)) == (2, 3)
    assert len(benchmark.train) > 3
    for part in SPLITS:
        split = getattr(benchmark, part)
        assert split.input_ids.shape[1] == 17
        assert set(split.lengths.tolist()) == {17}
        assert split.labels is None
    assert benchmark.num_labels is None


def test_single_sentences_are_tokenized_padded_and_labelled(bert_tokenizer) -> None:
    benchmark = _build(bert_tokenizer, _examples(10), validation=Examples([("b",), ("c d e",)], [1, 0]))
    split = benchmark.validation
    assert split.input_ids.tolist() == [[1, 5, 2, 0, 0], [1, 6, 7, 8, 2]]
    assert split.labels is not None
    assert split.labels.tolist() == [1, 0]
    assert split.pad_token_id == 0


def test_pairs_keep_which_sentence_a_token_belongs_to(bert_tokenizer) -> None:
    validation = Examples([("a b", "c"), ("d", "e f g h")], [0, 1])
    split = _build(bert_tokenizer, _examples(10, pairs=True), validation=validation).validation
    assert split.input_ids.tolist() == [[1, 4, 5, 2, 6, 2, 0, 0], [1, 7, 2, 8, 9, 10, 11, 2]]
    assert split.token_type_ids is not None
    assert split.token_type_ids.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]]


def test_a_bert_model_sees_the_pairs_as_its_own_tokenizer_would_give_them(bert_tokenizer, tiny_bert_classifier) -> None:
    validation = Examples([("a b", "c"), ("d", "e f g h")], [0, 1])
    split = _build(bert_tokenizer, _examples(10, pairs=True), validation=validation).validation
    batch = split.batch(torch.tensor([0, 1]))
    batch.pop("labels")
    model = tiny_bert_classifier()
    direct = bert_tokenizer(["a b", "d"], ["c", "e f g h"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, model(**direct).logits)
        batch.pop("token_type_ids")
        assert not torch.allclose(model(**batch).logits, model(**direct).logits)


def test_texts_are_cut_to_max_length_the_longer_of_a_pair_first(bert_tokenizer) -> None:
    validation = Examples([("a", "b c d e f g h i j")], [0])
    split = _build(bert_tokenizer, _examples(10, pairs=True), validation=validation, max_length=6).validation
    assert split.input_ids.tolist() == [[1, 4, 2, 5, 6, 2]]


def test_a_search_split_is_set_aside_from_training_and_nothing_is_in_both(bert_tokenizer) -> None:
    texts = [(f"{a} {b}",) for a in "abcdefghij" for b in "abcdefghij"]
    train = Examples(texts, [i % 2 for i in range(100)])
    benchmark = _build(bert_tokenizer, train, n_search=30)
    rows = {part: {tuple(r) for r in getattr(benchmark, part).input_ids.tolist()} for part in ("train", "search")}
    assert (len(rows["train"]), len(rows["search"])) == (70, 30)
    assert not rows["train"] & rows["search"]
    again = _build(bert_tokenizer, train, n_search=30)
    assert torch.equal(again.train.input_ids, benchmark.train.input_ids)
    other = _build(bert_tokenizer, train, n_search=30, seed=1)
    assert not torch.equal(other.search.input_ids, benchmark.search.input_ids)


def test_labels_stay_with_their_texts_through_shuffling_and_limits(bert_tokenizer) -> None:
    train = Examples([(letter,) for letter in "abcdefghij"], list(range(10)))
    limits = {"train": 5, "search": 2, "validation": 1}
    benchmark = _build(bert_tokenizer, train, n_search=4, num_labels=10, limits=limits)
    assert [len(getattr(benchmark, part)) for part in SPLITS] == [5, 2, 1]
    for part in ("train", "search"):
        split = getattr(benchmark, part)
        assert split.input_ids[:, 1].tolist() == [WORDS.index("abcdefghij"[k]) for k in split.labels]


def test_a_search_split_of_its_own_is_taken_as_it_is(bert_tokenizer) -> None:
    benchmark = _build(bert_tokenizer, _examples(10), search=_examples(2), n_search=99)
    assert (len(benchmark.train), len(benchmark.search)) == (10, 2)


@pytest.mark.parametrize("n_search", [0, 10, 11])
def test_a_search_split_that_leaves_nothing_or_holds_nothing_is_refused(bert_tokenizer, n_search: int) -> None:
    with pytest.raises(CoaloraError, match=f"{n_search} examples for the search .* 10 training.*n_search to 1 to 9"):
        _build(bert_tokenizer, _examples(10), n_search=n_search)


def test_a_label_beyond_num_labels_is_refused_with_its_split(bert_tokenizer) -> None:
    with pytest.raises(CoaloraError, match="validation has the label 2, and the model 2 classes"):
        _build(bert_tokenizer, _examples(10), validation=Examples([("a",)], [2]))


def test_a_limit_of_nothing_is_refused(bert_tokenizer) -> None:
    with pytest.raises(CoaloraError, match="limit of 0 leaves train without examples"):
        _build(bert_tokenizer, _examples(10), limits={"train": 0})


def test_one_label_makes_a_regression_whose_values_stay_with_their_texts(bert_tokenizer) -> None:
    train = Examples([(letter,) for letter in "abcdefghij"], [k / 2 for k in range(10)])
    benchmark = _build(bert_tokenizer, train, n_search=4, num_labels=1, validation=Examples([("a",)], [9.75]))
    assert benchmark.validation.labels.tolist() == [9.75]
    split = benchmark.train
    assert split.input_ids[:, 1].tolist() == [WORDS.index("abcdefghij"[int(2 * v)]) for v in split.labels]
