"""Labelled tables: what is read is what is in the file, and what is wrong with a file is said."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from coalora.data.classification import FORMATS, Examples, read_table, read_texts, to_examples
from coalora.errors import CoaloraError

# Texts that readers like to turn into something else.
TEXTS = ["007", "NA", 'say "hi"', "a, b", "2020-01-01", "null", "1e5", "naïve 東京"]
LABELS = [0, 1, 0, 1, 1, 0, 2, 0]


def _write(path: Path, texts: list[str], labels: list, second: list[str] | None = None) -> Path:
    frame = pd.DataFrame({"sentence": texts, **({"other": second} if second else {}), "label": labels})
    suffix = path.suffix.lower()
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    elif suffix == ".tsv":
        rows = [frame.columns, *frame.itertuples(index=False)]
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")
    elif suffix == ".jsonl":
        rows = frame.to_dict("records")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        frame.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [*FORMATS, ".CSV"])
def test_every_format_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path / f"a{suffix}", TEXTS, LABELS)
    assert read_table(path, ["sentence"], "label") == Examples([(text,) for text in TEXTS], LABELS)
    assert read_texts(path, "sentence") == [text for (text,) in read_table(path, ["sentence"], "label").texts]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_column_of_numbers_stays_text(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path / f"a{suffix}", ["007", "1.50"], [0, 1])
    assert read_table(path, ["sentence"], "label").texts == [("007",), ("1.50",)]


def test_a_column_that_is_called_date_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"date": "2020-01-01", "modified": 1}\n', encoding="utf-8")
    assert read_table(tmp_path / "a.jsonl", ["date"], "modified") == Examples([("2020-01-01",)], [1])


@pytest.mark.parametrize("suffix", FORMATS)
def test_pairs_come_in_the_order_asked_for(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path / f"a{suffix}", ["a", "b"], [1, 0], second=["c", "d"])
    assert read_table(path, ["other", "sentence"], "label").texts == [("c", "a"), ("d", "b")]


def test_a_tsv_takes_quotes_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('sentence\tlabel\n"unbalanced\t1\n5" disk\t0\n', encoding="utf-8")
    assert read_table(path, ["sentence"], "label") == Examples([('"unbalanced',), ('5" disk',)], [1, 0])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path / f"a{suffix}", ["a", "b"], [0, 1])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_texts(path, "sentence") == [text for (text,) in read_table(path, ["sentence"], "label").texts]
    assert read_table(path, ["sentence"], "label").labels == [0, 1]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CoaloraError, match=r"There is no benchmark file .*none\.csv"):
        read_table(tmp_path / "none.csv", ["sentence"], "label")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("read", [lambda p: read_table(p, ["text"], "label"), lambda p: read_texts(p, "text")])
def test_a_missing_column_is_refused_with_those_that_there_are(tmp_path: Path, suffix: str, read) -> None:
    path = _write(tmp_path / f"a{suffix}", ["a"], [0])
    with pytest.raises(CoaloraError, match=rf"a\{suffix} has no column 'text', but .*'sentence', 'label'"):
        read(path)


@pytest.mark.parametrize("read", [lambda p: read_table(p, ["text"], "label"), lambda p: read_texts(p, "text")])
def test_an_unknown_ending_is_refused(tmp_path: Path, read) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(CoaloraError, match=r"ending of a\.xlsx is none of \.csv"):
        read(tmp_path / "a.xlsx")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("read", [lambda p: read_table(p, ["text"], "label"), lambda p: read_texts(p, "text")])
def test_a_file_that_is_not_what_its_ending_says_is_refused(tmp_path: Path, suffix: str, read) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b'\xff\xfe\x00"{')
    with pytest.raises(CoaloraError, match=rf"cannot be read as \{suffix} in UTF-8"):
        read(path)


@pytest.mark.parametrize(("line", "message"), [('{"sentence": "b"', "line 2: "), ("[1, 2]", "line 2 is no object")])
def test_a_broken_line_of_jsonl_is_refused_by_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"sentence": "a", "label": 0}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(CoaloraError, match=rf"a\.jsonl cannot be read as \.jsonl in UTF-8 \({message}"):
        read_table(path, ["sentence"], "label")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("hole", ["", "  "])
def test_an_empty_text_is_refused_with_its_row(tmp_path: Path, suffix: str, hole: str) -> None:
    path = _write(tmp_path / f"a{suffix}", ["a", hole, "c"], [0, 1, 1])
    with pytest.raises(CoaloraError, match=rf"Row 2 of a\{suffix} lacks a text"):
        read_table(path, ["sentence"], "label")


def test_an_empty_label_is_refused_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sentence,label\na,0\nb,1\nc,\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"sentence": "a", "label": 0}\n{"sentence": "b"}\n', encoding="utf-8")
    for name, row in {"a.csv": 3, "a.jsonl": 2}.items():
        with pytest.raises(CoaloraError, match=rf"Row {row} of {name} lacks a text or its label"):
            read_table(tmp_path / name, ["sentence"], "label")


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sentence,label\n", encoding="utf-8")
    with pytest.raises(CoaloraError, match=r"a\.csv has no rows"):
        read_table(tmp_path / "a.csv", ["sentence"], "label")


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (["positive", 0, 1], "positive"),
        ([0, 0.5, 1], "0.5"),
        ([0, 1, 2, 3, 4, 5, "6th"], "6th"),
        ([0, None], "None"),
        ([float("inf"), 0], "inf"),
        ([float("nan"), 0], "nan"),
    ],
)
def test_a_label_that_is_no_class_index_is_shown(labels: list, shown: str) -> None:
    with pytest.raises(CoaloraError, match=f"{shown} among the labels of here are no class indices"):
        to_examples([("x",)] * len(labels), labels, "here")


def test_a_split_without_labels_is_refused_with_the_reason() -> None:
    with pytest.raises(CoaloraError, match=r"-1 among the labels of test .*marks a split without labels"):
        to_examples([("x",)] * 2, [-1, -1], "test")


def test_whole_numbers_are_labels_however_they_are_written() -> None:
    assert to_examples([("x",)] * 4, [1.0, "2", True, "0.0"], "here").labels == [1, 2, 1, 0]


@pytest.mark.parametrize("suffix", FORMATS)
def test_labels_of_a_regression_are_values(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path / f"a{suffix}", ["a", "b", "c"], [2.5, -1, 0])
    assert read_table(path, ["sentence"], "label", regression=True).labels == [2.5, -1.0, 0.0]


@pytest.mark.parametrize(("label", "shown"), [("high", "high"), (None, "None"), (float("inf"), "inf")])
def test_a_value_that_is_no_finite_number_is_shown(label: object, shown: str) -> None:
    with pytest.raises(CoaloraError, match=f"{shown} among the labels of here are no finite numbers"):
        to_examples([("x",)] * 2, [label, 0.5], "here", regression=True)
