"""Raw data is read from where the settings say, split without overlap, and refused in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from coalora.data.classification import Examples
from coalora.errors import CoaloraError
from pipeline.inputs.corpus import HubSplit, _looked_at, documents, examples, look_at_hub
from pipeline.inputs.fingerprint import input_files
from pipeline.settings.sections import BenchmarkSettings

Rows = list[dict[str, Any]]
Stub = Callable[[dict[str, Rows]], list[dict[str, Any]]]


def text(**fields: Any) -> BenchmarkSettings:
    return BenchmarkSettings.model_validate({"name": "b", "task": "language-modeling", **fields})


def classes(**fields: Any) -> BenchmarkSettings:
    return BenchmarkSettings.model_validate({"name": "b", "task": "classification", **fields})


class Stream:
    """Counts the rows that were taken."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.taken = rows, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            self.taken += 1
            if isinstance(row, Exception):
                raise row
            yield row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[dict[str, Any]], dict[str, Stream]]]:
    """`hub(train=[...], validation=[...])`: the rows that the hub serves; returns the calls and the streams."""

    def make(**splits: Any) -> tuple[list[dict[str, Any]], dict[str, Stream]]:
        calls: list[dict[str, Any]] = []
        streams = {name: Stream(rows) for name, rows in splits.items() if not isinstance(rows, Exception)}

        def load_dataset(path: str, name: str | None = None, **options: Any) -> Stream:
            calls.append({"path": path, "name": name, **options})
            if isinstance(splits[options["split"]], Exception):
                raise splits[options["split"]]
            return streams[options["split"]]

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        return calls, streams

    return make


def write_corpus(path: Path, first: int, n: int) -> str:
    path.write_text("\n\n".join(f"document {i} " + "word " * 500 for i in range(first, first + n)))
    return str(path)


def test_builtin_text_is_split_in_three_without_overlap() -> None:
    parts = documents(text(builtin="pydoc-topics", search_fraction=0.2, validation_fraction=0.2))
    assert set(parts) == {"train", "search", "validation"}
    # By content: some topics have one text, and equal texts stay together.
    distinct = [set(part) for part in parts.values()]
    assert sum(map(len, distinct)) == len(set.union(*distinct)) > 50
    assert len(parts["train"]) > len(parts["search"])


def test_another_split_seed_deals_other_documents() -> None:
    first, second = (documents(text(builtin="pydoc-topics", search_fraction=0.3, split_seed=s)) for s in (0, 1))
    assert first != second
    assert documents(text(builtin="pydoc-topics", search_fraction=0.3)) == first


def test_files_of_their_own_are_not_split_off(tmp_path: Path) -> None:
    train = write_corpus(tmp_path / "train.txt", 0, 40)
    files = {"train": train, "validation": write_corpus(tmp_path / "validation.txt", 100, 3)}
    parts = documents(text(files=files, search_fraction=0.3))
    assert len(parts["validation"]) == 3
    assert len(parts["train"]) + len(parts["search"]) == 40
    assert parts["search"]
    files["search"] = write_corpus(tmp_path / "search.txt", 200, 2)
    parts = documents(text(files=files))
    assert [len(parts[p]) for p in ("train", "search", "validation")] == [40, 2, 3]


def test_a_missing_text_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CoaloraError, match=r"The text file .* does not exist") as caught:
        documents(text(files={"train": str(tmp_path / "none.txt")}))
    assert "none.txt" in str(caught.value)


def test_examples_come_from_files_with_the_named_columns(tmp_path: Path) -> None:
    for part, label in (("train", 0), ("validation", 1)):
        (tmp_path / f"{part}.csv").write_text(f"premise,hypothesis,y\na,b,{label}\n")
    files = {part: str(tmp_path / f"{part}.csv") for part in ("train", "validation")}
    settings = classes(files=files, text_columns=["premise", "hypothesis"], label_column="y")
    train, validation, search = examples(settings)
    assert train.texts == [("a", "b")]
    assert (train.labels, validation.labels, search) == ([0], [1], None)
    with_search = settings.model_copy(
        update={"files": settings.files.model_copy(update={"search": files["train"]})}  # type: ignore[union-attr]
    )
    assert examples(with_search)[2] == train


def test_hub_is_asked_for_path_name_revision_and_splits(hub: Callable[..., Any]) -> None:
    calls, _ = hub(train=[{"s": "x", "label": 1}], dev=[{"s": "y", "label": 0}])
    source = {"path": "nyu-mll/glue", "name": "sst2", "revision": "abc", "validation_split": "dev"}
    parts = examples(classes(hub=source, text_columns=["s"]))
    expected = {"path": "nyu-mll/glue", "name": "sst2", "revision": "abc", "streaming": False}
    assert calls == [{**expected, "split": "train"}, {**expected, "split": "dev"}]
    assert parts == (Examples([("x",)], [1]), Examples([("y",)], [0]), None)


