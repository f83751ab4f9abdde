"""Raw benchmark data: what settings name, read as texts or as labelled examples."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from coalora.data.classification import FORMATS, Examples, check_classes, read_table, read_texts, to_examples
from coalora.data.text import pydoc_topics, split_documents, text_file
from coalora.errors import CoaloraError
from pipeline.inputs.fingerprint import input_files
from pipeline.progress import get_logger
from pipeline.settings.sections import BenchmarkSettings, HubSettings

# Far above any tokenizer's mean, so that a stream that is cut by bytes fills the blocks that are wanted.
_BYTES_A_TOKEN = 16
_LEAST = 32  # documents of which parts are split off


def documents(settings: BenchmarkSettings) -> dict[str, list[str]]:
    """Texts of `train`, `search` and `validation`; parts that have no file of their own are split off train.

    What local files hold is read once: the checks before a run and its stages share it (`forget`).
    """
    if settings.hub is not None:
        return _hub_documents(settings, settings.hub)
    return _local_documents(*content_key(settings))


def examples(settings: BenchmarkSettings) -> tuple[Examples, Examples, Examples | None]:
    """Labelled examples of train, validation, and search where it has a file of its own; as `documents`."""
    if settings.hub is not None:
        hub, columns, label = settings.hub, settings.text_columns, settings.label_column
        train, validation = (
            _hub_examples(hub, split, columns, label, regression=settings.num_labels == 1)
            for split in (hub.train_split, hub.validation_split)
        )
        return train, validation, None
    return _local_examples(*content_key(settings))


def forget() -> None:
    """Free the texts that `documents` and `examples` keep."""
    _local_documents.cache_clear()
    _local_examples.cache_clear()


def content_key(settings: BenchmarkSettings) -> tuple[str, tuple[tuple[str, int, int], ...]]:
    """What decides the texts of local files, as arguments of a cached function."""
    return settings.data_only().model_dump_json(), _stamps(settings)


def _stamps(settings: BenchmarkSettings) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of the benchmark's files: another content is read again."""
    found = [(path.resolve(), path.stat()) for path in input_files(settings) if path.is_file()]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found)


@lru_cache(maxsize=1)
def _local_documents(benchmark: str, stamps: object) -> dict[str, list[str]]:
    settings = BenchmarkSettings.model_validate_json(benchmark)
    given: dict[str, list[str]] = {}
    if settings.files is not None:
        alone = settings.files.search is not None and settings.files.validation is not None
        source = _documents_of(settings.files.train, settings, least=1 if alone else _LEAST)
        for part in ("search", "validation"):
            path = getattr(settings.files, part)
            if path is not None:
                given[part] = _documents_of(path, settings)
    else:
        source = pydoc_topics()
    fractions = {"search": settings.search_fraction, "validation": settings.validation_fraction}
    fractions = {part: share for part, share in fractions.items() if part not in given}
    parts = split_documents(source, fractions, seed=settings.split_seed) if fractions else {"train": source}
    return parts | given


def _documents_of(path: str, settings: BenchmarkSettings, least: int = 1) -> list[str]:
    """Plain text, or the text column of a table, by the file's ending."""
    if Path(path).suffix.lower() in FORMATS:
        return read_texts(path, settings.text_columns[0])
    return text_file(path, least)


@lru_cache(maxsize=1)
def _local_examples(benchmark: str, stamps: object) -> tuple[Examples, Examples, Examples | None]:
    settings = BenchmarkSettings.model_validate_json(benchmark)

    def read(file: str | None) -> Examples:
        regression = settings.num_labels == 1
        return read_table(str(file), settings.text_columns, settings.label_column, regression=regression)

    files = settings.files
    assert files is not None  # checked with the settings, as is its validation file
    return read(files.train), read(files.validation), None if files.search is None else read(files.search)


def _hub_documents(settings: BenchmarkSettings, hub: HubSettings) -> dict[str, list[str]]:
    column, share = settings.text_columns[0], settings.search_fraction
    train_bytes = validation_bytes = None
    if hub.streaming and settings.n_train is not None and settings.n_validation is not None:
        train_bytes = _train_bytes(settings, settings.n_train, settings.n_search)
        validation_bytes = settings.max_length * _BYTES_A_TOKEN * settings.n_validation
    train = _take(_rows(hub, hub.train_split), column, train_bytes)
    parts = split_documents(train, {"search": share}, seed=settings.split_seed)
    return parts | {"validation": _take(_rows(hub, hub.validation_split), column, validation_bytes)}


def _train_bytes(settings: BenchmarkSettings, n_train: int, n_search: int) -> float:
    """Bytes of a training split that make so many blocks: the search's documents are split off, and both get theirs."""
    share = settings.search_fraction
    return settings.max_length * _BYTES_A_TOKEN * max(n_train / (1 - share), n_search / share)


def _take(rows: Iterator[dict[str, Any]], column: str, n_bytes: float | None) -> list[str]:
    """Texts until there are `n_bytes` of them; all for None."""
    texts: list[str] = []
    taken = 0
    for row in rows:
        _check_row(row, [column], [column])
        texts.append(row[column])
        taken += len(row[column].encode())
        if n_bytes is not None and taken >= n_bytes:
            break
    return texts


