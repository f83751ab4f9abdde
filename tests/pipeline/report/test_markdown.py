"""Pages in Prefect's UI say what a round and a run came to, and link to MLflow where it has a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from coalora.files import write_json
from pipeline.report.markdown import front_of, result_markdown, round_markdown
from pipeline.report.schema import Round
from pipeline.settings.definitions import load_settings
from pipeline.settings.sections import Settings

ROUND = Round(
    round=2, n_members=3, n_candidates=5, n_accepted=1, hypervolume_before=0.5, hypervolume_after=0.625,
    front=[(1.5, 4.0), (2.0, 2.5)],
)  # fmt: skip
MEMBERS = [{"average_bits": bits} for bits in (2.5, 3.0, 4.0)]


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings("tiny", file=Path(__file__).parents[2] / "flows" / "tiny.yaml")


def test_a_round_is_a_picture_and_its_front_by_rising_bits(settings: Settings) -> None:
    text = round_markdown("demo", settings, 2, [ROUND], MEMBERS, "http://h/runs/1")
    assert text.startswith("# demo: configuration set of round 2\n")
    assert "![Fronts up to round 2](data:image/png;base64," in text
    assert (
        "3 configurations from 2.50 to 4.00 average bits; 2 of them on the front. 1 of 5 candidates accepted." in text
    )
    assert text.index("| 2.500 | 2.0000 |") < text.index("| 4.000 | 1.5000 |")
    assert "In MLflow: [round 2](http://h/runs/1)" in text
    assert front_of(ROUND) == [(2.0, 2.5), (1.5, 4.0)]


def test_the_initial_set_has_no_picture(settings: Settings) -> None:
    text = round_markdown("demo", settings, 0, [], MEMBERS, "")
    assert text.endswith("The initial set: 3 configurations from 2.50 to 4.00 average bits.")


@pytest.mark.parametrize(
    ("url", "link"),
    [("http://h/runs/1", "[run 1](http://h/runs/1)"), ("mlflow ui --x", "run 1, `mlflow ui --x`")],
)
def test_a_result_is_the_report_with_what_to_do_next(
    tmp_path: Path, result: dict[str, Any], url: str, link: str
) -> None:
    result["continued"] = [{"prompt": "Once | upon", "budget": 2.5, "none": "a", "coa": "b", "full_precision": "c"}]
    write_json(tmp_path / "result.json", result)
    (tmp_path / "table.md").write_text("| a |\n")
    registered = {"name": "coalora-demo", "version": 3, "reason": "the first champion"}
    text = result_markdown("demo", tmp_path, "runs/demo/1", "1", url, registered)
    for part in ("| a |", link, "coalora-demo, version 3 (the first champion)", "## Once \\| upon", "| CoA-LoRA | b |"):
        assert part in text
    shown = re.findall(r"!\[([^]]*)\]\(data:image/png;base64,iVBOR", text)
    assert [words.split()[0] for words in shown] == ["Metric", "Bits", "Hypervolume", "Training"]
    assert "`coalora adapt runs/demo/1 --bits 3.5 --out adapted/3.5-bits`" in text
    assert ("in MLflow" in text) == url.startswith("http")