def test_hub_without_streaming_is_read_whole(hub: Callable[..., Any]) -> None:
    rows = [{"text": f"text {i} " + "word " * 200} for i in range(50)]
    _, streams = hub(train=rows, validation=rows[:7])
    parts = documents(text(hub={"path": "p"}, n_train=1, n_validation=1, search_fraction=0.3))
    assert len(parts["train"]) + len(parts["search"]) == 50
    assert len(parts["validation"]) == 7
    assert streams["train"].taken == 50


@pytest.mark.parametrize(("max_length", "n_train"), [(8, 4), (64, 4), (8, 32)])
def test_a_stream_is_read_as_far_as_its_blocks_need(hub: Callable[..., Any], max_length: int, n_train: int) -> None:
    size = 100
    rows = [{"text": f"{i:09d} " + "w" * (size - 10)} for i in range(100_000)]
    _, streams = hub(train=rows, validation=rows)
    settings = text(
        hub={"path": "p", "streaming": True}, n_train=n_train, n_validation=2, n_search=3,
        max_length=max_length, search_fraction=0.25,
    )  # fmt: skip
    parts = documents(settings)
    # Enough for one byte a token and for 12; never the whole corpus.
    for part, n_blocks in (("train", n_train), ("search", 3), ("validation", 2)):
        assert sum(map(len, parts[part])) >= n_blocks * max_length * 10 * 0.5, part
    blocks = max(n_train / 0.75, 3 / 0.25)
    assert streams["train"].taken == pytest.approx(blocks * max_length * 16 / size, abs=1)
    assert streams["validation"].taken == pytest.approx(2 * max_length * 16 / size, abs=1)


def test_a_missing_text_column_is_named_with_those_that_are_there(hub: Callable[..., Any]) -> None:
    hub(train=[{"body": "x", "url": "u"}], validation=[])
    with pytest.raises(CoaloraError, match=r"no column text\. Set benchmark\.text_columns .*some of body, url"):
        documents(text(hub={"path": "p"}))


def test_a_missing_label_column_is_named(hub: Callable[..., Any]) -> None:
    hub(train=[{"text": "x", "y": 1}], validation=[])
    with pytest.raises(CoaloraError, match=r"no column label.*some of text, y"):
        examples(classes(hub={"path": "p"}))


@pytest.mark.parametrize("value", [None, 3, ["a"]])
def test_a_column_without_texts_is_refused(hub: Callable[..., Any], value: object) -> None:
    hub(train=[{"text": value, "body": "x", "label": 0}], validation=[])
    for read in (lambda: documents(text(hub={"path": "p"})), lambda: examples(classes(hub={"path": "p"}))):
        with pytest.raises(CoaloraError, match=r"Column .text. holds no texts, but .*some of body"):
            read()


def test_a_split_without_labels_is_refused(hub: Callable[..., Any]) -> None:
    hub(train=[{"text": "x", "label": 0}], validation=[{"text": "x", "label": -1}])
    with pytest.raises(CoaloraError, match="-1 among the labels of glue validation"):
        examples(classes(hub={"path": "glue"}))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'p' on the Hub\nmore"),
        ValueError("Unknown split \"valid\". Should be one of ['train']."),
        FileNotFoundError("Dataset 'p' doesn't exist"),
        OSError(),
    ],
)
def test_an_unreachable_hub_is_bad_input_with_a_way_out(hub: Callable[..., Any], error: Exception) -> None:
    hub(train=error)
    with pytest.raises(CoaloraError, match="cannot be read from the hub") as caught:
        documents(text(hub={"path": "p", "name": "en"}))
    assert "Data set p en train" in str(caught.value)
    assert (str(error).splitlines() or ["OSError"])[0] in str(caught.value)
    assert "benchmark.files" in str(caught.value.remedy)