def _hub_examples(hub: HubSettings, split: str, columns: list[str], label: str, *, regression: bool) -> Examples:
    texts: list[tuple[str, ...]] = []
    labels: list[Any] = []
    for row in _rows(hub, split):
        _check_row(row, [*columns, label], columns)
        texts.append(tuple(row[c] for c in columns))
        labels.append(row[label])
    return to_examples(texts, labels, f"{hub.path} {split}", regression=regression)


def _check_row(row: dict[str, Any], wanted: list[str], texts: list[str]) -> None:
    if missing := [c for c in wanted if c not in row]:
        raise CoaloraError(
            f"The data set has no column {', '.join(missing)}",
            remedy=f"Set benchmark.text_columns and benchmark.label_column to some of {', '.join(sorted(row))}",
        )
    for column in texts:
        if not isinstance(row[column], str):
            usable = ", ".join(sorted(c for c, v in row.items() if isinstance(v, str)))
            raise CoaloraError(
                f"Column {column!r} holds no texts, but {row[column]!r}",
                remedy=f"Set benchmark.text_columns to some of {usable}",
            )


def _rows(hub: HubSettings, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a split. A stream is read as it is consumed, so that the network can fail at any row."""
    import datasets

    try:
        yield from datasets.load_dataset(
            hub.path, hub.name, revision=hub.revision, split=split, streaming=hub.streaming
        )
    except Exception as error:  # of any kind: among them those of whatever HTTP library the hub's client uses
        raise _unreadable(hub, split, error) from error


def _unreadable(hub: HubSettings, split: str, error: Exception) -> CoaloraError:
    what = " ".join(word for word in (hub.path, hub.name, split) if word)
    return CoaloraError(
        f"Data set {what} cannot be read from the hub: {_reason(error)}",
        remedy="Check benchmark.hub and the network, or use benchmark.files with local files",
    )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class HubSplit:
    """What the hub tells of a split before it is read."""

    n_rows: int | None = None  # None where it tells none
    texts: list[str] | None = None  # of language modelling, where they are all and fewer than the blocks may need


def look_at_hub(settings: BenchmarkSettings, n_samples: int) -> dict[str, HubSplit]:
    """The hub's training and validation split, of which `n_samples` blocks and one are needed, after a look at each.

    A hub that does not answer is told and refuses nothing: what is cached needs none.

    Raises:
        CoaloraError: no such data set, configuration, split or column; no texts, or labels that are no classes.
    """
    return _looked_at(settings.data_only().model_dump_json(), n_samples)


@lru_cache(maxsize=1)  # a run is checked twice
def _looked_at(benchmark: str, n_samples: int) -> dict[str, HubSplit]:
    settings = BenchmarkSettings.model_validate_json(benchmark)
    hub = settings.hub
    assert hub is not None
    found: dict[str, HubSplit] = {}
    for part, split in {"train": hub.train_split, "validation": hub.validation_split}.items():
        n_bytes = _train_bytes(settings, n_samples, 1) if part == "train" else settings.max_length * _BYTES_A_TOKEN
        try:
            found[part] = _look(settings, hub, split, n_bytes)
        except CoaloraError:
            raise
        except (ValueError, FileNotFoundError) as error:  # `datasets` says by them what there is not
            raise _unreadable(hub, split, error) from error
        except Exception as error:  # no answer, or nothing that can be streamed
            get_logger().warning(
                "Columns and size of data set %s are seen when it is read: the hub does not tell them now (%s)",
                hub.path, _reason(error),
            )  # fmt: skip
            return dict.fromkeys(("train", "validation"), HubSplit())
    return found


def _look(settings: BenchmarkSettings, hub: HubSettings, split: str, n_bytes: float) -> HubSplit:
    """A split, which may be a sum of slices where it is not streamed, after a look at its first rows."""
    import datasets

    labels = [settings.label_column] if settings.task == "classification" else []
    names = [split] if hub.streaming else [part.partition("[")[0].strip() for part in split.split("+")]
    texts: list[str] | None = None
    for name in names:
        data = datasets.load_dataset(hub.path, hub.name, revision=hub.revision, split=name, streaming=True)
        rows = iter(data)
        row: dict[str, Any] | None = next(rows, None)
        if row is None:
            raise CoaloraError(
                f"Split {name} of data set {hub.path} has no rows", remedy="Set benchmark.hub to another"
            )
        _check_row(row, [*settings.text_columns, *labels], settings.text_columns)
        for label in labels:
            where = f"{hub.path} {name}"
            seen = to_examples([()], [row[label]], where, regression=settings.num_labels == 1)
            classes = getattr((data.features or {}).get(label), "num_classes", 0)
            check_classes(Examples([], [*seen.labels, classes - 1]), settings.num_labels, where)
        if not labels and names == [split]:
            texts = _take(chain([row], rows), settings.text_columns[0], n_bytes)
    told = (data.info.splits or {}).get(split)
    whole = texts is not None and sum(len(text.encode()) for text in texts) < n_bytes
    return HubSplit(None if told is None else told.num_examples or None, texts if whole else None)
