"""Raw benchmark data: what settings name, read as texts or as labelled examples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coalora.data.classification import Examples, read_table, to_examples
from coalora.data.text import pydoc_topics, split_documents, text_file
from coalora.errors import CoaloraError
from tasks.settings import BenchmarkSettings, HubSettings


def documents(settings: BenchmarkSettings) -> dict[str, list[str]]:
    """Texts of `train`, `search` and `validation`; parts that have no file of their own are split off train."""
    if settings.hub is not None:
        return _hub_documents(settings, settings.hub)
    given: dict[str, list[str]] = {}
    if settings.files is not None:
        source = text_file(settings.files.train)
        for part in ("search", "validation"):
            path = getattr(settings.files, part)
            if path is not None:
                given[part] = text_file(path)
    else:
        source = pydoc_topics()
    fractions = {"search": settings.search_fraction, "validation": settings.validation_fraction}
    fractions = {part: share for part, share in fractions.items() if part not in given}
    parts = split_documents(source, fractions, seed=settings.split_seed) if fractions else {"train": source}
    return parts | given


def examples(settings: BenchmarkSettings) -> dict[str, Examples | None]:
    """Labelled examples of `train`, `validation`, and of `search` where it has a file of its own."""
    columns, label = settings.text_columns, settings.label_column
    if settings.hub is not None:
        hub = settings.hub
        return {
            "train": _hub_examples(hub, hub.train_split, columns, label),
            "validation": _hub_examples(hub, hub.validation_split, columns, label),
            "search": None,
        }
    files = settings.files
    if files is None or files.validation is None:  # settings have been validated: cannot happen
        raise CoaloraError("classification reads files or the hub", got=settings.name)
    return {
        "train": read_table(files.train, columns, label),
        "validation": read_table(files.validation, columns, label),
        "search": None if files.search is None else read_table(files.search, columns, label),
    }


def _hub_documents(settings: BenchmarkSettings, hub: HubSettings) -> dict[str, list[str]]:
    column = settings.text_columns[0]
    limits = {
        "train": settings.n_train,
        "search": settings.n_search,
        "validation": settings.n_validation,
    }
    if hub.streaming and None in (settings.n_train, settings.n_validation):
        raise CoaloraError(
            "a streamed corpus needs limits",
            got=f"n_train {settings.n_train}, n_validation {settings.n_validation}",
            remedy="set benchmark.n_train and benchmark.n_validation (blocks)",
        )
    # A streamed block takes one long document at most in the mean; short ones are joined, so read generously.
    train = _take(_rows(hub, hub.train_split), column, hub, limits["train"])
    validation = _take(_rows(hub, hub.validation_split), column, hub, limits["validation"])
    parts = split_documents(train, {"search": settings.search_fraction}, seed=settings.split_seed)
    return parts | {"validation": validation}


def _take(rows: Iterator[dict[str, Any]], column: str, hub: HubSettings, n_blocks: int | None) -> list[str]:
    texts: list[str] = []
    n_bytes = 0
    # 16 bytes a token is far above any tokenizer's mean, so that the wanted number of blocks is reached.
    wanted = None if not hub.streaming or n_blocks is None else n_blocks * 1024 * 16
    for row in rows:
        if column not in row:
            raise CoaloraError(
                "the data set must have the text column",
                got=column,
                expected=f"one of {sorted(row)}",
                remedy="set benchmark.text_columns",
            )
        texts.append(row[column])
        n_bytes += len(row[column].encode())
        if wanted is not None and n_bytes >= wanted:
            break
    return texts


def _hub_examples(hub: HubSettings, split: str, columns: list[str], label: str) -> Examples:
    texts: list[tuple[str, ...]] = []
    labels: list[Any] = []
    for row in _rows(hub, split):
        missing = [c for c in [*columns, label] if c not in row]
        if missing:
            raise CoaloraError(
                "the data set must have the named columns",
                got=f"no {', '.join(missing)}",
                expected=f"some of {sorted(row)}",
                remedy="set benchmark.text_columns and benchmark.label_column",
            )
        texts.append(tuple(row[c] for c in columns))
        labels.append(row[label])
    return to_examples(texts, labels, f"{hub.path} {split}")


def _rows(hub: HubSettings, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(hub.path, hub.name, revision=hub.revision, split=split, streaming=hub.streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CoaloraError(
            "the data set must be reachable on the hub",
            got=f"{hub.path} {hub.name or ''} {split}: {str(error).splitlines()[0]}",
            remedy="check benchmark.hub and the network, or use benchmark.files with local files",
        ) from error
    return iter(rows)


def input_files(settings: BenchmarkSettings) -> list[Path]:
    """The local files that the benchmark is read from."""
    if settings.files is None:
        return []
    files = settings.files
    return [Path(p) for p in (files.train, files.validation, files.search) if p is not None]
