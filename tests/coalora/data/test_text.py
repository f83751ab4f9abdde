"""Text for language modelling: held-out documents, blocks, and the bytes behind bits per byte."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from coalora.data.text import blocks, pydoc_topics, split_documents, text_file
from coalora.errors import CoaloraError

FRACTIONS = {"search": 0.2, "validation": 0.2}


def _words(texts: list[str]) -> list[list[int]]:
    """One token for a word: its number, so that blocks can be read back."""
    return [[int(word) for word in text.split()] for text in texts]


def _numbers(n: int, per_document: int = 7) -> list[str]:
    return [" ".join(map(str, range(i, min(i + per_document, n)))) for i in range(0, n, per_document)]


def test_the_embedded_corpus_is_plain_english_in_a_stable_order() -> None:
    topics = pydoc_topics()
    assert topics == pydoc_topics()
    assert len(topics) > 60
    assert sum(len(topic.encode()) for topic in topics) > 300_000


def test_held_out_documents_are_disjoint_from_training_and_nothing_is_lost() -> None:
    topics = pydoc_topics()
    parts = split_documents(topics, FRACTIONS)
    assert set(parts) == {"search", "validation", "train"}
    sets = {name: set(part) for name, part in parts.items()}
    assert not sets["train"] & (sets["search"] | sets["validation"])
    assert not sets["search"] & sets["validation"]
    assert sorted(document for part in parts.values() for document in part) == sorted(topics)


def test_a_document_that_occurs_twice_goes_to_one_side() -> None:
    documents = [f"document {i}" for i in range(100)]
    parts = split_documents(documents + documents, FRACTIONS)
    assert all(part.count(document) == 2 for part in parts.values() for document in part)


def test_adding_or_reordering_documents_moves_no_other() -> None:
    documents = [f"document {i}" for i in range(200)]
    before = split_documents(documents, FRACTIONS)
    after = split_documents(["a new one", *documents[::-1]], FRACTIONS)
    assert {n: set(p) for n, p in before.items()} == {n: set(p) - {"a new one"} for n, p in after.items()}


def test_shares_are_about_what_was_asked_for_and_depend_on_the_seed() -> None:
    documents = [f"document {i}" for i in range(4000)]
    parts = split_documents(documents, {"search": 0.1, "validation": 0.3})
    for name, share in {"search": 0.1, "validation": 0.3, "train": 0.6}.items():
        assert abs(len(parts[name]) / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)
    assert split_documents(documents, {"search": 0.1, "validation": 0.3}, seed=1) != parts


@pytest.mark.parametrize("fractions", [{}, {"search": 0.0, "validation": 0.1}, {"search": 0.5, "validation": 0.5}])
def test_fractions_that_leave_nothing_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(CoaloraError, match="leave no text to train on, or hold none out"):
        split_documents(["a", "b"], fractions)


def test_a_part_without_documents_is_refused_by_name() -> None:
    with pytest.raises(CoaloraError, match="None of 3 documents fell to 'search'"):
        split_documents(["a", "b", "c"], {"search": 1e-9})


@pytest.mark.parametrize("end_of_text", [None, -7])
@pytest.mark.parametrize("length", [1, 5, 16])
def test_every_token_but_the_first_is_predicted_exactly_once_in_order(length: int, end_of_text: int | None) -> None:
    n = 150
    ids, _ = blocks(_numbers(n), _words, length, end_of_text=end_of_text)
    assert ids.shape[1] == length + 1
    stream = [
        t for document in _words(_numbers(n)) for t in [*document, *([] if end_of_text is None else [end_of_text])]
    ]
    predicted = ids[:, 1:].flatten().tolist()
    assert predicted == stream[1 : 1 + len(predicted)]
    assert len(stream) - 1 - len(predicted) < length  # only a tail that fills no block is dropped
    assert torch.equal(ids[1:, 0], ids[:-1, -1])  # each block starts at the last token of the one before


def test_blocks_own_their_memory() -> None:
    ids, _ = blocks(_numbers(40), _words, 4, end_of_text=None)
    ids[0, -1] = 999  # overlapping views would change the next block as well
    assert ids[1, 0] != 999


def test_a_limit_cuts_blocks_and_stops_reading() -> None:
    read = []

    def documents():
        for i in range(10_000):
            read.append(i)
            yield "1 2 3"

    ids, _ = blocks(documents(), _words, 4, end_of_text=None, limit=5)
    assert ids.shape == (5, 5)
    assert len(read) <= 128
    everything, _ = blocks(["1 2 3"] * 100, _words, 4, end_of_text=None)
    assert torch.equal(ids, everything[:5])


def test_a_limit_takes_blocks_at_equal_distances_of_what_is_at_hand() -> None:
    everything, _ = blocks(["1 2 3"] * 100, _words, 4, end_of_text=None)  # 74 blocks
    ids, _ = blocks(["1 2 3"] * 100, _words, 4, end_of_text=None, limit=3)
    assert torch.equal(ids, everything[[12, 37, 61]])
    encode = lambda texts: [[len(text)] * 3 for text in texts]  # noqa: E731
    ids, per_token = blocks(["a a a", "éé é é", "b b b"], encode, 2, end_of_text=None, limit=1)
    assert (ids.tolist(), per_token) == ([[6, 6, 5]], pytest.approx((2 * 10 / 3 + 5 / 3) / 3))
    assert torch.equal(blocks(["1 2 3"] * 100, _words, 4, end_of_text=None, limit=200)[0], everything)


def test_bytes_per_token_are_those_of_the_text_in_the_blocks() -> None:
    # Documents of one token a character: bytes are known for any cut.
    def encode(texts: list[str]) -> list[list[int]]:
        return [[ord(c) for c in text] for text in texts]

    documents = ["aaaa", "éé", "bbbbbbbb", "東京京"]
    _, per_token = blocks(documents, encode, 2, end_of_text=None)
    assert per_token == pytest.approx((4 + 4 + 8 + 9) / 17)  # 17 tokens: nothing is dropped
    _, per_token = blocks(iter(documents), encode, 2, end_of_text=None, limit=3)
    assert per_token == pytest.approx((4 + 4 + 1) / 7)  # 7 tokens: aaaa éé b
    _, per_token = blocks(documents, encode, 2, end_of_text=0)
    assert per_token == pytest.approx(25 / 21)  # ends of text are predicted but stand for no bytes
    _, per_token = blocks(iter(["a" * 9, "東" * 500]), encode, 8, end_of_text=None, limit=1)
    assert per_token == 1  # text behind the limit does not count


def test_too_little_text_is_refused() -> None:
    with pytest.raises(CoaloraError, match="4 tokens make no block of 5 tokens"):
        blocks(["1 2 3 4"], _words, 4, end_of_text=None)
    with pytest.raises(CoaloraError, match="0 tokens make no block"):
        blocks([], _words, 4, end_of_text=None)


def test_a_text_file_is_cut_at_blank_lines_without_losing_a_paragraph(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {i} " + "x" * 300 for i in range(40)]
    path = tmp_path / "a.txt"
    path.write_text("\ufeff" + "\r\n\r\n".join(paragraphs), encoding="utf-8", newline="")
    pieces = text_file(path)
    assert 4 < len(pieces) < 10
    assert [p for piece in pieces for p in piece.split("\n\n") if p] == paragraphs


def test_missing_and_undecodable_text_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CoaloraError, match=r"none\.txt does not exist"):
        text_file(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(CoaloraError, match=r"Byte 2 of .*latin\.txt is not UTF-8"):
        text_file(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"line {i} of one document" for i in range(500)),
        " ".join(f"word{i}" for i in range(2000)),
        "".join(chr(0x4E00 + i % 500) for i in range(5000)),
        " \n".join(["", " = Title = ", "", *(f" sentence {i} of WikiText . " for i in range(300)), "", ""]),
    ],
    ids=["lines", "words", "characters", "blank lines with blanks"],
)
def test_a_text_with_few_blank_lines_is_cut_finer_without_losing_a_character(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = text_file(tmp_path / "a.txt", least=64)
    assert "".join(pieces).strip() == text.strip()
    assert len(pieces) >= 60
    assert max(map(len, pieces)) < 2500


def test_blank_lines_may_hold_blanks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n".join(f"{'word ' * 100}{i} " for i in range(40)).replace(" \n", " \n \n"))
    assert len(text_file(tmp_path / "a.txt")) > 5
