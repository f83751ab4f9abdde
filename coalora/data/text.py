"""Text for causal language modelling: documents in, fixed-length blocks out.

A block holds L + 1 tokens and the next block starts at its last token, so that every token but the very first is
predicted exactly once and perplexity does not depend on where blocks end. The tail that fills no block is dropped.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from coalora.data.benchmark import spread
from coalora.errors import CoaloraError


def pydoc_topics() -> list[str]:
    """The help texts that every CPython carries: about 80 topics, 465 kB of English, no download."""
    from pydoc_data.topics import topics

    return [topics[key] for key in sorted(topics)]


def read_text(path: str | Path) -> str:
    """A UTF-8 text file as it is, but for a byte-order mark.

    Raises:
        CoaloraError: no such file, or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise CoaloraError(f"The text file {path} does not exist", remedy="Correct the path")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CoaloraError(
            f"Byte {error.start} of {path} is not UTF-8", remedy="Convert it, for example with iconv -t utf-8"
        ) from error


def text_file(path: str | Path, least: int = 1) -> list[str]:
    """The documents of a UTF-8 text file: cut at blank lines, which may hold blanks, into pieces of about 2 kB.

    Args:
        least: where blank lines make fewer pieces, line ends or else blanks cut the text, so that there is something
            to deal out.

    Raises:
        CoaloraError: no such file, or not UTF-8.
    """
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    pieces = _pieces(text, r"\n[^\S\n]*\n", 2048, end="\n\n")
    for ends in (r"\n", r"\s", r""):
        if len(pieces) >= least:
            break
        pieces = _pieces(text, ends, min(2048, len(text) // (2 * least)))
    return pieces


def _pieces(text: str, ends: str, size: int, end: str = "") -> list[str]:
    """Pieces of at least `size` characters that end where `ends` matches; the last one with `end`."""
    pieces: list[str] = [""]
    parts = re.split(f"({ends})", text)
    for part, separator in zip(parts[::2], [*parts[1::2], end], strict=True):
        if len(pieces[-1]) > size:
            pieces.append("")
        pieces[-1] += part + separator
    return [piece for piece in pieces if piece.strip()]


def split_documents(documents: Sequence[str], fractions: dict[str, float], *, seed: int = 0) -> dict[str, list[str]]:
    """Deal documents into named parts; each document's own content decides, so that adding one moves no other.

    `fractions` are shares of the whole and sum to less than 1; what remains goes to `train`.
    """
    if not 0 < sum(fractions.values()) < 1 or min(fractions.values()) <= 0:
        raise CoaloraError(
            f"The held-out fractions {fractions} leave no text to train on, or hold none out",
            remedy="Give positive numbers with a sum below 1",
        )
    parts: dict[str, list[str]] = {name: [] for name in [*fractions, "train"]}
    for document in documents:
        word = hashlib.sha256(f"{seed}:{document}".encode()).digest()[:8]
        u = int.from_bytes(word, "big") / 2**64
        for name, fraction in fractions.items():
            if u < fraction:
                parts[name].append(document)
                break
            u -= fraction
        else:
            parts["train"].append(document)
    for name, part in parts.items():
        if not part:
            raise CoaloraError(
                f"None of {len(documents)} documents fell to {name!r}",
                remedy="Give a separate file for it, or a larger fraction",
            )
    return parts


def blocks(
    documents: Iterable[str],
    encode: Callable[[list[str]], list[list[int]]],
    length: int,
    *,
    end_of_text: int | None,
    limit: int | None = None,
) -> tuple[Tensor, float]:
    """Token blocks (n, length + 1) int64 of joined documents, and UTF-8 bytes for each of their tokens.

    Bytes are those of the text that the blocks hold: a document that is cut counts by its share of tokens.

    Args:
        encode: tokenizes a list of texts without special tokens.
        end_of_text: id put behind every document (counted as no bytes), None for none.
        limit: at most so many blocks: of a sequence at equal distances, of an iterator the first, and documents behind
            them are not read (but for the rest of a batch of 64).

    Raises:
        CoaloraError: not enough text for one block.
    """
    tokens: list[int] = []
    n_bytes: list[float] = []  # of each token: a document's bytes are spread over its own
    stops = None if isinstance(documents, Sequence) else limit
    for batch in _batches(documents, 1 if stops else 64):
        for text, ids in zip(batch, encode(batch), strict=True):
            own = [*ids, end_of_text] if end_of_text is not None else ids
            tokens += own
            n_bytes += [len(text.encode()) / max(1, len(own))] * len(own)
        if stops is not None and len(tokens) > stops * length:
            break
    n = (len(tokens) - 1) // length
    if n < 1:
        raise CoaloraError(
            f"{len(tokens)} tokens make no block of {length + 1} tokens",
            remedy="Shorten max_length, or give more text",
        )
    taken = spread(n, limit) if stops is None else torch.arange(min(n, stops))
    held = (taken[:, None] * length + torch.arange(length + 1)).unique()
    joined = torch.tensor(tokens[: n * length + 1], dtype=torch.int64)
    per_token = float(torch.tensor(n_bytes, dtype=torch.float64)[held].mean())
    return joined.unfold(0, length + 1, length)[taken].clone(), per_token


def _batches(documents: Iterable[str], first: int) -> Iterator[list[str]]:
    """Batches of twice as many documents as the one before, up to 64: who stops early encodes little in vain."""
    rest, size = iter(documents), first
    while batch := list(itertools.islice(rest, size)):
        yield batch
        size = min(2 * size, 64)
