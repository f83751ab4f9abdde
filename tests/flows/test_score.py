"""A finished run's model is measured on any text at any budget; what was measured is not measured again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from coalora.cli import main
from coalora.evaluate.perplexity import score_text
from coalora.export.base import load_adapted
from pipeline.inputs.exports import ExportInputs
from pipeline.inputs.loaders import BaseModel
from tests.commands import refused
from tests.tiny_run import TinyRun, at_home, tiny_run

PROSE = "A model reads what another one wrote, naïvely. " * 9


@pytest.fixture(scope="module")
def run() -> Iterator[TinyRun]:
    made = tiny_run()
    with at_home(made.home):
        yield made


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "book.txt").write_text(PROSE, encoding="utf-8")
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "results"}):
        yield tmp_path / "book.txt"


def score(run: TinyRun, book: Path, *more: str) -> list[dict[str, Any]]:
    out = book.with_name("out.json")
    assert main(["score", str(run.folder), "--text", str(book), "--json", str(out), *more]) == 0
    return json.loads(out.read_text())["scores"]


def test_a_budgets_perplexity_is_that_of_its_export(
    run: TinyRun, book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = score(run, book, "--budget", "2.5", "--max-length", "20", "--stride", "5")
    folder = run.folder / "export" / "2.5-bits"
    model = load_adapted(folder / "base", folder / "adapter")
    ids = BaseModel(run.calibrated.base).tokenizer()(PROSE, add_special_tokens=False)["input_ids"]
    nats = 0.0
    with torch.no_grad():
        for position in range(1, len(ids)):
            begin = 0 if position < 20 else ((position - 20) // 5 + 1) * 5
            logits = model(input_ids=torch.tensor([ids[begin:position]])).logits[0, -1]
            nats -= float(logits.double().log_softmax(-1)[ids[position]])
    assert row["tokens"] == len(ids) - 1
    assert row["loss"] == pytest.approx(nats / row["tokens"], rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * len(ids) / math.log(2) / len(PROSE.encode()), rel=1e-9)
    content = json.loads((folder / "configuration.json").read_text())
    assert (row["budget"], row["digest"]) == (2.5, content["digest"])
    header, line = capsys.readouterr().out.strip().splitlines()[-2:]
    words = "text budget average bits perplexity bits per byte KL divergence top-1 agreement tokens"
    assert " ".join(header.split()) == words
    assert line.split()[-5] == f"{row['perplexity']:.4g}"
    base = run.model.source.load(run.model.data, run.model.runtime, seed=0)
    options = {"max_length": 20, "stride": 5, "batch_size": 3}
    again = score_text(model, ids, len(PROSE.encode()), reference=base, **options)
    assert (row["kl_divergence"], row["top1_agreement"]) == pytest.approx((again.kl, again.agreement))
    assert row["kl_divergence"] > 0


def test_a_command_that_broke_off_goes_on_with_the_budgets_that_are_missing(
    run: TinyRun, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, measured = ExportInputs.device_model, []

    def model(inputs: ExportInputs, budget: float) -> Any:
        measured.append(budget)
        if budget == 3.0 and measured.count(3.0) == 1:
            raise RuntimeError("out of memory")
        return original(inputs, budget)

    monkeypatch.setattr(ExportInputs, "device_model", model)
    with pytest.raises(RuntimeError, match="out of memory"):
        score(run, book, "--budget", "2.5", "3", "3.5")
    rows = score(run, book, "--budget", "2.5", "3", "3.5")
    assert measured == [2.5, 3.0, 3.0, 3.5]
    assert [row["budget"] for row in rows] == [2.5, 3.0, 3.5]
    other = book.with_name("copy.txt")
    other.write_bytes(book.read_bytes())
    assert [row["loss"] for row in score(run, other, "--budget", "3")] == [rows[1]["loss"]]
    assert len(measured) == 4  # the same text under another name


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--budget", "1"], "is below the choice space"),
        (["--budget", "3", "--max-length", "4000"], "is above the"),
        (["--budget", "3", "--max-length", "8", "--stride", "8"], "A stride of 8 leaves tokens of windows of 8 out"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    run: TinyRun, book: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], words: str
) -> None:
    monkeypatch.setattr(BaseModel, "load", None)
    assert words in refused("score", run.folder, "--text", book, *more)


def test_a_text_that_is_missing_or_no_text_is_refused(run: TinyRun, book: Path) -> None:
    assert "none.txt does not exist" in refused(
        "score", run.folder, "--text", book.with_name("none.txt"), "--budget", 3
    )
    book.write_bytes(b"\xff\xfe\xfa")
    assert "is not UTF-8" in refused("score", run.folder, "--text", book, "--budget", 3)
