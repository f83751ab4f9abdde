"""Examples of classification and regression: sentences, or pairs of them, with a label, from local tables."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from coalora.errors import CoaloraError

if TYPE_CHECKING:
    import pandas as pd

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
    path = Path(path)
    if not path.is_file():
        raise CoaloraError(f"The benchmark file {path} does not exist", remedy="Correct the path in benchmark.files")
    frame = _frame(path, text_columns)
    wanted = [*text_columns, label_column]
    _check_columns(path, list(frame.columns), wanted)
    cells = frame[wanted]
    holes = (cells.isna() | (cells.astype(str).apply(lambda column: column.str.strip()) == "")).any(axis=1)
    if holes.any():
        raise CoaloraError(
            f"Row {int(holes.argmax()) + 1} of {path.name} lacks a text or its label",
            remedy="Remove or complete the row",
        )
    return to_examples(
        [tuple(map(str, row)) for row in zip(*(frame[c] for c in text_columns), strict=True)],
        frame[label_column].tolist(),
        path.name,
        regression=regression,
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
    except (TypeError, ValueError):
        return None
    if regression:
        return value if math.isfinite(value) else None
    return int(value) if value >= 0 and value.is_integer() else None


def read_header(path: Path, wanted: Sequence[str]) -> None:
    """Check that a table has the columns, without reading it whole.

    Raises:
        CoaloraError: a column is missing, the format is unknown, or the file cannot be read as it.
    """
    _check_columns(path, list(_frame(path, [], header=True).columns), wanted)


def _check_columns(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [c for c in wanted if c not in columns]
    if missing:
        raise CoaloraError(
            f"{path.name} has no column {', '.join(map(repr, missing))}, but {', '.join(map(repr, columns))}",
            remedy="Set benchmark.text_columns and benchmark.label_column",
        )


def _row(number: int, line: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no object")
    return row


def _frame(path: Path, text_columns: Sequence[str], *, header: bool = False) -> pd.DataFrame:
    """The table; for its `header`, columns and at most one row."""
    import pandas as pd

    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise CoaloraError(
            f"The ending of {path.name} is none of {', '.join(FORMATS)}, which tell the format",
            remedy="Rename or convert it",
        )
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_schema(path).empty_table().to_pandas() if header else pd.read_parquet(path)
        if suffix == ".jsonl":
            with path.open(encoding=_ENCODING) as file:
                lines = ((n, line) for n, line in enumerate(file, 1) if line.strip())
                return pd.DataFrame([_row(n, line) for n, line in islice(lines, 1 if header else None)], dtype=object)
        # Texts stay texts: no guessing of numbers ("007"), missing values ("NA") or dates.
        return pd.read_csv(
            path,
            sep="\t" if suffix == ".tsv" else ",",
            quoting=csv.QUOTE_NONE if suffix == ".tsv" else csv.QUOTE_MINIMAL,
            keep_default_na=False,
            dtype=dict.fromkeys(text_columns, str),
            encoding=_ENCODING,
            nrows=0 if header else None,
        )
    except ValueError as error:  # pandas' and pyarrow's parser errors derive from it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CoaloraError(
            f"{path.name} cannot be read as {suffix} in UTF-8 ({reason})", remedy="Repair, rename or convert it"
        ) from error