def test_a_stream_that_breaks_off_is_reported_the_same_way(hub: Callable[..., Any]) -> None:
    hub(train=[{"text": "x"}, ConnectionError("reset by peer")], validation=[])
    with pytest.raises(CoaloraError, match="reset by peer"):
        documents(text(hub={"path": "p", "streaming": True}, n_train=10, n_validation=10))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of `datasets` in a folder, with its card: what the hub serves, without a network."""
    (tmp_path / "own").mkdir()
    for part, n in (("train", 9), ("validation", 4), ("test", 0)):
        rows = "".join(f"words {i},{i % 3},{i}\n" for i in range(n))
        (tmp_path / "own" / f"{part}.csv").write_text(f"sentence,label,idx\n{rows}")
    splits = "".join(
        f"  - name: {p}\n    num_bytes: 1\n    num_examples: {n}\n" for p, n in (("train", 9), ("validation", 4))
    )
    classes_ = "    dtype:\n      class_label:\n        names:\n          '0': a\n          '1': b\n          '2': c\n"
    columns = f"  - name: sentence\n    dtype: string\n  - name: label\n{classes_}  - name: idx\n    dtype: int32\n"
    card = f"---\ndataset_info:\n  features:\n{columns}  splits:\n{splits}---\n"
    (tmp_path / "own" / "README.md").write_text(card)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    _looked_at.cache_clear()
    return "own"


def test_a_data_set_of_the_hub_tells_its_rows_before_they_are_read(stand_in: str) -> None:
    asked = classes(hub={"path": stand_in}, text_columns=["sentence"], num_labels=3)
    assert look_at_hub(asked, 8) == {"train": HubSplit(9), "validation": HubSplit(4)}
    part = {"path": stand_in, "train_split": "train[:50%]+validation"}
    found = look_at_hub(text(hub=part, text_columns=["sentence"]), 8)
    assert found == {"train": HubSplit(), "validation": HubSplit(4, [f"words {i}" for i in range(4)])}


def test_texts_of_the_hub_are_taken_where_they_may_be_too_few(stand_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.inputs.corpus._BYTES_A_TOKEN", 1)
    asked = text(hub={"path": stand_in}, text_columns=["sentence"], max_length=8, search_fraction=0.5)
    assert look_at_hub(asked, 1)["train"] == HubSplit(9)  # 16 bytes are enough, and there are 63
    assert look_at_hub(asked, 4)["train"] == HubSplit(9, [f"words {i}" for i in range(9)])


@pytest.mark.parametrize(
    ("hub_", "fields", "words"),
    [
        ({"name": "other"}, {}, "BuilderConfig 'other' not found"),
        ({"validation_split": "dev"}, {}, "own dev cannot be read.*Available splits"),
        ({"validation_split": "test"}, {}, "Split test of data set own has no rows"),
        ({"train_split": "train+none"}, {}, "none.*Available splits"),
        ({}, {"text_columns": ["text"]}, "no column text.*idx, label, sentence"),
        ({}, {"text_columns": ["idx"]}, "'idx' holds no texts.*sentence"),
        ({}, {"label_column": "y"}, "no column y"),
        ({}, {"text_columns": ["label"], "label_column": "sentence"}, "'label' holds no texts"),
        ({}, {"num_labels": 2}, "own train has the label 2, and the model 2 classes"),
    ],
)
def test_what_a_data_set_of_the_hub_has_not_is_refused_before_it_is_read(
    stand_in: str, hub_: dict[str, str], fields: dict[str, Any], words: str
) -> None:
    asked = {"text_columns": ["sentence"], "num_labels": 3, **fields}
    with pytest.raises(CoaloraError, match=words):
        look_at_hub(classes(hub={"path": stand_in, **hub_}, **asked), 8)


def test_a_hub_that_does_not_answer_is_told_and_refuses_nothing(
    hub: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    hub(train=ConnectionError("Couldn't reach 'p' on the Hub\nmore"))
    _looked_at.cache_clear()
    assert look_at_hub(text(hub={"path": "p"}), 8) == {"train": HubSplit(), "validation": HubSplit()}
    assert "the hub does not tell them now (Couldn't reach 'p' on the Hub)" in caplog.text


def test_input_files_are_those_that_are_named() -> None:
    assert input_files(text(builtin="pydoc-topics")) == []
    assert input_files(text(hub={"path": "p"})) == []
    assert input_files(text(files={"train": "a", "search": "c"})) == [Path("a"), Path("c")]
    named = {"train": "a", "validation": "b", "search": "c"}
    assert input_files(classes(files=named)) == [Path("a"), Path("b"), Path("c")]


def test_a_single_label_reads_values(tmp_path: Path) -> None:
    for part in ("train", "validation"):
        (tmp_path / f"{part}.csv").write_text("text,label\na,0.25\nb,5\n", encoding="utf-8")
    files = {part: str(tmp_path / f"{part}.csv") for part in ("train", "validation")}
    assert examples(classes(files=files, num_labels=1))[0].labels == [0.25, 5.0]
    with pytest.raises(CoaloraError, match=r"0\.25 among the labels of train\.csv"):
        examples(classes(files=files, num_labels=2))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_are_corpora_of_their_text_column_alone(tmp_path: Path, suffix: str) -> None:
    import pandas as pd

    texts = [f"document {i}, with a comma" for i in range(200)]
    frame = pd.DataFrame({"id": range(200), "body": texts, "label": 0})
    path = tmp_path / f"corpus{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path, index=False)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    settings = BenchmarkSettings(
        name="x", task="language-modeling", files={"train": str(path)}, text_columns=["body"], search_fraction=0.2
    )
    parts = documents(settings)
    assert sorted(text for part in parts.values() for text in part) == sorted(texts)
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 2])
    with suppress(CoaloraError):  # another content is read again
        assert documents(settings) != parts
