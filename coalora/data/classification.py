"""Examples of classification and regression: sentences, or pairs of them, with a label, from local tables."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coalora.errors import CoaloraError

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
_ENCODING = "utf-8-sig"  # spreadsheets put a byte-order mark in front, which must not become part of a name


@dataclass(frozen=True)
class Examples:
    """Texts (one or two columns) and their class indices, or their values for a regression."""

    texts: list[tuple[str, ...]]
    labels: list[int] | list[float]


def read_table(
    path: str | Path, text_columns: Sequence[str], label_column: str, *, regression: bool = False
) -> Examples:
    """Examples of a csv, tsv (no quoting), jsonl or parquet file.

    Raises:
        CoaloraError: missing file, unknown format, a file that cannot be parsed, missing column, missing value,
            or labels that are no integers (no finite numbers for a regression).
    """
    wanted = [*text_columns, label_column]
    texts: list[tuple[str, ...]] = []
    labels: list[object] = []
    for line, row in _rows(Path(path), wanted):
        *cells, label = (row[name] for name in wanted)
        for name, cell in zip(text_columns, cells, strict=True):
            _check_text(cell, name, line, path)
        if label is None or (isinstance(label, str) and not label.strip()):
            raise _lacking(line, path)
        texts.append(tuple(map(str, cells)))
        labels.append(label)
    return to_examples(texts, labels, Path(path).name, regression=regression)


def read_texts(path: str | Path, column: str) -> list[str]:
    """One text column of a csv, tsv, jsonl or parquet file, each row a document; rows without text are left out.

    Raises:
        CoaloraError: as `read_table`.
    """
    found = []
    for line, row in _rows(Path(path), [column]):
        if row[column] not in (None, ""):
            _check_text(row[column], column, line, path)
            found.append(str(row[column]))
    return [text for text in found if text.strip()]


def _check_text(cell: object, column: str, line: int, path: str | Path) -> None:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise _lacking(line, path)
    if not isinstance(cell, str) or "\0" in cell:
        held = type(cell).__name__ if not isinstance(cell, str) else "NUL character"
        raise CoaloraError(
            f"Row {line} of {Path(path).name} holds a {held} in column {column!r}, and no text",
            remedy="Convert it to texts, or name another column in benchmark.text_columns",
        )


def _lacking(line: int, path: str | Path) -> CoaloraError:
    return CoaloraError(
        f"Row {line} of {Path(path).name} lacks a text or its label", remedy="Remove or complete the row"
    )


def to_examples(texts: list[tuple[str, ...]], labels: list, where: str, *, regression: bool = False) -> Examples:
    """Check that labels are class indices (finite numbers for a regression), and join them with their texts."""
    if not texts:
        raise CoaloraError(f"{where} has no rows", remedy="Give at least one example")
    if len(labels) != len(texts):
        raise CoaloraError(f"{where} has {len(texts)} texts and {len(labels)} labels", remedy="Give one for each")
    values: Sequence[float | None] = [_label(x, regression) for x in labels]
    wrong = sorted({str(x) for x, value in zip(labels, values, strict=True) if value is None})
    if wrong:
        shown = f"{', '.join(wrong[:4])}{', ...' if len(wrong) > 4 else ''} among the labels of {where}"
        if regression:
            raise CoaloraError(f"{shown} are no finite numbers", remedy="Correct them, or set num_labels to classify")
        raise CoaloraError(
            f"{shown} are no class indices, which are integers from 0 on (-1 marks a split without labels)",
            remedy="Use a labelled split, map the classes to integers, or set num_labels to 1 for a regression",
        )
    return Examples(texts, [value for value in values if value is not None])


def check_classes(examples: Examples, num_labels: int, where: str) -> None:
    """Refuse a class that a model of `num_labels` classes does not have; 1 is a regression, where any value goes.

    Raises:
        CoaloraError: there is one.
    """
    if num_labels > 1 and max(examples.labels) >= num_labels:
        raise CoaloraError(
            f"{where} has the label {max(examples.labels)}, and the model {num_labels} classes from 0 on",
            remedy="Set num_labels to the number of classes",
        )


def _label(label: object, regression: bool) -> float | int | None:
    """A label as a finite number, or as an integer from 0; else None. Columns with a text have texts for numbers."""
    try:
        value = float(label)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    if isinstance(label, str) and "_" in label:  # digits to Python, and to nobody else
        return None
    if regression:
        return value if math.isfinite(value) else None
    return int(value) if value >= 0 and value.is_integer() else None


def _rows(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, object]]]:
    """(number from 1, cells by column) of every row; cells are texts but in jsonl and parquet.

    Nothing is guessed: a row that is longer or shorter than the header, a column that is there twice, and whatever
    cannot be parsed, is refused.
    """
    if not path.is_file():
        raise CoaloraError(f"There is no benchmark file {path}", remedy="Correct the path in benchmark.files")
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise CoaloraError(
            f"The ending of {path.name} is none of {', '.join(FORMATS)}, which tell the format",
            remedy="Rename or convert it",
        )
    try:
        yield from {".parquet": _parquet, ".jsonl": _jsonl}.get(suffix, _delimited)(path, wanted)
    except CoaloraError:
        raise
    except (ValueError, csv.Error, OSError, RecursionError) as error:  # pyarrow's errors derive from the first
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CoaloraError(
            f"{path.name} cannot be read as {suffix} in UTF-8 ({reason})", remedy="Repair, rename or convert it"
        ) from error


def _delimited(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, object]]]:
    tabs = path.suffix.lower() == ".tsv"
    csv.field_size_limit(2**31 - 1)  # texts may be long
    with path.open(encoding=_ENCODING, newline="") as file:
        reader = csv.reader(
            file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL, strict=True
        )
        header = next(reader, [])
        _check_columns(path, header, wanted)
        for number, cells in enumerate(filter(None, reader), 1):
            if len(cells) != len(header):
                raise CoaloraError(
                    f"Row {number} of {path.name} (line {reader.line_num}) has {len(cells)} cells, and the header "
                    f"{len(header)}",
                    remedy="Quote texts that hold a comma, or complete the row" if not tabs else "Complete the row",
                )
            yield number, dict(zip(header, cells, strict=True))


def _jsonl(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(encoding=_ENCODING) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_distinct)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            if number > 1 and not set(wanted) <= set(row):
                raise _lacking(number, path)
            _check_columns(path, list(row), wanted)
            yield number, row


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key is given twice")
    return row


def _parquet(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, object]]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        _check_columns(path, file.schema_arrow.names, wanted)
        number = 0
        for batch in file.iter_batches(columns=list(wanted)):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _check_columns(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := [c for c in wanted if c not in columns]:
        shown = ", ".join(map(repr, columns))[:300]
        raise CoaloraError(
            f"{path.name} has no column {', '.join(map(repr, missing))}, but {shown or 'none'}",
            remedy="Set benchmark.text_columns and benchmark.label_column",
        )
    if twice := [c for c in wanted if list(columns).count(c) > 1]:
        raise CoaloraError(f"{path.name} has the column {twice[0]!r} twice", remedy="Rename one of them")
